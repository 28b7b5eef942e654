"""External attention against the authors' formula."""

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
    assert_as_good_as_eager,
    assert_as_good_as_reference,
    assert_same_block,
    in_layout,
    random,
    randomised,
)

C = 12


@pytest.fixture(autouse=True)
def one_op(monkeypatch):
    """A BatchNorm and what follows it, as in large maps: `test_normalised` has the choice."""
    monkeypatch.setattr("fused_attn.nn.normalised.pays", lambda *_: True)


class Original(nn.Module):
    def __init__(self, channels=C, memory=10):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.linear_0 = nn.Conv1d(channels, memory, 1, bias=False)
        self.linear_1 = nn.Conv1d(memory, channels, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        attention = F.softmax(self.linear_0(torch.flatten(self.conv1(x), 2)), -1)
        attention = attention / (attention.sum(1, keepdim=True) + 1e-9)
        return F.relu(self.conv2(self.linear_1(attention).view_as(x)) + x)


MODULES = {"fused": fused_nn, "reference": reference}


def build(module, memory=10):
    original = randomised(Original(memory=memory))
    block = module.ExternalAttention(C, memory=memory).double()
    block.load_state_dict(original.state_dict())
    return block, original, random(3, C, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("memory", [10, 3])
def test_equals_the_original(memory, module, training, layout):
    block, original, x = build(MODULES[module], memory)
    assert_same_block(block, original, in_layout(x, layout), training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, layout):
    original, _, x = build(reference)
    block, _, _ = build(fused_nn)
    x = in_layout(x.float(), layout)
    assert copy.deepcopy(block).float()(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x, training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bfloat16(training, layout):
    """Rounding moves some positions over the ReLU's edge, and a largest error is then a matter of chance: the result by
    its largest, the gradients by the median of their errors."""
    ratios = []
    for seed in range(3):
        block, original, _ = build(fused_nn)
        x = in_layout(random(8, C, 9, 7, seed=seed, dtype=torch.bfloat16), layout)
        outputs, grads = [], []
        for module, dtype in ((block, x.dtype), (original, x.dtype), (original, torch.float64)):
            module = copy.deepcopy(module).to(dtype).train(training)
            leaf = x.to(dtype).detach().clone().requires_grad_()
            outputs.append(module(leaf))
            outputs[-1].backward(random(*x.shape, seed=1, dtype=x.dtype).to(dtype))
            grads.append([leaf.grad, *(p.grad for p in module.parameters())])
        assert_as_good_as_eager(*outputs)
        ratios += [((a - x).norm() / (e - x).norm()).item() for a, e, x in zip(*grads, strict=True)]
    assert torch.tensor(ratios).median() < 1


def test_odd_inputs():
    block, original, x = build(fused_nn)
    for training in (True, False):
        for y in (x[:1], x[:, :, ::2, 1::2], x.transpose(2, 3)):
            assert_same_block(block, original, y, training=training)
    assert_same_block(block, original, x[:1, :, :1, :1], training=False)
    assert block.eval()(x[:0]).shape == x[:0].shape
    x[0, 3, 2, 1] = torch.nan
    torch.testing.assert_close(block(x), original.eval()(x), equal_nan=True)


def test_buffers_in_training():
    block, original, x = build(fused_nn)
    for module in (block, original):
        for i in range(3):
            module.train()(x * (i + 1))
    for ours, theirs in zip(block.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layers_that_somebody_put_in_run_themselves():
    block, original, x = build(fused_nn)
    norm = nn.GroupNorm(3, C).double()
    for module in (block, original):
        module.conv1 = nn.Sequential(module.conv1, nn.Tanh())
        module.conv2[1] = norm
    assert_same_block(block, original, x, training=True)
    block, original, x = build(fused_nn)
    for module in (block, original):
        torch.manual_seed(1)
        module.linear_1 = nn.Conv1d(10, C, 1).double()
        module.linear_0 = nn.Conv1d(C, 10, 1).double()
    assert_same_block(block, original, x, training=True)


def test_under_autocast():
    block, original, x = build(fused_nn)
    with torch.autocast("cpu", torch.bfloat16):
        y = block.float()(x.float())
        eager = copy.deepcopy(original).float()(x.float())
    assert y.dtype == eager.dtype == torch.float32
    assert_as_good_as_eager(y, eager, original(x), scale=10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    block, _, x = build(fused_nn)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, x, training=training)


def test_keys_are_the_authors():
    ours, theirs = fused_nn.ExternalAttention(64).state_dict(), Original(64, 64).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.ExternalAttention(0),
    "memory: expected a positive integer; got 0": lambda: fused_nn.ExternalAttention(8, memory=0),
    "x: expected (B, 8, H, W); got shape (1, 4, 5, 5)": lambda: fused_nn.ExternalAttention(8)(torch.zeros(1, 4, 5, 5)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
