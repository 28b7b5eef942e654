"""Blocks in graphs: behind torch.compile and in exported programs."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import inspect
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim
from torch.testing._internal.two_tensor import TwoTensor

import fused_attn
from fused_attn import functional, fuse, reference
from fused_attn.fusion import FusionError
from fused_attn.fusion.changing import calls, graphs
from fused_attn.fusion.changing.graphs import backend, rewrite
from fused_attn.fusion.reading import templates, trial
from fused_attn.fusion.reading.trial import Trial
from tests.checks import random
from tests.fusion.reading import pasted, pasted_attention_forms, pasted_attentions
from tests.fusion.reading.pasted import CBAM, SEBlock, SpatialGate, eca_layer

OWN = (functional.__name__, calls.__name__)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


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


class Around(nn.Module):
    """A block with something before it and something after it."""

    def __init__(self, block, before=None, after=None, channels=32):
        super().__init__()
        self.conv, self.block, self.bn = nn.Conv2d(3, channels, 3, padding=1), block, nn.BatchNorm2d(channels)
        self.before, self.after = before or (lambda bn, y: y), after or (lambda y, x: y)

    def forward(self, x):
        x = self.conv(x)
        return self.after(self.block(self.before(self.bn, x)), x).mean((2, 3))


def is_fused(node) -> bool:
    block = isinstance(node.target, calls.Block) or getattr(node.target, "__module__", "") in OWN
    return node.op == "call_function" and block


def counting(found: list):
    """A backend that rewrites and runs the graph."""

    def compiler(graph, inputs):
        rewrite(graph, inputs)
        found.append([n for n in graph.graph.nodes if is_fused(n)])
        return graph

    return compiler


def randomised(net: nn.Module) -> nn.Module:
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for t in (part.weight, part.bias, part.running_mean, part.running_var):
                t.data.uniform_(0.5, 1.5)
    return net


def both(net: nn.Module, compiled: nn.Module, x: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Results, gradients and buffers of a network as it is and compiled."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = [t.clone() for t in net.buffers()]
    actual = compiled(a)
    buffers = [t.clone() for t in net.buffers()]
    for t, was in zip(net.buffers(), before, strict=True):
        t.data.copy_(was)
    expected = net(b)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(buffers, list(net.buffers()), rtol=tolerance, atol=tolerance)
    parameters = list(net.parameters())
    found = torch.autograd.grad(actual.square().sum(), [a, *parameters], allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected.square().sum(), [b, *parameters], allow_unused=True, materialize_grads=True)
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=10 * tolerance, atol=10 * tolerance)


def blocks_of(net: nn.Module, x: torch.Tensor, tolerance: float = 1e-9, **options) -> list:
    """The calls in the one graph of a network, which computes what the network does."""
    found: list = []
    both(net, torch.compile(net, backend=counting(found), **options), x, tolerance)
    (nodes,) = found
    return nodes


# Around a block


def test_with_what_stands_around_it():
    (node,) = blocks_of(Net().double().eval(), random(2, 3, 8, 9, dtype=torch.float64))
    assert node.target is functional.channel_gate
    assert node.kwargs["post_activation"] == "relu" and node.kwargs["residual"] is not None
    assert node.kwargs["pre_activation"] == "relu" and node.kwargs["affine"] is not None


@pytest.mark.parametrize("batch", [1, 2])
def test_behind_a_map_of_one_channel(batch):
    """As of a grey image: the axes of the map behind the convolution are in their order."""
    net = randomised(nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), SEBlock(32)).double().eval())
    assert len(blocks_of(net, random(batch, 1, 6, 5, dtype=torch.float64))) == 1


def test_in_training_the_batch_norm_stays_outside():
    (node,) = blocks_of(Net().double().train(), random(2, 3, 8, 9, dtype=torch.float64))
    assert "affine" not in node.kwargs and node.kwargs["post_activation"] == "relu"


def _iadd(y, x):
    y += x
    return F.relu(y, inplace=True)


def _iadd_to_the_residual(y, x):
    x = x + 1
    x += y
    return x.relu_()


def _discarding(y, x):
    y.add_(x)
    torch.relu_(y)
    return y


AFTER = {
    "sum": (lambda y, x: y + x, {"residual"}),
    "other order": (lambda y, x: torch.relu(x + y), {"residual", "post_activation"}),
    "in place": (_iadd, {"residual", "post_activation"}),
    "into the residual": (_iadd_to_the_residual, {"residual", "post_activation"}),
    "activation alone": (lambda y, x: F.silu(y), {"post_activation"}),
    "discarding results": (_discarding, set()),
    "two users": (lambda y, x: (y + x) * y, set()),
    "broadcast": (lambda y, x: y + x[:, :1], set()),
    "scaled": (lambda y, x: torch.add(y, x, alpha=2), set()),
}
BEFORE = {
    "batch norm": lambda bn, y: bn(y),
    "relu": lambda bn, y: F.relu(bn(y), inplace=True),
    "silu": lambda bn, y: F.silu(bn(y)),
    "hard swish": lambda bn, y: F.hardswish(bn(y)),
}
KINDS = {
    "channel_gate": lambda: SEBlock(32),
    "spatial_gate_with_batch_norm": SpatialGate,
    "cbam": lambda: pasted.cbam(32),
}


#: How it is written makes no difference between blocks: all ways with one of them, a few with the others.
FEW = [("spatial_gate_with_batch_norm", "other order"), ("spatial_gate_with_batch_norm", "activation alone")]
FEW += [("cbam", "in place"), ("cbam", "activation alone")]


@pytest.mark.parametrize(("kind", "after"), [("channel_gate", after) for after in AFTER] + FEW)
def test_sums_and_activations_after(kind, after):
    function, expected = AFTER[after]
    net = randomised(Around(KINDS[kind](), after=function).double().eval())
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))
    assert node.target.__name__ == kind
    assert {"residual", "post_activation"} & set(node.kwargs) == expected


@pytest.mark.parametrize(
    ("kind", "before"),
    [("channel_gate", before) for before in BEFORE] + [("spatial_gate_with_batch_norm", "silu"), ("cbam", "relu")],
)
def test_batch_norm_before(kind, before):
    net = randomised(Around(KINDS[kind](), BEFORE[before]).double().eval())
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64), 1e-6 if before == "hard swish" else 1e-9)
    expected = {"batch norm": "identity", "hard swish": "hard_swish"}.get(before, before)
    assert node.target.__name__ == kind and node.kwargs["pre_activation"] == expected


def test_a_batch_norm_that_others_read_stays():
    net = randomised(Around(SEBlock(32), None, None).double().eval())
    net.forward = lambda x: (y := net.bn(net.conv(x))) + net.block(y)  # type: ignore[method-assign]
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))
    assert "affine" not in node.kwargs and "residual" in node.kwargs


# Blocks

GRAPHS = {
    "SEBlock": "channel_gate",
    "SEMax": "channel_gate",
    "HardSE": "channel_gate",
    "ESE": "channel_gate",
    "eca_layer": "channel_gate",
    "ChannelGate": "channel_gate",
    "StackedPools": "spatial_gate",
    "SpatialGate": "spatial_gate_with_batch_norm",
    "CBAM": "cbam_with_batch_norm",
    "cbam": "cbam",
    "SCSE": "SCSE",
    "SCSEMax": "SCSE",
    "BAM": "BAM",
    "BAMByConvolutions": "BAM",
    "TripletAttention": "TripletAttention",
    "CoordAtt": "CoordinateAttention",
    "simam_module": "SimAM",
}
WITHOUT_CHANNELS = {"eca_layer", "StackedPools", "SpatialGate", "TripletAttention", "simam_module"}


@pytest.mark.parametrize("how", ["eval", "dynamic training", "one image"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kind(name, how):
    arguments = () if name in WITHOUT_CHANNELS else (32,)
    net = randomised(Around(getattr(pasted, name)(*arguments)).double().train(how == "dynamic training"))
    tolerance = 1e-6 if name in ("HardSE", "CoordAtt") else 1e-9
    shape = (1 if how == "one image" else 2, 3, 6, 7)
    dynamic = how == "dynamic training"
    (node,) = blocks_of(net, random(*shape, dtype=torch.float64), tolerance, dynamic=dynamic)
    assert node.target.__name__ == GRAPHS[name]


@pytest.mark.parametrize("how", ["eval", "dynamic training", "one image"])
@pytest.mark.parametrize("name", [name for name in pasted_attentions.BLOCKS if not name.startswith("PlainCAM")])
def test_every_attention(name, how):
    """Their gamma starts at zero, which would hide what they do."""
    make, kind = pasted_attentions.BLOCKS[name]
    block = make()
    channels = next((p.shape[1] for p in block.parameters() if p.dim() > 2), 24)
    for p in block.parameters():
        p.data.uniform_(-0.5, 0.5)
    net: nn.Module = Around(block, channels=channels)
    shape: tuple[int, ...] = (1 if how == "one image" else 2, 3, 6, 7)
    if name.startswith("PAM ("):
        net, shape = nn.Sequential(nn.Conv1d(3, channels, 3), block), (*shape[:2], 42)
    net = randomised(net.double().train(how == "dynamic training"))
    (node,) = blocks_of(net, random(*shape, dtype=torch.float64), dynamic=how == "dynamic training")
    # In a graph the sum inside WithoutTheMap is found with it.
    assert node.target.__name__ == ("PositionAttention" if name.startswith("WithoutTheMap") else kind)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_scale", [False, True])
def test_timms_non_local(use_scale, training):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    block = layers.NonLocalAttn(32, use_scale=use_scale)
    (node,) = blocks_of(randomised(Around(block).double().train(training)), random(2, 3, 6, 7, dtype=torch.float64))
    assert node.target.__name__ == "NonLocal" and node.target.module.scale == (32**-0.5 if use_scale else 1)


@pytest.mark.parametrize("name", sorted({*pasted_attentions.LOOK_ALIKES} - {"ScaledByPositions", "WithoutTheMap"}))
def test_attentions_that_are_others(name):
    """But for one scaled by a size, which is a number in a graph, and one with a difference behind it."""
    cls = pasted_attentions.LOOK_ALIKES[name]
    block = cls()
    for p in block.parameters():
        p.data.uniform_(-0.5, 0.5)
    channels = next((p.shape[1] for p in block.parameters() if p.dim() > 2 and p.shape[1] > 1), 24)
    net = randomised(Around(block, channels=channels).double().eval())
    assert not blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))


def restarted(block: nn.Module) -> nn.Module:
    """What starts at zero, as gamma does, would hide what a block does."""
    for p in block.parameters():
        p.data.uniform_(-0.5, 0.5)
    return block


KINDS_OF_FORMS = {
    "CrissCrossAttention": "CrissCrossAttention",
    "GlobalContext": "context_pool",
    "DoubleAttention": "DoubleAttention",
}
FORMS = [name for name, (_, kind, *_) in pasted_attention_forms.BLOCKS.items() if kind in KINDS_OF_FORMS]


#: The others are written in other ways, which makes no difference between these.
BOTH = [
    "CrissCrossAttention (32,) 2",
    "MaskedRows (24,) 2",
    "ContextBlock (32, 'att', ('channel_add', 'channel_mul')) 2",
]


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "eval") for name in FORMS if name not in BOTH]
    + [(name, how) for name in BOTH for how in ("dynamic training", "one image")]
    + [("ContextOfTokens (24,) 2", "one image")],
)
def test_criss_cross_and_context(name, how):
    """Of the layers around it, those of global context stay the graph's own, and so do those of MaskedRows, which are
    not those of CCNet's block."""
    make, kind, channels, rank = pasted_attention_forms.BLOCKS[name]
    block = restarted(make())
    net = Around(block, channels=channels) if rank == 2 else nn.Sequential(nn.Conv3d(3, channels, 1), block)
    net = randomised(net.double().train(how == "dynamic training"))
    shape = (1 if how == "one image" else 2, 3, 6, 7, 5)[: rank + 2]
    nodes = blocks_of(net, random(*shape, dtype=torch.float64), dynamic=how == "dynamic training")
    expected = "criss_cross_attention" if name.startswith("MaskedRows") else KINDS_OF_FORMS[kind]
    assert [n.target.__name__ for n in nodes] == [expected] * (2 if name.startswith("TwiceInOneForward") else 1)


class Crossed(nn.Module):
    """masked(logits of the columns, height, map) are those without the position itself."""

    def __init__(self, masked=None, layer=lambda c, d: nn.Conv2d(c, d, 1), after=None):
        super().__init__()
        self.q, self.k, self.v = layer(32, 4), layer(32, 4), nn.Conv2d(32, 32, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.masked = masked or (lambda e, h, x: e.masked_fill(torch.eye(h, dtype=torch.bool)[:, None], -1e9))
        self.after = after or (lambda columns, rows, x, gamma: gamma * (columns + rows) + x)

    def forward(self, x):
        q, k, v, h = self.q(x), self.k(x), self.v(x), x.shape[2]
        columns = self.masked(torch.einsum("bchw,bcgw->bhwg", q, k), h, x)
        a = torch.cat([columns, torch.einsum("bchw,bchv->bhwv", q, k)], 3).softmax(3)
        columns = torch.einsum("bhwg,bcgw->bchw", a[..., :h], v)
        return self.after(columns, torch.einsum("bhwv,bchv->bchw", a[..., h:], v), x, self.gamma)


class ByMatmul(Crossed):
    def forward(self, x):
        q, k, v, h = self.q(x), self.k(x), self.v(x), x.shape[2]
        columns = (q.permute(0, 3, 2, 1) @ k.permute(0, 3, 1, 2)).masked_fill(torch.eye(h) == 1, -torch.inf)
        a = torch.cat((columns.transpose(1, 2), q.permute(0, 2, 3, 1) @ k.permute(0, 2, 1, 3)), -1).softmax(-1)
        columns, rows = a[..., :h].transpose(1, 2) @ v.permute(0, 3, 2, 1), a[..., h:] @ v.permute(0, 2, 3, 1)
        return self.gamma * (columns.permute(0, 3, 2, 1) + rows.permute(0, 3, 1, 2)) + x


def _normed(c, d):
    return nn.Sequential(nn.Conv2d(c, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU())


CROSSED = {
    "of ones": Crossed(lambda e, h, x: e + torch.diag(torch.ones(h) * -1e10)[:, None]),
    "filled zeros": Crossed(
        lambda e, h, x: e + torch.zeros(h, h).masked_fill(torch.eye(h).bool(), -torch.inf)[:, None]
    ),
    "of the map's kind": Crossed(lambda e, h, x: e + torch.diag_embed(x.new_full((h,), -torch.inf))[:, None]),
    "expanded": Crossed(lambda e, h, x: e - torch.diag(torch.tensor(torch.inf, device="cpu").expand(h))[:, None]),
    "gamma twice": Crossed(after=lambda columns, rows, x, gamma: x + gamma * columns + gamma * rows),
    "layers without a bias": Crossed(layer=lambda c, d: nn.Conv2d(c, d, 1, bias=False)),
    "normed": Crossed(layer=_normed),
    "no map added": Crossed(after=lambda columns, rows, x, gamma: columns.add_(rows)),
}
ALONE = {"normed", "no map added"}


@pytest.mark.parametrize("name", CROSSED)
def test_ways_of_writing_criss_cross(name):
    net = randomised(Around(restarted(copy.deepcopy(CROSSED[name]))).double().eval())
    (node,) = blocks_of(net, random(3, 3, 6, 6, dtype=torch.float64))
    assert node.target.__name__ == ("criss_cross_attention" if name in ALONE else "CrissCrossAttention")


class Pooled(nn.Module):
    def __init__(self, pool, bias=True):
        super().__init__()
        self.logits, self.pool = nn.Conv2d(32, 1, 1, bias=bias), pool
        self.mlp = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 32))

    def forward(self, x):
        x = F.relu(x)
        return x * self.mlp(self.pool(x, self.logits(x)).flatten(1)).sigmoid()[:, :, None, None]


POOLED = {
    "a sum with its axes": Pooled(lambda x, a: (x * a.flatten(2).softmax(2).view_as(a)).sum((2, 3), keepdim=True)),
    "weights first": Pooled(lambda x, a: a.flatten(2).softmax(2) @ x.flatten(2).transpose(1, 2)),
    "weights last": Pooled(lambda x, a: torch.bmm(x.flatten(2), a.flatten(1).softmax(1)[:, :, None])),
    "einsum": Pooled(lambda x, a: torch.einsum("bcn,bn->bc", x.flatten(2), a.flatten(1).softmax(1))),
    "no bias": Pooled(lambda x, a: x.flatten(2) @ a.flatten(2).softmax(2).mT, bias=False),
}


@pytest.mark.parametrize("name", POOLED)
def test_ways_of_writing_a_context(name):
    net = randomised(Around(copy.deepcopy(POOLED[name])).double().eval())
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))
    assert node.target is calls.context_pool and ("bias" in node.kwargs) is (name != "no bias")


class WithItsWeights(Pooled):
    def forward(self, x):
        weights = self.logits(x).flatten(2).softmax(2)
        return x * self.mlp((x.flatten(2) @ weights.mT).flatten(1))[:, :, None, None] + weights.view_as(x[:, :1])


NOT_CROSSED = {
    "weights that others read": lambda: WithItsWeights(None),
    "itself twice": lambda: pasted_attention_forms.Unmasked(),
    "two softmaxes": lambda: pasted_attention_forms.WithoutColumns(),
    "a mask that is not infinite": lambda: Crossed(lambda e, h, x: e - 1e4 * torch.eye(h)[:, None]),
    "a difference": lambda: Crossed(after=lambda columns, rows, x, gamma: gamma * (columns - rows) + x),
    "a context of others": lambda: pasted_attention_forms.ContextOfAnother(),
    "of a row": lambda: Pooled(lambda x, a: (x * a.softmax(3)).sum((2, 3))),
    "a mean": lambda: Pooled(lambda x, a: (x * a.flatten(2).softmax(2).view_as(a)).mean((2, 3))),
}


@pytest.mark.parametrize("name", NOT_CROSSED)
def test_other_attentions_along_lines_and_to_one_context(name):
    net = randomised(Around(restarted(NOT_CROSSED[name]())).double().eval())
    assert not blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize("fusions", [(), ("fuse_add",), ("fuse_add", "fuse_scale")], ids=str)
def test_timms_global_context(fusions):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    options = {name: name in fusions for name in ("fuse_add", "fuse_scale")} if fusions else {}
    block = restarted(layers.GlobalContext(32, **options))
    (node,) = blocks_of(randomised(Around(block).double().eval()), random(2, 3, 6, 7, dtype=torch.float64))
    assert node.target is calls.context_pool


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (reference.CrissCrossAttention(32), ["CrissCrossAttention"] * 2),
        (reference.GlobalContext(32, fuse="both"), ["context_pool"]),
        (reference.DoubleAttention(32, distribute="positions"), ["DoubleAttention"]),
    ],
)
def test_our_reference(block, expected):
    nodes = blocks_of(Around(restarted(copy.deepcopy(block))).double(), random(2, 3, 6, 7, dtype=torch.float64))
    assert [n.target.__name__ for n in nodes] == expected


@pytest.mark.parametrize("name", ["CrissCrossAttention (32,) 2", "ContextBlock (32, 'att', ('channel_add',)) 2"])
@pytest.mark.parametrize("sizes", ["fixed", "open"])
def test_an_exported_criss_cross_and_context(name, sizes):
    """Infinity, which the code makes a tensor of, is a constant of the program."""
    net, x = Around(restarted(pasted_attention_forms.BLOCKS[name][0]())).double().eval(), random(2, 3, 6, 7).double()
    shapes = ({0: Dim("batch"), 2: Dim("height", min=2), 3: Dim("width", min=2)},) if sizes == "open" else None
    program = torch.export.export(net, (x,), dynamic_shapes=shapes)
    fused = fuse(program, strict=True)
    kind = "criss_cross_attention" if "Cross" in name else "context_pool"
    assert any(f"fused_attn.{kind}" in str(n.target) for n in fused.graph.nodes)
    assert not any("softmax" in str(n.target) for n in fused.graph.nodes)
    assert list(fused.state_dict) == list(program.state_dict)
    for shape in ((2, 3, 6, 7), (3, 3, 9, 4)) if sizes == "open" else ((2, 3, 6, 7),):
        x = random(*shape, dtype=torch.float64)
        torch.testing.assert_close(fused.module()(x), net(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", ["fixed", "batch open", "open"])
@pytest.mark.parametrize("name", ["CrissCrossAttention (32,) 2", "MaskedRows (24,) 2"])
def test_a_criss_cross_of_a_large_map(name, sizes, monkeypatch):
    """The check, on small maps, has to say in small what the graph says of samples next to lines and of both lines."""
    found: list = []
    drawn: list = []
    right = trial.random_tensor
    monkeypatch.setattr(trial, "random_tensor", lambda shape, *a, **kw: drawn.append(shape) or right(shape, *a, **kw))

    def keep(graph, inputs):
        found.append(rewrite(graph, inputs))
        raise NotImplementedError

    make, _, channels, _ = pasted_attention_forms.BLOCKS[name]
    x = torch.empty(3, 3, 400, 440)
    if sizes == "batch open":
        torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(Around(make(), channels=channels).eval(), backend=keep, dynamic=sizes == "open" or None)
    with pytest.raises(Exception, match="NotImplementedError"), torch.no_grad():
        compiled(x)
    assert found == [1] and max(map(math.prod, drawn)) <= trial.SMALL


@pytest.mark.parametrize(
    "name", ["CrissCrossAttention (32,) 2", "EinsumCrissCross (64,) 2", "ContextBlock (32, 'att', ('channel_add',)) 2"]
)
def test_criss_cross_and_context_under_autocast(name):
    make, _, channels, _ = pasted_attention_forms.BLOCKS[name]
    net, found = Around(restarted(make()), channels=channels).eval(), []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = random(2, 3, 6, 7)
        actual, expected = torch.compile(net, backend=counting(found))(x), net(x)
    assert actual.dtype == expected.dtype and len(found[0]) == 1
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_criss_cross_and_context_behind_autograd():
    """One call forward and one backward each, of open sizes; the bias that no softmax sees has a gradient, of zeros."""
    found: list = []

    def keep(graph, inputs):
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    def compiler(graph, inputs):
        rewrite(graph, inputs)
        return aot_autograd(fw_compiler=keep)(graph, inputs)

    context = pasted_attention_forms.ContextBlock(32)
    layers = nn.Conv2d(3, 32, 1), context, pasted_attention_forms.CrissCrossAttention(32)
    net = restarted(nn.Sequential(*layers).double())
    both(net, torch.compile(net, backend=compiler, dynamic=True), random(2, 3, 6, 7, dtype=torch.float64))
    ours = [name.split(".")[1] for name in found if name.startswith("fused_attn")]
    for name in ("context_pool", "criss_cross_attention"):
        assert ours.count(name) == ours.count(f"{name}_backward") == 1
    assert not any("softmax" in name for name in found)
    net(random(2, 3, 6, 7, dtype=torch.float64)).sum().backward()
    assert context.conv_mask.bias.grad is not None


@pytest.mark.parametrize("dynamic", [False, True])
def test_several(dynamic):
    net, found = Blocks().double().eval(), []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=dynamic)
    both(net, net_compiled, random(2, 3, 8, 9, dtype=torch.float64))
    if dynamic:
        both(net, net_compiled, random(3, 3, 11, 7, dtype=torch.float64))
    for nodes in found:
        assert [n.target.__name__ for n in nodes] == ["channel_gate", "cbam_with_batch_norm", "channel_gate"]


def test_a_graph_break_between():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = SEBlock(32), eca_layer()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    net, found = Broken().double(), []
    both(net, torch.compile(net, backend=counting(found)), random(2, 32, 5, 4, dtype=torch.float64))
    assert [[n.target for n in nodes] for nodes in found] == [[functional.channel_gate]] * 2


# What is left alone


class Near(nn.Module):
    def forward(self, x):
        return x * F.adaptive_avg_pool2d(x, 2).mean((2, 3), True).sigmoid() + x * (x.mean((2, 3), True).exp())


class Fixed(nn.Module):
    """Global on maps of 7 x 7 only."""

    def forward(self, x):
        return x * F.avg_pool2d(x, 7).sigmoid()


@pytest.mark.parametrize("net", [Near(), Fixed()], ids=["near", "fixed"])
def test_near_misses(net):
    found: list = []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=True)
    both(net, net_compiled, random(2, 3, 7, 7, dtype=torch.float64))
    assert not isinstance(net, Near) or found == [[]]


def _gate(x):
    return x.mean((2, 3), keepdim=True).sigmoid()


class WrittenMap(nn.Module):
    """The map is read again after the gate was written into it."""

    def forward(self, x):
        x = x + 1
        y = x.mul_(_gate(x))
        return y.exp() + x


class WrittenInput(nn.Module):
    def forward(self, x):
        x = x * 1.0
        view = x[:, :1]
        y = x.mul_(_gate(x))
        return y.exp() + view


class WithoutGradients(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            gate = _gate(x)
        return x * gate


class Detached(nn.Module):
    def forward(self, x):
        return x * _gate(x.detach())


class ChangedBetween(nn.Module):
    """The map changes between the pool and the product."""

    def forward(self, x):
        x = x + 1
        gate = _gate(x)
        x.mul_(2)
        return x * gate


class WrittenGate(nn.Module):
    """The gate changes between its sigmoid and the product."""

    def forward(self, x):
        gate = _gate(x.detach())
        gate.mul_(2)
        return x * gate


class WrittenOut(nn.Module):
    def forward(self, x):
        y = torch.empty_like(x)
        torch.mul(x.detach(), _gate(x.detach()), out=y)
        return y + x


class WrittenWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        gate = self.fc(x.detach().mean((2, 3))).detach().sigmoid()[:, :, None, None]
        with torch.no_grad():
            self.fc.weight.mul_(2)
        return x * gate


class WithGradientsInPart(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            gate = _gate(x)
            with torch.enable_grad():
                return x * gate


class Rounded(nn.Module):
    """The gate is made as coarse as a half is."""

    def forward(self, x):
        return x * _gate(x).half().to(x.dtype)


class Hooked(nn.Module):
    """The gate's gradient is changed on its way."""

    def forward(self, x):
        gate = _gate(x)
        gate.register_hook(lambda grad: grad * 3)
        return x * gate


class Mapped(nn.Module):
    def forward(self, x):
        return torch.func.vmap(lambda y: (y[None] * _gate(y[None]))[0])(x)


class Autocast(nn.Module):
    """Two kinds of autocast, in one of which the gate is computed."""

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            gate = _gate(x)
        with torch.autocast("cpu", torch.bfloat16):
            return x * gate


def _write_the_input(x):
    return x.mul_(_gate(x))


def _write_a_view(x):
    view = x[1:]
    return view.mul_(_gate(view))


@pytest.mark.parametrize("function", [_write_the_input, _write_a_view], ids=["input", "view"])
def test_what_is_written_into_an_argument_is_written(function):
    found, x = [], random(2, 8, 4, 5, dtype=torch.float64)
    expected, given = x.clone(), x.clone()
    with torch.no_grad():
        result = function(expected)
        torch.testing.assert_close(torch.compile(function, backend=counting(found))(given), result)
    torch.testing.assert_close(given, expected)
    assert found == [[]] and not torch.equal(expected, x)


KEPT = [WrittenMap, WrittenInput, WrittenGate, WrittenOut, WrittenWeight, ChangedBetween, Rounded, Hooked, Mapped]
KEPT += [WithoutGradients, WithGradientsInPart, Detached, Autocast]


@pytest.mark.parametrize("net", KEPT)
def test_what_must_not_be_replaced(net):
    found, x = [], random(2, 8, 4, 5, dtype=torch.float64)
    net, twin = net().double(), net().double()
    twin.load_state_dict(net.state_dict())
    given, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = torch.compile(net, backend=counting(found))(given), twin(same)
    torch.testing.assert_close(actual, expected)
    grads = (torch.autograd.grad(y.square().sum(), t) for y, t in ((actual, given), (expected, same)))
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(dict(net.state_dict()), dict(twin.state_dict()))
    assert found and not any(found)


def test_a_derivative_forward_is_not_followed_and_leaves_nothing_behind():
    """A level of forward derivatives is the process's: one that is entered while a graph is followed must be left."""

    def derivative(x):
        return torch.func.jvp(lambda y: y * _gate(y), (x,), (x,))[1]

    found, x = [], random(2, 8, 4, 5, dtype=torch.float64)
    expected = derivative(x)
    torch.testing.assert_close(torch.compile(derivative, backend=counting(found))(x), expected)
    torch.testing.assert_close(derivative(x), expected)
    assert found == [[]]


def _view_made_before(x, gate):
    y = x * gate
    view = y[:, :1]
    y.add_(1)
    return y + view * 2


def _written_later(x, gate):
    y = x * gate
    y[:, 0] = 0
    return y.relu_() + gate


def _residual_written_later(x, gate):
    residual = x * 1
    y = F.relu(x * gate + residual)
    residual.mul_(3)
    return y + residual


def _without_gradients(x, gate):
    with torch.no_grad():
        y = x * _gate(x)
    return y + x


BESIDE = {
    "the gate is returned": lambda x, gate: x * gate + gate,
    "two products": lambda x, gate: x * gate + x.relu() * gate,
    "a view of the result": _view_made_before,
    "the result is written": _written_later,
    "the residual is written": _residual_written_later,
    "no gradient of the residual": lambda x, gate: F.relu(x * gate + x.detach()),
    "no gradient of the result": lambda x, gate: (x * gate).detach() + x,
    "no gradients at all": _without_gradients,
    "strides are read": lambda x, gate: (y := x * gate) * y.stride(1),
}


@pytest.mark.parametrize("how", BESIDE)
def test_what_stands_beside_a_block_sees_the_same(how):
    net = Around(nn.Identity(), after=lambda y, x: BESIDE[how](x, _gate(x))).double()
    assert blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))


def test_weights_of_a_subclass_are_left_to_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            weight = random(8, 8)
            self.weight = nn.Parameter(TwoTensor(weight, weight.clone()))

        def forward(self, x):
            return x * F.linear(x.mean((2, 3)), self.weight).sigmoid()[:, :, None, None]

    net, found = Scaled(), []
    x = random(2, 8, 5, 4)
    torch.testing.assert_close(torch.compile(net, backend=counting(found))(x).a, net(x).a)
    assert found == [[]]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.arange(x.shape[3]).to(x.dtype),
        lambda x: torch.zeros(x.shape[3], device=x.device),
        lambda x: torch.rand(x.shape[3], device="cpu"),
        lambda x: x.cpu().to("cpu"),
    ],
    ids=["arange", "a map's device", "random", "moved"],
)
def test_tensors_that_are_made_beside_a_block(make):
    """Nothing is made or drawn while a graph is followed."""
    found: list = []

    def compiler(graph, inputs):
        state = torch.get_rng_state()
        found.append(rewrite(graph, inputs))
        assert torch.equal(torch.get_rng_state(), state)
        return graph

    net = Around(SEBlock(32), after=lambda y, x: y + make(x))
    torch.compile(net, backend=compiler)(random(2, 3, 6, 7))
    assert found == [1]


class Written(nn.Module):
    """Squeeze and excitation written out in a residual block, as copies of EfficientNet have it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.reduce, self.expand, self.act = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.SiLU()
        self.project, self.bn2 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, inputs, drop=None):
        x = self.act(self.bn(self.conv(inputs)))
        gate = self.expand(self.act(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        x = self.bn2(self.project(torch.sigmoid(gate) * x))
        return (F.dropout(x, drop, self.training) if drop else x) + inputs


@pytest.mark.parametrize("training", [False, True])
def test_written_out_in_a_residual_block(training):
    net, x = randomised(Written().double().train(training)), random(2, 8, 9, 7, dtype=torch.float64)
    (node,) = blocks_of(net, x)
    assert ("affine" in node.kwargs) is not training
    program = torch.export.export(net, (x,))
    fused = fuse(program, strict=True)
    assert any("fused_attn.channel_gate" in str(n.target) for n in fused.graph.nodes)
    torch.testing.assert_close(fused.module()(x), program.module()(x), rtol=1e-9, atol=1e-9)


class SimAMOf(nn.Module):
    """Given its epsilon."""

    def forward(self, x, e_lambda):
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        return x * (d / (4 * (d.sum((2, 3), keepdim=True) / n + e_lambda)) + 0.5).sigmoid()


def test_an_option_that_is_open_is_guarded():
    """A number that the graph has as a symbol is written into the call: another one compiles anew."""
    net, found = SimAMOf(), []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=True)
    x = random(2, 8, 6, 7, dtype=torch.float64)
    for e_lambda in (1e-4, 0.5, 2.0):
        torch.testing.assert_close(net_compiled(x, e_lambda), net(x, e_lambda), rtol=1e-9, atol=1e-9)
    assert [n.target.__name__ for n in found[0]] == ["SimAM"] and len(found) > 1


def test_what_does_not_compute_the_same_is_left_alone_and_logged(monkeypatch, caplog):
    right = graphs._channel
    monkeypatch.setattr(graphs, "_channel", lambda *args: (right(*args)[0], {**right(*args)[1], "gate": "tanh"}))
    with caplog.at_level(logging.WARNING):
        assert blocks_of(Net().double().eval(), random(2, 3, 8, 9, dtype=torch.float64)) == []
    assert "another result" in caplog.text and len(caplog.records) <= 2


def test_equal_blocks_are_checked_once(monkeypatch):
    checked = []
    compare = Trial._compare
    monkeypatch.setattr(Trial, "_compare", lambda self, *args: checked.append(1) or compare(self, *args))
    net = nn.Sequential(nn.Conv2d(3, 32, 1), *(nn.Sequential(nn.Conv2d(32, 32, 1), SEBlock(32)) for _ in range(5)))
    assert len(blocks_of(net.double().eval(), random(2, 3, 6, 7, dtype=torch.float64))) == 5
    assert len(checked) == 1


def test_sizes_that_are_written_down_in_a_large_static_graph():
    """The authors' pools have the map's size as their window; the check must not need a map of that size."""
    graphs: list = []

    def keep(graph, inputs):
        graphs.append((rewrite(graph, inputs), graph))
        return graph

    net = Around(pasted.ChannelGate(32)).eval()
    with torch.no_grad():
        torch.compile(net, backend=keep, dynamic=False)(torch.empty(16, 3, 160, 160))
    assert graphs[0][0] == 1


def test_autocast_and_half_precision():
    net, found = Around(SEBlock(32), BEFORE["relu"]).eval(), []
    net_compiled = torch.compile(net, backend=counting(found))
    x = random(2, 3, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net_compiled(x), net(x), rtol=2e-2, atol=2e-2)
    net.bfloat16()
    torch.testing.assert_close(net_compiled(x.bfloat16()), net(x.bfloat16()), rtol=2e-2, atol=2e-2)
    assert [len(nodes) for nodes in found] == [1, 1]


def test_parameters_of_another_dtype_are_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x * self.fc(x.mean((2, 3)).float()).sigmoid().to(x.dtype)[:, :, None, None]

    net, found = Mixed(), []
    x = random(2, 8, 5, 4).bfloat16()
    torch.testing.assert_close(torch.compile(net, backend=counting(found))(x), net(x))
    assert found == [[]]


# The moment has no part in it


@contextlib.contextmanager
def _default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MOMENTS = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "a device": lambda: torch.device("meta"),
    "the default device": _default_device,
    "a backend that cannot serve": lambda: fused_attn.backend("cuda"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_depends_on_the_moment(moment, monkeypatch):
    """What is found, checked and kept the first time that it is asked for, and the numbers of a program."""
    for name in ("channel_gates", "spatial_gates", "modules"):
        monkeypatch.setattr(templates, name, templates.functools.cache(getattr(templates, name).__wrapped__))
    net, x = randomised(Blocks().double().eval()), random(2, 3, 8, 9, dtype=torch.float64)
    program = torch.export.export(net, (x,))
    module = program.module(check_guards=False)
    holders = [n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")]
    state = torch.get_rng_state()
    with MOMENTS[moment]():
        count, fused = rewrite(module, holders), fuse(program, strict=True)
    assert count == 3 and torch.equal(torch.get_rng_state(), state)
    for found in (module, fused.module()):
        torch.testing.assert_close(found(x), net(x), rtol=1e-9, atol=1e-9)
    assert sum("fused_attn" in str(n.target) for n in fused.graph.nodes) >= 3


def test_graphs_are_rewritten_in_several_threads_at_once(monkeypatch):
    for name in ("channel_gates", "spatial_gates", "modules"):
        monkeypatch.setattr(templates, name, templates.functools.cache(getattr(templates, name).__wrapped__))
    x = random(2, 3, 8, 9, dtype=torch.float64)
    nets = [randomised(Blocks().double().eval()) for _ in range(4)]
    found = [torch.export.export(net, (x,)).module(check_guards=False) for net in nets]
    holders = [[n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")] for module in found]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(rewrite, found, holders)) == [3] * 4
    for net, module in zip(nets, found, strict=True):
        torch.testing.assert_close(module(x), net(x), rtol=1e-9, atol=1e-9)


# Exported programs


@pytest.mark.parametrize("least", [1, 4])
def test_an_exported_program(tmp_path, least):
    net = Net().double().eval()
    x = random(6, 3, 8, 9, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=least, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    fused = fuse(program)
    assert any("fused_attn.channel_gate" in str(n.target) for n in fused.graph.nodes)
    assert list(fused.state_dict) == list(program.state_dict)
    torch.export.save(fused, tmp_path / "fused.pt2")
    for found in (fused, torch.export.load(tmp_path / "fused.pt2")):
        for size in (least, 7, 64):
            other = random(size, 3, 8, 9, dtype=torch.float64)
            torch.testing.assert_close(found.module()(other), net(other), rtol=1e-9, atol=1e-10)
        for size in (65, 3)[: least - 1 or 1]:
            with pytest.raises(Exception, match=str(64 if size > 64 else least)):
                found.module()(random(size, 3, 8, 9, dtype=torch.float64))


def test_an_exported_program_without_blocks():
    program = torch.export.export(nn.Conv2d(3, 4, 1), (random(2, 3, 8, 9),))
    assert fuse(program, strict=True) is program


def test_strict_names_what_a_program_keeps(monkeypatch):
    program = torch.export.export(Net().eval(), (random(2, 3, 8, 9),))
    assert fuse(program, strict=True) is not program
    right = graphs._channel
    monkeypatch.setattr(graphs, "_channel", lambda *args: (right(*args)[0], {**right(*args)[1], "gate": "tanh"}))
    assert fuse(program) is program
    with pytest.raises(FusionError, match="blocks left alone: .* looks like one: channel_gate: another result"):
        fuse(program, strict=True)
    monkeypatch.setattr(graphs, "follow", lambda *args: 1 / 0)
    with pytest.raises(FusionError, match="a graph is left as it is: ZeroDivisionError"):
        fuse(program, strict=True)
    program.example_inputs = None
    with pytest.raises(FusionError, match="no example inputs"):
        fuse(program, strict=True)


class Everything(nn.Module):
    """What a program has beside blocks: arguments by keyword, in containers, numbers; tied and frozen parameters;
    buffers that are written, or are not kept."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.se = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), SEBlock(16)
        self.first, self.second = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((16, 1, 1), 2.0), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.constant = torch.full((16, 1, 1), 3.0, dtype=torch.float64)

    def forward(self, image, *, options, power=2, flag=True):
        self.count += 1
        x = self.first(self.bn(self.conv(image)) * self.scale * options["by"] * self.constant)
        x = self.se(x) if flag else x
        return {"y": self.second(x).relu() + x * power, "mean": x.mean()}


def _everything() -> tuple[torch.export.ExportedProgram, torch.Tensor, dict]:
    torch.manual_seed(0)
    x, options = random(4, 3, 8, 9, dtype=torch.float64), {"by": random(1, dtype=torch.float64)}
    sizes = {0: Dim("batch"), 2: Dim("height", min=3, max=100), 3: Dim("width", min=3)}
    shapes = {"image": sizes, "options": {"by": None}, "power": Dim.DYNAMIC, "flag": None}
    given = {"options": options, "power": 3, "flag": True}
    net = Everything().double().train()
    return torch.export.export(net, (x,), given, dynamic_shapes=shapes), x, given


def test_all_that_a_program_has_is_kept():
    program, x, given = _everything()
    fused = fuse(program, strict=True)
    assert fused is not program and fused.graph_signature == program.graph_signature
    assert fused.call_spec == program.call_spec and fused.range_constraints == program.range_constraints
    assert list(fused.state_dict) == list(program.state_dict) and list(fused.constants) == list(program.constants)
    assert all(fused.state_dict[k] is v for k, v in program.state_dict.items())
    a, b = fused.module(), program.module()
    assert inspect.signature(a.forward) == inspect.signature(b.forward)
    frozen = {name: p.requires_grad for name, p in b.named_parameters()}
    assert {name: p.requires_grad for name, p in a.named_parameters()} == frozen and not all(frozen.values())
    for bad in (random(2, 3, 101, 9, dtype=torch.float64), random(2, 3, 2, 9, dtype=torch.float64)):
        for module in (a, b):
            with pytest.raises(Exception, match=r"100|>= 3"):
                module(bad, **given)


def test_a_fused_program_trains_as_the_program_does():
    program, x, given = _everything()
    modules = fuse(program).module(), program.module()
    state = {name: t.clone() for name, t in program.state_dict.items()}
    for size, power in (((4, 3, 8, 9), 3), ((2, 3, 11, 5), 7)):
        found = []
        for module in modules:
            module.load_state_dict(state)
            t = random(*size, dtype=torch.float64).requires_grad_()
            y = module(t, **{**given, "power": power})
            parameters = [p for p in module.parameters() if p.requires_grad]
            grads = torch.autograd.grad(y["y"].square().sum() + y["mean"], [t, *parameters])
            found.append((y, grads, {name: b.clone() for name, b in module.named_buffers()}))
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
        assert found[0][2]["count"] == 1


def test_a_program_that_cannot_be_exported_again_is_left(monkeypatch):
    program = torch.export.export(Net().eval(), (random(2, 3, 8, 9),))
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: 1 / 0)
    assert fuse(program) is program
    with pytest.raises(FusionError, match="cannot be exported: ZeroDivisionError"):
        fuse(program, strict=True)


# Behind AOTAutograd and Inductor


def partitioned(graph, inputs):
    """What Inductor gets, run as it is: decomposed, and split into a graph forward and one backward."""
    rewrite(graph, inputs)
    return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)


#: Inductor takes seconds for each loop; what it is given does not depend on it.
@pytest.mark.parametrize(
    ("compiler", "kinds"),
    [
        (partitioned, "SEBlock CBAM BAM SCSE CoordAtt TripletAttention simam_module"),
        pytest.param(backend, "SEBlock", marks=pytest.mark.slow),
        pytest.param(backend, "CBAM BAM", marks=pytest.mark.long),
    ],
    ids=["partitioned", "Inductor, one block", "Inductor"],
)
def test_trains_a_network(compiler, kinds):
    """Open batch; a part without any block."""
    blocks = [getattr(pasted, kind)(*(() if kind in WITHOUT_CHANNELS else (16,))) for kind in kinds.split()]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).double()
    compiled_net = torch.compile(net, backend=compiler)
    x = random(4, 3, 8, 9, dtype=torch.float64)
    torch._dynamo.mark_dynamic(x, 0)
    both(net, compiled_net, x, 1e-6)
    if compiler is partitioned:
        with torch.no_grad():
            torch.testing.assert_close(compiled_net.eval()(x), net.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"mode": "max-autotune-no-cudagraphs"}, {"max_autotune": True, "coordinate_descent_tuning": True}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        (
            {"options": {"max_autotune": False, "epilogue-fusion": True}},
            {"max_autotune": False, "epilogue_fusion": True},
        ),
        ({"dynamic": True}, {}),
    ],
)
def test_mode_and_options_reach_inductor(given, expected, monkeypatch):
    seen: list = []

    def compile_fx(graph, inputs, *, config_patches, **rest):
        seen.append((config_patches, [n.target for n in graph.graph.nodes if is_fused(n)]))
        return graph

    monkeypatch.setattr(importlib.import_module("torch._inductor.compile_fx"), "compile_fx", compile_fx)
    net, x = Around(SEBlock(32)), random(2, 3, 6, 7)
    with torch.no_grad():  # in training on the CPU the block is left to Inductor
        torch.testing.assert_close(torch.compile(net, backend=backend, **given)(x), net(x))
    assert seen == [(expected, [functional.channel_gate])]


UNKNOWN = [{"mode": "fastest"}, {"options": {"fastest": True}}, {"options": {"max_autotune": 2}}]


@pytest.mark.parametrize("given", UNKNOWN, ids=str)
def test_what_inductor_does_not_know_raises_as_it_does(given):
    net, x = Around(SEBlock(32)), random(2, 3, 6, 7)
    with pytest.raises(RuntimeError) as expected:
        torch.compile(net, backend="inductor", **given)
    with pytest.raises(RuntimeError) as found:
        torch.compile(net, backend=backend, **given)(x)
    assert str(expected.value)[:60] in str(found.value)


@pytest.mark.parametrize("name", ["seresnet18", "resnet10t"])
def test_networks_of_timm(name):
    """As it is, and with pasted blocks."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    net = timm.create_model(name, num_classes=5)
    if name == "resnet10t":
        for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
            block.bn2 = nn.Sequential(block.bn2, SEBlock(block.bn2.num_features))
    net = randomised(net).double().eval()
    x = random(2, 3, 64, 64, dtype=torch.float64)
    counted: list = []
    with torch.no_grad():
        expected = net(x)
        scale = expected.abs().max()
        found = torch.compile(net, backend=counting(counted))(x)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)
    assert len(counted[0]) == (8 if name == "seresnet18" else 4)
    assert all("residual" in n.kwargs and "affine" in n.kwargs for n in counted[0])


def test_the_entry_point():
    text = Path("pyproject.toml").read_text()
    assert f'[project.entry-points.torch_dynamo_backends]\nfused_attn = "{backend.__module__}:backend"' in text
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="fused_attn"):
        pytest.skip("the installed metadata of fused_attn has no entry point torch_dynamo_backends: install it again")
    assert "fused_attn" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("fused_attn").__name__ == "backend"
