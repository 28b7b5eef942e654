"""The passes of `norm_gate`: `moments` reads x; `norm_scale` reads x and the residual and writes y (and, for the
backward of a ReLU, one bit an element); `norm_dots` reads grad and x (and those bits) and writes the residual's
gradient where an activation follows; `norm_gradients` reads grad and x and writes grad_x. Kept on chip: a tile, and in
`norm_dots` five sums an element of it. Left in memory: two (`moments`) or six numbers a channel and split of space.
Between them `norm_coefficients` and `norm_factors`, a launch each, read these numbers and no map; `norm_running` is for
running statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS
from . import maps
from .language import IDENTITY, RELU, activate, activate_grad, before_activation, masked
from .maps import CHANNELS_LAST, FLAT, SIZES, locate, tile_at
from .passes import (
    before_epilogue,
    count,
    elements,
    inside,
    of_channels,
    rows_of,
    store_channels,
    store_sums,
    strided_tile_of,
    sums_of,
    tile_of,
)
from .simam import _joined, _moments, is_plain

_IDENTITY = ACTIVATIONS["identity"]

# Of the kernels that read numbers a channel of each sample: samples at a time, channels a program.
SAMPLES, CHANNELS = 16, 32
MOMENTS_LANE_BYTES = 128  # of a FLAT tile: a channel's vectors are put together once for many elements


@triton.jit(do_not_specialize=SIZES)
def _finish_moments(
    means, squares, out, c_q, s_q, n_cblk, n_split, blocks,
    CV: tl.constexpr, SV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From what the splits left to (B, 3, C), whose pivots are there."""
    C, S = c_q * CV, s_q * SV
    b = (tl.program_id(0) // n_cblk).to(tl.int64)
    c = tl.program_id(0) % n_cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    split_size = blocks.to(tl.int64) * BLOCK_S
    rest, square = _joined(means, squares, b, c, in_c, C, S, n_split, split_size, BLOCK_ROWS, ACC)
    to = out + 3 * b * C + c
    tl.store(to + C, rest, mask=in_c)
    tl.store(to + 2 * C, square, mask=in_c)


@triton.jit
def _offsets(moments, pivot, b, c, C, mask):
    """Of the means of samples b from the first pivot."""
    at = moments + 3 * b * C + c[None, :]
    first = tl.load(at, mask=mask, other=0.0)
    return tl.where(mask, (first - pivot[None, :]) + tl.load(at + C, mask=mask, other=0.0), 0.0)


@triton.jit
def _store_coefficients(weight, bias, norm, mean, a, c, in_c, C, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Stores the rows of `norm` for the channels c, a being 1 / deviation; returns the factor and the bias."""
    tl.store(norm + 3 * C + c, a, mask=in_c)
    if weight is not None:
        a *= tl.load(weight + c, mask=in_c, other=0.0).to(ACC)
    shift = tl.zeros((BLOCK_K,), ACC)
    if bias is not None:
        shift += tl.load(bias + c, mask=in_c, other=0.0).to(ACC)
    tl.store(norm + c, a, mask=in_c)
    tl.store(norm + C + c, shift - mean * a, mask=in_c)
    tl.store(norm + 2 * C + c, mean, mask=in_c)
    return a, shift


@triton.jit(do_not_specialize=SIZES)
def _norm_coefficients(
    moments, weight, bias, norm, unbiased, descriptor, B, C, S,
    EPS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads the moments twice, a third time where the descriptor is wanted: from the first pivot, so that the distances
    between the samples' means keep their digits."""
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    b = tl.arange(0, SAMPLES)[:, None].to(tl.int64)
    pivot = tl.load(moments + c, mask=in_c, other=0.0)
    middle = tl.zeros((BLOCK_K,), ACC)
    for k in range(0, B, SAMPLES):
        mask = (k + b < B) & in_c[None, :]
        middle += tl.sum(_offsets(moments, pivot, k + b, c, C, mask), axis=0)
    middle /= B
    total = tl.zeros((BLOCK_K,), ACC)
    for k in range(0, B, SAMPLES):
        mask = (k + b < B) & in_c[None, :]
        distance = tl.where(mask, _offsets(moments, pivot, k + b, c, C, mask) - middle[None, :], 0.0)
        squares = tl.load(moments + (3 * (k + b) + 2) * C + c[None, :], mask=mask, other=0.0)
        total += tl.sum(squares + S * (distance * distance), axis=0)
    mean = pivot + middle
    count = (B.to(tl.int64) * S).to(ACC)
    variance = total / count
    a = tl.rsqrt(variance + EPS)
    a, shift = _store_coefficients(weight, bias, norm, mean, a, c, in_c, C, BLOCK_K, ACC)
    tl.store(unbiased + c, variance * (count / (count - 1.0)), mask=in_c)
    if descriptor is not None:
        for k in range(0, B, SAMPLES):
            mask = (k + b < B) & in_c[None, :]
            distance = _offsets(moments, pivot, k + b, c, C, mask) - middle[None, :]
            tl.store(descriptor + (k + b) * C + c[None, :], a[None, :] * distance + shift[None, :], mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _norm_running(
    weight, bias, means, variances, norm, C, EPS: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    mean = tl.load(means + c, mask=in_c, other=0.0).to(ACC)
    a = tl.rsqrt(tl.load(variances + c, mask=in_c, other=0.0).to(ACC) + EPS)
    _store_coefficients(weight, bias, norm, mean, a, c, in_c, C, BLOCK_K, ACC)


@triton.jit(do_not_specialize=SIZES)
def _norm_factors(
    sums, grad_s, norm, grad_weight, grad_bias, factors, constants, B, C, S,
    OF_BATCH: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads five rows of each sample's sums and the descriptor's gradient once."""
    c = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    a = tl.load(norm + c, mask=in_c, other=0.0)
    rstd = tl.load(norm + 3 * C + c, mask=in_c, other=0.0)
    to_bias = tl.zeros((BLOCK_K,), ACC)
    to_weight = tl.zeros((BLOCK_K,), ACC)
    for k in range(0, B, SAMPLES):
        b = k + tl.arange(0, SAMPLES)[:, None].to(tl.int64)
        mask = (b < B) & in_c[None, :]
        at = sums + 6 * b * C + c[None, :]
        gate = tl.load(at + 5 * C, mask=mask, other=0.0)
        of_h = gate * tl.load(at + C, mask=mask, other=0.0)
        of_centred = gate * tl.load(at + 2 * C, mask=mask, other=0.0)
        pooled = tl.zeros((SAMPLES, BLOCK_K), ACC)
        if grad_s is not None:
            pooled += tl.load(grad_s + b * C + c[None, :], mask=mask, other=0.0).to(ACC) / S
        of_h += pooled * tl.load(at + 3 * C, mask=mask, other=0.0)
        of_centred += pooled * tl.load(at + 4 * C, mask=mask, other=0.0)
        to_bias += tl.sum(of_h, axis=0)
        to_weight += tl.sum(of_centred, axis=0)
        tl.store(factors + 2 * b * C + c[None, :], a[None, :] * gate, mask=mask)
        tl.store(factors + (2 * b + 1) * C + c[None, :], a[None, :] * pooled, mask=mask)
    to_weight *= rstd
    tl.store(grad_bias + c, to_bias, mask=in_c)
    tl.store(grad_weight + c, to_weight, mask=in_c)
    shift = tl.zeros((BLOCK_K,), ACC)
    of_x = tl.zeros((BLOCK_K,), ACC)
    if OF_BATCH:
        scale = -a / (B.to(tl.int64) * S).to(ACC)
        shift += to_bias * scale
        of_x += rstd * to_weight * scale
    tl.store(constants + c, shift, mask=in_c)
    tl.store(constants + C + c, of_x, mask=in_c)


@triton.jit
def _load_map(values, at, mask, ACC: tl.constexpr):
    return tl.load(values + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def _bits_at(
    b, c0, s0, C, S, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """tile_at for the bytes of a tile's bits, and which of them there are. Tiles begin with a byte."""
    if LAYOUT == CHANNELS_LAST:
        width = (C + 7) // 8
        TILE: tl.constexpr = (BLOCK_C + 7) // 8
        at, offsets, step = tile_at(b, c0 // 8, s0, width, S, LAYOUT, TILE, BLOCK_S)
        return at, offsets, step, (c0 // 8 + tl.arange(0, TILE) < width)[:, None]
    else:
        TILE: tl.constexpr = (BLOCK_S + 7) // 8
        at, offsets, step = tile_at(b, c0, s0 // 8, C, (S + 7) // 8, LAYOUT, BLOCK_C, TILE)
        return at, offsets, step, (c0 + tl.arange(0, BLOCK_C) < C)[:, None]


@triton.jit
def _bytes_inside(rows, first, S, LAYOUT: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which bytes of a tile there are, `rows` being those of its channels."""
    if LAYOUT == CHANNELS_LAST:
        return rows & inside(first, S, BLOCK_S)[None, :]
    else:
        return rows & inside(first // 8, (S + 7) // 8, (BLOCK_S + 7) // 8)[None, :]


@triton.jit
def _packed(keep, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """A tile of truths as bytes, eight a byte along the axis that is contiguous in memory."""
    bits = keep.to(tl.int32)
    if LAYOUT == CHANNELS_LAST:
        WIDTH: tl.constexpr = 8 if BLOCK_C > 8 else BLOCK_C
        bits = tl.reshape(bits, (BLOCK_C // WIDTH, WIDTH, BLOCK_S)) << tl.arange(0, WIDTH)[None, :, None]
        return tl.sum(bits, axis=1).to(tl.uint8)
    else:
        WIDTH: tl.constexpr = 8 if BLOCK_S > 8 else BLOCK_S
        bits = tl.reshape(bits, (BLOCK_C, BLOCK_S // WIDTH, WIDTH)) << tl.arange(0, WIDTH)[None, None, :]
        return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def _unpacked(packed, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The tile of truths."""
    if LAYOUT == CHANNELS_LAST:
        WIDTH: tl.constexpr = 8 if BLOCK_C > 8 else BLOCK_C
        bits = packed.to(tl.int32)[:, None, :] >> tl.arange(0, WIDTH)[None, :, None]
    else:
        WIDTH: tl.constexpr = 8 if BLOCK_S > 8 else BLOCK_S
        bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]
    return tl.reshape(bits & 1, (BLOCK_C, BLOCK_S)) != 0


@triton.jit
def _store_flat_bits(bits, keep, b, c0, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The bits of a FLAT tile of vectors of eight: each row's bytes are cut out of two of the tile's."""
    CHANNELS: tl.constexpr = triton.next_power_of_2(BLOCK_C)
    BYTES: tl.constexpr = triton.next_power_of_2((BLOCK_S // BLOCK_C + 7) // 8)
    packed = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    width = (S + 7) // 8
    k, i = tl.arange(0, CHANNELS)[:, None], tl.arange(0, BYTES)[None, :]
    exists = (k < BLOCK_C) & (c0 + k < C) & (i < width)
    begin = tl.where(exists, k * S + 8 * i, 0)
    at = tl.reshape(begin // 8, (CHANNELS * BYTES,))
    low = tl.gather(packed, at, 0)
    high = tl.gather(packed, tl.minimum(at + 1, BLOCK_S // 8 - 1), 0)
    byte = tl.reshape(low | high << 8, (CHANNELS, BYTES)) >> begin % 8
    byte &= (1 << tl.minimum(S - 8 * i, 8)) - 1
    tl.store(bits + (b * C + c0) * width + (k * width + i), byte.to(tl.uint8), mask=exists)


@triton.jit
def _load_flat_bits(bits, rows, b, c0, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """The truths of a FLAT tile of vectors of eight; each byte is read once."""
    LENGTH: tl.constexpr = triton.next_power_of_2(BLOCK_C * ((BLOCK_S // BLOCK_C + 7) // 8))
    c, exists, next_exists, edge, begin = rows
    width = (S + 7) // 8
    i = tl.arange(0, LENGTH)
    there = i < tl.minimum(C - c0, BLOCK_C) * width
    found = tl.load(bits + (b * C + c0) * width + i, mask=there, other=0).to(tl.int32)
    row = (c - c0) * width
    at = tl.where(exists, row + begin // 8, 0)
    of_row = tl.gather(found, at, 0) | tl.gather(found, tl.minimum(at + 1, LENGTH - 1), 0) << 8
    of_next = tl.gather(found, tl.where(next_exists, row + width, 0), 0)
    own = tl.minimum(edge, 8)
    packed = (of_row >> begin % 8) & ((1 << own) - 1) | of_next << own
    return (packed[:, None] >> tl.arange(0, 8)[None, :] & 1) != 0


@triton.jit(do_not_specialize=SIZES)
def _norm_scale(
    x, residual, y, bits, norm, gate,
    c_q, s_q, n_cblk, n_split, blocks, tiles,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x and the residual once, writes y and the bits. y may be either of them."""
    C, S = c_q * CV, s_q * SV
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weight = of_channels(norm, rows, IDENTITY, VECTOR, ACC)
        bias = of_channels(norm + C, rows, IDENTITY, VECTOR, ACC)
        if gate is not None:
            g = of_channels(gate + b * C, rows, IDENTITY, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        if bits is not None:  # noqa: SIM102
            if LAYOUT != FLAT:
                bits_at, bits_offsets, bits_step, bytes_of = _bits_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        first = s0  # position of the tile
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            result = activate(before_activation(_load_map(x, at + offsets, mask, ACC), weight, bias, True), PRE)
            if gate is not None:
                result *= g
            if residual is not None:
                result += _load_map(residual, at + offsets, mask, ACC)
            result = activate(result, POST)
            rounded = result.to(y.dtype.element_ty)
            tl.store(y + at + offsets, rounded, mask=mask)
            if bits is not None:
                keep = mask & ((rounded.to(ACC) > 0) | (result != result))
                if LAYOUT == FLAT:
                    _store_flat_bits(bits, keep, b, c0, C, S, BLOCK_C, BLOCK_S)
                else:
                    to_store = _bytes_inside(bytes_of, first, S, LAYOUT, BLOCK_S)
                    tl.store(bits + bits_at + bits_offsets, _packed(keep, LAYOUT, BLOCK_C, BLOCK_S), mask=to_store)
                    bits_at += bits_step
            at += step
            first += BLOCK_S


@triton.jit(do_not_specialize=SIZES)
def _norm_dots(
    grad, x, bits, residual, norm, gate, grad_residual, sums,
    c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad, x and bits or residual once, writes grad_residual; leaves (B, n_split, 6, C) partial sums, of which
    the gate is the last: with the first split."""
    C, S = c_q * CV, s_q * SV
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, triton.next_power_of_2(BLOCK_C))
        in_c = (c < C) & (c < c0 + BLOCK_C)
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weight = of_channels(norm, rows, IDENTITY, VECTOR, ACC)
        bias = of_channels(norm + C, rows, IDENTITY, VECTOR, ACC)
        mean = of_channels(norm + 2 * C, rows, IDENTITY, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        grad_at, grad_offsets, grad_step = at, offsets, step
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_of(
                b, c0, s0, S, stride_b, stride_c, stride_s, rows, BLOCK_C, BLOCK_S, VECTOR
            )
        if bits is not None:  # noqa: SIM102
            if LAYOUT != FLAT:
                bits_at, bits_offsets, bits_step, bytes_of = _bits_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        first = s0  # position of the tile
        dot = tl.zeros((ROWS, COLUMNS), ACC)
        dv = tl.zeros((ROWS, COLUMNS), ACC)
        dv_centred = tl.zeros((ROWS, COLUMNS), ACC)
        slopes = tl.zeros((ROWS, COLUMNS), ACC)
        slopes_centred = tl.zeros((ROWS, COLUMNS), ACC)
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            value = _load_map(x, at + offsets, mask, ACC)
            h = _load_map(grad, grad_at + grad_offsets, mask, ACC)
            v = before_activation(value, weight, bias, True)
            u = activate(v, PRE)
            if POST == RELU:
                if LAYOUT == FLAT:
                    keep = _load_flat_bits(bits, rows, b, c0, C, S, BLOCK_C, BLOCK_S)
                else:
                    there = _bytes_inside(bytes_of, first, S, LAYOUT, BLOCK_S)
                    packed = tl.load(bits + bits_at + bits_offsets, mask=there, other=0)
                    keep = _unpacked(packed, LAYOUT, BLOCK_C, BLOCK_S)
                    bits_at += bits_step
                h = tl.where(keep, h, 0.0)
            elif POST != IDENTITY:
                before = u
                if gate is not None:
                    before = u * of_channels(gate + b * C, rows, IDENTITY, VECTOR, ACC)
                h = before_epilogue(h, before, None, residual, at + offsets, mask, POST)
            if POST != IDENTITY:
                tl.store(grad_residual + at + offsets, h, mask=mask)
            h = tl.where(mask, h, 0.0)
            centred = tl.where(mask, value - mean, 0.0)
            if PRE == IDENTITY:
                dv += h
                dv_centred += h * centred
                slopes_centred += centred
            else:
                dot += h * tl.where(mask, u, 0.0)
                slope = tl.where(mask, activate_grad(v, PRE), 0.0)
                h *= slope
                dv += h
                dv_centred += h * centred
                slopes += slope
                slopes_centred += slope * centred
            at += step
            grad_at += grad_step
            first += BLOCK_S
        to = sums + (b * n_split + split) * 6 * C
        of_h = sums_of(dv, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        of_centred = sums_of(dv_centred, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        store_channels(to + C, of_h, c0, C, BLOCK_C)
        store_channels(to + 2 * C, of_centred, c0, C, BLOCK_C)
        if PRE == IDENTITY:  # u is weight (x - mean) + what it is at the mean; of slopes there are as many ones as
            # the split has positions
            weight_of_c = tl.load(norm + c, mask=in_c, other=0.0)
            mean_of_c = tl.load(norm + 2 * C + c, mask=in_c, other=0.0)
            at_mean = tl.fma(mean_of_c, weight_of_c, tl.load(norm + C + c, mask=in_c, other=0.0))
            store_channels(to, weight_of_c * of_centred + at_mean * of_h, c0, C, BLOCK_C)
            positions = tl.maximum(tl.minimum(S - s0, blocks.to(tl.int64) * BLOCK_S), 0)
            tl.store(to + 3 * C + c, tl.zeros(c.shape, ACC) + positions.to(ACC), mask=in_c)
        else:
            store_sums(to, dot, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
            store_sums(to + 3 * C, slopes, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        store_sums(to + 4 * C, slopes_centred, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        of_gate = tl.zeros(c.shape, ACC)
        if gate is not None:
            of_gate += tl.load(gate + b * C + c, mask=masked(in_c, split == 0), other=0.0).to(ACC)
        else:
            of_gate += tl.where(split == 0, 1.0, 0.0)
        tl.store(to + 5 * C + c, of_gate, mask=in_c)


@triton.jit(do_not_specialize=SIZES)
def _norm_gradients(
    grad, x, norm, factors, constants, grad_x,
    c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x once, in reverse, writes grad_x."""
    C, S = c_q * CV, s_q * SV
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        if PRE != IDENTITY:
            weight = of_channels(norm, rows, IDENTITY, VECTOR, ACC)
            bias = of_channels(norm + C, rows, IDENTITY, VECTOR, ACC)
        mean = of_channels(norm + 2 * C, rows, IDENTITY, VECTOR, ACC)
        gate = of_channels(factors + 2 * b * C, rows, IDENTITY, VECTOR, ACC)
        pooled = of_channels(factors + (2 * b + 1) * C, rows, IDENTITY, VECTOR, ACC)
        shift = of_channels(constants, rows, IDENTITY, VECTOR, ACC)
        of_x = of_channels(constants + C, rows, IDENTITY, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        grad_at, grad_offsets, grad_step = at, offsets, step
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_of(
                b, c0, s0, S, stride_b, stride_c, stride_s, rows, BLOCK_C, BLOCK_S, VECTOR
            )
        first = s0  # position of the tile
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            value = _load_map(x, at + offsets, mask, ACC)
            dv = _load_map(grad, grad_at + grad_offsets, mask, ACC) * gate + pooled
            if PRE != IDENTITY:
                dv *= activate_grad(before_activation(value, weight, bias, True), PRE)
            tl.store(grad_x + at + offsets, dv + (shift + of_x * (value - mean)), mask=mask)
            at += step
            grad_at += grad_step
            first += BLOCK_S


def _dense(x: Tensor, *lane_bytes: int) -> tuple[Tensor, maps.Plan]:
    """maps.dense; FLAT where a vector of the map has as many elements as a byte has bits."""
    return maps.dense(x, x.element_size() == 2, *lane_bytes)


def moments(x: Tensor) -> Tensor:
    x, plan = _dense(x, maps.LANE_BYTES, MOMENTS_LANE_BYTES)
    out = x.new_empty((plan.batch, 3, plan.channels), dtype=maps.accumulator(x.dtype))
    tables = {"means": maps.table(x, plan), "squares": maps.table(x, plan)}
    arguments = plan.arguments(x.dtype)
    maps.launch(_moments, x, plan.programs, x=x, out=out, PLAIN=is_plain(plan, x.dtype), **tables, **arguments)
    if plan.layout == FLAT.value:
        return out
    block = min(128, maps.next_power_of_2(plan.channels))
    n_cblk = triton.cdiv(plan.channels, block)
    unused = ("tiles", "BLOCK_C", "LAYOUT", "num_warps")
    arguments = {k: v for k, v in arguments.items() if k not in unused} | {"BLOCK_K": block, "n_cblk": n_cblk}
    maps.launch_where(
        plan.n_split > 1,
        _finish_moments,
        x,
        plan.batch * n_cblk,
        out=out,
        BLOCK_ROWS=maps.ROWS_AT_ONCE,
        num_warps=1,
        **tables,
        **arguments,
    )
    return out


def _of_channels(x: Tensor) -> dict[str, Any]:
    """What the kernels that read no map take of its shape and dtype, and how many programs they are."""
    return {
        "B": x.shape[0],
        "C": x.shape[1],
        "S": x.shape[2:].numel(),
        "SAMPLES": SAMPLES,
        "BLOCK_K": CHANNELS,
        "ACC": maps.triton_accumulator(x.dtype),
        "num_warps": 4,
    }


def norm_coefficients(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wants_descriptor: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels), dtype = x.shape[:2], maps.accumulator(x.dtype)
    norm = x.new_empty((4, channels), dtype=dtype)
    unbiased = x.new_empty(channels, dtype=dtype)
    descriptor = x.new_empty((batch, channels) if wants_descriptor else 0)
    maps.launch(
        _norm_coefficients,
        x,
        triton.cdiv(channels, CHANNELS),
        moments=moments.contiguous(),
        weight=maps.row(weight),
        bias=maps.row(bias),
        norm=norm,
        unbiased=unbiased,
        descriptor=descriptor if wants_descriptor else None,
        EPS=eps,
        **_of_channels(x),
    )
    return norm, unbiased, descriptor


def norm_running(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    channels = mean.numel()
    norm = mean.new_empty((4, channels), dtype=maps.accumulator(mean.dtype))
    maps.launch(
        _norm_running,
        mean,
        triton.cdiv(channels, CHANNELS),
        weight=maps.row(weight),
        bias=maps.row(bias),
        means=mean.contiguous(),
        variances=var.contiguous(),
        norm=norm,
        C=channels,
        EPS=eps,
        BLOCK_K=CHANNELS,
        ACC=maps.triton_accumulator(mean.dtype),
        num_warps=4,
    )
    return norm


def norm_factors(
    x: Tensor, sums: Tensor, grad_s: Tensor | None, norm: Tensor, of_batch: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, channels), dtype = x.shape[:2], maps.accumulator(x.dtype)
    grad_weight, grad_bias = (x.new_empty(channels, dtype=dtype) for _ in range(2))
    factors, constants = (x.new_empty((n, channels), dtype=dtype) for n in (2 * batch, 2))
    factors = factors.view(batch, 2, channels)
    maps.launch(
        _norm_factors,
        x,
        triton.cdiv(channels, CHANNELS),
        sums=sums.contiguous(),
        grad_s=maps.row(grad_s),
        norm=norm.contiguous(),
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        factors=factors,
        constants=constants,
        OF_BATCH=of_batch,
        **_of_channels(x),
    )
    return grad_weight, grad_bias, factors, constants


def _whole_bytes(plan: maps.Plan) -> maps.Plan:
    """Tiles of whole bytes of bits: at least eight channels of a float64 channels_last map."""
    if plan.layout != CHANNELS_LAST.value or plan.block_c >= min(8, plan.channels):
        return plan
    tiles = max(plan.tiles * plan.block_c // 8, 1)
    return plan._replace(block_c=8, tiles=tiles, n_cblk=triton.cdiv(plan.channels, tiles * 8))


def _scale_into(y, x, plan, gate, norm, residual, activation, post_activation, keep_bits) -> Tensor:
    """Writes y, in x's layout, and returns the bits, of size (0,) where they are not kept."""
    bits = x.new_empty(0, dtype=torch.uint8)
    if keep_bits:
        plan = _whole_bytes(plan)
        rows, length = plan.channels, plan.space
        if plan.layout == CHANNELS_LAST.value:
            rows, length = length, rows
        bits = x.new_empty((plan.batch, rows, triton.cdiv(length, 8)), dtype=torch.uint8)
    maps.launch(
        _norm_scale,
        x,
        plan.programs,
        x=x,
        residual=maps.as_map(residual, x),
        y=y,
        bits=bits if keep_bits else None,
        norm=norm.contiguous(),
        gate=maps.row(gate),
        PRE=activation,
        POST=post_activation,
        **plan.arguments(x.dtype),
    )
    return bits


def norm_scale(
    x: Tensor,
    gate: Tensor | None,
    norm: Tensor,
    residual: Tensor | None,
    activation: int,
    post_activation: int,
    keep_bits: bool,
) -> tuple[Tensor, Tensor]:
    x, plan = _dense(x)
    y = torch.empty_like(x)
    return y, _scale_into(y, x, plan, gate, norm, residual, activation, post_activation, keep_bits)


def norm_scale_into(
    x: Tensor,
    gate: Tensor | None,
    norm: Tensor,
    residual: Tensor | None,
    y: Tensor,
    activation: int,
    post_activation: int,
    keep_bits: bool,
) -> Tensor:
    x, plan = _dense(x)
    return _scale_into(y, x, plan, gate, norm, residual, activation, post_activation, keep_bits)


def norm_dots(
    grad: Tensor,
    x: Tensor,
    bits: Tensor | None,
    residual: Tensor | None,
    norm: Tensor,
    gate: Tensor | None,
    activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor]:
    x, plan = _dense(x, 16)  # with five sums an element: registers for more programs, not more elements
    plan = plan if bits is None else _whole_bytes(plan)
    grad_residual = x.new_empty(0) if post_activation == _IDENTITY else torch.empty_like(x)
    grad, strides = maps.gradient(grad, x)
    shape = plan.batch, plan.n_split, 6, plan.channels
    sums = x.new_empty(shape, dtype=maps.accumulator(x.dtype))
    maps.launch(
        _norm_dots,
        x,
        plan.programs,
        grad=grad,
        x=x,
        bits=bits,
        residual=maps.as_map(residual, x),
        norm=norm.contiguous(),
        gate=maps.row(gate),
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
    x, plan = _dense(x)
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
