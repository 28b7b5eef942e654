"""spatial_logits against PyTorch's convolution: forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from fused_attn import functional, reference
from tests.checks import assert_equivalent, random
from tests.ops.test_channel_gate import strided
from tests.ops.test_spatial_gate import DTYPES, convolution

SHAPES = ((2, 2, 7, 7), (3, 2, 1, 1), (1, 2, 64, 9), (4, 2, 33), (2, 2, 3, 4, 5), (5, 2, 130, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, bias):
    inputs = {"pooled": random(*shape, dtype=dtype), **convolution(shape, dtype, bias=bias)}
    grad = random(shape[0], 1, *shape[2:], seed=9, dtype=dtype)
    assert_equivalent(functional.spatial_logits, reference.spatial_logits, inputs, [grad])


def test_strides():
    """Maps and gradients that lie otherwise, as transposed pools and permuted gates do."""
    inputs = {"pooled": random(2, 2, 9, 5), **convolution((2, 2, 9, 5), torch.float32)}
    for grad in strided(random(2, 1, 9, 5, seed=9)).values():
        assert_equivalent(functional.spatial_logits, reference.spatial_logits, inputs, [grad])
    pooled = random(2, 2, 5, 9).transpose(2, 3)
    weight, bias = convolution(pooled.shape, pooled.dtype).values()
    torch.testing.assert_close(
        functional.spatial_logits(pooled, weight, bias), reference.spatial_logits(pooled, weight, bias)
    )


def test_gradgradcheck():
    shape = (2, 2, 4, 5)
    inputs = [
        t.requires_grad_() for t in (random(*shape, dtype=torch.float64), *convolution(shape, torch.float64).values())
    ]
    assert torch.autograd.gradcheck(functional.spatial_logits, inputs)
    assert torch.autograd.gradgradcheck(functional.spatial_logits, inputs)


def test_compile():
    shape = (2, 2, 9, 5)
    inputs = [t.requires_grad_() for t in (random(*shape), *convolution(shape, torch.float32).values())]
    compiled = torch.compile(functional.spatial_logits, fullgraph=True)
    for function in (functional.spatial_logits, compiled):
        y = function(*inputs)
        grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
        torch.testing.assert_close(y, reference.spatial_logits(*inputs))
        assert [g.shape for g in grads] == [t.shape for t in inputs]


def test_opcheck():
    from fused_attn.backends import choose
    from fused_attn.ops.spatial_logits import BACKWARD, FORWARD

    pooled = random(2, 2, 5, 6)
    if choose("spatial_gate", pooled) != "cpu":
        pytest.skip("no native library on this machine, or another backend was asked for: PyTorch's convolution runs")
    weight, bias = convolution(pooled.shape, pooled.dtype).values()
    for arguments in ((pooled, weight, bias), (pooled, weight, None)):
        torch.library.opcheck(FORWARD["cpu"], arguments)
        torch.library.opcheck(BACKWARD["cpu"], (random(2, 1, 5, 6, seed=1), *arguments))


def test_no_positions():
    with pytest.raises(ValueError, match="at least one spatial position"):
        functional.spatial_logits(torch.empty(1, 2, 0, 3), torch.ones(1, 2, 3, 3))
