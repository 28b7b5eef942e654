"""Op `context_pool`: the mean of a map over its positions, weighted by the softmax of a 1x1 convolution to one channel.

With p the softmax, c the mean, g its gradient and s = p * (g . x - g . c), a number a position: grad_x = p g + s weight
and grad_weight = sum(s x). The bias has none: a softmax does not see what all its logits have in common.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from .common import (
    accumulator,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    needs_node,
    unless_absent,
    wants_graph,
)


def _fake(x, weight, bias):
    dtype = accumulator(x.dtype)
    descriptor, positions = x.shape[:2], math.prod(x.shape[2:])
    return (
        x.new_empty(descriptor),
        x.new_empty(descriptor, dtype=dtype),
        x.new_empty((x.shape[0], positions), dtype=dtype),
    )


def _fake_backward(grad, grad_context, x, weight, bias, mean, shares):
    return empty_map(x), like_or_none(weight, x), like_or_none(bias, x)


# mean: the result before it is rounded; shares: (B, positions), the softmax.
FORWARD = define(
    "context_pool", "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor context, Tensor mean, Tensor shares)", _fake
)
# grad: what reached the map itself.
BACKWARD = define(
    "context_pool_backward",
    "(Tensor? grad, Tensor grad_context, Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor shares)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, *results[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_context):
    return _gradients_with_map(ctx, None, grad_context)


def _gradients_with_map(ctx, grad, grad_context):
    if grad_context is None:
        return None, grad, None, None
    x, weight, bias, mean, shares = ctx.saved_tensors
    inputs = x, weight, bias
    if wants_graph():
        grads = _differentiable(ctx, inputs, grad, grad_context)
    else:
        grads = below(BACKWARD[ctx.backend], grad, grad_context, *inputs, mean, shares)
        grads = unless_absent(inputs, grads)
    return None, *grads


def _differentiable(ctx, inputs, grad, grad_context):
    def function(x, weight, bias):
        context = reference.context_pool(x, weight, bias)
        return context if grad is None else (x * 1, context)

    grads = grad_context if grad is None else (grad, grad_context)
    return differentiable_backward(function, inputs, ctx.needs_input_grad[1:], grads)


class _WithMap(torch.autograd.Function):
    """The map itself and its context: the gradient of whatever else uses the map comes through here and meets the
    context's in one pass."""

    @staticmethod
    def forward(ctx, backend, *inputs):
        results = below(FORWARD[backend], *inputs)
        ctx.backend, ctx.codes = backend, ()
        _keep(ctx, inputs, results)
        return inputs[0].view_as(inputs[0]), results[0]

    @staticmethod
    def backward(ctx, grad, grad_context):
        return _gradients_with_map(ctx, grad, grad_context)


#: context_pool(backend, x, weight, bias): (B, C) in x's dtype.
context_pool = differentiable(FORWARD, BACKWARD, _keep, _gradients)


def context_pool_with_map(backend, x, weight, bias) -> tuple[Tensor, Tensor]:
    """The map itself, then its context."""
    if needs_node(x):
        return _WithMap.apply(backend, x, weight, bias)
    return x, context_pool(backend, x, weight, bias)
