"""Op `context_pool`: one read of x. Backward: one read of x and of the map's own gradient, one write of grad_x.

A program has a sample, a split of space, and tiles of all channels, so that a position's logit and what it adds to the
context come of one load. What the programs of a sample leave, relative to the largest logit of each, a second launch
joins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import maps
from .maps import CHANNELS_LAST, SIZES, strided_tile_at
from .passes import inside

WARPS = 8
BLOCK = 256


@triton.jit
def _tile_at(b, first, C, S, LAYOUT: tl.constexpr, LONG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """(64-bit offset of a tile's first element, offsets within the tile); LONG: these have 64 bits, too."""
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    if LONG:
        c = c.to(tl.int64)
    if LAYOUT == CHANNELS_LAST:
        return (b * S + first) * C, c + s * C
    else:
        return b * C * S + first, c * S + s


@triton.jit
def _base(peak):
    """What exponents are taken relative to: the largest logit, or 0 where all are -infinity."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=SIZES)
def _context(
    x, weight, bias, logits, peaks, totals, sums, c_q, s_q, n_split, blocks,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """NaN among the logits, or infinity, makes the total NaN, and so all that is divided by it."""
    C, S = c_q * CV, s_q * SV
    row = tl.program_id(0).to(tl.int64)
    b, split = row // n_split, row % n_split
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    factor = tl.load(weight + c, mask=in_c, other=0.0).to(ACC)
    shift = tl.zeros((), ACC)
    if bias is not None:
        shift += tl.load(bias).to(ACC)
    peak = tl.full((), float("-inf"), ACC)
    total = tl.zeros((), ACC)
    context = tl.zeros((BLOCK_C,), ACC)
    first = split * blocks * BLOCK_S
    for _ in range(blocks):
        in_s = inside(first, S, BLOCK_S)
        mask = in_c[:, None] & in_s[None, :]
        at, offsets = _tile_at(b, first, C, S, LAYOUT, LONG, BLOCK_C, BLOCK_S)
        value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
        logit = tl.sum(value * factor[:, None], axis=0) + shift
        tl.store(logits + b * S + first + tl.arange(0, BLOCK_S), logit, mask=in_s)
        larger = tl.maximum(peak, tl.max(tl.where(in_s, logit, float("-inf")), axis=0))
        power = tl.where(in_s, tl.exp(logit - _base(larger)), 0.0)
        share = tl.exp(peak - _base(larger))
        total = total * share + tl.sum(power, axis=0)
        context = context * share + tl.sum(value * power[None, :], axis=1)
        peak = larger
        first += BLOCK_S
    tl.store(peaks + row, peak)
    tl.store(totals + row, total)
    tl.store(sums + row * C + c, context, mask=in_c)


@triton.jit(do_not_specialize=SIZES)
def _join(
    logits, peaks, totals, sums, context, mean, C, S, n_split, s_blocks,
    BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The context of a block of channels from all splits, and in place of a block of logits their softmax."""
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    at = tl.program_id(0) % s_blocks * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, BLOCK_ROWS)
    peak = tl.full((), float("-inf"), ACC)
    for k in range(0, n_split, BLOCK_ROWS):
        found = tl.load(peaks + b * n_split + k + rows, mask=k + rows < n_split, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(found, axis=0))
    base = _base(peak)
    total = tl.zeros((), ACC)
    value = tl.zeros((BLOCK,), ACC)
    for k in range(n_split):
        row = b * n_split + k
        share = tl.exp(tl.load(peaks + row) - base)
        total += share * tl.load(totals + row)
        value += share * tl.load(sums + row * C + at, mask=at < C, other=0.0)
    value = value / total if S > 0 else value  # of no position eager's product is 0
    tl.store(mean + b * C + at, value, mask=at < C)
    tl.store(context + b * C + at, value, mask=at < C)
    logit = tl.load(logits + b * S + at, mask=at < S, other=0.0)
    tl.store(logits + b * S + at, tl.exp(logit - base) / total, mask=at < S)


@triton.jit(do_not_specialize=SIZES)
def _context_spread(
    grad, gate, x, factors, weight, mean, shares, grad_x, weight_sums, stride_b, stride_c, stride_s,
    c_q, s_q, n_split, blocks,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr, LONG: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """With slope a position's share times the sum over the channels of (x - mean) * factor: writes grad_x, which is
    grad * gate + share * factor + slope * weight, and leaves each program's sums of slope * (x - mean)."""
    C, S = c_q * CV, s_q * SV
    row = tl.program_id(0).to(tl.int64)
    b, split = row // n_split, row % n_split
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    factor = tl.load(factors + b * C + c, mask=in_c, other=0.0).to(ACC)
    centre = tl.load(mean + b * C + c, mask=in_c, other=0.0)
    to_logit = tl.load(weight + c, mask=in_c, other=0.0).to(ACC)
    total = tl.zeros((BLOCK_C,), ACC)
    first = split * blocks * BLOCK_S
    for _ in range(blocks):
        s = first + tl.arange(0, BLOCK_S)
        in_s = inside(first, S, BLOCK_S)
        mask = in_c[:, None] & in_s[None, :]
        at, offsets = _tile_at(b, first, C, S, LAYOUT, LONG, BLOCK_C, BLOCK_S)
        value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
        value = tl.where(mask, value - centre[:, None], 0.0)
        share = tl.load(shares + b * S + s, mask=in_s, other=0.0)
        slope = share * tl.sum(value * factor[:, None], axis=0)
        total += tl.sum(value * slope[None, :], axis=1)
        out = share[None, :] * factor[:, None] + slope[None, :] * to_logit[:, None]
        if grad is not None:
            if stride_b is not None:
                grad_at, strided, _step = strided_tile_at(
                    b, tl.zeros((), tl.int64), first, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
                )
                dy = tl.load(grad + grad_at + strided, mask=mask, other=0.0).to(ACC)
            else:
                dy = tl.load(grad + at + offsets, mask=mask, other=0.0).to(ACC)
            if gate is not None:
                dy *= tl.load(gate + b * C + c, mask=in_c, other=0.0).to(ACC)[:, None]
            out += dy
        tl.store(grad_x + at + offsets, out, mask=mask)
        first += BLOCK_S
    tl.store(weight_sums + row * C + c, total, mask=in_c)


def _lane(x: Tensor, plan: maps.Plan) -> int:
    """Elements of a tile a thread, which stay in registers from the logits to the context: fewer where each has an
    address of its own, or is summed in eight bytes."""
    return 16 if plan.lane > maps.LANE_ALONE else 32 // maps.accumulator(x.dtype).itemsize


def _plan(x: Tensor) -> tuple[Tensor, maps.Plan]:
    """Tiles of all channels, in programs that share a sample's space."""
    x, plan = maps.dense(x)
    block_c = maps.next_power_of_2(plan.channels)
    block_s = min(max(32 * WARPS * _lane(x, plan) // block_c, 1), maps.next_power_of_2(plan.space))
    s_blocks = triton.cdiv(plan.space, block_s)
    programs = max(maps.PROGRAMS_PER_SM * maps.multiprocessors(x.device) // max(plan.batch, 1), 1)
    blocks = triton.cdiv(s_blocks, min(programs, max(s_blocks, 1)))
    n_split = triton.cdiv(s_blocks, max(blocks, 1)) or 1
    return x, plan._replace(block_c=block_c, block_s=block_s, n_cblk=1, n_split=n_split, blocks=blocks)


def _arguments(x: Tensor, plan: maps.Plan) -> dict:
    arguments = plan.arguments(x.dtype)
    del arguments["tiles"], arguments["n_cblk"]
    warps = min(max(plan.block_c * plan.block_s // (32 * _lane(x, plan)), 1), WARPS)
    return arguments | {"LONG": plan.channels * plan.space >= 2**31, "num_warps": warps}


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = _plan(x)
    dtype = maps.accumulator(x.dtype)
    context = x.new_empty((plan.batch, plan.channels))
    mean = torch.empty_like(context, dtype=dtype)
    shares = x.new_empty((plan.batch, plan.space), dtype=dtype)
    peaks = x.new_empty((plan.batch, plan.n_split), dtype=dtype)
    tables = {"logits": shares, "peaks": peaks, "totals": torch.empty_like(peaks), "sums": maps.table(x, plan)}
    given = {"x": x, "weight": maps.row(weight), "bias": bias}
    maps.launch(_context, x, plan.programs, **given, **tables, **_arguments(x, plan))
    s_blocks = triton.cdiv(max(plan.channels, plan.space), BLOCK)
    maps.launch(
        _join,
        x,
        plan.batch * s_blocks,
        context=context,
        mean=mean,
        C=plan.channels,
        S=plan.space,
        n_split=plan.n_split,
        s_blocks=s_blocks,
        BLOCK=BLOCK,
        BLOCK_ROWS=maps.ROWS_AT_ONCE,
        ACC=maps.triton_accumulator(x.dtype),
        num_warps=2,
        **tables,
    )
    return context, mean, shares


def context_pool_backward(
    grad: Tensor | None,
    gate: Tensor | None,
    grad_context: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    shares: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = _plan(x)
    mean, shares = mean.contiguous(), shares.contiguous()
    grad_x, weight_sums = torch.empty_like(x), maps.table(x, plan)
    grad, strides = maps.gradient(grad, x)
    given = {"grad": grad, "x": x, "factors": maps.row(grad_context), "weight": maps.row(weight), "mean": mean}
    maps.launch(
        _context_spread,
        x,
        plan.programs,
        shares=shares,
        grad_x=grad_x,
        weight_sums=weight_sums,
        gate=maps.row(gate),
        **given,
        **strides,
        **_arguments(x, plan),
    )
    grad_weight = weight_sums.sum((0, 1)).to(weight.dtype).view(weight.shape)
    # A softmax does not see what all its logits have in common: 0, and NaN where what comes of them is no number.
    grad_bias = x.new_empty(0) if bias is None else ((grad_context * mean).sum() * 0).to(bias.dtype).view(1)
    return grad_x, grad_weight, grad_bias
