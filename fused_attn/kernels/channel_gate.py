"""Op `channel_gate`: forward 2 launches (read x; read x, write y), backward 3 (read grad and x; read grad, write
grad_x; gradients of the parameters). There are no atomics: a launch leaves partial results, one row a program, and
every program of the next sums those of its sample in the same order.

SE's first layer is linear in the descriptor, so its partial products are formed by the programs that pool; what the
second launch has left to do is O(channels of the program x hidden). Where a maximum is split among programs that does
not hold, and a launch of its own forms the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS, LAYERS, POOLS, TIES
from . import maps
from .language import AVG, AVGMAX, CIRCULAR, DENSE, EVEN, IDENTITY, MAX, activate, activate_grad, sum_rows
from .maps import SIZES, locate
from .passes import backward_pass, descriptor, pool_pass, scale_pass, store_pool_gradients


@triton.jit
def _pooled(
    sums, best, place, b, c, mask, C, S, n_split,
    POOL: tl.constexpr, TIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The descriptor s of channels c."""
    mean, peak, _ = descriptor(sums, best, place, b, c, mask, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    if POOL == AVGMAX:
        return 0.5 * mean + 0.5 * peak
    else:
        return mean


@triton.jit
def _neighbour(c, t, taps, C, LAYER: tl.constexpr):
    """(the channel t - taps // 2 after c, whether there is one)."""
    c = c + t - taps // 2
    if LAYER == CIRCULAR:
        return (c % C + C) % C, c == c
    else:
        return c, (c >= 0) & (c < C)


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
    c_q, s_q, n_cblk, n_split, blocks, H,
    PRE: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x; leaves partial descriptors and, where `products` is given, weight1's products with them."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    pool_pass(
        x, affine_weight, affine_bias, sums, best, place, b, cblk, split, C, S, n_split, blocks,
        PRE, POOL, TIES, LAYOUT, BLOCK_K, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if products is not None:
        tl.debug_barrier()
        c = cblk * BLOCK_K + tl.arange(0, BLOCK_K)
        if POOL == AVG:
            s = tl.load(sums + (b * n_split + split) * C + c, mask=c < C, other=0.0) / S
        else:  # not split
            s = _pooled(sums, best, place, b, c, c < C, C, S, 1, POOL, TIES, 1, ACC)
        out = products + (b * n_cblk * n_split + cblk * n_split + split) * H
        _store_products(weight1, s, out, c, c < C, H, C, 1, BLOCK_H, ACC)


@triton.jit(do_not_specialize=SIZES)
def _first_layer(
    weight1, sums, best, place, products, c_q, s_q, n_cblk, n_split, H,
    POOL: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weight1's products with the descriptors of a block of channels, after a maximum that was split."""
    C, S = c_q * CV, s_q * SV
    b = (tl.program_id(0) // n_cblk).to(tl.int64)
    cblk = tl.program_id(0) % n_cblk
    c = cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    s = _pooled(sums, best, place, b, c, c < C, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    _store_products(weight1, s, products + (b * n_cblk + cblk) * H, c, c < C, H, C, 1, BLOCK_H, ACC)


@triton.jit(do_not_specialize=SIZES)
def _gate(
    x, weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual,
    sums, best, place, products, y, state, index,
    c_q, s_q, n_cblk, n_split, blocks, H, n_part, taps, width,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logits of the program's channels from the partial results; then reads x and the residual, writes y.

    Programs that share channels store the same numbers to `state`; each reads only what it has stored.
    """
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    row = state + b * width
    c = cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    mean, peak, found = descriptor(sums, best, place, b, c, in_c, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    s = mean
    if POOL != AVG:
        tl.store(index + b * C + c, found, mask=in_c)
        if POOL == AVGMAX:
            s = 0.5 * mean + 0.5 * peak
        if TIES == EVEN:
            tl.store(row + width - C + c, peak, mask=in_c)
    tl.store(row + c, s, mask=in_c)
    if weight1 is None:
        z = s
    elif LAYER != DENSE:
        z = tl.zeros((BLOCK_K,), ACC)
        for t in range(taps):
            near, exists = _neighbour(c, t, taps, C, LAYER)
            exists &= in_c
            at_near = _pooled(sums, best, place, b, near, exists, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
            z += tl.load(weight1 + t).to(ACC) * tl.where(exists, at_near, 0.0)
        if bias1 is not None:
            z += tl.load(bias1).to(ACC)
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
            z1 = sum_rows(products + b * n_part * H, n_part, H, h, h < H, BLOCK_ROWS, ACC)
            if bias1 is not None:
                z1 += tl.load(bias1 + h, mask=h < H, other=0.0).to(ACC)
            if cblk == 0:
                tl.store(row + 2 * C + h, z1, mask=h < H)
            at = c[:, None] * H + h[None, :]
            w = tl.load(weight2 + at, mask=in_c[:, None] & (h < H)[None, :], other=0.0).to(ACC)
            z += tl.sum(w * tl.where(h < H, activate(z1, ACTIVATION), 0.0)[None, :], axis=1)
        if bias2 is not None:
            z += tl.load(bias2 + c, mask=in_c, other=0.0).to(ACC)
    tl.store(row + C + c, z, mask=in_c)
    tl.debug_barrier()
    scale_pass(
        x, residual, y, row + C, affine_weight, affine_bias, b, cblk, split, C, S, blocks,
        GATE, PRE, POST, LAYOUT, BLOCK_K, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _grad_logits(
    dots, state, b, c, mask, C, n_split, width, GATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr
):
    """Gradients of the logits of channels c: the dots of all splits times the gate's derivative."""
    z = tl.load(state + b * width + C + c, mask=mask, other=0.0)
    dot = sum_rows(dots + b * n_split * C, n_split, C, c, mask, BLOCK_ROWS, ACC)
    return tl.where(mask, dot * activate_grad(z, GATE), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _dot(
    grad, x, y, weight2, affine_weight, affine_bias, residual, state, grad_residual, dots, products,
    c_q, s_q, n_cblk, n_split, blocks, H, width, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x (after an epilogue y or the residual too, and writes grad_residual); leaves partial dots.

    The gate's derivative does not depend on them, so the second layer's transposed products are formed here.
    """
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    logits = state + b * width + C
    backward_pass(
        grad, x, y, residual, None, grad_residual, affine_weight, affine_bias,
        logits, None, None, None, None, dots, None, None,
        b, cblk, split, C, S, n_split, blocks, stride_b, stride_c, stride_s,
        GATE, PRE, POST, LAYOUT, BLOCK_K, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if weight2 is not None:
        tl.debug_barrier()
        c = cblk * BLOCK_K + tl.arange(0, BLOCK_K)
        dot = tl.load(dots + (b * n_split + split) * C + c, mask=c < C, other=0.0)
        dot *= activate_grad(tl.load(logits + c, mask=c < C, other=0.0), GATE)
        out = products + (b * n_cblk * n_split + cblk * n_split + split) * H
        _store_products(weight2, dot, out, c, c < C, H, 1, H, BLOCK_H, ACC)


@triton.jit(do_not_specialize=SIZES)
def _spread(
    grad, x, weight1, bias1, weight2, affine_weight, affine_bias, state, index,
    dots, products, mean, value, grad_logits, grad_hidden, tap_sums, grad_x, weight_sums, bias_sums,
    c_q, s_q, n_cblk, n_split, blocks, H, n_part, taps, width, stride_b, stride_c, stride_s,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of its descriptors; then reads grad (x too after a prologue or for shared ties), writes grad_x.

    Leaves what the parameters' gradients are summed from: gradients of the logits and hidden logits, a program's sums
    for each tap, and for the prologue.
    """
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    row = state + b * width
    c = cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    in_c = c < C
    dz = _grad_logits(dots, state, b, c, in_c, C, n_split, width, GATE, BLOCK_ROWS, ACC)
    if grad_logits is not None:
        tl.store(grad_logits + b * C + c, dz, mask=in_c)
    if weight1 is None:
        ds = dz
    elif LAYER != DENSE:
        ds = tl.zeros((BLOCK_K,), ACC)
        sums = tap_sums + (b * n_cblk + cblk) * (taps + 1)
        for t in range(taps):
            near, exists = _neighbour(c, taps - 1 - t, taps, C, LAYER)  # of those whose tap t reads c
            dz_near = _grad_logits(dots, state, b, near, exists & in_c, C, n_split, width, GATE, BLOCK_ROWS, ACC)
            ds += tl.load(weight1 + t).to(ACC) * dz_near
            near, exists = _neighbour(c, t, taps, C, LAYER)
            s = tl.load(row + near, mask=exists & in_c, other=0.0)
            tl.store(sums + t, tl.sum(dz * s, axis=0))
        tl.store(sums + taps, tl.sum(dz, axis=0))
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
            dz1 = sum_rows(products + b * n_part * H, n_part, H, h, in_h, BLOCK_ROWS, ACC)
            dz1 *= activate_grad(tl.load(row + 2 * C + h, mask=in_h, other=0.0), ACTIVATION)
            if cblk == 0:
                tl.store(grad_hidden + b * H + h, dz1, mask=in_h)
            w = tl.load(weight1 + h[:, None] * C + c[None, :], mask=in_h[:, None] & in_c[None, :], other=0.0).to(ACC)
            ds += tl.sum(w * tl.where(in_h, dz1, 0.0)[:, None], axis=0)
    if POOL == AVGMAX:
        ds *= 0.5
    peak = row + width - C
    store_pool_gradients(
        mean + b * C, value + b * C, tl.zeros((BLOCK_K,), ACC) if POOL == MAX else ds, ds, peak, index + b * C,
        c, in_c, S, POOL, TIES,
    )  # fmt: skip
    tl.debug_barrier()
    backward_pass(
        grad, x, None, None, grad_x, None, affine_weight, affine_bias,
        row + C, mean + b * C, None if POOL == AVG else value + b * C, index + b * C,
        peak if POOL != AVG and TIES == EVEN else None, None, weight_sums, bias_sums,
        b, cblk, split, C, S, n_split, blocks, stride_b, stride_c, stride_s,
        GATE, PRE, IDENTITY, LAYOUT, BLOCK_K, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _store_sum(out, table, n_rows, width, columns, mask, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr):
    if out is not None:
        tl.store(out + columns, sum_rows(table, n_rows, width, columns, mask, BLOCK_ROWS, ACC), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _parameters(
    state, grad_logits, grad_hidden, tap_sums, weight_sums, bias_sums,
    grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_affine_weight, grad_affine_bias,
    B, c_q, n_cblk, n_split, H, taps, width,
    LAYER: tl.constexpr, ACTIVATION: tl.constexpr, CV: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of all parameters: programs over tiles of the (H or C, C) weights, each sums over the batch in order.

    One layer counts as hidden logits that are the logits.
    """
    C = c_q * CV
    c_blocks = tl.cdiv(C, BLOCK_C)
    hblk, cblk = tl.program_id(0) // c_blocks, tl.program_id(0) % c_blocks
    c = cblk * BLOCK_C + tl.arange(0, BLOCK_C)
    h = hblk * BLOCK_H + tl.arange(0, BLOCK_H)
    in_c, in_h = c < C, h < H
    if LAYER == DENSE and grad_weight1 is not None:
        first = tl.zeros((BLOCK_H, BLOCK_C), ACC)
        second = tl.zeros((BLOCK_H, BLOCK_C), ACC)
        for b0 in range(0, B, BLOCK_B):
            b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
            hidden_at = b[None, :] * H + h[:, None]
            hidden_mask = in_h[:, None] & (b < B)[None, :]
            channel_mask = (b < B)[:, None] & in_c[None, :]
            dz1 = tl.load(grad_hidden + hidden_at, mask=hidden_mask, other=0.0)
            s = tl.load(state + b[:, None] * width + c[None, :], mask=channel_mask, other=0.0)
            first += tl.dot(dz1, s, input_precision="ieee", out_dtype=ACC)
            if grad_weight2 is not None:
                z1 = tl.load(state + b[None, :] * width + 2 * C + h[:, None], mask=hidden_mask, other=0.0)
                hidden = tl.where(hidden_mask, activate(z1, ACTIVATION), 0.0)
                dz = tl.load(grad_logits + b[:, None] * C + c[None, :], mask=channel_mask, other=0.0)
                second += tl.dot(hidden, dz, input_precision="ieee", out_dtype=ACC)
        mask = in_h[:, None] & in_c[None, :]
        tl.store(grad_weight1 + h[:, None] * C + c[None, :], first, mask=mask)
        if grad_weight2 is not None:
            tl.store(grad_weight2 + c[None, :] * H + h[:, None], second, mask=mask)
    if cblk == 0:
        if LAYER == DENSE:
            _store_sum(grad_bias1, grad_hidden, B, H, h, in_h, BLOCK_B, ACC)
        elif hblk == 0:
            t = tl.arange(0, BLOCK_TAPS)
            total = sum_rows(tap_sums, B * n_cblk, taps + 1, t, t < taps + 1, 2048 // BLOCK_TAPS, ACC)
            tl.store(grad_weight1 + t, total, mask=t < taps)
            if grad_bias1 is not None:
                tl.store(grad_bias1 + t - taps, total, mask=t == taps)
    if hblk == 0:
        _store_sum(grad_bias2, grad_logits, B, C, c, in_c, BLOCK_B, ACC)
        _store_sum(grad_affine_weight, weight_sums, B * n_split, C, c, in_c, BLOCK_B, ACC)
        _store_sum(grad_affine_bias, bias_sums, B * n_split, C, c, in_c, BLOCK_B, ACC)


def _sizes(plan: maps.Plan, weight1: Tensor | None, weight2: Tensor | None, layer: int) -> dict[str, int]:
    """Sizes and blocks of the excitation."""
    hidden = 0 if weight2 is None else weight1.shape[0]
    return {
        "H": hidden,
        "taps": 0 if weight1 is None or layer == LAYERS["dense"] else weight1.numel(),
        "BLOCK_H": min(max(maps.next_power_of_2(hidden), 16), 32),
        "BLOCK_ROWS": min(maps.next_power_of_2(max(plan.n_split, plan.parts if hidden else 1)), 32),
    }


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
    x, plan = maps.dense(x)
    weight1, bias1, weight2, bias2, affine_weight, affine_bias = map(
        maps.row, (weight1, bias1, weight2, bias2, affine_weight, affine_bias)
    )
    batch, channels = plan.batch, plan.channels
    sizes = _sizes(plan, weight1, weight2, layer)
    keeps_peak = pool != POOLS["avg"] and ties == TIES["even"]
    width = 2 * channels + sizes["H"] + (channels if keeps_peak else 0)
    acc = maps.accumulator(x.dtype)
    y = torch.empty_like(x)
    state = x.new_empty((batch, width), dtype=acc)
    index = x.new_empty((0,) if pool == POOLS["avg"] else (batch, channels), dtype=torch.int32)

    arguments = plan.arguments(x.dtype)
    tables = maps.pool_tables(x, plan, pool)
    two_layers = weight2 is not None
    split_maximum = pool != POOLS["avg"] and plan.n_split > 1
    n_part = plan.n_cblk if split_maximum else plan.parts
    products = x.new_empty((batch, n_part, sizes["H"]), dtype=acc) if two_layers else None
    maps.launch(
        _pool,
        x,
        plan.programs,
        x=x,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        weight1=weight1 if two_layers else None,
        products=None if split_maximum else products,
        PRE=pre_activation,
        POOL=pool,
        TIES=ties,
        H=sizes["H"],
        BLOCK_H=sizes["BLOCK_H"],
        **tables,
        **arguments,
        **maps.exact(pool, ties),
    )
    if split_maximum and two_layers:
        shared = {k: arguments[k] for k in ("c_q", "s_q", "n_cblk", "n_split", "CV", "SV", "BLOCK_K", "ACC")}
        maps.launch(
            _first_layer,
            x,
            batch * plan.n_cblk,
            weight1=weight1,
            products=products,
            POOL=pool,
            TIES=ties,
            H=sizes["H"],
            BLOCK_H=sizes["BLOCK_H"],
            BLOCK_ROWS=sizes["BLOCK_ROWS"],
            **tables,
            **shared,
        )
    maps.launch(
        _gate,
        x,
        plan.programs,
        x=x,
        weight1=weight1,
        bias1=bias1,
        weight2=weight2,
        bias2=bias2,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        residual=maps.as_map(residual, x),
        products=products,
        y=y,
        state=state,
        index=index,
        n_part=n_part,
        width=width,
        LAYER=layer,
        POOL=pool,
        TIES=ties,
        ACTIVATION=activation,
        GATE=gate,
        PRE=pre_activation,
        POST=post_activation,
        **sizes,
        **tables,
        **arguments,
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
    x, plan = maps.dense(x)
    grad, strides = maps.gradient(grad, x)
    weight1, bias1, weight2, bias2, affine_weight, affine_bias = parameters = tuple(
        map(maps.row, (weight1, bias1, weight2, bias2, affine_weight, affine_bias))
    )
    batch, channels = plan.batch, plan.channels
    sizes = _sizes(plan, weight1, weight2, layer)
    hidden, taps, width = sizes["H"], sizes["taps"], state.shape[1]
    arguments = plan.arguments(x.dtype)

    def descriptors(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=state.dtype)

    grad_x = torch.empty_like(x)
    has_epilogue = post_activation != ACTIVATIONS["identity"]
    grad_residual = torch.empty_like(x) if has_epilogue else None
    dots = maps.table(x, plan)
    products = descriptors(batch, plan.parts, hidden) if hidden else None
    maps.launch(
        _dot,
        x,
        plan.programs,
        grad=grad,
        x=x,
        y=maps.as_map(y, x),
        weight2=weight2,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        residual=maps.as_map(residual, x),
        state=state,
        grad_residual=grad_residual,
        dots=dots,
        products=products,
        H=hidden,
        width=width,
        GATE=gate,
        PRE=pre_activation,
        POST=post_activation,
        BLOCK_H=sizes["BLOCK_H"],
        **strides,
        **arguments,
    )
    if has_epilogue:
        grad, strides = grad_residual, dict.fromkeys(strides)
    dense_layer = weight1 is not None and not taps
    grad_logits = descriptors(batch, channels) if dense_layer else None
    grad_hidden = descriptors(batch, hidden) if hidden else grad_logits
    tap_sums = descriptors(batch, plan.n_cblk, taps + 1) if taps else None
    spread = descriptors(2, batch, channels)
    sums = maps.affine_tables(x, plan, affine_weight)
    maps.launch(
        _spread,
        x,
        plan.programs,
        grad=grad,
        x=x,
        weight1=weight1,
        bias1=bias1,
        weight2=weight2,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        state=state,
        index=index,
        dots=dots,
        products=products,
        mean=spread[0],
        value=spread[1],
        grad_logits=grad_logits,
        grad_hidden=grad_hidden,
        tap_sums=tap_sums,
        grad_x=grad_x,
        n_part=plan.parts,
        width=width,
        LAYER=layer,
        POOL=pool,
        TIES=ties,
        ACTIVATION=activation,
        GATE=gate,
        PRE=pre_activation,
        **sizes,
        **sums,
        **strides,
        **arguments,
        **maps.exact(pool, ties),
    )
    grads = [None if p is None else torch.empty_like(p) for p in parameters]
    if any(g is not None for g in grads):
        rows = (hidden or channels) if dense_layer else 1
        block_h, block_c = min(max(maps.next_power_of_2(rows), 16), 32), 32
        maps.launch(
            _parameters,
            x,
            triton.cdiv(rows, block_h) * triton.cdiv(channels, block_c),
            state=state,
            grad_logits=grad_logits,
            grad_hidden=grad_hidden,
            tap_sums=tap_sums,
            grad_weight1=grads[0],
            grad_bias1=grads[1],
            grad_weight2=grads[2],
            grad_bias2=grads[3],
            grad_affine_weight=grads[4],
            grad_affine_bias=grads[5],
            B=batch,
            c_q=arguments["c_q"],
            n_cblk=plan.n_cblk,
            n_split=plan.n_split,
            H=rows,
            taps=taps,
            width=width,
            LAYER=layer,
            ACTIVATION=activation,
            CV=arguments["CV"],
            BLOCK_TAPS=maps.next_power_of_2(taps + 1),
            BLOCK_B=32,
            BLOCK_H=block_h,
            BLOCK_C=block_c,
            ACC=arguments["ACC"],
            num_warps=4,
            **sums,
        )
    return grad_x, *(x.new_empty(0) if g is None else g for g in (grad_residual, *grads))
