"""Op `channel_gate`: forward 2 launches (read x; read x, write y), backward 3 (read grad and x; read grad, write
grad_x; gradients of the parameters). There are no atomics: a launch leaves partial results, one row a program, and
every program of the next sums those of its sample in the same order.

SE's first layer is linear in the descriptor, so its partial products are formed by the programs that pool; what the
second launch has left to do is O(channels of the program x hidden). Where that outweighs the program's share of the
map (`is_apart`), as on the small maps of late stages, each layer has a launch of its own instead, which multiplies for
many samples at a time: 4 launches forward, 5 backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS, LAYERS, POOLS, TIES
from . import layers, maps
from .language import (
    AVG,
    AVGMAX,
    BOTH,
    CIRCULAR,
    DENSE,
    EVEN,
    IDENTITY,
    MAX,
    activate,
    activate_grad,
    add_product,
    linear_in,
    sum_rows,
)
from .maps import SIZES, channels_of, locate
from .passes import backward_pass, descriptor, pool_pass, scale_pass, store_pool_gradients

TAPS = tl.constexpr(8)  # of a convolution over channels, at a time


@triton.jit
def _pooled(
    sums, best, place, b, c, mask, C, S, n_split,
    POOL: tl.constexpr, TIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The descriptor s of channels c; for both pools their sum, which is what a linear excitation needs."""
    mean, peak, _ = descriptor(sums, best, place, b, c, mask, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    return linear_in(mean, peak, POOL)


@triton.jit
def _around(
    cblk, tiles, C, taps, LAYER: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The channels that the convolution reads for the program's: (channels, which exist, which are its own)."""
    e = tl.arange(0, BLOCK_E) - taps // 2
    first = cblk * tiles * BLOCK_C
    n = tl.minimum(tiles * BLOCK_C, C - first)
    c = first + e
    exists = e < n + taps - 1 - taps // 2
    if LAYER == CIRCULAR:
        c = (c % C + C) % C
    else:
        exists &= (c >= 0) & (c < C)
    return c, exists, (e >= 0) & (e < n)


@triton.jit
def _at_taps(numbers, first, step, mask, TAPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of the numbers around the program's channels those that lie first + step * i behind each, (i, channels); of no
    channel the last number, which is 0."""
    at = tl.arange(0, BLOCK_K)[None, :] + (first + step * tl.arange(0, TAPS))[:, None]
    at = tl.reshape(tl.where(mask, at, BLOCK_E - 1), (TAPS * BLOCK_K,))
    return tl.reshape(tl.gather(numbers, at, 0), (TAPS, BLOCK_K))


@triton.jit
def _store_products(matrix, values, out, c, mask, H, width_h, width_c, BLOCK_H: tl.constexpr, ACC: tl.constexpr):
    """out[h] = sum over c of matrix[h * width_h + c * width_c] * values[c]: this program's share of a layer."""
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        at = h[:, None] * width_h + c[None, :] * width_c
        w = tl.load(matrix + at, mask=(h < H)[:, None] & mask[None, :], other=0.0).to(ACC)
        tl.store(out + h, tl.sum(w * tl.where(mask, values, 0.0)[None, :], axis=1), mask=h < H)


@triton.jit(do_not_specialize=SIZES)
def _pool(
    x, affine_weight, affine_bias, weight1, sums, best, place, products,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H,
    PRE: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x; leaves partial descriptors and, where `products` is given, weight1's products with them."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    pool_pass(
        x, affine_weight, affine_bias, sums, best, place, b, cblk, split, C, S, n_split, blocks, tiles,
        PRE, POOL, TIES, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if products is not None:
        tl.debug_barrier()
        c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
        out = products + (b * n_cblk * n_split + cblk * n_split + split) * H
        s = tl.load(sums + (b * n_split + split) * C + c, mask=in_c, other=0.0) / S
        _store_products(weight1, s, out, c, in_c, H, C, 1, BLOCK_H, ACC)


@triton.jit
def store_hidden(products, bias1, out, n_part, H, h, first, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr):
    """Hidden logits h from the partial products of all programs; the `first` channels' program stores them."""
    z1 = sum_rows(products, n_part, H, h, h < H, BLOCK_ROWS, ACC)
    if bias1 is not None:
        z1 += tl.load(bias1 + h, mask=h < H, other=0.0).to(ACC)
    if first:
        tl.store(out + h, z1, mask=h < H)
    return z1


@triton.jit
def excite(
    weight1, bias1, weight2, bias2, sums, best, place, products, state, index,
    b, cblk, tiles, C, S, n_split, H, n_part, taps, width,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store the descriptors and logits of the program's channels from the partial results of n_split programs.

    Programs that share channels store the same numbers; each may read what it has stored, after a barrier.
    """
    row = state + b * width
    c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
    reads, exists, own = c, in_c, in_c
    IS_CONV: tl.constexpr = weight1 is not None and LAYER != DENSE
    if IS_CONV:
        reads, exists, own = _around(cblk, tiles, C, taps, LAYER, BLOCK_E, BLOCK_C)
    mean, peak, found = descriptor(sums, best, place, b, reads, exists, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    s = mean
    if POOL != AVG:
        tl.store(index + b * C + reads, found, mask=own)
        if POOL == AVGMAX:
            s = 0.5 * mean + 0.5 * peak
        if POOL == BOTH:
            tl.store(row + 2 * C + H + reads, peak, mask=own)
        elif TIES == EVEN:
            tl.store(row + width - C + reads, peak, mask=own)
    tl.store(row + reads, s, mask=own)
    if weight1 is None:
        z = s
        if POOL == BOTH:
            z += peak
    elif IS_CONV:
        z = tl.zeros((BLOCK_K,), ACC)
        around = tl.where(exists, linear_in(mean, peak, POOL), 0.0)
        for t0 in range(0, taps, TAPS):
            t = t0 + tl.arange(0, TAPS)
            near = _at_taps(around, t0, 1, (t < taps)[:, None] & in_c[None, :], TAPS, BLOCK_K, BLOCK_E)
            z += tl.sum(tl.load(weight1 + t, mask=t < taps, other=0.0).to(ACC)[:, None] * near, axis=0)
        if bias1 is not None:
            z += (2 if POOL == BOTH else 1) * tl.load(bias1).to(ACC)  # each pool's logits have one
    elif weight2 is None:
        z = tl.zeros((BLOCK_K,), ACC)
        for k0 in range(0, C, BLOCK_H):
            k = k0 + tl.arange(0, BLOCK_H)
            at_k = _pooled(sums, best, place, b, k, k < C, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
            at = c[:, None] * C + k[None, :]
            w = tl.load(weight1 + at, mask=in_c[:, None] & (k < C)[None, :], other=0.0).to(ACC)
            z += tl.sum(w * tl.where(k < C, at_k, 0.0)[None, :], axis=1)
        if bias1 is not None:
            z += tl.load(bias1 + c, mask=in_c, other=0.0).to(ACC)
    else:
        z = tl.zeros((BLOCK_K,), ACC)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            z1 = store_hidden(products + b * n_part * H, bias1, row + 2 * C, n_part, H, h, cblk == 0, BLOCK_ROWS, ACC)
            hidden = activate(z1, ACTIVATION)
            at = c[:, None] * H + h[None, :]
            w = tl.load(weight2 + at, mask=in_c[:, None] & (h < H)[None, :], other=0.0).to(ACC)
            z += tl.sum(w * tl.where(h < H, hidden, 0.0)[None, :], axis=1)
        if bias2 is not None:
            z += tl.load(bias2 + c, mask=in_c, other=0.0).to(ACC)
    tl.store(row + C + c, z, mask=in_c)


@triton.jit(do_not_specialize=SIZES)
def _gate(
    x, weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual,
    sums, best, place, products, y, state, index,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H, n_part, taps, width, APART: tl.constexpr,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of the program's channels, where no launch has left them; then reads x and the residual, writes y."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    if not APART:
        excite(
            weight1, bias1, weight2, bias2, sums, best, place, products, state, index,
            b, cblk, tiles, C, S, n_split, H, n_part, taps, width,
            LAYER, POOL, TIES, ACTIVATION, BLOCK_K, BLOCK_E, BLOCK_C, BLOCK_H, BLOCK_ROWS, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    scale_pass(
        x, residual, y, state + b * width + C, None, affine_weight, affine_bias, b, cblk, split, C, S, blocks, tiles,
        GATE, IDENTITY, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _grad_logits(
    dots, state, b, c, mask, C, n_split, width, GATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr
):
    """Gradients of the logits of channels c: the dots of all splits times the gate's derivative."""
    z = tl.load(state + b * width + C + c, mask=mask, other=0.0)
    dot = sum_rows(dots + b * n_split * C, n_split, C, c, mask, BLOCK_ROWS, ACC)
    return tl.where(mask, dot * activate_grad(z, GATE), 0.0)


@triton.jit
def store_hidden_grads(
    weight2, logits, dots, products, b, cblk, split, c, in_c, C, n_cblk, n_split, H,
    GATE: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The second layer's transposed products with what this program has stored in `dots`; its gate's derivative does
    not depend on other programs."""
    tl.debug_barrier()
    dot = tl.load(dots + (b * n_split + split) * C + c, mask=in_c, other=0.0)
    dot *= activate_grad(tl.load(logits + c, mask=in_c, other=0.0), GATE)
    out = products + (b * n_cblk * n_split + cblk * n_split + split) * H
    _store_products(weight2, dot, out, c, in_c, H, 1, H, BLOCK_H, ACC)


@triton.jit(do_not_specialize=SIZES)
def _dot(
    grad, x, y, weight2, affine_weight, affine_bias, residual, state, grad_residual, dots, products,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H, width, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x (after an epilogue y or the residual too, and writes grad_residual); leaves partial dots and,
    with a second layer, its transposed products with them."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    logits = state + b * width + C
    backward_pass(
        grad, x, y, residual, None, grad_residual, affine_weight, affine_bias,
        logits, None, None, None, None, dots, None, None, None, None, None, None,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        GATE, IDENTITY, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if weight2 is not None:
        c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
        store_hidden_grads(
            weight2, logits, dots, products, b, cblk, split, c, in_c, C, n_cblk, n_split, H, GATE, BLOCK_H, ACC
        )


@triton.jit
def excite_backward(
    weight1, weight2, state, index, dots, products, mean, value, grad_logits, grad_hidden, tap_sums,
    b, cblk, tiles, C, S, n_cblk, n_split, H, n_part, taps, width,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store what the program's channels give to their pools, `mean` and `value`, from the partial dots; and what the
    parameters' gradients are summed from: gradients of the logits and hidden logits, sums for each tap."""
    row = state + b * width
    c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
    reads, exists = c, in_c
    IS_CONV: tl.constexpr = weight1 is not None and LAYER != DENSE
    if IS_CONV:
        reads, exists, _ = _around(cblk, tiles, C, taps, LAYER, BLOCK_E, BLOCK_C)
    dz = _grad_logits(dots, state, b, reads, exists, C, n_split, width, GATE, BLOCK_ROWS, ACC)
    if grad_logits is not None:
        tl.store(grad_logits + b * C + c, dz, mask=in_c)
    if weight1 is None:
        ds = dz
    elif IS_CONV:
        s = tl.load(row + reads, mask=exists, other=0.0)
        if POOL == BOTH:
            s += tl.load(row + 2 * C + H + reads, mask=exists, other=0.0)
        own = tl.sum(_at_taps(dz, taps // 2, 0, in_c[None, :], 1, BLOCK_K, BLOCK_E), axis=0)
        ds = tl.zeros((BLOCK_K,), ACC)
        sums = tap_sums + (b * n_cblk + cblk) * (taps + 1)
        for t0 in range(0, taps + 1, TAPS):  # the last one's sum is the bias's
            t = t0 + tl.arange(0, TAPS)
            mask = (t < taps)[:, None] & in_c[None, :]
            near = _at_taps(dz, taps - 1 - t0, -1, mask, TAPS, BLOCK_K, BLOCK_E)  # of those whose tap t reads c
            ds += tl.sum(tl.load(weight1 + t, mask=t < taps, other=0.0).to(ACC)[:, None] * near, axis=0)
            near = _at_taps(s, t0, 1, mask, TAPS, BLOCK_K, BLOCK_E)
            near = tl.where((t == taps)[:, None], 2.0 if POOL == BOTH else 1.0, near)
            tl.store(sums + t, tl.sum(own[None, :] * near, axis=1), mask=t <= taps)
    elif weight2 is None:
        ds = tl.zeros((BLOCK_K,), ACC)
        for k0 in range(0, C, BLOCK_H):
            k = k0 + tl.arange(0, BLOCK_H)
            dz_k = _grad_logits(dots, state, b, k, k < C, C, n_split, width, GATE, BLOCK_ROWS, ACC)
            at = k[:, None] * C + c[None, :]
            w = tl.load(weight1 + at, mask=(k < C)[:, None] & in_c[None, :], other=0.0).to(ACC)
            ds += tl.sum(w * dz_k[:, None], axis=0)
    else:
        ds = tl.zeros((BLOCK_K,), ACC)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            in_h = h < H
            dh = sum_rows(products + b * n_part * H, n_part, H, h, in_h, BLOCK_ROWS, ACC)
            w = tl.load(weight1 + h[:, None] * C + c[None, :], mask=in_h[:, None] & in_c[None, :], other=0.0).to(ACC)
            dz1 = dh * activate_grad(tl.load(row + 2 * C + h, mask=in_h, other=0.0), ACTIVATION)
            ds += tl.sum(w * tl.where(in_h, dz1, 0.0)[:, None], axis=0)
            if cblk == 0:
                tl.store(grad_hidden + b * H + h, dz1, mask=in_h)
    if POOL == AVGMAX:
        ds *= 0.5
    store_pool_gradients(
        mean + b * C, value + b * C, tl.zeros((BLOCK_K,), ACC) if POOL == MAX else ds, ds,
        row + (2 * C + H if POOL == BOTH else width - C), index + b * C, c, in_c, S, POOL, TIES,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _spread(
    grad, x, weight1, weight2, affine_weight, affine_bias, state, index,
    dots, products, mean, value, grad_logits, grad_hidden, tap_sums, grad_x, weight_sums, bias_sums,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H, n_part, taps, width, stride_b, stride_c, stride_s,
    APART: tl.constexpr, LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE: tl.constexpr, PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the program's descriptors, where no launch has left them; then reads grad (x too after a prologue or
    for shared ties), writes grad_x, and leaves partial sums for the prologue."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    if not APART:
        excite_backward(
            weight1, weight2, state, index, dots, products, mean, value, grad_logits, grad_hidden, tap_sums,
            b, cblk, tiles, C, S, n_cblk, n_split, H, n_part, taps, width,
            LAYER, POOL, TIES, ACTIVATION, GATE, BLOCK_K, BLOCK_E, BLOCK_C, BLOCK_H, BLOCK_ROWS, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    row = state + b * width
    peak = row + (2 * C + H if POOL == BOTH else width - C)
    backward_pass(
        grad, x, None, None, grad_x, None, affine_weight, affine_bias,
        row + C, mean + b * C, None if POOL == AVG else value + b * C, index + b * C,
        peak if POOL != AVG and TIES == EVEN else None, None, weight_sums, bias_sums, None, None, None, None,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        GATE, IDENTITY, PRE, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _store_sum(out, table, times, n_rows, width, columns, mask, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr):
    if out is not None:
        tl.store(out + columns, times * sum_rows(table, n_rows, width, columns, mask, BLOCK_ROWS, ACC), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _parameters(
    state, grad_logits, grad_hidden, tap_sums, weight_sums, bias_sums,
    grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_affine_weight, grad_affine_bias,
    B, C, n_cblk, n_split, H, taps, width,
    LAYER: tl.constexpr, PAIR: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters: programs over tiles of the (H or C, C) weights, first of weight1, then of weight2,
    each sums over the batch in order.

    One layer counts as hidden logits that are the logits. With both pools (PAIR 2) a sample has two descriptors.
    """
    TWO_LAYERS: tl.constexpr = grad_weight2 is not None
    LAST: tl.constexpr = 1 if TWO_LAYERS else 0
    c_blocks, h_blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(H, BLOCK_H)
    cblk, hblk = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks % h_blocks
    layer = tl.program_id(0) // (c_blocks * h_blocks)
    c = cblk * BLOCK_C + tl.arange(0, BLOCK_C)
    h = hblk * BLOCK_H + tl.arange(0, BLOCK_H)
    in_c, in_h = c < C, h < H
    if LAYER == DENSE and grad_weight1 is not None:
        # Where hidden numbers and channels are of a sample, and of its second pool.
        hiddens, h_step, h_pool = grad_hidden, (PAIR if TWO_LAYERS else 1) * H, H if TWO_LAYERS else 0
        channels, c_step, c_pool = state, width, 2 * C + (H if TWO_LAYERS else 0)
        if layer != 0:
            hiddens, h_step, h_pool = state + 2 * C, width, C + H
            channels, c_step, c_pool = grad_logits, C, 0
        total = tl.zeros((BLOCK_H, BLOCK_C), ACC)
        for row0 in range(0, PAIR * B, BLOCK_B):
            row = (row0 + tl.arange(0, BLOCK_B)).to(tl.int64)
            b, of_max = row // PAIR, row % PAIR
            hidden_mask = (b < B)[:, None] & in_h[None, :]
            channel_mask = (b < B)[:, None] & in_c[None, :]
            hidden_at = hiddens + (b * h_step + of_max * h_pool)[:, None] + h[None, :]
            by_hidden = tl.load(hidden_at, mask=hidden_mask, other=0.0)
            channel_at = channels + (b * c_step + of_max * c_pool)[:, None] + c[None, :]
            by_channel = tl.load(channel_at, mask=channel_mask, other=0.0)
            if TWO_LAYERS:
                by_hidden = tl.where(hidden_mask & (layer != 0), activate(by_hidden, ACTIVATION), by_hidden)
            total = add_product(total, tl.trans(by_hidden), by_channel, HALF, ACC)
        mask = in_h[:, None] & in_c[None, :]
        if layer == 0:
            tl.store(grad_weight1 + h[:, None] * C + c[None, :], total, mask=mask)
        if TWO_LAYERS:  # noqa: SIM102 (it is known when this is compiled; what follows is not)
            if layer == 1:
                tl.store(grad_weight2 + c[None, :] * H + h[:, None], total, mask=mask)
    if LAYER == DENSE:
        if cblk == 0 and layer == 0:
            if TWO_LAYERS:
                _store_sum(grad_bias1, grad_hidden, 1, PAIR * B, H, h, in_h, BLOCK_B, ACC)
            else:
                _store_sum(grad_bias1, grad_hidden, PAIR, B, H, h, in_h, BLOCK_B, ACC)
    else:  # a program a tap, and the bias
        t = tl.program_id(0) + tl.arange(0, 1)
        total = sum_rows(tap_sums, B * n_cblk, taps + 1, t, t < taps + 1, 2048, ACC)
        tl.store(grad_weight1 + t, total, mask=t < taps)
        if grad_bias1 is not None:
            tl.store(grad_bias1 + t - taps, total, mask=t == taps)
    if hblk == 0 and layer == LAST:
        _store_sum(grad_bias2, grad_logits, PAIR, B, C, c, in_c, BLOCK_B, ACC)
        _store_sum(grad_affine_weight, weight_sums, 1, B * n_split, C, c, in_c, BLOCK_B, ACC)
        _store_sum(grad_affine_bias, bias_sums, 1, B * n_split, C, c, in_c, BLOCK_B, ACC)


def sizes_of(plan: maps.Plan, weight1: Tensor | None, weight2: Tensor | None, layer: int) -> dict[str, int]:
    """Sizes and blocks of the excitation."""
    hidden = 0 if weight2 is None else weight1.shape[0]
    is_dense = weight1 is not None and layer == LAYERS["dense"]
    taps = 0 if weight1 is None or is_dense else weight1.numel()
    most_split = triton.cdiv(plan.space, plan.block_s)
    return {
        "H": hidden,
        "taps": taps,
        "BLOCK_H": min(max(maps.next_power_of_2(hidden), 16), 32),
        "BLOCK_ROWS": maps.ROWS_AT_ONCE if is_dense else min(maps.next_power_of_2(most_split), maps.ROWS_AT_ONCE),
        **channels_a_program(plan, taps),
    }


def channels_a_program(plan: maps.Plan, taps: int) -> dict[str, int]:
    """Of the excitation, and with those that its convolution reads and one that does not exist."""
    most = plan.block_c if plan.layout == maps.FLAT.value else plan.block_k
    return {"BLOCK_K": plan.block_k, "BLOCK_E": maps.next_power_of_2(most + taps) if taps else 1}


def squeezed(
    x: Tensor,
    plan: maps.Plan,
    parameters: tuple[Tensor | None, ...],
    affine: dict[str, Tensor | None],
    sizes: dict[str, int],
    state: Tensor,
    index: Tensor,
    layer: int,
    pool: int,
    ties: int,
    activation: int,
    pre_activation: int,
) -> dict[str, Any]:
    """Launch the read of x for its pools over space, and the layers where they are apart; the arguments by which a
    kernel with `excite` finds what that left."""
    weight1, _, weight2, _ = parameters
    is_apart = layers.is_apart(plan, weight1, layer, pool)
    tables = maps.pool_tables(x, plan, pool)
    products = None
    if weight2 is not None and not is_apart:
        products = x.new_empty((plan.batch, plan.parts, sizes["H"]), dtype=maps.accumulator(x.dtype))
    maps.launch(
        _pool,
        x,
        plan.programs,
        x=x,
        weight1=None if products is None else weight1,
        products=products,
        PRE=pre_activation,
        POOL=pool,
        TIES=ties,
        **affine,
        **tables,
        **{k: sizes[k] for k in ("H", "BLOCK_H", "BLOCK_K")},
        **plan.arguments(x.dtype),
        **maps.exact(ties, pool),
    )
    found = {"state": state, "index": index, "products": products, "n_part": plan.parts, "APART": is_apart}
    if is_apart:
        layers.excite(x, plan, tables, parameters, state, index, pool, ties, activation)
        parameters, tables = (None,) * 4, dict.fromkeys(tables)
    return found | tables | dict(zip(("weight1", "bias1", "weight2", "bias2"), parameters, strict=True))


def empty_state(x: Tensor, plan: maps.Plan, hidden: int, pool: int, ties: int) -> tuple[Tensor, Tensor]:
    """(state, index) as ops/channel_gate.py describes them."""
    width = 2 * plan.channels + hidden
    if pool == POOLS["both"]:
        width += plan.channels + hidden
    elif pool != POOLS["avg"] and ties == TIES["even"]:
        width += plan.channels
    return (
        x.new_empty((plan.batch, width), dtype=maps.accumulator(x.dtype)),
        x.new_empty((0,) if pool == POOLS["avg"] else (plan.batch, plan.channels), dtype=torch.int32),
    )


def excitation_tables(
    state: Tensor, plan: maps.Plan, weight1: Tensor | None, sizes: dict[str, int], pool: int
) -> dict[str, Tensor | None]:
    """Room for what excite_backward leaves."""

    def table(*shape: int) -> Tensor:
        return state.new_empty(shape)

    batch, channels, hidden, taps = plan.batch, plan.channels, sizes["H"], sizes["taps"]
    logits = table(batch, channels) if weight1 is not None and not taps else None
    return {
        "mean": table(batch, channels),
        "value": table(batch, channels),
        "grad_logits": logits,
        "grad_hidden": table(batch, hidden * (2 if pool == POOLS["both"] else 1)) if hidden else logits,
        "tap_sums": table(batch, plan.n_cblk, taps + 1) if taps else None,
    }


def parameter_gradients(
    x: Tensor,
    state: Tensor,
    plan: maps.Plan,
    tables: dict[str, Tensor | None],
    sums: dict[str, Tensor | None],
    parameters: Sequence[Tensor | None],
    sizes: dict[str, int],
    layer: int,
    pool: int,
    activation: int,
) -> list[Tensor]:
    """Gradients of weight1, bias1, weight2, bias2 and of the prologue, of size (0,) where there is none."""
    grads = [None if p is None else torch.empty_like(p) for p in parameters]
    if any(g is not None for g in grads):
        rows = 1 if tables["grad_hidden"] is None else sizes["H"] or plan.channels
        block_h, block_c = min(max(maps.next_power_of_2(rows), 16), 32), 32
        n_layers = 1 if grads[2] is None else 2
        names = ("weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias")
        maps.launch(
            _parameters,
            x,
            max(n_layers * triton.cdiv(rows, block_h) * triton.cdiv(plan.channels, block_c), sizes["taps"] + 1),
            state=state,
            B=plan.batch,
            C=plan.channels,
            n_cblk=plan.n_cblk,
            n_split=plan.n_split,
            H=rows,
            taps=sizes["taps"],
            width=state.shape[1],
            LAYER=layer,
            PAIR=2 if pool == POOLS["both"] else 1,
            ACTIVATION=activation,
            BLOCK_B=32,
            BLOCK_H=block_h,
            BLOCK_C=block_c,
            HALF=x.dtype.itemsize == 2,
            num_stages=1,  # what is loaded ahead is loaded in the order of the product, not of memory
            ACC=maps.triton_accumulator(state.dtype),
            num_warps=4,
            **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)},
            **{k: tables[k] for k in ("grad_logits", "grad_hidden", "tap_sums")},
            **sums,
        )
    return [x.new_empty(0) if g is None else g for g in grads]


def channel_gate(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    layer: int,
    pool: int,
    ties: int,
    activation: int,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x, True)
    parameters = tuple(map(maps.row, (weight1, bias1, weight2, bias2)))
    affine = {"affine_weight": maps.row(affine_weight), "affine_bias": maps.row(affine_bias)}
    sizes = sizes_of(plan, parameters[0], parameters[2], layer)
    y = torch.empty_like(x)
    state, index = empty_state(x, plan, sizes["H"], pool, ties)
    found = squeezed(x, plan, parameters, affine, sizes, state, index, layer, pool, ties, activation, pre_activation)
    maps.launch(
        _gate,
        x,
        plan.programs,
        x=x,
        residual=maps.as_map(residual, x),
        y=y,
        width=state.shape[1],
        LAYER=layer,
        POOL=pool,
        TIES=ties,
        ACTIVATION=activation,
        GATE=gate,
        PRE=pre_activation,
        POST=post_activation,
        **affine,
        **sizes,
        **found,
        **plan.arguments(x.dtype),
    )
    return y, state, index


def channel_gate_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    state: Tensor,
    index: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    layer: int,
    pool: int,
    ties: int,
    activation: int,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x, True)
    state, index = state.contiguous(), index.contiguous()
    grad, strides = maps.gradient(grad, x)
    parameters = tuple(map(maps.row, (weight1, bias1, weight2, bias2, affine_weight, affine_bias)))
    weight1, _, weight2, _, affine_weight, affine_bias = parameters
    sizes = sizes_of(plan, weight1, weight2, layer)
    is_apart, dots = layers.is_apart(plan, weight1, layer, pool), maps.table(x, plan)
    shared = {
        "x": x,
        "affine_weight": affine_weight,
        "affine_bias": affine_bias,
        "state": state,
        "weight2": None if is_apart else weight2,
        "dots": dots,
        "products": state.new_empty((plan.batch, plan.parts, sizes["H"])) if sizes["H"] and not is_apart else None,
        "width": state.shape[1],
        "GATE": gate,
        "PRE": pre_activation,
        **plan.arguments(x.dtype),
    }
    grad_x = torch.empty_like(x)
    grad_residual = None if post_activation == ACTIVATIONS["identity"] else torch.empty_like(x)
    maps.launch(
        _dot,
        x,
        plan.programs,
        grad=grad,
        y=maps.as_map(y, x),
        residual=maps.as_map(residual, x),
        grad_residual=grad_residual,
        H=sizes["H"],
        POST=post_activation,
        BLOCK_H=sizes["BLOCK_H"],
        BLOCK_K=sizes["BLOCK_K"],
        **shared,
        **strides,
    )
    if grad_residual is not None:
        grad, strides = grad_residual, dict.fromkeys(strides)
    tables = excitation_tables(state, plan, weight1, sizes, pool)
    sums = maps.affine_tables(x, plan, affine_weight)
    if is_apart:
        layers.excite_backward(x, plan, dots, tables, weight1, weight2, state, index, pool, ties, activation, gate)
    maps.launch(
        _spread,
        x,
        plan.programs,
        grad=grad,
        weight1=None if is_apart else weight1,
        index=index,
        grad_x=grad_x,
        n_part=plan.parts,
        APART=is_apart,
        LAYER=layer,
        POOL=pool,
        TIES=ties,
        ACTIVATION=activation,
        **sizes,
        **tables,
        **sums,
        **shared,
        **strides,
        **maps.exact(ties, pool),
    )
    grads = parameter_gradients(x, state, plan, tables, sums, parameters, sizes, layer, pool, activation)
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, *grads
