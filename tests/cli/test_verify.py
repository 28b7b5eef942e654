"""What `fused-attn verify` calls wrong: values, any gradient, NaN; and where it says that this is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fused_attn.verify import compare

SHAPE = (2, 4, 16, 16)


class Original(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 4)[:, None, None])

    def forward(self, x):
        return x * self.weight


def first(x):
    """Where the first element is."""
    return torch.arange(x.numel()).view_as(x) == 0


#: name -> (what is added to the original's output, where it shows)
WRONG = {
    "values": (lambda x, weight: 0.1 * x.detach(), "output"),
    "gradient of the input": (lambda x, weight: x - x.detach(), "input gradient"),
    "gradient of a parameter": (lambda x, weight: weight - weight.detach(), "gradient of weight"),
    "NaN": (lambda x, weight: torch.where(first(x), torch.nan, 0).to(x.dtype), "output"),
    "infinity": (lambda x, weight: torch.where(first(x), torch.inf, 0).to(x.dtype), "output"),
    "infinity in a gradient": (lambda x, weight: (x - x.detach()).masked_fill(~first(x), 0).sqrt(), "input gradient"),
}


class Fused(Original):
    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return super().forward(x) + self.wrong(x, self.weight)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_what_differs_is_a_miss(name, dtype, layout):
    wrong, where = WRONG[name]
    result = compare(name, Original(), Fused(wrong), SHAPE, dtype, layout)
    assert not result.passed and result.worst == where
    assert result.fused > 10 * result.eager or math.isnan(result.fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_passes(dtype):
    assert compare("same", Original(), Fused(lambda x, weight: 0), SHAPE, dtype, "nchw").passed


def test_one_maximum_chosen_otherwise_is_chance_in_half_precision_alone():
    """The gradient of one element in a thousand differs."""

    def one(x, weight):
        return ((x - x.detach()) * first(x)).to(x.dtype)

    for dtype, passes in ((torch.float32, False), (torch.bfloat16, True)):
        result = compare("one", Original(), Fused(one), SHAPE, dtype, "nchw")
        assert result.passed == passes and result.worst == "input gradient"
