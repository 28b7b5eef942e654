"""Op `mixed_scale`: a map times a product, a sum, ... of gates a channel, a position, a row and a column.

One pass over each map: forward reads x and writes y, backward reads grad and x and writes grad_x, with all gates'
gradients from the same pass.
"""

from __future__ import annotations

from .. import reference
from ..codes import COMBINES
from .common import (
    as_it_is,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    wants_graph,
)

COMBINE_NAMES = tuple(COMBINES)


def _fake(x, channel, spatial, rows, columns, combine):
    return empty_map(x)


def _fake_backward(grad, x, channel, spatial, rows, columns, combine):
    return (empty_map(x), *(like_or_none(gate, x) for gate in (channel, spatial, rows, columns)))


FORWARD = define(
    "mixed_scale",
    "(Tensor x, Tensor? channel, Tensor? spatial, Tensor? rows, Tensor? columns, int combine) -> Tensor",
    _fake,
)
BACKWARD = define(
    "mixed_scale_backward",
    "(Tensor grad, Tensor x, Tensor? channel, Tensor? spatial, Tensor? rows, Tensor? columns, int combine)"
    " -> (Tensor grad_x, Tensor grad_channel, Tensor grad_spatial, Tensor grad_rows, Tensor grad_columns)",
    _fake_backward,
)


def _formula(*arguments):
    *inputs, combine = arguments
    return _reference(combine)(*inputs)


def _keep(ctx, inputs, y):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    inputs = ctx.saved_tensors
    if wants_graph():
        grads = differentiable_backward(_reference(*ctx.codes), inputs, ctx.needs_input_grad[1:], grad)
    else:
        grads = below(BACKWARD[ctx.backend], grad, *inputs, *ctx.codes)
        grads = tuple(None if given is None else found for given, found in zip(inputs, grads, strict=True))
    return None, *grads


def _reference(combine: int):
    def function(x, channel, spatial, rows, columns):
        name = COMBINE_NAMES[combine]
        return reference.mixed_scale(x, channel=channel, spatial=spatial, rows=rows, columns=columns, combine=name)

    return function


#: mixed_scale(backend, x, channel, spatial, rows, columns, combine): the scaled map, in x's dtype and layout; channel
#: is (B, C).
mixed_scale = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula, shown=as_it_is)
