"""The passes of `norm_gate` that other ops have not: `moments` reads x; `norm_dots` reads grad and x (and y where a
ReLU follows) and writes the residual's gradient where an activation follows; `norm_gradients` reads grad and x and
writes grad_x. Kept on chip: a tile, and in `norm_dots` five sums an element of it. Left in memory: two (`moments`) or
five numbers a channel and split of space.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS
from . import maps
from .language import IDENTITY, activate, activate_grad, before_activation
from .maps import SIZES, locate, strided_tile_at, tile_at
from .passes import before_epilogue, inside
from .simam import BLOCK_ROWS, _first_of, _joined, _moments

_IDENTITY = ACTIVATIONS["identity"]


@triton.jit(do_not_specialize=SIZES)
def _finish_moments(
    x, means, squares, out, c_q, s_q, n_cblk, n_split, blocks,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From what the splits left to (B, 3, C); reads the first element of each channel."""
    C, S = c_q * CV, s_q * SV
    b = (tl.program_id(0) // n_cblk).to(tl.int64)
    c = tl.program_id(0) % n_cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    split_size = blocks.to(tl.int64) * BLOCK_S
    rest, square = _joined(means, squares, b, c, in_c, C, S, n_split, split_size, BLOCK_ROWS, ACC)
    to = out + 3 * b * C + c
    tl.store(to, _first_of(x, b, c, in_c, C, S, LAYOUT, ACC), mask=in_c)
    tl.store(to + C, rest, mask=in_c)
    tl.store(to + 2 * C, square, mask=in_c)


@triton.jit
def _load_row(table, c, mask):
    return tl.load(table + c, mask=mask, other=0.0)[:, None]


@triton.jit
def _load_map(values, at, mask, ACC: tl.constexpr):
    return tl.load(values + at, mask=mask, other=0.0).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def _norm_dots(
    grad, x, y, residual, norm, gate, grad_residual, sums,
    c_q, s_q, n_cblk, n_split, blocks, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad, x and y or the residual once, writes grad_residual; leaves (B, n_split, 5, C) partial sums."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(BLOCK_K // BLOCK_C):
        c0 = cblk * BLOCK_K + j * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        weight = tl.load(norm + c, mask=in_c, other=0.0)
        bias = tl.load(norm + C + c, mask=in_c, other=0.0)
        mean = _load_row(norm + 2 * C, c, in_c)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        grad_at, grad_offsets, grad_step = at, offsets, step
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_at(
                b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
            )
        first = s0  # position of the tile
        dot = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        dv = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        dv_centred = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        slopes = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        slopes_centred = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = _load_map(x, at + offsets, mask, ACC)
            h = _load_map(grad, grad_at + grad_offsets, mask, ACC)
            v = before_activation(value, weight, bias, True)
            u = activate(v, PRE)
            if POST != IDENTITY:
                g = _load_row(gate + b * C, c, in_c)
                h = before_epilogue(h, u * g, y, residual, at + offsets, mask, POST)
                tl.store(grad_residual + at + offsets, h, mask=mask)
            h = tl.where(mask, h, 0.0)
            centred = tl.where(mask, value - mean, 0.0)
            dot += h * tl.where(mask, u, 0.0)
            if PRE == IDENTITY:
                dv += h
                dv_centred += h * centred
                slopes_centred += centred
            else:
                slope = tl.where(mask, activate_grad(v, PRE), 0.0)
                h *= slope
                dv += h
                dv_centred += h * centred
                slopes += slope
                slopes_centred += slope * centred
            at += step
            grad_at += grad_step
            first += BLOCK_S
        to = sums + (b * n_split + split) * 5 * C + c
        tl.store(to, tl.sum(dot, axis=1), mask=in_c)
        tl.store(to + C, tl.sum(dv, axis=1), mask=in_c)
        tl.store(to + 2 * C, tl.sum(dv_centred, axis=1), mask=in_c)
        if PRE == IDENTITY:  # of as many ones as the split has positions
            positions = tl.maximum(tl.minimum(S - s0, blocks.to(tl.int64) * BLOCK_S), 0)
            tl.store(to + 3 * C, tl.zeros((BLOCK_C,), ACC) + positions.to(ACC), mask=in_c)
        else:
            tl.store(to + 3 * C, tl.sum(slopes, axis=1), mask=in_c)
        tl.store(to + 4 * C, tl.sum(slopes_centred, axis=1), mask=in_c)


@triton.jit(do_not_specialize=SIZES)
def _norm_gradients(
    grad, x, norm, factors, constants, grad_x,
    c_q, s_q, n_cblk, n_split, blocks, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x once, in reverse, writes grad_x."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(BLOCK_K // BLOCK_C):
        c0 = cblk * BLOCK_K + j * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        weight = tl.load(norm + c, mask=in_c, other=0.0)
        bias = tl.load(norm + C + c, mask=in_c, other=0.0)
        mean = _load_row(norm + 2 * C, c, in_c)
        gate = _load_row(factors + 2 * b * C, c, in_c)
        pooled = _load_row(factors + (2 * b + 1) * C, c, in_c)
        shift = _load_row(constants, c, in_c)
        of_x = _load_row(constants + C, c, in_c)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        grad_at, grad_offsets, grad_step = at, offsets, step
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_at(
                b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
            )
        first = s0  # position of the tile
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = _load_map(x, at + offsets, mask, ACC)
            dv = _load_map(grad, grad_at + grad_offsets, mask, ACC) * gate + pooled
            if PRE != IDENTITY:
                dv *= activate_grad(before_activation(value, weight, bias, True), PRE)
            tl.store(grad_x + at + offsets, dv + (shift + of_x * (value - mean)), mask=mask)
            at += step
            grad_at += grad_step
            first += BLOCK_S


def moments(x: Tensor) -> Tensor:
    x, plan = maps.dense(x)
    out = x.new_empty((plan.batch, 3, plan.channels), dtype=maps.accumulator(x.dtype))
    tables = {"means": maps.table(x, plan), "squares": maps.table(x, plan)}
    arguments = plan.arguments(x.dtype)
    maps.launch(_moments, x, plan.programs, x=x, **tables, **arguments)
    block = min(128, maps.next_power_of_2(plan.channels))
    n_cblk = triton.cdiv(plan.channels, block)
    unused = ("BLOCK_C", "num_warps")
    arguments = {k: v for k, v in arguments.items() if k not in unused} | {"BLOCK_K": block, "n_cblk": n_cblk}
    maps.launch(
        _finish_moments,
        x,
        plan.batch * n_cblk,
        x=x,
        out=out,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=1,
        **tables,
        **arguments,
    )
    return out


def norm_dots(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    norm: Tensor,
    gate: Tensor,
    activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor]:
    x, plan = maps.dense(x)
    grad_residual = x.new_empty(0) if post_activation == _IDENTITY else torch.empty_like(x)
    grad, strides = maps.gradient(grad, x)
    shape = plan.batch, plan.n_split, 5, plan.channels
    sums = x.new_empty(shape, dtype=maps.accumulator(x.dtype))
    maps.launch(
        _norm_dots,
        x,
        plan.programs,
        grad=grad,
        x=x,
        y=maps.as_map(y, x),
        residual=maps.as_map(residual, x),
        norm=norm.contiguous(),
        gate=gate.contiguous(),
        grad_residual=None if post_activation == _IDENTITY else grad_residual,
        sums=sums,
        PRE=activation,
        POST=post_activation,
        **strides,
        **plan.arguments(x.dtype),
    )
    return sums[:, 0] if plan.n_split == 1 else sums.sum(1), grad_residual


def norm_gradients(
    grad: Tensor, x: Tensor, norm: Tensor, factors: Tensor, constants: Tensor, activation: int
) -> Tensor:
    x, plan = maps.dense(x)
    grad_x = torch.empty_like(x)
    grad, strides = maps.gradient(grad, x)
    maps.launch(
        _norm_gradients,
        x,
        plan.programs,
        grad=grad,
        x=x,
        norm=norm.contiguous(),
        factors=factors.contiguous(),
        constants=constants.contiguous(),
        grad_x=grad_x,
        PRE=activation,
        **strides,
        **plan.arguments(x.dtype),
    )
    return grad_x
