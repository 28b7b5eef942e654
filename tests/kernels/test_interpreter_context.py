"""The Triton kernels of a context pool in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, gradcheck, in_layout, random
from tests.ops import test_context_pool as of_context
from tests.ops.test_channel_gate import strided


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "context_pool", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(2, 10, 5, 7), (2, 1, 9, 5), (1, 300, 3, 4), (2, 8, 33), (1, 6, 3, 4, 5), (2, 8, 1, 1)], ids=str
)
def test_shapes(shape, layout):
    of_context.check(in_layout(random(*shape), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_context.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    of_context.check(in_layout(random(2, 10, 5, 7, dtype=dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_space_split_among_programs(scale, layout):
    """The second with one position that has all."""
    of_context.check(in_layout(random(1, 3, 70, 71), layout), scale=scale, bias=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_tiles_a_program(layout, monkeypatch):
    """As where samples are many: each tile may have a larger logit than those before."""
    from fused_attn.kernels import maps

    monkeypatch.setattr(maps, "PROGRAMS_PER_SM", 1)
    of_context.check(in_layout(random(4, 3, 40, 71), layout), scale=5.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ascending", [True, False])
def test_the_largest_logit_may_come_late(ascending, layout):
    of_context.test_the_largest_logit_may_come_late(ascending, layout)


@pytest.mark.parametrize("strides", ["channels_last", "sliced", "transposed", "expanded over space"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_strides(layout, strides):
    shape = (2, 12, 6, 7)
    of_context.check(in_layout(random(*shape), layout), grad_map=strided(random(*shape, seed=3))[strides])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate(dtype, layout):
    of_context.check_gate(in_layout(random(2, 12, 6, 7, dtype=dtype), layout))
    of_context.check_gate(
        in_layout(random(2, 12, 6, 7, dtype=dtype), layout), strided(random(2, 12, 6, 7, seed=3, dtype=dtype))["sliced"]
    )


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    of_context.test_empty(shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, layout):
    of_context.test_nan_and_infinity(value, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_are_all_infinite(layout):
    of_context.test_logits_that_are_all_infinite(layout)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["map", "context"])
def test_map_or_context_alone(used):
    of_context.test_map_or_context_alone(used)


def test_gradcheck():
    gradcheck(functional.context_pool, of_context.inputs_of(random(1, 2, 3, 4, dtype=torch.float64)))
