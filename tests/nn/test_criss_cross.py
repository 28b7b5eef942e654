"""CCNet's criss-cross attention against the formula of its authors' code."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    in_layout,
    random,
    randomised,
)


class Original(nn.Module):
    """Batched products of rows and of columns; minus infinity on the diagonal of the columns' energies."""

    def __init__(self, channels, reduction=8, recurrence=2):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.key_conv = nn.Conv2d(channels, channels // reduction, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.recurrence = recurrence

    def once(self, x):
        b, _, h, w = x.shape
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)

        def columns(t):
            return t.permute(0, 3, 1, 2).reshape(b * w, -1, h)

        def rows(t):
            return t.permute(0, 2, 1, 3).reshape(b * h, -1, w)

        itself = torch.diag(torch.full((h,), float("inf"), dtype=x.dtype))
        itself = itself.nan_to_num(nan=0.0, posinf=float("inf"))
        energy_h = torch.bmm(columns(query).mT, columns(key)) - itself
        energy_h = energy_h.view(b, w, h, h).permute(0, 2, 1, 3)
        energy_w = torch.bmm(rows(query).mT, rows(key)).view(b, h, w, w)
        weights = torch.cat([energy_h, energy_w], 3).softmax(3)
        weights_h = weights[..., :h].permute(0, 2, 1, 3).reshape(b * w, h, h)
        weights_w = weights[..., h:].reshape(b * h, w, w)
        out_h = torch.bmm(columns(value), weights_h.mT).view(b, w, -1, h).permute(0, 2, 3, 1)
        out_w = torch.bmm(rows(value), weights_w.mT).view(b, h, -1, w).permute(0, 2, 1, 3)
        return self.gamma * (out_h + out_w) + x

    def forward(self, x):
        for _ in range(self.recurrence):
            x = self.once(x)
        return x


OPTIONS = {"default": {}, "once": {"recurrence": 1}, "three times": {"recurrence": 3, "reduction": 4}}
MODULES = {"fused": fused_nn, "reference": reference}


def pair(module, options):
    original = randomised(Original(16, **options))
    block = module.CrissCrossAttention(16, **options).double()
    block.load_state_dict(original.state_dict())
    return block, original


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 7, 6), (1, 16, 1, 9), (3, 16, 18, 33), (2, 16, 5, 1)], ids=str)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_original(options, module, shape, layout):
    block, original = pair(MODULES[module], OPTIONS[options])
    assert list(block.state_dict()) == list(reference.CrissCrossAttention(16).state_dict())
    named = {k: v.shape for k, v in original.state_dict().items()}
    assert {k: v.shape for k, v in block.state_dict().items()} == named
    x = in_layout(random(*shape, dtype=torch.float64), layout)
    found = []
    for b in (block, original):
        leaf = x.detach().requires_grad_()
        y = b(leaf)
        y.backward(random(*shape, seed=1, dtype=torch.float64))
        found.append([y, leaf.grad, *(dict(b.named_parameters())[name].grad for name in named)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_at_the_start_it_is_the_map_itself():
    x = random(2, 16, 6, 5)
    assert torch.equal(fused_nn.CrissCrossAttention(16)(x), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_reference(dtype, layout):
    original = randomised(reference.CrissCrossAttention(16))
    block = fused_nn.CrissCrossAttention(16).double()
    block.load_state_dict(original.state_dict())
    x = in_layout(random(2, 16, 17, 19, dtype=dtype), layout)
    assert_as_good_as_reference(original, block, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout):
    x = in_layout(random(2, 16, 6, 5), layout).requires_grad_()
    y = fused_nn.CrissCrossAttention(16).to(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )(x)
    assert y.stride() == x.stride()


def test_an_empty_batch():
    block, x = fused_nn.CrissCrossAttention(16), torch.empty(0, 16, 6, 5, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_the_authors_keys():
    """As they are in a checkpoint of 64 channels."""
    shapes = {name: tuple(t.shape) for name, t in fused_nn.CrissCrossAttention(64).state_dict().items()}
    expected = {"gamma": (1,)}
    for name, out in (("query", 8), ("key", 8), ("value", 64)):
        expected |= {f"{name}_conv.weight": (out, 64, 1, 1), f"{name}_conv.bias": (out,)}
    assert shapes == expected


def test_copies_and_compiled():
    block = randomised(fused_nn.CrissCrossAttention(16))
    x = random(2, 16, 6, 5, dtype=torch.float64)
    y = block(x)
    assert torch.equal(copy.deepcopy(block)(x), y)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    results = []
    for b in (block, compiled):
        block.zero_grad()
        b(x).square().sum().backward()
        results.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_map_keeps_its_dtype(dtype):
    block = randomised(fused_nn.CrissCrossAttention(16)).float()
    x = random(2, 16, 6, 5, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == dtype
    y.sum().backward()
    torch.testing.assert_close(y.float(), block.double()(x.double()).float(), rtol=0.05, atol=0.1)


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.CrissCrossAttention(0),
    "recurrence: expected a positive integer; got 0": lambda: fused_nn.CrissCrossAttention(16, recurrence=0),
    "reduction: 32 leaves no hidden channel of 16; give `hidden` instead": lambda: fused_nn.CrissCrossAttention(
        16, reduction=32
    ),
    "x: expected (B, C, H, W); got shape (2, 16, 3)": lambda: fused_nn.CrissCrossAttention(16)(random(2, 16, 3)),
    "x: expected 16 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.CrissCrossAttention(16)(random(1, 4, 3, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = randomised(fused_nn.CrissCrossAttention(16)).float()
    block(random(2, 16, 6, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def leaves(block, x):
    return x, *(p for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [("query", "key", "value"), ("query",), ("value",), ()], ids=str)
def test_second_derivatives_and_biases(biased, layout):
    """Of the block, whose steps are one function for autograd; layers without a bias are taken as they are."""
    block, other = (randomised(m.CrissCrossAttention(4, reduction=2)) for m in (fused_nn, reference))
    for b in (block, other):
        for name in {"query", "key", "value"} - {*biased}:
            getattr(b, f"{name}_conv").bias = None
    other.load_state_dict(block.state_dict())
    found = []
    for b in (block, other):
        x = in_layout(random(2, 4, 3, 4, dtype=torch.float64), layout).requires_grad_()
        wanted = leaves(b, x)
        first = torch.autograd.grad(b(x).square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        batched = torch.autograd.grad(
            b(x), wanted, random(3, 2, 4, 3, 4, seed=2, dtype=torch.float64), is_grads_batched=True
        )
        found.append([*first, *second, *batched])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_gradients_of_what_is_not_frozen():
    block = randomised(fused_nn.CrissCrossAttention(4, reduction=2))
    expected = torch.autograd.grad(block(x := random(2, 4, 3, 4, dtype=torch.float64)).square().sum(), block.gamma)
    for p in block.parameters():
        p.requires_grad_(p is block.gamma)
    assert torch.equal(torch.autograd.grad(block(x).square().sum(), block.gamma)[0], expected[0])
    with torch.no_grad():
        y = block(x)
    assert torch.equal(block(x), y)
    block.requires_grad_(False)
    assert not block(x).requires_grad


def test_a_layer_that_somebody_listens_to_is_called():
    """Pruning makes the weight in such a hook."""
    block, other = (randomised(m.CrissCrossAttention(4, reduction=2)) for m in (fused_nn, reference))
    other.load_state_dict(block.state_dict())
    x, seen = random(2, 4, 3, 4, dtype=torch.float64), []
    for b in (block, other):
        prune.l1_unstructured(b.value_conv, "weight", 0.5)
        b.value_conv.weight_orig.data.mul_(2)
        b.key_conv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(block(x), other(x), rtol=1e-9, atol=1e-10)
    assert len(seen) == 4
