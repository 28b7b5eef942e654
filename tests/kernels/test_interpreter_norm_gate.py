"""The Triton kernels of norm_gate in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import functools

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from fused_attn.kernels import maps, norm_gate
from tests.checks import LAYOUTS, in_layout, random
from tests.ops import test_norm_gate as of_norm_gate
from tests.ops.test_channel_gate import strided
from tests.ops.test_norm_gate import check, inputs_of

pytestmark = pytest.mark.slow  # 20 s in all


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "norm_gate", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 10, 5, 7), (2, 1, 9, 5), (2, 300, 3, 2), (2, 8, 33), (2, 6, 3, 2, 5)], ids=str)
def test_shapes(shape, layout):
    x = in_layout(random(*shape, dtype=torch.float64), layout)
    check(inputs_of(x, residual=True), post_activation="relu")
    check(inputs_of(x), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_norm_gate.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    x = in_layout(random(3, 10, 5, 7, dtype=dtype), layout)
    check(inputs_of(x, residual=True), activation="silu", post_activation="relu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 88, 7, 7), (1, 8, 3, 5), (1, 4, 2, 17)], ids=str)
def test_maps_that_are_read_as_one_run(shape, dtype):
    """Rows that begin anywhere; of the first, two programs a sample. Gradients as x lies, and with other strides."""
    assert maps.dense(torch.empty(shape, dtype=dtype), True)[1].layout == maps.FLAT.value
    x = random(*shape, dtype=dtype)
    check(inputs_of(x, residual=True), activation="silu", post_activation="relu")
    check(inputs_of(x, residual=True), strided(random(*shape, seed=3, dtype=dtype))["channels_last"], activation="relu")
    of_norm_gate.check_bits("triton", shape, dtype, "nchw")


@pytest.mark.parametrize("shape", [(2, 88, 7, 7), (1, 3, 40, 41)], ids=str)
def test_moments_of_half_precision(shape):
    """To float64's, with means far from 0 and a first element far from them."""
    x = (random(*shape).mul(8).round() + 1024).half()
    x[:, 1].view(shape[0], -1)[:, 0] = 0
    first, rest, square = norm_gate.moments(x).double().unbind(1)
    variance, mean = torch.var_mean(x.double().flatten(2), 2, correction=0)
    torch.testing.assert_close(first + rest, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(square, variance * x[0, 0].numel(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "activation, post_activation", [("relu", "silu"), ("hard_swish", "relu"), ("gelu", "identity")]
)
def test_activations(activation, post_activation, training, layout):
    x = in_layout(random(2, 6, 5, 7, dtype=torch.float64), layout)
    for gate in (True, False):
        options = {"activation": activation, "post_activation": post_activation, "training": training}
        check(inputs_of(x, residual=gate, gate=gate), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_space_split_among_programs(layout):
    """The second with its mean far from 0."""
    check(inputs_of(in_layout(random(1, 3, 40, 41), layout), residual=True), activation="silu", post_activation="relu")
    x = in_layout((random(2, 3, 40, 41, dtype=torch.float64).mul(64).round().div(64) + 4096).float(), layout)
    check(inputs_of(x))


@pytest.mark.parametrize("strides", ["channels_last", "sliced", "transposed", "expanded over space"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout, strides):
    shape = (2, 12, 6, 7)
    inputs = inputs_of(in_layout(random(*shape), layout), residual=True)
    for post_activation in ("identity", "relu"):
        check(inputs, strided(random(*shape, seed=3))[strides], activation="silu", post_activation=post_activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_nan(value, layout):
    of_norm_gate.test_nan_and_infinity(value, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_norm_gate.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 7, 7), (3, 12, 1, 1), (2, 1, 5, 3), (1, 37, 5, 9)], ids=str)
def test_bits(shape, dtype, layout):
    of_norm_gate.check_bits("triton", shape, dtype, layout)


@pytest.mark.parametrize("dtype", of_norm_gate.DTYPES, ids=str)
@pytest.mark.parametrize("shape", of_norm_gate.NUMBER_SHAPES, ids=str)
def test_numbers_between_the_passes(shape, dtype):
    of_norm_gate.check_coefficients("triton", shape, dtype)
    of_norm_gate.check_factors("triton", shape, dtype)
    of_norm_gate.check_running("triton", shape[1], dtype)
    if dtype.itemsize > 2:
        of_norm_gate.check_coefficients("triton", shape, dtype, 4096.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_write_over(layout):
    of_norm_gate.test_write_over_the_residual((2, 9, 7, 7), torch.float32, layout, "triton")
    of_norm_gate.test_write_over_x((2, 9, 7, 7), torch.float32, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    x = in_layout(random(2, 2, 1, 3, dtype=torch.float64), layout).requires_grad_()
    function = functools.partial(functional.norm_gate, training=True, activation="silu", excitation=torch.sigmoid)
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
