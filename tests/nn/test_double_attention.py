"""Double attention against its formula, position by position."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_same_block,
    in_layout,
    random,
    randomised,
    with_state_of,
)

C = 12


class Original(nn.Module):
    """With dense layers on (B, positions, channels)."""

    def __init__(self, features=3, descriptors=3, reconstruct=True, over="channels"):
        super().__init__()
        self.a, self.b, self.v = nn.Linear(C, features), nn.Linear(C, descriptors), nn.Linear(C, descriptors)
        self.w = nn.Linear(features, C) if reconstruct else nn.Identity()
        self.over = over

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        gathered = torch.einsum("bpf,bpn->bnf", self.a(rows), F.softmax(self.b(rows), 1))
        weights = F.softmax(self.v(rows), 2 if self.over == "channels" else 1)
        y = self.w(torch.einsum("bpn,bnf->bpf", weights, gathered))
        return y.transpose(1, 2).reshape(*x.shape[:1], -1, *x.shape[2:])


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "default": (lambda m: m.DoubleAttention(C), Original, (7, 5)),
    "ports": (
        lambda m: m.DoubleAttention(C, features=5, descriptors=4, distribute="positions"),
        lambda: Original(5, 4, over="positions"),
        (7, 5),
    ),
    "no reconstruction": (
        lambda m: m.DoubleAttention(C, features=C, reconstruct=False),
        lambda: Original(C, reconstruct=False),
        (7, 5),
    ),
    "1-D": (lambda m: m.DoubleAttention(C, rank=1), Original, (9,)),
    "3-D": (lambda m: m.DoubleAttention(C, rank=3), Original, (3, 4, 5)),
}


def build(name, module):
    ours, original, space = PAIRS[name]
    original = randomised(original())
    return with_state_of(ours(module).double(), original), original, random(2, C, *space, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training, layout):
    block, original, x = build(name, MODULES[module])
    assert_same_block(block, original, in_layout(x, layout), training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["default", "ports", "3-D"])
def test_as_good_as_the_reference(name, dtype, layout):
    original, _, x = build(name, reference)
    block, _, _ = build(name, fused_nn)
    x = in_layout(x.to(dtype), layout)
    assert copy.deepcopy(block).to(dtype)(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x)


def test_no_map_of_features_is_kept():
    """Of the size of x there is x; of that of the descriptors' maps their two softmaxes."""
    kept = []
    block, x = fused_nn.DoubleAttention(64), random(2, 64, 30, 30).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    sizes = {t.data_ptr(): t.numel() for t in kept if t.numel() >= 2 * 16 * 900}
    assert sorted(sizes.values()) == [2 * 16 * 900] * 2 + [2 * 64 * 900]


@pytest.mark.parametrize("name", ["default", "ports"])
def test_odd_inputs(name):
    block, original, x = build(name, fused_nn)
    for y in (x[:1], x[:, :, :1, :1], x[:, :, ::2, 1::2], x.transpose(2, 3)):
        assert_same_block(block, original, y, training=True)
    assert block(x[:0]).shape == x[:0].shape
    x[0, 3, 2, 1] = torch.nan
    torch.testing.assert_close(block(x), original(x), equal_nan=True)


def test_layers_that_somebody_put_in_run_themselves():
    block, original, x = build("default", fused_nn)
    block.convV = nn.Sequential(block.convV, nn.Tanh())
    original.v = nn.Sequential(original.v, nn.Tanh())
    assert_same_block(block, original, x, training=True)
    block.convA = nn.Conv2d(C, 3, 3, padding=1).double()
    assert torch.isfinite(block(x)).all()


def test_under_autocast():
    block, original, x = build("default", fused_nn)
    with torch.autocast("cpu", torch.bfloat16):
        y = block.float()(x.float())
        assert y.dtype == torch.bfloat16 == copy.deepcopy(original).float()(x.float()).dtype
    torch.testing.assert_close(y.double(), original(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    block, _, x = build("default", fused_nn)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, x, training=training)


def test_keys_are_those_of_the_ports():
    state = fused_nn.DoubleAttention(512, features=128, descriptors=96).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "convA.weight": (128, 512, 1, 1),
        "convA.bias": (128,),
        "convB.weight": (96, 512, 1, 1),
        "convB.bias": (96,),
        "convV.weight": (96, 512, 1, 1),
        "convV.bias": (96,),
        "conv_reconstruct.weight": (512, 128, 1, 1),
        "conv_reconstruct.bias": (512,),
    }


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.DoubleAttention(0),
    "features: expected a positive integer; got 0": lambda: fused_nn.DoubleAttention(8, features=0),
    "descriptors: expected a positive integer; got 1.5": lambda: fused_nn.DoubleAttention(8, descriptors=1.5),
    "distribute: expected one of channels, positions; got 'batch'": lambda: fused_nn.DoubleAttention(
        8, distribute="batch"
    ),
    "rank: expected 1, 2 or 3; got 4": lambda: fused_nn.DoubleAttention(8, rank=4),
    "x: expected (B, 8, H, W); got shape (1, 8, 4)": lambda: fused_nn.DoubleAttention(8)(torch.zeros(1, 8, 4)),
    "x: expected (B, 8, D, H, W); got shape (1, 4, 3, 3, 3)": lambda: fused_nn.DoubleAttention(8, rank=3)(
        torch.zeros(1, 4, 3, 3, 3)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
