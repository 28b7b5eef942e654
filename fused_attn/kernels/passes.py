"""The loops over a map that the ops are made of. Each program has its sample, BLOCK_K channels and a split of space.

Numbers per channel come and go through memory, (B, C) tables and (B, n_split, C) tables of partial results; a program
that goes on with what it has stored itself places a barrier in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import (
    AVG,
    EVEN,
    IDENTITY,
    MAX,
    NOWHERE,
    RELU,
    activate,
    activate_grad,
    before_activation,
    from_order_key,
    load_affine,
    max_of_rows,
    reduce_max,
    sum_rows,
)
from .maps import strided_tile_at, tile_at


@triton.jit
def inside(first, S, BLOCK_S: tl.constexpr):
    """Which of BLOCK_S positions from `first` (64 bits) lie within space; compared in 32."""
    return tl.arange(0, BLOCK_S) < tl.minimum(S - first, BLOCK_S).to(tl.int32)


@triton.jit
def pool_pass(
    x, affine_weight, affine_bias, sums, best, place,
    b, cblk, split, C, S, n_split, blocks, tiles,
    PRE: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once; leaves partial sums, and partial maxima with first position or multiplicity, (B, n_split, C)."""
    row = (b * n_split + split) * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(tiles):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        weight, bias = load_affine(affine_weight, affine_bias, c, in_c, ACC)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        first = s0  # position of the tile
        total = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        peak = tl.full((BLOCK_C, BLOCK_S), float("-inf"), ACC)
        found = tl.full((BLOCK_C, BLOCK_S), 0 if TIES == EVEN else NOWHERE, tl.int32)
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = tl.load(x + at + offsets, mask=mask, other=0.0)
            u = activate(before_activation(value.to(ACC), weight, bias, affine_weight is not None), PRE)
            if POOL != MAX:
                total += tl.where(mask, u, 0.0)
            if POOL != AVG:
                u = u.to(value.dtype).to(ACC)
                better = mask & ((u > peak) | ((u != u) & (peak == peak)))
                if TIES == EVEN:
                    found = tl.where(better, 1, tl.where(mask & (u == peak), found + 1, found))
                else:
                    position = first.to(tl.int32) + tl.arange(0, BLOCK_S)
                    found = tl.where(better, tl.broadcast_to(position[None, :], better.shape), found)
                peak = tl.where(better, u, peak)
            at += step
            first += BLOCK_S
        if POOL != MAX:
            tl.store(sums + row + c, tl.sum(total, axis=1), mask=in_c)
        if POOL != AVG:
            key, where = reduce_max(peak, found, 1, TIES)
            tl.store(best + row + c, from_order_key(key), mask=in_c)
            tl.store(place + row + c, where, mask=in_c)


@triton.jit
def descriptor(
    sums, best, place, b, c, mask, C, S, n_split,
    POOL: tl.constexpr, TIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(mean, maximum, its place) of channels c from the partial results of all splits; what POOL lacks is the other."""
    first = b * n_split * C
    if POOL == MAX:
        peak, found = max_of_rows(best + first, place + first, n_split, C, c, mask, TIES, BLOCK_ROWS, ACC)
        return peak, peak, found
    else:
        mean = sum_rows(sums + first, n_split, C, c, mask, BLOCK_ROWS, ACC) / S
        if POOL == AVG:
            return mean, mean, c
        else:
            peak, found = max_of_rows(best + first, place + first, n_split, C, c, mask, TIES, BLOCK_ROWS, ACC)
            return mean, peak, found


@triton.jit
def channel_gates(gate, c, mask, GATE: tl.constexpr, ACC: tl.constexpr):
    """The gates of channels c, (BLOCK_C, 1), from a sample's row of what GATE is applied to; None: one."""
    if gate is None:
        return 1.0
    else:
        return activate(tl.load(gate + c, mask=mask, other=0.0).to(ACC), GATE)[:, None]


@triton.jit
def space_gates(gate, first, S, GATE: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr):
    """The gates of BLOCK_S positions, (1, BLOCK_S), likewise."""
    if gate is None:
        return 1.0
    else:
        at = gate + first + tl.arange(0, BLOCK_S)
        return activate(tl.load(at, mask=inside(first, S, BLOCK_S), other=0.0).to(ACC), GATE)[None, :]


@triton.jit
def scale_pass(
    x, residual, y, gate, space_gate, affine_weight, affine_bias,
    b, cblk, split, C, S, blocks, tiles,
    GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x and the residual once, writes y; `gate` and `space_gate` point at the sample's rows."""
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(tiles):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        weight, bias = load_affine(affine_weight, affine_bias, c, in_c, ACC)
        g = channel_gates(gate, c, in_c, GATE, ACC)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        first = s0  # position of the tile
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
            result = activate(before_activation(value, weight, bias, affine_weight is not None), PRE) * g
            result *= space_gates(space_gate, first, S, SPACE_GATE, BLOCK_S, ACC)
            if residual is not None:
                result += tl.load(residual + at + offsets, mask=mask, other=0.0).to(ACC)
            tl.store(y + at + offsets, activate(result, POST), mask=mask)
            at += step
            first += BLOCK_S


@triton.jit
def before_epilogue(dy, result, y, residual, at, mask, POST: tl.constexpr):
    """The gradient dy taken back through POST: by y's sign for ReLU, else at `result` plus the residual."""
    if POST == RELU:
        return tl.where(tl.load(y + at, mask=mask, other=0.0) <= 0, 0.0, dy)
    else:
        if residual is not None:
            result += tl.load(residual + at, mask=mask, other=0.0).to(result.dtype)
        return dy * activate_grad(result, POST)


@triton.jit
def backward_pass(
    grad, x, y, residual, grad_x, grad_residual, affine_weight, affine_bias,
    gate, mean, value, place, peak, dots, weight_sums, bias_sums, space_gate, space_grads, channel, space_peak,
    b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Backward of scale_pass and both pools, each tensor that is not None read or written once.

    u is the map after the prologue, v = u * gate, y = v * space_gate. grad: y's, with the given strides (None: x's), or
    None where only pools have a gradient. The gradient of v is grad * space_gate plus what its pools over channels had,
    `space_grads` (2, S) for maximum and mean, the maximum's at `channel`, or with `space_peak` wherever v equals it.
    `dots`: partial sums over space of the gradient of v times u. grad_x gets the gradient of v times gate, `mean`
    (per channel) and `value` at `place`, or with `peak` wherever u equals it. Pointers are at the sample's row.
    """
    row = (b * n_split + split) * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    READS_X: tl.constexpr = dots is not None or AFFINE or PRE != IDENTITY or peak is not None or space_peak is not None
    for j in range(tiles):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        weight, bias = load_affine(affine_weight, affine_bias, c, in_c, ACC)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        g = channel_gates(gate, c, in_c, GATE, ACC)
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_at(
                b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
            )
        if mean is not None:
            shared = tl.load(mean + c, mask=in_c, other=0.0).to(ACC)
        if value is not None:
            to_peak = tl.load(value + c, mask=in_c, other=0.0).to(ACC)
            if peak is not None:
                highest = tl.load(peak + c, mask=in_c, other=0.0).to(ACC)
            else:
                peak_at = tl.load(place + c, mask=in_c, other=0)
        first = s0  # position of the tile
        dot = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        weight_sum = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        bias_sum = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            if READS_X:
                v = tl.load(x + at + offsets, mask=mask, other=0.0)
                before = before_activation(v.to(ACC), weight, bias, AFFINE)
                u = activate(before, PRE)
            du = tl.zeros((BLOCK_C, BLOCK_S), ACC)  # first of v
            if grad is not None:
                if stride_b is not None:
                    dy = tl.load(grad + grad_at + grad_offsets, mask=mask, other=0.0).to(ACC)
                    grad_at += grad_step
                else:
                    dy = tl.load(grad + at + offsets, mask=mask, other=0.0).to(ACC)
                by_space = space_gates(space_gate, first, S, SPACE_GATE, BLOCK_S, ACC)
                if POST != IDENTITY:
                    dy = before_epilogue(dy, u * g * by_space if READS_X else dy, y, residual, at + offsets, mask, POST)
                if grad_residual is not None:
                    tl.store(grad_residual + at + offsets, dy, mask=mask)
                du += dy * by_space
            if space_grads is not None:
                position = first + tl.arange(0, BLOCK_S)
                in_s = inside(first, S, BLOCK_S)
                to_max = tl.load(space_grads + position, mask=in_s, other=0.0)
                du += tl.load(space_grads + S + position, mask=in_s, other=0.0)[None, :]
                if space_peak is not None:
                    highest_of_v = tl.load(space_peak + position, mask=in_s, other=0.0)
                    here = (u * g).to(x.dtype.element_ty).to(ACC) == highest_of_v[None, :]
                else:
                    here = c[:, None] == tl.load(channel + position, mask=in_s, other=0)[None, :]
                du += tl.where(here, to_max[None, :], 0.0)
            if dots is not None:
                dot += tl.where(mask, du * u, 0.0)
            du *= g
            if grad_x is not None:
                if mean is not None:
                    du += shared[:, None]
                if value is not None:
                    if peak is not None:
                        hit = u.to(x.dtype.element_ty).to(ACC) == highest[:, None]
                    else:
                        hit = (first.to(tl.int32) + tl.arange(0, BLOCK_S))[None, :] == peak_at[:, None]
                    du += tl.where(hit, to_peak[:, None], 0.0)
                if PRE != IDENTITY:
                    du *= activate_grad(before, PRE)
                if AFFINE:
                    weight_sum += tl.where(mask, du * v.to(ACC), 0.0)
                    bias_sum += tl.where(mask, du, 0.0)
                    du *= weight[:, None]
                tl.store(grad_x + at + offsets, du, mask=mask)
            at += step
            first += BLOCK_S
        if dots is not None:
            tl.store(dots + row + c, tl.sum(dot, axis=1), mask=in_c)
        if AFFINE and grad_x is not None:
            tl.store(weight_sums + row + c, tl.sum(weight_sum, axis=1), mask=in_c)
            tl.store(bias_sums + row + c, tl.sum(bias_sum, axis=1), mask=in_c)


@triton.jit
def store_pool_gradients(
    mean, value, grad_mean, grad_peak, peak, place, c, mask, S, POOL: tl.constexpr, TIES: tl.constexpr
):  # fmt: skip
    """What backward_pass spreads, `mean` and `value`, from the gradients of a mean and of a maximum.

    A NaN maximum makes its channel NaN where ties are shared, as dividing by its multiplicity of 0 does in eager.
    """
    to_all = grad_mean / S
    if POOL != AVG:
        if TIES == EVEN:
            grad_peak = grad_peak / tl.load(place + c, mask=mask, other=1)
            highest = tl.load(peak + c, mask=mask, other=0.0)
            to_all = tl.where(highest != highest, float("nan"), to_all)
        tl.store(value + c, grad_peak, mask=mask)
    tl.store(mean + c, to_all, mask=mask)
