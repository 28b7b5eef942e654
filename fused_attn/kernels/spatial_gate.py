"""Op `spatial_gate`: forward 3 launches (read x; convolve; read x, write y), backward 4 (read grad and x; convolve;
read grad, write grad_x; gradients of the parameters). Between them travel numbers per position only. A BatchNorm adds a
few launches by PyTorch on one number a position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS, TIES
from . import maps, space
from .language import IDENTITY
from .maps import SIZES, locate
from .passes import backward_pass, scale_pass
from .space import channel_dot_pass, channel_pool_pass

CONVOLUTION_BLOCK = 64  # positions a program
WHOLE_SAMPLE = 256  # positions, at most: a sample's, of one program
TAPS_BLOCK = 16


@triton.jit(do_not_specialize=SIZES)
def _channel_pool(
    x, affine_weight, affine_bias, sums, best, place, c_q, s_q, n_cblk, n_split, blocks, tiles,
    PRE: tl.constexpr, TIES: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    channel_pool_pass(
        x, affine_weight, affine_bias, None, sums, best, place, b, cblk, split, C, S, n_cblk, blocks, tiles,
        IDENTITY, PRE, TIES, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _scale_space(
    x, affine_weight, affine_bias, residual, y, logits, logits_row, c_q, s_q, n_cblk, n_split, blocks, tiles,
    GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    scale_pass(
        x, residual, y, None, logits + b * logits_row, affine_weight, affine_bias, b, cblk, split, C, S, blocks, tiles,
        IDENTITY, GATE, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _dot_channels(
    grad, x, y, residual, grad_residual, affine_weight, affine_bias, logits, dots, logits_row,
    c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    channel_dot_pass(
        grad, x, y, residual, grad_residual, affine_weight, affine_bias, None, logits + b * logits_row, dots,
        b, cblk, split, C, S, n_cblk, blocks, tiles, stride_b, stride_c, stride_s,
        IDENTITY, GATE, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _spread_space(
    grad, x, grad_x, affine_weight, affine_bias, logits, index, peaks, space_grads, weight_sums, bias_sums, logits_row,
    c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    grads, at, peak = None, None, None
    if space_grads is not None:
        grads, at = space_grads + b * 2 * S, index + b * S
    if peaks is not None:
        peak = peaks + b * logits_row
    backward_pass(
        grad, x, None, None, grad_x, None, affine_weight, affine_bias,
        None, None, None, None, None, None, weight_sums, bias_sums,
        None if logits is None else logits + b * logits_row, grads, at, peak,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        IDENTITY, GATE, PRE, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


def convolution(x: Tensor, weight: Tensor) -> dict[str, int]:
    """Sizes of the map and of the kernel as the convolution's launches take them."""
    rank = x.dim() - 2
    sizes = dict(zip("DHW", (1,) * (3 - rank) + tuple(x.shape[2:]), strict=True))
    kernel = dict(zip(("KD", "KH", "KW"), (1,) * (3 - rank) + tuple(weight.shape[2:]), strict=True))
    positions = max(x.shape[2:].numel(), 1)
    whole = positions <= WHOLE_SAMPLE
    block_s = maps.next_power_of_2(positions) if whole else CONVOLUTION_BLOCK
    return {
        "C": x.shape[1],
        **sizes,
        **kernel,
        "s_blocks": triton.cdiv(positions, block_s),
        "WHOLE": whole,
        "BLOCK_S": block_s,
        "BLOCK_T": TAPS_BLOCK,
        "num_warps": max(block_s // CONVOLUTION_BLOCK, 2),
        "ACC": maps.triton_accumulator(x.dtype),
    }


def convolve(
    x: Tensor,
    plan: maps.Plan,
    tables: dict[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    order: int,
    ties: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(state, index, statistics) of the spatial gate."""
    acc = maps.accumulator(x.dtype)
    state = x.new_empty((plan.batch, 3 if norm_weight is None else 4, *x.shape[2:]), dtype=acc)
    index = x.new_empty((plan.batch, *x.shape[2:]), dtype=torch.int32)
    sizes = convolution(x, weight)
    maps.launch(
        space.convolve,
        x,
        plan.batch * sizes["s_blocks"],
        weight=weight,
        bias=bias,
        state=state,
        index=index,
        n_cblk=plan.n_cblk,
        MEAN_FIRST=order,
        TIES=ties,
        ROWS=state.shape[1],
        BLOCK_ROWS=maps.rows_of_channels(plan),
        **tables,
        **sizes,
    )
    if norm_weight is None or norm_bias is None:
        return state, index, state.new_empty(0)
    variance, mean = torch.var_mean(state[:, 3], correction=0)
    normal = (state[:, 3] - mean) * (variance + eps).rsqrt()
    torch.add(norm_bias.to(acc), normal * norm_weight.to(acc), out=state[:, 2])
    return state, index, torch.stack((mean, variance))


def convolve_backward(
    x: Tensor,
    plan: maps.Plan,
    dots: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    state: Tensor,
    index: Tensor,
    statistics: Tensor,
    order: int,
    ties: int,
    gate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradients for maximum and mean of each position, partial sums for the convolution's parameters, gradients of
    the BatchNorm's)."""
    sizes = convolution(x, weight)
    norm_grads = x.new_empty(0), x.new_empty(0)
    if norm_weight is not None and norm_bias is not None:
        dots, *norm_grads = normalise_backward(x, plan, dots, norm_weight, norm_bias, eps, state, statistics, gate)
        gate = ACTIVATIONS["identity"]
    programs = plan.batch * sizes["s_blocks"]
    grads = state.new_empty((plan.batch, 2, *x.shape[2:]))
    tap_sums = state.new_empty((programs, weight.numel() + 1))
    maps.launch(
        space.convolve_backward,
        x,
        programs,
        dots=dots,
        weight=weight,
        state=state,
        index=index,
        grads=grads,
        tap_sums=tap_sums,
        n_cblk=dots.shape[1],
        MEAN_FIRST=order,
        TIES=ties,
        GATE=gate,
        ROWS=state.shape[1],
        **sizes,
    )
    return grads, tap_sums, *norm_grads


def normalise_backward(
    x: Tensor,
    plan: maps.Plan,
    dots: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    state: Tensor,
    statistics: Tensor,
    gate: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the convolution's output (B, 1, S), of the BatchNorm's weight, of its bias)."""
    positions = max(x.shape[2:].numel(), 1)
    s_blocks = triton.cdiv(positions, CONVOLUTION_BLOCK)
    grads = state.new_empty((plan.batch, 1, *x.shape[2:]))
    maps.launch(
        space.logit_gradients,
        x,
        plan.batch * s_blocks,
        dots=dots,
        logits=state[:, 2],
        grads=grads,
        S=plan.space,
        n_cblk=plan.n_cblk,
        s_blocks=s_blocks,
        logits_row=state.stride(0),
        GATE=gate,
        BLOCK_S=CONVOLUTION_BLOCK,
        ACC=maps.triton_accumulator(x.dtype),
        num_warps=2,
    )
    mean, variance = statistics
    reciprocal = (variance + eps).rsqrt()
    normal = (state[:, 3:] - mean) * reciprocal
    grad_bias, grad_weight = grads.sum(), (grads * normal).sum()
    count = max(grads.numel(), 1)
    grads = (grads - grad_bias / count - normal * (grad_weight / count)) * (norm_weight.to(grads.dtype) * reciprocal)
    return grads, grad_weight.to(norm_weight.dtype).reshape(1), grad_bias.to(norm_bias.dtype).reshape(1)


def convolution_gradients(x: Tensor, tap_sums: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's weight and bias from the partial sums, in a fixed order."""
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    block = 8
    maps.launch(
        space.convolution_parameters,
        x,
        triton.cdiv(weight.numel() + 1, block),
        tap_sums=tap_sums,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        n_taps=weight.numel(),
        n_rows=tap_sums.shape[0],
        BLOCK_COLUMNS=block,
        BLOCK_ROWS=512,
        ACC=maps.triton_accumulator(x.dtype),
        num_warps=4,
    )
    return grad_weight, x.new_empty(0) if grad_bias is None else grad_bias


def read_for_channel_pool(
    x: Tensor, plan: maps.Plan, affine_weight: Tensor | None, affine_bias: Tensor | None, pre_activation: int, ties: int
) -> dict[str, Tensor]:
    """Partial pools over channels, one read of x."""
    tables = maps.channel_pool_tables(x, plan)
    maps.launch(
        _channel_pool,
        x,
        plan.programs,
        x=x,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        PRE=pre_activation,
        TIES=ties,
        **tables,
        **plan.arguments(x.dtype),
        **maps.exact(ties),
    )
    return tables


def scale_over_space(
    x: Tensor,
    plan: maps.Plan,
    logits: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> Tensor:
    """y; `logits` (B, *spatial), each sample's dense, is what the activation `gate` is applied to."""
    y = torch.empty_like(x)
    maps.launch(
        _scale_space,
        x,
        plan.programs,
        x=x,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        residual=maps.as_map(residual, x),
        y=y,
        logits=logits,
        logits_row=logits.stride(0),
        GATE=gate,
        PRE=pre_activation,
        POST=post_activation,
        **plan.arguments(x.dtype),
    )
    return y


def dots_over_channels(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    plan: maps.Plan,
    logits: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor | None]:
    """(partial dots over channels (B, n_cblk, S), grad_residual after an epilogue)."""
    grad, strides = maps.gradient(grad, x)
    dots = maps.channel_table(x, plan)
    grad_residual = None if post_activation == ACTIVATIONS["identity"] else torch.empty_like(x)
    maps.launch(
        _dot_channels,
        x,
        plan.programs,
        grad=grad,
        x=x,
        y=maps.as_map(y, x),
        residual=maps.as_map(residual, x),
        grad_residual=grad_residual,
        affine_weight=affine_weight,
        affine_bias=affine_bias,
        logits=logits,
        dots=dots,
        logits_row=logits.stride(0),
        GATE=gate,
        PRE=pre_activation,
        POST=post_activation,
        **strides,
        **plan.arguments(x.dtype),
    )
    return dots, grad_residual


def spread_over_space(
    x: Tensor,
    plan: maps.Plan,
    grad: Tensor | None,
    logits: Tensor | None,
    peaks: Tensor | None,
    index: Tensor | None,
    space_grads: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    pre_activation: int,
    ties: int,
    gate: int = ACTIVATIONS["identity"],
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, gradients of the prologue): of a map scaled by its positions' gates, pooled over channels, or both."""
    grad, strides = maps.gradient(grad, x)
    grad_x = torch.empty_like(x)
    sums = maps.affine_tables(x, plan, affine_weight)
    rows = logits if logits is not None else peaks
    maps.launch(
        _spread_space,
        x,
        plan.programs,
        grad=grad,
        x=x,
        grad_x=grad_x,
        affine_weight=maps.row(affine_weight),
        affine_bias=maps.row(affine_bias),
        logits=logits,
        index=index,
        peaks=peaks,
        space_grads=space_grads,
        logits_row=0 if rows is None else rows.stride(0),
        GATE=gate,
        PRE=pre_activation,
        **sums,
        **strides,
        **plan.arguments(x.dtype),
        **maps.exact(ties),
    )
    return grad_x, *maps.affine_gradients(sums, affine_weight, affine_bias, x)


def spatial_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    mean_first: int,
    ties: int,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x)
    over_channels = maps.plan_over_channels(x, plan)
    weight, bias, affine_weight, affine_bias = map(maps.row, (weight, bias, affine_weight, affine_bias))
    tables = read_for_channel_pool(x, over_channels, affine_weight, affine_bias, pre_activation, ties)
    norm = norm_weight, norm_bias, eps
    state, index, statistics = convolve(x, over_channels, tables, weight, bias, *norm, mean_first, ties)
    y = scale_over_space(
        x, plan, state[:, 2], affine_weight, affine_bias, residual, gate, pre_activation, post_activation
    )
    return y, state, index, statistics


def spatial_gate_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    state: Tensor,
    index: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    mean_first: int,
    ties: int,
    gate: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, ...]:
    x, plan = maps.dense(x)
    state, index = state.contiguous(), index.contiguous()
    over_channels = maps.plan_over_channels(x, plan)
    weight, bias, affine_weight, affine_bias = map(maps.row, (weight, bias, affine_weight, affine_bias))
    dots, grad_residual = dots_over_channels(
        grad,
        x,
        y,
        over_channels,
        state[:, 2],
        affine_weight,
        affine_bias,
        residual,
        gate,
        pre_activation,
        post_activation,
    )
    norm = norm_weight, norm_bias, eps
    space_grads, tap_sums, *norm_grads = convolve_backward(
        x, over_channels, dots, weight, *norm, state, index, statistics, mean_first, ties, gate
    )
    grad_x, *affine_grads = spread_over_space(
        x,
        plan,
        grad if grad_residual is None else grad_residual,
        state[:, 2],
        state[:, 0] if ties == TIES["even"] else None,
        index,
        space_grads,
        affine_weight,
        affine_bias,
        pre_activation,
        ties,
        gate,
    )
    grads = convolution_gradients(x, tap_sums, weight, bias)
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, *grads, *norm_grads, *affine_grads
