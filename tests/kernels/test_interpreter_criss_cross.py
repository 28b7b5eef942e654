"""The Triton kernels of criss-cross attention in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, cast, random, run
from tests.ops import test_criss_cross as of_cross
from tests.ops.test_channel_gate import strided

SMALL = (2, 3, 2, 3)


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "criss_cross_attention", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_cross.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    of_cross.check(of_cross.inputs_of(SMALL, 2, layout, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 5), (1, 3, 5, 1), (1, 2, 1, 1)], ids=str)
def test_lines_of_one_position(shape, layout):
    of_cross.check(of_cross.inputs_of(shape, 2, layout))


@pytest.mark.parametrize(
    ("shape", "depth", "layout", "dtype"),
    [
        ((1, 3, 2, 17), 2, "nchw", torch.float64),
        ((1, 3, 17, 2), 17, "channels_last", torch.float64),
        ((1, 66, 2, 2), 33, "nchw", torch.float32),
    ],
    ids=str,
)
def test_several_blocks_and_tiles(shape, depth, layout, dtype):
    """Of positions, of these and the channels of query and key, of all channels."""
    of_cross.check(of_cross.inputs_of(shape, depth, layout, dtype))


@pytest.mark.parametrize("last", [*of_cross.NAMES, "grad"])
@pytest.mark.parametrize("rest", LAYOUTS)
def test_a_layout_each(rest, last):
    of_cross.check_a_layout_each(rest, last, (1, 2, 2, 3))


@pytest.mark.parametrize("strides", ["sliced", "transposed", "expanded over space"])
def test_strides(strides):
    inputs, other = of_cross.inputs_of(SMALL, 3), strided(random(*SMALL, seed=3))[strides]
    of_cross.check({**inputs, "key": other}, other)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    of_cross.test_empty(shape)


def test_without_depth():
    of_cross.check(of_cross.inputs_of((1, 2, 2, 3), 0))


@pytest.mark.parametrize("of", of_cross.NAMES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(number, of):
    of_cross.check_nan_and_infinity(number, of, "channels_last", (2, 2, 2, 3))


@pytest.mark.parametrize("factor", [30.0, -300.0])
def test_scores_far_from_each_other(factor):
    """One position outweighs all others; what the gradient of a score is short of 0 by is times the query."""
    inputs, grad = of_cross.inputs_of((1, 3, 3, 4), 4), [random(1, 3, 3, 4, seed=9)]
    inputs["query"] = inputs["query"] * factor
    (y,), grads = run(functional.criss_cross_attention, inputs, grad)
    (exact,), exact_grads = run(reference.criss_cross_attention, cast(inputs, torch.float64), [grad[0].double()])
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    for name in of_cross.NAMES:
        atol = 1e-5 * max(abs(factor) if name == "key" else 1, 10)
        torch.testing.assert_close(grads[name].double(), exact_grads[name], rtol=1e-4, atol=atol)


def test_scores_that_are_all_minus_infinity():
    """In a column: the row's softmax is what is left. In the row, too: NaN, as in eager."""
    of_cross.test_scores_that_are_all_minus_infinity_in_a_column()
    inputs = of_cross.inputs_of((1, 2, 2, 3), 1)
    inputs["query"] = inputs["query"].abs()
    inputs["key"][..., 0, :] = inputs["key"][..., 2] = -torch.inf
    y, eager = (module.criss_cross_attention(**inputs) for module in (functional, reference))
    torch.testing.assert_close(y, eager, equal_nan=True)
    assert y[..., 0, 2].isnan().all()


def test_no_run_changes_a_bit():
    inputs, grad = of_cross.inputs_of((1, 3, 2, 3), 2), [random(1, 3, 2, 3, seed=9)]
    (first, grads), (again, grads_again) = (run(functional.criss_cross_attention, inputs, grad) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(grads[name], grads_again[name]) for name in of_cross.NAMES)


def test_saved_bytes():
    of_cross.check_saved_bytes((1, 4, 2, 3), 2)
