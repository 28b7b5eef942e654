"""Pools over channels, and the convolution of a spatial gate: what `passes.py` is for pools over space.

A program has its sample, BLOCK_K channels and a split of space; it leaves partial results (B, n_cblk, S), one row a
block of channels. The convolution's programs have BLOCK_S positions each and all channels' partial results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import (
    EVEN,
    IDENTITY,
    NOWHERE,
    activate,
    activate_grad,
    before_activation,
    from_order_key,
    load_affine,
    masked,
    max_of_rows,
    order_key,
    reduce_max,
    sum_rows,
)
from .maps import CHANNELS_LAST, SIZES, strided_tile_at, tile_at
from .passes import before_epilogue, channel_gates, inside, space_gates


@triton.jit
def _next_tile_at(b, c0, s0, C, S, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """tile_at, with the step to the next tile of channels."""
    at, offsets, _ = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
    if LAYOUT == CHANNELS_LAST:
        return at, offsets, tl.full((), BLOCK_C, tl.int64)
    else:
        return at, offsets, (BLOCK_C * S).to(tl.int64)


@triton.jit
def channel_pool_pass(
    x, affine_weight, affine_bias, gate, sums, best, place,
    b, cblk, split, C, S, n_cblk, blocks, tiles,
    GATE: tl.constexpr, PRE: tl.constexpr, TIES: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once; leaves sums and maxima over the program's channels of the gated map, which is never written."""
    first = (split * blocks).to(tl.int64) * BLOCK_S
    row = (b * n_cblk + cblk) * S
    k = tl.arange(0, BLOCK_C)
    for _ in range(blocks):
        in_s = inside(first, S, BLOCK_S)[None, :]
        total = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        peak = tl.full((BLOCK_C, BLOCK_S), float("-inf"), ACC)
        found = tl.full((BLOCK_C, BLOCK_S), 0 if TIES == EVEN else NOWHERE, tl.int32)
        c0 = cblk * tiles * BLOCK_C
        at, offsets, step = _next_tile_at(b, c0, first, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        value = tl.load(x + at + offsets, mask=(c0 + k < C)[:, None] & in_s, other=0.0)
        for j in range(tiles):
            c = c0 + k
            in_c = c < C
            in_next = masked(c + BLOCK_C < C, j + 1 < tiles)[:, None] & in_s
            following = tl.load(x + at + step + offsets, mask=in_next, other=0.0)  # two tiles are in flight
            weight, bias = load_affine(affine_weight, affine_bias, c, in_c, ACC)
            mask = in_c[:, None]  # positions that do not exist are not stored
            v = activate(before_activation(value.to(ACC), weight, bias, affine_weight is not None), PRE)
            v = v * channel_gates(gate, (c, in_c, None, None, None), GATE, 1, ACC)
            total += tl.where(mask, v, 0.0)
            if gate is not None or PRE != IDENTITY or affine_weight is not None:
                v = v.to(value.dtype).to(ACC)
            better = mask & (peak == peak) & ~(v <= peak)
            if TIES == EVEN:
                found = tl.where(better, 1, tl.where(mask & (v == peak), found + 1, found))
            else:
                found = tl.where(better, tl.broadcast_to(c[:, None], better.shape), found)
            peak = tl.where(better, v, peak)
            value = following
            at += step
            c0 += BLOCK_C
        at = row + first + tl.arange(0, BLOCK_S)
        in_s = inside(first, S, BLOCK_S)
        key, where = reduce_max(peak, found, 0, TIES)
        tl.store(sums + at, tl.sum(total, axis=0), mask=in_s)
        tl.store(best + at, from_order_key(key), mask=in_s)
        tl.store(place + at, where, mask=in_s)
        first += BLOCK_S


@triton.jit
def channel_dot_pass(
    grad, x, y, residual, grad_residual, affine_weight, affine_bias, gate, space_gate, dots,
    b, cblk, split, C, S, n_cblk, blocks, tiles, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x (after an epilogue y or the residual too, and writes grad_residual); leaves sums of grad times
    the gated map over the program's channels."""
    first = (split * blocks).to(tl.int64) * BLOCK_S
    row = (b * n_cblk + cblk) * S
    for _ in range(blocks):
        in_s = inside(first, S, BLOCK_S)
        by_space = space_gates(space_gate, first, S, SPACE_GATE, BLOCK_S, ACC)
        dot = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        for j in range(tiles):
            c0 = (cblk * tiles + j) * BLOCK_C
            c = c0 + tl.arange(0, BLOCK_C)
            in_c = c < C
            weight, bias = load_affine(affine_weight, affine_bias, c, in_c, ACC)
            at, offsets, _step = tile_at(b, c0, first, C, S, LAYOUT, BLOCK_C, BLOCK_S)
            mask = in_c[:, None] & in_s[None, :]
            value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
            v = activate(before_activation(value, weight, bias, affine_weight is not None), PRE)
            v = v * channel_gates(gate, (c, in_c, None, None, None), GATE, 1, ACC)
            if stride_b is not None:
                grad_at, grad_offsets, _step = strided_tile_at(
                    b, c0, first, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
                )
                dy = tl.load(grad + grad_at + grad_offsets, mask=mask, other=0.0).to(ACC)
            else:
                dy = tl.load(grad + at + offsets, mask=mask, other=0.0).to(ACC)
            if POST != IDENTITY:
                dy = before_epilogue(dy, v * by_space, y, residual, at + offsets, mask, POST)
            if grad_residual is not None:
                tl.store(grad_residual + at + offsets, dy, mask=mask)
            dot += tl.where(mask, dy * v, 0.0)
        tl.store(dots + row + first + tl.arange(0, BLOCK_S), tl.sum(dot, axis=0), mask=in_s)
        first += BLOCK_S


@triton.jit
def _coordinates(position, H, W):
    """(d, h, w) of each position."""
    row = position // W
    d = row // H
    return d, row - d * H, position - row * W


@triton.jit
def _neighbours(
    coordinates, t, D, H, W, KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """(position, whether there is one) of the t-th tap around each position, (taps, positions); SIGN -1: mirrored."""
    d, h, w = coordinates
    w = w[None, :] + (SIGN * (t % KW - KW // 2))[:, None]
    h = h[None, :] + (SIGN * (t // KW % KH - KH // 2))[:, None]
    # Nor has a position behind the last one any: 0 times what it reads might be NaN.
    exists = (t < KD * KH * KW)[:, None] & (d < D)[None, :] & (w >= 0) & (w < W) & (h >= 0) & (h < H)
    if KD == 1:
        row = (d * H)[None, :] + h
    else:
        d = d[None, :] + (SIGN * (t // (KW * KH) - KD // 2))[:, None]
        exists &= (d >= 0) & (d < D)
        row = d * H + h
    return row * W + w, exists


@triton.jit
def _sum_at(table, at, mask, n_rows, S, ACC: tl.constexpr):
    """Sum over the n_rows rows of a table (n_rows, S) at `at`."""
    total = tl.zeros(at.shape, ACC)
    for _ in range(n_rows):
        total += tl.load(table + at, mask=mask, other=0.0)
        table += S
    return total


@triton.jit(do_not_specialize=SIZES)
def convolve(
    sums, best, place, weight, bias, state, index,
    C, n_cblk, D, H, W, s_blocks,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MEAN_FIRST: tl.constexpr, TIES: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum, its channel, mean and the convolution's output at each position: the first, second and last row of
    `state`, (B, ROWS, S), and `index`. WHOLE: a program has all positions of its sample, and reads the neighbours' of
    what it has stored; else it puts the partial results of its neighbours together, too."""
    S = D * H * W
    taps: tl.constexpr = KD * KH * KW
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    position = tl.program_id(0) % s_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    coordinates = _coordinates(position, H, W)
    in_s = position < S
    rows = b * n_cblk * S
    mean = sum_rows(sums + rows, n_cblk, S, position, in_s, BLOCK_ROWS, ACC) / C
    peak, found = max_of_rows(best + rows, place + rows, n_cblk, S, position, in_s, TIES, BLOCK_ROWS, ACC)
    out = state + b * ROWS * S
    tl.store(out + position, peak, mask=in_s)
    tl.store(out + S + position, mean, mask=in_s)
    tl.store(index + b * S + position, found, mask=in_s)
    z = tl.zeros((BLOCK_S,), ACC)
    if bias is not None:
        z += tl.load(bias).to(ACC)
    if WHOLE:
        tl.debug_barrier()
    for t0 in range(0, taps, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        near, exists = _neighbours(coordinates, t, D, H, W, KD, KH, KW, 1)
        to_max = tl.load(weight + (taps if MEAN_FIRST else 0) + t, mask=t < taps, other=0.0).to(ACC)
        to_mean = tl.load(weight + (0 if MEAN_FIRST else taps) + t, mask=t < taps, other=0.0).to(ACC)
        if WHOLE:
            peaks = tl.load(out + near, mask=exists, other=0.0)
            means = tl.load(out + S + near, mask=exists, other=0.0)
        else:
            means = _sum_at(sums + rows, near, exists, n_cblk, S, ACC) / C
            key = order_key(tl.full(near.shape, float("-inf"), ACC))
            row = best + rows
            for _ in range(n_cblk):
                key = tl.maximum(key, order_key(tl.load(row + near, mask=exists, other=float("-inf"))))
                row += S
            peaks = tl.where(exists, from_order_key(key), 0.0)
        z += tl.sum(to_max[:, None] * peaks + to_mean[:, None] * means, axis=0)
    tl.store(out + (ROWS - 1) * S + position, z, mask=in_s)


@triton.jit
def _grad_logits_at(dots, z, at, mask, n_cblk, S, GATE: tl.constexpr, ACC: tl.constexpr):
    logits = tl.load(z + at, mask=mask, other=0.0)
    return tl.where(mask, _sum_at(dots, at, mask, n_cblk, S, ACC) * activate_grad(logits, GATE), 0.0)


@triton.jit(do_not_specialize=SIZES)
def convolve_backward(
    dots, weight, state, index, grads, tap_sums,
    C, n_cblk, D, H, W, s_blocks,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    MEAN_FIRST: tl.constexpr, TIES: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the partial dots: what each position's channels get for its maximum and its mean, `grads` (B, 2, S), and a
    program's sums for the weights, in their order, and the bias, `tap_sums` (B * s_blocks, 2 * taps + 1). WHOLE: as
    above, with the logits' gradients in `grads` until they are read."""
    S = D * H * W
    taps: tl.constexpr = KD * KH * KW
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    position = tl.program_id(0) % s_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    coordinates = _coordinates(position, H, W)
    in_s = position < S
    row = state + b * ROWS * S
    dots += b * n_cblk * S
    dz = _grad_logits_at(dots, row + 2 * S, position, in_s, n_cblk, S, GATE, ACC)
    sums = tap_sums + tl.program_id(0).to(tl.int64) * (2 * taps + 1)
    tl.store(sums + 2 * taps, tl.sum(dz, axis=0))
    MAX_AT: tl.constexpr = taps if MEAN_FIRST else 0
    MEAN_AT: tl.constexpr = 0 if MEAN_FIRST else taps
    to_max = tl.zeros((BLOCK_S,), ACC)
    to_mean = tl.zeros((BLOCK_S,), ACC)
    grads += b * 2 * S
    if WHOLE:
        tl.store(grads + position, dz, mask=in_s)
        tl.debug_barrier()
    for t0 in range(0, taps, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        in_t = t < taps
        near, exists = _neighbours(coordinates, t, D, H, W, KD, KH, KW, -1)  # of those whose tap t reads this
        if WHOLE:
            dz_near = tl.load(grads + near, mask=exists, other=0.0)
        else:
            dz_near = _grad_logits_at(dots, row + 2 * S, near, exists, n_cblk, S, GATE, ACC)
        to_max += tl.sum(tl.load(weight + MAX_AT + t, mask=in_t, other=0.0).to(ACC)[:, None] * dz_near, axis=0)
        to_mean += tl.sum(tl.load(weight + MEAN_AT + t, mask=in_t, other=0.0).to(ACC)[:, None] * dz_near, axis=0)
        near, exists = _neighbours(coordinates, t, D, H, W, KD, KH, KW, 1)
        peaks = tl.load(row + near, mask=exists, other=0.0)
        means = tl.load(row + S + near, mask=exists, other=0.0)
        tl.store(sums + MAX_AT + t, tl.sum(peaks * dz[None, :], axis=1), mask=in_t)
        tl.store(sums + MEAN_AT + t, tl.sum(means * dz[None, :], axis=1), mask=in_t)
    to_mean = to_mean / C
    if TIES == EVEN:  # a NaN maximum makes its position NaN, as dividing by its multiplicity of 0 does in eager
        to_max = to_max / tl.load(index + b * S + position, mask=in_s, other=1)
        highest = tl.load(row + position, mask=in_s, other=0.0)
        to_mean = tl.where(highest != highest, float("nan"), to_mean)
    if WHOLE:
        tl.debug_barrier()
    tl.store(grads + position, to_max, mask=in_s)
    tl.store(grads + S + position, to_mean, mask=in_s)


@triton.jit(do_not_specialize=SIZES)
def logit_gradients(
    dots, logits, grads, S, n_cblk, s_blocks, logits_row,
    GATE: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`grads` (B, 1, S), the gradient of the logits, from the partial dots."""
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    position = tl.program_id(0) % s_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    in_s = position < S
    grad = _grad_logits_at(dots + b * n_cblk * S, logits + b * logits_row, position, in_s, n_cblk, S, GATE, ACC)
    tl.store(grads + b * S + position, grad, mask=in_s)


@triton.jit(do_not_specialize=SIZES)
def convolution_parameters(
    tap_sums, grad_weight, grad_bias, n_taps, n_rows,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the convolution's weight, n_taps of both its maps, and bias: column sums in a fixed order."""
    tap = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = sum_rows(tap_sums, n_rows, n_taps + 1, tap, tap < n_taps + 1, BLOCK_ROWS, ACC)
    tl.store(grad_weight + tap, total, mask=tap < n_taps)
    if grad_bias is not None:
        tl.store(grad_bias + tap - n_taps, total, mask=tap == n_taps)
