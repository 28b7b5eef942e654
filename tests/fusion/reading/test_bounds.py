"""Functions with bounds: torch's clamp passes the gradient there, relu, relu6, hardtanh and hardsigmoid do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse
from fused_attn.fusion.changing.graphs import rewrite
from tests.checks import random

C = 16
GATES = {
    "clamp": lambda z: torch.clamp(z + 3, 0, 6) / 6,
    "clamp in place": lambda z: (z + 3).clamp_(min=0.0, max=6.0).div_(6.0),
    "clamp to one": lambda z: ((z + 3) / 6).clamp(0, 1),
    "clip": lambda z: (z + 3).clip(0, 6) / 6,
    "two clamps": lambda z: (z + 3).clamp(min=0).clamp(max=6) / 6,
    "hardtanh": lambda z: F.hardtanh(z + 3, 0.0, 6.0) / 6,
    "hardtanh to one": lambda z: F.hardtanh((z + 3) / 6, 0.0, 1.0),
    "relu6": lambda z: F.relu6(z + 3) / 6,
    "hardsigmoid": F.hardsigmoid,
}
HIDDEN = {
    "clamp": lambda z: z.clamp(min=0),
    "clamp_min": lambda z: torch.clamp_min(z, 0.0),
    "clamp to six": lambda z: z.clamp(0, 6),
    "hardtanh": lambda z: F.hardtanh(z, 0, 6),
    "relu6": F.relu6,
    "relu": F.relu,
    "hardswish": F.hardswish,
    "hardswish by hand": lambda z: z * F.relu6(z + 3) / 6,
    "hardswish by clamp": lambda z: z * (z + 3).clamp(0, 6) / 6,
    "hardswish by hardsigmoid": lambda z: z * F.hardsigmoid(z),
    "leaky": F.leaky_relu,
}
#: Those that are one op with the rest of their block.
WHOLE = {
    "hardtanh",
    "relu6",
    "hardsigmoid",
    "relu",
    "hardswish",
    "hardswish by hand",
    "hardswish by hardsigmoid",
    "leaky",
}


class Gate(nn.Module):
    def __init__(self, hidden, gate):
        super().__init__()
        self.hidden, self.gate, self.a, self.b = hidden, gate, nn.Conv2d(C, 8, 1), nn.Conv2d(8, C, 1)

    def forward(self, x):
        return x * self.gate(self.b(self.hidden(self.a(x.mean((2, 3), keepdim=True)))))


class InAForward(Gate):
    def __init__(self, hidden, gate):
        super().__init__(hidden, gate)
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(x + y * self.gate(self.b(self.hidden(self.a(y.mean((2, 3), keepdim=True))))))


CASES = [*((Gate, "gate", n) for n in GATES), *((Gate, "hidden", n) for n in HIDDEN)]
CASES += [(InAForward, "gate", "clamp"), (InAForward, "gate", "relu6"), (InAForward, "hidden", "clamp")]


@pytest.mark.parametrize("cls, place, name", CASES)
def test_gradients_at_the_bounds(cls, place, name):
    """What goes into the function is exactly at its bounds, whatever the map is."""
    function = {"gate": GATES, "hidden": HIDDEN}[place][name]
    plain = (cls(function, torch.sigmoid) if place == "hidden" else cls(F.relu, function)).double()
    with torch.no_grad():
        layer = plain.a if place == "hidden" else plain.b
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([-3.0, 0.0, 3.0, 6.0]).repeat(len(layer.bias) // 4))
    fused = fuse(copy.deepcopy(plain), strict=True)
    (row,) = explain(fused)
    assert row.fused and ("its own layers" not in row.block) == (name in WHOLE), row.block
    graph = compiled(plain)
    x = random(2, C, 5, 6, dtype=torch.float64)
    expected = gradients(plain, x)
    for other in (fused, graph):
        for p, q in zip(gradients(other, x), expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # torch's sixths


def compiled(block):
    def backend(graph, inputs):
        rewrite(graph, inputs)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(block), backend=backend)


def gradients(block, x):
    y = block(x.requires_grad_())
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], random(*y.shape, dtype=torch.float64, seed=1))]
