"""criss_cross_attention against its reference: forward and gradients, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.ops.criss_cross_attention import BACKWARD, FORWARD, RELAYOUT
from tests.checks import LAYOUTS, Inputs, assert_equivalent, gradcheck, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("query", "key", "value")
#: Of the value, with the depth of query and key. Lines of one position, of one panel and of several, of one block and
#: of several, and columns that fill a group of them and do not.
SHAPES = {
    (2, 24, 7, 9): 3,
    (1, 12, 17, 16): 8,
    (2, 40, 33, 5): 17,
    (3, 1, 1, 6): 1,
    (2, 5, 8, 1): 4,
    (1, 3, 1, 1): 2,
    (1, 6, 131, 4): 5,
    (1, 6, 3, 300): 5,
    (1, 7, 260, 18): 2,
}


def inputs_of(shape: tuple[int, ...], depth: int, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> Inputs:
    batch, _, *space = shape
    shapes = ((batch, depth, *space), (batch, depth, *space), shape)
    return {
        name: in_layout(random(*s, seed=i, dtype=dtype), layout)
        for i, (name, s) in enumerate(zip(NAMES, shapes, strict=True))
    }


def check(inputs: Inputs, grad: Tensor | None = None) -> None:
    value = inputs["value"]
    grad = random(*value.shape, seed=9, dtype=value.dtype) if grad is None else grad
    assert_equivalent(functional.criss_cross_attention, reference.criss_cross_attention, inputs, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, dtype, layout):
    check(inputs_of(shape, SHAPES[shape], layout, dtype))


def test_the_formula_position_by_position():
    """One softmax over row and column, in which a position is once; no scale."""
    shape = batch, channels, height, width = (2, 3, 4, 5)
    query, key, value = inputs_of(shape, 2, dtype=torch.float64).values()
    expected = torch.empty(shape, dtype=torch.float64)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                cross = [(i, w) for w in range(width)] + [(h, j) for h in range(height) if h != i]
                scores = torch.stack([query[b, :, i, j] @ key[b, :, h, w] for h, w in cross])
                expected[b, :, i, j] = torch.stack([value[b, :, h, w] for h, w in cross], 1) @ scores.softmax(0)
    for module in (functional, reference):
        torch.testing.assert_close(module.criss_cross_attention(query, key, value), expected)


def check_a_layout_each(rest: str, last: str, shape: tuple[int, ...]) -> None:
    other = LAYOUTS[rest == LAYOUTS[0]]
    inputs = inputs_of(shape, 4, rest)
    grad = in_layout(random(*shape, seed=9), other if last == "grad" else rest)
    check({name: in_layout(t, other) if name == last else t for name, t in inputs.items()}, grad)


@pytest.mark.parametrize("last", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("rest", LAYOUTS)
def test_a_layout_each(rest, last):
    """One with channels last among NCHW maps, and the other way round."""
    check_a_layout_each(rest, last, (2, 12, 19, 21))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", [*NAMES, "grad"])
def test_strides(of, strides, layout):
    inputs = inputs_of((2, 12, 6, 7), 12, layout)
    grad = in_layout(random(2, 12, 6, 7, seed=8), layout)
    other = strided(random(2, 12, 6, 7, seed=3))[strides]
    check({name: other if of == name else t for name, t in inputs.items()}, other if of == "grad" else grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradients_keep_the_layout(shape, layout):
    leaves = {k: v.requires_grad_() for k, v in inputs_of(shape, 3, layout).items()}
    y = functional.criss_cross_attention(**leaves)
    assert y.stride() == leaves["value"].stride()
    for leaf, grad in zip(leaves.values(), torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 3, 0, 0)], ids=str)
def test_empty(shape):
    check(inputs_of(shape, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_depth(layout):
    """All weights are equal."""
    check(inputs_of((2, 3, 4, 5), 0, layout))


def check_nan_and_infinity(number: float, of: str, layout: str, shape: tuple[int, ...]) -> None:
    inputs, grad = inputs_of(shape, 3, layout), [random(*shape, seed=9)]
    inputs[of][0, 1, shape[2] // 2, shape[3] // 4] = number
    (actual,), grads = run(functional.criss_cross_attention, inputs, grad)
    (eager,), eager_grads = run(reference.criss_cross_attention, inputs, grad)
    torch.testing.assert_close(actual, eager, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not actual.isfinite().all() and actual[1].isfinite().all()
    for name in NAMES:
        assert torch.equal(grads[name].isfinite().all(1), eager_grads[name].isfinite().all(1)), name
        finite = eager_grads[name].isfinite()
        torch.testing.assert_close(grads[name][finite], eager_grads[name][finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", NAMES)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(number, of, layout):
    """They reach what eager lets them reach: of a value or key the positions of its row and column, and no others."""
    check_nan_and_infinity(number, of, layout, (2, 5, 9, 19))


@pytest.mark.parametrize("factor", [30.0, -300.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_far_from_each_other(layout, factor):
    """One position outweighs all others, in its row or in its column; a sum by itself would overflow."""
    inputs = inputs_of((1, 6, 20, 21), 4, layout)
    inputs["query"] = inputs["query"] * factor
    check(inputs)


def test_scores_that_are_all_minus_infinity_in_a_column():
    """The row's softmax is what is left."""
    inputs = inputs_of((1, 4, 6, 5), 1)
    inputs["query"] = inputs["query"].abs()
    inputs["key"][..., 2] = -torch.inf
    (actual,), _ = run(functional.criss_cross_attention, inputs, [torch.ones(1, 4, 6, 5)])
    torch.testing.assert_close(actual, reference.criss_cross_attention(**inputs), rtol=1e-4, atol=1e-5)
    assert actual.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 20, 18)], ids=str)
def test_threads(shape, layout, threads):
    torch.set_num_threads(threads)
    check(inputs_of(shape, 8, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 20, 18)], ids=str)
def test_neither_runs_nor_threads_change_a_bit(shape, layout):
    inputs, grad = inputs_of(shape, 8, layout), [random(*shape, seed=9)]
    results = []
    for threads in (3, 3, 4, 1):
        torch.set_num_threads(threads)
        results.append(run(functional.criss_cross_attention, inputs, grad))
    for (y,), grads in results[1:]:
        assert torch.equal(y, results[0][0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in NAMES)


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    depth=st.integers(1, 20),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_any_shape(batch, channels, depth, height, width, layout, dtype):
    check(inputs_of((batch, channels, height, width), depth, layout, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (1, 2, 1, 3), (1, 2, 3, 1)], ids=str)
def test_gradcheck_and_double_backward(shape, layout):
    inputs = inputs_of(shape, 2, layout, torch.float64)
    gradcheck(functional.criss_cross_attention, inputs)
    gradcheck(functional.criss_cross_attention, inputs, twice=True)


def check_saved_bytes(shape: tuple[int, ...], depth: int) -> None:
    """Backward keeps the inputs, the result and two numbers a position."""
    inputs = {k: v.requires_grad_() for k, v in inputs_of(shape, depth).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.criss_cross_attention(**inputs)
    batch, channels, height, width = shape
    assert sum(saved.values()) == 4 * batch * height * width * (2 * depth + 2 * channels + 2)


def test_saved_bytes():
    if choose("criss_cross_attention", torch.empty(0)) == "reference":
        pytest.skip("no native library on this machine: eager keeps what it keeps")
    check_saved_bytes((2, 32, 14, 14), 8)


def test_opcheck():
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    query, key, value = inputs_of((2, 8, 5, 6), 3).values()
    backend = choose("criss_cross_attention", value)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    for values in (value, *map(strided(value).get, CHECKED)):
        torch.library.opcheck(FORWARD[backend], (query, key, values))
        out, state = FORWARD[backend](query, key, values)
        torch.library.opcheck(BACKWARD[backend], (value, query, key, values, out, state))


@pytest.mark.slow  # a compilation
def test_compiles_in_one_graph():
    compiled = torch.compile(functional.criss_cross_attention, fullgraph=True, dynamic=True)
    for shape in ((2, 6, 5, 7), (3, 6, 8, 9)):
        leaves = [t.requires_grad_() for t in inputs_of(shape, 3).values()]
        torch.testing.assert_close(compiled(*leaves), functional.criss_cross_attention(*leaves))
        grads = (
            torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, functional.criss_cross_attention)
        )
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_what_needs_no_gradient_saves_nothing():
    inputs = inputs_of((2, 3, 4, 4), 2)
    assert functional.criss_cross_attention(**inputs).grad_fn is None
    with torch.no_grad():
        assert functional.criss_cross_attention(**{k: v.requires_grad_() for k, v in inputs.items()}).grad_fn is None


def test_under_autocast():
    """Inputs of several dtypes are the reference's, which casts them."""
    query, key, value = inputs_of((2, 8, 5, 6), 3).values()
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.criss_cross_attention(query.bfloat16(), key, value)
        assert torch.equal(y, reference.criss_cross_attention(query.bfloat16(), key, value))
        assert functional.criss_cross_attention(query, key, value).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_relayout(dtype):
    """Past tiles of 128, odd sizes, one channel, one position, nothing; from both layouts and from neither."""
    backend = choose("criss_cross_attention", torch.empty(0))
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    for shape in ((2, 130, 9, 29), (1, 3, 5, 7), (2, 1, 4, 5), (3, 17, 1, 1), (0, 4, 5, 6), (2, 4, 0, 3)):
        x = random(*shape, dtype=dtype)
        for source in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., : shape[3]]):
            for to, layout in enumerate((torch.contiguous_format, torch.channels_last)):
                y = RELAYOUT[backend](source, to)
                assert torch.equal(y, x) and y.is_contiguous(memory_format=layout)
                assert not y.numel() or y.data_ptr() != source.data_ptr()
                if dtype == torch.float64:
                    torch.library.opcheck(RELAYOUT[backend], (source, to))
