"""norm_gate by the Triton kernels on a real device: tails of training networks against torch's layers."""

from __future__ import annotations

import copy

import pytest
import torch

from fused_attn import functional

from ..checks import LAYOUTS, in_layout, random
from ..ops import test_norm_gate as of_norm_gate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("streaming")]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((4, 256, 56, 56), (1, 64, 112, 112), (8, 2048, 7, 7), (2, 40, 13, 17), (3, 9, 1, 1), (2, 6, 31)),
    *((2, 5, 3, 4, 5), (2, 1, 9, 5)),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, layout):
    """The tail of an SE-ResNet and the middle of an EfficientNet."""
    x, grad = (in_layout(random(*shape, seed=i).to("cuda", dtype), layout) for i in (0, 1))
    for residual, options in ((True, {"post_activation": "relu"}), (False, {"activation": "silu"})):
        inputs = of_norm_gate.inputs_of(x, residual=residual)
        inputs = {k: None if t is None else t.to("cuda") for k, t in inputs.items()}
        of_norm_gate.check(inputs, grad, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(shape, dtype, layout):
    of_norm_gate.check_bits("triton", shape, dtype, layout, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*of_norm_gate.NUMBER_SHAPES, (128, 2048, 1, 2)], ids=str)
def test_numbers_between_the_passes(shape, dtype):
    of_norm_gate.check_coefficients("triton", shape, dtype, device="cuda")
    of_norm_gate.check_factors("triton", shape, dtype, "cuda")
    of_norm_gate.check_running("triton", shape[1], dtype, "cuda")
    if dtype.itemsize > 2:
        of_norm_gate.check_coefficients("triton", shape, dtype, 4096.0, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_over(dtype, layout):
    def make(seed: int) -> torch.Tensor:
        return in_layout(random(4, 64, 28, 28, seed=seed).to("cuda", dtype), layout)

    found = []
    for inplace in (False, True):
        leaves = [make(seed).requires_grad_() for seed in (0, 1)]
        x, residual = (leaf * 1 for leaf in leaves)
        y = of_norm_gate.tail(functional, x, residual, inplace=inplace)
        assert (y is residual) == inplace
        found.append([y, *torch.autograd.grad(y, leaves, make(2))])
    with torch.no_grad():
        expected, x = of_norm_gate.tail(functional, make(0), make(1)), make(0)
        assert of_norm_gate.tail(functional, x, make(1), inplace=True) is x
    for over, new in zip([*found[1], x], [*found[0], expected], strict=True):
        assert torch.equal(over, new)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_training_steps_under_autocast(activation, layout):
    """bfloat16 maps, float32 parameters, running statistics: within twice eager's distance from float64 layers."""
    exact = of_norm_gate.Tail(64, activation).double().to("cuda")
    found = []
    for fused in (None, False, True):
        block = copy.deepcopy(exact)
        block.fused = bool(fused)
        block = block if fused is None else block.float()
        dtype = torch.float64 if fused is None else torch.bfloat16
        results = []
        for step in range(3):
            maps = [in_layout(random(8, 64, 28, 28, seed=step + s).to("cuda", torch.bfloat16), layout) for s in (0, 9)]
            x, residual = (m.to(dtype).requires_grad_() for m in maps)
            block.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=fused is not None):
                y = block(x, residual)
            y.backward(random(8, 64, 28, 28, seed=20).to("cuda", y.dtype))
            results += [y, x.grad, residual.grad, *(p.grad for p in block.parameters())]
        found.append([t.detach().double() for t in (*results, *block.buffers())])
    for expected, eager, mine in zip(*found, strict=True):
        floor = 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert (mine - expected).abs().max() <= 2 * (eager - expected).abs().max() + floor
