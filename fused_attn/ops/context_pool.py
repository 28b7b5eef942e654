"""Op `context_pool`: the mean of a map over its positions, weighted by the softmax of a 1x1 convolution to one channel.

With p the softmax, c the mean, g its gradient and s = p * (g . x - g . c), a number a position: grad_x = p g + s weight
and grad_weight = sum(s x). The bias has none: a softmax does not see what all its logits have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..reference.squeeze import per_channel, space
from .common import (
    accumulator,
    apply_of,
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
from .scale import FORWARD as SCALE
from .scale import IDENTITY, scale
from .select import DOTS


def _fake(x, weight, bias):
    dtype = accumulator(x.dtype)
    descriptor, positions = x.shape[:2], math.prod(x.shape[2:])
    return (
        x.new_empty(descriptor),
        x.new_empty(descriptor, dtype=dtype),
        x.new_empty((x.shape[0], positions), dtype=dtype),
    )


def _fake_backward(grad, gate, grad_context, x, weight, bias, mean, shares):
    return empty_map(x), like_or_none(weight, x), like_or_none(bias, x)


# mean: the result before it is rounded; shares: (B, positions), the softmax.
FORWARD = define(
    "context_pool", "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor context, Tensor mean, Tensor shares)", _fake
)
# grad: what reached the map itself, or the map times a gate (B, C).
BACKWARD = define(
    "context_pool_backward",
    "(Tensor? grad, Tensor? gate, Tensor grad_context, Tensor x, Tensor weight, Tensor? bias, Tensor mean,"
    " Tensor shares) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, *results[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_context):
    return (None,) * 4 if grad_context is None else _gradients_with_map(ctx, None, None, grad_context)


def _gradients_with_map(ctx, grad, gate, grad_context):
    x, weight, bias, mean, shares = ctx.saved_tensors
    inputs = x, weight, bias
    if wants_graph():
        grad = grad if gate is None else grad * per_channel(gate, grad).to(grad.dtype)
        grads = _differentiable(ctx, inputs, grad, grad_context)
    else:
        grads = below(BACKWARD[ctx.backend], grad, gate, grad_context, *inputs, mean, shares)
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
        if grad_context is None:
            return None, grad, None, None
        return _gradients_with_map(ctx, grad, None, grad_context)


_apply_with_map = apply_of(_WithMap)


class _Context(torch.autograd.Function):
    """The context, and two carriers: tensors without values, of the map's and of the gate's shape.

    Autograd runs between this and `_Gate`, over the excitation. What `_Gate` knows in backward (the gradient of y and
    the gate) comes here as the carriers' gradients, so that the map's gradient is written once, with all that reaches
    it. `_Gate` passes the map none.
    """

    @staticmethod
    def forward(ctx, backend, *inputs):
        results = below(FORWARD[backend], *inputs)
        ctx.backend, ctx.codes = backend, ()
        _keep(ctx, inputs, results)
        context, mean, _ = results
        return context, context.new_zeros(()).expand(inputs[0].shape), mean.new_zeros(()).expand(mean.shape)

    @staticmethod
    def backward(ctx, grad_context, grad, gate):
        if grad_context is None and grad is None:
            return (None,) * 4
        if grad_context is None:
            x = ctx.saved_tensors[0]
            grad_context = x.new_zeros(x.shape[:2])
        return _gradients_with_map(ctx, grad, gate, grad_context)


_apply_context = apply_of(_Context)


class _Gate(torch.autograd.Function):
    """The map times a gate. The map's own gradient is `_Context`'s to write."""

    @staticmethod
    def forward(ctx, backend, gate, carrier_y, carrier_gate, x):
        ctx.save_for_backward(gate, x)
        ctx.backend = backend
        return _scaled(backend, x, gate)

    @staticmethod
    def backward(ctx, grad):
        gate, x = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            dots = None
        elif wants_graph(grad):
            dots = (grad * x).sum(space(x)).to(gate.dtype)
        else:
            dots = below(DOTS[ctx.backend], grad, [x], 1, None, None, IDENTITY).squeeze(1).to(gate.dtype)
        return None, dots, grad, gate, None


_apply_gate = apply_of(_Gate)


def _scaled(backend, x, gate):
    return below(SCALE[backend], x, gate, None, None, None, IDENTITY, IDENTITY)


#: context_pool(backend, x, weight, bias): (B, C) in x's dtype.
context_pool = differentiable(FORWARD, BACKWARD, _keep, _gradients, reference.context_pool)


def context_pool_with_map(backend, x, weight, bias) -> tuple[Tensor, Tensor]:
    """The map itself, then its context."""
    if needs_node(x):
        return _apply_with_map(backend, x, weight, bias)
    return x, context_pool(backend, x, weight, bias)


def context_gate(backend, x, weight, bias, excitation: Callable[[Tensor], Tensor]) -> Tensor:
    """The map times the gate, (B, C), that `excitation` makes of its context."""
    if not needs_node(x, weight, bias):
        gate = excitation(context_pool(backend, x, weight, bias))
        return scale(backend, x, gate, None, None, None, IDENTITY, IDENTITY)
    context, carrier_y, carrier_gate = _apply_context(backend, x, weight, bias)
    return _apply_gate(backend, excitation(context).contiguous(), carrier_y, carrier_gate, x)
