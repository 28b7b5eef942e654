"""Op `moments_gate`: a map times a gate a channel made of its mean and variance over space.

Of operators that others have:

forward     moments (read x); scale (read x, write y)
backward    select_dots (read grad, x); select_sum (read grad, x, write grad_x): grad * gate + x * a; then a number a
            channel is added (read grad_x, write it)

Autograd runs the excitation between two nodes, `_Moments` and energy_gate's `_Gate`, which hands the gradient of y and
the gate to `_Moments` as the gradients of two carriers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.squeeze import per_channel
from .common import apply_of, below, needs_node, wants_graph
from .energy_gate import apply_gate
from .norm_gate import MOMENTS
from .scale import IDENTITY, scale
from .select import SUM as WEIGHTED_SUM


def _moments(backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, (B, C), in the accumulators' dtype."""
    found = MOMENTS[backend](x) if torch.compiler.is_exporting() else below(MOMENTS[backend], x)
    pivot, rest, squares = found.unbind(1)
    return pivot + rest, squares / math.prod(x.shape[2:])


class _Moments(torch.autograd.Function):
    """Mean, variance, and two carriers: tensors without values, of the map's and of the gate's shape."""

    @staticmethod
    def forward(ctx, backend, x):
        mean, variance = _moments(backend, x)
        ctx.backend = backend
        ctx.save_for_backward(x, mean)
        nothing = mean.new_zeros(())
        return mean, variance, x.new_zeros(()).expand(x.shape), nothing.expand(mean.shape)

    @staticmethod
    def backward(ctx, grad_mean, grad_variance, grad, gate):
        x, mean = ctx.saved_tensors
        count = math.prod(x.shape[2:])
        if wants_graph(grad_mean, grad_variance, grad):
            mean = x.to(mean.dtype).mean(tuple(range(2, x.dim())))  # of which there are gradients, too
            slope = 2 / count * grad_variance
            shift = grad_mean / count - slope * mean
            terms = grad * per_channel(gate, x).to(x.dtype), x * per_channel(slope, x).to(x.dtype)
            return None, terms[0] + terms[1] + per_channel(shift, x).to(x.dtype)
        slope = 2 / count * grad_variance
        shift = grad_mean / count - slope * mean
        weights = torch.stack([gate.to(slope.dtype), slope], 1)
        result = below(WEIGHTED_SUM[ctx.backend], [grad, x], weights, 2, None, None, IDENTITY)
        return None, result + per_channel(shift, x).to(x.dtype)


_apply_moments = apply_of(_Moments)


def moments_gate(backend: str, x: Tensor, excitation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x times the gate, (B, C), that `excitation` makes of its mean and variance."""
    if not needs_node(x):
        gate = excitation(*_moments(backend, x))
        return scale(backend, x, gate, None, None, None, IDENTITY, IDENTITY)
    mean, variance, carrier_y, carrier_gate = _apply_moments(backend, x)
    return apply_gate(backend, excitation(mean, variance).contiguous(), carrier_y, carrier_gate, x, None)
