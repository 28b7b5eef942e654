"""What multiplies a map by a gate and is not fused: `explain` lists it with the reason, `fuse(strict=True)` raises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse
from fused_attn.fusion import FusionError
from tests.checks import LAYOUTS, in_layout, random, randomised
from tests.fusion.counting import FusedOperators

C = 16
LEFT: dict[str, tuple] = {}
ALONE: list[type] = []


def alone(cls):
    """Its product is fused, and nothing else of it."""
    ALONE.append(cls)
    return cls


def left(reason):
    def add(cls):
        LEFT[cls.__name__] = (cls, reason)
        return cls

    return add


class Base(nn.Module):
    """A residual block. excite: what makes a gate of (B, C, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.excite = nn.Sequential(nn.Conv2d(C, 4, 1), nn.ELU(), nn.Conv2d(4, C, 1), nn.Sigmoid())


def pool(x):
    return x.mean((2, 3), keepdim=True)


@alone
class OfItsInput(Base):
    def forward(self, x):
        return self.conv(x) * self.excite(pool(x)) + x


@left("its gate is computed from another function of its map")
class OfWhatFollows(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(self.conv2(y)))


@left("its gate is computed from more than its map")
class OfBoth(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(y) + pool(x))


@left("its gate is computed from a part of its map")
class OfAPart(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(y[:, :, 1:]))


@left("its map is weighted or masked before it is pooled")
class Weighted(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(y * (x[:, :1] > 0).to(y.dtype)))


@left("detaches a branch")
class Detached(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(y.detach()))


@left("its gate is computed in another dtype than its map has")
class InAnotherDtype(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * pool(y.float()).sigmoid().to(y.dtype)


@alone
class Deviation(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(y.std((2, 3), keepdim=True))


@left("switches gradients or autocast")
class InAContext(Base):
    def forward(self, x):
        y = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            return y * self.excite(pool(y))


@left("branches on a tensor or its sizes")
class OnSizes(Base):
    def forward(self, x):
        y = self.conv(x)
        return y * self.excite(pool(y)) if y.shape[2] > 5 else y


@left("branches on data")
class OnValues(Base):
    def forward(self, x):
        y = self.conv(x)
        y = y * self.excite(pool(y))
        return y if y.sum() > 0 else -y


@left("keeps state")
class Keeps(Base):
    def forward(self, x):
        y = self.conv(x)
        self.gate = self.excite(F.adaptive_avg_pool2d(y, 1))
        return y * self.gate.sigmoid()


@left("prints")
class Prints(Base):
    def forward(self, x):
        y = self.conv(x)
        gate = F.adaptive_avg_pool2d(y, 1).sigmoid()
        print(gate.shape)
        return y * gate


@left("runs a Own, which has a __call__ of its own")
class Calls(Base):
    class Own(nn.Conv2d):
        def __call__(self, x):
            return super().__call__(x) * 2

    def __init__(self):
        super().__init__()
        self.own = self.Own(C, C, 1)

    def forward(self, x):
        y = self.own(x)
        return y * torch.sigmoid(self.conv2(F.adaptive_avg_pool2d(y, 1)))


class AttentionGate(nn.Module):
    """Of maps that differ in channels."""

    def __init__(self):
        super().__init__()
        self.g, self.x, self.psi = nn.Conv2d(C, 4, 1), nn.Conv2d(2 * C, 4, 1), nn.Conv2d(4, 1, 1)

    def gate(self, g, x):
        return self.psi(torch.relu(self.g(g) + self.x(x))).sigmoid()


class BySize(AttentionGate):
    def forward(self, g, x):
        if g.shape[2:] != x.shape[2:]:
            g = F.interpolate(g, size=x.shape[2:])
        return x * self.gate(g, x)


class InPlace(AttentionGate):
    def forward(self, g, x):
        x *= self.gate(g, x)
        return x


class Unrecorded(AttentionGate):
    def forward(self, g, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.psi(self.g(g) + self.x(x)))
        return x * gate


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (BySize, "branches on a tensor or its sizes"),
        (InPlace, "its gate is computed from another input, too"),
        (Unrecorded, "switches gradients or autocast"),
    ],
)
def test_a_gate_of_maps_of_other_channels_is_left_with_the_reason(cls, reason):
    block = fuse(cls())
    assert type(block) is cls
    assert [(row.fused, row.reason) for row in explain(block)] == [(False, reason)]


def results(block, x, training):
    """Of those layers that it uses."""
    block.train(training)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x)
    grads = torch.autograd.grad(y, [x, *block.parameters()], random(*y.shape, dtype=y.dtype, seed=3), allow_unused=True)
    return [y, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", ALONE, ids=lambda cls: cls.__name__)
def test_the_product_alone_is_fused(cls, layout):
    """However its gate is made."""
    original = randomised(cls())
    fused = fuse(copy.deepcopy(original), strict=True)
    assert [(row.fused, row.block) for row in explain(fused)] == [(True, "its own gate, scale in its forward")]
    for shape in ((2, C, 7, 9), (1, C, 12, 5)):
        x = in_layout(random(*shape, dtype=torch.float64), layout)
        for training in (True, False):
            with FusedOperators() as ran, torch.no_grad():
                fused(x)
            assert ran.count == 1
            for mine, theirs in zip(*(results(block, x, training) for block in (fused, original)), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    x = random(2, C, 7, 9)
    singles = copy.deepcopy(original).float(), copy.deepcopy(fused).float()
    torch.testing.assert_close(singles[1](x), singles[0](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEFT)
def test_left_with_the_reason(name, capsys):
    cls, reason = LEFT[name]
    plain = cls().double()
    rows = explain(nn.Sequential(plain))
    assert [(row.name, row.fused, row.reason) for row in rows] == [("0", False, reason)]
    with pytest.raises(FusionError) as raised:
        fuse(nn.Sequential(plain), strict=True)
    assert str(raised.value) == f"blocks left alone: 0: {reason}"
    assert type(plain) is cls
    net = fuse(copy.deepcopy(plain))
    x = random(2, C, 7, 9, dtype=torch.float64)
    assert torch.equal(net(x), plain(x)) and type(net) is cls


class OnEach(Base):
    """As necks of several levels are given their maps."""

    def forward(self, xs):
        return [x * self.excite(pool(x)) for x in xs]


class OfThree(Base):
    def forward(self, maps):
        a, b, c = maps["a"], maps["b"], maps["c"]
        return (a + b) * self.excite(pool(a + b)) + c


class SlicesOfVolumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(C, C, 1)

    def forward(self, x):
        return x * self.conv(x.mean((3, 4), keepdim=True)).sigmoid()


class OfANorm(nn.Module):
    """Response normalisation by another norm than the published."""

    def __init__(self, order=1, last=False):
        super().__init__()
        self.order, self.last = order, last
        shape = (1, 1, 1, C) if last else (1, C, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        norm = x.norm(p=self.order, dim=(1, 2) if self.last else (2, 3), keepdim=True)
        response = norm / (norm.mean(-1 if self.last else 1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


class OfTheLargest(OfANorm):
    def forward(self, x):
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x * (norm / (norm.amax(1, keepdim=True) + 1e-6)) + x


class OfItsOwnNorm(OfANorm):
    def forward(self, x):
        return x * x.square().sum((2, 3), keepdim=True).sqrt() * self.gamma


NORMS = "its gate is made of norms, in a form that is none of the known"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OnEach, "takes its maps in a list"),
        (OfThree, "takes its maps in a dictionary"),
        (SlicesOfVolumes, "its gate is one number a channel and slice"),
        (OfANorm, NORMS),
        (lambda: OfANorm(3, last=True), NORMS),
        (OfTheLargest, NORMS),
        (OfItsOwnNorm, NORMS),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_what_was_silent_is_told(make, reason):
    block = fuse(nn.Sequential(make()))
    assert [(row.fused, row.reason) for row in explain(block)] == [(False, reason)]
    with pytest.raises(FusionError):
        fuse(block, strict=True)


class Recurrent(nn.Module):
    """As DIANet's attention: the state of the block before is given beside the map, and returned."""

    def __init__(self):
        super().__init__()
        self.pool, self.of_map, self.of_state = nn.AdaptiveAvgPool2d(1), nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)

    def forward(self, x, state=None):
        w = self.pool(x).view(x.size(0), -1)
        if state is None:
            state = torch.zeros_like(w)
        a, b = (self.of_map(w) + self.of_state(state)).chunk(2, 1)
        state = torch.sigmoid(a) * torch.tanh(b)
        return x * state.unsqueeze(2).unsqueeze(3), state


def test_a_state_that_may_be_given_is_told():
    plain = Recurrent().double()
    net = fuse(copy.deepcopy(plain), strict=True)
    (row,) = explain(net)
    assert row.fused and row.reason.endswith("; as it is written where state is not the default")
    x = random(2, C, 7, 9, dtype=torch.float64)
    (y, state), (expected, same) = net(x), plain(x)
    torch.testing.assert_close((y, state), (expected, same))
    with FusedOperators() as ran:
        again = net(y, state)
    assert not ran.count
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, plain(y, state), strict=True))


class Both(Base):
    """One of whose products is fused."""

    def forward(self, x):
        y = self.conv(x)
        y = y * self.excite(pool(y))
        y *= self.excite(pool(x))
        return y


def test_what_is_left_beside_what_is_fused():
    plain = Both().double()
    reason = "its gate is computed from another map"
    with pytest.raises(FusionError, match=f"^blocks left alone: 0: {reason}$"):
        fuse(nn.Sequential(plain), strict=True)
    net = nn.Sequential(copy.deepcopy(plain))
    before = explain(net)
    rows = explain(fuse(net))
    assert [row.reason for row in before][1:] == [row.reason for row in rows][1:] == [reason]
    assert [row.fused for row in rows] == [True, False] and [row.fused for row in before] == [False, False]
    x = random(2, C, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x))


class WithLengths(Base):
    """As in packages for speech: lengths are of samples that are shorter than their map."""

    def forward(self, x, lengths=None):
        if lengths is None:
            pooled = x.mean((2, 3), keepdim=True)
        else:
            mask = (torch.arange(x.shape[3]) < lengths[:, None] * x.shape[3])[:, None, None]
            pooled = (x * mask).sum((2, 3), keepdim=True) / (mask.sum(3, keepdim=True) * x.shape[2])
        return x * self.excite(pooled)


def test_what_it_may_be_given_beside_the_map_is_told():
    plain = WithLengths().double()
    net = fuse(copy.deepcopy(plain), strict=True)
    (row,) = explain(net)
    assert row.fused and row.reason.endswith("; squeezed as it is written where lengths is not the default")
    x, lengths = random(2, C, 7, 9, dtype=torch.float64), torch.tensor([1.0, 0.5])
    torch.testing.assert_close(net(x), plain(x))
    for y in (net(x, lengths), net(x, lengths=lengths)):
        torch.testing.assert_close(y, plain(x, lengths))


@pytest.mark.parametrize("how", ["position", "name", "all by name"])
def test_what_is_given_and_is_the_default_changes_nothing(how):
    """As ECAPA-TDNN calls its blocks: with the lengths that it was given, which may be None."""
    net = fuse(WithLengths().double(), strict=True)
    x = random(2, C, 7, 9, dtype=torch.float64)
    with FusedOperators() as ran:
        y = net(x, None) if how == "position" else net(x, lengths=None) if how == "name" else net(lengths=None, x=x)
    assert ran.count
    torch.testing.assert_close(y, net(x))
    with pytest.raises(TypeError):
        net(x, None, x=x)
    with pytest.raises(TypeError):
        net(x, None, None)


class Normalises(nn.Module):
    """Products that are of no gate: a map is normalised, not gated, where it is divided by its own norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(C, C, 1), nn.Parameter(torch.ones(C, 1, 1))
        self.drop, self.embed = nn.Dropout2d(), nn.Linear(C, C)

    def forward(self, x, t=None):
        y = self.conv(x) * self.gamma
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)
        y = y * torch.rsqrt(y.square().mean(3, keepdim=True).mean(2, keepdim=True) + 1e-6)
        y = y * (1 / y.norm(dim=(2, 3), keepdim=True))
        y = y * torch.sigmoid(self.gamma) * 0.5
        y = y * torch.empty_like(y[:, :1, :1, :1]).bernoulli_(0.5)
        return self.drop(x + y) * torch.sigmoid(x)


def test_what_is_no_gate_is_not_mentioned():
    assert not explain(fuse(Normalises(), strict=True))


class Draws(Base):
    def forward(self, x):
        y = self.conv(x)
        return (y * self.excite(pool(x))) * (torch.rand(1) < 0.5)


def test_no_random_numbers_are_drawn():
    block, state = Draws(), torch.get_rng_state()
    assert explain(block)[0].reason == "its gate is computed from another map"
    assert torch.equal(torch.get_rng_state(), state)
