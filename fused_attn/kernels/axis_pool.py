"""Op `axis_pool`: one read of x, then what the blocks left of each pool is put together; backward is one read of the
map's gradient, where there is one, and one write of grad_x (and a read of x for shared ties).

Programs work on tiles of BLOCK_C channels x BLOCK_H rows x BLOCK_W columns, and on `tiles` of them along the channels
one after the other: the pools over channels stay in registers, those over rows and columns leave a partial result a
tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import TIES
from . import maps
from .channel_pool import BLOCK, _finish_pool
from .language import EVEN, NOWHERE, from_order_key, reduce_max
from .maps import CHANNELS_LAST, SIZES

AXIS_SIZES = (*SIZES, "w_q", "n_c", "n_h", "n_w")
TILE, WARPS = 4096, 8
CHANNELS = 64  # a program
CHANNELS_A_TILE, SIDE = 16, 16  # channels_last: 32 bytes or more along the contiguous axis, square in space


@triton.jit
def _tile(n_c, n_h, n_w, tiles, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(sample, block of channels, of rows, of columns) of this program, its first channel, its rows and columns."""
    pid = tl.program_id(0)
    wblk = pid % n_w
    hblk = pid // n_w % n_h
    cblk = pid // (n_w * n_h) % n_c
    b = (pid // (n_w * n_h * n_c)).to(tl.int64)
    h, w = hblk * BLOCK_H + tl.arange(0, BLOCK_H), wblk * BLOCK_W + tl.arange(0, BLOCK_W)
    return b, cblk, hblk, wblk, cblk * tiles * BLOCK_C, h, w


@triton.jit
def _elements(b, c0, c, h, w, C, H, W, LAYOUT: tl.constexpr):
    """(64-bit offset of channel c0 of the sample, offsets of a tile from there, which of them are in the map)."""
    local = c - c0
    mask = (c < C)[:, None, None] & (h < H)[None, :, None] & (w < W)[None, None, :]
    position = (h * W)[:, None] + w[None, :]
    if LAYOUT == CHANNELS_LAST:
        return b * H * W * C + c0, local[:, None, None] + (position * C)[None, :, :], mask
    else:
        return (b * C + c0) * H * W, (local * (H * W))[:, None, None] + position[None, :, :], mask


@triton.jit
def _store_partial(
    v, number, mask, sums, best, place, at, inside, AXIS: tl.constexpr, MAXIMA: tl.constexpr, TIES: tl.constexpr
):
    """A tile's sums and maxima along one axis, whose elements have these numbers."""
    tl.store(sums + at, tl.sum(tl.where(mask, v, 0.0), axis=AXIS), mask=inside)
    if MAXIMA:
        found = mask.to(tl.int32) if TIES == EVEN else tl.where(mask, number, NOWHERE)
        key, where = reduce_max(tl.where(mask, v, float("-inf")), found, AXIS, TIES)
        tl.store(best + at, from_order_key(key), mask=inside)
        tl.store(place + at, where, mask=inside)


@triton.jit(do_not_specialize=AXIS_SIZES)
def _axis_pool(
    x, row_sums, row_best, row_place, column_sums, column_best, column_place, plane_sums, plane_best, plane_place,
    c_q, w_q, H, n_c, n_h, n_w, tiles,
    MAXIMA: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, WV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once; leaves parts of the rows (B, n_w, C, H), the columns (B, n_h, C, W), the plane (B, n_c, H, W)."""
    C, W = c_q * CV, w_q * WV
    b, cblk, hblk, wblk, c_first, h, w = _tile(n_c, n_h, n_w, tiles, BLOCK_C, BLOCK_H, BLOCK_W)
    total = tl.zeros((BLOCK_C, BLOCK_H, BLOCK_W), ACC)
    peak = tl.full((BLOCK_C, BLOCK_H, BLOCK_W), float("-inf"), ACC)
    found = tl.full((BLOCK_C, BLOCK_H, BLOCK_W), 0 if TIES == EVEN else NOWHERE, tl.int32)
    for j in range(tiles):
        c0 = c_first + j * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        at, offsets, mask = _elements(b, c0, c, h, w, C, H, W, LAYOUT)
        v = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
        in_c = (c < C)[:, None]
        row = ((b * n_w + wblk) * C + c)[:, None] * H + h[None, :]
        _store_partial(
            v, w[None, None, :], mask, row_sums, row_best, row_place, row, in_c & (h < H)[None, :], 2, MAXIMA, TIES
        )
        column = ((b * n_h + hblk) * C + c)[:, None] * W + w[None, :]
        _store_partial(
            v, h[None, :, None], mask, column_sums, column_best, column_place, column, in_c & (w < W)[None, :],
            1, MAXIMA, TIES,
        )  # fmt: skip
        if plane_sums is not None:
            total += tl.where(mask, v, 0.0)
            better = mask & ((v > peak) | ((v != v) & (peak == peak)))
            if TIES == EVEN:
                found = tl.where(better, 1, tl.where(mask & (v == peak), found + 1, found))
            else:
                found = tl.where(better, tl.broadcast_to(c[:, None, None], better.shape), found)
            peak = tl.where(better, v, peak)
    if plane_sums is not None:
        inside = (h < H)[:, None] & (w < W)[None, :]
        at = ((b * n_c + cblk) * H + h)[:, None] * W + w[None, :]
        key, where = reduce_max(peak, found, 0, TIES)
        tl.store(plane_sums + at, tl.sum(total, axis=0), mask=inside)
        tl.store(plane_best + at, from_order_key(key), mask=inside)
        tl.store(plane_place + at, where, mask=inside)


@triton.jit
def _passed_on(
    grads, pool, index, b, at, mask, numbers, length, MAXIMA: tl.constexpr, TIES: tl.constexpr, ACC: tl.constexpr
):
    """(what each element gets of the mean, what the maximum gets, and the maximum's place or, where ties are shared,
    its value) at places `at` of a pool of so many numbers a sample."""
    if MAXIMA:
        pair = b * 2 * numbers + at
        value = tl.load(grads + pair, mask=mask, other=0.0).to(ACC)
        mean = tl.load(grads + pair + numbers, mask=mask, other=0.0).to(ACC) / length
        if TIES == EVEN:  # a NaN maximum makes its line NaN, as dividing by its multiplicity of 0 does in eager
            tag = tl.load(pool + pair, mask=mask, other=0.0).to(ACC)
            value = value / tl.load(index + b * numbers + at, mask=mask, other=1)
            mean = tl.where(tag != tag, float("nan"), mean)
        else:
            tag = tl.load(index + b * numbers + at, mask=mask, other=0)
        return mean, value, tag
    else:
        mean = tl.load(grads + b * numbers + at, mask=mask, other=0.0).to(ACC) / length
        return mean, mean, mean


@triton.jit
def _received(mean, value, tag, number, v, MAXIMA: tl.constexpr, TIES: tl.constexpr):
    """What the elements of a tile, with these numbers along the pooled axis, receive."""
    if MAXIMA:
        if TIES == EVEN:
            return mean + tl.where(v == tag, value, 0.0)
        else:
            return mean + tl.where(number == tag, value, 0.0)
    else:
        return mean


@triton.jit(do_not_specialize=AXIS_SIZES)
def _axis_spread(
    grad, x, grad_x, grad_rows, rows, row_index, grad_columns, columns, column_index, grad_plane, plane, plane_index,
    c_q, w_q, H, n_c, n_h, n_w, tiles,
    MAXIMA: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, WV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad (and x for shared ties), writes grad_x."""
    C, W = c_q * CV, w_q * WV
    b, cblk, hblk, wblk, c_first, h, w = _tile(n_c, n_h, n_w, tiles, BLOCK_C, BLOCK_H, BLOCK_W)
    if grad_plane is not None:
        in_plane = (h < H)[:, None] & (w < W)[None, :]
        position = (h * W)[:, None] + w[None, :]
        depth_mean, depth_value, depth_tag = _passed_on(
            grad_plane, plane, plane_index, b, position, in_plane, H * W, C, MAXIMA, TIES, ACC
        )
    for j in range(tiles):
        c0 = c_first + j * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        start, offsets, mask = _elements(b, c0, c, h, w, C, H, W, LAYOUT)
        du = tl.zeros((BLOCK_C, BLOCK_H, BLOCK_W), ACC)
        v = du
        if MAXIMA and TIES == EVEN:
            v = tl.load(x + start + offsets, mask=mask, other=0.0).to(ACC)
        if grad is not None:
            du += tl.load(grad + start + offsets, mask=mask, other=0.0).to(ACC)
        if grad_rows is not None:
            inside = (c < C)[:, None] & (h < H)[None, :]
            mean, value, tag = _passed_on(
                grad_rows, rows, row_index, b, (c * H)[:, None] + h[None, :], inside, C * H, W, MAXIMA, TIES, ACC
            )
            du += _received(mean[:, :, None], value[:, :, None], tag[:, :, None], w[None, None, :], v, MAXIMA, TIES)
        if grad_columns is not None:
            inside = (c < C)[:, None] & (w < W)[None, :]
            mean, value, tag = _passed_on(
                grad_columns, columns, column_index, b, (c * W)[:, None] + w[None, :], inside, C * W, H,
                MAXIMA, TIES, ACC,
            )  # fmt: skip
            du += _received(mean[:, None, :], value[:, None, :], tag[:, None, :], h[None, :, None], v, MAXIMA, TIES)
        if grad_plane is not None:
            du += _received(
                depth_mean[None, :, :], depth_value[None, :, :], depth_tag[None, :, :], c[:, None, None], v,
                MAXIMA, TIES,
            )  # fmt: skip
        tl.store(grad_x + start + offsets, du, mask=mask)


def _arguments(x: Tensor, layout: int, tile: int) -> dict[str, Any]:
    """Tiles of so many elements, sizes and options that both kernels take."""
    batch, channels, height, width = x.shape
    power, vector = maps.next_power_of_2, 16 // x.element_size()
    if layout == CHANNELS_LAST.value:
        block_c = min(power(channels), CHANNELS_A_TILE)
        block_w = min(power(width), max(SIDE, tile // (block_c * power(height))), tile // block_c)
        block_h = min(power(height), tile // (block_c * block_w))
    else:
        block_w = min(power(width), tile)
        block_h = min(power(height), tile // block_w)
        block_c = 1 if height * width >= maps.LONG_ROW else min(power(channels), tile // (block_w * block_h))
    tiles = max(min(power(channels), CHANNELS) // block_c, 1)
    n_h, n_w = triton.cdiv(height, block_h), triton.cdiv(width, block_w)
    wanted = 2 * maps.multiprocessors(x.device)
    while tiles > 1 and batch * triton.cdiv(channels, tiles * block_c) * n_h * n_w < wanted:
        tiles //= 2
    cv, wv = math.gcd(channels, vector), math.gcd(width, vector)
    return {
        "c_q": channels // cv,
        "w_q": width // wv,
        "H": height,
        "n_c": triton.cdiv(channels, tiles * block_c),
        "n_h": n_h,
        "n_w": n_w,
        "tiles": tiles,
        "CV": cv,
        "WV": wv,
        "LAYOUT": layout,
        "BLOCK_C": block_c,
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
        "ACC": maps.triton_accumulator(x.dtype),
        "num_warps": max(min(block_c * block_h * block_w // 256, WARPS), 1),
    }


def _tile_size(x: Tensor, maxima: int, plane: bool | int, ties: int) -> int:
    """Elements a tile: what takes registers beside the map makes it smaller."""
    halvings = bool(plane) + bool(maxima and ties == TIES["even"]) + (x.dtype == torch.float64)
    return TILE >> (halvings + bool(plane and maxima and x.dtype == torch.float32))


def _programs(x: Tensor, given: dict[str, Any]) -> int:
    return x.shape[0] * given["n_c"] * given["n_h"] * given["n_w"] if x.numel() else 0


def axis_pool(
    x: Tensor, maxima: int, channels: int, ties: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x)
    batch, depth, height, width = x.shape
    given = _arguments(x, plan.layout, _tile_size(x, maxima, channels, ties))
    most = triton.cdiv(depth, given["BLOCK_C"])  # blocks of channels, however small the batch
    # Of each pool: its shape, the parts that are left of it, and the length of what is pooled.
    shapes = {
        "row": ((depth, height), given["n_w"], width),
        "column": ((depth, width), given["n_h"], height),
        "plane": ((height, width), given["n_c"], depth),
    }
    tables: dict[str, Tensor | None] = {}
    for name, (shape, parts, _) in shapes.items():
        sums = None
        if name != "plane" or channels:
            sums = x.new_empty((batch, parts, *shape), dtype=maps.accumulator(x.dtype))
        tables[f"{name}_sums"] = sums
        tables[f"{name}_best"] = None if sums is None or not maxima else torch.empty_like(sums)
        tables[f"{name}_place"] = None if sums is None or not maxima else torch.empty_like(sums, dtype=torch.int32)
    maps.launch(_axis_pool, x, _programs(x, given), x=x, MAXIMA=maxima, TIES=ties, **tables, **given)
    pools, indices = [], []
    for name, (shape, parts, length) in shapes.items():
        sums = tables[f"{name}_sums"]
        if sums is None or not maxima:
            if sums is None:
                pool = x.new_empty(0)
            elif x.numel() == 0:
                pool = x.new_full((batch, *shape), math.nan)
            else:
                pool = (sums.sum(1) / length).to(x.dtype)
            pools.append(pool)
            indices.append(x.new_empty(0, dtype=torch.int32))
            continue
        pools.append(x.new_empty((batch, 2, *shape)))
        indices.append(x.new_empty((batch, *shape), dtype=torch.int32))
        numbers = math.prod(shape)
        blocks = triton.cdiv(numbers, BLOCK)
        maps.launch(
            _finish_pool,
            x,
            batch * blocks,
            pooled=pools[-1],
            index=indices[-1],
            C=length,
            S=numbers,
            n_cblk=parts,
            s_blocks=blocks,
            MEAN_FIRST=0,
            TIES=ties,
            BLOCK_S=BLOCK,
            BLOCK_ROWS=min(maps.next_power_of_2(most if name == "plane" else parts), 8),
            ACC=maps.triton_accumulator(x.dtype),
            num_warps=2,
            **{part: tables[f"{name}_{part}"] for part in ("sums", "best", "place")},
        )
    rows, columns, plane = pools
    if not maxima:
        rows, columns = rows[..., None], columns[:, :, None]
    return rows, columns, plane, *indices


def axis_pool_backward(
    grad: Tensor | None,
    grad_rows: Tensor | None,
    grad_columns: Tensor | None,
    grad_plane: Tensor | None,
    x: Tensor,
    rows: Tensor,
    columns: Tensor,
    plane: Tensor,
    row_index: Tensor,
    column_index: Tensor,
    plane_index: Tensor,
    maxima: int,
    channels: int,
    ties: int,
) -> Tensor:
    x, plan = maps.dense(x)
    row_index, column_index, plane_index = (index.contiguous() for index in (row_index, column_index, plane_index))
    given = _arguments(x, plan.layout, _tile_size(x, maxima, grad_plane is not None, ties))
    grad_x = torch.empty_like(x)
    maps.launch(
        _axis_spread,
        x,
        _programs(x, given),
        grad=maps.as_map(grad, x),
        x=x,
        grad_x=grad_x,
        grad_rows=maps.row(grad_rows),
        rows=rows,
        row_index=row_index,
        grad_columns=maps.row(grad_columns),
        columns=columns,
        column_index=column_index,
        grad_plane=maps.row(grad_plane) if channels else None,
        plane=plane,
        plane_index=plane_index,
        MAXIMA=maxima,
        TIES=ties,
        **given,
    )
    return grad_x
