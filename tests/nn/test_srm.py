"""Style-based recalibration against its formula; `moments_gate` against its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import export

from fused_attn import functional, reference
from fused_attn import nn as fused_nn
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    gradcheck,
    in_layout,
    random,
    randomised,
)


class Original(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.cfc = nn.Conv1d(channels, channels, 2, groups=channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x):
        values = x.flatten(2)
        weight = self.cfc.weight[:, 0]
        z = weight[:, 0] * values.mean(2) + weight[:, 1] * values.std(2)
        return x * self.bn(z).sigmoid().view(*x.shape[:2], *(1 for _ in x.shape[2:]))


MODULES = {"fused": fused_nn, "reference": reference}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(3, 8, 6, 9), (2, 8, 3, 4, 5), (3, 8, 7), (2, 8, 48, 49)], ids=str)
def test_equals_the_original(shape, module, training):
    original = randomised(Original(8))
    block = MODULES[module].SRM(8).double()
    block.load_state_dict(original.state_dict())
    assert_same_block(block, original, random(*shape, dtype=torch.float64), training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    block = randomised(fused_nn.SRM(16)).float()
    original = reference.SRM(16).double()
    original.load_state_dict(block.state_dict())
    style = random(2, 4, 16, 1, 1, dtype=dtype)  # of samples that differ: a BatchNorm follows
    x = in_layout(random(4, 16, 33, 37, dtype=dtype) * style[0] + style[1], layout)
    assert_as_good_as_reference(original, block, x, training)
    assert block.to(dtype)(x).stride() == x.stride()


def test_a_large_mean_costs_no_digits():
    x = (random(2, 4, 40, 40, dtype=torch.float64) + 1000).float()
    found: list = []
    functional.moments_gate(x, lambda mean, variance: found.extend((mean, variance)) or mean)
    torch.testing.assert_close(found[1].double(), x.double().var((2, 3), correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0].double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)


def excitation(mean, variance):
    return (mean + (variance + 1e-3).sqrt()).sigmoid()


def gated(module, x):
    return module.moments_gate(x, excitation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gate_of_moments(dtype, layout):
    """Gradients of the other layout, and one number for all."""
    x = in_layout(random(2, 9, 13, 6, dtype=dtype), layout)
    for grad in (random(2, 13, 6, 9, dtype=dtype).movedim(-1, 1), torch.ones((), dtype=dtype).expand(2, 9, 13, 6)):
        assert_equivalent(lambda x: gated(functional, x), lambda x: gated(reference, x), {"x": x}, [grad])


def test_gradients_and_those_of_gradients():
    for twice in (False, True):
        gradcheck(lambda x: gated(functional, x), {"x": random(2, 3, 2, 3, dtype=torch.float64)}, twice=twice)


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
def test_special_values(module):
    assert gated(module, random(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert gated(module, random(2, 4, 0, 3)).shape == (2, 4, 0, 3)
    x = random(2, 4, 3, 3)
    x[0, 1, 0, 0] = torch.nan
    assert gated(module, x).isnan().sum() == 9
    leaf = torch.ones(2, 4, 3, 3, requires_grad=True)  # no deviation
    block = (fused_nn if module is functional else reference).SRM(4).eval()
    (grad,) = torch.autograd.grad(block(leaf).sum(), leaf)
    assert grad.isfinite().all()


def test_compiles_and_exports():
    torch._dynamo.reset()
    block = randomised(fused_nn.SRM(8)).eval()
    x = random(2, 8, 48, 49, dtype=torch.float64)
    program = export(block, (x,)).module()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = x.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(block(expected).square().sum(), expected)
    for function in (program, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        torch.testing.assert_close(y, block(x), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaf)[0], theirs, rtol=1e-8, atol=1e-10)


def test_keys_of_the_authors():
    original = randomised(Original(8))
    state = original.state_dict()
    assert [*fused_nn.SRM(8).state_dict()] == [*state]
    state["cfc"] = state.pop("cfc.weight").squeeze(1)
    block = fused_nn.SRM(8).double()
    block.load_state_dict(state)
    assert_same_block(block, original, random(2, 8, 5, 6, dtype=torch.float64), training=False)


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.SRM(0),
    "x: expected 8 channels; got shape (2, 5, 6, 8)": lambda: fused_nn.SRM(8)(random(2, 5, 6, 8)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
