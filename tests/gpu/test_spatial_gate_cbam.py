"""spatial_gate and cbam by the streaming (Triton) and resident (CUDA) kernels on a real device, beside eager."""

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
BLOCKS = pytest.mark.parametrize("block", ["spatial_gate", "cbam"])


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    for op in ("spatial_gate", "cbam"):
        reason = unavailable(request.param, op, "cuda")
        if reason is not None:
            pytest.skip(reason)
    with fused_attn.backend(request.param):
        yield request.param


def inputs_of(block, shape, dtype, layout, *, kernel=7, layers=2, layer="dense", affine=False, residual=False, batch=4):
    channels, rank = shape[0], len(shape) - 1
    hidden = max(channels // 16, 1)

    def make(*size, seed, scale=1.0):
        return random(*size, seed=seed, scale=scale).to("cuda", dtype)

    found = {"x": in_layout(make(batch, *shape, seed=1), layout)}
    name = "weight" if block == "spatial_gate" else "spatial_weight"
    found[name] = make(1, 2, *(kernel,) * rank, seed=10, scale=kernel ** (-rank / 2))
    found[name.replace("weight", "bias")] = make(1, seed=11)
    if block == "cbam" and layers == 2:
        found["weight1"] = make(hidden, channels, seed=2, scale=channels**-0.5)
        found["weight2"] = make(channels, hidden, seed=4, scale=hidden**-0.5)
        found["bias1"], found["bias2"] = make(hidden, seed=3), make(channels, seed=5)
    elif block == "cbam" and layers == 1:
        size = (channels, channels) if layer == "dense" else (1, 1, 5)
        found["weight1"] = make(*size, seed=2, scale=size[-1] ** -0.5)
    if affine:
        found["affine_weight"], found["affine_bias"] = make(channels, seed=6), make(channels, seed=7)
    if residual:
        found["residual"] = in_layout(make(batch, *shape, seed=8), layout)
    return found


def check(block, inputs, **options):
    def call(function, x, affine_weight=None, affine_bias=None, norm_weight=None, norm_bias=None, **given):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        if norm_weight is None:
            return function(x, affine=affine, **given, **options)
        return function(x, affine=affine, batch_norm=(norm_weight, norm_bias, 1e-5), **given, **options)[0]

    grad = random(*inputs["x"].shape, seed=9).to(inputs["x"])
    ours, theirs = (functools.partial(call, getattr(module, block)) for module in (functional, reference))
    assert_equivalent(ours, theirs, inputs, [grad])


@BLOCKS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", HEADLINE)
@pytest.mark.parametrize("batch", [1, 4])
def test_headline_shapes(block, shape, layout, batch):
    check(block, inputs_of(block, shape, torch.bfloat16, layout, batch=batch))
    check(block, inputs_of(block, shape, torch.bfloat16, layout, residual=True, batch=batch), post_activation="relu")


@BLOCKS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(72, 13, 17), (9, 1, 1), (1, 5, 3), (40, 8, 8), (33, 3, 5, 2), (16, 31)])
def test_shapes_and_dtypes(block, shape, dtype, layout):
    check(block, inputs_of(block, shape, dtype, layout))
    check(block, inputs_of(block, shape, dtype, layout, kernel=3), order=("mean", "max"))
    if block == "cbam":
        for pool in ("avg", "max", "avgmax"):
            check(block, inputs_of(block, shape, dtype, layout, layers=1, layer="conv"), layer="conv", pool=pool)


@BLOCKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm(block, layout, backend):
    """Statistics over the batch: streaming only."""
    for shape in ((72, 13, 17), (256, 56, 56)):
        inputs = inputs_of(block, shape, torch.float32, layout)
        inputs |= {f"norm_{name}": random(1, seed=i).to("cuda") for i, name in ((12, "weight"), (13, "bias"))}
        if backend == "triton":
            check(block, inputs)
        else:
            with pytest.raises(RuntimeError, match="statistics of the batch"):
                check(block, inputs)


@BLOCKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prologue_and_epilogue(block, layout):
    inputs = inputs_of(block, (48, 14, 14), torch.float32, layout, affine=True, residual=True)
    check(block, inputs, pre_activation="silu", post_activation="gelu")
    check(block, inputs, pre_activation="relu", post_activation="relu")


@BLOCKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_agree_to_the_bit(block, layout):
    leaves = {k: v.requires_grad_() for k, v in inputs_of(block, (256, 28, 28), torch.bfloat16, layout).items()}

    def once():
        y = getattr(functional, block)(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("batch", [1, 4])
def test_split_maxima_with_ties(layout, ties, batch):
    inputs = inputs_of("spatial_gate", (64, 28, 28), torch.float32, layout, batch=batch)
    inputs["x"] = inputs["x"].mul(2).round()
    check("spatial_gate", inputs, ties=ties)


@BLOCKS
def test_what_does_not_fit_says_so_or_streams(block, backend):
    inputs = inputs_of(block, (256, 128, 128), torch.bfloat16, "nchw", batch=1)
    if backend == "triton":
        check(block, inputs)
        return
    with pytest.raises(RuntimeError, match="does not fit the shared memory of a cluster"):
        getattr(functional, block)(**inputs)


@BLOCKS
def test_replays_from_a_cuda_graph(block):
    inputs = inputs_of(block, (256, 14, 14), torch.bfloat16, "nchw")
    with torch.no_grad():
        expected = getattr(functional, block)(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = getattr(functional, block)(**inputs)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)
