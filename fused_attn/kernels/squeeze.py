"""Op `squeeze`: one read of x; where space is split among programs, a second launch sums what they left.

Backward is one launch that writes grad_x, and reads x only after a prologue or where ties are shared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import POOLS
from . import maps
from .language import AVG, EVEN, IDENTITY, MAX
from .maps import SIZES, channels_of, locate
from .passes import backward_pass, descriptor, pool_pass, store_pool_gradients

FINISHED = 128  # channels a program, at most


@triton.jit
def _store_descriptor(
    avg, max, index, sums, best, place, b, c, mask, C, S, n_split,
    POOL: tl.constexpr, TIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    mean, peak, found = descriptor(sums, best, place, b, c, mask, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)
    if POOL != MAX:
        tl.store(avg + b * C + c, mean, mask=mask)
    if POOL != AVG:
        tl.store(max + b * C + c, peak, mask=mask)
        tl.store(index + b * C + c, found, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _squeeze(
    x, affine_weight, affine_bias, sums, best, place, avg, max, index,
    c_q, s_q, n_cblk, n_split, blocks, tiles,
    PRE: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    pool_pass(
        x, affine_weight, affine_bias, sums, best, place, b, cblk, split, C, S, n_split, blocks, tiles,
        PRE, POOL, TIES, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if n_split == 1:
        tl.debug_barrier()
        c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
        _store_descriptor(avg, max, index, sums, best, place, b, c, in_c, C, S, n_split, POOL, TIES, 1, ACC)


@triton.jit(do_not_specialize=SIZES)
def _finish(
    sums, best, place, avg, max, index, c_q, s_q, n_cblk, n_split,
    POOL: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b = (tl.program_id(0) // n_cblk).to(tl.int64)
    c = tl.program_id(0) % n_cblk * BLOCK_K + tl.arange(0, BLOCK_K)
    _store_descriptor(avg, max, index, sums, best, place, b, c, c < C, C, S, n_split, POOL, TIES, BLOCK_ROWS, ACC)


@triton.jit(do_not_specialize=SIZES)
def _squeeze_backward(
    x, grad_avg, grad_max, max, index, affine_weight, affine_bias, mean, value, grad_x, weight_sums, bias_sums,
    c_q, s_q, n_cblk, n_split, blocks, tiles,
    PRE: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
    row = b * C
    to_mean = tl.zeros((BLOCK_K,), ACC)
    to_peak = tl.zeros((BLOCK_K,), ACC)
    if grad_avg is not None:
        to_mean = tl.load(grad_avg + row + c, mask=in_c, other=0.0).to(ACC)
    if grad_max is not None:
        to_peak = tl.load(grad_max + row + c, mask=in_c, other=0.0).to(ACC)
    # Programs that share channels store the same numbers.
    store_pool_gradients(
        mean + row, value + row, to_mean, to_peak, max + row, index + row, c, in_c, S,
        AVG if grad_max is None else MAX, TIES,
    )  # fmt: skip
    tl.debug_barrier()
    backward_pass(
        None, x, None, None, grad_x, None, affine_weight, affine_bias,
        None, mean + row, None if grad_max is None else value + row, index + row,
        max + row if grad_max is not None and TIES == EVEN else None, None, weight_sums, bias_sums,
        None, None, None, None,
        b, cblk, split, C, S, n_split, blocks, tiles, None, None, None,
        IDENTITY, IDENTITY, PRE, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


def finish(x: Tensor, plan: maps.Plan, pool: int, ties: int, tables: dict[str, Tensor | None]) -> None:
    """The launch that sums what programs left that had a part of space each."""
    block = min(FINISHED, maps.next_power_of_2(plan.channels))
    n_cblk = triton.cdiv(plan.channels, block)
    arguments = plan.arguments(x.dtype)
    maps.launch_where(
        plan.n_split > 1,
        _finish,
        x,
        plan.batch * n_cblk,
        n_cblk=n_cblk,
        POOL=pool,
        TIES=ties,
        BLOCK_K=block,
        BLOCK_ROWS=maps.ROWS_AT_ONCE,
        num_warps=1,
        **tables,
        **{k: arguments[k] for k in ("c_q", "s_q", "n_split", "CV", "SV", "ACC")},
    )


def squeeze(
    x: Tensor, affine_weight: Tensor | None, affine_bias: Tensor | None, pre_activation: int, pool: int, ties: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x, True)
    shape, none = (plan.batch, plan.channels), (0,)
    out = {
        "avg": x.new_empty(none if pool == POOLS["max"] else shape),
        "max": x.new_empty(none if pool == POOLS["avg"] else shape),
        "index": x.new_empty(none if pool == POOLS["avg"] else shape, dtype=torch.int32),
    }
    tables = maps.pool_tables(x, plan, pool)
    maps.launch(
        _squeeze,
        x,
        plan.programs,
        x=x,
        affine_weight=maps.row(affine_weight),
        affine_bias=maps.row(affine_bias),
        PRE=pre_activation,
        POOL=pool,
        TIES=ties,
        BLOCK_K=plan.block_k,
        **tables,
        **out,
        **plan.arguments(x.dtype),
        **maps.exact(ties, pool),
    )
    finish(x, plan, pool, ties, tables | out)
    return out["avg"], out["max"], out["index"]


def squeeze_backward(
    grad_avg: Tensor | None,
    grad_max: Tensor | None,
    x: Tensor,
    max: Tensor,
    index: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
    pool: int,
    ties: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x, True)
    index = index.contiguous()
    grad_x = torch.empty_like(x)
    spread = x.new_empty((2, plan.batch, plan.channels), dtype=maps.accumulator(x.dtype))
    sums = maps.affine_tables(x, plan, affine_weight)
    maps.launch(
        _squeeze_backward,
        x,
        plan.programs,
        x=x,
        grad_avg=maps.row(grad_avg),
        grad_max=maps.row(grad_max),
        max=max,
        index=index,
        affine_weight=maps.row(affine_weight),
        affine_bias=maps.row(affine_bias),
        mean=spread[0],
        value=spread[1],
        grad_x=grad_x,
        PRE=pre_activation,
        TIES=ties,
        BLOCK_K=plan.block_k,
        **sums,
        **plan.arguments(x.dtype),
        **maps.exact(ties, pool),
    )
    return grad_x, *maps.affine_gradients(sums, affine_weight, affine_bias, x)
