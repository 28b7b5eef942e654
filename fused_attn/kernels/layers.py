"""The dense layers of an excitation in launches of their own: products for a block of samples at a time, so that the
weights are read once a block and not by every program of the map.

Each layer's sum goes over one axis that is long. The launch that forms it leaves partial sums over `PART` channels, so
that there are programs enough and each has few steps; the next launch adds them up, in order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..codes import LAYERS, POOLS
from . import maps
from .language import (
    AVG,
    AVGMAX,
    BOTH,
    EVEN,
    MAX,
    NOWHERE,
    activate,
    activate_grad,
    from_order_key,
    higher_of,
    linear_in,
    order_key,
    product,
)
from .maps import SIZES
from .passes import store_pool_gradients

SAMPLES, CHANNELS, HIDDEN = 16, 64, 64  # of a program's products, at most
PART = 256  # channels that a program sums over
#: Multiply-adds of a layer that cost a program of the map as much as an element of the map: with its weight converted,
#: and read from the L2 cache, one costs about a third; the layers are to be a small part of the whole.
ELEMENTS_A_PRODUCT = 8


@triton.jit
def block_of(n_part, n_columns, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr):
    """(samples, part, columns) of this program's products."""
    n_blocks = tl.cdiv(n_columns, BLOCK)
    pid = tl.program_id(0)
    b = pid // (n_blocks * n_part) * BLOCK_B + tl.arange(0, BLOCK_B)
    return b.to(tl.int64), pid // n_blocks % n_part, pid % n_blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def is_first(n_columns, BLOCK: tl.constexpr):
    """Whether this program's columns are the first ones."""
    return tl.program_id(0) % tl.cdiv(n_columns, BLOCK) == 0


@triton.jit
def descriptors(
    sums, best, place, b, c, mask, C, S, n_split, POOL: tl.constexpr, TIES: tl.constexpr, ACC: tl.constexpr
):
    """`descriptor` of channels c of each sample b."""
    at = b[:, None] * n_split * C + c[None, :]
    nowhere: tl.constexpr = 0 if TIES == EVEN else NOWHERE
    mean = tl.zeros(mask.shape, ACC)
    key = order_key(tl.full(mask.shape, float("-inf"), ACC))
    found = tl.full(mask.shape, nowhere, tl.int32)
    for _ in range(n_split):
        if POOL != MAX:
            mean += tl.load(sums + at, mask=mask, other=0.0)
        if POOL != AVG:
            key2 = order_key(tl.load(best + at, mask=mask, other=float("-inf")))
            key, found = higher_of(key, found, key2, tl.load(place + at, mask=mask, other=nowhere), TIES)
        at += C
    peak = from_order_key(key)
    found = tl.where(found == NOWHERE, 0, found)  # nothing but -inf: the first of them
    if POOL == MAX:
        return peak, peak, found
    else:
        return mean / S, peak, found


@triton.jit
def sum_parts(products, b, n_part, width, columns, mask, ACC: tl.constexpr):
    """Sums of what the programs of all parts left, (B, n_part, width), for each sample b at `columns`."""
    at = b[:, None] * n_part * width + columns[None, :]
    total = tl.zeros(mask.shape, ACC)
    for _ in range(n_part):
        total += tl.load(products + at, mask=mask, other=0.0)
        at += width
    return total


@triton.jit(do_not_specialize=SIZES)
def _first_layer(
    weight1, sums, best, place, products, B, c_q, s_q, h_q, n_split, n_part,
    TWO_LAYERS: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_PART: tl.constexpr,
    TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Weight1's products with a part of the descriptors; before a second layer, with both pools, those of each, side by
    side."""
    C, S, H = c_q * CV, s_q * SV, h_q * HV
    APART: tl.constexpr = TWO_LAYERS and POOL == BOTH
    b, part, h = block_of(n_part, H, BLOCK_B, BLOCK_H)
    in_h = h < H
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    of_peak = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for c0 in range(0, BLOCK_PART, BLOCK_C):
        c = part * BLOCK_PART + c0 + tl.arange(0, BLOCK_C)
        mask = (b < B)[:, None] & (c < C)[None, :]
        mean, peak, _ = descriptors(sums, best, place, b, c, mask, C, S, n_split, POOL, TIES, ACC)
        at = c[:, None] + h[None, :] * C
        w = tl.load(weight1 + at, mask=(c < C)[:, None] & in_h[None, :], other=0.0).to(ACC)
        if APART:
            of_peak += product(tl.where(mask, peak, 0.0), w, TF32, ACC)
            s = mean
        else:
            s = linear_in(mean, peak, POOL)
        total += product(tl.where(mask, s, 0.0), w, TF32, ACC)
    mask = (b < B)[:, None] & in_h[None, :]
    width = H * (2 if APART else 1)
    out = products + (b * n_part + part)[:, None] * width + h[None, :]
    tl.store(out, total, mask=mask)
    if APART:
        tl.store(out + H, of_peak, mask=mask)


@triton.jit
def store_hidden_logits(
    products, bias1, to, b, h, in_b, first, H, n_part, pool_step,
    PAIR: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(hidden numbers h of each sample b, of PAIR pools their sum, which of them exist) from what all parts left; the
    `first` columns' programs store their logits at `to`, the second pool's `pool_step` behind."""
    mask = in_b[:, None] & (h < H)[None, :]
    hidden = tl.zeros(mask.shape, ACC)
    for pool in tl.static_range(PAIR):
        z1 = sum_parts(products + pool * H, b, n_part, PAIR * H, h, mask, ACC)
        if bias1 is not None:
            z1 += tl.load(bias1 + h, mask=h < H, other=0.0).to(ACC)[None, :]
        if first:
            tl.store(to + pool * pool_step + h[None, :], z1, mask=mask)
        hidden += activate(z1, ACTIVATION)
    return hidden, mask


@triton.jit(do_not_specialize=SIZES)
def _second_layer(
    weight2, bias1, bias2, sums, best, place, products, state, index, B, c_q, s_q, h_q, n_split, n_part, width,
    TWO_LAYERS: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores descriptors and logits, of which one layer's are the sums of products themselves, and hidden logits."""
    C, S, H = c_q * CV, s_q * SV, h_q * HV
    PAIR: tl.constexpr = 2 if POOL == BOTH else 1  # an excitation of both pools has each bias twice
    b, _, c = block_of(1, C, BLOCK_B, BLOCK_C)
    in_b, in_c = b < B, c < C
    mask = in_b[:, None] & in_c[None, :]
    row = state + b[:, None] * width
    mean, peak, found = descriptors(sums, best, place, b, c, mask, C, S, n_split, POOL, TIES, ACC)
    at = tl.broadcast_to(c[None, :], mask.shape)
    if POOL != AVG:
        tl.store(index + b[:, None] * C + at, found, mask=mask)
        if POOL == BOTH:
            tl.store(row + (2 * C + (H if TWO_LAYERS else 0)) + at, peak, mask=mask)
        elif TIES == EVEN:
            tl.store(row + (width - C) + at, peak, mask=mask)
    tl.store(row + at, mean if POOL == BOTH else linear_in(mean, peak, POOL), mask=mask)
    if not TWO_LAYERS:
        z = sum_parts(products, b, n_part, C, c, mask, ACC)
        if bias1 is not None:
            z += PAIR * tl.load(bias1 + c, mask=in_c, other=0.0).to(ACC)[None, :]
    else:
        z = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        for h0 in range(0, H, BLOCK_H):
            h = h0 + tl.arange(0, BLOCK_H)
            in_h = h < H
            hidden, hidden_mask = store_hidden_logits(
                products, bias1, row + 2 * C, b, h, in_b, is_first(C, BLOCK_C), H, n_part, C + H, PAIR, ACTIVATION, ACC
            )  # fmt: skip
            w = tl.load(weight2 + c[None, :] * H + h[:, None], mask=in_h[:, None] & in_c[None, :], other=0.0).to(ACC)
            z += product(tl.where(hidden_mask, hidden, 0.0), w, TF32, ACC)
        if bias2 is not None:
            z += PAIR * tl.load(bias2 + c, mask=in_c, other=0.0).to(ACC)[None, :]
    tl.store(row + C + at, z, mask=mask)


@triton.jit
def _logit_grads(
    dots, state, b, c, mask, C, n_split, width, GATE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Gradients of the logits of channels c of each sample b: the dots of all splits times the gate's derivative."""
    z = tl.load(state + b[:, None] * width + C + c[None, :], mask=mask, other=0.0)
    return tl.where(mask, sum_parts(dots, b, n_split, C, c, mask, ACC) * activate_grad(z, GATE), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _second_layer_backward(
    weight, state, dots, products, B, c_q, h_q, n_split, n_part, width,
    GATE: tl.constexpr, CV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_PART: tl.constexpr,
    TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The last layer's transposed products, (C, H) weights, with a part of the logits' gradients."""
    C, H = c_q * CV, h_q * HV
    b, part, h = block_of(n_part, H, BLOCK_B, BLOCK_H)
    total = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    for c0 in range(0, BLOCK_PART, BLOCK_C):
        c = part * BLOCK_PART + c0 + tl.arange(0, BLOCK_C)
        mask = (b < B)[:, None] & (c < C)[None, :]
        dz = _logit_grads(dots, state, b, c, mask, C, n_split, width, GATE, ACC)
        at = c[:, None] * H + h[None, :]
        w = tl.load(weight + at, mask=(c < C)[:, None] & (h < H)[None, :], other=0.0).to(ACC)
        total += product(dz, w, TF32, ACC)
    out = products + (b * n_part + part)[:, None] * H + h[None, :]
    tl.store(out, total, mask=(b < B)[:, None] & (h < H)[None, :])


@triton.jit
def through_hidden(
    weight1, products, hidden, grad_hidden, b, c, in_b, in_c, first, C, H, n_part, pool_step,
    PAIR: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_H: tl.constexpr, TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the descriptors of channels c, of the second pool's too, from what all parts left; the `first`
    columns' programs store those of the hidden logits, which are at `hidden`, the second pool's `pool_step` behind."""
    ds = tl.zeros((b.shape[0], c.shape[0]), ACC)
    to_second = tl.zeros((b.shape[0], c.shape[0]), ACC)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        in_h = h < H
        mask = in_b[:, None] & in_h[None, :]
        dh = sum_parts(products, b, n_part, H, h, mask, ACC)
        w = tl.load(weight1 + h[:, None] * C + c[None, :], mask=in_h[:, None] & in_c[None, :], other=0.0).to(ACC)
        for pool in tl.static_range(PAIR):
            z1 = tl.load(hidden + pool * pool_step + h[None, :], mask=mask, other=0.0)
            dz1 = tl.where(mask, dh * activate_grad(z1, ACTIVATION), 0.0)
            if first:
                tl.store(grad_hidden + (b * PAIR + pool)[:, None] * H + h[None, :], dz1, mask=mask)
            grads = product(dz1, w, TF32, ACC)
            if pool == 0:
                ds += grads
            else:
                to_second += grads
    return ds, to_second


@triton.jit(do_not_specialize=SIZES)
def _first_layer_backward(
    weight1, state, index, dots, products, mean, value, grad_logits, grad_hidden,
    B, c_q, s_q, h_q, n_split, n_part, width,
    TWO_LAYERS: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, HV: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, TF32: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores what channels give to their pools, `mean` and `value`, and the gradients of logits and hidden logits."""
    C, S, H = c_q * CV, s_q * SV, h_q * HV
    PAIR: tl.constexpr = 2 if POOL == BOTH else 1
    b, _, c = block_of(1, C, BLOCK_B, BLOCK_C)
    in_b, in_c = b < B, c < C
    mask = in_b[:, None] & in_c[None, :]
    row = state + b[:, None] * width
    at = b[:, None] * C + c[None, :]
    tl.store(grad_logits + at, _logit_grads(dots, state, b, c, mask, C, n_split, width, GATE, ACC), mask=mask)
    if not TWO_LAYERS:
        ds = sum_parts(products, b, n_part, C, c, mask, ACC)
    else:
        ds, to_peak = through_hidden(
            weight1, products, row + 2 * C, grad_hidden, b, c, in_b, in_c, is_first(C, BLOCK_C), C, H, n_part, C + H,
            PAIR, ACTIVATION, BLOCK_H, TF32, ACC,
        )  # fmt: skip
    if POOL == AVGMAX:
        ds *= 0.5
    if POOL != BOTH or not TWO_LAYERS:
        to_peak = ds
    peak = row - b[:, None] * C + (2 * C + (H if TWO_LAYERS else 0) if POOL == BOTH else width - C)  # as `at` goes
    store_pool_gradients(
        mean, value, tl.zeros((BLOCK_B, BLOCK_C), ACC) if POOL == MAX else ds, to_peak, peak, index, at, mask, S,
        POOL, TIES,
    )  # fmt: skip


def is_apart(plan: maps.Plan, weight1: Tensor | None, layer: int, pool: int) -> bool:
    """Whether the layers have launches of their own.

    That the maxima of a map may be split among programs, which leaves none that could multiply them, is a reason too.
    """
    if weight1 is None or layer != LAYERS["dense"]:
        return False
    return pool != POOLS["avg"] or ELEMENTS_A_PRODUCT * weight1.shape[0] >= plan.space


def arguments_of(x: Tensor, plan: maps.Plan, weight1: Tensor, weight2: Tensor | None, width: int) -> dict[str, Any]:
    hidden, given = weight1.shape[0], plan.arguments(x.dtype)
    hv = maps.vector_of(hidden, x.dtype)
    return {
        "B": plan.batch,
        "h_q": hidden // hv,
        "HV": hv,
        "n_part": triton.cdiv(plan.channels, PART),
        "width": width,
        "TWO_LAYERS": weight2 is not None,
        "BLOCK_B": SAMPLES,
        "BLOCK_C": CHANNELS,
        "BLOCK_H": min(max(maps.next_power_of_2(hidden), 16), HIDDEN),
        "BLOCK_PART": PART,
        "TF32": x.dtype.itemsize == 2,
        "num_warps": 4,
        **{k: given[k] for k in ("c_q", "s_q", "n_split", "CV", "SV", "ACC")},
    }


def launch(kernel: Any, x: Tensor, plan: maps.Plan, parts: int, columns: int, given: dict[str, Any]) -> None:
    """Programs over samples, parts and blocks of columns, with those of the arguments that the kernel has."""
    programs = triton.cdiv(plan.batch, SAMPLES) * parts * columns
    maps.launch(kernel, x, programs, **{k: given[k] for k in (*kernel.arg_names, "num_warps")})


def excite(
    x: Tensor,
    plan: maps.Plan,
    tables: dict[str, Tensor | None],
    parameters: tuple[Tensor | None, ...],
    state: Tensor,
    index: Tensor,
    pool: int,
    ties: int,
    activation: int,
) -> None:
    """Descriptors and logits into `state`, from what programs over the map left in `tables`."""
    weight1, _, weight2, _ = parameters
    given = arguments_of(x, plan, weight1, weight2, state.shape[1])
    hidden, n_part = weight1.shape[0], given["n_part"]
    pairs = 2 if pool == POOLS["both"] and weight2 is not None else 1
    given |= {
        **tables,
        **dict(zip(("weight1", "bias1", "weight2", "bias2"), parameters, strict=True)),
        "state": state,
        "index": index,
        "products": state.new_empty((plan.batch, n_part, pairs * hidden)),
        "POOL": pool,
        "TIES": ties,
        "ACTIVATION": activation,
    }
    launch(_first_layer, x, plan, n_part, triton.cdiv(hidden, given["BLOCK_H"]), given)
    launch(_second_layer, x, plan, 1, triton.cdiv(plan.channels, CHANNELS), given)


def excite_backward(
    x: Tensor,
    plan: maps.Plan,
    dots: Tensor,
    tables: dict[str, Tensor | None],
    weight1: Tensor,
    weight2: Tensor | None,
    state: Tensor,
    index: Tensor,
    pool: int,
    ties: int,
    activation: int,
    gate: int,
) -> None:
    """What channels give to their pools, and gradients of the logits, into `tables`, from the partial dots."""
    given = arguments_of(x, plan, weight1, weight2, state.shape[1])
    hidden, n_part = weight1.shape[0], given["n_part"]
    given |= {
        **tables,
        "weight1": weight1,
        "weight": weight1 if weight2 is None else weight2,
        "state": state,
        "index": index,
        "dots": dots,
        "products": state.new_empty((plan.batch, n_part, hidden)),
        "POOL": pool,
        "TIES": ties,
        "ACTIVATION": activation,
        "GATE": gate,
    }
    launch(_second_layer_backward, x, plan, n_part, triton.cdiv(hidden, given["BLOCK_H"]), given)
    launch(_first_layer_backward, x, plan, 1, triton.cdiv(plan.channels, CHANNELS), given)
