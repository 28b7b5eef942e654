"""Gates that are modules, products that are not: found in a parent's forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion.swap import PLAN
from tests.checks import random
from tests.fusion.structure.pasted import ChannelAttention, SpatialAttention, SpatialGate
from tests.fusion.structure.pasted import ChannelGate as GatingChannel


class Block(nn.Module):
    def __init__(self, c=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.ca, self.sa = ChannelAttention(c), SpatialAttention()

    def forward(self, x):
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.ca(out) * out
        out = self.sa(out) * out
        out += residual
        return self.relu(out)


class InPlace(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out *= self.ca(out)
        out = out.mul_(self.sa(out).expand_as(out))
        return self.relu(out + x)


class Gating(Block):
    def __init__(self):
        super().__init__()
        self.ca, self.sa = GatingChannel(16), SpatialGate()

    def forward(self, x):
        return self.sa(self.ca(self.conv1(x))) + x


class OnlyChannel(Block):
    def forward(self, x):
        out = self.conv1(x)
        return self.relu(out * self.ca(out)) + x


class InSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
        self.gates = nn.ModuleList([ChannelAttention(16), SpatialAttention()])

    def forward(self, x):
        x = self.body(x)
        for gate in self.gates:
            x = x * gate(x)
        return x


FUSED = {"Block": "CBAM", "InPlace": "CBAM", "Gating": "CBAM", "OnlyChannel": "SqueezeExcite", "InSequential": "CBAM"}


def same(net: nn.Module, plain: nn.Module) -> None:
    in_place = "InPlace" in type(plain).__name__  # which PyTorch cannot differentiate either
    for training in (True, False):
        net.train(training), plain.train(training)
        x = random(2, 16, 7, 9, dtype=torch.float64)
        if in_place:
            with torch.no_grad():
                torch.testing.assert_close(net(x.clone()), plain(x.clone()), rtol=1e-9, atol=1e-10)
            continue
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = net(a), plain(b)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        grads = torch.autograd.grad(actual.square().sum(), [a, *net.parameters()], allow_unused=True)
        expected_grads = torch.autograd.grad(expected.square().sum(), [b, *plain.parameters()], allow_unused=True)
        for p, q in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
    for p, q in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", FUSED)
def test_the_products_in_a_forward_become_one_block(name):
    plain = globals()[name]().double()
    net = fuse(copy.deepcopy(plain))
    row = explain(net)[0]
    assert row.fused and row.block.startswith(FUSED[name]) and row.block.endswith("in its forward")
    assert net.__dict__[PLAN].recipe.covers
    same(copy.deepcopy(net), copy.deepcopy(plain))
    same(pickle.loads(pickle.dumps(net)), copy.deepcopy(plain))
    same(net, plain)
    assert explain(copy.deepcopy(net))[0].fused
    assert type(unfuse(net)) is type(plain)
    same(net, plain)


def test_inside_a_model():
    plain = nn.Sequential(nn.Conv2d(16, 16, 1), Block(), nn.Sequential(Block(), Block())).double()
    net = fuse(copy.deepcopy(plain))
    assert sum(row.fused for row in explain(net)) == 3
    same(net, plain)
    assert [type(m) for m in fuse(net).modules()] == [type(m) for m in net.modules()]


class SecondUse(Block):
    def forward(self, x):
        out = self.conv1(x)
        gate = self.ca(out)
        return out * gate + gate


class InPlaceSeenElsewhere(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        kept = out.flatten(1)
        out *= self.ca(out)
        return out + kept.view_as(out)


class InPlaceOnAnAlias(Block):
    def forward(self, x):
        out = self.conv1(x)
        kept = out
        out += self.conv2(x)
        return out * self.ca(out) + kept


class Another(Block):
    def forward(self, x):
        return self.conv2(x) * self.ca(self.conv1(x))


class Prints(Block):
    def forward(self, x):
        print(x.shape)
        return x * self.ca(x) + self.conv1(x)


class Keeps(Block):
    def forward(self, x):
        self.last = self.conv1(x)
        return x * self.ca(x)


class ByMode(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) if self.training else x


class WithoutGradient(Block):
    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            y = x * self.ca(x)
        return x + y


@pytest.mark.parametrize(
    "name",
    [
        "SecondUse",
        "InPlaceSeenElsewhere",
        "InPlaceOnAnAlias",
        "Another",
        "Prints",
        "Keeps",
        "ByMode",
        "WithoutGradient",
    ],
)
def test_what_is_not_that_keeps_its_forward(name, capsys):
    plain = globals()[name]().double()
    net = fuse(copy.deepcopy(plain))
    assert PLAN not in net.__dict__
    if name != "Prints":
        assert capsys.readouterr().out == ""
    assert "last" not in net.__dict__
    same(net, plain)


def test_a_change_after_fusing_counts():
    net = fuse(Block().double())
    x = random(2, 16, 7, 9, dtype=torch.float64)
    before = net(x)
    net.ca.fc1.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not torch.allclose(net(x), before)
    assert torch.equal(net(x), Block.forward(net, x))
