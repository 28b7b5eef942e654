"""Gates in graphs that layers of no known kind make: the pools of the map and the product are fused around them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F

from fused_attn import explain, fuse, reference
from fused_attn.fusion import FusionError
from tests.checks import random, randomised, results
from tests.fusion.in_graphs import compiled

C = 16


class Net(nn.Module):
    """A residual block with a gate by a function of the map."""

    def __init__(self, gate, *, rank=2, **layers):
        super().__init__()
        self.gate, self.layers = gate, nn.ModuleDict(layers)
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](C, C, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.gate(y, self.layers) + x)


def layers(middle, c=C):
    return nn.Sequential(nn.Conv2d(c, 4, 1), middle(), nn.Conv2d(4, c, 1), nn.Sigmoid())


def se(y, by):
    return y * by.a(y.mean((2, 3), keepdim=True))


def linear(y, by):
    s = F.adaptive_avg_pool2d(y, 1).flatten(1)
    return by.a(s).tanh().view(*s.shape, 1, 1).expand_as(y) * y


def summed(y, by):
    return y * by.a(y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3])).add(1)


def both(y, by):
    return y * (by.a(F.adaptive_avg_pool2d(y, 1)) + by.a(F.adaptive_max_pool2d(y, 1)))


def in_place(y, by):
    y *= by.a(y.mean((2, 3), keepdim=True))
    return y


def own_in_one(y, by):
    return by.a(y.mean(2, keepdim=True)) * y


FORMS = {
    "elu": (lambda: Net(se, a=layers(nn.ELU)), {"scale_by_channels", "pool"}),
    "BatchNorm": (lambda: Net(se, a=layers(lambda: nn.BatchNorm2d(4))), {"scale_by_channels", "pool"}),
    "no activation": (lambda: Net(se, a=nn.Conv2d(C, C, 1)), {"scale_by_channels", "pool"}),
    "kernel of three": (lambda: Net(se, a=nn.Conv2d(C, C, 3, padding=1)), {"scale_by_channels", "pool"}),
    "LayerNorm and expand_as": (
        lambda: Net(linear, a=nn.Sequential(nn.Linear(C, C), nn.LayerNorm(C))),
        {"scale_by_channels", "pool"},
    ),
    "sum": (lambda: Net(summed, a=layers(nn.Mish)), {"scale_by_channels", "pool"}),
    "both pools": (lambda: Net(both, a=layers(nn.PReLU)), {"scale_by_channels", "pool"}),
    "in place": (lambda: Net(in_place, a=layers(nn.CELU)), {"scale_by_channels", "pool"}),
    "1-D": (
        lambda: Net(own_in_one, rank=1, a=nn.Sequential(nn.Conv1d(C, C, 1), nn.Mish())),
        {"scale_by_channels", "pool"},
    ),
}


@pytest.mark.parametrize("name, batch", [*((name, 2) for name in FORMS), ("elu", 1)])
def test_found(name, batch):
    build, expected = FORMS[name]
    torch.manual_seed(0)
    plain = build().double()
    shape = (batch, C, 9) if name == "1-D" else (batch, C, 7, 9)
    found: list[list[str]] = []
    net = compiled(plain, found)
    for training in (True, False):
        x = random(*shape, dtype=torch.float64)
        for p, q in zip(*(results(each, x, training=training) for each in (net, plain)), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert [set(names) for names in found] == [expected] * len(found) and found


def test_exported():
    plain = FORMS["elu"][0]().double().eval()
    x = random(2, C, 7, 9, dtype=torch.float64)
    program = export(plain, (x,), dynamic_shapes=({0: Dim("batch", min=2), 2: Dim("height", min=3)},))
    fused = fuse(program, strict=True)
    operators = {str(n.target) for n in fused.graph.nodes}
    assert any("fused_attn.scale" in name for name in operators), operators
    for size in ((2, 7), (3, 20)):
        x = random(size[0], C, size[1], 9, dtype=torch.float64)
        torch.testing.assert_close(fused.module()(x), plain(x), rtol=1e-9, atol=1e-9)


def plain_layers(y, by):
    """Neither layers nor a function of gates."""
    return y * y.mean((2, 3), keepdim=True).exp()


def of_the_map_too(y, by):
    return y * by.a(y.mean((2, 3), keepdim=True) + y.std((2, 3), keepdim=True))


def read_elsewhere(y, by):
    gate = by.a(y.mean((2, 3), keepdim=True))
    return y * gate + gate


def of_another_map(y, by):
    other = y.flip(1)
    return y * by.a(other.mean((2, 3), keepdim=True)) + other


def without_gradients(y, by):
    with torch.no_grad():
        gate = by.a(y.mean((2, 3), keepdim=True))
    return y * gate


def rounded(y, by):
    return y * by.a(y.mean((2, 3), keepdim=True)).half().to(y.dtype)


def written_between(y, by):
    gate = by.a(y.mean((2, 3), keepdim=True))
    y.mul_(2)
    return y * gate


def of_its_positions(y, by):
    return y * by.a(y)[:, :1].neg()


def over_all_channels(y, by):
    """As in global response normalisation."""
    energy = by.a[0].weight.sum() * y.square().mean((2, 3), keepdim=True)
    return y * (energy / (energy.mean(1, keepdim=True) + 2)) + y


def of_a_mean(y, by):
    """No gate, but a number over a count."""
    return y * (by.a[0](y).sum((1, 2, 3), keepdim=True) / 63)


ALONE = (
    over_all_channels,
    of_the_map_too,
    read_elsewhere,
    of_another_map,
    rounded,
    without_gradients,
    of_its_positions,
)


@pytest.mark.parametrize("gate", ALONE)
def test_the_product_alone(gate):
    torch.manual_seed(0)
    plain = Net(gate, a=layers(nn.ELU)).double()
    found: list[list[str]] = []
    net = compiled(plain, found, products=True)
    for training in (True, False):
        x = random(2, C, 7, 9, dtype=torch.float64)
        both = (results(each, x, training=training, allow_unused=True) for each in (net, plain))
        for p, q in zip(*both, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert found == [["scale_by_gate"]] * len(found) and found


@pytest.mark.parametrize("gate", [plain_layers, written_between, of_a_mean])
def test_left_alone(gate):
    torch.manual_seed(0)
    plain = Net(gate, a=layers(nn.ELU)).double()
    found: list[list[str]] = []
    x = random(2, C, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(compiled(plain, found, products=True)(x), plain(x))
    assert found == [[]]


@pytest.mark.parametrize(
    "make",
    [reference.AttentionGate, reference.SRM, reference.GatedChannelTransformation, reference.GlobalResponseNorm],
    ids=lambda cls: cls.__name__,
)
def test_exported_blocks_whose_product_is_fused(make):
    plain = randomised(make(C)).eval()
    maps = [random(2, C, 7, 9, dtype=torch.float64, seed=i) for i in range(1 + (make is reference.AttentionGate))]
    fused = fuse(export(plain, tuple(maps)), strict=True)
    assert any("fused_attn.scale" in str(n.target) for n in fused.graph.nodes)
    torch.testing.assert_close(fused.module()(*maps), plain(*maps), rtol=1e-9, atol=1e-9)


class Strips(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.columns = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x):
        x = x * torch.sigmoid(self.rows(x.mean(3, keepdim=True)))
        return x * torch.sigmoid(self.columns(x.mean(2, keepdim=True)))


@pytest.mark.parametrize(
    ("block", "shape"),
    [(Strips(), (2, C, 7, 9)), (reference.GlobalResponseNorm(C, channels_last=True), (2, 7, 9, C))],
    ids=["rows and columns", "channels last"],
)
def test_what_an_exported_program_keeps_is_told(block, shape):
    program = export(block.eval(), (torch.randn(shape),))
    with pytest.raises(FusionError, match=r"mul\S* multiplies a map by a gate, in a form that is not fused in graphs"):
        fuse(program, strict=True)
    assert fuse(program) is program
    assert explain(program) and all("multiplies a map" in row.reason and not row.fused for row in explain(program))


def test_left_to_inductor_on_the_cpu():
    """Which makes them part of its passes."""
    found: list[list[str]] = []
    compiled(FORMS["elu"][0]().eval(), found, compiled=True)(torch.randn(2, C, 7, 9))
    assert found == [[]]
