"""Concurrent squeeze-and-excitation against its formula."""

from __future__ import annotations

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


class Original(nn.Module):
    def __init__(self, channels=32, width=2, larger=False):
        super().__init__()
        self.fc1, self.fc2, self.conv = nn.Linear(channels, width), nn.Linear(width, channels), nn.Linear(channels, 1)
        self.larger = larger

    def forward(self, x):
        last = x.movedim(1, -1)
        descriptor = last.flatten(1, -2).mean(1)
        c = self.fc2(self.fc1(descriptor).relu()).sigmoid()
        c = c.reshape(c.shape[0], *[1] * (x.dim() - 2), -1)
        s = self.conv(last).sigmoid()
        y = torch.maximum(last * c, last * s) if self.larger else last * (c + s)
        return y.movedim(-1, 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", [fused_nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("combine", "reduction"), [("sum", 16), ("max", 2)])
def test_equals_the_original(combine, reduction, rank, module, training):
    original = randomised(Original(32, 32 // reduction, combine == "max"))
    block = with_state_of(module.SCSE(32, reduction=reduction, combine=combine).double(), original)
    x = random(3, 32, *(6, 5, 4)[:rank], dtype=torch.float64)
    assert_same_block(block, original, x, training=training)


def test_keys_are_those_of_segmentation_models():
    block = fused_nn.SCSE(64)
    block.load_state_dict(checkpoint("smp.SCSEModule"))
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes("smp.SCSEModule")


def test_loads_the_authors_names_and_linear_weights():
    theirs = {f"cSE.{k}": v for k, v in Original(32, 16).state_dict().items() if k.startswith("fc")}
    theirs |= {"sSE.conv.weight": torch.ones(1, 32, 1, 1), "sSE.conv.bias": torch.ones(1)}
    block = fused_nn.SCSE(32, reduction=2, combine="max")
    block.load_state_dict(theirs)
    assert torch.equal(block.cSE["1"].weight[..., 0, 0], theirs["cSE.fc1.weight"])
    assert torch.equal(block.sSE["0"].bias, theirs["sSE.conv.bias"])


def test_one_position():
    assert torch.isfinite(fused_nn.SCSE(32)(random(1, 32, 1, 1))).all()


ERRORS = {
    "channels: expected a positive integer; got 3.5": lambda: fused_nn.SCSE(3.5),
    "reduction: 16 leaves no hidden channel of 8; give `hidden` instead": lambda: fused_nn.SCSE(8),
    "combine: expected one of sum, max; got 'mean'": lambda: fused_nn.SCSE(32, combine="mean"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_trains_under_deterministic_algorithms(combine):
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.SCSE(32, combine=combine)
    block(random(2, 32, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_as_good_as_the_reference(combine, dtype, layout):
    original = randomised(reference.SCSE(32, combine=combine))
    x = in_layout(random(4, 32, 7, 9, dtype=dtype), layout)
    assert_as_good_as_reference(original, with_state_of(fused_nn.SCSE(32, combine=combine), original), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_compiles_to_one_graph(combine, layout):
    block = fused_nn.SCSE(32, combine=combine)
    x = in_layout(random(2, 32, 6, 5), layout).requires_grad_()
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    expected = block(x)
    torch.testing.assert_close(found, expected)
    grad = random(2, 32, 6, 5, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))
