"""criss_cross_attention by the Triton kernels on a real device, judged beside eager."""

from __future__ import annotations

import pytest
import torch

from fused_attn import functional, reference

from ..checks import LAYOUTS, assert_equivalent, in_layout, random, run
from ..ops.test_channel_gate import STRIDES, strided
from ..ops.test_criss_cross import DTYPES, NAMES, inputs_of
from .test_select import on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("streaming")]

#: Of the value, with the depth of query and key.
SHAPES = {
    (2, 512, 56, 56): 64,
    (1, 64, 97, 97): 8,
    (1, 24, 129, 257): 3,
    (2, 40, 13, 17): 80,
    (1, 20, 1, 300): 5,
    (1, 20, 300, 1): 5,
    (3, 70, 7, 9): 33,
    (2, 1, 1, 1): 1,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, layout):
    inputs = on_gpu(inputs_of(shape, SHAPES[shape], layout, dtype))
    inputs["query"] = inputs["query"] * SHAPES[shape] ** -0.5  # scores of about 1, so that many positions count
    grad = in_layout(random(*shape, seed=9, dtype=dtype), layout).to("cuda")
    assert_equivalent(functional.criss_cross_attention, reference.criss_cross_attention, inputs, [grad])


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", [*NAMES, "grad"])
def test_strides(of, strides):
    shape = (2, 12, 34, 35)
    tensors = inputs_of(shape, 12) | {"grad": random(*shape, seed=8)}
    inputs = on_gpu(tensors | {of: strided(random(*shape, seed=3))[strides]})
    grad = inputs.pop("grad")
    assert_equivalent(functional.criss_cross_attention, reference.criss_cross_attention, inputs, [grad])


@pytest.mark.parametrize("of", NAMES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(number, of):
    """They reach the positions that eager lets them reach."""
    shape = (2, 5, 40, 41)
    inputs, grad = inputs_of(shape, 3), [random(*shape, seed=9).to("cuda")]
    inputs[of][0, 1, 4, 5] = number
    (y,), grads = run(functional.criss_cross_attention, on_gpu(inputs), grad)
    (eager,), eager_grads = run(reference.criss_cross_attention, on_gpu(inputs), grad)
    assert torch.equal(y.isfinite(), eager.isfinite())
    for name in NAMES:
        assert torch.equal(grads[name].isfinite().all(1), eager_grads[name].isfinite().all(1)), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_run_changes_a_bit(dtype, layout):
    shape = (2, 96, 65, 33)
    inputs, grad = on_gpu(inputs_of(shape, 12, layout, dtype)), [random(*shape, seed=9, dtype=dtype).to("cuda")]
    (y,), grads = run(functional.criss_cross_attention, inputs, grad)
    for _ in range(3):
        (again,), grads_again = run(functional.criss_cross_attention, inputs, grad)
        assert torch.equal(y, again)
        assert all(torch.equal(grads[name], grads_again[name]) for name in NAMES)
