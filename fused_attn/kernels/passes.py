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
    masked,
    max_of_rows,
    reduce_max,
    sum_rows,
)
from .maps import FLAT, firsts, flat_parts, flat_rows, flat_tile_at, strided_tile_at, tile_at


@triton.jit
def inside(first, S, BLOCK_S: tl.constexpr):
    """Which of BLOCK_S positions from `first` (64 bits) lie within space; compared in 32."""
    return tl.arange(0, BLOCK_S) < tl.minimum(S - first, BLOCK_S).to(tl.int32)


@triton.jit
def count(n, LAYOUT: tl.constexpr):
    """Of a program's tiles or blocks: of FLAT tiles there is one."""
    if LAYOUT == FLAT:
        return 1
    else:
        return n


@triton.jit
def rows_of(c0, C, S, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """What the rows of a tile are, as `of_channels` and `positions` read it: channels, or vectors of a FLAT tile."""
    if LAYOUT == FLAT:
        return flat_rows(c0, C, S, BLOCK_C, BLOCK_S, VECTOR)
    else:
        c = c0 + tl.arange(0, BLOCK_C)
        return c, c < C, None, None, None


@triton.jit
def of_channels(numbers, rows, CODE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The activation CODE of the tile's numbers of one a channel: a column, or of a FLAT tile one an element."""
    c, exists, next_exists, edge, _ = rows
    first = activate(tl.load(numbers + c, mask=exists, other=0).to(ACC), CODE)
    if edge is not None:
        second = activate(tl.load(numbers + c + 1, mask=next_exists, other=0).to(ACC), CODE)
        return tl.where(firsts(edge, VECTOR), first[:, None], second[:, None])
    else:
        return first[:, None]


@triton.jit
def affine_of(affine_weight, affine_bias, rows, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The prologue's weight and bias likewise; without a prologue, numbers that nobody uses."""
    if affine_weight is not None:
        return of_channels(affine_weight, rows, IDENTITY, VECTOR, ACC), of_channels(
            affine_bias, rows, IDENTITY, VECTOR, ACC
        )
    else:
        return rows[0], rows[0]


@triton.jit
def positions(first, S, rows, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """Where in its channel each column lies, or each element of a FLAT tile."""
    _, _, _, edge, begin = rows
    if edge is not None:
        at = begin[:, None] + tl.arange(0, VECTOR)[None, :]
        return tl.where(firsts(edge, VECTOR), at, at - S)
    else:
        return (first.to(tl.int32) + tl.arange(0, BLOCK_S))[None, :]


@triton.jit
def elements(first, S, rows, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """Which of the tile's elements exist."""
    _, exists, _, edge, _ = rows
    if edge is not None:
        return tl.broadcast_to(exists[:, None], (BLOCK_S // VECTOR, VECTOR))
    else:
        return exists[:, None] & inside(first, S, BLOCK_S)[None, :]


@triton.jit
def counted(first, S, rows, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """Which of them a reduction over space takes: rows that do not exist are not stored."""
    _, _, _, edge, _ = rows
    if edge is not None:
        return elements(first, S, rows, BLOCK_S, VECTOR)
    else:
        return inside(first, S, BLOCK_S)[None, :]


@triton.jit
def tile_of(b, c0, s0, C, S, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """tile_at, for a FLAT tile too."""
    if LAYOUT == FLAT:
        return flat_tile_at(b, c0, C, S, BLOCK_S, VECTOR)
    else:
        return tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)


@triton.jit
def strided_tile_of(
    b, c0, s0, S, stride_b, stride_c, stride_s, rows,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """strided_tile_at, likewise."""
    c, _, _, edge, _ = rows
    if edge is not None:
        first = b * stride_b + c0.to(tl.int64) * stride_c
        k = (c - c0)[:, None] + tl.where(firsts(edge, VECTOR), 0, 1)
        at = positions(s0, S, rows, BLOCK_S, VECTOR)
        return first, k.to(tl.int64) * stride_c + at.to(tl.int64) * stride_s, tl.full((), 0, tl.int64)
    else:
        return strided_tile_at(b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S)


@triton.jit
def sums_of(
    values, S, rows, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """The sums of a tile's values for each of its channels, a power of two of them; of a FLAT tile's, values that do
    not exist may be any."""
    _, _, _, edge, _ = rows
    if edge is not None:
        first = tl.where(firsts(edge, VECTOR), values, 0.0)
        # The others, by bits: as quick as a second choice, and no predicate has to be kept for it.
        bits: tl.constexpr = tl.int64 if values.dtype == tl.float64 else tl.int32
        other = (values.to(bits, bitcast=True) ^ first.to(bits, bitcast=True)).to(values.dtype, bitcast=True)
        sums = tl.join(tl.sum(first, axis=1), tl.sum(other, axis=1))
        parts, are_parts = flat_parts(sums, S, BLOCK_C, BLOCK_S, VECTOR)
        return tl.sum(tl.where(are_parts, parts, 0.0), axis=0)
    else:
        return tl.sum(values, axis=1)


@triton.jit
def store_sums(
    out, values, c0, C, S, rows, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    store_channels(out, sums_of(values, S, rows, BLOCK_C, BLOCK_S, VECTOR), c0, C, BLOCK_C)


@triton.jit
def store_channels(out, numbers, c0, C, BLOCK_C: tl.constexpr):
    """Numbers of a tile's channels."""
    k = tl.arange(0, numbers.shape[0])
    tl.store(out + c0 + k, numbers, mask=(k < BLOCK_C) & (c0 + k < C))


@triton.jit
def store_maxima(
    best, place, peak, found, c0, C, S, rows, TIES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Likewise the maxima and their places."""
    _, _, _, edge, _ = rows
    if edge is not None:
        own = firsts(edge, VECTOR)
        nowhere: tl.constexpr = 0 if TIES == EVEN else NOWHERE
        lowest = float("-inf")
        key, where = reduce_max(tl.where(own, peak, lowest), tl.where(own, found, nowhere), 1, TIES)
        key2, where2 = reduce_max(tl.where(own, lowest, peak), tl.where(own, nowhere, found), 1, TIES)
        peaks, are_parts = flat_parts(tl.join(from_order_key(key), from_order_key(key2)), S, BLOCK_C, BLOCK_S, VECTOR)
        places, _ = flat_parts(tl.join(where, where2), S, BLOCK_C, BLOCK_S, VECTOR)
        key, where = reduce_max(tl.where(are_parts, peaks, lowest), tl.where(are_parts, places, nowhere), 0, TIES)
        store_channels(best, from_order_key(key), c0, C, BLOCK_C)
        store_channels(place, where, c0, C, BLOCK_C)
    else:
        key, where = reduce_max(peak, found, 1, TIES)
        store_channels(best, from_order_key(key), c0, C, BLOCK_C)
        store_channels(place, where, c0, C, BLOCK_C)


@triton.jit
def pool_pass(
    x, affine_weight, affine_bias, sums, best, place,
    b, cblk, split, C, S, n_split, blocks, tiles,
    PRE: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once; leaves partial sums, and partial maxima with first position or multiplicity, (B, n_split, C)."""
    row = (b * n_split + split) * C
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weight, bias = affine_of(affine_weight, affine_bias, rows, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        first = s0  # position of the tile
        total = tl.zeros((ROWS, COLUMNS), ACC)
        peak = tl.full((ROWS, COLUMNS), float("-inf"), ACC)
        found = tl.full((ROWS, COLUMNS), 0 if TIES == EVEN else NOWHERE, tl.int32)
        value = tl.load(x + at + offsets, mask=elements(first, S, rows, BLOCK_S, VECTOR), other=0.0)
        for i in range(count(blocks, LAYOUT)):
            mask = counted(first, S, rows, BLOCK_S, VECTOR)
            if LAYOUT != FLAT:  # two tiles are in flight
                in_next = masked(elements(first + BLOCK_S, S, rows, BLOCK_S, VECTOR), i + 1 < blocks)
                following = tl.load(x + at + step + offsets, mask=in_next, other=0.0)
            u = activate(before_activation(value.to(ACC), weight, bias, affine_weight is not None), PRE)
            if POOL != MAX:
                total = u if LAYOUT == FLAT else total + tl.where(mask, u, 0.0)
            if POOL != AVG:
                if PRE != IDENTITY or affine_weight is not None:
                    u = u.to(value.dtype).to(ACC)
                better = mask & (peak == peak) & ~(u <= peak)
                if TIES == EVEN:
                    found = tl.where(better, 1, tl.where(mask & (u == peak), found + 1, found))
                elif LAYOUT == FLAT:
                    found = tl.where(better, positions(first, S, rows, BLOCK_S, VECTOR), found)
                else:  # the tile: its positions are the same from then on
                    found = tl.where(better, i, found)
                peak = tl.where(better, u, peak)
            if LAYOUT != FLAT:
                value = following
            at += step
            first += BLOCK_S
        if POOL != MAX:
            store_sums(sums + row, total, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        if POOL != AVG:
            if TIES != EVEN and LAYOUT != FLAT:
                found = tl.where(found < blocks, positions(s0, S, rows, BLOCK_S, VECTOR) + found * BLOCK_S, NOWHERE)
            store_maxima(best + row, place + row, peak, found, c0, C, S, rows, TIES, BLOCK_C, BLOCK_S, VECTOR)


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
def channel_gates(gate, rows, GATE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The tile's gates a channel, from a sample's row of what GATE is applied to; None: one."""
    if gate is None:
        return 1.0
    else:
        return of_channels(gate, rows, GATE, VECTOR, ACC)


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
    """Reads x and the residual once, writes y; `gate` and `space_gate` point at the sample's rows. A FLAT
    tile has no gates of positions."""
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weight, bias = affine_of(affine_weight, affine_bias, rows, VECTOR, ACC)
        g = channel_gates(gate, rows, GATE, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        first = s0  # position of the tile
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
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
    (per channel) and `value` at `place`, or with `peak` wherever u equals it. Pointers are at the sample's row. A FLAT
    tile has no gates and pools of positions.
    """
    row = (b * n_split + split) * C
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    READS_X: tl.constexpr = dots is not None or AFFINE or PRE != IDENTITY or peak is not None or space_peak is not None
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weight, bias = affine_of(affine_weight, affine_bias, rows, VECTOR, ACC)
        at, offsets, step = tile_of(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        g = channel_gates(gate, rows, GATE, VECTOR, ACC)
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_of(
                b, c0, s0, S, stride_b, stride_c, stride_s, rows, BLOCK_C, BLOCK_S, VECTOR
            )
        if mean is not None:
            shared = of_channels(mean, rows, IDENTITY, VECTOR, ACC)
        if value is not None:
            to_peak = of_channels(value, rows, IDENTITY, VECTOR, ACC)
            if peak is not None:
                highest = of_channels(peak, rows, IDENTITY, VECTOR, ACC)
            else:
                peak_at = of_channels(place, rows, IDENTITY, VECTOR, tl.int32)
        first = s0  # position of the tile
        dot = tl.zeros((ROWS, COLUMNS), ACC)
        weight_sum = tl.zeros((ROWS, COLUMNS), ACC)
        bias_sum = tl.zeros((ROWS, COLUMNS), ACC)
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            if READS_X:
                v = tl.load(x + at + offsets, mask=mask, other=0.0)
                before = before_activation(v.to(ACC), weight, bias, AFFINE)
                u = activate(before, PRE)
            du = tl.zeros((ROWS, COLUMNS), ACC)  # first of v
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
                    here = rows[0][:, None] == tl.load(channel + position, mask=in_s, other=0)[None, :]
                du += tl.where(here, to_max[None, :], 0.0)
            if dots is not None:
                dot = du * u if LAYOUT == FLAT else dot + tl.where(mask, du * u, 0.0)
            du *= g
            if grad_x is not None:
                if mean is not None:
                    du += shared
                if value is not None:
                    if peak is not None:
                        hit = u.to(x.dtype.element_ty).to(ACC) == highest
                    else:
                        hit = positions(first, S, rows, BLOCK_S, VECTOR) == peak_at
                    du += tl.where(hit, to_peak, 0.0)
                if PRE != IDENTITY:
                    du *= activate_grad(before, PRE)
                if AFFINE:
                    weight_sum += tl.where(mask, du * v.to(ACC), 0.0)
                    bias_sum += tl.where(mask, du, 0.0)
                    du *= weight
                tl.store(grad_x + at + offsets, du, mask=mask)
            at += step
            first += BLOCK_S
        if dots is not None:
            store_sums(dots + row, dot, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
        if AFFINE and grad_x is not None:
            store_sums(weight_sums + row, weight_sum, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
            store_sums(bias_sums + row, bias_sum, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)


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
