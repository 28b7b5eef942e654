"""Products with gates that are made of another map in the same forward, of which the product alone is fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse, unfuse
from tests.checks import LAYOUTS, in_layout, random, randomised, results
from tests.fusion.counting import FusedOperators

C = 8
NAME = "its own gate, scale"


class Modulation(nn.Module):
    """Contexts of growing extent, each weighted by a map of its own, without a function of gates, as in FocalNet."""

    count = 2

    def __init__(self):
        super().__init__()
        self.f, self.h = nn.Conv2d(C, 2 * C + 3, 1), nn.Conv2d(C, C, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(C, C, k, padding=k // 2, groups=C), nn.GELU()) for k in (3, 5)
        )

    def forward(self, x):
        q, context, gates = torch.split(self.f(x), [C, C, 3], 1)
        total = 0
        for i, layer in enumerate(self.layers):
            context = layer(context)
            total = total + context * gates[:, i : i + 1]
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, 2:]
        return q * self.h(total)


class Dice(nn.Module):
    """A projection times a gate of what it is projected from, as in DiCENet."""

    count = 1

    def __init__(self):
        super().__init__()
        self.base, self.project = nn.Conv2d(C, 2 * C, 3, padding=1), nn.Conv2d(2 * C, C, 1)
        self.att = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * C, 2, 1), nn.ReLU(), nn.Conv2d(2, C, 1))

    def forward(self, x):
        y = self.base(x)
        gate = torch.sigmoid(self.att(y))
        return self.project(y) * gate.expand_as(x)


class Pyramid(nn.Module):
    """A map times one of a single channel from a coarser one, plus one of the whole, as PAN's feature pyramid."""

    count = 1

    def __init__(self):
        super().__init__()
        self.mid, self.branch = nn.Conv2d(C, C, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1))
        self.down = nn.Sequential(nn.MaxPool2d(2, 2), nn.Conv2d(C, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())

    def forward(self, x):
        size = (x.size(2), x.size(3))
        attention = F.interpolate(self.down(x), size=size, mode="bilinear", align_corners=True)
        branch = F.interpolate(self.branch(x), size=size, mode="bilinear", align_corners=True)
        return torch.mul(attention, self.mid(x)) + branch


class Volumes(nn.Module):
    count = 1

    def __init__(self):
        super().__init__()
        self.a, self.b, self.psi = nn.Conv3d(C, C, 1), nn.Conv3d(C, C, 1), nn.Conv3d(C, 1, 1)

    def forward(self, x):
        return self.b(x) * torch.sigmoid(self.psi(torch.relu(self.a(x))))


class Transformation(nn.Module):
    """Gated channel transformation with sums of magnitudes."""

    count = 1

    def __init__(self):
        super().__init__()
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.ones(1, C, 1, 1)) for _ in range(3))

    def forward(self, x):
        embedding = torch.abs(x).sum((2, 3), keepdim=True) * self.alpha
        norm = self.gamma / (torch.abs(embedding).mean(dim=1, keepdim=True) + 1e-5)
        return x * (1.0 + torch.tanh(embedding * norm + self.beta))


SHAPES = {Volumes: ((2, C, 4, 6, 5), (1, C, 2, 2, 4))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", [Modulation, Dice, Pyramid, Volumes, Transformation])
def test_is_fused_and_equal(cls, layout):
    original = randomised(cls())
    fused = fuse(copy.deepcopy(original), strict=True)
    names = ", ".join([NAME] * cls.count)
    assert [(row.fused, row.block) for row in explain(fused)] == [(True, f"{names} in its forward")]
    for shape in SHAPES.get(cls, ((2, C, 10, 14), (3, C, 12, 6))):
        x = in_layout(random(*shape, dtype=torch.float64), layout)
        for training in (True, False):
            with FusedOperators() as ran, torch.no_grad():
                copy.deepcopy(fused).train(training)(x)
            assert ran.count == cls.count
            for mine, theirs in zip(*(results(b, x, training=training) for b in (fused, original)), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    assert [*fused.state_dict()] == [*original.state_dict()]
    assert type(unfuse(fused)) is cls


def test_compiled():
    """In one graph."""
    torch._dynamo.reset()
    fused = fuse(randomised(Modulation()))
    x = random(2, C, 10, 14, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(*(results(block, x, training=True) for block in (compiled, fused)), strict=True):
        torch.testing.assert_close(mine, theirs)


class Normalised(nn.Module):
    """A map over its deviation, a layer scale, the weights of a mean: no gates."""

    def __init__(self):
        super().__init__()
        self.conv, self.weigh = nn.Conv2d(C, C, 1), nn.Conv2d(C, 1, 1)
        self.gamma = nn.Parameter(torch.ones(1, C, 1, 1))

    def forward(self, x):
        variance, mean = torch.var_mean(x, 1, keepdim=True)
        x = (x - mean) * torch.rsqrt(variance + 1e-6)
        weights = torch.softmax(self.weigh(x).flatten(2), 2).view(x.shape[0], 1, x.shape[2], x.shape[3])
        return self.conv(x) * self.gamma + (x * weights).sum((2, 3), keepdim=True)


class InPlace(Dice):
    def forward(self, x):
        y = self.base(x)
        gate = torch.sigmoid(self.att(y))
        z = self.project(y)
        z *= gate
        return z


@pytest.mark.parametrize("cls", [Normalised, InPlace])
def test_is_left_alone(cls):
    block = fuse(cls())
    assert type(block) is cls and not any(row.fused for row in explain(block))
