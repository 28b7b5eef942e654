"""axis_pool against its reference: pools and gradients, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.backends import choose
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MODES = ({}, {"maxima": True}, {"maxima": True, "channels": True})
#: In pieces where there are two threads, rows of less than a vector and of many, sums of more than a block an axis.
SHAPES = (
    (2, 16, 7, 7),
    (3, 8, 1, 1),
    (1, 40, 13, 17),
    (2, 1, 9, 5),
    (0, 4, 3, 3),
    (1, 72, 40, 41),
    (1, 300, 3, 50),
    (1, 6, 150, 2),
    (1, 3, 2, 1200),
)


def pools(module, with_map=True, **options):
    """The map in front of its pools, so that its gradient comes through as well."""
    return lambda x: (module.axis_pool_with_map if with_map else module.axis_pool)(x, **options)


def shapes_of(x: Tensor, maxima=False, channels=False, **options) -> list[tuple[int, ...]]:
    batch, depth, height, width = x.shape
    if not maxima:
        return [(batch, depth, height, 1), (batch, depth, 1, width)]
    return [(batch, 2, depth, height), (batch, 2, depth, width), *[(batch, 2, height, width)] * channels]


def check(x: Tensor, grad: Tensor | None = None, **options) -> None:
    """With what follows the map, and alone."""
    grads = [random(*shape, seed=i, dtype=x.dtype) for i, shape in enumerate(shapes_of(x, **options), 2)]
    alone = (pools(module, with_map=False, **options) for module in (functional, reference))
    assert_equivalent(*alone, {"x": x}, grads)
    grad = random(*x.shape, seed=1, dtype=x.dtype) if grad is None else grad
    both = (pools(module, **options) for module in (functional, reference))
    assert_equivalent(*both, {"x": x}, [grad, *grads])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, options, dtype, layout):
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(x, **options)
    assert [t.shape for t in functional.axis_pool(x, **options)] == shapes_of(x, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("options", MODES[1:], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:3], (1, 16, 40, 41)], ids=str)
def test_ties(shape, options, ties, dtype, layout):
    x = in_layout(random(*shape, dtype=dtype).mul(2).round().clamp(-2, 2), layout)  # a few values: many ties
    check(x, ties=ties, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_a_maximum_goes_where_it_is_said(layout):
    """All equal: "first" sends it to the first of each row, column and position, "even" the same to all."""
    x = in_layout(torch.zeros(1, 2, 3, 4, dtype=torch.float64), layout).requires_grad_()
    first = torch.zeros(2, 3, 4, dtype=torch.float64)
    for place in (first[:, :, 0], first[:, 0], first[0]):
        place += 1
    even = torch.full_like(first, 1 / 4 + 1 / 3 + 1 / 2)
    for ties, expected in (("first", first), ("even", even)):
        found = functional.axis_pool(x, maxima=True, channels=True, ties=ties)
        grad = torch.autograd.grad(sum(pool[:, 0].sum() for pool in found), x)[0]
        torch.testing.assert_close(grad[0], expected)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("-inf"), float("inf")])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("shape", [(2, 5, 6, 40), (1, 20, 40, 41)], ids=str)
def test_special_values(shape, ties, value, layout):
    """Rows, columns and positions of nothing else among them; the larger shape is cut among threads."""
    x = random(*shape)
    x[0, 3, 2, 2] = x[-1, 0, 5, 39] = x[-1, 4, 5, 39] = value
    x[0, 1, 3] = x[0, 2, :, 5] = x[-1, :, 4, 7] = value
    x = in_layout(x, layout)
    options = {"maxima": True, "channels": True, "ties": ties}
    grads = [random(*s, seed=i) for i, s in enumerate([shape, *shapes_of(x, **options)])]
    found, found_grads = run(pools(functional, **options), {"x": x}, grads)
    eager, eager_grads = run(pools(reference, **options), {"x": x}, grads)
    for ours, theirs in zip((*found, found_grads["x"]), (*eager, eager_grads["x"]), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides, layout):
    """Of the map, of its gradient, and of a pool's."""
    options = {"maxima": True, "channels": True}
    x, other = in_layout(random(2, 5, 6, 7), layout), strided(random(2, 5, 6, 7, seed=1))[strides]
    check(other, **options)
    check(x, other, **options)
    grads = [other, *(random(*shape, seed=2).mT.contiguous().mT for shape in shapes_of(x, **options))]
    assert_equivalent(pools(functional, **options), pools(reference, **options), {"x": x}, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("used", range(4))
def test_gradients_of_some_outputs_alone(used, layout):
    options = {"maxima": True, "channels": True}
    x = in_layout(random(2, 5, 6, 7), layout)
    grad = random(*[x.shape, *shapes_of(x, **options)][used], seed=1)

    def one(module):
        return lambda x: module.axis_pool_with_map(x, **options)[used]

    assert_equivalent(one(functional), one(reference), {"x": x}, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_gradcheck(ties, options, layout):
    x = in_layout(random(2, 4, 3, 3, dtype=torch.float64), layout).requires_grad_()

    def squared(x):
        return [pool.square() for pool in functional.axis_pool_with_map(x, ties=ties, **options)]

    assert torch.autograd.gradcheck(squared, (x,))
    assert torch.autograd.gradgradcheck(squared, (x,))


def test_torch_func_runs_the_reference():
    x = random(3, 2, 6, 4, 4, dtype=torch.float64)
    batched = torch.func.vmap(lambda x: functional.axis_pool(x)[0])(x)
    torch.testing.assert_close(batched, x.mean(-1, keepdim=True))


@pytest.mark.parametrize("options", MODES, ids=str)
def test_saved_bytes(options):
    """Backward keeps x, and of each pool its numbers and one place: never a second map."""
    x, saved = random(2, 128, 28, 28).requires_grad_(), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.axis_pool(x, **options)
    numbers = sum(torch.Size(shape).numel() for shape in shapes_of(x, **options)) * (1.5 if options else 1)
    assert sum(saved.values()) <= 4 * (x.numel() + numbers)


def test_autocast_keeps_the_dtype_of_x():
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.axis_pool(random(2, 3, 4, 5))[0].dtype == torch.float32


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    options=st.sampled_from(MODES),
    ties=st.sampled_from(["first", "even"]),
    levels=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
)
def test_any_shape(shape, options, ties, levels, layout, grad_layout):
    x = random(*shape, dtype=torch.float64)
    x = x if levels is None else x.mul(levels).round()
    grad = in_layout(random(*shape, seed=1, dtype=torch.float64), grad_layout)
    check(in_layout(x, layout), grad, ties=ties, **options)


@pytest.mark.parametrize(("ties", "options"), list(zip(("first", "first", "even"), MODES, strict=True)), ids=str)
def test_opcheck(ties, options):
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    from fused_attn.codes import TIES
    from fused_attn.ops.axis_pool import BACKWARD, FORWARD

    x = random(2, 8, 5, 6)
    backend = choose("axis_pool", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    codes = int(options.get("maxima", False)), int(options.get("channels", False)), TIES[ties]
    for values in (x, *map(strided(x).get, CHECKED)):
        torch.library.opcheck(FORWARD[backend], (values, *codes))
        kept = FORWARD[backend](values, *codes)
        grads = (*kept[:2], kept[2] if codes[1] else None)
        for grad in (None, x):
            torch.library.opcheck(BACKWARD[backend], (grad, *grads, values, *kept, *codes))


@pytest.mark.slow  # a compilation
@pytest.mark.parametrize("layout", [pytest.param("nchw", marks=pytest.mark.long), "channels_last"])
@pytest.mark.parametrize("options", [pytest.param(MODES[0], marks=pytest.mark.long), MODES[2]], ids=str)
def test_compiles_in_one_graph(options, layout):
    def block(x):
        y, *found = functional.axis_pool_with_map(x * 2, **options)
        return y * y.sigmoid() + sum(pool.square().mean() for pool in found)

    x = in_layout(random(2, 5, 6, 7), layout).requires_grad_()
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("threads", [1, 3, 5])
def test_results_do_not_depend_on_the_run(threads, ties, layout):
    """The same bits every time; the number of threads decides the pieces only, in which maxima may be equal."""
    x = in_layout(random(1, 24, 40, 41).mul(4).round().clamp(-8, 8), layout)
    options = {"maxima": True, "channels": True, "ties": ties}
    grads = [random(*shape, seed=2) for shape in shapes_of(x, **options)]
    torch.set_num_threads(threads)
    runs = [run(pools(functional, False, **options), {"x": x}, grads) for _ in range(2)]
    check(x, **options)
    for first, second in zip(*((*pooled, found["x"]) for pooled, found in runs), strict=True):
        assert torch.equal(first, second)
