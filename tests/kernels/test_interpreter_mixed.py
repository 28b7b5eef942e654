"""The Triton kernels of mixed_scale in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, in_layout, random
from tests.ops import test_mixed_scale as of_mixed_scale
from tests.ops.test_channel_gate import strided
from tests.ops.test_mixed_scale import KINDS, check, gates_of

pytestmark = pytest.mark.slow  # 19 s in all

SHAPES = ((2, 10, 5, 7), (3, 8, 1, 1), (2, 1, 9, 5), (1, 3, 4, 150), (1, 70, 30, 4))


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "mixed_scale", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, combine, names, layout):
    """Tiles with some, with all and with more channels, rows and columns than the map has; rows and columns split."""
    check(in_layout(random(*shape), layout), combine, gates_of(shape, names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_mixed_scale.DTYPES, ids=str)
@pytest.mark.parametrize(("combine", "names"), [KINDS[0], KINDS[4], *KINDS[-3:]], ids=str)
def test_dtypes(combine, names, dtype, layout):
    shape = (2, 10, 5, 7)
    check(in_layout(random(*shape, dtype=dtype), layout), combine, gates_of(shape, names, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", of_mixed_scale.OF_ANY_RANK)
@pytest.mark.parametrize("shape", [(2, 8, 33), (1, 6, 3, 4, 5), (1, 5, 600)], ids=str)
def test_other_ranks(shape, combine, layout, monkeypatch):
    """The last is split among programs, each with several tiles."""
    from fused_attn.kernels import maps

    monkeypatch.setattr(maps, "multiprocessors", lambda device: 1)
    check(
        in_layout(random(*shape), layout),
        combine,
        gates_of(shape, of_mixed_scale.GATES_OF.get(combine, ("channel", "spatial"))),
    )


@pytest.mark.parametrize("strides", ["channels_last", "sliced", "batch last", "expanded over space", "expanded scalar"])
def test_gradients_of_other_strides(strides):
    shape = (2, 12, 6, 7)
    grad = strided(random(*shape, seed=3))[strides]
    for combine, names in (KINDS[0], KINDS[4], *KINDS[-2:]):
        check(random(*shape), combine, gates_of(shape, names), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_of_the_operator(layout):
    """Gates of any strides and dtype, NaN and infinity, ties, nothing to do."""
    for combine in ("product", "sum"):
        of_mixed_scale.test_gates_of_any_strides_and_dtype(combine, layout)
    for combine, names in KINDS:
        of_mixed_scale.test_nan_and_infinity(combine, names, layout)
    # The interpreter cuts off what a bfloat16 rounds.
    for equal, dtype in (
        ("before rounding", torch.bfloat16),
        *(("after it", d) for d in (torch.float32, torch.float16)),
    ):
        of_mixed_scale.test_equal_products_share_the_gradient(equal, dtype, layout)
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (2, 0, 3, 3)):
        of_mixed_scale.test_empty(shape, layout)


@pytest.mark.parametrize(("combine", "names"), [KINDS[0], *KINDS[-2:]], ids=str)
def test_opcheck(combine, names):
    of_mixed_scale.test_opcheck(combine, names)
