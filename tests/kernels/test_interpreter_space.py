"""The Triton kernels of the CBAM family in Triton's interpreter, by the tests of the operators."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random
from tests.ops import test_cbam as of_cbam
from tests.ops import test_channel_gate as of_channel_gate
from tests.ops import test_spatial_gate as of_spatial_gate
from tests.ops.test_squeeze_scale import affine

pytestmark = pytest.mark.slow  # 38 s in all

SHAPES = ((2, 10, 5, 7), (2, 1, 9, 5), (1, 300, 3, 4), (2, 8, 33), (1, 6, 3, 4, 5))


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "cbam", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


def with_ties(shape, layout):
    return in_layout(random(*shape).mul(2).round().clamp(-2, 2), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", of_spatial_gate.ORDERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spatial_gate(shape, order, layout):
    tensors = of_spatial_gate.convolution(shape, torch.float32)
    of_spatial_gate.check(in_layout(random(*shape), layout), tensors, {"order": order})
    for ties in ("first", "even"):
        of_spatial_gate.check(with_ties(shape, layout), tensors, {"ties": ties})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_spatial_gate.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    shape = (2, 10, 5, 7)
    x = in_layout(of_cbam.separated(shape, dtype), layout)
    of_spatial_gate.check(x, of_spatial_gate.convolution(shape, dtype), {})
    tensors, options = of_cbam.weights("se", shape, dtype)
    of_cbam.check(x, {name: tensor * 0.25 for name, tensor in tensors.items()}, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (1, 3, 40, 41)], ids=str)
def test_both_pools(shape, ties, kind, layout):
    """The larger shape is split among programs."""
    tensors, options = of_channel_gate.excitation(kind, shape[1], torch.float32)
    of_channel_gate.check(with_ties(shape, layout), tensors, {**options, "pool": "both", "ties": ties})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "none"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_cbam(shape, kind, layout):
    tensors, options = of_cbam.weights(kind, shape, torch.float32)
    of_cbam.check(in_layout(random(*shape), layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
def test_cbam_with_ties(pool, ties, layout):
    shape = (2, 8, 5, 7)  # small enough for FLAT tiles
    tensors, options = of_cbam.weights("se", shape, torch.float32)
    options |= {"pool": pool, "channel_ties": ties, "spatial_ties": ties}
    of_cbam.check(with_ties(shape, layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(shape, layout):
    """With an epsilon as large as the variance: no tolerance hides it."""
    x, norm = in_layout(random(*shape), layout), of_spatial_gate.batch_norm(torch.float32)

    def check(name, tensors, **options):
        def function(module):
            def call(x, norm_weight, norm_bias, **tensors):
                return getattr(module, name)(x, batch_norm=(norm_weight, norm_bias, 0.5), **tensors, **options)

            return call

        inputs, ours, theirs = {"x": x, **norm, **tensors}, function(functional), function(reference)
        grads = [random(*shape, seed=9)]
        assert_equivalent(lambda **given: ours(**given)[0], lambda **given: theirs(**given)[0], inputs, grads)
        torch.testing.assert_close(ours(**inputs)[1:], theirs(**inputs)[1:], rtol=1e-5, atol=1e-5)

    check("spatial_gate", of_spatial_gate.convolution(shape, x.dtype), ties="even")
    tensors, options = of_cbam.weights("se", shape, x.dtype)
    check("cbam", tensors, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
def test_prologue_and_epilogue(post, layout):
    shape = (2, 6, 9, 11)
    x = in_layout(random(*shape), layout)
    more = affine(6, x.dtype) | {"residual": random(*shape, seed=5)}
    options = {"pre_activation": "silu", "post_activation": post}
    of_spatial_gate.check(x, of_spatial_gate.convolution(shape, x.dtype) | more, options)
    tensors, excitation = of_cbam.weights("se", shape, x.dtype)
    of_cbam.check(x, tensors | more, excitation | options)


@pytest.mark.parametrize("strides", of_channel_gate.strided(torch.zeros(1, 1, 2, 2)))
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("op", ["spatial_gate", "cbam"])
def test_gradients_of_other_strides(op, post, strides):
    shape = (2, 6, 5, 7)
    grad = of_channel_gate.strided(random(*shape, seed=3))[strides]
    more = {} if post == "identity" else {"residual": random(*shape, seed=5)}
    if op == "spatial_gate":
        tensors = of_spatial_gate.convolution(shape, torch.float32)
        of_spatial_gate.check(random(*shape), tensors | more, {"post_activation": post}, grad)
    else:
        tensors, options = of_cbam.weights("se", shape, torch.float32)
        of_cbam.check(random(*shape), tensors | more, {**options, "post_activation": post}, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 10, 5, 7), (1, 6, 3, 2, 4)], ids=str)
def test_channel_pool_and_scale_by_position(shape, layout):
    def function(name, module, **options):
        def call(x, affine_weight=None, affine_bias=None, **tensors):
            prologue = None if affine_weight is None else (affine_weight, affine_bias)
            return getattr(module, name)(x, affine=prologue, **tensors, **options)

        return call

    def check(name, inputs, grad, **options):
        assert_equivalent(function(name, functional, **options), function(name, reference, **options), inputs, [grad])

    x, space = with_ties(shape, layout), (shape[0], 1, *shape[2:])
    for more in ({}, affine(shape[1], x.dtype)):
        for ties in ("first", "even"):
            for order in of_spatial_gate.ORDERS:
                pooled = random(shape[0], 2, *shape[2:], seed=1)
                check("channel_pool", {"x": x, **more}, pooled, ties=ties, order=order)
        for post in ("identity", "relu", "silu"):
            inputs = {"x": x, "gate": random(*space, seed=6), "residual": random(*shape, seed=8), **more}
            check("scale", inputs, random(*shape, seed=2), pre_activation="silu", post_activation=post)


@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 3, 4, 5)], ids=str)
def test_nan(shape, value, ties):
    x = random(*shape)
    x.flatten(2)[0, 2, -1] = x.flatten(2)[1, 4, 0] = value
    of_spatial_gate.check(x, of_spatial_gate.convolution(x.shape, x.dtype), {"ties": ties}, torch.zeros_like(x))


def test_empty_batch():
    x = torch.empty(0, 8, 5, 5)
    of_spatial_gate.check(x, of_spatial_gate.convolution(x.shape, x.dtype), {})
    tensors, options = of_cbam.weights("se", x.shape, x.dtype)
    of_cbam.check(x, tensors, options)


def test_opcheck():
    from fused_attn.ops.cbam import BACKWARD, FORWARD

    tensors, _ = of_cbam.weights("se", (2, 8, 5, 6), torch.float32)
    x = random(2, 8, 5, 6)
    for norm in ((None, None), (torch.ones(1), torch.zeros(1))):
        shared = (*tensors.values(), *norm, None, None, None, 1e-5, 0, 3, 0, 1, 6, 0, 0, 6, 0, 0)
        torch.library.opcheck(FORWARD["triton"], (x, *shared))
        _, *states = FORWARD["triton"](x, *shared)
        torch.library.opcheck(BACKWARD["triton"], (x, x, None, *states, *shared))
