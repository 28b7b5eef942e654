"""spatial_gate against its reference: forward and every gradient, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.codes import ACTIVATIONS
from tests.checks import LAYOUTS, assert_equivalent, gradcheck, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ORDERS = (("max", "mean"), ("mean", "max"))
SHAPES = (
    (2, 16, 7, 7),
    (3, 8, 1, 1),
    (1, 40, 13, 17),
    (2, 1, 9, 5),
    (4, 24, 33),
    (1, 12, 3, 4, 5),
    (1, 72, 40, 41),
    (1, 300, 3, 50),
    (1, 3, 35, 60),
)


def convolution(shape: tuple[int, ...], dtype: torch.dtype, kernel=(3, 5, 7), bias: bool = True) -> dict:
    """weight and bias for maps of this shape; a kernel of another size along every axis."""
    weight = random(1, 2, *kernel[: len(shape) - 2], seed=1, dtype=dtype, scale=0.5)
    return {"weight": weight, "bias": random(1, seed=2, dtype=dtype)} if bias else {"weight": weight}


def batch_norm(dtype: torch.dtype) -> dict:
    return {"norm_weight": random(1, seed=7, dtype=dtype), "norm_bias": random(1, seed=8, dtype=dtype)}


def affine(channels: int, dtype: torch.dtype) -> dict:
    return {
        "affine_weight": random(channels, seed=3, dtype=dtype),
        "affine_bias": random(channels, seed=4, dtype=dtype),
    }


def apply(module, options):
    """module.spatial_gate with the affine's two tensors as inputs of their own."""

    def function(x, affine_weight=None, affine_bias=None, norm_weight=None, norm_bias=None, **tensors):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        if norm_weight is None:
            return module.spatial_gate(x, affine=affine, **tensors, **options)
        return module.spatial_gate(x, affine=affine, batch_norm=(norm_weight, norm_bias, 1e-5), **tensors, **options)[0]

    return function


def check(x: Tensor, tensors: dict, options: dict, grad: Tensor | None = None) -> None:
    grad = random(*x.shape, seed=9, dtype=x.dtype) if grad is None else grad
    assert_equivalent(apply(functional, options), apply(reference, options), {"x": x, **tensors}, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, order, dtype, layout):
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(x, convolution(shape, dtype), {"order": order})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 12, 40, 41), (3, 9, 1, 1), (2, 37, 2, 3)], ids=str)
def test_ties(shape, dtype, ties, layout):
    x = in_layout(random(*shape, dtype=dtype).mul(2).round().clamp(-2, 2), layout)  # a few values: many ties
    check(x, convolution(shape, dtype), {"ties": ties})


@pytest.mark.parametrize("ties", ["first", "even"])
def test_the_gradient_of_a_maximum_goes_where_it_is_said(ties):
    """All channels equal: "first" sends everything to channel 0, "even" the same to each."""
    x = torch.zeros(1, 4, 2, 3, dtype=torch.float64).requires_grad_()
    weight = torch.tensor([[[[1.0]], [[0.0]]]], dtype=torch.float64)  # the maximum alone
    y = functional.spatial_gate(x + 1, weight, ties=ties, gate="identity")  # y = x * max
    grad = torch.autograd.grad(y.sum(), x)[0]
    expected = {"first": [5.0, 1.0, 1.0, 1.0], "even": [2.0] * 4}[ties]
    assert grad[0, :, 0, 0].tolist() == expected
    assert torch.equal(grad, grad[..., :1, :1].expand_as(grad))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (3, 8, 1, 1)], ids=str)
def test_batch_norm(shape, dtype, layout):
    """Not (3, 8, 1, 1): BatchNorm over three numbers turns their rounding into its output."""
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(x, convolution(shape, dtype) | batch_norm(dtype), {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_batch_norm_with_prologue_epilogue_and_ties(post, layout):
    shape, dtype = (3, 12, 9, 11), torch.float64
    tensors = convolution(shape, dtype) | batch_norm(dtype) | affine(12, dtype) | {"residual": random(*shape, seed=5)}
    tensors["residual"] = tensors["residual"].to(dtype)
    x = in_layout(random(*shape, dtype=dtype).mul(2).round(), layout)
    for ties in ("first", "even"):
        check(x, tensors, {"ties": ties, "pre_activation": "silu", "post_activation": post})


def test_statistics_of_the_batch():
    """As BatchNorm computes them, also where the mean is a thousand times the deviation; none without it."""
    shape = (4, 6, 13, 17)
    x, tensors = random(*shape), convolution(shape, torch.float32)
    tensors["bias"] += 1000
    norm = (torch.ones(1), torch.zeros(1), 1e-5)
    y, mean, variance = functional.spatial_gate(x, **tensors, batch_norm=norm)
    _, *expected = reference.spatial_gate(
        x.double(), **{n: t.double() for n, t in tensors.items()}, batch_norm=(norm[0].double(), norm[1].double(), 1e-5)
    )
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected[1], rtol=1e-4, atol=0)
    assert not (mean.requires_grad or variance.requires_grad) and y.shape == x.shape
    with pytest.raises(ValueError, match="more than one position for statistics"):
        functional.spatial_gate(torch.ones(1, 3, 1, 1), torch.ones(1, 2, 1, 1), batch_norm=norm)
    empty = functional.spatial_gate(torch.empty(0, 6, 5, 5), **tensors, batch_norm=norm)
    assert empty[0].shape == (0, 6, 5, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_prologue(pre, ties, layout):
    """float32: in half precision eager and float64 disagree on which of two near-equal values is the maximum."""
    shape, dtype = (3, 20, 13, 17), torch.float32
    tensors = convolution(shape, dtype) | affine(20, dtype)
    check(in_layout(random(*shape), layout), tensors, {"ties": ties, "pre_activation": pre})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ACTIVATIONS)
def test_epilogue(post, layout, residual_layout, dtype):
    shape = (2, 20, 9, 11)
    tensors = convolution(shape, dtype)
    tensors["residual"] = in_layout(random(*shape, seed=5, dtype=dtype), residual_layout)
    check(in_layout(random(*shape, dtype=dtype), layout), tensors, {"post_activation": post})


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (1, 64, 40, 40), (1, 32, 1100), (1, 20, 6, 10, 31)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prologue_and_epilogue_together(layout, shape, post):
    """The larger shapes are cut into pieces of space among threads."""
    tensors = convolution(shape, torch.float32) | affine(shape[1], torch.float32)
    tensors["residual"] = random(*shape, seed=5)
    check(in_layout(random(*shape), layout), tensors, {"pre_activation": "relu", "post_activation": post})


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_gates(gate):
    check(random(2, 24, 5, 6), convolution((2, 24, 5, 6), torch.float32), {"gate": gate})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (7, 7), (7, 1), (1, 9), (13, 11)], ids=str)
def test_kernels(kernel, bias, layout):
    """Also longer than the map."""
    shape = (2, 6, 5, 4)
    check(in_layout(random(*shape), layout), convolution(shape, torch.float32, kernel, bias), {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad", "residual"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    x, grad, residual = (in_layout(random(*shape, seed=s), layout) for s in (0, 1, 2))
    other = strided(random(*shape, seed=3))[strides]
    x, grad, residual = (other if of == name else t for name, t in (("x", x), ("grad", grad), ("residual", residual)))
    tensors = convolution(shape, torch.float32) | {"residual": residual}
    check(x, tensors, {"post_activation": "relu"}, grad)


def test_gradient_of_a_sum():
    x = random(2, 12, 6, 7)
    check(x, convolution(x.shape, x.dtype), {}, strided(x)["expanded scalar"])


@pytest.mark.parametrize("strides", ["transposed", "sliced"])
def test_a_weight_of_any_strides(strides):
    x = random(2, 6, 5, 4)
    weight = random(1, 2, 5, 3, seed=1)
    weight = weight.transpose(2, 3) if strides == "transposed" else random(1, 2, 5, 6, seed=1)[..., ::2]
    check(x, {"weight": weight}, {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradient_keep_the_layout(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y = functional.spatial_gate(x, **convolution(shape, torch.float32))
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (0, 2, 1, 2, 3)], ids=str)
def test_empty(shape):
    check(random(*shape), convolution(shape, torch.float32), {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(special, ties, layout):
    """In one channel of one position, and in two: the same places are NaN or infinite as in eager."""
    x = random(2, 11, 9, 19)
    x[0, 3, 4, 5] = x[1, 2, 0, 0] = x[1, 9, 0, 0] = special
    tensors = convolution(x.shape, x.dtype)
    grad = [random(*x.shape, seed=1)]
    (actual,), grads = run(apply(functional, {"ties": ties}), {"x": in_layout(x, layout), **tensors}, grad)
    (eager,), eager_grads = run(apply(reference, {"ties": ties}), {"x": in_layout(x, layout), **tensors}, grad)
    assert not actual.isfinite().all() and actual.isfinite().any()
    torch.testing.assert_close(actual, eager, equal_nan=True)
    torch.testing.assert_close(grads["x"], eager_grads["x"], equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_channel_of_minus_infinity_everywhere(layout):
    x = in_layout(torch.full((1, 5, 3, 40), -float("inf")), layout)
    weight = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    torch.testing.assert_close(functional.spatial_gate(x, weight), reference.spatial_gate(x, weight), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_mean_does_not_overflow(layout):
    x = in_layout(torch.full((1, 4096, 3, 4), 60.0, dtype=torch.float16), layout)
    weight = torch.tensor([0.0, 1.0], dtype=torch.float16).reshape(1, 2, 1, 1)
    assert functional.spatial_gate(x, weight, gate="identity").eq(3600).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_mean_does_not_cancel(layout):
    x = in_layout(random(1, 1024, 6, 7) + 1000, layout)
    weight = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1)
    y = functional.spatial_gate(x, weight, gate="identity")
    torch.testing.assert_close(y.double(), x.double() * x.double().mean(1, keepdim=True), rtol=5e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (1, 64, 56, 56)], ids=str)
def test_two_runs_agree_to_the_bit(shape, layout):
    inputs = {"x": in_layout(random(*shape), layout), **convolution(shape, torch.float32), **affine(64, torch.float32)}
    grad = [random(*shape, seed=1)]
    first, second = (run(apply(functional, {}), inputs, grad) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (5, 64, 14, 14)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, layout):
    inputs = {"x": in_layout(random(*shape), layout), **convolution(shape, torch.float32), **affine(64, torch.float32)}
    grad, results = [random(*shape, seed=1)], []
    for count in (3, 4):
        torch.set_num_threads(count)
        results.append(run(apply(functional, {"ties": "even"}), inputs, grad))
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in inputs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 41, 43), (7, 24, 9, 40)], ids=str)
def test_threads(shape, layout, threads):
    """Whole samples a thread, and pieces of space."""
    tensors = convolution(shape, torch.float32) | affine(24, torch.float32)
    torch.set_num_threads(threads)
    check(in_layout(random(*shape), layout), tensors, {"ties": "even", "post_activation": "relu"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gradcheck(order, spatial, layout):
    shape = (2, 6, *spatial)
    tensors = convolution(shape, torch.float64) | affine(6, torch.float64)
    tensors["residual"] = random(*shape, seed=5, dtype=torch.float64)
    options = {"order": order, "pre_activation": "silu", "post_activation": "gelu"}
    inputs = {"x": in_layout(random(*shape, dtype=torch.float64), layout), **tensors}
    gradcheck(apply(functional, options), inputs)


@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_double_backward(post, with_residual):
    shape = (2, 4, 3, 3)
    tensors = convolution(shape, torch.float64)
    if with_residual:
        tensors["residual"] = random(*shape, seed=5, dtype=torch.float64) + 3
    inputs = {"x": random(*shape, dtype=torch.float64), **tensors}
    gradcheck(apply(functional, {"post_activation": post}), inputs, twice=True)


def test_torch_func_runs_the_reference():
    x = random(3, 2, 6, 4, 4, dtype=torch.float64)
    tensors = convolution((2, 6, 4, 4), torch.float64)
    function = apply(functional, {})
    batched = torch.func.vmap(lambda x: function(x, **tensors))(x)
    torch.testing.assert_close(batched, torch.stack([function(s, **tensors) for s in x]))
    grad = torch.func.grad(lambda x: function(x, **tensors).sum())(x[0])
    torch.testing.assert_close(grad, run(function, {"x": x[0], **tensors}, [torch.ones_like(x[0])])[1]["x"])


@pytest.mark.parametrize("options", [{}, {"ties": "even"}, {"post_activation": "relu"}], ids=str)
def test_saved_bytes(options):
    """Backward keeps x, y where a ReLU follows, and four numbers a position: never a second map."""
    x = random(2, 128, 28, 28).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.spatial_gate(x, **convolution(x.shape, x.dtype), **options)
    maps = 2 if options.get("post_activation") == "relu" else 1
    assert sum(saved.values()) <= (maps + 4 / 128) * x.untyped_storage().nbytes() + 1024


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_needs_no_gradient(frozen):
    x = random(2, 8, 5, 5).requires_grad_(frozen != "x")
    tensors = {k: v.requires_grad_(frozen == "x") for k, v in convolution(x.shape, x.dtype).items()}
    functional.spatial_gate(x, **tensors).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert all((t.grad is None) == (frozen == "weights") for t in tensors.values())


def test_autocast_keeps_the_dtype_of_x():
    x = random(2, 8, 5, 5)
    tensors = convolution(x.shape, x.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        half = functional.spatial_gate(x.bfloat16(), **tensors)
        full = functional.spatial_gate(x, **tensors)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    expected = reference.spatial_gate(x, **tensors)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_under_autocast_have_gradients_of_their_own_dtype():
    x = random(2, 8, 5, 5, dtype=torch.bfloat16).requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in convolution(x.shape, torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        functional.spatial_gate(x, **leaves).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    kernel=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=3, max_size=3),
    order=st.sampled_from(ORDERS),
    ties=st.sampled_from(["first", "even"]),
    levels=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    with_affine=st.booleans(),
    residual=st.booleans(),
    pre=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    post=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_option(
    shape, kernel, order, ties, levels, layout, grad_layout, with_affine, residual, pre, post, seed
):
    batch, channels, spatial = shape
    full = (batch, channels, *spatial)
    tensors = convolution(full, torch.float64, kernel)
    if with_affine:
        tensors |= affine(channels, torch.float64)
    if residual:
        tensors["residual"] = random(*full, seed=5, dtype=torch.float64)
    x = random(*full, seed=seed, dtype=torch.float64)
    # Few values are many ties; an affine rounds them apart, in eager another way than here.
    x = x if levels is None or with_affine else x.mul(levels).round()
    grad = in_layout(random(*full, seed=seed + 1, dtype=torch.float64), grad_layout)
    options = {"order": order, "ties": ties, "pre_activation": pre, "post_activation": post}
    check(in_layout(x, layout), tensors, options, grad)


@pytest.mark.parametrize(
    "order, options", [(0, {}), (1, {"ties": "even", "post_activation": "relu"}), (1, {"batch_norm": True})]
)
def test_opcheck(order, options):
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    from fused_attn.backends import choose
    from fused_attn.codes import TIES
    from fused_attn.ops.spatial_gate import BACKWARD, FORWARD

    x = random(2, 8, 5, 6)
    backend = choose("spatial_gate", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    weight, bias = convolution(x.shape, x.dtype).values()
    post = ACTIVATIONS[options.get("post_activation", "identity")]
    norm = (torch.ones(1), torch.zeros(1)) if options.get("batch_norm") else (None, None)
    codes = (1e-5, order, TIES[options.get("ties", "first")], ACTIVATIONS["sigmoid"], 0, post)
    for values in (x, *map(strided(x).get, CHECKED)):
        arguments = (weight, bias, *norm, None, None, None, *codes)
        torch.library.opcheck(FORWARD[backend], (values, *arguments))
        y, *states = FORWARD[backend](values, *arguments)
        torch.library.opcheck(BACKWARD[backend], (x, values, y if post else None, *states, *arguments))
