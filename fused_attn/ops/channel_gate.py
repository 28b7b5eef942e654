"""Op `channel_gate`: squeeze, excite and scale as one operator, so that a backend may keep a sample on chip.

Between forward and backward travel x (y too where a ReLU follows) and `state`, (B, 2C + hidden [+ C]) in the
accumulator's dtype: the descriptors, the gate's logits, the hidden logits and, for ties shared evenly, the
maxima; with a maximum also `index` (B, C), its position ("first") or multiplicity ("even"). With both pools the
rows of `state` are the averages, the logits, the averages' hidden logits, the maxima and theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..codes import LAYERS, TIES
from ..reference.channel_gate import excite, gate_alone
from ..reference.layout import lies_channels_last
from .common import (
    accumulator,
    affine_or_none,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    unless_absent,
    wants_graph,
)
from .inlined import for_inductor
from .resident import Clusters, Limits, ask
from .scale import ACTIVATION_NAMES, IDENTITY, before_epilogue, of_residual, saved_for_epilogue, scaled
from .squeeze import AVG, BOTH, POOL_NAMES, TIE_NAMES, pooled

LAYER_NAMES = tuple(LAYERS)

_TENSORS = (
    "Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2,"
    " Tensor? affine_weight, Tensor? affine_bias, Tensor? residual"
)
_CODES = "int layer, int pool, int ties, int activation, int gate, int pre_activation, int post_activation"


def empty_state(
    x: Tensor, weight1: Tensor | None, weight2: Tensor | None, pool: int, ties: int
) -> tuple[Tensor, Tensor]:
    """(state, index) of a channel gate on x."""
    batch, channels = x.shape[:2]
    hidden = 0 if weight1 is None or weight2 is None else weight1.shape[0]
    width = 2 * channels + hidden
    if pool == BOTH:
        width += channels + hidden
    elif pool != AVG and ties == TIES["even"]:
        width += channels
    return (
        x.new_empty((batch, width), dtype=accumulator(x.dtype)),
        x.new_empty((0,) if pool == AVG else (batch, channels), dtype=torch.int32),
    )


def factor(
    x: Tensor,
    weights: Sequence[Tensor | None],
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    codes: Sequence[int],
) -> Tensor:
    """For a formula: the (B, C) gate in the accumulators' dtype. codes: from layer to pre_activation."""
    layer, pool, _, activation, gate, pre_activation = codes
    wide = accumulator(x.dtype)
    wider = [None if w is None else w.to(wide) for w in weights]
    affine = affine_or_none(affine_weight, affine_bias)

    def logits_of(descriptor: Tensor) -> Tensor:
        return excite(descriptor, *wider, layer=LAYER_NAMES[layer], activation=ACTIVATION_NAMES[activation])

    squeeze = functools.partial(pooled, affine=affine, pre_activation=ACTIVATION_NAMES[pre_activation])
    names = {"pool": POOL_NAMES[pool], "ties": "even", "gate": ACTIVATION_NAMES[gate]}
    return gate_alone(x, squeeze, logits_of, **names)


def _formula(x, weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, *codes):
    affine = affine_weight, affine_bias
    gate = factor(x, (weight1, bias1, weight2, bias2), *affine, codes[:-1])
    return scaled(x, gate, *affine, residual, *codes[-2:])


def _fake(
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    affine_weight,
    affine_bias,
    residual,
    layer,
    pool,
    ties,
    activation,
    gate,
    pre_activation,
    post_activation,
):
    return empty_map(x), *empty_state(x, weight1, weight2, pool, ties)


def _fake_backward(
    grad,
    x,
    y,
    state,
    index,
    weight1,
    bias1,
    weight2,
    bias2,
    affine_weight,
    affine_bias,
    residual,
    layer,
    pool,
    ties,
    activation,
    gate,
    pre_activation,
    post_activation,
):
    return (
        empty_map(x),
        x.new_empty(0) if post_activation == IDENTITY else empty_map(x),
        *(like_or_none(t, x) for t in (weight1, bias1, weight2, bias2, affine_weight, affine_bias)),
    )


FORWARD = define("channel_gate", f"(Tensor x, {_TENSORS}, {_CODES}) -> (Tensor y, Tensor state, Tensor index)", _fake)
for_inductor(FORWARD["cpu"], _formula)
BACKWARD = define(
    "channel_gate_backward",
    f"(Tensor grad, Tensor x, Tensor? y, Tensor state, Tensor index, {_TENSORS}, {_CODES})"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2,"
    " Tensor grad_bias2, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def excitation_of(x: Tensor, weight1: Tensor | None, weight2: Tensor | None) -> tuple[bool, int, int]:
    """What decides how a sample of x lies in shared memory: (whether as channels_last, dense layers, hidden values)."""
    last = lies_channels_last(x)
    if weight2 is None:
        return last, 0 if weight1 is None else 1, 0
    assert weight1 is not None
    return last, 2, weight1.shape[0]


def resident_clusters(limits: Limits, x: Tensor, *arguments) -> Clusters:
    """Over how many blocks the resident kernels spread a sample of x; `arguments` as in the operator's schema."""
    weight1, _, weight2, _, affine_weight, _, _, layer, pool, _, _, _, pre_activation, post_activation = arguments
    channels, *spatial = x.shape[1:]
    last, *layers = excitation_of(x, weight1, weight2)
    ends = affine_weight is not None, pre_activation, post_activation
    return ask("channel_gate", channels, math.prod(spatial), x.itemsize, last, *layers, layer, pool, *ends, *limits)


def _keep(ctx, inputs, results):
    y, state, index = results
    ctx.save_for_backward(*inputs[:-1], *saved_for_epilogue(y, inputs[-1], ctx.codes[-1]), state, index)


def _gradients(ctx, grad):
    x, *parameters, y, residual, state, index = ctx.saved_tensors
    if wants_graph():
        grads = _differentiable(ctx, (x, *parameters, residual), y, grad)
    else:
        grad_x, grad_residual, *grads = below(
            BACKWARD[ctx.backend], grad, x, y, state, index, *parameters, residual, *ctx.codes
        )
        grads = grad_x, *unless_absent(parameters, grads), of_residual(ctx, 8, grad, grad_residual)
    return None, *grads


def _differentiable(ctx, inputs, y, grad):
    layer, pool, ties, *activations = ctx.codes
    activation, gate, pre_activation, post_activation = (ACTIVATION_NAMES[c] for c in activations)
    needs = ctx.needs_input_grad[1:]
    recomputed = inputs[-1] is not None or post_activation not in ("identity", "relu")
    grad = before_epilogue(grad, y)

    def function(x, weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual):
        return reference.channel_gate(
            x,
            weight1,
            bias1,
            weight2,
            bias2,
            layer=LAYER_NAMES[layer],
            pool=POOL_NAMES[pool],
            ties=TIE_NAMES[ties],
            activation=activation,
            gate=gate,
            affine=affine_or_none(affine_weight, affine_bias),
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation if recomputed else "identity",
        )

    grads = differentiable_backward(function, inputs, needs, grad)
    return grads if recomputed else (*grads[:7], grad if needs[7] else None)


#: channel_gate(backend, *arguments): the gated map, in x's dtype and layout; `arguments` as in the operator's schema.
channel_gate = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula, resident_clusters=resident_clusters)
