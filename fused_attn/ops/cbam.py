"""Op `cbam`: a channel gate and a spatial gate on its output, as one operator; the map between is never written.

Between forward and backward travel x (y too where a ReLU follows) and both gates' states: that of the channel
gate, (B, 2C + hidden [+ C [+ hidden]]) with its index, and that of the spatial gate, (B, 3 or 4, *spatial) with its
index and statistics (see ops/channel_gate.py and ops/spatial_gate.py).
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..reference.squeeze import per_channel
from .channel_gate import LAYER_NAMES, empty_state, excitation_of, factor
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
from .spatial_gate import ORDER_NAMES, factor_of_space, three_axes
from .spatial_gate import empty_state as empty_spatial_state
from .squeeze import POOL_NAMES, TIE_NAMES

_TENSORS = (
    "Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor spatial_weight, Tensor? spatial_bias,"
    " Tensor? norm_weight, Tensor? norm_bias, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual"
)
_CODES = (
    "float eps, int layer, int pool, int channel_ties, int activation, int channel_gate, int mean_first,"
    " int spatial_ties, int spatial_gate, int pre_activation, int post_activation"
)
_STATE = "Tensor channel_state, Tensor channel_index, Tensor state, Tensor index, Tensor statistics"


def _formula(x, weight1, bias1, weight2, bias2, *others):
    *spatial, affine_weight, affine_bias, residual, eps = others[:8]
    layer, pool, channel_ties, activation, gate, *of_space, pre_activation, post_activation = others[8:]
    codes = layer, pool, channel_ties, activation, gate, pre_activation
    channel = factor(x, (weight1, bias1, weight2, bias2), affine_weight, affine_bias, codes)

    def u():
        wide = x.to(accumulator(x.dtype))
        return scaled(wide, channel, affine_weight, affine_bias, None, pre_activation, IDENTITY)

    gate = factor_of_space(u, spatial, (eps, *of_space)) * per_channel(channel, x)
    return scaled(x, gate, affine_weight, affine_bias, residual, pre_activation, post_activation)


def _fake(x, *arguments):
    weight1, _, weight2, _, _, _, norm_weight = arguments[:7]
    _, _, pool, channel_ties = arguments[11:15]
    return empty_map(x), *empty_state(x, weight1, weight2, pool, channel_ties), *empty_spatial_state(x, norm_weight)


def _fake_backward(grad, x, y, channel_state, channel_index, state, index, statistics, *others):
    *parameters, _ = others[:11]
    return (
        empty_map(x),
        x.new_empty(0) if others[-1] == IDENTITY else empty_map(x),
        *(like_or_none(t, x) for t in parameters),
    )


FORWARD = define("cbam", f"(Tensor x, {_TENSORS}, {_CODES}) -> (Tensor y, {_STATE})", _fake)
for_inductor(FORWARD["cpu"], _formula)
BACKWARD = define(
    "cbam_backward",
    f"(Tensor grad, Tensor x, Tensor? y, {_STATE}, {_TENSORS}, {_CODES})"
    " -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2,"
    " Tensor grad_bias2, Tensor grad_spatial_weight, Tensor grad_spatial_bias, Tensor grad_norm_weight,"
    " Tensor grad_norm_bias, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def resident_clusters(limits: Limits, x: Tensor, *arguments) -> Clusters:
    """Over how many blocks the resident kernels spread a sample of x; `arguments` as in the operator's schema."""
    weight1, _, weight2, _, spatial_weight, _, norm_weight, _, affine_weight, *_ = arguments
    _, layer, pool, *_, pre_activation, post_activation = arguments[11:]
    if norm_weight is not None:  # statistics of the batch need all samples
        return Clusters(0, 0)
    last, *layers = excitation_of(x, weight1, weight2)
    ends = affine_weight is not None, pre_activation, post_activation
    sizes = x.shape[1], *three_axes(x, spatial_weight), x.itemsize
    return ask("spatial_gate", *sizes, last, True, *layers, layer, pool, *ends, *limits)


def _keep(ctx, inputs, results):
    y, *states = results
    ctx.save_for_backward(*inputs[:-1], *saved_for_epilogue(y, inputs[-1], ctx.codes[-1]), *states)
    ctx.mark_non_differentiable(states[-1])


def _gradients(ctx, grad, *_):
    x, *parameters, y, residual, channel_state, channel_index, state, index, statistics = ctx.saved_tensors
    if wants_graph():
        grads = _differentiable(ctx, x, parameters, y, residual, grad)
    else:
        states = channel_state, channel_index, state, index, statistics
        grad_x, grad_residual, *grads = below(
            BACKWARD[ctx.backend], grad, x, y, *states, *parameters, residual, *ctx.codes
        )
        grads = grad_x, *unless_absent(parameters, grads), of_residual(ctx, 12, grad, grad_residual)
    return None, *grads


def _differentiable(ctx, x, parameters, y, residual, grad):
    eps, *codes = ctx.codes
    layer, pool, channel_ties, activation, channel_gate, mean_first, spatial_ties, spatial_gate, pre, post = codes
    post_activation = ACTIVATION_NAMES[post]
    needs = ctx.needs_input_grad[1:]
    recomputed = residual is not None or post_activation not in ("identity", "relu")
    grad = before_epilogue(grad, y)

    def function(x, *tensors):
        *weights, norm_weight, norm_bias, affine_weight, affine_bias, residual = tensors
        y = reference.cbam(
            x,
            *weights,
            batch_norm=None if norm_weight is None else (norm_weight, norm_bias, eps),
            layer=LAYER_NAMES[layer],
            pool=POOL_NAMES[pool],
            channel_ties=TIE_NAMES[channel_ties],
            activation=ACTIVATION_NAMES[activation],
            channel_gate=ACTIVATION_NAMES[channel_gate],
            order=ORDER_NAMES[mean_first],
            spatial_ties=TIE_NAMES[spatial_ties],
            spatial_gate=ACTIVATION_NAMES[spatial_gate],
            affine=affine_or_none(affine_weight, affine_bias),
            pre_activation=ACTIVATION_NAMES[pre],
            residual=residual,
            post_activation=post_activation if recomputed else "identity",
        )
        return y if norm_weight is None else y[0]

    grads = differentiable_backward(function, (x, *parameters, residual), needs, grad)
    return grads if recomputed else (*grads[:11], grad if needs[11] else None)


#: cbam(backend, *arguments): (y, statistics), the gated map in x's dtype and layout; `arguments` as in the operator's
#: schema.
cbam = differentiable(
    FORWARD,
    BACKWARD,
    _keep,
    _gradients,
    _formula,
    shown=first_and_last,
    resident_clusters=resident_clusters,
)
