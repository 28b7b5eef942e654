"""Op `spatial_gate`: channel pool, a convolution of its two maps to one, and scale, as one operator.

Between forward and backward travel x (y too where a ReLU follows), `state`, (B, 3, *spatial) in the
accumulator's dtype (the maximum over channels, the mean, the gate's logits), and `index`, int32 (B, *spatial):
the maximum's channel ("first") or its multiplicity ("even"). With a BatchNorm between convolution and gate, norm_weight
given, state has a fourth row, the convolution's output, and `statistics` (2,) are its mean and biased variance over
the batch; else statistics has size (0,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..codes import FUNCTIONS, ORDERS
from ..reference.layout import lies_channels_last
from ..reference.spatial_gate import normalised, spatial_logits
from ..reference.squeeze import prologue
from .common import (
    accumulator,
    affine_or_none,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    first_and_last,
    like_or_none,
    unless_absent,
    wants_graph,
)
from .inlined import for_inductor
from .resident import Clusters, Limits, ask
from .scale import ACTIVATION_NAMES, IDENTITY, before_epilogue, of_residual, saved_for_epilogue, scaled
from .squeeze import TIE_NAMES

ORDER_NAMES = tuple(ORDERS)

_TENSORS = (
    "Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? affine_weight, Tensor? affine_bias, Tensor? residual"
)
_CODES = "float eps, int mean_first, int ties, int gate, int pre_activation, int post_activation"


def empty_state(x: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(state, index, statistics) of a spatial gate on x."""
    batch, _, *spatial = x.shape
    acc = accumulator(x.dtype)
    rows, numbers = (3, 0) if norm_weight is None else (4, 2)
    state = x.new_empty((batch, rows, *spatial), dtype=acc)
    return state, x.new_empty((batch, *spatial), dtype=torch.int32), x.new_empty(numbers, dtype=acc)


def factor_of_space(u: Callable[[], Tensor], tensors: Sequence[Tensor | None], codes: Sequence[Any]) -> Tensor:
    """For a formula: the (B, 1, *spatial) gate in the accumulators' dtype of the map that u() is made anew in that.
    tensors: from weight to norm_bias; codes: from eps to gate."""
    weight, bias, norm_weight, norm_bias = (None if t is None else t.to(accumulator(t.dtype)) for t in tensors)
    eps, mean_first, _, gate = codes
    poolings: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "max": torch.amax}
    pooled = torch.cat([poolings[name](u(), 1, keepdim=True) for name in ORDER_NAMES[mean_first]], 1)
    assert weight is not None
    logits = spatial_logits(pooled, weight, bias)
    if norm_weight is not None and norm_bias is not None:
        logits, _, _ = normalised(logits, (norm_weight, norm_bias, eps))
    return FUNCTIONS[ACTIVATION_NAMES[gate]](logits)


def _formula(x, weight, bias, norm_weight, norm_bias, affine_weight, affine_bias, residual, *codes):
    *of_space, pre_activation, post_activation = codes
    affine = affine_or_none(affine_weight, affine_bias)

    def u():
        return prologue(x.to(accumulator(x.dtype)), affine, ACTIVATION_NAMES[pre_activation])

    gate = factor_of_space(u, (weight, bias, norm_weight, norm_bias), of_space)
    return scaled(x, gate, affine_weight, affine_bias, residual, pre_activation, post_activation)


def _fake(x, weight, bias, norm_weight, *others):
    return empty_map(x), *empty_state(x, norm_weight)


def _fake_backward(grad, x, y, state, index, statistics, *others):
    *parameters, _ = others[:7]
    return (
        empty_map(x),
        x.new_empty(0) if others[-1] == IDENTITY else empty_map(x),
        *(like_or_none(t, x) for t in parameters),
    )


FORWARD = define(
    "spatial_gate",
    f"(Tensor x, {_TENSORS}, {_CODES}) -> (Tensor y, Tensor state, Tensor index, Tensor statistics)",
    _fake,
)
for_inductor(FORWARD["cpu"], _formula)
BACKWARD = define(
    "spatial_gate_backward",
    f"(Tensor grad, Tensor x, Tensor? y, Tensor state, Tensor index, Tensor statistics, {_TENSORS}, {_CODES})"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias, Tensor grad_norm_weight,"
    " Tensor grad_norm_bias, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def three_axes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The spatial axes of a map, and of the convolution's kernel, with leading ones up to three."""
    axes = 5 - x.dim()
    return *(1,) * axes, *x.shape[2:], *(1,) * axes, *weight.shape[2:]


def resident_clusters(limits: Limits, x: Tensor, weight: Tensor, *arguments) -> Clusters:
    """Over how many blocks the resident kernels spread a sample of x; `arguments` as in the operator's schema."""
    _, norm_weight, _, affine_weight, *_, pre_activation, post_activation = arguments
    if norm_weight is not None:  # statistics of the batch need all samples
        return Clusters(0, 0)
    no_channel_gate = False, 0, 0, 0, 0
    ends = affine_weight is not None, pre_activation, post_activation
    sizes = x.shape[1], *three_axes(x, weight), x.itemsize
    return ask("spatial_gate", *sizes, lies_channels_last(x), *no_channel_gate, *ends, *limits)


def _keep(ctx, inputs, results):
    y, *states = results
    ctx.save_for_backward(*inputs[:-1], *saved_for_epilogue(y, inputs[-1], ctx.codes[-1]), *states)
    ctx.mark_non_differentiable(states[-1])


def _gradients(ctx, grad, *_):
    x, *parameters, y, residual, state, index, statistics = ctx.saved_tensors
    if wants_graph():
        grads = _differentiable(ctx, x, parameters, y, residual, grad)
    else:
        grad_x, grad_residual, *grads = below(
            BACKWARD[ctx.backend], grad, x, y, state, index, statistics, *parameters, residual, *ctx.codes
        )
        grads = grad_x, *unless_absent(parameters, grads), of_residual(ctx, 8, grad, grad_residual)
    return None, *grads


def _differentiable(ctx, x, parameters, y, residual, grad):
    eps, mean_first, ties, *activations = ctx.codes
    gate, pre_activation, post_activation = (ACTIVATION_NAMES[c] for c in activations)
    needs = ctx.needs_input_grad[1:]
    recomputed = residual is not None or post_activation not in ("identity", "relu")
    grad = before_epilogue(grad, y)

    def function(x, weight, bias, norm_weight, norm_bias, affine_weight, affine_bias, residual):
        y = reference.spatial_gate(
            x,
            weight,
            bias,
            batch_norm=None if norm_weight is None else (norm_weight, norm_bias, eps),
            order=ORDER_NAMES[mean_first],
            ties=TIE_NAMES[ties],
            gate=gate,
            affine=affine_or_none(affine_weight, affine_bias),
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation if recomputed else "identity",
        )
        return y if norm_weight is None else y[0]

    grads = differentiable_backward(function, (x, *parameters, residual), needs, grad)
    return grads if recomputed else (*grads[:7], grad if needs[7] else None)


#: spatial_gate(backend, *arguments): (y, statistics), the gated map in x's dtype and layout; `arguments` as in the
#: operator's schema.
spatial_gate = differentiable(
    FORWARD,
    BACKWARD,
    _keep,
    _gradients,
    _formula,
    shown=first_and_last,
    resident_clusters=resident_clusters,
)
