"""context_pool against its reference: forward and gradients, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.ops.context_pool import BACKWARD, FORWARD
from tests.checks import LAYOUTS, Inputs, assert_equivalent, gradcheck, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((2, 16, 7, 7), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5), (1, 72, 40, 41), (3, 300, 2, 1)),
    *((1, 1, 1, 2), (2, 9, 70, 70), (2, 8, 1, 1), (1, 2100, 9, 9), (1, 3, 1100)),
)


def inputs_of(x: Tensor, *, bias: bool = True, scale: float = 1.0) -> Inputs:
    channels = x.shape[1]
    weight = random(1, channels, 1, 1, seed=1, dtype=x.dtype, scale=scale * channels**-0.5)
    return {"x": x, "weight": weight, "bias": random(1, seed=2, dtype=x.dtype) if bias else None}


def with_map(module, used=(True, True)):
    """The context, the map or both; the map takes part in what follows."""

    def function(x, weight, bias):
        y, context = module.context_pool_with_map(x, weight, bias)
        return [t for t, wanted in zip((y * 1, context), used, strict=True) if wanted]

    return function


def gated(module):
    """A gate of the context, a layer of which has parameters; its mean comes in too, as what else is made of it."""

    def function(x, weight, bias, layer):
        return module.context_gate(x, weight, bias, lambda context: (context @ layer + context.mean()).sigmoid())

    return function


def check_gate(x: Tensor, grad: Tensor | None = None) -> None:
    grad = random(*x.shape, seed=8, dtype=x.dtype) if grad is None else grad
    channels = x.shape[1]
    layer = random(channels, channels, seed=3, dtype=x.dtype, scale=channels**-0.5)
    assert_equivalent(gated(functional), gated(reference), {**inputs_of(x), "layer": layer}, [grad])


def check(x: Tensor, grad: Tensor | None = None, grad_map: Tensor | None = None, **options) -> None:
    """The context by itself, and with the map."""
    grad = random(*x.shape[:2], seed=9, dtype=x.dtype) if grad is None else grad
    grad_map = random(*x.shape, seed=8, dtype=x.dtype) if grad_map is None else grad_map
    inputs = inputs_of(x, **options)
    assert_equivalent(functional.context_pool, reference.context_pool, inputs, [grad])
    assert_equivalent(with_map(functional), with_map(reference), inputs, [grad_map, grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, dtype, layout):
    check(in_layout(random(*shape, dtype=dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:9], ids=str)
def test_gate(shape, dtype, layout):
    check_gate(in_layout(random(*shape, dtype=dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad"])
def test_strides_around_a_gate(of, strides, layout):
    x, grad = (in_layout(random(2, 12, 6, 7, seed=s), layout) for s in (0, 1))
    other = strided(random(2, 12, 6, 7, seed=3))[strides]
    if of == "grad":
        check_gate(x, other)
    elif strides != "expanded over space":  # of which the weight has no gradient
        check_gate(other, grad)


def test_a_gate_that_does_not_depend_on_the_context():
    x, weight = random(2, 6, 5, 4).requires_grad_(), random(1, 6).requires_grad_()
    gate = random(2, 6, seed=3).requires_grad_()
    y = functional.context_gate(x, weight, None, lambda _: gate)
    found = torch.autograd.grad(y.square().sum(), [x, gate, weight])
    expected = torch.autograd.grad((x * gate[..., None, None]).square().sum(), [x, gate])
    torch.testing.assert_close(found[:2], expected)
    assert not found[2].any()


def test_a_gate_of_a_frozen_map():
    """The excitation alone learns."""
    x, weight, layer = random(2, 6, 5, 4), random(1, 6), random(6, 6, seed=3).requires_grad_()
    grads = [
        torch.autograd.grad(gated(m)(x, weight, None, layer).square().sum(), layer)[0] for m in (functional, reference)
    ]
    torch.testing.assert_close(*grads)


def test_maps_around_a_gate():
    """Backward keeps x, once, and writes one map."""
    x, saved = random(2, 64, 28, 28).requires_grad_(), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.context_gate(x, random(1, 64), None, torch.sigmoid)
    assert sum(saved.values()) < 1.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_and_double_backward_through_a_gate(layout):
    inputs = inputs_of(in_layout(random(1, 3, 2, 3, dtype=torch.float64), layout))
    inputs["layer"] = random(3, 3, seed=3, dtype=torch.float64)
    gradcheck(gated(functional), inputs)
    gradcheck(gated(functional), inputs, twice=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_from_a_mean_to_one_position(scale, bias, layout):
    """Weights of which no position stands out, and of which one has all."""
    check(in_layout(random(2, 24, 31, 33), layout), bias=bias, scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ascending", [True, False])
def test_the_largest_logit_may_come_late(ascending, layout):
    """From logits that no exponential holds, up or down all the way."""
    positions = torch.linspace(-300, 300, 3000)
    x = random(2, 5, 3000)
    x[:, 0] = positions if ascending else positions.flip(0)
    inputs = {"x": in_layout(x, layout), "weight": torch.eye(5)[:1], "bias": torch.tensor([7.0])}
    assert_equivalent(functional.context_pool, reference.context_pool, inputs, [random(2, 5, seed=3)])


def test_a_large_bias_is_seen_by_none():
    x, weight = random(2, 8, 9, 9), random(1, 8, seed=1)
    with_bias, without = (functional.context_pool(x, weight, b) for b in (torch.tensor([500.0]), None))
    torch.testing.assert_close(with_bias, without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["map", "context"])
def test_map_or_context_alone(used):
    x = random(2, 6, 5, 4, dtype=torch.float64)
    grads = [random(*(x.shape if used[0] else x.shape[:2]), seed=1, dtype=torch.float64)]
    function, expected = (with_map(m, used) for m in (functional, reference))
    (found,), grads_found = run(function, inputs_of(x), grads)
    (eager,), eager_grads = run(expected, inputs_of(x), grads)
    torch.testing.assert_close(found, eager, rtol=1e-12, atol=1e-12)
    for key, grad in eager_grads.items():
        assert (grads_found[key] is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(grads_found[key], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    x, grad = (in_layout(random(*shape, seed=s), layout) for s in (0, 1))
    other = strided(random(*shape, seed=3))[strides]
    if of == "grad":
        check(x, grad_map=other)
    elif strides != "expanded over space":
        check(other, grad_map=grad)
    else:  # the weight has no gradient but rounding
        inputs = inputs_of(other)
        (found, grads), (eager, eager_grads) = (
            run(with_map(m), inputs, [grad, random(2, 12, seed=9)]) for m in (functional, reference)
        )
        torch.testing.assert_close([*found, *grads.values()], [*eager, *eager_grads.values()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_context_s_gradient(layout):
    x = in_layout(random(3, 12, 6, 7), layout)
    check(x, random(12, 3, seed=4).t())
    check(x, random(1, 1, seed=4).expand(3, 12))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_layouts_of_map_and_gradient(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y, context = functional.context_pool_with_map(x, random(1, 6)[:, : shape[1]])
    assert y.stride() == x.stride() and context.is_contiguous()
    assert torch.autograd.grad(context.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    x = random(*shape)
    inputs = {"x": x, "weight": random(1, shape[1], seed=1), "bias": random(1, seed=2)}
    assert_equivalent(functional.context_pool, reference.context_pool, inputs, [random(*shape[:2], seed=9)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, layout):
    """NaN, or a logit that is infinite, makes its sample NaN, as in eager; one of -infinity its channel."""
    x = random(2, 11, 9, 19)
    x[0, 3, 4, 5] = value
    inputs, grad = inputs_of(in_layout(x, layout)), [random(2, 11, seed=1)]
    (actual,), grads = run(functional.context_pool, inputs, grad)
    (eager,), eager_grads = run(reference.context_pool, inputs, grad)
    torch.testing.assert_close(actual, eager, equal_nan=True)
    for key in inputs:
        torch.testing.assert_close(grads[key], eager_grads[key], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert actual[0].isnan().any() and not actual[1].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_are_all_infinite(layout):
    """Of no position that counts eager makes NaN; where one counts, those of -infinity do not."""
    for value, places in ((-torch.inf, slice(None)), (-torch.inf, slice(0, 1500)), (torch.inf, slice(7, 9))):
        x = random(1, 4, 2000)
        x[:, 0, places] = value
        weight = torch.tensor([[1.0, 0.5, 0.5, 0.5]])
        y, eager = (m.context_pool(in_layout(x, layout), weight) for m in (functional, reference))
        torch.testing.assert_close(y, eager, equal_nan=True)


def test_sums_that_overflow_float16():
    x = random(2, 8, 12, 12, dtype=torch.float16).abs() * 500 + 60
    weight = torch.zeros(1, 8, dtype=torch.float16)
    expected = reference.context_pool(x.double(), weight.double())
    torch.testing.assert_close(functional.context_pool(x, weight).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 41, 43), (7, 24, 9, 40), (1, 1, 210, 200)], ids=str)
def test_threads(shape, layout, threads):
    """Whole samples a thread, and pieces."""
    torch.set_num_threads(threads)
    check(in_layout(random(*shape), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (5, 64, 14, 14)], ids=str)
def test_neither_runs_nor_threads_change_a_bit(shape, layout):
    inputs, grads = inputs_of(in_layout(random(*shape), layout)), [random(*shape, seed=1), random(*shape[:2], seed=2)]
    results = []
    for threads in (3, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(with_map(functional), inputs, grads))
    for (_, context), found in results[1:]:
        assert torch.equal(context, results[0][0][1])
        assert all(torch.equal(found[key], results[0][1][key]) for key in inputs)


@given(
    rank=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([0.1, 5.0]),
)
@settings(max_examples=60)
def test_any_shape(rank, sizes, batch, channels, layout, scale):
    check(in_layout(random(batch, channels, *sizes[:rank]), layout), scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 3, 2), (1, 2, 2, 1, 3)], ids=str)
def test_gradcheck_and_double_backward(shape, layout):
    inputs = inputs_of(in_layout(random(*shape, dtype=torch.float64), layout))
    for function in (functional.context_pool, lambda **t: tuple(with_map(functional)(**t))):
        gradcheck(function, inputs)
        gradcheck(function, inputs, twice=True)


def test_saved_bytes():
    """Backward keeps x, the weight, a number a position and (B, C)."""
    x = random(2, 128, 28, 28).requires_grad_()
    weight, saved = random(1, 128, seed=1), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.context_pool_with_map(x, weight)
    assert sum(saved.values()) == x.untyped_storage().nbytes() + 4 * (128 + 2 * 28 * 28 + 2 * 128)


def test_opcheck():
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    x = random(2, 8, 5, 6)
    backend = choose("context_pool", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    for values in (x, *map(strided(x).get, CHECKED)):
        inputs = tuple(inputs_of(values).values())
        torch.library.opcheck(FORWARD[backend], inputs)
        context, mean, shares = FORWARD[backend](*inputs)
        torch.library.opcheck(BACKWARD[backend], (x, mean, context, *inputs, mean, shares))
        torch.library.opcheck(BACKWARD[backend], (None, None, context, *inputs[:2], None, mean, shares))


@pytest.mark.slow  # a compilation
def test_compiles_in_one_graph():
    def function(x, weight):
        y, context = functional.context_pool_with_map(x, weight)
        return functional.scale(y, context.sigmoid())

    compiled, weight = torch.compile(function, fullgraph=True, dynamic=True), random(1, 6)
    for shape in ((2, 6, 5, 7), (3, 6, 8, 9)):
        x = random(*shape).requires_grad_()
        torch.testing.assert_close(compiled(x, weight), function(x, weight))
        torch.testing.assert_close(
            *(torch.autograd.grad(f(x, weight).square().sum(), x) for f in (compiled, function)), rtol=1e-4, atol=1e-5
        )


def test_what_needs_no_gradient_saves_nothing():
    x, weight = random(2, 3, 4, 4), random(1, 3)
    assert functional.context_pool(x, weight).grad_fn is None
    with torch.no_grad():
        assert functional.context_pool(x.requires_grad_(), weight).grad_fn is None


def test_a_map_that_needs_no_gradient_gets_none():
    x, weight = random(2, 3, 4, 4), random(1, 3).requires_grad_()
    y, context = functional.context_pool_with_map(x, weight)
    assert not y.requires_grad
    (grad,) = torch.autograd.grad(context.square().sum(), weight)
    (expected,) = torch.autograd.grad(reference.context_pool(x, weight).square().sum(), weight)
    torch.testing.assert_close(grad, expected)


def test_parameters_in_float32_under_autocast():
    x = random(2, 16, 6, 5, dtype=torch.bfloat16)
    inputs = inputs_of(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.context_pool(x, inputs["weight"], inputs["bias"])
    assert y.dtype == torch.bfloat16
    expected = reference.context_pool(*(v.double() for v in inputs.values() if v is not None))
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


ERRORS = {
    "weight: expected shape (1, 2); got (2, 1)": lambda x: functional.context_pool(x, random(2, 1)),
    "weight: expected shape (1, 2); got (1, 2, 3)": lambda x: functional.context_pool(x, random(1, 2, 3)),
    "bias: expected shape (1,); got (2,)": lambda x: functional.context_pool(x, random(1, 2), random(2)),
    "weight: expected a tensor; got NoneType": lambda x: functional.context_pool(x, None),
    "weight: expected x's dtype, torch.float32 (or autocast); got torch.float64": lambda x: functional.context_pool(
        x, random(1, 2, dtype=torch.float64)
    ),
    "excitation: expected it to return (1, 2); got (1, 3)": lambda x: functional.context_gate(
        x, random(1, 2), None, lambda _: random(1, 3)
    ),
    "excitation: expected a tensor; got int": lambda x: functional.context_gate(x, random(1, 2), None, lambda _: 1),
    "x: expected (B, C, *spatial) with one to three spatial axes; got shape (3, 4)": lambda x: functional.context_pool(
        random(3, 4), random(1, 4)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError)) as caught:
        ERRORS[message](random(1, 2, 3, 3))
    assert str(caught.value) == message
