"""squeeze, channel_pool and scale against their references, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn import functional, reference
from fused_attn.codes import ACTIVATIONS
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 16, 7, 7), (3, 8, 1, 1), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5), (1, 72, 40, 41))


def squeeze(module, **options):
    def function(x, affine_weight=None, affine_bias=None):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return module.squeeze(x, affine=affine, **options)

    return function


def scale(module, **options):
    def function(x, gate, affine_weight=None, affine_bias=None, residual=None):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return module.scale(x, gate, affine=affine, residual=residual, **options)

    return function


def channel_pool(module, **options):
    def function(x, affine_weight=None, affine_bias=None):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return module.channel_pool(x, affine=affine, **options)

    return function


def affine(channels: int, dtype: torch.dtype) -> dict:
    return {
        "affine_weight": random(channels, seed=3, dtype=dtype),
        "affine_bias": random(channels, seed=4, dtype=dtype),
    }


def check_squeeze(x, tensors, **options):
    grads = [random(*x.shape[:2], seed=i, dtype=x.dtype) for i in range(2 if options.get("pool") == "avgmax" else 1)]
    assert_equivalent(squeeze(functional, **options), squeeze(reference, **options), {"x": x, **tensors}, grads)


def check_channel_pool(x, tensors, **options):
    grads = [random(x.shape[0], 2, *x.shape[2:], seed=1, dtype=x.dtype)]
    assert_equivalent(
        channel_pool(functional, **options), channel_pool(reference, **options), {"x": x, **tensors}, grads
    )


def check_scale(x, tensors, of_space=False, **options):
    grads = [random(*x.shape, seed=1, dtype=x.dtype)]
    gate = (x.shape[0], 1, *x.shape[2:]) if of_space else x.shape[:2]
    tensors = {"gate": random(*gate, seed=2, dtype=x.dtype), **tensors}
    assert_equivalent(scale(functional, **options), scale(reference, **options), {"x": x, **tensors}, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squeeze(shape, dtype, ties, pool, layout):
    x = random(*shape, dtype=dtype).mul(4).round().div(4)
    check_squeeze(in_layout(x, layout), {}, pool=pool, ties=ties)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_squeeze_after_a_prologue(pre, ties, layout):
    x = in_layout(random(3, 20, 13, 17), layout)
    check_squeeze(x, affine(20, x.dtype), pool="avgmax", ties=ties, pre_activation=pre)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (2, 3, 90, 70)], ids=str)
def test_squeeze_in_pieces(shape, ties, layout):
    """One sample among several threads; equal maxima lie in different pieces."""
    x = in_layout(random(*shape), layout)
    check_squeeze(x.mul(2).round().clamp(-2, 2), {}, pool="avgmax", ties=ties)
    check_squeeze(x, affine(shape[1], x.dtype), pool="avgmax", ties=ties, pre_activation="silu")


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 24, 41, 43)], ids=str)
def test_squeeze_of_special_values(shape, value, pool, ties, layout):
    """First, last and twice in a channel, and nothing else in one; the larger shape is cut among threads."""
    x = random(*shape)
    x[-1, 0, 0, 0] = x[-1, 1, -1, -1] = x[-1, 2, 1, 3] = x[-1, 2, -1, 4] = value
    x[-1, 3] = value
    inputs, options = {"x": in_layout(x, layout)}, {"pool": pool, "ties": ties}
    grads = [random(*shape[:2], seed=i) for i in range(2 if pool == "avgmax" else 1)]
    found, found_grads = run(squeeze(functional, **options), inputs, grads)
    eager, eager_grads = run(squeeze(reference, **options), inputs, grads)
    for ours, theirs in zip((*found, found_grads["x"]), (*eager, eager_grads["x"]), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_only_one_of_two_descriptors_is_used(pool):
    x = random(2, 8, 5, 5).requires_grad_()
    out = functional.squeeze(x, "avgmax")[0 if pool == "avgmax" else 1]
    expected = reference.squeeze(x, "avgmax")[0 if pool == "avgmax" else 1]
    grad = random(2, 8, seed=1)
    torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [("max", "mean"), ("mean", "max")], ids=str)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_pool(shape, dtype, ties, order, layout):
    x = random(*shape, dtype=dtype).mul(4).round().div(4)
    check_channel_pool(in_layout(x, layout), {}, order=order, ties=ties)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_channel_pool_after_a_prologue(pre, ties, layout):
    x = in_layout(random(1, 20, 33, 17), layout)
    check_channel_pool(x, affine(20, x.dtype), ties=ties, pre_activation=pre)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_channel_pool_in_pieces(ties, layout):
    x = in_layout(random(1, 24, 41, 43), layout)
    check_channel_pool(x.mul(2).round().clamp(-2, 2), {}, ties=ties)
    check_channel_pool(x, affine(24, x.dtype), ties=ties, pre_activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
def test_channel_pool_of_any_strides(strides, layout):
    """Of the map, and of the gradient."""
    x, grad = in_layout(random(2, 5, 6, 7), layout), strided(random(2, 2, 6, 7, seed=1))[strides]
    assert_equivalent(channel_pool(functional), channel_pool(reference), {"x": x}, [grad])
    check_channel_pool(strided(random(2, 5, 6, 7))[strides], {})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_channel_pool_of_nan(ties, layout):
    x = random(2, 5, 6, 40)
    x[0, 3, 2, 2] = x[1, 0, 5, 39] = x[1, 4, 5, 39] = float("nan")
    grad = [random(2, 2, 6, 40, seed=1)]
    (found,), grads = run(channel_pool(functional, ties=ties), {"x": in_layout(x, layout)}, grad)
    (eager,), eager_grads = run(channel_pool(reference, ties=ties), {"x": in_layout(x, layout)}, grad)
    torch.testing.assert_close(found, eager, equal_nan=True)
    torch.testing.assert_close(grads["x"], eager_grads["x"], equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_space", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale(shape, of_space, dtype, layout):
    check_scale(in_layout(random(*shape, dtype=dtype), layout), {}, of_space)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("of_space", [False, True])
@pytest.mark.parametrize("post", ACTIVATIONS)
@pytest.mark.parametrize("pre", ["identity", "relu", "silu", "hard_swish", "gelu"])
def test_scale_with_prologue_and_epilogue(pre, post, of_space, residual, layout):
    x = in_layout(random(2, 20, 9, 11), layout)
    tensors = affine(20, x.dtype)
    if residual:
        tensors["residual"] = random(*x.shape, seed=5)
    check_scale(x, tensors, of_space, pre_activation=pre, post_activation=post)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_scale_in_pieces(post, layout):
    """One sample among several threads, with a gate a channel."""
    x = in_layout(random(1, 24, 41, 43), layout)
    tensors = affine(24, x.dtype) | {"residual": random(*x.shape, seed=5)}
    check_scale(x, tensors, pre_activation="relu", post_activation=post)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_by_position_in_pieces(layout):
    """One sample among several threads, with a gate of other strides."""
    x = in_layout(random(1, 24, 61, 40), layout)
    gate = random(1, 1, 40, 61, seed=2).transpose(2, 3)
    tensors = {"gate": gate, **affine(24, x.dtype), "residual": random(*x.shape, seed=5)}
    options = {"post_activation": "silu", "pre_activation": "relu"}
    grad = [random(*x.shape, seed=1)]
    assert_equivalent(scale(functional, **options), scale(reference, **options), {"x": x, **tensors}, grad)


def test_gate_in_its_own_dtype_and_shape():
    x = random(2, 6, 5, 5, dtype=torch.bfloat16).requires_grad_()
    gate = random(2, 6, 1, 1).requires_grad_()
    y = functional.scale(x, gate)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and gate.grad.dtype == torch.float32 and gate.grad.shape == gate.shape
    torch.testing.assert_close(gate.grad.flatten(), x.detach().float().sum((2, 3)).flatten())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    x = in_layout(random(2, 4, 3, 3, dtype=torch.float64), layout).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(4, torch.float64).values())
    gate = random(2, 4, seed=2, dtype=torch.float64).requires_grad_()
    residual = random(2, 4, 3, 3, seed=5, dtype=torch.float64).requires_grad_()

    def scaled(x, gate, weight, bias, residual):
        return functional.scale(
            x, gate, affine=(weight, bias), pre_activation="silu", residual=residual, post_activation="gelu"
        )

    def squeezed(x, weight, bias):
        return functional.squeeze(x, "avgmax", affine=(weight, bias), pre_activation="silu")

    position = random(2, 1, 3, 3, seed=6, dtype=torch.float64).requires_grad_()

    def pooled(x, weight, bias):
        return functional.channel_pool(x, affine=(weight, bias), pre_activation="silu")

    assert torch.autograd.gradcheck(scaled, (x, position, weight, bias, residual))
    assert torch.autograd.gradgradcheck(scaled, (x, position, weight, bias, residual))
    assert torch.autograd.gradcheck(pooled, (x, weight, bias))
    assert torch.autograd.gradgradcheck(pooled, (x, weight, bias))
    assert torch.autograd.gradcheck(scaled, (x, gate, weight, bias, residual))
    assert torch.autograd.gradgradcheck(scaled, (x, gate, weight, bias, residual))
    assert torch.autograd.gradcheck(squeezed, (x, weight, bias))
    assert torch.autograd.gradgradcheck(squeezed, (x, weight, bias))
    assert torch.autograd.gradgradcheck(functional.squeeze, (x,))


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    pool=st.sampled_from(["avg", "max", "avgmax"]),
    ties=st.sampled_from(["first", "even"]),
    layout=st.sampled_from(LAYOUTS),
    levels=st.integers(1, 4),
)
def test_any_shape(shape, pool, ties, layout, levels):
    batch, channels, spatial = shape
    x = random(batch, channels, *spatial, dtype=torch.float64).mul(levels).round()
    check_squeeze(in_layout(x, layout), {}, pool=pool, ties=ties)
    check_channel_pool(in_layout(x, layout), {}, ties=ties)
    check_scale(in_layout(x, layout), {"residual": x + 1})
    check_scale(in_layout(x, layout), {"residual": x + 1}, of_space=True)


@pytest.mark.parametrize("op", ["squeeze", "channel_pool", "scale", "scale/space"])
def test_opcheck(op):
    from fused_attn.backends import choose

    x = random(2, 8, 5, 6)
    backend = choose(op, x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    for values in (x, *map(strided(x).get, CHECKED)):
        if op == "squeeze":
            from fused_attn.ops.squeeze import BACKWARD, FORWARD

            torch.library.opcheck(FORWARD[backend], (values, None, None, 0, 2, 1))
            avg, peak, index = FORWARD[backend](values, None, None, 0, 2, 1)
            torch.library.opcheck(BACKWARD[backend], (avg, peak, values, peak, index, None, None, 0, 2, 1))
        elif op == "channel_pool":
            from fused_attn.ops.channel_pool import BACKWARD, FORWARD

            torch.library.opcheck(FORWARD[backend], (values, None, None, 0, 1, 1))
            pooled, index = FORWARD[backend](values, None, None, 0, 1, 1)
            torch.library.opcheck(BACKWARD[backend], (pooled, values, pooled, index, None, None, 0, 1, 1))
        else:
            from fused_attn.ops.scale import BACKWARD, FORWARD

            gate = random(2, 1, 5, 6) if op == "scale/space" else random(2, 8)
            torch.library.opcheck(FORWARD[backend], (values, gate, None, None, x, 0, 1))
            y = FORWARD[backend](values, gate, None, None, x, 0, 1)
            torch.library.opcheck(BACKWARD[backend], (x, values, y, gate, None, None, None, 0, 1))
