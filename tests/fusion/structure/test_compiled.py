"""Blocks in graphs: behind torch.compile and in exported programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import functional, fuse
from fused_attn.fusion.structure.compiled import backend, rewrite
from tests.checks import random
from tests.fusion.structure.pasted import CBAM, SEBlock, eca_layer


class Net(nn.Module):
    """No block has a module of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x):
        x = self.conv(x)
        out = self.bn(x).relu()
        out = out * self.b(self.a(out.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        out += x
        return F.relu(out).mean((2, 3))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.se, self.cbam, self.eca = SEBlock(32), CBAM(32), eca_layer()

    def forward(self, x):
        return self.eca(self.cbam(self.se(self.conv(x)))).flatten(1)


def counting(found: list):
    """A backend that rewrites and runs the graph."""

    def compiler(graph, inputs):
        rewrite(graph, inputs)
        found.append(
            [
                n
                for n in graph.graph.nodes
                if n.op == "call_function" and getattr(n.target, "__module__", "") == functional.__name__
            ]
        )
        return graph

    return compiler


def both(net: nn.Module, compiled: nn.Module, x: torch.Tensor) -> None:
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = compiled(a), net(b)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    parameters = list(net.parameters())
    found = torch.autograd.grad(actual.square().sum(), [a, *parameters])
    wanted = torch.autograd.grad(expected.square().sum(), [b, *parameters])
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_with_what_stands_around_it():
    torch._dynamo.reset()
    net, found = Net().double().eval(), []
    both(net, torch.compile(net, backend=counting(found)), random(2, 3, 8, 9, dtype=torch.float64))
    ((node,),) = found
    assert node.target is functional.channel_gate
    assert node.kwargs["post_activation"] == "relu" and node.kwargs["residual"] is not None
    assert node.kwargs["pre_activation"] == "relu" and node.kwargs["affine"] is not None


def test_in_training_the_batch_norm_stays_outside():
    torch._dynamo.reset()
    net, found = Net().double(), []
    both(net.train(), torch.compile(net, backend=counting(found)), random(2, 3, 8, 9, dtype=torch.float64))
    ((node,),) = found
    assert "affine" not in node.kwargs and node.kwargs["post_activation"] == "relu"


@pytest.mark.parametrize("dynamic", [False, True])
def test_several(dynamic):
    torch._dynamo.reset()
    net, found = Blocks().double().eval(), []
    compiled = torch.compile(net, backend=counting(found), dynamic=dynamic)
    both(net, compiled, random(2, 3, 8, 9, dtype=torch.float64))
    if dynamic:
        both(net, compiled, random(3, 3, 11, 7, dtype=torch.float64))
    names = [n.target.__name__ for n in found[0]]
    assert names.count("channel_gate") >= 2, names


class Near(nn.Module):
    def forward(self, x):
        return x * F.adaptive_avg_pool2d(x, 2).mean((2, 3), True).sigmoid() + x * (x.mean((2, 3), True).exp())


class Fixed(nn.Module):
    """Global on maps of 7 x 7 only."""

    def forward(self, x):
        return x * F.avg_pool2d(x, 7).sigmoid()


@pytest.mark.parametrize("net", [Near(), Fixed()], ids=["near", "fixed"])
def test_near_misses(net):
    torch._dynamo.reset()
    found: list = []
    compiled = torch.compile(net, backend=counting(found), dynamic=True)
    both(net, compiled, random(2, 3, 7, 7, dtype=torch.float64))
    assert not isinstance(net, Near) or found == [[]]


def test_an_exported_program():
    net = Net().double().eval()
    x = random(2, 3, 8, 9, dtype=torch.float64)
    fused = fuse(torch.export.export(net, (x,)))
    called = [n.target for n in fused.graph.nodes if n.op == "call_function"]
    assert functional.channel_gate in called
    torch.testing.assert_close(fused(x), net(x), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_by_name_and_inductor():
    torch._dynamo.reset()
    net = Net().eval()
    x = random(2, 3, 8, 9)
    compiled = torch.compile(net, backend=backend)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_entry_point():
    text = Path("pyproject.toml").read_text()
    assert f'[project.entry-points.torch_dynamo_backends]\nfused_attn = "{backend.__module__}:backend"' in text
