"""The attention gate against its formula, in two and three dimensions, and MONAI's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.export import export

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import LAYOUTS, assert_as_good_as_eager, in_layout, largest, random, randomised


class Common(nn.Module):
    """The formula, as code that is pasted in two dimensions has its layers; also in one and three."""

    def __init__(self, gating, channels, hidden, rank=2):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
        self.W_g = nn.Sequential(conv(gating, hidden, 1), norm(hidden))
        self.W_x = nn.Sequential(conv(channels, hidden, 1), norm(hidden))
        self.psi = nn.Sequential(conv(hidden, 1, 1), norm(1), nn.Sigmoid())

    def forward(self, g, x):
        return x * self.psi((self.W_g(g) + self.W_x(x)).clamp(min=0))


class Grid(nn.Module):
    """The paper's in three dimensions: g has half the positions, and so has the sum."""

    def __init__(self, gating, channels, hidden):
        super().__init__()
        self.phi = nn.Conv3d(gating, hidden, 1)
        self.theta = nn.Conv3d(channels, hidden, 2, stride=2, bias=False)
        self.psi = nn.Conv3d(hidden, 1, 1)
        self.W = nn.Sequential(nn.Conv3d(channels, channels, 1), nn.BatchNorm3d(channels))

    def forward(self, g, x):
        def to(t, like):
            return nn.functional.interpolate(t, like.shape[2:], mode="trilinear")

        theta = self.theta(x)
        gate = 1 / (1 + self.psi((theta + to(self.phi(g), theta)).relu()).neg().exp())
        return self.W(to(gate, x) * x)


GRID = {"hidden": 6, "stride": 2, "batch_norm": False, "project": True, "rank": 3}
MODULES = {"fused": fused_nn, "reference": reference}
#: Options of 8 channels with 12 that gate, the original, and the sizes of both maps.
PAIRS = {
    "1-D": ({"hidden": 6, "rank": 1}, lambda: Common(12, 8, 6, 1), (9,), (9,)),
    "2-D": ({"hidden": 6}, lambda: Common(12, 8, 6), (7, 9), (7, 9)),
    "3-D": ({"hidden": 6, "rank": 3}, lambda: Common(12, 8, 6, 3), (3, 4, 5), (3, 4, 5)),
    "the paper's": (GRID, lambda: Grid(12, 8, 6), (3, 4, 3), (7, 8, 6)),
}


def maps(g, x, batch=3, dtype=torch.float64):
    return random(batch, 12, *g, dtype=dtype), random(batch, 8, *x, seed=1, dtype=dtype)


def results(block, g, x, training, grad=None):
    """Output, the gradients of both maps and of the parameters, and the buffers."""
    block = copy.deepcopy(block).train(training)
    leaves = g.clone().requires_grad_(), x.clone().requires_grad_()
    y = block(*leaves)
    grad = random(*y.shape, seed=2, dtype=y.dtype) if grad is None else grad
    return [y, *torch.autograd.grad(y, [*leaves, *block.parameters()], grad), *block.buffers()]


def in_names_of(block, original, found):
    """Results of the original in the order that the block has its parameters and buffers in."""
    names = [name for name, _ in (*original.named_parameters(), *original.named_buffers())]
    named = copy.deepcopy(block)
    named.load_state_dict(dict(zip(names, found[3:], strict=True)))
    return [*found[:3], *named.parameters(), *named.buffers()]


def pair(name, module="fused"):
    options, original, *sizes = PAIRS[name]
    original = randomised(original())
    block = MODULES[module].AttentionGate(8, gating=12, **options).double()
    block.load_state_dict(original.state_dict())
    return block, original, *maps(*sizes)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training):
    block, original, g, x = pair(name, module)
    mine, theirs = results(block, g, x, training), results(original, g, x, training)
    assert mine[0].shape == x.shape
    for a, b in zip(mine, in_names_of(block, original, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    """On maps that are large enough for the fused sum, which keep their layout; the gradient lies as another tensor."""
    block = fused_nn.AttentionGate(16)
    original = reference.AttentionGate(16)
    original.load_state_dict(block.state_dict())
    g, x = (in_layout(random(3, 16, 67, 71, seed=i, dtype=dtype), layout) for i in (0, 1))
    grad = random(3, 67, 71, 16, seed=2, dtype=dtype).movedim(-1, 1)
    found, eager = (results(b.to(dtype), g, x, training, grad=grad) for b in (block, original))
    exact = results(original.double(), g.double(), x.double(), training, grad=grad.double())
    count = 3 + sum(1 for _ in block.parameters())
    terms = max(map(largest, exact[3:count]))
    assert found[0].stride() == x.stride()
    for i, (a, b, c) in enumerate(zip(found[:count], eager[:count], exact[:count], strict=True)):
        assert_as_good_as_eager(a, b, c, str(i), terms if i > 2 else 0.0)


def test_empty_nan_and_one_position():
    block = fused_nn.AttentionGate(8).eval()
    assert block(random(0, 8, 5, 4), random(0, 8, 5, 4)).shape == (0, 8, 5, 4)
    assert block(random(1, 8, 1, 1), random(1, 8, 1, 1)).isfinite().all()
    x = random(2, 8, 5, 4)
    x[0, 0, 0, 0] = torch.nan
    y = block(x, random(2, 8, 5, 4))
    assert y[0, :, 0, 0].isnan().all() and y.isnan().sum() == 8


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    block, _, g, x = pair("2-D")
    compiled = torch.compile(copy.deepcopy(block).train(training), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g, x), copy.deepcopy(block).train(training)(g, x), rtol=1e-9, atol=1e-10)


def test_exports():
    block, original, g, x = pair("the paper's")
    program = export(block.eval(), (g, x)).module()
    torch.testing.assert_close(program(g, x), original.eval()(g, x), rtol=1e-9, atol=1e-10)


def test_keys_of_others():
    """Of MONAI and of the authors; what is saved has ours."""
    block = fused_nn.AttentionGate(8, gating=12, **GRID)
    original = randomised(Grid(12, 8, 6)).float()
    block.load_state_dict(original.state_dict())
    torch.testing.assert_close(block.W_g[0].weight, original.phi.weight)
    assert {"W_g.0.bias", "W_x.0.weight", "psi.0.weight", "W.1.running_mean"} <= block.state_dict().keys()
    assert "W_x.0.bias" not in block.state_dict()
    monai = pytest.importorskip("monai.networks.nets.attentionunet", reason="MONAI is not installed")
    theirs = randomised(monai.AttentionBlock(2, 6, 12, 8)).eval()
    ours = fused_nn.AttentionGate(8, gating=12, hidden=6).double().eval()
    ours.load_state_dict(theirs.state_dict())
    g, x = maps((7, 9), (7, 9))
    torch.testing.assert_close(ours(g, x), theirs(g, x), rtol=1e-9, atol=1e-11)


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.AttentionGate(0),
    "gating: expected a positive integer; got 0": lambda: fused_nn.AttentionGate(8, gating=0),
    "hidden: expected a positive integer; got 0": lambda: fused_nn.AttentionGate(8, hidden=0),
    "stride: expected a positive integer; got 0": lambda: fused_nn.AttentionGate(8, stride=0),
    "rank: expected 1, 2 or 3; got 4": lambda: fused_nn.AttentionGate(8, rank=4),
    "x: expected (B, C, H, W); got shape (2, 8, 5)": lambda: fused_nn.AttentionGate(8)(
        random(2, 8, 5, 5), random(2, 8, 5)
    ),
    "g: expected a map of 2 samples with the axes of x; got shape (1, 8, 5, 5)": lambda: fused_nn.AttentionGate(8)(
        random(1, 8, 5, 5), random(2, 8, 5, 5)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
