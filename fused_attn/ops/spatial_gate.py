"""Op `spatial_gate`: channel pool, a convolution of its two maps to one, and scale, as one operator.

Between forward and backward travel x (y too where a ReLU follows), `state`, (B, 3, *spatial) in the
accumulator's dtype (the maximum over channels, the mean, the gate's logits), and `index`, int32 (B, *spatial):
the maximum's channel ("first") or its multiplicity ("even").
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..codes import ORDERS
from .common import accumulator, define, differentiable_backward, empty_map, like_or_none, wants_graph
from .scale import ACTIVATION_NAMES, IDENTITY, before_epilogue, saved_for_epilogue
from .squeeze import TIE_NAMES

ORDER_NAMES = tuple(ORDERS)

_TENSORS = "Tensor weight, Tensor? bias, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual"
_CODES = "int mean_first, int ties, int gate, int pre_activation, int post_activation"


def empty_state(x: Tensor) -> tuple[Tensor, Tensor]:
    """(state, index) of a spatial gate on x."""
    batch, _, *spatial = x.shape
    state = x.new_empty((batch, 3, *spatial), dtype=accumulator(x.dtype))
    return state, x.new_empty((batch, *spatial), dtype=torch.int32)


def _fake(
    x,
    weight,
    bias,
    affine_weight,
    affine_bias,
    residual,
    mean_first,
    ties,
    gate,
    pre_activation,
    post_activation,
):
    return empty_map(x), *empty_state(x)


def _fake_backward(
    grad,
    x,
    y,
    state,
    index,
    weight,
    bias,
    affine_weight,
    affine_bias,
    residual,
    mean_first,
    ties,
    gate,
    pre_activation,
    post_activation,
):
    return (
        empty_map(x),
        x.new_empty(0) if post_activation == IDENTITY else empty_map(x),
        *(like_or_none(t, x) for t in (weight, bias, affine_weight, affine_bias)),
    )


FORWARD = define("spatial_gate", f"(Tensor x, {_TENSORS}, {_CODES}) -> (Tensor y, Tensor state, Tensor index)", _fake)
BACKWARD = define(
    "spatial_gate_backward",
    f"(Tensor grad, Tensor x, Tensor? y, Tensor state, Tensor index, {_TENSORS}, {_CODES})"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


class _SpatialGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, affine_weight, affine_bias, residual, *codes):
        parameters = weight, bias, affine_weight, affine_bias
        y, state, index = FORWARD[backend](x, *parameters, residual, *codes)
        ctx.save_for_backward(x, *parameters, *saved_for_epilogue(y, residual, codes[-1]), state, index)
        ctx.backend, ctx.codes = backend, codes
        return y

    @staticmethod
    def backward(ctx, grad):
        x, *parameters, y, residual, state, index = ctx.saved_tensors
        if wants_graph():
            grads = _differentiable(ctx, grad)
        else:
            grad_x, grad_residual, *grads = BACKWARD[ctx.backend](
                grad, x, y, state, index, *parameters, residual, *ctx.codes
            )
            if not ctx.needs_input_grad[6]:
                grad_residual = None
            elif ctx.codes[-1] == IDENTITY:
                grad_residual = grad
            absent = (p is None for p in parameters)
            grads = grad_x, *(None if a else g for a, g in zip(absent, grads, strict=True)), grad_residual
        return None, *grads, *(None,) * len(ctx.codes)


def _differentiable(ctx, grad):
    x, *parameters, y, residual, _, _ = ctx.saved_tensors
    mean_first, ties, *activations = ctx.codes
    gate, pre_activation, post_activation = (ACTIVATION_NAMES[c] for c in activations)
    needs = ctx.needs_input_grad[1:7]
    recomputed = residual is not None or post_activation not in ("identity", "relu")
    grad = before_epilogue(grad, y)

    def function(x, weight, bias, affine_weight, affine_bias, residual):
        return reference.spatial_gate(
            x,
            weight,
            bias,
            order=ORDER_NAMES[mean_first],
            ties=TIE_NAMES[ties],
            gate=gate,
            affine=None if affine_weight is None else (affine_weight, affine_bias),
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation if recomputed else "identity",
        )

    grads = differentiable_backward(function, (x, *parameters, residual), needs, grad)
    return grads if recomputed else (*grads[:5], grad if needs[5] else None)


def spatial_gate(backend, *arguments) -> Tensor:
    """The gated map, in x's dtype and layout; `arguments` as in the operator's schema."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:6]):
        return _SpatialGate.apply(backend, *arguments)
    return FORWARD[backend](*arguments)[0]
