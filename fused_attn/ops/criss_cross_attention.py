"""Op `criss_cross_attention`: for every position the softmax of q . k over its column, itself left out, and its row,
and the sum of their values by that.

With p the softmax, o the result and g its gradient: ds = p (g . v - g . o), grad_q = ds k, grad_k = ds^T q,
grad_v = p^T g, along columns and along rows. p is made again line by line, from each
position's largest score and the inverse of its sum, which `state` has.
"""

from __future__ import annotations

import math

from .. import reference
from ..reference.layout import laid
from .common import (
    accumulator,
    below,
    define,
    differentiable,
    differentiable_backward,
    differentiable_by_reference,
    empty_map,
    wants_graph,
)


def _fake(query, key, value):
    state = query.new_empty((query.shape[0], 2, math.prod(query.shape[2:])), dtype=accumulator(query.dtype))
    return empty_map(value), state


def _fake_backward(grad, query, key, value, out, state):
    return empty_map(query), empty_map(key), empty_map(value)


#: A copy of a 4-D map whose channels are next to each other, as here they are read, or whose positions are.
RELAYOUT = define("relayout", "(Tensor x, int channels_last) -> Tensor", laid, module="criss_cross_attention")
differentiable_by_reference(RELAYOUT, lambda x, channels_last: [laid(x, channels_last)], 1)
FORWARD = define(
    "criss_cross_attention", "(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor state)", _fake
)
BACKWARD = define(
    "criss_cross_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor state)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _fake_backward,
)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, *results)


def _gradients(ctx, grad):
    saved = ctx.saved_tensors
    if wants_graph():
        grads = differentiable_backward(reference.criss_cross_attention, saved[:3], ctx.needs_input_grad[1:], grad)
    else:
        grads = below(BACKWARD[ctx.backend], grad, *saved)
    return None, *grads


#: criss_cross_attention(backend, query, key, value): (B, E, H, W), in the value's layout.
criss_cross_attention = differentiable(FORWARD, BACKWARD, _keep, _gradients, reference.criss_cross_attention)
