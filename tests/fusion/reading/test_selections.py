"""Selections between branches known by what they compute, and what looks like them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion.changing.plan import PLAN
from fused_attn.fusion.recipes.names import host_class
from tests.checks import random
from tests.fusion.reading.pasted import Wrapper
from tests.fusion.reading.pasted_selections import BLOCKS, SKAttention, SKOfAnything


@pytest.mark.parametrize("name", BLOCKS)
def test_recognised(name):
    build, kind, norms, activation, dense = BLOCKS[name]
    plain = build().double()
    with torch.no_grad():
        for key, tensor in (*plain.named_parameters(), *plain.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if key.endswith("var") else tensor.uniform_(-0.5, 0.5)
    block = fuse(copy.deepcopy(plain))
    (row,) = explain(block)
    assert row.fused and row.block == kind, row.reason
    assert host_class(block) is type(plain)
    found = block.__dict__[PLAN].recipe.forward
    assert (len(found.branches.norms), found.branches.activation, found.dense is not None) == (norms, activation, dense)
    assert list(block.state_dict()) == list(plain.state_dict())
    x = random(3, next(plain.parameters()).shape[1] * _groups(plain), 9, 6, dtype=torch.float64)
    for training in (True, False):
        block.train(training), plain.train(training)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = block(a), plain(b)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        grad = random(*expected.shape, dtype=torch.float64)
        found = torch.autograd.grad(actual, [a, *block.parameters()], grad)
        wanted = torch.autograd.grad(expected, [b, *plain.parameters()], grad)
        for p, q in zip(found, wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
    for p, q in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert host_class(other) is type(plain) and torch.equal(other(x), block(x))
    assert type(unfuse(block)) is type(plain)


def _groups(block: nn.Module) -> int:
    return next(m.groups for m in block.modules() if isinstance(m, nn.Conv2d))


class Near(SKAttention):
    """Two branches, and a method for each way to go wrong."""

    def __init__(self):
        super().__init__(8, kernels=(1, 3), L=4)

    def maps(self, x):
        return [conv(x) for conv in self.convs]

    def descriptor(self, maps):
        return sum(maps).mean((2, 3))

    def weights(self, maps, dim=0):
        z = self.fc(self.descriptor(maps))
        return torch.stack([fc(z) for fc in self.fcs]).softmax(dim)[..., None, None]

    def forward(self, x):
        maps = self.maps(x)
        return (self.weights(maps) * torch.stack(maps)).sum(0)


class SoftmaxOverChannels(Near):
    def weights(self, maps, dim=2):
        return super().weights(maps, dim)


class SoftmaxOverTheBatch(Near):
    def weights(self, maps, dim=1):
        return super().weights(maps, dim)


class OneBranchTwice(Near):
    def maps(self, x):
        return [self.convs[0](x)] * 2


class Scaled(Near):
    def forward(self, x):
        a, b = self.maps(x)
        w = self.weights([a, b])
        return a * w[0] * 2 + b * w[1]


class OfOneBranch(Near):
    def descriptor(self, maps):
        return maps[0].mean((2, 3))


class OfTheInput(Near):
    def forward(self, x):
        maps = self.maps(x)
        z = self.fc(x.mean((2, 3)))
        return (torch.stack([fc(z) for fc in self.fcs]).softmax(0)[..., None, None] * torch.stack(maps)).sum(0)


class Maximum(Near):
    def descriptor(self, maps):
        return sum(maps).amax((2, 3))


class Mean(Near):
    """Of a mean over branches: half the descriptor."""

    def descriptor(self, maps):
        return torch.stack(maps).mean(0).mean((2, 3))


class SwappedWeights(Near):
    def forward(self, x):
        maps = self.maps(x)
        z = self.fc(self.descriptor(maps))
        w = torch.stack([fc(z) for fc in self.fcs]).softmax(0)[..., None, None]
        return maps[0] * w[1] + maps[1] * w[0] * w[0]


class Dropped(Near):
    def weights(self, maps, dim=0):
        return F.dropout(super().weights(maps), 0.1, self.training)


class FunctionalBranch(Near):
    def maps(self, x):
        return [F.relu(F.conv2d(x, self.convs[0].conv.weight)), self.convs[1](x)]


class OneOfThreeUnused(SKOfAnything):
    def __init__(self):
        super().__init__(8)
        self.fc2 = nn.Linear(4, 24)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        w = F.softmax(self.fc2(self.fc1((a + b).mean((2, 3)))).view(len(x), 3, -1), 1)[..., None, None]
        return w[:, 0] * a + w[:, 1] * b


class Prints(Near):
    def forward(self, x):
        print("selecting")
        return super().forward(x)


REASONS = {
    SoftmaxOverChannels: "its softmax is not over the branches",
    SoftmaxOverTheBatch: "its softmax is not over the branches",
    OneBranchTwice: "a branch is used twice",
    Scaled: "a branch is scaled",
    OfOneBranch: "its descriptor is not the mean of the sum of its branches",
    OfTheInput: "its descriptor is not the mean of the sum of its branches",
    Maximum: "its descriptor is not the mean of the sum of its branches",
    Mean: "its descriptor is not the mean of the sum of its branches",
    SwappedWeights: "it is not a sum of branches, each with a weight of its own",
    Dropped: "draws random numbers",
    FunctionalBranch: "its branches or their weights are not computed by layers of its own",
    OneOfThreeUnused: "its softmax is over more than its branches",
    Prints: "prints",
}


@pytest.mark.parametrize("cls", REASONS)
def test_left_alone_with_the_reason(cls):
    block = fuse(cls())
    (row,) = (row for row in explain(block) if row.name == "(the model)")
    assert PLAN not in block.__dict__ and row.reason == REASONS[cls]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.end = SKAttention(8, (1, 3), L=4), nn.Identity()

    def forward(self, x):
        return self.end(self.inner(x)) + x


def test_inside_others():
    """What only calls a block is not one, nor is it mentioned."""
    net = fuse(nn.Sequential(Wrapper(SKAttention(8, (1, 3), L=4)), Residual()))
    assert [(row.name, row.fused) for row in explain(net)] == [("0.inner", True), ("1.inner", True)]


def test_hooks():
    """On a branch's convolution they run; on a layer that the fused block would skip they keep it from being fused."""
    calls: list[str] = []
    block = Near().eval()
    block.convs[0].conv.register_forward_hook(lambda *_: calls.append("conv"))
    fuse(block)(random(1, 8, 4, 4))
    assert PLAN in block.__dict__ and calls == ["conv"]
    hooked = Near()
    hooked.convs[1].bn.register_forward_hook(lambda *_: calls.append("bn"))
    fuse(hooked)
    assert PLAN not in hooked.__dict__
    assert explain(hooked)[0].reason.startswith("convs.1.bn carries a hook")


def test_a_change_after_fusing_counts():
    block = fuse(Near().eval())
    x = random(2, 8, 4, 4)
    before = block(x)
    block.fcs[0].register_forward_hook(lambda module, args, result: result + 1)
    assert not torch.allclose(block(x), before) and torch.equal(block(x), Near.forward(block, x))
