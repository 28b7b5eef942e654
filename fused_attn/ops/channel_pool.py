"""Op `channel_pool`: maximum and mean over the channels of a map in one pass over it."""

from __future__ import annotations

import torch

from ..reference.channel_pool import channel_max
from ..reference.squeeze import prologue
from .common import (
    affine_or_none,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    shape_of,
    wants_graph,
)
from .scale import ACTIVATION_NAMES
from .squeeze import EVEN, IDENTITY

_ARGUMENTS = "Tensor? affine_weight, Tensor? affine_bias, int pre_activation, int mean_first, int ties"


def _fake(x, affine_weight, affine_bias, pre_activation, mean_first, ties):
    batch, _, *spatial = x.shape
    return x.new_empty((batch, 2, *spatial)), x.new_empty((batch, *spatial), dtype=torch.int32)


def _fake_backward(grad, x, pooled, index, affine_weight, affine_bias, pre_activation, mean_first, ties):
    return empty_map(x), like_or_none(affine_weight, x), like_or_none(affine_bias, x)


FORWARD = define("channel_pool", f"(Tensor x, {_ARGUMENTS}) -> (Tensor pooled, Tensor index)", _fake)
BACKWARD = define(
    "channel_pool_backward",
    f"(Tensor grad, Tensor x, Tensor pooled, Tensor index, {_ARGUMENTS})"
    " -> (Tensor grad_x, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def _pools(x, affine_weight, affine_bias, pre_activation, mean_first, peak_of):
    u = prologue(x, affine_or_none(affine_weight, affine_bias), ACTIVATION_NAMES[pre_activation])
    pools = peak_of(u), u.mean(1, keepdim=True)
    return torch.cat(pools[::-1] if mean_first else pools, 1)


def _formula(x, affine_weight, affine_bias, pre_activation, mean_first, ties):
    return _pools(x, affine_weight, affine_bias, pre_activation, mean_first, lambda u: channel_max(u, "even"))


def _keep(ctx, inputs, results):
    x, affine_weight, affine_bias = inputs
    pre_activation, _, ties = ctx.codes
    if affine_weight is None and pre_activation == IDENTITY and ties != EVEN:
        x = shape_of(x)
    pooled, index = results
    ctx.save_for_backward(x, affine_weight, affine_bias, pooled if ties == EVEN else shape_of(pooled), index)


def _gradients(ctx, grad):
    x, affine_weight, affine_bias, pooled, index = ctx.saved_tensors
    if wants_graph():
        grads = _differentiable(ctx, (x, affine_weight, affine_bias), index, grad)
    else:
        grads = below(BACKWARD[ctx.backend], grad, x, pooled, index, affine_weight, affine_bias, *ctx.codes)
        if affine_weight is None:
            grads = (grads[0], None, None)
    return None, *grads


def _differentiable(ctx, inputs, index, grad):
    pre_activation, mean_first, ties = ctx.codes

    def peak_of(u):
        return channel_max(u, "even") if ties == EVEN else u.gather(1, index.long().unsqueeze(1))

    def function(x, weight, bias):
        return _pools(x, weight, bias, pre_activation, mean_first, peak_of)

    return differentiable_backward(function, inputs, ctx.needs_input_grad[1:], grad)


#: channel_pool(backend, *arguments): (B, 2, *spatial), contiguous, in x's dtype; `arguments` as in the schema.
channel_pool = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula)
