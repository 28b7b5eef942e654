"""Op `mixed_scale`: one launch that reads x and writes y; backward one that reads grad and x and writes grad_x.

A tile has some channels, rows and columns of the map, so that what goes to a gate is its sum along the axes which the
gate lacks: a row's and a position's are stored tile by tile, a channel's and a column's go on from tile to tile.
Without gates of rows and columns space is one row (FLAT), and tiles follow each other along it. Partial sums are put
together in a fixed order.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import COMBINES
from . import maps
from .language import sigmoid
from .maps import CHANNELS_LAST, SIZES

PRODUCT, SUM, MAX, STRIPS, GATE = (tl.constexpr(COMBINES[name]) for name in ("product", "sum", "max", "strips", "gate"))
NO_VARIANTS = (*SIZES, "w_q", "n_wblk", "rows_b", "rows_c", "rows_h", "columns_b", "columns_c", "columns_w")


@triton.jit
def program(n_cblk, n_wblk, n_split, LAYOUT: tl.constexpr):
    """(sample, block of channels, block of columns, split of the rows) of this program, in the order of memory."""
    pid = tl.program_id(0)
    if LAYOUT == CHANNELS_LAST:
        cblk = pid % n_cblk
        wblk = pid // n_cblk % n_wblk
        split = pid // (n_cblk * n_wblk) % n_split
    else:
        wblk = pid % n_wblk
        split = pid // n_wblk % n_split
        cblk = pid // (n_wblk * n_split) % n_cblk
    return (pid // (n_cblk * n_wblk * n_split)).to(tl.int64), cblk, wblk, split


@triton.jit
def axes(BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Channel, row and column within a tile, along its three axes."""
    c = tl.arange(0, BLOCK_C)[:, None, None]
    return c, tl.arange(0, BLOCK_H)[None, :, None], tl.arange(0, BLOCK_W)[None, None, :]


@triton.jit
def map_tile(b, c0, p0, c, p, C, S, LAYOUT: tl.constexpr):
    """Where a tile's elements lie: c0, p0 its first channel and position, c, p the others from there."""
    if LAYOUT == CHANNELS_LAST:
        return (b * S + p0) * C + c0 + (c + p * C)
    else:
        return (b * C + c0) * S + p0 + (c * S + p)


@triton.jit
def load_gate(gate, at, mask, NONE: tl.constexpr, ACC: tl.constexpr):
    """A tile of gates; NONE where there are none."""
    if gate is None:
        return NONE
    else:
        return tl.load(gate + at, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=NO_VARIANTS)
def _mixed_scale(
    x, channel, spatial, rows, columns, y,
    c_q, s_q, w_q, H, n_cblk, n_wblk, n_split, blocks,
    rows_b, rows_c, rows_h, columns_b, columns_c, columns_w,
    COMBINE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, WV: tl.constexpr, FLAT: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S, W = c_q * CV, s_q * SV, w_q * WV
    NONE: tl.constexpr = 0.0 if COMBINE == SUM or COMBINE == STRIPS else 1.0  # noqa: SIM109
    b, cblk, wblk, split = program(n_cblk, n_wblk, n_split, LAYOUT)
    c, h, w = axes(BLOCK_C, BLOCK_H, BLOCK_W)
    p = w if FLAT else h * W + w
    STEP: tl.constexpr = BLOCK_W if FLAT else BLOCK_H
    c0, w0, h0 = cblk * BLOCK_C, wblk * BLOCK_W, (split * blocks).to(tl.int64) * STEP
    in_c, in_w = c0 + c < C, w0 + w < W
    by_channel = load_gate(channel, b * C + c0 + c, in_c, NONE, ACC)
    at_column = b * columns_b + (c0 + c).to(tl.int64) * columns_c + (w0 + w).to(tl.int64) * columns_w
    by_column = load_gate(columns, at_column, in_c & in_w, NONE, ACC)
    at_row = b * rows_b + (c0 + c).to(tl.int64) * rows_c + h.to(tl.int64) * rows_h
    for _ in range(blocks):
        if FLAT:  # h0 is a position
            p0 = h0
            in_h = h == 0
            in_s = w < tl.minimum(S - h0, BLOCK_W).to(tl.int32)
        else:
            p0 = h0 * W + w0
            in_h = h < tl.minimum(H - h0, BLOCK_H).to(tl.int32)
            in_s = in_h & in_w
        by_position = load_gate(spatial, b * S + p0 + p, in_s, NONE, ACC)
        by_row = load_gate(rows, at_row + h0 * rows_h, in_c & in_h, NONE, ACC)
        mask = in_c & in_s
        at = map_tile(b, c0, p0, c, p, C, S, LAYOUT)
        value = tl.load(x + at, mask=mask, other=0.0)
        v = value.to(ACC)
        if COMBINE == PRODUCT:
            v = v * by_channel * by_position * by_row * by_column
        elif COMBINE == SUM:
            v = v * (by_channel + by_position + by_row + by_column)
        elif COMBINE == MAX:  # of products rounded to x's dtype, as in eager; NaN stays NaN
            of_channel = (v * by_channel).to(value.dtype).to(ACC)
            of_position = (v * by_position).to(value.dtype).to(ACC)
            v = tl.where((of_channel >= of_position) | (of_channel != of_channel), of_channel, of_position)
        elif COMBINE == STRIPS:
            v = v * sigmoid(by_row + by_column)
        elif COMBINE == GATE:
            v = v * sigmoid(by_position)
        else:
            v += v * sigmoid(by_channel * by_position)
        tl.store(y + at, v, mask=mask)
        h0 += STEP


@triton.jit(do_not_specialize=NO_VARIANTS)
def _mixed_scale_backward(
    grad, x, channel, spatial, rows, columns, grad_x, channel_sums, spatial_sums, row_sums, column_sums,
    c_q, s_q, w_q, H, n_cblk, n_wblk, n_split, blocks,
    rows_b, rows_c, rows_h, columns_b, columns_c, columns_w, stride_b, stride_c, stride_s,
    COMBINE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, WV: tl.constexpr, FLAT: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Leaves partial sums: channels' (B, n_split * n_wblk, C), positions' (B, n_cblk, S), rows' (B, n_wblk, C, H) and
    columns' (B, n_split, C, W)."""
    C, S, W = c_q * CV, s_q * SV, w_q * WV
    NONE: tl.constexpr = 0.0 if COMBINE == SUM or COMBINE == STRIPS else 1.0  # noqa: SIM109
    b, cblk, wblk, split = program(n_cblk, n_wblk, n_split, LAYOUT)
    c, h, w = axes(BLOCK_C, BLOCK_H, BLOCK_W)
    p = w if FLAT else h * W + w
    STEP: tl.constexpr = BLOCK_W if FLAT else BLOCK_H
    c0, w0, h0 = cblk * BLOCK_C, wblk * BLOCK_W, (split * blocks).to(tl.int64) * STEP
    in_c, in_w = c0 + c < C, w0 + w < W
    by_channel = load_gate(channel, b * C + c0 + c, in_c, NONE, ACC)
    at_column = b * columns_b + (c0 + c).to(tl.int64) * columns_c + (w0 + w).to(tl.int64) * columns_w
    by_column = load_gate(columns, at_column, in_c & in_w, NONE, ACC)
    at_row = b * rows_b + (c0 + c).to(tl.int64) * rows_c + h.to(tl.int64) * rows_h
    kept = tl.zeros((BLOCK_C, BLOCK_H, BLOCK_W), ACC)  # for channels and columns; their own gates come last
    for _ in range(blocks):
        if FLAT:  # h0 is a position
            p0 = h0
            in_h = h == 0
            in_s = w < tl.minimum(S - h0, BLOCK_W).to(tl.int32)
        else:
            p0 = h0 * W + w0
            in_h = h < tl.minimum(H - h0, BLOCK_H).to(tl.int32)
            in_s = in_h & in_w
        by_position = load_gate(spatial, b * S + p0 + p, in_s, NONE, ACC)
        by_row = load_gate(rows, at_row + h0 * rows_h, in_c & in_h, NONE, ACC)
        mask = in_c & in_s
        at = map_tile(b, c0, p0, c, p, C, S, LAYOUT)
        value = tl.load(x + at, mask=mask, other=0.0)
        if stride_b is not None:
            grad_at = b * stride_b + (c0 + c).to(tl.int64) * stride_c + (p0 + p) * stride_s
            d = tl.load(grad + grad_at, mask=mask, other=0.0).to(ACC)
        else:
            d = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        v = value.to(ACC)
        if COMBINE == PRODUCT:
            dx = d * by_channel * by_position * by_row * by_column
            to_kept = d * v * by_position * by_row
            to_position = d * v * by_channel * by_row * by_column
            to_row = d * v * by_channel * by_position * by_column
        elif COMBINE == SUM:
            dx = d * (by_channel + by_position + by_row + by_column)
            to_kept = d * v
            to_position, to_row = to_kept, to_kept
        elif COMBINE == MAX:  # halves where both are equal; both take all of it where one is NaN, as in torch
            of_channel = (v * by_channel).to(value.dtype).to(ACC)
            of_position = (v * by_position).to(value.dtype).to(ACC)
            share = tl.where(of_channel == of_position, 0.5 * d, d)
            d_channel = tl.where(of_channel < of_position, 0.0, share)
            d_position = tl.where(of_channel > of_position, 0.0, share)
            dx = d_channel * by_channel + d_position * by_position
            to_kept, to_position = d_channel * v, d_position * v
            to_row = to_kept
        elif COMBINE == STRIPS:
            gate = sigmoid(by_row + by_column)
            dx = d * gate
            to_kept = d * v * gate * (1.0 - gate)
            to_position, to_row = to_kept, to_kept
        elif COMBINE == GATE:
            gate = sigmoid(by_position)
            dx = d * gate
            to_position = d * v * gate * (1.0 - gate)
            to_kept, to_row = to_position, to_position
        else:
            gate = sigmoid(by_channel * by_position)
            dx = d + d * gate
            slope = d * v * gate * (1.0 - gate)
            to_kept, to_position = slope * by_position, slope * by_channel
            to_row = to_kept
        tl.store(grad_x + at, dx, mask=mask)
        if channel_sums is not None or column_sums is not None:
            kept += tl.where(mask, to_kept, 0.0)
        if spatial_sums is not None:
            total = tl.sum(tl.where(mask, to_position, 0.0), axis=0, keep_dims=True)
            tl.store(spatial_sums + (b * n_cblk + cblk) * S + p0 + p, total, mask=in_s)
        if row_sums is not None:
            total = tl.sum(tl.where(mask, to_row, 0.0), axis=2, keep_dims=True)
            to = ((b * n_wblk + wblk) * C + c0 + c) * H + h0 + h
            tl.store(row_sums + to, total, mask=in_c & in_h)
        h0 += STEP
    kept = tl.sum(kept, axis=1, keep_dims=True)
    if channel_sums is not None:
        total = tl.sum(kept * by_column if COMBINE == PRODUCT else kept, axis=2, keep_dims=True)
        to = ((b * n_split + split) * n_wblk + wblk) * C + c0 + c
        tl.store(channel_sums + to, total, mask=in_c)
    if column_sums is not None:
        total = kept * by_channel if COMBINE == PRODUCT else kept
        to = ((b * n_split + split) * C + c0 + c) * W + w0 + w
        tl.store(column_sums + to, total, mask=in_c & in_w)


class Plan(NamedTuple):
    """Programs over (sample, block of channels, block of columns, split of rows), each of `blocks` tiles.

    FLAT: over (sample, block of channels, 1, split of space).
    """

    n_cblk: int
    n_wblk: int
    n_split: int
    blocks: int
    block_c: int
    block_h: int
    block_w: int
    num_warps: int


CHANNELS, CHANNELS_OF_LAST = 32, 64  # of a tile, at most
COLUMNS_OF_LAST = 16
ROW_BYTES = 256  # of a tile of an NCHW map


@functools.lru_cache(maxsize=4096)
def _plan(batch: int, channels: int, height: int, width: int, flat: bool, layout: int, itemsize: int, sms: int) -> Plan:
    last = layout == CHANNELS_LAST.value
    contiguous = channels if last else width
    lane = maps.LANE_BYTES // itemsize if contiguous * itemsize % 8 == 0 else maps.LANE_ALONE
    tile = lane * maps.THREADS
    widest = ROW_BYTES // itemsize
    if last:
        widest = max(tile // CHANNELS_OF_LAST, 1) if flat else COLUMNS_OF_LAST
    block_w = min(maps._width(max(width, 1), widest, 8), tile)
    block_c = min(maps.next_power_of_2(channels), CHANNELS_OF_LAST if last else CHANNELS, tile // block_w)
    if height * width >= maps.LONG_ROW:  # offsets within a tile have 32 bits
        block_c = 1
    block_h = min(maps.next_power_of_2(max(height, 1)), tile // (block_w * block_c))
    n_cblk, n_wblk = triton.cdiv(channels, block_c), max(triton.cdiv(width, block_w), 1)
    n_tiles = max(triton.cdiv(height, block_h), 1)
    if flat:
        n_wblk, n_tiles = 1, n_wblk
    # Every split writes the sums of all columns: no more of them than it takes to fill the machine.
    wanted = (maps.PROGRAMS_PER_SM if flat else 2) * sms
    blocks = triton.cdiv(n_tiles, min(max(wanted // max(batch * n_cblk * n_wblk, 1), 1), n_tiles))
    warps = min(max(block_c * block_h * block_w // (32 * lane), 1), 4)
    return Plan(n_cblk, n_wblk, triton.cdiv(n_tiles, blocks), blocks, block_c, block_h, block_w, warps)


def _arguments(
    x: Tensor, layout: int, combine: int, rows: Tensor | None, columns: Tensor | None
) -> tuple[Plan, int, dict[str, Any]]:
    """(plan, programs, the arguments that both kernels take)."""
    flat = rows is None and columns is None
    batch, channels, space = x.shape[0], x.shape[1], x.shape[2:].numel()
    height, width = (1, space) if flat else tuple(x.shape[2:])
    plan = _plan(batch, channels, height, width, flat, layout, x.element_size(), maps.multiprocessors(x.device))
    vector = 16 // x.element_size()
    cv, sv, wv = (math.gcd(max(n, 1), vector) for n in (channels, space, width))
    arguments = {
        "rows": rows,
        "columns": columns,
        "c_q": channels // cv,
        "s_q": space // sv,
        "w_q": width // wv,
        "H": height,
        "n_cblk": plan.n_cblk,
        "n_wblk": plan.n_wblk,
        "n_split": plan.n_split,
        "blocks": plan.blocks,
        **{f"rows_{axis}": 0 if rows is None else rows.stride(i) for i, axis in enumerate("bch")},
        **{
            f"columns_{axis}": 0 if columns is None else columns.stride(i) for i, axis in ((0, "b"), (1, "c"), (3, "w"))
        },
        "COMBINE": combine,
        "CV": cv,
        "SV": sv,
        "WV": wv,
        "FLAT": flat,
        "LAYOUT": layout,
        "BLOCK_C": plan.block_c,
        "BLOCK_H": plan.block_h,
        "BLOCK_W": plan.block_w,
        "ACC": maps.triton_accumulator(x.dtype),
        "num_warps": plan.num_warps,
    }
    return plan, batch * plan.n_cblk * plan.n_wblk * plan.n_split, arguments


def mixed_scale(
    x: Tensor,
    channel: Tensor | None,
    spatial: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    combine: int,
) -> Tensor:
    x, dense = maps.dense(x)
    _, programs, arguments = _arguments(x, dense.layout, combine, rows, columns)
    y = torch.empty_like(x)
    channel, spatial = maps.row(channel), maps.row(spatial)
    maps.launch(_mixed_scale, x, programs, x=x, channel=channel, spatial=spatial, y=y, **arguments)
    return y


def mixed_scale_backward(
    grad: Tensor,
    x: Tensor,
    channel: Tensor | None,
    spatial: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    combine: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dense = maps.dense(x)
    plan, programs, arguments = _arguments(x, dense.layout, combine, rows, columns)
    grad, strides = maps.gradient(grad, x)
    grad_x = torch.empty_like(x)

    def table(gate: Tensor | None, parts: int, *shape: int) -> Tensor | None:
        return None if gate is None else x.new_empty((x.shape[0], parts, *shape), dtype=maps.accumulator(x.dtype))

    channels = x.shape[1]
    sums = {
        "channel_sums": table(channel, plan.n_split * plan.n_wblk, channels),
        "spatial_sums": table(spatial, plan.n_cblk, x.shape[2:].numel()),
        "row_sums": table(rows, plan.n_wblk, channels, x.shape[2]),
        "column_sums": table(columns, plan.n_split, channels, x.shape[-1]),
    }
    maps.launch(
        _mixed_scale_backward,
        x,
        programs,
        grad=grad,
        x=x,
        channel=maps.row(channel),
        spatial=maps.row(spatial),
        grad_x=grad_x,
        **sums,
        **strides,
        **arguments,
    )

    def gradient(gate: Tensor | None, table: Tensor | None) -> Tensor:
        if gate is None or table is None:
            return x.new_empty(0)
        return (table[:, 0] if table.shape[1] == 1 else table.sum(1)).to(gate.dtype).view(gate.shape)

    grads = (gradient(gate, t) for gate, t in zip((channel, spatial, rows, columns), sums.values(), strict=True))
    return grad_x, *grads
