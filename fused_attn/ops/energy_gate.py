"""Op `energy_gate`: a map times a gate a channel made of its energy, the sum of its squares over space.

Of operators that others have:

forward     select_dots of the map with itself (read x); scale (read x, write y), with the bias as a residual
backward    select_dots (read grad, x); select_sum (read grad, x, write grad_x): grad * gate + x * 2 grad_energy

Autograd runs the excitation between two nodes, `_Energy` and `_Gate`, which hands the gradient of y and the gate to
`_Energy` as the gradients of two carriers, as context_gate's do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.energy_gate import energy as plain_energy
from ..reference.squeeze import per_channel, space
from .common import apply_of, below, needs_node, wants_graph
from .scale import FORWARD as SCALE
from .scale import IDENTITY, scale
from .select import DOTS
from .select import SUM as WEIGHTED_SUM


def _energy(backend: str, x: Tensor) -> Tensor:
    """(B, C), in the accumulators' dtype. In an exported program plain PyTorch, which has gradients there."""
    if torch.compiler.is_exporting():
        return plain_energy(x)
    dots: Tensor = below(DOTS[backend], x, [x], 1, None, None, IDENTITY)
    return dots.squeeze(1)


def _residual(x: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else per_channel(bias, x).to(x.dtype).expand(x.shape)


class _Energy(torch.autograd.Function):
    """The energy, and two carriers: tensors without values, of the map's and of the gate's shape."""

    @staticmethod
    def forward(ctx, backend, x):
        energy = _energy(backend, x)
        ctx.backend = backend
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        nothing = energy.new_zeros(())
        return energy, x.new_zeros(()).expand(x.shape), nothing.expand(energy.shape)

    @staticmethod
    def backward(ctx, grad_energy, grad, gate):
        (x,) = ctx.saved_tensors
        if grad_energy is None or grad is None or wants_graph(grad_energy, grad):
            terms = []
            if grad_energy is not None:
                terms.append(x * per_channel(2 * grad_energy, x).to(x.dtype))
            if grad is not None:
                terms.append(grad * per_channel(gate, x).to(x.dtype))
            return None, sum(terms) if terms else None
        weights = torch.stack([gate.to(grad_energy.dtype), 2 * grad_energy], 1)
        return None, below(WEIGHTED_SUM[ctx.backend], [grad, x], weights, 2, None, None, IDENTITY)


class _Gate(torch.autograd.Function):
    """The map times a gate, with the bias. The map's own gradient is `_Energy`'s to write."""

    @staticmethod
    def forward(ctx, backend, gate, carrier_y, carrier_gate, x, bias):
        ctx.backend, ctx.of_bias = backend, None if bias is None else bias.dtype
        ctx.save_for_backward(gate, x)
        return below(SCALE[backend], x, gate, None, None, _residual(x, bias), IDENTITY, IDENTITY)

    @staticmethod
    def backward(ctx, grad):
        gate, x = ctx.saved_tensors
        dots = of_bias = None
        if ctx.needs_input_grad[1]:
            if wants_graph(grad):
                dots = (grad * x).sum(space(x)).to(gate.dtype)
            else:
                dots = below(DOTS[ctx.backend], grad, [x], 1, None, None, IDENTITY).squeeze(1).to(gate.dtype)
        if ctx.needs_input_grad[5]:
            of_bias = grad.sum((0, *space(grad)), dtype=ctx.of_bias)
        return None, dots, grad, gate, None, of_bias


_apply_energy, apply_gate = apply_of(_Energy), apply_of(_Gate)


def energy_gate(backend: str, x: Tensor, excitation: Callable[[Tensor], Tensor], bias: Tensor | None) -> Tensor:
    """x times the gate, (B, C), that `excitation` makes of its energy, plus the bias, (C,)."""
    if not needs_node(x):
        gate = excitation(_energy(backend, x))
        return scale(backend, x, gate, None, None, _residual(x, bias), IDENTITY, IDENTITY)
    energy, carrier_y, carrier_gate = _apply_energy(backend, x)
    return apply_gate(backend, excitation(energy).contiguous(), carrier_y, carrier_gate, x, bias)
