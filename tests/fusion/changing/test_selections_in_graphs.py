"""Selections between branches in graphs: one call around the layers between the branches' mean and their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F

from fused_attn import explain, fuse, reference
from tests.checks import random, randomised, results
from tests.fusion.in_graphs import compiled

C = 8


class Branches(nn.Module):
    """Branches of one map and a function that weights them."""

    def __init__(self, weighted, *, count=2, rank=2, activation=nn.ReLU, norm=True):
        super().__init__()
        conv, norms = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv(C, C, 3, padding=i + 1, dilation=i + 1),
                norms[rank - 1](C) if norm else nn.Identity(),
                activation(),
            )
            for i in range(count)
        )
        self.hidden, self.logits = nn.Linear(C, 4), nn.Linear(4, count * C)
        self.each = nn.ModuleList(nn.Linear(4, C) for _ in range(count))
        self.weighted = weighted

    def forward(self, x):
        return self.weighted(self, [branch(x) for branch in self.branches])


def mean(maps):
    return sum(maps[1:], maps[0]).flatten(2).mean(2)


def ones(t, x):
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def stacked(net, maps):
    z = net.logits(F.silu(net.hidden(mean(maps)))).unflatten(1, (len(maps), C)).softmax(1)
    return (torch.stack(maps, 1) * ones(z, maps[0])).sum(1)


def a_layer_each(net, maps):
    """As in the paper's own code and its many ports."""
    s = F.layer_norm(net.hidden(F.adaptive_avg_pool2d(maps[0] + maps[1], 1).flatten(1)), (4,))
    z = torch.stack([layer(s) for layer in net.each], 2).softmax(2)
    return sum(m * ones(z[..., i], m) for i, m in enumerate(maps))


def in_chunks(net, maps):
    first, second = torch.stack(net.logits(net.hidden(mean(maps)).tanh()).chunk(2, 1)).softmax(0)
    return maps[0] * ones(first, maps[0]) + maps[1] * ones(second, maps[1])


FORMS = {
    "stacked": lambda: Branches(stacked),
    "three": lambda: Branches(stacked, count=3),
    "1-D": lambda: Branches(stacked, rank=1, activation=nn.Hardswish),
    "3-D": lambda: Branches(stacked, rank=3),
    "no BatchNorm": lambda: Branches(stacked, norm=False),
    "no known activation": lambda: Branches(stacked, activation=nn.ELU),
    "a layer each": lambda: Branches(a_layer_each),
    "in chunks": lambda: Branches(in_chunks),
    "SKConv": lambda: reference.SKConv(C, groups=4),
    "SplitAttention": lambda: reference.SplitAttention(C),
    "SplitAttention in groups": lambda: reference.SplitAttention(C, groups=2),
}


def made(name):
    torch.manual_seed(0)
    net = randomised(FORMS[name]())
    shape = (C, *{"1-D": (9,), "3-D": (3, 5, 4)}.get(name, (7, 9)))
    return net, shape


@pytest.mark.parametrize("dynamic", [False, True], ids=["sizes written down", "open sizes"])
@pytest.mark.parametrize(("name", "batch"), [*((name, 3) for name in FORMS), ("stacked", 1), ("SplitAttention", 1)])
def test_found(name, batch, dynamic):
    plain, shape = made(name)
    found: list[list[str]] = []
    net = compiled(plain, found, dynamic=dynamic)
    x = random(batch, *shape, dtype=torch.float64)
    for training in (True, False) if batch > 1 else (False,):
        both = (results(each, x, training=training, allow_unused=True) for each in (net, plain))
        for p, q in zip(*both, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    folded = 0 if name.startswith("no ") else {"three": 3}.get(name, 1 if name.startswith("Split") else 2)
    assert found[-1] == ["folded_affine"] * folded + ["selection"]
    assert all(names == ["selection"] for names in found[:-1])


@pytest.mark.parametrize("name", ["stacked", "SKConv", "SplitAttention"])
def test_exported(name):
    plain, shape = made(name)
    plain.eval()
    program = export(plain, (random(2, *shape, dtype=torch.float64),), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},))
    fused = fuse(program, strict=True)
    assert [row.block for row in explain(fused) if row.fused] == ["select_squeeze", "select_sum"]
    assert [(row.block, row.fused) for row in explain(program)] == [("select_squeeze", False), ("select_sum", False)]
    for size in ((2, 7), (3, 20)):
        x = random(size[0], C, size[1], 9, dtype=torch.float64)
        torch.testing.assert_close(fused.module()(x), plain(x), rtol=1e-9, atol=1e-9)


def over_channels(net, maps):
    z = net.logits(net.hidden(mean(maps))).unflatten(1, (2, C)).softmax(2)
    return (torch.stack(maps, 1) * ones(z, maps[0])).sum(1)


def of_one_branch(net, maps):
    z = net.logits(net.hidden(maps[0].flatten(2).mean(2))).unflatten(1, (2, C)).softmax(1)
    return (torch.stack(maps, 1) * ones(z, maps[0])).sum(1)


def weights_read_too(net, maps):
    z = net.logits(net.hidden(mean(maps))).unflatten(1, (2, C)).softmax(1)
    return (torch.stack(maps, 1) * ones(z, maps[0])).sum(1) + ones(z[:, 0], maps[0])


def of_the_map_too(net, maps):
    s = net.hidden(mean(maps)) + maps[0].flatten(1).std(1, keepdim=True)
    return (torch.stack(maps, 1) * ones(net.logits(s).unflatten(1, (2, C)).softmax(1), maps[0])).sum(1)


def without_gradients(net, maps):
    with torch.no_grad():
        z = net.logits(net.hidden(mean(maps))).unflatten(1, (2, C)).softmax(1)
    return (torch.stack(maps, 1) * ones(z, maps[0])).sum(1)


@pytest.mark.parametrize(
    "weighted",
    [over_channels, of_one_branch, weights_read_too, of_the_map_too, without_gradients],
    ids=lambda f: f.__name__,
)
def test_left_alone(weighted):
    torch.manual_seed(0)
    plain = randomised(Branches(weighted))
    found: list[list[str]] = []
    net, x = compiled(plain, found), random(2, C, 7, 9, dtype=torch.float64)
    both = (results(each, x, training=True, allow_unused=True) for each in (net, plain))
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert found == [[]]
