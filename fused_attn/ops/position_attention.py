"""Op `position_attention`: for every position of the query the softmax over the key's positions of scale * q . k, and
the sum of the values by that.

With p the softmax, o the result and g its gradient: ds = p (g . v - g . o), grad_q = scale ds k, grad_k = scale ds^T q,
grad_v = p^T g. The matrix p is made again block by block, from each row's largest score and its sum's inverse, which
`state` has.
"""

from __future__ import annotations

import functools
import math

import torch

from .. import reference
from ..reference.layout import lies_channels_last
from .common import (
    accumulator,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    needs_grad,
    wants_graph,
)


def _fake(query, key, value, scale):
    shape = query.shape[0], value.shape[1], *query.shape[2:]
    from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

    same = statically_known_true(sym_eq(tuple(value.shape), shape))  # open sizes stay open
    out = empty_map(value) if same else query.new_empty(shape)
    return out, query.new_empty((query.shape[0], 2, math.prod(query.shape[2:])), dtype=accumulator(query.dtype))


def _fake_backward(grad, query, key, value, out, state, scale):
    return empty_map(query), empty_map(key), empty_map(value)


FORWARD = define(
    "position_attention",
    "(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor out, Tensor state)",
    _fake,
)
BACKWARD = define(
    "position_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor state, float scale)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _fake_backward,
)


def _formula(query, key, value, scale):
    return reference.position_attention(query, key, value, scale=scale)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, *results)


def _gradients(ctx, grad):
    query, key, value, out, state = ctx.saved_tensors
    (scale,) = ctx.codes
    if wants_graph():
        function = functools.partial(_formula, scale=scale)
        grads = differentiable_backward(function, (query, key, value), ctx.needs_input_grad[1:], grad)
    else:
        grads = below(BACKWARD[ctx.backend], grad, query, key, value, out, state, scale)
    return None, *grads


#: position_attention(backend, query, key, value, scale): (B, E, *positions of the query), in the value's layout where
#: it has as many positions.
position_attention = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula)


def _by_torch(inputs, scale):
    query, _, value = inputs
    rows = [t.flatten(2).transpose(1, 2)[:, None].contiguous() for t in inputs]
    attended = torch.nn.functional.scaled_dot_product_attention(rows[0], rows[1], rows[2], scale=scale)
    out = attended[:, 0].transpose(1, 2)
    out = out if lies_channels_last(value) else out.contiguous()
    return out.to(value.dtype).unflatten(2, query.shape[2:])


class _ByTorch(torch.autograd.Function):
    """Keeps the inputs alone, and calls torch's forward once more in the backward; the gradient of a gradient, which
    torch's kernels have not, is the formula's."""

    @staticmethod
    def forward(ctx, scale, *inputs):
        ctx.scale = scale
        ctx.save_for_backward(*inputs)
        return _by_torch(inputs, scale)

    @staticmethod
    def backward(ctx, grad):
        by_formula = wants_graph(grad)

        def function(*inputs):
            if by_formula:
                return reference.position_attention(*inputs, scale=ctx.scale)
            return _by_torch(inputs, ctx.scale)

        return None, *differentiable_backward(function, ctx.saved_tensors, ctx.needs_input_grad[1:], grad)


def by_torch(query, key, value, scale):
    """The same by scaled_dot_product_attention, whose memory-efficient kernel on a GPU takes values of another width
    than queries and keys, and writes no matrix. It reads rows of channels: channels_last maps as they lie."""
    if not torch.compiler.is_compiling() and needs_grad(query, key, value):
        return _ByTorch.apply(scale, query, key, value)
    return _by_torch((query, key, value), scale)
