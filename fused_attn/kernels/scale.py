"""Op `scale`: one launch that reads x (and the residual) and writes y. Backward with a gate a channel is one, too
(reads grad and x, writes grad_x); with a gate a position two: its sums go over channels, and grad is read again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS, TIES
from . import maps
from .language import IDENTITY
from .maps import SIZES, locate
from .passes import backward_pass, scale_pass
from .spatial_gate import dots_over_channels, scale_over_space, spread_over_space

NO_GATE = ACTIVATIONS["identity"]  # the gate is given, not its logits


@triton.jit(do_not_specialize=SIZES)
def _scale(
    x, gate, affine_weight, affine_bias, residual, y,
    c_q, s_q, n_cblk, n_split, blocks, tiles,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    scale_pass(
        x, residual, y, gate + b * C, None, affine_weight, affine_bias, b, cblk, split, C, S, blocks, tiles,
        IDENTITY, IDENTITY, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _scale_backward(
    grad, x, y, gate, affine_weight, affine_bias, residual, grad_x, grad_residual, dots, weight_sums, bias_sums,
    c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    PRE: tl.constexpr, POST: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    backward_pass(
        grad, x, y, residual, grad_x, grad_residual, affine_weight, affine_bias,
        gate + b * C, None, None, None, None, dots, weight_sums, bias_sums, None, None, None, None,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        IDENTITY, IDENTITY, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


def _of_space(gate: Tensor, x: Tensor) -> bool:
    """Whether the gate is (B, 1, *spatial), one a position, not (B, C)."""
    return gate.dim() == x.dim()


def scale(
    x: Tensor,
    gate: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    pre_activation: int,
    post_activation: int,
) -> Tensor:
    x, plan = maps.dense(x, not _of_space(gate, x))
    if _of_space(gate, x):
        affine = maps.row(affine_weight), maps.row(affine_bias)
        return scale_over_space(x, plan, gate.contiguous(), *affine, residual, NO_GATE, pre_activation, post_activation)
    y = torch.empty_like(x)
    maps.launch(
        _scale,
        x,
        plan.programs,
        x=x,
        gate=gate.contiguous(),
        affine_weight=maps.row(affine_weight),
        affine_bias=maps.row(affine_bias),
        residual=maps.as_map(residual, x),
        y=y,
        PRE=pre_activation,
        POST=post_activation,
        **plan.arguments(x.dtype),
    )
    return y


def scale_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x, not _of_space(gate, x))
    if _of_space(gate, x):
        affine, logits = (maps.row(affine_weight), maps.row(affine_bias)), gate.contiguous()
        over_channels = maps.plan_over_channels(x, plan)
        dots, grad_residual = dots_over_channels(
            grad, x, y, over_channels, logits, *affine, residual, NO_GATE, pre_activation, post_activation
        )
        grad = grad if grad_residual is None else grad_residual
        grad_x, *affine_grads = spread_over_space(
            x, plan, grad, logits, None, None, None, *affine, pre_activation, TIES["first"]
        )
        grad_residual = x.new_empty(0) if grad_residual is None else grad_residual
        return grad_x, dots.sum(1).to(gate.dtype).view(gate.shape), grad_residual, *affine_grads
    grad, strides = maps.gradient(grad, x)
    grad_x = torch.empty_like(x)
    grad_residual = None if post_activation == ACTIVATIONS["identity"] else torch.empty_like(x)
    dots = maps.table(x, plan)
    sums = maps.affine_tables(x, plan, affine_weight)
    maps.launch(
        _scale_backward,
        x,
        plan.programs,
        grad=grad,
        x=x,
        y=maps.as_map(y, x),
        gate=gate.contiguous(),
        affine_weight=maps.row(affine_weight),
        affine_bias=maps.row(affine_bias),
        residual=maps.as_map(residual, x),
        grad_x=grad_x,
        grad_residual=grad_residual,
        dots=dots,
        PRE=pre_activation,
        POST=post_activation,
        **sums,
        **strides,
        **plan.arguments(x.dtype),
    )
    return (
        grad_x,
        dots.sum(1).to(gate.dtype).view(gate.shape),
        x.new_empty(0) if grad_residual is None else grad_residual,
        *maps.affine_gradients(sums, affine_weight, affine_bias, x),
    )
