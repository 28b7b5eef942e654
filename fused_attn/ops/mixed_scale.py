"""Op `mixed_scale`: a map times a product, a sum, ... of gates a channel, a position, a row and a column.

One pass over each map: forward reads x and writes y, backward reads grad and x and writes grad_x, with all gates'
gradients from the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..codes import COMBINES
from .common import define, differentiable_backward, empty_map, like_or_none, needs_grad, wants_graph

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


class _MixedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, channel, spatial, rows, columns, combine):
        ctx.save_for_backward(x, channel, spatial, rows, columns)
        ctx.backend, ctx.combine = backend, combine
        return FORWARD[backend](x, channel, spatial, rows, columns, combine)

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        if wants_graph():
            grads = differentiable_backward(_reference(ctx.combine), inputs, ctx.needs_input_grad[1:6], grad)
        else:
            grads = BACKWARD[ctx.backend](grad, *inputs, ctx.combine)
            grads = tuple(None if given is None else found for given, found in zip(inputs, grads, strict=True))
        return None, *grads, None


def _reference(combine: int):
    def function(x, channel, spatial, rows, columns):
        name = COMBINE_NAMES[combine]
        return reference.mixed_scale(x, channel=channel, spatial=spatial, rows=rows, columns=columns, combine=name)

    return function


def mixed_scale(backend, x, channel, spatial, rows, columns, combine) -> Tensor:
    """The scaled map, in x's dtype and layout; channel is (B, C)."""
    arguments = (x, channel, spatial, rows, columns, combine)
    if needs_grad(*arguments[:5]):
        return _MixedScale.apply(backend, *arguments)
    return FORWARD[backend](*arguments)
