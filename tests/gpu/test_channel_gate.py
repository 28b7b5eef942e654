"""Streaming (Triton) and resident (CUDA) kernels on a real device, judged beside eager."""

from __future__ import annotations

import functools

import pytest
import torch

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable

from ..checks import LAYOUTS, assert_equivalent, in_layout, random

pytestmark = pytest.mark.gpu

HEADLINE = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    reason = unavailable(request.param, "channel_gate", "cuda")
    if reason is not None:
        pytest.skip(reason)
    with fused_attn.backend(request.param):
        yield request.param


def inputs_of(shape, dtype, layout, *, hidden=None, layer="dense", layers=2, affine=False, residual=False, batch=4):
    channels = shape[0]
    hidden = hidden or max(channels // 16, 1)

    def make(*size, seed, scale=1.0):
        return random(*size, seed=seed, scale=scale).to("cuda", dtype)

    found = {"x": in_layout(make(batch, *shape, seed=1), layout)}
    if layers == 2:
        found["weight1"] = make(hidden, channels, seed=2, scale=channels**-0.5)
        found["bias1"] = make(hidden, seed=3)
        found["weight2"] = make(channels, hidden, seed=4, scale=hidden**-0.5)
        found["bias2"] = make(channels, seed=5)
    elif layers == 1:
        size = (channels, channels) if layer == "dense" else (1, 1, 5)
        found["weight1"] = make(*size, seed=2, scale=size[-1] ** -0.5)
    if affine:
        found["affine_weight"], found["affine_bias"] = make(channels, seed=6), make(channels, seed=7)
    if residual:
        found["residual"] = in_layout(make(batch, *shape, seed=8), layout)
    return found


def check(inputs, **options):
    def call(function, x, affine_weight=None, affine_bias=None, **given):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return function(x, affine=affine, **given, **options)

    grad = random(*inputs["x"].shape, seed=9).to(inputs["x"])
    assert_equivalent(
        functools.partial(call, functional.channel_gate),
        functools.partial(call, reference.channel_gate),
        inputs,
        [grad],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", HEADLINE)
@pytest.mark.parametrize("batch", [1, 4])
def test_headline_shapes(shape, layout, batch):
    check(inputs_of(shape, torch.bfloat16, layout, batch=batch))
    check(inputs_of(shape, torch.bfloat16, layout, residual=True, batch=batch), post_activation="relu")
    check(inputs_of(shape, torch.bfloat16, layout, layers=1, layer="conv", batch=batch), layer="conv")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(72, 13, 17), (9, 1, 1), (1, 5, 3), (40, 7, 7), (33, 3, 5, 2), (16, 31)])
def test_shapes_and_dtypes(shape, dtype, layout):
    check(inputs_of(shape, dtype, layout))
    check(inputs_of(shape, dtype, layout, layers=0), pool="max", ties="first")
    check(inputs_of(shape, dtype, layout, layers=1), pool="avgmax", ties="even", gate="hard_sigmoid")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prologue_and_epilogue(layout):
    inputs = inputs_of((48, 14, 14), torch.float32, layout, affine=True, residual=True)
    check(inputs, pre_activation="silu", post_activation="gelu")
    check(inputs, pre_activation="relu", post_activation="relu", pool="avgmax")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_agree_to_the_bit(layout):
    inputs = inputs_of((256, 28, 28), torch.bfloat16, layout)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def once():
        y = functional.channel_gate(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_a_split_maximum_with_ties(layout, ties):
    inputs = inputs_of((64, 56, 56), torch.float32, layout, batch=1)
    inputs["x"] = inputs["x"].mul(2).round()
    check(inputs, pool="avgmax", ties=ties)


def test_unaligned_views_and_gradients_of_any_strides():
    x = random(3, 5, 7, 7).to("cuda", torch.bfloat16)[1:].requires_grad_()  # 490 bytes into its storage
    y = functional.channel_gate(x, layer="dense")
    expected = reference.channel_gate(x)
    torch.testing.assert_close(y, expected)
    grad = torch.ones((), device="cuda", dtype=x.dtype).expand_as(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_pools(layout, dtype):
    reason = unavailable(fused_attn.backends.forced(), "channel_gate/both", "cuda")
    if reason is not None:
        pytest.skip(reason)
    for shape in ((256, 28, 28), (40, 7, 7)):
        check(inputs_of(shape, dtype, layout), pool="both")
        check(inputs_of(shape, dtype, layout, layers=1, layer="conv"), layer="conv", pool="both", ties="even")


def test_what_does_not_fit_says_so_or_streams(backend):
    if backend == "triton":
        check(inputs_of((256, 128, 128), torch.bfloat16, "nchw", batch=1))
        return
    x = torch.zeros(1, 256, 128, 128, device="cuda")
    with pytest.raises(RuntimeError, match="does not fit the shared memory of a cluster"):
        functional.channel_gate(x)


def test_replays_from_a_cuda_graph():
    inputs = inputs_of((256, 14, 14), torch.bfloat16, "nchw")
    with torch.no_grad():
        expected = functional.channel_gate(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = functional.channel_gate(**inputs)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


def test_more_than_2_31_elements(backend):
    """Offsets past 2**31, checked at both ends; 8.6 GB for x and y."""
    if backend == "cuda":
        pytest.skip("no cluster holds such a sample: the resident kernels refuse it")
    x = torch.zeros(3, 1, 1 << 30, dtype=torch.bfloat16, device="cuda")
    x[2, 0, -5:] = 1024.0
    y = functional.channel_gate(x, gate="identity", pool="max")
    assert y[2, 0, -6:].tolist() == [0.0] + [1024.0**2] * 5
    assert not y[:2].any()
