"""The Triton kernels of SimAM in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, in_layout, random
from tests.ops import test_simam as of_simam
from tests.ops.test_channel_gate import strided


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "simam", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 10, 5, 7), (2, 1, 9, 5), (1, 300, 3, 4), (2, 8, 33), (1, 6, 3, 4, 5), (0, 3, 4, 4)], ids=str
)
def test_shapes(shape, layout):
    of_simam.check(in_layout(random(*shape), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_simam.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    of_simam.check(in_layout(random(2, 10, 5, 7, dtype=dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("e_lambda", [0, 0.3])
def test_e_lambda(e_lambda, layout):
    of_simam.check(in_layout(random(2, 6, 5, 7, dtype=torch.float64), layout), e_lambda=e_lambda)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_space_split_among_programs(layout):
    """The second with its mean far from 0."""
    of_simam.check(in_layout(random(1, 3, 40, 41), layout))
    of_simam.test_a_large_mean_costs_no_digits((1, 2, 40, 41), layout)


@pytest.mark.parametrize("strides", ["channels_last", "sliced", "transposed", "expanded over space"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout, strides):
    shape = (2, 12, 6, 7)
    of_simam.check(in_layout(random(*shape), layout), strided(random(*shape, seed=3))[strides])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_nan(value, layout):
    of_simam.test_nan_and_infinity(value, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_position(dtype):
    of_simam.test_one_position_is_nan_as_in_the_original((2, 8, 1, 1), dtype)


def test_gradcheck():
    x = random(1, 2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(functional.simam, x)
