"""Op `channel_pool`: one read of x, then the blocks of channels are put together; backward is one write of grad_x, and
a read of x after a prologue or for shared ties."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import TIES
from . import maps
from .language import max_of_rows, sum_rows
from .maps import SIZES
from .spatial_gate import read_for_channel_pool, spread_over_space

BLOCK = 128


@triton.jit(do_not_specialize=SIZES)
def _finish_pool(
    sums, best, place, pooled, index, C, S, n_cblk, s_blocks,
    MEAN_FIRST: tl.constexpr, TIES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // s_blocks).to(tl.int64)
    position = tl.program_id(0) % s_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    in_s = position < S
    rows = b * n_cblk * S
    mean = sum_rows(sums + rows, n_cblk, S, position, in_s, BLOCK_ROWS, ACC) / C
    peak, found = max_of_rows(best + rows, place + rows, n_cblk, S, position, in_s, TIES, BLOCK_ROWS, ACC)
    out = pooled + b * 2 * S + position
    tl.store(out + (S if MEAN_FIRST else 0), peak, mask=in_s)
    tl.store(out + (0 if MEAN_FIRST else S), mean, mask=in_s)
    tl.store(index + b * S + position, found, mask=in_s)


def channel_pool(
    x: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
    mean_first: int,
    ties: int,
) -> tuple[Tensor, Tensor]:
    x, plan = maps.dense(x)
    plan = maps.plan_over_channels(x, plan)
    tables = read_for_channel_pool(x, plan, maps.row(affine_weight), maps.row(affine_bias), pre_activation, ties)
    pooled = x.new_empty((plan.batch, 2, *x.shape[2:]))
    index = x.new_empty((plan.batch, *x.shape[2:]), dtype=torch.int32)
    s_blocks = triton.cdiv(plan.space, BLOCK)
    maps.launch(
        _finish_pool,
        x,
        plan.batch * s_blocks,
        pooled=pooled,
        index=index,
        C=plan.channels,
        S=plan.space,
        n_cblk=plan.n_cblk,
        s_blocks=s_blocks,
        MEAN_FIRST=mean_first,
        TIES=ties,
        BLOCK_S=BLOCK,
        BLOCK_ROWS=maps.rows_of_channels(plan),
        ACC=maps.triton_accumulator(x.dtype),
        num_warps=2,
        **tables,
    )
    return pooled, index


def channel_pool_backward(
    grad: Tensor,
    x: Tensor,
    pooled: Tensor,
    index: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
    mean_first: int,
    ties: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x)
    index = index.contiguous()
    grads = grad.to(maps.accumulator(x.dtype))  # (B, 2, *spatial): small beside x
    to_max, to_mean = grads[:, mean_first], grads[:, 1 - mean_first] / plan.channels
    peak = pooled[:, mean_first] if ties == TIES["even"] else None
    if peak is not None:  # a NaN maximum makes its position NaN, as dividing by its multiplicity of 0 does in eager
        to_max = to_max / index
        to_mean = torch.where(peak.isnan(), peak.to(to_mean.dtype), to_mean)
    space_grads = torch.stack((to_max, to_mean), 1)
    return spread_over_space(
        x, plan, None, None, peak, index, space_grads, affine_weight, affine_bias, pre_activation, ties
    )
