"""The Triton kernels of select and its two phases in Triton's interpreter, by the tests of the operators."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from fused_attn.kernels import select
from fused_attn.kernels.maps import FLAT
from tests.checks import LAYOUTS, in_layout, random, run
from tests.ops import test_select as of_select
from tests.ops.test_select import FORMS, affine_of, apply, check, maps, parts, weights

pytestmark = pytest.mark.slow  # 39 s in all

SHAPES = ((2, 10, 5, 7), (2, 80, 5, 7), (1, 70, 9, 4), (2, 1, 9, 5), (2, 20, 1, 1), (2, 3, 31), (1, 6, 3, 4, 5))


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "select", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, form, layout):
    # One channel's gradients of weights cancel: in float32 nothing is left to compare.
    dtype = torch.float64 if shape[1] == 1 else torch.float32
    inputs = maps(shape, 2, form, layout, dtype) | weights(shape[1], 2, dtype=dtype)
    check(inputs, form=form)
    # So few hidden numbers are the map's programs' own work; of more, launches of their own.
    inputs |= weights(shape[1], 2, hidden=3, dtype=dtype) | affine_of(shape[1], 2, dtype)
    check(inputs, form=form, pre_activation="relu")


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("hidden", [3, 12])
@pytest.mark.parametrize("dtype", of_select.DTYPES, ids=str)
def test_small_maps(dtype, hidden, gate):
    """Read as one run of whole vectors, of several programs a sample."""
    given = maps((2, 176, 5, 7), 2, "stacked", "nchw", dtype)
    plan = select._branches([given["x"]], 2, None, None).plan
    assert plan.layout == FLAT.value and plan.n_cblk > 1
    inputs = given | weights(176, 2, hidden=hidden, dtype=dtype)
    check(inputs, form="stacked", gate=gate)
    check(inputs | affine_of(176, 2, dtype), form="stacked", gate=gate, pre_activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_select.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    inputs = maps((2, 10, 5, 8), 2, "joined", layout, dtype) | weights(10, 2, dtype=dtype)
    check(inputs, form="joined")
    check(inputs | affine_of(10, 2, dtype), form="joined", pre_activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("paths", [1, 3, 8])
@pytest.mark.parametrize(("form", "groups"), [("separate", 1), ("stacked", 2), ("joined", 4)])
def test_branches_gates_and_groups(form, groups, paths, gate, layout):
    inputs = maps((2, 12, 4, 4), paths, form, layout) | weights(12, paths, groups, bias=groups != 2)
    inputs |= affine_of(12, paths) if groups == 2 else {}
    check(inputs, paths=paths, form=form, groups=groups, gate=gate)


@pytest.mark.parametrize(
    ("form", "layout"), [("separate", "nchw"), ("stacked", "channels_last"), ("joined", "channels_last")]
)
def test_space_and_channels_split_among_programs(form, layout):
    """Partial sums of several programs; more hidden numbers than a block has."""
    shape = (1, 80, 13, 41)
    inputs = maps(shape, 2, form, layout) | weights(80, 2, groups=2, hidden=40) | affine_of(80, 2)
    check(inputs, form=form, groups=2)


@pytest.mark.parametrize("activation", of_select.ACTIVATIONS)
def test_activations(activation):
    inputs = maps((2, 8, 3, 4), 2) | weights(8, 2)
    check(inputs, activation=activation)
    check(inputs | affine_of(8, 2), pre_activation=activation)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_activation_without_an_affine(layout):
    check(maps((2, 8, 3, 4), 2, layout=layout) | weights(8, 2), pre_activation="silu")


def test_more_samples_than_are_summed_at_once():
    """Parameters' gradients are sums over 32 samples at a time."""
    inputs = maps((35, 6, 2, 3), 2, "joined") | weights(6, 2, groups=2) | affine_of(6, 2)
    check(inputs, form="joined", groups=2)


@pytest.mark.parametrize("paths", [2, 5])
def test_logits_too_large_for_an_exponential(paths):
    of_select.test_logits_too_large_for_an_exponential(paths, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", of_select.STRIDES)
@pytest.mark.parametrize("of", ["u1", "grad", "both", "grad of two phases"])
def test_strides(of, strides, layout):
    if of == "grad of two phases":
        of_select.test_gradient_strides_of_the_two_phases(strides, layout)
    else:
        of_select.test_strides(of, strides, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", parts((1, 2, 3), "nchw"))
@pytest.mark.parametrize("shape", [(3, 12, 6, 7), (2, 3, 2, 3, 4)], ids=str)
def test_parts_of_a_larger_tensor(shape, which, layout):
    of_select.test_parts_of_a_larger_tensor(shape, which, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_that_share_no_distance_between_pixels(layout):
    inputs = {"u0": in_layout(random(2, 17, 5, 6), layout)[:, :8], "u1": in_layout(random(2, 9, 5, 6), layout)[:, 1:]}
    check(inputs | weights(8, 2))


def test_empty():
    for shape in ((0, 8, 5, 5), (2, 3, 0, 4)):
        for form in FORMS:
            of_select.test_empty(shape, form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, gate, layout):
    of_select.test_nan_and_infinity(gate, value, layout)


def test_nan_stays_in_its_group():
    inputs = maps((2, 8, 3, 4), 2) | weights(8, 2, groups=2)
    inputs["u0"][0, 1, 2, 2] = float("nan")
    (y,), grads = run(apply(functional.select, groups=2), inputs, [random(2, 8, 3, 4, seed=1)])
    assert y[0, :4].isnan().any() and not y[0, 4:].isnan().any() and not y[1].isnan().any()
    assert not grads["u1"][0, 4:].isnan().any()


def test_the_sum_is_not_rounded():
    of_select.test_the_sum_is_not_rounded()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_two_phases(form, affine, layout):
    of_select.test_around_an_excitation_with_a_batch_norm(2, affine, torch.float32, form, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_phases_and_the_whole(layout):
    of_select.test_output_and_gradients_keep_the_layout((2, 6, 5, 4), "joined", layout)
    for dtype in (torch.float64, torch.float32):
        of_select.test_both_forms_agree(dtype, layout)


@pytest.mark.parametrize("two_phases", [False, True])
def test_gradcheck(two_phases):
    of_select.test_gradcheck(False, two_phases, "separate", "nchw", fast=True)


@pytest.mark.parametrize(("form", "layout"), [("separate", "nchw"), ("joined", "channels_last")])
def test_operators(form, layout):
    of_select.test_operators(form=form, layout=layout, spatial=(5, 6))
