"""Gates along an axis of space: squeeze-and-excitation of frequencies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_attn import explain, fuse, unfuse
from fused_attn.backends import _Small
from fused_attn.fusion import FusionError
from tests.checks import LAYOUTS, in_layout, random, randomised, results
from tests.fusion.counting import FusedOperators

F = 20


class Frequencies(nn.Module):
    """(B, C, F, T): a gate a frequency, of the mean over channels and time."""

    def __init__(self, width=6):
        super().__init__()
        self.squeeze, self.exc = nn.Linear(F, width), nn.Linear(width, F)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, inputs):
        s = torch.mean(inputs, dim=[1, 3])
        s = self.sigmoid(self.exc(self.relu(self.squeeze(s))))
        return inputs * s[:, None, :, None]


class Permuted(nn.Module):
    """By the block for channels, with a BatchNorm in it."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.se = nn.Sequential(nn.Conv2d(F, 6, 1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, F, 1), nn.Sigmoid())

    def forward(self, x):
        y = x.permute(0, 2, 1, 3)
        return (y * self.se(self.pool(y))).permute(0, 2, 1, 3) + x


class Slices(Frequencies):
    """Of a volume."""

    def forward(self, x):
        s = self.exc(torch.relu(self.squeeze(x.flatten(3).mean((1, 3))))).sigmoid()
        return x * s[:, None, :, None, None]


class Rows(Frequencies):
    """Along the second axis of space of a volume."""

    def forward(self, x):
        s = self.exc(torch.tanh(self.squeeze(x.mean((1, 2, 4))))).sigmoid()
        return x * s.view(x.shape[0], 1, 1, -1, 1)


class Residual(Frequencies):
    """In the forward of a residual block."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.bn(self.conv(x))
        s = y.mean((1, 3))
        s = self.sigmoid(self.exc(self.relu(self.squeeze(s)))).view(y.shape[0], 1, -1, 1)
        return self.relu(y * s + x)


GATE = "gate along axis {}: {}"
SE = "SqueezeExcite(20 -> 6, relu, sigmoid)"
#: What makes a block, the shape of its map, and what it is found as.
FOUND = {
    "frequencies": (Frequencies, (3, 5, F, 7), GATE.format(2, SE)),
    "one channel": (Frequencies, (3, 1, F, 7), GATE.format(2, SE)),
    "permuted": (Permuted, (3, 5, F, 7), GATE.format(2, "squeeze, its own layers, scale")),
    "slices": (Slices, (2, 5, F, 3, 4), GATE.format(2, SE)),
    "rows of slices": (Rows, (2, 5, 3, F, 4), GATE.format(3, "SqueezeExcite(20 -> 6, tanh, sigmoid)")),
    "inline": (Residual, (3, 5, F, 7), GATE.format(2, SE) + " in its forward"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name, layout):
    make, shape, block = FOUND[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original), strict=True)
    assert [(row.fused, row.block) for row in explain(fused)] == [(True, block)]
    for batch in (shape[0], 2):
        x = in_layout(random(batch, *shape[1:], dtype=torch.float64), layout)
        for training in (True, False):
            with FusedOperators() as ran:
                mine = results(fused, x, training=training)
            assert ran.count
            theirs = results(original, x, training=training)
            assert mine[0].stride() == theirs[0].stride()
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert [*fused.state_dict()] == [*original.state_dict()]
    fused.load_state_dict(original.state_dict())
    assert type(unfuse(fused)) is type(original)


@pytest.mark.parametrize("name", ["frequencies", "permuted", "inline"])
def test_other_dtypes_strides_and_autocast(name):
    make, shape, _ = FOUND[name]
    original = randomised(make()).eval()
    fused = fuse(copy.deepcopy(original))
    x = random(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]
    torch.testing.assert_close(fused(x), original(x), rtol=1e-10, atol=1e-11)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                mine, theirs = (block.to(dtype)(x.to(dtype)) for block in (fused, original))
            assert mine.dtype == theirs.dtype
            tolerance = 4e-2 if autocast else tolerance
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_copies_pickles_and_compiles():
    torch._dynamo.reset()
    original = randomised(Permuted()).eval()
    fused = fuse(copy.deepcopy(original))
    x = random(3, 5, F, 7, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    for block in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), compiled):
        torch.testing.assert_close(block(x), original(x), rtol=1e-10, atol=1e-11)


def test_maps_that_it_does_not_take():
    """Raise what they raise."""
    fused = fuse(Frequencies())
    for shape in ((2, 5, F + 1, 7), (2, 5, F), (2, F, 5)):
        with pytest.raises(Exception) as mine:
            fused(random(*shape))
        with pytest.raises(type(mine.value)) as theirs:
            Frequencies()(random(*shape))
        assert str(mine.value) == str(theirs.value)


class Maxima(Frequencies):
    def forward(self, x):
        return x * self.exc(self.relu(self.squeeze(x.amax((1, 3))))).sigmoid()[:, None, :, None]


class Detached(Frequencies):
    def forward(self, x):
        return x * self.exc(self.relu(self.squeeze(x.detach().mean((1, 3))))).sigmoid()[:, None, :, None]


class EachChannel(Residual):
    def forward(self, x):
        x = self.conv(x)
        return x * self.exc(self.relu(self.squeeze(x.mean(3)))).sigmoid()[..., None]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Maxima, "its pool is no mean"),
        (Detached, "detaches a branch"),
        (EachChannel, "its gate is one number a channel and row"),
    ],
)
def test_is_left_with_the_reason(cls, reason):
    block = cls()
    with pytest.raises(FusionError, match=reason):
        fuse(block, strict=True)
    assert [(row.fused, row.reason) for row in explain(fuse(block))] == [(False, reason)] and type(block) is cls


def test_small_maps_run_as_they_are_written(monkeypatch):
    monkeypatch.setattr(_Small, "most", 1 << 14)
    fused = fuse(Frequencies())
    assert explain(fused)[0].reason.endswith("; as it is written on small maps")
    for channels, grad, runs in ((5, True, False), (100, True, True), (100, False, False), (200, False, True)):
        with FusedOperators() as ran, torch.set_grad_enabled(grad):
            fused(random(2, channels, F, 150))
        assert (ran.count > 0) is runs
