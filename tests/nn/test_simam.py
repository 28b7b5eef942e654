"""SimAM against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import LAYOUTS, assert_equivalent, assert_same_block, in_layout, random


class Original(nn.Module):
    def __init__(self, e_lambda=1e-4):
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x):
        flat = x.flatten(2)
        variance, mean = torch.var_mean(flat, 2, correction=1, keepdim=True)
        energy = (flat - mean) ** 2 / (variance + self.e_lambda) / 4
        return (flat * torch.sigmoid(energy + 0.5)).reshape(x.shape)


@pytest.mark.parametrize("e_lambda", [1e-4, 0.3])
@pytest.mark.parametrize("module", [fused_nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_equals_the_original(rank, module, e_lambda):
    x = random(2, 8, *(6, 5, 4)[:rank], dtype=torch.float64)
    assert_same_block(module.SimAM(8, e_lambda=e_lambda), Original(e_lambda), x, training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_good_as_the_reference(dtype, layout):
    x = in_layout(random(3, 8, 7, 9, dtype=dtype), layout)
    assert_equivalent(fused_nn.SimAM(8), reference.SimAM(8), {"x": x}, [random(*x.shape, seed=1, dtype=dtype)])


def test_a_constant_channel_is_finite():
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    y = fused_nn.SimAM()(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.full_like(x, 0.5).sigmoid())
    assert torch.isfinite(x.grad).all()


@pytest.mark.filterwarnings("ignore:var_mean")
def test_one_position_is_nan_as_in_the_original():
    x = random(2, 8, 1, 1)
    for block in (Original(), reference.SimAM(), fused_nn.SimAM()):
        assert block(x).isnan().all()


def test_it_has_no_state():
    assert not fused_nn.SimAM(64).state_dict()


ERRORS = {
    "channels: expected a positive integer; got 'x'": lambda: fused_nn.SimAM("x"),
    "e_lambda: expected a finite number; got nan": lambda: fused_nn.SimAM(e_lambda=float("nan")),
    "e_lambda: expected a number of at least 0; got -1": lambda: fused_nn.SimAM(e_lambda=-1),
    "x: expected 8 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.SimAM(8)(random(1, 4, 3, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    x = random(2, 8, 6, 5).requires_grad_()
    fused_nn.SimAM()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
