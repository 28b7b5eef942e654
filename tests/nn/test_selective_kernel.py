"""Selective kernels and split attention against timm's and the published code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)

selective_kernel = pytest.importorskip("timm.layers.selective_kernel", reason="timm is not installed")
split_attn = pytest.importorskip("timm.layers.split_attn", reason="timm is not installed")


class Original(nn.Module):
    """SKNet, as in the formulas: branches normalised, stacked, fused, selected."""

    def __init__(self, channels, out, width, branches=2, groups=32, stride=1):
        super().__init__()
        conv = [nn.Conv2d(channels, out, 3, stride, 1 + i, 1 + i, groups, bias=False) for i in range(branches)]
        self.conv = nn.ModuleList(nn.Sequential(c, nn.BatchNorm2d(out), nn.ReLU()) for c in conv)
        self.fc1 = nn.Sequential(nn.Linear(out, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.fc2 = nn.Linear(width, branches * out, bias=False)

    def forward(self, x):
        u = torch.stack([conv(x) for conv in self.conv], 1)
        batch, branches, channels = u.shape[:3]
        a = self.fc2(self.fc1(u.sum(1).mean((2, 3)))).view(batch, branches, channels, 1, 1)
        return (u * a.softmax(1)).sum(1)


def timm_split(*args, **options):
    return lambda: split_attn.SplitAttn(*args, norm_layer=nn.BatchNorm2d, **options)


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "SKConv": (lambda m: m.SKConv(64), lambda: Original(64, 64, 32)),
    "SKConv, M 3": (lambda m: m.SKConv(32, 64, M=3, stride=2, L=8, r=2), lambda: Original(32, 64, 16, 3, stride=2)),
    "SKConv, official": (
        lambda m: m.SKConv(64, 32, groups=8, r=2, L=4, dim_from="out"),
        lambda: Original(64, 32, 16, groups=8),
    ),
    "timm": (lambda m: m.SelectiveKernel(32), lambda: selective_kernel.SelectiveKernel(32)),
    "timm, wider": (
        lambda m: m.SelectiveKernel(16, 48, stride=2, groups=4, rd_divisor=4, dilation=2),
        lambda: selective_kernel.SelectiveKernel(16, 48, stride=2, groups=4, rd_divisor=4, dilation=2),
    ),
    "timm, large kernels": (
        lambda m: m.SelectiveKernel(24, kernel_size=[3, 5, 7], keep_3x3=False, split_input=False, rd_ratio=0.3),
        lambda: selective_kernel.SelectiveKernel(
            24, kernel_size=[3, 5, 7], keep_3x3=False, split_input=False, rd_ratio=0.3
        ),
    ),
    "timm, activation": (
        lambda m: m.SelectiveKernel(16, kernel_size=5, rd_channels=6, activation="silu"),
        lambda: selective_kernel.SelectiveKernel(16, kernel_size=5, rd_channels=6, act_layer=nn.SiLU),
    ),
    "timm, split attention": (lambda m: m.SplitAttention(32), timm_split(32)),
    "timm, groups": (
        lambda m: m.SplitAttention(24, 36, groups=3, radix=4, rd_channels=6, stride=2, bias=True),
        timm_split(24, 36, groups=3, radix=4, rd_channels=6, stride=2, bias=True),
    ),
    "timm, radix 1": (
        lambda m: m.SplitAttention(16, radix=1, kernel_size=5, dilation=2, activation="silu", rd_ratio=3),
        timm_split(16, radix=1, kernel_size=5, dilation=2, act_layer=nn.SiLU, rd_ratio=3),
    ),
    "timm, no norm": (
        lambda m: m.SplitAttention(48, 16, radix=3, batch_norm=False, padding=0),
        lambda: split_attn.SplitAttn(48, 16, radix=3, padding=0),
    ),
}


def build(name, module):
    ours, original = PAIRS[name]
    original = randomised(original())
    return with_state_of(ours(module).double(), original), original


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training):
    block, original = build(name, MODULES[module])
    x = random(3, block.in_channels, 7, 9, dtype=torch.float64)
    assert_same_block(block, original, x, training=training)


BLOCKS = {
    "SKConv": lambda m: m.SKConv(16, groups=4, L=8),
    "SelectiveKernel": lambda m: m.SelectiveKernel(16),
    "SplitAttention": lambda m: m.SplitAttention(16, groups=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_as_good_as_the_reference(name, training, dtype, layout):
    original = randomised(BLOCKS[name](reference))
    block = BLOCKS[name](fused_nn).double()
    block.load_state_dict(original.state_dict())
    # Samples that differ: a BatchNorm over the means of plain noise would amplify rounding alone.
    x = in_layout((random(8, 16, 13, 17) + random(8, 16, 1, 1)).to(dtype), layout)
    assert_as_good_as_reference(original, block, x, training)


@pytest.mark.parametrize("frozen", ["conv.0.1", "fc1.1"])
def test_frozen_statistics_in_a_block_that_trains(frozen):
    block = randomised(fused_nn.SKConv(32))
    original = randomised(reference.SKConv(32))
    for m in (block, original):
        m.train().get_submodule(frozen).eval()
    x = random(3, 32, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), original(x))
    for ours, theirs in zip(block.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_eval_a_normalised_map_is_not_written(name, monkeypatch):
    """Between the convolutions and y is one operator."""
    block = BLOCKS[name](fused_nn).eval()
    calls = []
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda norm, x: calls.append(norm) or x)
    with torch.no_grad():
        block(random(2, 16, 5, 5))
    assert not calls


#: What is ours in a graph does not depend on who compiles it: Inductor, which takes long, has one.
COMPILED = [
    *((name, training, "aot_eager") for name in BLOCKS for training in (True, False)),
    pytest.param("SelectiveKernel", True, "inductor", marks=pytest.mark.slow),  # about 8 s
]


@pytest.mark.parametrize(("name", "training", "backend"), COMPILED)
def test_compiles_in_one_graph(name, training, backend):
    torch._dynamo.reset()
    block = randomised(BLOCKS[name](fused_nn)).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=backend)
    assert_same_block(compiled, block, random(2, 16, 5, 7), training=training)


KEYS = {
    "note000.SKConv": lambda: fused_nn.SKConv(64),
    "pytorchcv.SKConvBlock": lambda: fused_nn.SKConv(64),
    "timm.SelectiveKernel": lambda: fused_nn.SelectiveKernel(64),
    "timm.SplitAttn": lambda: fused_nn.SplitAttention(64),
}


@pytest.mark.parametrize("source", KEYS)
def test_keys(source):
    block = KEYS[source]()
    state = checkpoint(source)
    block.load_state_dict(dict(state))
    for (key, ours), theirs in zip(block.state_dict().items(), state.values(), strict=True):
        assert torch.equal(ours, theirs), key
    if not source.startswith("pytorchcv"):
        assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes(source)


def test_parameters_of_the_published_block():
    assert sum(p.numel() for p in fused_nn.SKConv(64).parameters()) == 8768
    assert fused_nn.SKConv(1024, 256).fc2.in_channels == 64
    assert fused_nn.SKConv(1024, 256, dim_from="out").fc2.in_channels == 32


@pytest.mark.parametrize("name", BLOCKS)
def test_one_sample(name):
    """In eval like any other; in training an error of one line that says why."""
    block = BLOCKS[name](fused_nn)
    x = random(1, 16, 5, 5)
    with pytest.raises(ValueError, match=r"^x: expected more than one sample in training") as caught:
        block(x)
    assert "\n" not in str(caught.value)
    block.eval()
    torch.testing.assert_close(block(x), block(torch.cat([x, x]))[:1])


def test_one_sample_without_a_norm():
    assert fused_nn.SplitAttention(16, batch_norm=False)(random(1, 16, 1, 1)).shape == (1, 16, 1, 1)


ERRORS = {
    "in_channels: expected a positive integer; got 0": lambda: fused_nn.SKConv(0),
    "groups: expected a divisor of in_channels, 48; got 32": lambda: fused_nn.SKConv(48),
    "groups: expected a divisor of out_channels, 48; got 32": lambda: fused_nn.SKConv(64, 48),
    "M: expected a positive integer; got 0": lambda: fused_nn.SKConv(64, M=0),
    "r: expected a positive number; got 0": lambda: fused_nn.SKConv(64, r=0),
    "dim_from: expected one of in, out; got 'mid'": lambda: fused_nn.SKConv(64, dim_from="mid"),
    "kernel_size: expected odd numbers of at least 3; got 4": lambda: fused_nn.SelectiveKernel(64, kernel_size=4),
    "kernel_size: expected at least one; got []": lambda: fused_nn.SelectiveKernel(64, kernel_size=[]),
    "kernel_size: expected a divisor of in_channels, 33; got 2": lambda: fused_nn.SelectiveKernel(33),
    "activation: expected one of ": lambda: fused_nn.SelectiveKernel(64, activation="mish"),
    "radix: expected a positive integer; got 0": lambda: fused_nn.SplitAttention(64, radix=0),
    "groups * radix: expected a divisor of in_channels, 64; got 6": lambda: fused_nn.SplitAttention(
        64, 66, groups=2, radix=3
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BLOCKS)
def test_trains_under_deterministic_algorithms(name):
    assert torch.are_deterministic_algorithms_enabled()
    block = BLOCKS[name](fused_nn)
    block(random(2, 16, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
