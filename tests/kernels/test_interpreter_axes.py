"""The Triton kernels of axis_pool in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest

import fused_attn
from fused_attn import nn, reference
from fused_attn.backends import unavailable
from fused_attn.codes import TIES
from tests.checks import LAYOUTS, assert_same_block, in_layout, random
from tests.ops import test_axis_pool as of_axis_pool

pytestmark = pytest.mark.slow  # 19 s in all

SHAPES = ((2, 10, 5, 7), (3, 8, 1, 1), (1, 70, 3, 4), (2, 1, 9, 5), (1, 3, 20, 70), (0, 4, 3, 3))


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "axis_pool", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", of_axis_pool.MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, options, layout):
    of_axis_pool.check(in_layout(random(*shape), layout), **options)
    for ties in ("first", "even"):
        of_axis_pool.check(in_layout(random(*shape).mul(2).round(), layout), ties=ties, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_axis_pool.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    of_axis_pool.check(in_layout(random(2, 10, 5, 7, dtype=dtype), layout), maxima=True, channels=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("-inf")])
def test_special_values(value, ties, layout):
    of_axis_pool.test_special_values((2, 5, 6, 40), ties, value, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", ["channels_last", "sliced", "transposed", "expanded over space"])
def test_strides(strides, layout):
    of_axis_pool.test_strides(strides, layout)


def test_gradients_of_some_outputs_alone():
    for used in range(4):
        of_axis_pool.test_gradients_of_some_outputs_alone(used, "nchw")


def test_modules():
    for name, arguments in (("TripletAttention", ()), ("CoordinateAttention", (12,))):
        block, original = getattr(nn, name)(*arguments), getattr(reference, name)(*arguments)
        original.load_state_dict(block.state_dict())
        assert_same_block(block, original, random(2, 12, 6, 7), training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_several_tiles_of_every_axis(ties, layout, monkeypatch):
    from fused_attn.kernels import axis_pool, maps

    for name, size in {"TILE": 32, "CHANNELS": 4, "CHANNELS_A_TILE": 4, "SIDE": 2}.items():
        monkeypatch.setattr(axis_pool, name, size)
    x = in_layout(random(1, 6, 3, 9).mul(2).round(), layout)
    tile = axis_pool._tile_size(x, 1, 1, TIES[ties])
    given = axis_pool._arguments(x, maps.dense(x)[1].layout, tile)
    assert min(given["n_c"], given["n_h"], given["n_w"]) > 1
    of_axis_pool.check(x, maxima=True, channels=True, ties=ties)
