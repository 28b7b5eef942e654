"""simam against its reference: forward and gradient, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.ops.simam import BACKWARD, FORWARD
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((2, 16, 7, 7), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5), (1, 72, 40, 41), (3, 300, 2, 1)),
    *((1, 1, 1, 2), (2, 9, 70, 70)),
)


def check(x: Tensor, grad: Tensor | None = None, **options) -> None:
    grad = random(*x.shape, seed=9, dtype=x.dtype) if grad is None else grad
    assert_equivalent(
        lambda x: functional.simam(x, **options), lambda x: reference.simam(x, **options), {"x": x}, [grad]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, dtype, layout):
    check(in_layout(random(*shape, dtype=dtype), layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("e_lambda", [0, 1e-4, 0.3, 100.0])
def test_e_lambda(e_lambda, layout):
    check(in_layout(random(2, 8, 6, 5), layout), e_lambda=e_lambda)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 31, 33), (1, 33, 64, 64), (2, 3, 300)], ids=str)
def test_a_large_mean_costs_no_digits(shape, layout):
    """Numbers near 4096 that float32 holds exactly: the mean of the squares has none of their variance's digits."""
    noise = random(*shape, dtype=torch.float64).mul(64).round().div(64)
    x = in_layout((noise + 4096).float(), layout)
    y, exact = functional.simam(x), reference.simam(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=0)
    check(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_position_far_from_all_others(layout):
    """The first, the one on which a variance taken about the first value would lose its digits."""
    x = random(2, 20, 30, 31)
    x[:, :, 0, 0] = 3e4
    check(in_layout(x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_channel(dtype, layout):
    x = random(2, 6, 5, 7, dtype=dtype)
    x[:, ::2] = 0.75
    check(in_layout(x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    x, grad = (in_layout(random(*shape, seed=s), layout) for s in (0, 1))
    other = strided(random(*shape, seed=3))[strides]
    check(other, grad) if of == "x" else check(x, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradient_keep_the_layout(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y = functional.simam(x)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape):
    check(random(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (1, 1, 1), (2, 3, 1, 1, 1)], ids=str)
def test_one_position_is_nan_as_in_the_original(shape, dtype):
    x = random(*shape, dtype=dtype).requires_grad_()
    y = functional.simam(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().all() and grad.isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value, layout):
    """Either makes its channel NaN, as in eager, and no other."""
    x = random(2, 11, 9, 19)
    x[0, 3, 4, 5] = value
    inputs, grad = {"x": in_layout(x, layout)}, [random(*x.shape, seed=1)]
    (actual,), grads = run(functional.simam, inputs, grad)
    (eager,), eager_grads = run(reference.simam, inputs, grad)
    torch.testing.assert_close(actual, eager, equal_nan=True)
    torch.testing.assert_close(grads["x"], eager_grads["x"], equal_nan=True)
    assert actual[0, 3].isnan().all() and actual.isnan().sum() == grads["x"].isnan().sum() == 9 * 19


def test_values_whose_squares_overflow_float16():
    x = random(2, 8, 12, 12, dtype=torch.float16, scale=3000)
    expected = reference.simam(x.double())
    torch.testing.assert_close(functional.simam(x).double(), expected, rtol=1e-3, atol=0)


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
    inputs, grad = {"x": in_layout(random(*shape), layout)}, [random(*shape, seed=1)]
    results = []
    for threads in (3, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(functional.simam, inputs, grad))
    for (y,), grads in results[1:]:
        assert torch.equal(y, results[0][0][0]) and torch.equal(grads["x"], results[0][1]["x"])


@given(
    rank=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    batch=st.integers(1, 3),
    channels=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    shift=st.sampled_from([0.0, 100.0]),
)
@settings(max_examples=60)
def test_any_shape(rank, sizes, batch, channels, layout, shift):
    shape = (batch, channels, *sizes[:rank])
    if torch.Size(shape[2:]).numel() > 1:
        check(in_layout(random(*shape) + shift, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 3, 2), (1, 2, 2, 1, 3)], ids=str)
def test_gradcheck_and_double_backward(shape, layout):
    x = in_layout(random(*shape, dtype=torch.float64), layout).requires_grad_()
    assert torch.autograd.gradcheck(functional.simam, x)
    assert torch.autograd.gradgradcheck(functional.simam, x)


def test_saved_bytes():
    """Backward keeps x and three numbers a channel."""
    shape = (2, 128, 28, 28)
    x = random(*shape).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.simam(x)
    assert sum(saved.values()) == x.untyped_storage().nbytes() + 2 * 4 * 3 * 128


def test_opcheck():
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    x = random(2, 8, 5, 6)
    backend = choose("simam", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    for values in (x, *map(strided(x).get, CHECKED)):
        torch.library.opcheck(FORWARD[backend], (values, 1e-4))
        _, state = FORWARD[backend](values, 1e-4)
        torch.library.opcheck(BACKWARD[backend], (x, values, state))


@pytest.mark.slow  # a compilation
def test_compiles_in_one_graph():
    compiled = torch.compile(functional.simam, fullgraph=True, dynamic=True)
    for shape in ((2, 6, 5, 7), (3, 6, 8, 9)):
        x = random(*shape).requires_grad_()
        torch.testing.assert_close(compiled(x), functional.simam(x))
        torch.testing.assert_close(
            *(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, functional.simam)), rtol=1e-4, atol=1e-5
        )


def test_what_needs_no_gradient_saves_nothing():
    assert functional.simam(random(2, 3, 4, 4)).grad_fn is None
    with torch.no_grad():
        assert functional.simam(random(2, 3, 4, 4).requires_grad_()).grad_fn is None


ERRORS = {
    "e_lambda: expected a finite number of at least 0; got nan": lambda: functional.simam(
        random(1, 2, 3, 3), e_lambda=float("nan")
    ),
    "e_lambda: expected a finite number of at least 0; got -1": lambda: functional.simam(
        random(1, 2, 3, 3), e_lambda=-1
    ),
    "x: expected (B, C, *spatial) with one to three spatial axes; got shape (3, 4)": lambda: functional.simam(
        random(3, 4)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
