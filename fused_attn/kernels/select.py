"""Op `select` and its parts: M branch maps weighted by an excitation of the mean of their sum.

Forward 2 launches (read the branches; read them again, write y: 2 M + 1 passes), backward 3 (read grad and the
branches; read grad, and after a prologue the branches, write their gradients: 2 M + 2 passes, or 3 M + 2; gradients of
the parameters). The sum of the branches and what a prologue makes of them stay on chip. As in channel_gate.py a launch
leaves partial results, one row a program, and every program of the next sums those of its sample in the same order:
both layers' products are linear in what the programs of the launch before have each a part of.

Where the layers outweigh a program's share of the map (`_is_apart`), as on small maps, they have launches of their
own, as in channel_gate.py: 4 launches forward, 5 backward.

A branch is a tensor, or a part of a stacked one, whose samples are dense in NCHW, or in channels_last with pixels any
distance apart; samples may be any distance apart. Kernels take the branches, and their distances, as tuples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import LAYERS, POOLS, SELECTIONS, TIES
from ..ops.select import branch_views, empty_gradients, empty_sum, readable
from . import layers, maps
from .channel_gate import store_hidden
from .language import (
    AVG,
    FIRST,
    IDENTITY,
    activate,
    activate_grad,
    add_product,
    before_activation,
    product,
    sigmoid,
    sum_rows,
)
from .layers import block_of, descriptors, is_first, store_hidden_logits, sum_parts, through_hidden
from .maps import CHANNELS_LAST, FLAT, SIZES, channels_of, locate
from .passes import count, elements, of_channels, rows_of, store_sums, strided_tile_of, tile_of
from .squeeze import finish

SOFTMAX = tl.constexpr(SELECTIONS["softmax"])
FEW_ENOUGH = 4  # branches whose numbers leave a program registers for more than one tile of channels
FLAT_LANES = 2  # a FLAT tile has so many times the elements: a program has one, and puts its channels' sums together
FEW = tl.constexpr(2)  # branches whose numbers a channel stay in registers where a thread has many channels
NO_VARIANTS = (*SIZES, "x_pixels", "grad_pixels", "H", "CG", "HG")


@triton.jit
def _tile_at(
    c0, s0, C, S, pixels, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr
):
    """passes.tile_of within a sample of a branch, whose `pixels` are so many elements apart in channels_last."""
    if LAYOUT == CHANNELS_LAST:
        c = tl.arange(0, BLOCK_C)[:, None]
        s = tl.arange(0, BLOCK_S)[None, :]
        return s0 * pixels + c0, c + s * pixels, (BLOCK_S * pixels).to(tl.int64)
    else:
        return tile_of(tl.full((), 0, tl.int64), c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)


@triton.jit
def _count(tiles):
    """A program's tiles of channels; None: one."""
    if tiles is None:
        return 1
    else:
        return tiles


@triton.jit
def _apart(pixels, C, PV: tl.constexpr):
    """How many elements pixels are apart; None: as many as there are channels."""
    if pixels is None:
        return C
    else:
        return pixels * PV


@triton.jit
def _of_branch(table, m: tl.constexpr, C, rows, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Branch m's numbers of a tile's channels, from a table (M, C); None: numbers that nobody uses."""
    if table is None:
        return rows[0]
    else:
        return of_channels(table + m * C, rows, IDENTITY, VECTOR, ACC)


@triton.jit
def _keep(table, KEPT: tl.constexpr, C, rows, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The numbers of all branches, KEPT of them, for all of a program's space; else each tile reads them again."""
    kept = ()
    for m in tl.static_range(KEPT):
        kept = kept + (_of_branch(table, m, C, rows, VECTOR, ACC),)
    return kept


@triton.jit
def _kept(kept, table, m: tl.constexpr, KEPT: tl.constexpr, C, rows, VECTOR: tl.constexpr, ACC: tl.constexpr):
    if KEPT > 0:
        return kept[m]
    else:
        return _of_branch(table, m, C, rows, VECTOR, ACC)


@triton.jit
def _load_branches(branches, distances, b, at, mask, M: tl.constexpr, BV: tl.constexpr):
    """A tile of each branch; all loads are issued before any is used."""
    values = ()
    for m in tl.static_range(M):
        values = values + (tl.load(branches[m] + b * distances[m] * BV + at, mask=mask, other=0.0),)
    return values


@triton.jit
def _zeros(M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr):
    """Room for each branch's folded tile."""
    tiles = ()
    for _ in tl.static_range(M):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS // FOLD), ACC),)
    return tiles


@triton.jit
def _folded(tile, FOLD: tl.constexpr):
    """Sums of FOLD neighbours along space, which one thread has loaded together."""
    if FOLD == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // FOLD, FOLD)), axis=2)


@triton.jit
def pool_branches_pass(
    branches, distances, affine_weight, affine_bias, sums, b, cblk, split, C, S, pixels, n_split, blocks, tiles,
    PRE: tl.constexpr, BV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads each branch once; leaves partial sums over space of the branches' sum, (B, n_split, C)."""
    M: tl.constexpr = len(branches)
    KEPT: tl.constexpr = 0 if LAYOUT == FLAT or (M > FEW and LAYOUT == CHANNELS_LAST) else M
    VECTOR: tl.constexpr = 128 // branches[0].dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    row = (b * n_split + split) * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weights_kept = _keep(affine_weight, KEPT, C, rows, VECTOR, ACC)
        biases_kept = _keep(affine_bias, KEPT, C, rows, VECTOR, ACC)
        at, offsets, step = _tile_at(c0, s0, C, S, pixels, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        first = s0  # position of the tile
        total = tl.zeros((ROWS, COLUMNS), ACC)
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            values = _load_branches(branches, distances, b, at + offsets, mask, M, BV)
            for m in tl.static_range(M):
                weight = _kept(weights_kept, affine_weight, m, KEPT, C, rows, VECTOR, ACC)
                bias = _kept(biases_kept, affine_bias, m, KEPT, C, rows, VECTOR, ACC)
                u = activate(before_activation(values[m].to(ACC), weight, bias, AFFINE), PRE)
                total = total + u if LAYOUT == FLAT else total + tl.where(mask, u, 0.0)
            at += step
            first += BLOCK_S
        store_sums(sums + row, total, c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)


@triton.jit
def sum_branches_pass(
    branches, distances, weights, affine_weight, affine_bias, y, b, cblk, split, C, S, pixels, blocks, tiles,
    PRE: tl.constexpr, BV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads each branch once, writes y; `weights` points at the sample's (M, C)."""
    M: tl.constexpr = len(branches)
    KEPT: tl.constexpr = 0 if LAYOUT == FLAT or (M > FEW and LAYOUT == CHANNELS_LAST) else M
    VECTOR: tl.constexpr = 128 // y.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    y += b * C * S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weights_kept = _keep(affine_weight, KEPT, C, rows, VECTOR, ACC)
        biases_kept = _keep(affine_bias, KEPT, C, rows, VECTOR, ACC)
        a_kept = _keep(weights, KEPT, C, rows, VECTOR, ACC)
        at, offsets, step = _tile_at(c0, s0, C, S, pixels, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        y_at, y_offsets, y_step = _tile_at(c0, s0, C, S, C, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        first = s0  # position of the tile
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            values = _load_branches(branches, distances, b, at + offsets, mask, M, BV)
            result = tl.zeros((ROWS, COLUMNS), ACC)
            for m in tl.static_range(M):
                weight = _kept(weights_kept, affine_weight, m, KEPT, C, rows, VECTOR, ACC)
                bias = _kept(biases_kept, affine_bias, m, KEPT, C, rows, VECTOR, ACC)
                u = activate(before_activation(values[m].to(ACC), weight, bias, AFFINE), PRE)
                result += u * _kept(a_kept, weights, m, KEPT, C, rows, VECTOR, ACC)
            tl.store(y + y_at + y_offsets, result, mask=mask)
            at += step
            y_at += y_step
            first += BLOCK_S


@triton.jit
def _grad_at(
    b, c0, s0, C, S, stride_b, stride_c, stride_s, rows,
    LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """passes.tile_of, of the map's gradient: with these strides, None: dense."""
    if stride_b is not None:
        return strided_tile_of(b, c0, s0, S, stride_b, stride_c, stride_s, rows, BLOCK_C, BLOCK_S, VECTOR)
    else:
        at, offsets, step = _tile_at(c0, s0, C, S, C, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        return b * C * S + at, offsets, step


@triton.jit
def dot_branches_pass(
    grad, branches, distances, affine_weight, affine_bias, dots,
    b, cblk, split, C, S, pixels, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, BV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and each branch once; leaves partial sums over space of their products, (B, n_split, M, C)."""
    M: tl.constexpr = len(branches)
    KEPT: tl.constexpr = 0 if LAYOUT == FLAT or (M > FEW and LAYOUT == CHANNELS_LAST) else M
    VECTOR: tl.constexpr = 128 // grad.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    row = (b * n_split + split) * M * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weights_kept = _keep(affine_weight, KEPT, C, rows, VECTOR, ACC)
        biases_kept = _keep(affine_bias, KEPT, C, rows, VECTOR, ACC)
        at, offsets, step = _tile_at(c0, s0, C, S, pixels, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        grad_at, grad_offsets, grad_step = _grad_at(
            b, c0, s0, C, S, stride_b, stride_c, stride_s, rows, LAYOUT, BLOCK_C, BLOCK_S, VECTOR
        )
        first = s0  # position of the tile
        sums = _zeros(M, ROWS, COLUMNS, FOLD, ACC)
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            dy = tl.load(grad + grad_at + grad_offsets, mask=mask, other=0.0)
            values = _load_branches(branches, distances, b, at + offsets, mask, M, BV)
            found = ()
            for m in tl.static_range(M):
                weight = _kept(weights_kept, affine_weight, m, KEPT, C, rows, VECTOR, ACC)
                bias = _kept(biases_kept, affine_bias, m, KEPT, C, rows, VECTOR, ACC)
                u = activate(before_activation(values[m].to(ACC), weight, bias, AFFINE), PRE)
                found = found + (sums[m] + _folded(tl.where(mask, dy.to(ACC) * u, 0.0), FOLD),)
            sums = found
            at += step
            grad_at += grad_step
            first += BLOCK_S
        for m in tl.static_range(M):
            store_sums(dots + row + m * C, sums[m], c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)


@triton.jit
def spread_branches_pass(
    grad, branches, distances, weights, grad_descriptor, affine_weight, affine_bias,
    grads, grad_distances, weight_sums, bias_sums,
    b, cblk, split, C, S, pixels, grad_pixels, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, BV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad, and after a prologue each branch; writes each branch's gradient, grad * its weight + the
    descriptor's share of each position, through the prologue, whose partial sums (B, n_split, M, C) it leaves.
    `weights` and `grad_descriptor` point at the sample's rows."""
    M: tl.constexpr = len(grads)
    KEPT: tl.constexpr = 0 if LAYOUT == FLAT or (M > FEW and LAYOUT == CHANNELS_LAST) else M
    VECTOR: tl.constexpr = 128 // grad.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_S // VECTOR if LAYOUT == FLAT else BLOCK_C
    COLUMNS: tl.constexpr = VECTOR if LAYOUT == FLAT else BLOCK_S
    AFFINE: tl.constexpr = affine_weight is not None
    row = (b * n_split + split) * M * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(count(tiles, LAYOUT)):
        c0 = (cblk * tiles + j) * BLOCK_C
        rows = rows_of(c0, C, S, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        weights_kept = _keep(affine_weight, KEPT, C, rows, VECTOR, ACC)
        biases_kept = _keep(affine_bias, KEPT, C, rows, VECTOR, ACC)
        a_kept = _keep(weights, KEPT, C, rows, VECTOR, ACC)
        shared = of_channels(grad_descriptor, rows, IDENTITY, VECTOR, ACC) * (1.0 / S.to(ACC))
        at, offsets, step = _tile_at(c0, s0, C, S, pixels, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        to, to_offsets, to_step = _tile_at(c0, s0, C, S, grad_pixels, LAYOUT, BLOCK_C, BLOCK_S, VECTOR)
        grad_at, grad_offsets, grad_step = _grad_at(
            b, c0, s0, C, S, stride_b, stride_c, stride_s, rows, LAYOUT, BLOCK_C, BLOCK_S, VECTOR
        )
        first = s0  # position of the tile
        if AFFINE:
            by_weight = _zeros(M, ROWS, COLUMNS, FOLD, ACC)
            by_bias = _zeros(M, ROWS, COLUMNS, FOLD, ACC)
        for _ in range(count(blocks, LAYOUT)):
            mask = elements(first, S, rows, BLOCK_S, VECTOR)
            dy = tl.load(grad + grad_at + grad_offsets, mask=mask, other=0.0)
            if PRE != IDENTITY or AFFINE:
                values = _load_branches(branches, distances, b, at + offsets, mask, M, BV)
            of_weight = ()
            of_bias = ()
            for m in tl.static_range(M):
                weight = _kept(weights_kept, affine_weight, m, KEPT, C, rows, VECTOR, ACC)
                bias = _kept(biases_kept, affine_bias, m, KEPT, C, rows, VECTOR, ACC)
                du = dy.to(ACC) * _kept(a_kept, weights, m, KEPT, C, rows, VECTOR, ACC) + shared
                if PRE != IDENTITY:
                    du *= activate_grad(before_activation(values[m].to(ACC), weight, bias, AFFINE), PRE)
                if AFFINE:
                    of_weight = of_weight + (by_weight[m] + _folded(tl.where(mask, du * values[m].to(ACC), 0.0), FOLD),)
                    of_bias = of_bias + (by_bias[m] + _folded(tl.where(mask, du, 0.0), FOLD),)
                    du *= weight
                tl.store(grads[m] + b * grad_distances[m] * BV + to + to_offsets, du, mask=mask)
            if AFFINE:
                by_weight, by_bias = of_weight, of_bias
            at += step
            to += to_step
            grad_at += grad_step
            first += BLOCK_S
        if AFFINE:
            for m in tl.static_range(M):
                store_sums(weight_sums + row + m * C, by_weight[m], c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)
                store_sums(bias_sums + row + m * C, by_bias[m], c0, C, S, rows, BLOCK_C, BLOCK_S, VECTOR)


# ---- the excitation: rows m * BLOCK_K + i are branch m, channel i of the program ----


@triton.jit
def _rows(
    cblk, tiles, C, CG,
    M: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(place in (M, C), row of weight2, group, whether it exists) of each row."""
    r = tl.arange(0, BLOCK_M * BLOCK_K)
    m, k = r // BLOCK_K, r % BLOCK_K
    c = cblk * tiles * BLOCK_C + k
    exists = (m < M) & (k < tiles * BLOCK_C) & (c < C)
    if GROUPED:
        return m * C + c, c // CG * (M * CG) + m * CG + c % CG, c // CG, exists
    else:
        return m * C + c, m * C + c, c * 0, exists


@triton.jit
def _part_of(h, HG, GROUPED: tl.constexpr):
    """(group, place within it) of hidden numbers h."""
    if GROUPED:
        return h // HG, h % HG
    else:
        return h * 0, h


@triton.jit(do_not_specialize=NO_VARIANTS)
def _pool_branches(
    branches, distances, affine_weight, affine_bias, weight1, sums, products, mean,
    c_q, s_q, x_pixels, n_cblk, n_split, blocks, tiles, H, CG, HG,
    PRE: tl.constexpr, GROUPED: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr,
    LAYOUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Reads the branches; leaves partial sums and, where they are given, weight1's products with the program's part of
    the descriptor, or, where space is not split, the descriptor itself, `mean`."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    tiles = _count(tiles)
    pool_branches_pass(
        branches, distances, affine_weight, affine_bias, sums, b, cblk, split, C, S, _apart(x_pixels, C, PV),
        n_split, blocks, tiles, PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if mean is not None:  # noqa: SIM102 (it is known when this is compiled; what follows is not)
        if n_split == 1:
            tl.debug_barrier()
            c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
            tl.store(mean + b * C + c, tl.load(sums + b * C + c, mask=in_c, other=0.0) / S, mask=in_c)
    if products is not None:
        tl.debug_barrier()
        c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
        s = tl.load(sums + (b * n_split + split) * C + c, mask=in_c, other=0.0) / S
        group, place = _part_of(c, CG, GROUPED)
        out = products + ((b * n_cblk + cblk) * n_split + split) * H
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            mask = (h < H)[:, None] & in_c[None, :]
            if GROUPED:
                mask &= (h // HG)[:, None] == group[None, :]
            w = tl.load(weight1 + h[:, None] * CG + place[None, :], mask=mask, other=0.0).to(ACC)
            tl.store(out + h, tl.sum(tl.where(mask, w * s[None, :], 0.0), axis=1), mask=h < H)


@triton.jit(do_not_specialize=NO_VARIANTS)
def _sum_branches(
    branches, distances, weights, affine_weight, affine_bias, y,
    c_q, s_q, x_pixels, n_cblk, n_split, blocks, tiles, width,
    PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    tiles = _count(tiles)
    sum_branches_pass(
        branches, distances, weights + b * width, affine_weight, affine_bias, y, b, cblk, split, C, S,
        _apart(x_pixels, C, PV), blocks, tiles, PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=NO_VARIANTS)
def _select(
    branches, distances, bias1, weight2, bias2, affine_weight, affine_bias, sums, products, y, state,
    c_q, s_q, x_pixels, n_cblk, n_split, blocks, tiles, H, CG, HG, n_part, width,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, PRE: tl.constexpr, GROUPED: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weights of the program's channels, into `state`; then reads the branches, writes y."""
    C, S = c_q * CV, s_q * SV
    M: tl.constexpr = len(branches)
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    tiles = _count(tiles)
    row = state + b * width
    c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
    mean = sum_rows(sums + b * n_split * C, n_split, C, c, in_c, BLOCK_ROWS, ACC) / S
    tl.store(row + c, mean, mask=in_c)
    place, place2, group, exists = _rows(cblk, tiles, C, CG, M, GROUPED, BLOCK_M, BLOCK_K, BLOCK_C)
    z = tl.zeros((BLOCK_M * BLOCK_K,), ACC)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        z1 = store_hidden(products + b * n_part * H, bias1, row + C, n_part, H, h, cblk == 0, BLOCK_ROWS, ACC)
        group_h, place_h = _part_of(h, HG, GROUPED)
        mask = exists[:, None] & (h < H)[None, :]
        if GROUPED:
            mask &= group[:, None] == group_h[None, :]
        w = tl.load(weight2 + place2[:, None] * HG + place_h[None, :], mask=mask, other=0.0).to(ACC)
        z += tl.sum(tl.where(mask, w * activate(z1, ACTIVATION)[None, :], 0.0), axis=1)
    if bias2 is not None:
        z += tl.load(bias2 + place2, mask=exists, other=0.0).to(ACC)
    if GATE == SOFTMAX:
        real = (tl.arange(0, BLOCK_M) < M)[:, None]
        z = tl.where(real, tl.reshape(z, (BLOCK_M, BLOCK_K)), float("-inf"))
        e = tl.where(real, tl.exp(z - tl.max(z, axis=0)[None, :]), 0.0)
        a = tl.reshape(e / tl.sum(e, axis=0)[None, :], (BLOCK_M * BLOCK_K,))
    else:
        a = sigmoid(z)
    tl.store(row + C + H + place, a, mask=exists)
    tl.debug_barrier()
    sum_branches_pass(
        branches, distances, row + C + H, affine_weight, affine_bias, y, b, cblk, split, C, S,
        _apart(x_pixels, C, PV), blocks, tiles, PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _before_gate(dot, a, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Gradients of the logits from those of the weights a; linear in them. What does not exist has a weight of 0."""
    if GATE == SOFTMAX:  # as seen from the first branch's: what they have in common costs no digits
        dot, a = tl.reshape(dot, (BLOCK_M, BLOCK_K)), tl.reshape(a, (BLOCK_M, BLOCK_K))
        first = (tl.arange(0, BLOCK_M) == 0)[:, None]
        apart = dot - tl.sum(tl.where(first, dot, 0.0), axis=0)[None, :]
        da = a * (apart - tl.sum(a * apart, axis=0)[None, :])
        return tl.reshape(da, (BLOCK_M * BLOCK_K,))
    else:
        return dot * a * (1.0 - a)


@triton.jit(do_not_specialize=NO_VARIANTS)
def _dot_branches(
    grad, branches, distances, affine_weight, affine_bias, weight2, state, dots, products,
    c_q, s_q, x_pixels, n_cblk, n_split, blocks, tiles, H, CG, HG, width, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, PRE: tl.constexpr, GROUPED: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and the branches; leaves partial dots and, where weight2 is given, its transposed products with the
    program's part of the logits' gradients."""
    C, S = c_q * CV, s_q * SV
    M: tl.constexpr = len(branches)
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    tiles = _count(tiles)
    dot_branches_pass(
        grad, branches, distances, affine_weight, affine_bias, dots, b, cblk, split, C, S, _apart(x_pixels, C, PV),
        n_split, blocks, tiles, stride_b, stride_c, stride_s, PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, FOLD, ACC,
    )  # fmt: skip
    if weight2 is not None:
        tl.debug_barrier()
        place, place2, group, exists = _rows(cblk, tiles, C, CG, M, GROUPED, BLOCK_M, BLOCK_K, BLOCK_C)
        dot = tl.load(dots + (b * n_split + split) * M * C + place, mask=exists, other=0.0)
        a = tl.load(state + b * width + C + H + place, mask=exists, other=0.0)
        dz = _before_gate(dot, a, GATE, BLOCK_M, BLOCK_K)
        out = products + ((b * n_cblk + cblk) * n_split + split) * H
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            group_h, place_h = _part_of(h, HG, GROUPED)
            mask = exists[:, None] & (h < H)[None, :]
            if GROUPED:
                mask &= group[:, None] == group_h[None, :]
            w = tl.load(weight2 + place2[:, None] * HG + place_h[None, :], mask=mask, other=0.0).to(ACC)
            tl.store(out + h, tl.sum(tl.where(mask, w * dz[:, None], 0.0), axis=0), mask=h < H)


@triton.jit(do_not_specialize=NO_VARIANTS)
def _spread_branches(
    grad, branches, distances, weights, grad_descriptor, affine_weight, affine_bias,
    grads, grad_distances, weight_sums, bias_sums,
    c_q, s_q, x_pixels, grad_pixels, n_cblk, n_split, blocks, tiles, width, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    tiles = _count(tiles)
    spread_branches_pass(
        grad, branches, distances, weights + b * width, grad_descriptor + b * C, affine_weight, affine_bias,
        grads, grad_distances, weight_sums, bias_sums, b, cblk, split, C, S, _apart(x_pixels, C, PV),
        _apart(grad_pixels, C, PV), n_split, blocks, tiles, stride_b, stride_c, stride_s,
        PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, FOLD, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=NO_VARIANTS)
def _select_spread(
    grad, branches, distances, weight1, affine_weight, affine_bias, state, dots, products,
    grads, grad_distances, grad_descriptor, grad_logits, grad_hidden, weight_sums, bias_sums,
    c_q, s_q, x_pixels, grad_pixels, n_cblk, n_split, blocks, tiles, H, CG, HG, n_part, width,
    stride_b, stride_c, stride_s,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, PRE: tl.constexpr, GROUPED: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, BV: tl.constexpr, PV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ROWS: tl.constexpr, DOT_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the program's logits, of the hidden logits and of its descriptors; then reads grad (the branches too
    after a prologue), writes the branches' gradients, and leaves partial sums for the prologue."""
    C, S = c_q * CV, s_q * SV
    M: tl.constexpr = len(grads)
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    tiles = _count(tiles)
    row = state + b * width
    place, _place2, _group, exists = _rows(cblk, tiles, C, CG, M, GROUPED, BLOCK_M, BLOCK_K, BLOCK_C)
    dot = sum_rows(dots + b * n_split * M * C, n_split, M * C, place, exists, DOT_ROWS, ACC)
    a = tl.load(row + C + H + place, mask=exists, other=0.0)
    tl.store(grad_logits + b * M * C + place, _before_gate(dot, a, GATE, BLOCK_M, BLOCK_K), mask=exists)
    c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
    group, place_c = _part_of(c, CG, GROUPED)
    ds = tl.zeros((BLOCK_K,), ACC)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        z1 = tl.load(row + C + h, mask=h < H, other=0.0)
        dz1 = sum_rows(products + b * n_part * H, n_part, H, h, h < H, BLOCK_ROWS, ACC) * activate_grad(z1, ACTIVATION)
        if cblk == 0:
            tl.store(grad_hidden + b * H + h, dz1, mask=h < H)
        mask = (h < H)[:, None] & in_c[None, :]
        if GROUPED:
            mask &= (h // HG)[:, None] == group[None, :]
        w = tl.load(weight1 + h[:, None] * CG + place_c[None, :], mask=mask, other=0.0).to(ACC)
        ds += tl.sum(tl.where(mask, w * dz1[:, None], 0.0), axis=0)
    tl.store(grad_descriptor + b * C + c, ds, mask=in_c)
    tl.debug_barrier()
    spread_branches_pass(
        grad, branches, distances, row + C + H, grad_descriptor + b * C, affine_weight, affine_bias,
        grads, grad_distances, weight_sums, bias_sums, b, cblk, split, C, S, _apart(x_pixels, C, PV),
        _apart(grad_pixels, C, PV), n_split, blocks, tiles, stride_b, stride_c, stride_s,
        PRE, BV, LAYOUT, BLOCK_C, BLOCK_S, FOLD, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=NO_VARIANTS)
def _select_parameters(
    state, grad_logits, grad_hidden, weight_sums, bias_sums,
    grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_affine_weight, grad_affine_bias,
    B, C, n_split, H, CG, HG, width,
    M: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters: programs over tiles (H, C) of weight1 and of each branch's part of weight2, each
    sums over the batch in order."""
    c_blocks, h_blocks = tl.cdiv(C, BLOCK_C), tl.cdiv(H, BLOCK_H)
    cblk, hblk = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks % h_blocks
    m = tl.program_id(0) // (c_blocks * h_blocks)  # M: weight1
    c = cblk * BLOCK_C + tl.arange(0, BLOCK_C)
    h = hblk * BLOCK_H + tl.arange(0, BLOCK_H)
    in_c, in_h = c < C, h < H
    hiddens, h_step = state + C, width
    channels, c_step = grad_logits + m * C, M * C
    if m == M:
        hiddens, h_step = grad_hidden, H
        channels, c_step = state, width
    total = tl.zeros((BLOCK_H, BLOCK_C), ACC)
    for b0 in range(0, B, BLOCK_B):
        b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
        hidden_mask = (b < B)[:, None] & in_h[None, :]
        channel_mask = (b < B)[:, None] & in_c[None, :]
        by_hidden = tl.load(hiddens + b[:, None] * h_step + h[None, :], mask=hidden_mask, other=0.0)
        by_channel = tl.load(channels + b[:, None] * c_step + c[None, :], mask=channel_mask, other=0.0)
        by_hidden = tl.where(hidden_mask & (m != M), activate(by_hidden, ACTIVATION), by_hidden)
        total = add_product(total, tl.trans(by_hidden), by_channel, HALF, ACC)
    group, place = _part_of(c, CG, GROUPED)
    group_h, place_h = _part_of(h, HG, GROUPED)
    mask = in_h[:, None] & in_c[None, :]
    if GROUPED:
        mask &= group_h[:, None] == group[None, :]
    place2 = (group * M + m) * CG + place if GROUPED else m * C + c
    if m == M:
        tl.store(grad_weight1 + h[:, None] * CG + place[None, :], total, mask=mask)
        if grad_bias1 is not None and cblk == 0:
            tl.store(grad_bias1 + h, sum_rows(grad_hidden, B, H, h, in_h, BLOCK_B, ACC), mask=in_h)
    else:
        tl.store(grad_weight2 + place2[None, :] * HG + place_h[:, None], total, mask=mask)
        if hblk == 0:
            at = m * C + c
            if grad_bias2 is not None:
                tl.store(grad_bias2 + place2, sum_rows(grad_logits, B, M * C, at, in_c, BLOCK_B, ACC), mask=in_c)
            if grad_affine_weight is not None:
                found = sum_rows(weight_sums, B * n_split, M * C, at, in_c, BLOCK_B, ACC)
                tl.store(grad_affine_weight + at, found, mask=in_c)
                found = sum_rows(bias_sums, B * n_split, M * C, at, in_c, BLOCK_B, ACC)
                tl.store(grad_affine_bias + at, found, mask=in_c)


# ---- the excitation of small maps, in launches of its own: see layers.py ----


@triton.jit(do_not_specialize=NO_VARIANTS)
def _branch_weights(
    weight2, bias1, bias2, sums, products, state, B, c_q, s_q, h_q, n_split, n_part, width,
    M: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores descriptors, hidden logits and the branches' weights, from weight1's products."""
    C, S, H = c_q * CV, s_q * SV, h_q * HV
    b, _, c = block_of(1, C, BLOCK_B, BLOCK_C)
    in_b, in_c = b < B, c < C
    mask = in_b[:, None] & in_c[None, :]
    row = state + b[:, None] * width
    mean, _, _ = descriptors(sums, None, None, b, c, mask, C, S, n_split, AVG, FIRST, ACC)
    tl.store(row + c[None, :], mean, mask=mask)
    logits = _zeros(M, BLOCK_B, BLOCK_C, 1, ACC)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        hidden, hidden_mask = store_hidden_logits(
            products, bias1, row + C, b, h, in_b, is_first(C, BLOCK_C), H, n_part, 0, 1, ACTIVATION, ACC
        )
        found = ()
        for m in tl.static_range(M):
            at = (m * C + c)[None, :] * H + h[:, None]
            w = tl.load(weight2 + at, mask=(h < H)[:, None] & in_c[None, :], other=0.0).to(ACC)
            found = found + (logits[m] + product(tl.where(hidden_mask, hidden, 0.0), w, TF32, ACC),)
        logits = found
    exponentials = ()
    highest = tl.full((BLOCK_B, BLOCK_C), float("-inf"), ACC)
    total = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    if bias2 is not None:
        found = ()
        for m in tl.static_range(M):
            found = found + (logits[m] + tl.load(bias2 + m * C + c, mask=in_c, other=0.0).to(ACC)[None, :],)
        logits = found
    if GATE == SOFTMAX:
        for m in tl.static_range(M):
            highest = tl.maximum(highest, logits[m])
        for m in tl.static_range(M):
            e = tl.exp(logits[m] - highest)
            total += e
            exponentials = exponentials + (e,)
    for m in tl.static_range(M):
        a = exponentials[m] / total if GATE == SOFTMAX else sigmoid(logits[m])
        tl.store(row + (C + H + m * C) + c[None, :], a, mask=mask)


@triton.jit
def _part_of_logits(dots, state, b, c, mask, C, H, n_split, width, m: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):
    """(the dots of branch m summed over the splits, its weights) of channels c of each sample b."""
    dot = sum_parts(dots, b, n_split, M * C, m * C + c, mask, ACC)
    return dot, tl.load(state + b[:, None] * width + (C + H + m * C) + c[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=NO_VARIANTS)
def _branch_weights_backward(
    weight2, state, dots, products, grad_logits, B, c_q, h_q, n_split, n_part, width,
    M: tl.constexpr, GATE: tl.constexpr, CV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_PART: tl.constexpr,
    TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the logits' gradients of a part of the channels and weight2's transposed products with them."""
    C, H = c_q * CV, h_q * HV
    b, part, h = block_of(n_part, H, BLOCK_B, BLOCK_H)
    in_b = b < B
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for c0 in range(0, BLOCK_PART, BLOCK_C):
        c = part * BLOCK_PART + c0 + tl.arange(0, BLOCK_C)
        mask = in_b[:, None] & (c < C)[None, :]
        # As seen from the first branch's: what they have in common costs no digits.
        first, _ = _part_of_logits(dots, state, b, c, mask, C, H, n_split, width, 0, M, ACC)
        common = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        if GATE == SOFTMAX:
            for m in tl.static_range(M):
                dot, a = _part_of_logits(dots, state, b, c, mask, C, H, n_split, width, m, M, ACC)
                common += a * (dot - first)
        for m in tl.static_range(M):
            dot, a = _part_of_logits(dots, state, b, c, mask, C, H, n_split, width, m, M, ACC)
            dz = a * (dot - first - common) if GATE == SOFTMAX else dot * a * (1.0 - a)
            dz = tl.where(mask, dz, 0.0)
            if is_first(H, BLOCK_H):
                tl.store(grad_logits + (b[:, None] * M + m) * C + c[None, :], dz, mask=mask)
            at = (m * C + c)[:, None] * H + h[None, :]
            w = tl.load(weight2 + at, mask=(c < C)[:, None] & (h < H)[None, :], other=0.0).to(ACC)
            total += product(dz, w, TF32, ACC)
    out = products + (b * n_part + part)[:, None] * H + h[None, :]
    tl.store(out, total, mask=in_b[:, None] & (h < H)[None, :])


@triton.jit(do_not_specialize=NO_VARIANTS)
def _mean_backward(
    weight1, state, products, grad_descriptor, grad_hidden, B, c_q, h_q, n_part, width,
    ACTIVATION: tl.constexpr, CV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of the descriptors and of the hidden logits."""
    C, H = c_q * CV, h_q * HV
    b, _, c = block_of(1, C, BLOCK_B, BLOCK_C)
    in_b, in_c = b < B, c < C
    ds, _ = through_hidden(
        weight1, products, state + b[:, None] * width + C, grad_hidden, b, c, in_b, in_c, is_first(C, BLOCK_C),
        C, H, n_part, 0, 1, ACTIVATION, BLOCK_H, TF32, ACC,
    )  # fmt: skip
    tl.store(grad_descriptor + b[:, None] * C + c[None, :], ds, mask=in_b[:, None] & in_c[None, :])


# ---- branches as the kernels take them ----


def _pixels(u: Tensor) -> int:
    """Elements from a pixel of a channels_last branch to the next."""
    return next((u.stride(i) for i in range(u.dim() - 1, 1, -1) if u.shape[i] != 1), u.shape[1])


def _distances(views: Sequence[Tensor]) -> tuple[int, ...]:
    """Elements between samples, and of one sample what it says: it needs no kernel of its own."""
    return tuple(u.stride(0) for u in views)


class Branches(NamedTuple):
    """M maps that lie alike, so that one plan and one set of offsets serves them, y and the gradient."""

    views: tuple[Tensor, ...]
    plan: maps.Plan
    channels_last: bool
    pixels: int
    affine: dict[str, Tensor | None]

    def fold(self) -> dict[str, int]:
        """How many neighbours along space a thread loads together, and may add before it keeps sums of them."""
        if self.plan.layout != maps.NCHW.value:
            return {"FOLD": 1}
        return {
            "FOLD": min(math.gcd(max(self.plan.space, 1), 16 // self.views[0].element_size(), 4), self.plan.block_s)
        }

    def arguments(self, grads: Sequence[Tensor] = ()) -> dict[str, Any]:
        """What every kernel with passes over the branches takes, and where the branches' gradients lie."""
        plan, u = self.plan, self.views[0]
        vector = 16 // u.element_size()
        step = _pixels(grads[0]) if grads and self.channels_last else plan.channels
        rows = math.gcd(self.pixels, step) if plan.layout == CHANNELS_LAST.value else max(plan.space, 1)
        pv = math.gcd(rows, vector)
        distances, grad_distances = _distances(self.views), _distances(grads)
        bv = math.gcd(*distances, *grad_distances, pv)
        given = {
            "branches": self.views,
            "distances": tuple(n // bv for n in distances),
            "x_pixels": None if self.pixels == plan.channels else self.pixels // pv,
            "BV": bv,
            "PV": pv,
            **self.affine,
            **plan.arguments(u.dtype),
        }
        if len(self.views) > FEW_ENOUGH:
            given["tiles"] = None
        if grads:
            given["grads"], given["grad_distances"] = tuple(grads), tuple(n // bv for n in grad_distances)
            given["grad_pixels"] = None if step == plan.channels else step // pv
        return given

    def table(self, *shape: int) -> Tensor:
        """Room for a row of partial results a program and sample."""
        u = self.views[0]
        return u.new_empty((self.plan.batch, *shape), dtype=maps.accumulator(u.dtype))

    def dots(self) -> Tensor:
        return self.table(self.plan.n_split, len(self.views), self.plan.channels)

    def affine_tables(self) -> dict[str, Tensor | None]:
        absent = self.affine["affine_weight"] is None
        return {name: None if absent else self.dots() for name in ("weight_sums", "bias_sums")}

    def gradient(self, grad: Tensor) -> tuple[Tensor, dict[str, int | None]]:
        """(y's gradient, its strides as kernel arguments, None: dense as y); copied where space does not collapse."""
        found: tuple[int | None, ...] = (None, None, None)
        if not (grad.movedim(1, -1) if self.channels_last else grad).is_contiguous():
            strides = maps._collapsed(grad)
            if strides is None:
                grad = empty_sum(self.views, len(self.views)).copy_(grad)
            else:
                found = strides
        return grad, dict(zip(("stride_b", "stride_c", "stride_s"), found, strict=True))


def _lane_bytes(paths: int, sums: int, itemsize: int) -> int:
    """Of each branch's tile, for each thread: all branches and what is summed of each must fit its registers."""
    lane = maps.LANE_BYTES
    while lane > 4 and lane // min(itemsize, 4) * paths * (1 + sums) > 64:
        lane //= 2
    return lane


def _branches(
    branches: Sequence[Tensor], paths: int, affine_weight: Tensor | None, affine_bias: Tensor | None, sums: int = 0
) -> Branches:
    """The branches as the kernels read them; `sums`: sums a branch that a thread keeps."""
    views, channels_last = readable(branches, paths)
    if len({_pixels(u) for u in views}) > 1 and channels_last:
        views = [u.movedim(1, -1).contiguous().movedim(-1, 1) for u in views]
    u = views[0]
    space = u.shape[2:].numel()
    layout = CHANNELS_LAST if channels_last or space == 1 else maps.NCHW  # of 1 x 1 maps the channels are contiguous
    sms = maps.multiprocessors(u.device)
    lane = _lane_bytes(paths, sums, u.element_size())
    plan = None
    if layout is maps.NCHW and all(n * u.element_size() % 16 == 0 for n in _distances(views)):
        plan = maps.flat_plan(*u.shape[:2], space, u.element_size(), FLAT_LANES * lane)
    plan = plan or maps.plan(
        u.shape[0],
        u.shape[1],
        space,
        layout.value,
        u.element_size(),
        sms,
        lane_bytes=lane,
        most_channels=maps.CHANNELS_A_PROGRAM if paths <= FEW_ENOUGH else 1,
    )
    affine = {"affine_weight": maps.row(affine_weight), "affine_bias": maps.row(affine_bias)}
    return Branches(tuple(views), plan, channels_last, _pixels(u) if channels_last else u.shape[1], affine)


def select_squeeze(
    branches: Sequence[Tensor],
    paths: int,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
) -> Tensor:
    x = _branches(branches, paths, affine_weight, affine_bias)
    plan, u = x.plan, x.views[0]
    mean = u.new_empty(u.shape[:2])
    sums = x.table(plan.n_split, plan.channels)
    given = x.arguments()
    maps.launch(
        _pool_branches,
        u,
        plan.programs,
        weight1=None,
        sums=sums,
        products=None,
        mean=mean,
        H=0,
        CG=0,
        HG=0,
        PRE=pre_activation,
        GROUPED=False,
        BLOCK_K=plan.block_k,
        BLOCK_H=16,
        **given,
    )
    tables = {"sums": sums, "best": None, "place": None, "avg": mean, "max": None, "index": None}
    finish(u, plan, POOLS["avg"], TIES["first"], tables)
    return mean


def select_sum(
    branches: Sequence[Tensor],
    weights: Tensor,
    paths: int,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
) -> Tensor:
    x = _branches(branches, paths, affine_weight, affine_bias)
    y = empty_sum(branches, paths)
    given = {"weights": maps.row(weights), "width": weights.shape[1] * weights.shape[2], "PRE": pre_activation}
    maps.launch(_sum_branches, y, x.plan.programs, y=y, **given, **x.arguments())
    return y


def select_dots(
    grad: Tensor,
    branches: Sequence[Tensor],
    paths: int,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
) -> Tensor:
    x = _branches(branches, paths, affine_weight, affine_bias, sums=1)
    grad, strides = x.gradient(grad)
    dots = x.dots()
    maps.launch(
        _dot_branches,
        grad,
        x.plan.programs,
        grad=grad,
        weight2=None,
        state=None,
        dots=dots,
        products=None,
        H=0,
        CG=0,
        HG=0,
        width=0,
        GATE=SELECTIONS["softmax"],
        PRE=pre_activation,
        GROUPED=False,
        BLOCK_M=1,
        BLOCK_H=16,
        BLOCK_K=x.plan.block_k,
        **strides,
        **x.fold(),
        **x.arguments(),
    )
    return dots[:, 0] if x.plan.n_split == 1 else dots.sum(1)


def select_gradients(
    grad: Tensor,
    branches: Sequence[Tensor],
    weights: Tensor,
    grad_descriptor: Tensor,
    paths: int,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    x = _branches(branches, paths, affine_weight, affine_bias, sums=0 if affine_weight is None else 2)
    grads = empty_gradients(branches, paths)
    grad, strides = x.gradient(grad)
    sums = x.affine_tables()
    maps.launch(
        _spread_branches,
        grad,
        x.plan.programs,
        grad=grad,
        weights=maps.row(weights),
        grad_descriptor=maps.row(grad_descriptor),
        width=weights.shape[1] * weights.shape[2],
        PRE=pre_activation,
        **sums,
        **strides,
        **x.fold(),
        **x.arguments(branch_views(grads, paths)),
    )
    return grads, *maps.affine_gradients(sums, affine_weight, affine_bias, grad)


def _excitation(x: Branches, weight1: Tensor, groups: int) -> dict[str, Any]:
    """Sizes and blocks of the excitation."""
    plan, hidden = x.plan, weight1.shape[0]
    elements = 512 * plan.arguments(x.views[0].dtype)["num_warps"]  # of weight2 at a time
    block_m = maps.next_power_of_2(len(x.views))
    return {
        "H": hidden,
        "CG": plan.channels // groups,
        "HG": hidden // groups,
        "GROUPED": groups > 1,
        "BLOCK_K": plan.block_k,
        "BLOCK_M": block_m,
        "BLOCK_H": min(max(elements // (block_m * plan.block_k), 4), 32),
    }


def _is_apart(x: Branches, weight1: Tensor, groups: int) -> bool:
    """Whether the layers have launches of their own: where they outweigh the programs' share of small maps."""
    if groups > 1 or len(x.views) > FEW_ENOUGH:
        return False
    return layers.is_apart(x.plan, weight1, LAYERS["dense"], POOLS["avg"])


def select(
    branches: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    paths: int,
    groups: int,
    activation: int,
    gate: int,
    pre_activation: int,
) -> tuple[Tensor, Tensor]:
    x = _branches(branches, paths, affine_weight, affine_bias)
    plan = x.plan
    weight1, bias1, weight2, bias2 = map(maps.row, (weight1, bias1, weight2, bias2))
    sizes = _excitation(x, weight1, groups)
    y = empty_sum(branches, paths)
    state = x.table((paths + 1) * plan.channels + sizes["H"])
    is_apart, u = _is_apart(x, weight1, groups), x.views[0]
    shared = {
        "sums": x.table(plan.n_split, plan.channels),
        "products": None if is_apart else x.table(plan.parts, sizes["H"]),
        "PRE": pre_activation,
        **sizes,
        **x.arguments(),
    }
    pooling = {k: v for k, v in shared.items() if k != "BLOCK_M"}
    maps.launch(_pool_branches, y, plan.programs, weight1=None if is_apart else weight1, mean=None, **pooling)
    if is_apart:
        given = layers.arguments_of(u, plan, weight1, weight2, state.shape[1])
        given |= {
            "weight1": weight1,
            "bias1": bias1,
            "weight2": weight2,
            "bias2": bias2,
            "sums": shared["sums"],
            "best": None,
            "place": None,
            "products": x.table(given["n_part"], sizes["H"]),
            "state": state,
            "POOL": POOLS["avg"],
            "TIES": TIES["first"],
            "M": paths,
            "ACTIVATION": activation,
            "GATE": gate,
        }
        columns = triton.cdiv(sizes["H"], given["BLOCK_H"])
        layers.launch(layers._first_layer, u, plan, given["n_part"], columns, given)
        if u.element_size() > 2:  # a program holds the logits of all branches: registers
            given["BLOCK_C"] //= 2
        layers.launch(_branch_weights, u, plan, 1, triton.cdiv(plan.channels, given["BLOCK_C"]), given)
        maps.launch(
            _sum_branches,
            y,
            plan.programs,
            weights=state[:, plan.channels + sizes["H"] :],
            y=y,
            PRE=pre_activation,
            width=state.shape[1],
            **x.arguments(),
        )
        return y, state
    maps.launch(
        _select,
        y,
        plan.programs,
        bias1=bias1,
        weight2=weight2,
        bias2=bias2,
        y=y,
        state=state,
        n_part=plan.parts,
        width=state.shape[1],
        ACTIVATION=activation,
        GATE=gate,
        BLOCK_ROWS=maps.ROWS_AT_ONCE,
        **shared,
    )
    return y, state


def select_backward(
    grad: Tensor,
    branches: Sequence[Tensor],
    state: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    paths: int,
    groups: int,
    activation: int,
    gate: int,
    pre_activation: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _branches(branches, paths, affine_weight, affine_bias, sums=1 if affine_weight is None else 2)
    plan = x.plan
    grads = empty_gradients(branches, paths)
    grad, strides = x.gradient(grad)
    parameters = tuple(map(maps.row, (weight1, bias1, weight2, bias2, affine_weight, affine_bias)))
    weight1, weight2 = parameters[0], parameters[2]
    sizes = _excitation(x, weight1, groups)
    tables = {
        "grad_logits": x.table(paths, plan.channels),
        "grad_hidden": x.table(sizes["H"]),
        **x.affine_tables(),
    }
    state, is_apart, u = state.contiguous(), _is_apart(x, weight1, groups), x.views[0]
    shared = {
        "grad": grad,
        "state": state,
        "dots": x.dots(),
        "products": None if is_apart else x.table(plan.parts, sizes["H"]),
        "width": state.shape[1],
        "GATE": gate,
        "PRE": pre_activation,
        **sizes,
        **strides,
        **x.fold(),
    }
    maps.launch(_dot_branches, grad, plan.programs, weight2=None if is_apart else weight2, **shared, **x.arguments())
    grad_descriptor = x.table(plan.channels)
    if is_apart:
        given = layers.arguments_of(u, plan, weight1, weight2, state.shape[1])
        given |= {
            "weight1": weight1,
            "weight2": weight2,
            "state": state,
            "dots": shared["dots"],
            "products": x.table(given["n_part"], sizes["H"]),
            "grad_descriptor": grad_descriptor,
            "M": paths,
            "ACTIVATION": activation,
            "GATE": gate,
            **tables,
        }
        columns = triton.cdiv(sizes["H"], given["BLOCK_H"])
        layers.launch(_branch_weights_backward, u, plan, given["n_part"], columns, given)
        layers.launch(_mean_backward, u, plan, 1, triton.cdiv(plan.channels, given["BLOCK_C"]), given)
        maps.launch(
            _spread_branches,
            grad,
            plan.programs,
            weights=state[:, plan.channels + sizes["H"] :],
            grad_descriptor=grad_descriptor,
            **{k: tables[k] for k in ("weight_sums", "bias_sums")},
            **{k: shared[k] for k in ("grad", "width", "PRE", "FOLD", *strides)},
            **x.arguments(branch_views(grads, paths)),
        )
    else:
        rows = sizes["BLOCK_M"] * plan.block_k
        maps.launch(
            _select_spread,
            grad,
            plan.programs,
            weight1=weight1,
            grad_descriptor=grad_descriptor,
            n_part=plan.parts,
            ACTIVATION=activation,
            BLOCK_ROWS=maps.ROWS_AT_ONCE,
            DOT_ROWS=min(maps.ROWS_AT_ONCE, max(4096 // rows, 1)),
            **tables,
            **shared,
            **x.arguments(branch_views(grads, paths)),
        )
    names = ("weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias")
    found = [None if p is None else torch.empty_like(p) for p in parameters]
    block_h, block_c = min(max(maps.next_power_of_2(sizes["H"]), 16), 32), 32
    maps.launch(
        _select_parameters,
        grad,
        triton.cdiv(sizes["H"], block_h) * triton.cdiv(plan.channels, block_c) * (paths + 1),
        B=plan.batch,
        C=plan.channels,
        n_split=plan.n_split,
        M=paths,
        ACTIVATION=activation,
        BLOCK_B=32,
        BLOCK_H=block_h,
        BLOCK_C=block_c,
        HALF=grad.dtype.itemsize == 2,
        num_stages=1,
        ACC=maps.triton_accumulator(grad.dtype),
        num_warps=4,
        **{f"grad_{name}": g for name, g in zip(names, found, strict=True)},
        **{k: shared[k] for k in ("state", "H", "CG", "HG", "width", "GROUPED")},
        **tables,
    )
    return grads, *(grad.new_empty(0) if g is None else g for g in found)
