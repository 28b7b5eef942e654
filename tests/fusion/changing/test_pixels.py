"""Pixel attention: a gate an element, the sigmoid of what layers make of the map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse, unfuse
from tests.checks import LAYOUTS, in_layout, random, randomised, results
from tests.fusion.counting import FusedOperators

C = 6


class PixelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.sigmoid = nn.Conv2d(C, C, 1), nn.Sigmoid()

    def forward(self, x):
        y = self.conv(x)
        y = self.sigmoid(y)
        return torch.mul(x, y)


class InASequential(nn.Module):
    """In the forward of a residual block, with a bottleneck."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(C, C, 3, padding=1)
        self.pa = nn.Sequential(nn.Conv2d(C, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, C, 1), nn.Sigmoid())

    def forward(self, x):
        y = self.body(x)
        return y * self.pa(y) + x


class Line(nn.Module):
    """Of a signal, by functions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(C, C, 3, padding=1, groups=2)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x))


class ProjectAndExcite(nn.Module):
    """Of a volume: the sum of its means along each axis, through two convolutions."""

    def __init__(self):
        super().__init__()
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()
        self.conv_c, self.conv_cT = nn.Conv3d(C, 3, 1), nn.Conv3d(3, C, 1)

    def forward(self, x):
        batch, channels, d, h, w = x.size()
        of_w = F.adaptive_avg_pool3d(x, (1, 1, w)).view(batch, channels, 1, 1, w)
        of_h = F.adaptive_avg_pool3d(x, (1, h, 1)).view(batch, channels, 1, h, 1)
        of_d = F.adaptive_avg_pool3d(x, (d, 1, 1)).view(batch, channels, d, 1, 1)
        gate = self.sigmoid(self.conv_cT(self.relu(self.conv_c(sum([of_w, of_h, of_d])))))
        return torch.mul(x, gate)


class Gate(nn.Module):
    """A module of its own that returns the gate."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(C, C, 1), nn.Sigmoid()

    def forward(self, x):
        return self.act(self.conv(x))


class OfAGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate = nn.Conv2d(C, C, 3, padding=1), Gate()

    def forward(self, x):
        y = self.body(x)
        return y * self.gate(y)


#: What makes a block, and the shapes of its maps.
FOUND = {
    "module": (PixelAttention, ((2, C, 9, 7), (1, C, 40, 33))),
    "inline": (InASequential, ((2, C, 9, 7), (3, C, 16, 12))),
    "1-D": (Line, ((2, C, 33), (1, C, 1400))),
    "gate module": (OfAGate, ((2, C, 9, 7), (1, C, 6, 6))),
    "project and excite": (ProjectAndExcite, ((2, C, 5, 6, 7), (2, C, 3, 9, 4))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name, layout):
    make, shapes = FOUND[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original), strict=True)
    name = "its own layers, pixel gate in its forward"
    assert [(row.fused, row.block) for row in explain(fused)] == [(True, name)]
    for shape in shapes:
        x = in_layout(random(*shape, dtype=torch.float64), layout)
        for training in (True, False):
            with FusedOperators() as ran:
                mine = results(fused, x, training=training)
            assert ran.count
            theirs = results(original, x, training=training)
            assert mine[0].stride() == theirs[0].stride()
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert [*fused.state_dict()] == [*original.state_dict()]
    assert type(unfuse(fused)) is type(original)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_float32(layout):
    """Within twice the error of eager."""
    original = randomised(PixelAttention())
    fused = fuse(copy.deepcopy(original))
    x = in_layout(random(2, C, 33, 40, dtype=torch.float64), layout)
    exact = results(original, x, training=True)
    found = [results(copy.deepcopy(block).float(), x.float(), training=True) for block in (original, fused)]
    for value, eager, mine in zip(exact, *found, strict=True):
        errors = [(t.double() - value).abs().max().item() for t in (mine, eager)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * value.abs().max().item()


def test_compiled():
    """In one graph."""
    torch._dynamo.reset()
    fused = fuse(randomised(ProjectAndExcite()))
    x = random(2, C, 5, 6, 7, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(*(results(block, x, training=True) for block in (compiled, fused)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype):
    original = randomised(PixelAttention()).to(dtype).eval()
    fused = fuse(copy.deepcopy(original))
    x = random(2, C, 9, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fused(x), original(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


class Swish(PixelAttention):
    """No gate: a function of the map alone."""

    def forward(self, x):
        return self.conv(x * torch.sigmoid(x))


class Twice(PixelAttention):
    """Its gate is used again."""

    def forward(self, x):
        y = self.sigmoid(self.conv(x))
        return x * y + y


class Tanh(PixelAttention):
    def forward(self, x):
        return x * torch.tanh(self.conv(x))


class InPlace(PixelAttention):
    def forward(self, x):
        y = self.conv(x)
        y *= self.sigmoid(self.conv(y))
        return y


FORM = "its gate is one number an element, in a form that is none of the known"


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Swish, None), (Twice, FORM), (InPlace, FORM), (Tanh, "its gate is a tanh, one number an element")],
)
def test_is_left_alone_with_the_reason(cls, reason):
    block = fuse(cls())
    assert type(block) is cls
    assert [(row.fused, row.reason) for row in explain(block)] == ([] if reason is None else [(False, reason)])


def test_hooks_count():
    """One before fuse keeps the block as it is written, one behind it has it run so."""
    hooked = PixelAttention()
    hooked.sigmoid.register_forward_hook(lambda *_: None)
    assert type(fuse(hooked)) is PixelAttention
    original = randomised(PixelAttention()).eval()
    fused = fuse(copy.deepcopy(original))
    for block in (original, fused):
        block.sigmoid.register_forward_hook(lambda layer, given, y: 2 * y)
    x = random(2, C, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(x), original(x))
