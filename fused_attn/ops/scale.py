"""Op `scale`: post_activation(pre_activation(x * weight + bias) * gate + residual), one pass over each map.

The gate is (B, C), one a channel, or (B, 1, *spatial), one a position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..codes import ACTIVATIONS
from .common import (
    accumulator,
    affine_or_none,
    as_it_is,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    shape_of,
    unless_absent,
    wants_graph,
)

IDENTITY, RELU = ACTIVATIONS["identity"], ACTIVATIONS["relu"]
ACTIVATION_NAMES = tuple(ACTIVATIONS)


def _fake(x, gate, affine_weight, affine_bias, residual, pre_activation, post_activation):
    return empty_map(x)


def _fake_backward(grad, x, y, gate, affine_weight, affine_bias, residual, pre_activation, post_activation):
    return (
        empty_map(x),
        torch.empty_like(gate, memory_format=torch.contiguous_format),
        x.new_empty(0) if post_activation == IDENTITY else empty_map(x),
        like_or_none(affine_weight, x),
        like_or_none(affine_bias, x),
    )


FORWARD = define(
    "scale",
    "(Tensor x, Tensor gate, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual,"
    " int pre_activation, int post_activation) -> Tensor",
    _fake,
)
BACKWARD = define(
    "scale_backward",
    "(Tensor grad, Tensor x, Tensor? y, Tensor gate, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual,"
    " int pre_activation, int post_activation) -> (Tensor grad_x, Tensor grad_gate, Tensor grad_residual,"
    " Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def saved_for_epilogue(y: Tensor, residual: Tensor | None, post_activation: int) -> tuple[Tensor | None, Tensor | None]:
    """What backward needs for post_activation's derivative: (y, residual), each only where it must be kept.

    ReLU's derivative is read off y, which the next layer keeps anyway; the others' is recomputed from the
    sum, so from the residual.
    """
    if post_activation == IDENTITY:
        return None, None
    return (y, None) if post_activation == RELU else (None, residual)


def of_residual(ctx: Any, at: int, grad: Tensor, written: Tensor) -> Tensor | None:
    """The gradient of the residual, the input at this place: the incoming one itself where nothing follows the sum."""
    if not ctx.needs_input_grad[at]:
        return None
    return grad if ctx.codes[-1] == IDENTITY else written


def before_epilogue(grad: Tensor, y: Tensor | None) -> Tensor:
    """ReLU's epilogue taken off a gradient, for double backward (its second derivative is 0)."""
    return grad if y is None else grad * (~(y <= 0)).to(grad.dtype)


def scaled(
    x: Tensor,
    gate: Tensor,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    pre_activation: int,
    post_activation: int,
) -> Tensor:
    """The operator's formula: `reference.scale` in the accumulators' dtype, rounded once."""
    wide = accumulator(x.dtype)
    return reference.scale(
        x.to(wide),
        gate,
        affine=affine_or_none(affine_weight, affine_bias),
        pre_activation=ACTIVATION_NAMES[pre_activation],
        residual=None if residual is None else residual.to(wide),
        post_activation=ACTIVATION_NAMES[post_activation],
    ).to(x.dtype)


def _keep(ctx, inputs, y):
    x, gate, affine_weight, affine_bias, residual = inputs
    pre_activation, post_activation = ctx.codes
    before = affine_weight is not None or pre_activation != IDENTITY
    if not (before or ctx.needs_input_grad[2] or post_activation not in (IDENTITY, RELU)):
        x = shape_of(x)
    ctx.save_for_backward(x, gate, affine_weight, affine_bias, *saved_for_epilogue(y, residual, ctx.codes[-1]))


def _gradients(ctx, grad):
    x, gate, affine_weight, affine_bias, y, residual = ctx.saved_tensors
    if wants_graph():
        grads = _differentiable(ctx, (x, gate, affine_weight, affine_bias, residual), y, grad)
    else:
        grad_x, grad_gate, grad_residual, grad_weight, grad_bias = below(
            BACKWARD[ctx.backend], grad, x, y, gate, affine_weight, affine_bias, residual, *ctx.codes
        )
        affine = unless_absent((affine_weight, affine_bias), (grad_weight, grad_bias))
        grads = grad_x, grad_gate, *affine, of_residual(ctx, 5, grad, grad_residual)
    return None, *grads


def _differentiable(ctx, inputs, y, grad):
    pre_activation, post_activation = (ACTIVATION_NAMES[c] for c in ctx.codes)
    needs = ctx.needs_input_grad[1:]
    recomputed = inputs[-1] is not None or post_activation not in ("identity", "relu")
    grad = before_epilogue(grad, y)

    def function(x, gate, weight, bias, residual):
        return reference.scale(
            x,
            gate,
            affine=None if weight is None else (weight, bias),
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation if recomputed else "identity",
        )

    grads = differentiable_backward(function, inputs, needs, grad)
    return grads if recomputed else (*grads[:4], grad if needs[4] else None)


#: scale(backend, x, gate, affine_weight, affine_bias, residual, pre_activation, post_activation): the scaled map, in
#: x's dtype and layout.
scale = differentiable(FORWARD, BACKWARD, _keep, _gradients, scaled, shown=as_it_is)
