"""norm_gate against its reference: forward and every gradient, on the backend that serves this machine's CPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.codes import ACTIVATIONS, FUNCTIONS
from fused_attn.ops.common import accumulator
from fused_attn.ops.norm_gate import COEFFICIENTS, DOTS, FACTORS, GRADIENTS, MOMENTS, RUNNING, SCALE, SCALE_INTO
from tests.checks import LAYOUTS, Inputs, assert_equivalent, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((2, 16, 7, 7), (3, 8, 1, 1), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5), (1, 72, 40, 41)),
    *((5, 300, 2, 1), (2, 9, 70, 70)),
)
NATIVE = choose("norm_gate", torch.empty(1, 1, 1, 1))
needs_operators = pytest.mark.skipif(
    NATIVE == "reference", reason="no native library on this machine: the reference is not an operator"
)


def inputs_of(x: Tensor, *, residual: bool = False, gate: bool = True, affine: bool = True) -> Inputs:
    channels, dtype = x.shape[1], x.dtype
    hidden = max(1, channels // 4)
    added = random(*x.shape, seed=3, dtype=torch.float64)
    if dtype.itemsize == 2:  # no sum so near to 0 that a rounded gate takes it to the other side of a ReLU
        added += 8 * added.sign()
    return {
        "x": x,
        "weight": random(channels, seed=1, dtype=dtype) if affine else None,
        "bias": random(channels, seed=2, dtype=dtype) if affine else None,
        "residual": added.to(dtype) if residual else None,
        "weight1": random(hidden, channels, seed=4, dtype=dtype, scale=channels**-0.5) if gate else None,
        "weight2": random(channels, hidden, seed=5, dtype=dtype, scale=2 * hidden**-0.5) if gate else None,
    }


def apply(module, **options):
    """module.norm_gate of leaves: a two-layer excitation's weights with it; running statistics in x's dtype."""

    def function(x, weight, bias, residual, weight1, weight2):
        excitation = None
        if weight1 is not None:

            def excitation(s):
                return (weight2 @ F.silu(weight1 @ s.mT)).mT.sigmoid()

        running = (None, None)
        if not options.get("training", True):
            running = random(x.shape[1], seed=6).to(x.dtype), (random(x.shape[1], seed=7).abs() + 0.5).to(x.dtype)
        return module.norm_gate(
            x,
            weight,
            bias,
            *running,
            **{"training": True, **options},
            excitation=excitation,
            residual=residual,
        )

    return function


def check(inputs: Inputs, grad: Tensor | None = None, **options) -> None:
    x = inputs["x"]
    grad = random(*x.shape, seed=9, dtype=x.dtype) if grad is None else grad
    assert_equivalent(apply(functional, **options), apply(reference, **options), inputs, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, dtype, layout):
    """The tail of an SE-ResNet, and the middle of an EfficientNet."""
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(inputs_of(x, residual=True), post_activation="relu")
    check(inputs_of(x), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("post_activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu", "hard_swish", "gelu"])
def test_activations(activation, post_activation, training, layout):
    x = in_layout(random(3, 20, 9, 6), layout)
    for gate in (True, False):
        for residual in (True, False):
            inputs = inputs_of(x, residual=residual, gate=gate)
            check(inputs, activation=activation, post_activation=post_activation, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_affine_or_not(given, training):
    inputs = inputs_of(random(2, 6, 5, 4), residual=True)
    inputs |= {name: None for name in ("weight", "bias") if name != given}
    check(inputs, training=training, activation="relu", eps=0.1)
    check(inputs, training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad", "residual"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    x, grad, residual = (in_layout(random(*shape, seed=s), layout) for s in (0, 1, 2))
    other = strided(random(*shape, seed=3))[strides]
    if of == "x" and strides == "expanded over space":
        pytest.skip("a constant channel has no variance to compare")
    x, grad, residual = (other if of == name else t for name, t in (("x", x), ("grad", grad), ("residual", residual)))
    for post_activation in ("relu", "identity"):
        check({**inputs_of(x), "residual": residual}, grad, activation="silu", post_activation=post_activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (2, 1, 4, 4)], ids=str)
def test_output_and_gradients_keep_the_layout(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y = functional.norm_gate(x, training=True, activation="silu", excitation=torch.sigmoid)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.square().sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_digits(layout):
    """Statistics of numbers near 4096 that float32 holds exactly, over samples whose means differ little."""
    x = in_layout((random(4, 10, 31, 33, dtype=torch.float64).mul(64).round().div(64) + 4096).float(), layout)
    running = torch.zeros(10), torch.ones(10)
    functional.norm_gate(x, None, None, *running, training=True, momentum=1.0)
    torch.testing.assert_close(running[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)
    check(inputs_of(x, residual=True), post_activation="relu")
    check(inputs_of(x), activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel(layout):
    x = random(3, 6, 5, 7)
    x[:, ::2] = 0.75
    check(inputs_of(in_layout(x, layout), residual=True), activation="relu", eps=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_nan_and_infinity(value, layout):
    """Either makes its channel NaN in every sample, as in eager, and without a gate no other."""
    x = random(2, 11, 9, 19)
    x[0, 3, 4, 5] = value
    inputs, grad = inputs_of(in_layout(x, layout), residual=True, gate=False), [random(*x.shape, seed=1)]
    options = {"activation": "silu", "post_activation": "relu"}
    (actual,), grads = run(apply(functional, **options), inputs, grad)
    (eager,), eager_grads = run(apply(reference, **options), inputs, grad)
    torch.testing.assert_close(actual, eager, equal_nan=True)
    for name in grads:
        torch.testing.assert_close(grads[name], eager_grads[name], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert actual[:, 3].isnan().all() and actual.isnan().sum() == 2 * 9 * 19


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape, training):
    inputs = inputs_of(random(*shape), residual=True, gate=False)
    grad = random(*shape)
    (y,), grads = run(apply(functional, training=training), inputs, [grad])
    (expected,), expected_grads = run(apply(reference, training=training), inputs, [grad])
    assert y.shape == expected.shape
    for name in grads:
        torch.testing.assert_close(grads[name], expected_grads[name], equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 41, 43), (7, 24, 9, 40), (2, 1, 210, 200)], ids=str)
def test_threads(shape, layout, threads):
    """Whole samples a thread, and pieces."""
    torch.set_num_threads(threads)
    check(inputs_of(in_layout(random(*shape), layout), residual=True), activation="silu", post_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (5, 64, 14, 14)], ids=str)
def test_neither_runs_nor_threads_change_a_bit(shape, layout):
    inputs = inputs_of(in_layout(random(*shape), layout), residual=True, gate=False)
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    function = functools.partial(
        functional.norm_gate,
        training=True,
        activation="silu",
        excitation=torch.sigmoid,  # matrix products do change
        post_activation="relu",
    )
    results = []
    for threads in (3, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(function, inputs, [random(*shape, seed=1)]))
    for (y,), grads in results[1:]:
        assert torch.equal(y, results[0][0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in grads)


@given(
    rank=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    batch=st.integers(2, 4),
    channels=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(["identity", "relu", "silu"]),
    post_activation=st.sampled_from(["identity", "relu"]),
    residual=st.booleans(),
    gate=st.booleans(),
    training=st.booleans(),
)
@settings(max_examples=60)
def test_any_shape(rank, sizes, batch, channels, layout, activation, post_activation, residual, gate, training):
    x = in_layout(random(batch, channels, *sizes[:rank], dtype=torch.float64), layout)
    check(
        inputs_of(x, residual=residual, gate=gate),
        activation=activation,
        post_activation=post_activation,
        training=training,
        eps=0.1,  # the variance of two numbers may be next to nothing, and its inverse all there is to compare
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(residual, activation, training, layout):
    options = {"activation": activation, "post_activation": "relu" if residual else "identity", "training": training}
    x = in_layout(random(3, 6, 3, 4, dtype=torch.float64), layout)
    inputs = inputs_of(x, residual=residual)
    leaves = tuple(t if t is None else t.detach().requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(apply(functional, **options), leaves)


@pytest.mark.parametrize("frozen", [("x",), ("weight", "bias"), ("x", "weight", "bias"), ("weight1", "weight2")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_inputs(frozen, layout):
    """What needs no gradient costs none, and the others' do not change."""
    inputs = inputs_of(in_layout(random(2, 12, 6, 5), layout), residual=True)
    grad = random(2, 12, 6, 5, seed=1)
    options = {"activation": "silu", "post_activation": "relu"}
    _, expected = run(apply(functional, **options), inputs, [grad])
    leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in inputs.items()}
    apply(functional, **options)(**leaves).backward(grad)
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name])


class Tail(nn.Module):
    """BatchNorm, activation, squeeze-and-excitation, sum and ReLU, as torch's layers or as one op."""

    def __init__(self, channels: int, activation: str = "identity", **options) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, **options)
        self.se = reference.SqueezeExcite(channels, reduction=4)
        self.activation = activation
        self.fused = False

    def excite(self, s: Tensor) -> Tensor:
        return self.se.fc2(self.se.fc1(s).relu()).sigmoid()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if not self.fused:
            u = self.se(FUNCTIONS[self.activation](self.bn(x)))
            return (u + residual).relu()
        bn, momentum = self.bn, self.bn.momentum
        if self.training and bn.track_running_stats:
            bn.num_batches_tracked += 1
            momentum = 1 / float(bn.num_batches_tracked) if momentum is None else momentum
        return functional.norm_gate(
            x,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            training=self.training,
            momentum=momentum or 0.0,
            eps=bn.eps,
            activation=self.activation,
            excitation=self.excite,
            residual=residual,
            post_activation="relu",
        )


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_the_layers_it_stands_for(activation, options):
    """Three training steps, then eval: outputs, gradients, running statistics."""
    plain = Tail(16, activation, **options).double()
    fused = copy.deepcopy(plain)
    fused.fused = True
    for step in range(4):
        found = []
        for tail in (plain, fused):
            tail.train(step < 3)
            x, residual = (random(3, 16, 6, 7, seed=s + step, dtype=torch.float64).requires_grad_() for s in (0, 50))
            y = tail(x * 2 + step, residual)
            tail.zero_grad()
            y.backward(random(*y.shape, seed=9, dtype=torch.float64))
            found.append([y, x.grad, residual.grad, *(p.grad for p in tail.parameters()), *tail.buffers()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_running_statistics_in_half_precision_maps():
    """float32 statistics of a bfloat16 map, as torch's BatchNorm under autocast."""
    x = random(4, 8, 9, 9, dtype=torch.bfloat16) + 3
    found = []
    for module in (functional, reference):
        running = torch.zeros(8), torch.ones(8)
        parameters = random(8), random(8, seed=1), *running
        y = module.norm_gate(x, *parameters, training=True, activation="silu", excitation=torch.sigmoid)
        assert y.dtype == torch.bfloat16
        found.append([*running, y])
    torch.testing.assert_close(found[0][:2], found[1][:2])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=2e-2, atol=2e-2)


def saved_bytes(function, *inputs: Tensor) -> int:
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(saved.values())


def tail(module, x: Tensor, residual: Tensor | None, post_activation: str = "relu", **options) -> Tensor:
    return module.norm_gate(
        x, training=True, excitation=torch.sigmoid, residual=residual, post_activation=post_activation, **options
    )


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_bytes(layout, dtype):
    """Backward keeps x, where a ReLU follows one bit an element, and numbers a channel; eager keeps three maps."""
    x, residual = (in_layout(random(2, 128, 28, 28, seed=s, dtype=dtype), layout).requires_grad_() for s in (0, 1))
    numbers = 4 * 128 * 20
    bit = x.numel() // 8
    kept = saved_bytes(lambda x: tail(functional, x, residual), x)
    assert x.nbytes + bit <= kept <= x.nbytes + bit + numbers
    assert kept <= 1.15 * x.nbytes
    assert x.nbytes <= saved_bytes(lambda x: tail(functional, x, residual, "identity"), x) <= x.nbytes + numbers
    assert saved_bytes(lambda x: tail(reference, x, residual), x) >= 3 * x.nbytes


def packed(keep: Tensor) -> Tensor:
    """Bits as `norm_scale` writes them, of a map of truths."""
    by_position = keep.shape[2:].numel() == 1 or not keep.is_contiguous()
    rows = keep.flatten(2).mT if by_position else keep.flatten(2)
    rows = F.pad(rows.to(torch.uint8), (0, -rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (rows << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


BIT_SHAPES = (
    *((2, 9, 7, 7), (3, 12, 1, 1), (1, 3, 13, 17), (2, 1, 5, 3), (2, 37, 2, 3), (1, 5, 8), (2, 3, 2, 2, 5)),
    *((0, 4, 3, 3), (3, 70, 30, 40)),
)


def check_bits(backend: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu") -> None:
    """The bits are where y > 0 or NaN, in the order they are documented in; and torch's ReLU passes gradients there."""
    x, residual, grad = (in_layout(random(*shape, seed=s, dtype=dtype).to(device), layout) for s in range(3))
    of_numbers = {"dtype": accumulator(dtype), "device": device}
    norm, gate = random(3, shape[1], seed=4).to(**of_numbers), random(*shape[:2], seed=5).abs().to(**of_numbers)
    x.as_strided((x.numel(),), (1,))[::29] = torch.nan
    for activation in ("identity", "silu", "hard_swish"):
        code, relu = ACTIVATIONS[activation], ACTIVATIONS["relu"]
        y, bits = SCALE[backend](x, gate, norm, residual, code, relu, True)
        assert torch.equal(bits, packed(~(y <= 0)))
        _, h = DOTS[backend](grad, x, bits, None, norm, gate, code, relu)
        torch.testing.assert_close(h, torch.ops.aten.threshold_backward(grad, y, 0), rtol=0, atol=0)
        plain, none = SCALE[backend](x, gate, norm, residual, code, relu, False)
        torch.testing.assert_close(plain, y, rtol=0, atol=0, equal_nan=True)
        assert none.shape == (0,)


@needs_operators
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIT_SHAPES, ids=str)
def test_bits(shape, dtype, layout):
    check_bits(NATIVE, shape, dtype, layout)


@needs_operators
@pytest.mark.parametrize("smallest, dtype", [(2.0**-25, torch.float16), (2.0**-134, torch.bfloat16)], ids=str)
def test_bits_of_sums_that_round_to_zero(smallest, dtype):
    """Around half of the smallest number of a dtype y is 0 or not, and so is its bit."""
    x = torch.arange(-8, 9, dtype=dtype).div(4).repeat(2, 3, 1)
    norm = torch.stack([torch.ones(3), torch.zeros(3), torch.zeros(3)])
    y, bits = SCALE[NATIVE](x, torch.full((2, 3), smallest), norm, None, 0, ACTIVATIONS["relu"], True)
    assert 0 < (y > 0).sum() < (x > 0).sum()
    assert torch.equal(bits, packed(y > 0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_nan_stops_at_the_relu(layout):
    x, residual, grad = (in_layout(random(2, 9, 7, 7, seed=s), layout) for s in range(3))
    grad[0, 3] = torch.nan
    found = []
    for module in (functional, reference):
        leaf = residual.detach().clone().requires_grad_()
        found.append(torch.autograd.grad(tail(module, x, leaf), leaf, grad)[0])
    assert 0 < found[0].isnan().sum() < 49
    torch.testing.assert_close(*found, equal_nan=True)


def check_coefficients(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, device: str = "cpu"
) -> None:
    """norm_coefficients of a map's moments, against what float64 finds in the map."""
    eighths = random(*shape, dtype=torch.float64).mul(8).round().div(8)  # which bfloat16 holds, too
    x = (eighths + mean).to(device, dtype)
    exact, channels, axes = x.double(), shape[1], (0, *range(2, x.dim()))
    near = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-6}
    moments = MOMENTS[backend](x)
    affine = random(channels, seed=1).to(device, dtype), random(channels, seed=2).to(device)
    for weight, bias in ((None, None), affine):
        norm, unbiased, s = COEFFICIENTS[backend](x, moments, weight, bias, 0.1, True)
        a, b = (exact.var(axes, correction=0) + 0.1).rsqrt(), torch.zeros_like(exact[0].flatten(1)[:, 0])
        expected = [exact.mean(axes), a]
        a, b = (a, b) if weight is None or bias is None else (a * weight.double(), bias.double())
        for found, row in zip(norm[[2, 3, 0]], [*expected, a], strict=True):
            torch.testing.assert_close(found.double(), row, **near)
        centred = exact.flatten(2).mean(2) - exact.mean(axes)
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": near["atol"]}
        torch.testing.assert_close(s.double(), a * centred + b, **(near if dtype.itemsize > 2 else rounding))
        # Of b there are the digits that an accumulator holds of mean * a, of which it is the difference.
        digits = 2 * torch.finfo(norm.dtype).eps * abs(mean) * norm[0].abs().max().item()
        torch.testing.assert_close(
            norm[1].double() + norm[0].double() * expected[0], b, rtol=0, atol=near["atol"] + digits
        )
        torch.testing.assert_close(unbiased.double(), exact.var(axes), **near)
        again, _, none = COEFFICIENTS[backend](x, moments, weight, bias, 0.1, False)
        assert torch.equal(again, norm) and none.shape == (0,) and s.dtype == none.dtype == dtype


def check_running(backend: str, channels: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """norm_running of statistics and parameters of any dtype, against its formulas in float64."""
    mean, var = (random(channels, seed=i, dtype=dtype).to(device) for i in range(2))
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    parameters = random(channels, seed=2, dtype=dtype).to(device), random(channels, seed=3).to(device)
    for weight, bias in ((None, None), parameters, (parameters[0], None), (None, parameters[1])):
        norm = RUNNING[backend](weight, bias, mean, var.abs(), 0.1)
        rstd = (var.double().abs() + 0.1).rsqrt()
        a = rstd if weight is None else rstd * weight.double()
        b = -mean.double() * a if bias is None else bias.double() - mean.double() * a
        assert norm.dtype == accumulator(dtype)
        torch.testing.assert_close(norm.double(), torch.stack([a, b, mean.double(), rstd]), **near)


def check_factors(backend: str, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
    """norm_factors of any sums, against its formulas in float64."""
    batch, channels = shape[:2]
    x, of_s = random(*shape, dtype=dtype).to(device), random(batch, channels, seed=2, dtype=dtype).to(device)
    norm, sums = (random(*rows, channels, dtype=accumulator(dtype)).to(device) for rows in ((4,), (batch, 6)))
    a, rstd = norm.double()[[0, 3]]
    _, h, h_c, slope, slope_c, gate = sums.double().unbind(1)
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6 * batch**0.5}
    for grad_s in (None, of_s):
        pooled = torch.zeros_like(gate) if grad_s is None else grad_s.double() / x.shape[2:].numel()
        to_bias, to_weight = (gate * h + pooled * slope).sum(0), rstd * (gate * h_c + pooled * slope_c).sum(0)
        for of_batch in (True, False):
            constants = torch.stack([to_bias, rstd * to_weight]) * (-a / (x.numel() // channels)) * of_batch
            found = FACTORS[backend](x, sums, grad_s, norm, of_batch)
            expected = to_weight, to_bias, torch.stack([gate, pooled], 1) * a, constants
            for mine, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(mine.double(), exact, **near)


NUMBER_SHAPES = ((2, 16, 7, 7), (35, 40, 2, 3), (1, 1, 13, 17), (3, 5, 1), (2, 70, 1, 1, 1))


@needs_operators
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*NUMBER_SHAPES, (33, 900, 1, 1)], ids=str)
def test_numbers_between_the_passes(shape, dtype):
    """The last among threads. float32 and float64 also where the mean is large beside the distances from it."""
    check_coefficients(NATIVE, shape, dtype)
    check_factors(NATIVE, shape, dtype)
    check_running(NATIVE, shape[1], dtype)
    if dtype.itemsize > 2:
        check_coefficients(NATIVE, shape, dtype, 4096.0)


class Dispatched(TorchDispatchMode):
    """The operators that reach a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


@needs_operators
@pytest.mark.parametrize("activation, before, now", [("identity", 68, 13), ("silu", 67, 15)])
def test_operators_of_a_call(activation, before, now):
    """What a training step of an SE-ResNet's tail dispatches beside its excitation: on small maps that is its time.

    Where all between the passes was plain PyTorch it was `before`.
    """
    inputs = {k: t.requires_grad_() for k, t in inputs_of(random(2, 16, 7, 7), residual=True).items()}
    weights = [inputs.pop(name) for name in ("weight1", "weight2")]
    running, grad = (torch.zeros(16), torch.ones(16)), random(2, 16, 7, 7, seed=1)

    def excitation(s):
        return (weights[1] @ F.silu(weights[0] @ s.mT)).mT.sigmoid()

    s, of_gate = random(2, 16).requires_grad_(), random(2, 16)
    with Dispatched() as alone:
        torch.autograd.grad(excitation(s), (s, *weights), of_gate)
    with Dispatched() as whole:
        options = {"activation": activation, "excitation": excitation, "residual": inputs["residual"]}
        y = functional.norm_gate(
            inputs["x"], inputs["weight"], inputs["bias"], *running, training=True, post_activation="relu", **options
        )
        torch.autograd.grad(y, (*inputs.values(), *weights), grad)
    found = whole.names - alone.names
    assert found.total() == now < before, found


OVER_SHAPES = ((2, 9, 7, 7), (3, 12, 1, 1), (1, 3, 13, 17), (2, 1, 5, 3), (3, 70, 30, 40))


@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", OVER_SHAPES, ids=str)
def test_write_over_the_residual(shape, dtype, layout, forced):
    """With gradients: the same numbers and gradients, in the residual's memory, which autograd knows of."""
    found = []
    with contextlib.nullcontext() if forced is None else fused_attn.backend(forced):
        for inplace in (False, True):
            leaves = [in_layout(random(*shape, seed=s, dtype=dtype), layout).requires_grad_() for s in (0, 1)]
            x, residual = leaves[0] * 1, leaves[1] * 1
            version, address = residual._version, residual.data_ptr()
            y = tail(functional, x, residual, activation="silu", inplace=inplace)
            assert (y is residual) == inplace == (residual._version > version)
            assert (y.data_ptr() == address) == inplace
            found.append([y, *torch.autograd.grad(y, leaves, random(*shape, seed=2, dtype=dtype))])
    for over, new in zip(*found, strict=True):
        assert torch.equal(over, new)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", OVER_SHAPES, ids=str)
def test_write_over_x(shape, dtype, layout):
    """Without gradients: over x, in eval and with the batch's statistics."""
    channels = shape[1]
    for training in (True, False):
        for residual in (None, random(*shape, seed=1, dtype=dtype)):
            x = in_layout(random(*shape, dtype=dtype), layout)
            numbers = accumulator(dtype)
            running = torch.zeros(channels, dtype=numbers), torch.ones(channels, dtype=numbers)
            arguments = (random(channels, dtype=numbers), random(channels, seed=3, dtype=numbers), *running)
            options = {"training": training, "activation": "silu", "residual": residual, "post_activation": "silu"}
            with torch.no_grad():
                expected = functional.norm_gate(x, *arguments, **options)
                version = x._version
                y = functional.norm_gate(x, *arguments, **options, inplace=True)
            assert y is x and x._version > version
            assert torch.equal(y, expected)


def test_write_over_what_autograd_keeps():
    """Its own version counters: a node that kept the map raises in its backward."""
    for grad_enabled in (True, False):
        x, kept = random(2, 6, 5, 5), random(2, 6, 5, 5, seed=1).requires_grad_()
        exponential = kept.exp()  # which keeps its result
        with torch.set_grad_enabled(grad_enabled):
            y = tail(functional, *((x, exponential) if grad_enabled else (exponential, x)), inplace=True)
        assert y is exponential
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (y if grad_enabled else exponential).sum().backward()


def test_write_over_in_inference_mode():
    with torch.inference_mode():
        x = random(2, 6, 5, 5) * 1
        expected = tail(functional, x, None)
        assert torch.equal(tail(functional, x, None, inplace=True), expected)


def leaf(*shape: int) -> Tensor:
    return random(*shape).requires_grad_()


def without_gradients(*arguments, **options):
    with torch.no_grad():
        return tail(functional, *arguments, **options, inplace=True)


def outside_inference_mode():
    with torch.inference_mode():
        x = random(2, 4, 3, 3) * 1
    return without_gradients(x, None)


REFUSED = {
    "a residual to write over while gradients are enabled; got None": lambda: tail(
        functional, leaf(2, 4, 3, 3), None, inplace=True
    ),
    "post_activation identity or relu while gradients are enabled; got 'silu'": lambda: tail(
        functional, leaf(2, 4, 3, 3), random(2, 4, 3, 3), "silu", inplace=True
    ),
    "a residual that is not a leaf that requires a gradient": lambda: tail(
        functional, random(2, 4, 3, 3), leaf(2, 4, 3, 3), inplace=True
    ),
    "a residual that is not a view": lambda: tail(
        functional, random(2, 4, 3, 3), (random(2, 8, 3, 3) * 1)[:, :4], inplace=True
    ),
    "a residual of x's strides, (36, 9, 3, 1); got (36, 1, 12, 4)": lambda: tail(
        functional,
        random(2, 4, 3, 3),
        random(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        inplace=True,
    ),
    "x NCHW or channels_last; got strides (72, 18, 6, 2)": lambda: without_gradients(
        random(2, 4, 3, 3, 2)[..., 0], random(2, 4, 3, 3)
    ),
    "x and residual in storages of their own": lambda: without_gradients(*random(2, 2, 4, 3, 3)),
    "no tensor of inference_mode outside it": outside_inference_mode,
}


@pytest.mark.parametrize("message", REFUSED)
def test_write_over_nothing(message):
    with pytest.raises(ValueError) as caught:
        REFUSED[message]()
    assert str(caught.value) == f"inplace: expected {message}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_double_backward(training, layout):
    """Second gradients, too, and of maps of one position, of a residual written over, and of the descriptor alone."""
    for shape in ((3, 5, 3, 7), (3, 9, 1, 1)):
        for post, inplace in (("identity", True), ("relu", True), ("silu", False)):
            found = []
            for module in (functional, reference):
                x = in_layout(random(*shape, dtype=torch.float64), layout).requires_grad_()
                residual = in_layout(random(*shape, seed=1, dtype=torch.float64), layout).requires_grad_()
                weight, bias = (random(shape[1], seed=i, dtype=torch.float64).requires_grad_() for i in (2, 3))
                running, leaves = (torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()), (x, weight, bias)
                kept: list[torch.Tensor] = []

                def excitation(s, kept=kept):
                    kept.append(s)
                    return s.sigmoid()

                options = {"training": training, "activation": "silu", "excitation": excitation}
                given = residual * 1 if module is functional else residual
                options |= {"residual": given, "inplace": inplace and module is functional, "post_activation": post}
                y = module.norm_gate(x, weight, bias, *running, **options)
                grad = random(*shape, seed=4, dtype=torch.float64).requires_grad_()
                first = torch.autograd.grad(y, (*leaves, residual), grad, create_graph=True)
                penalty = sum(g.square().sum() for g in first)
                second = torch.autograd.grad(
                    penalty, (*leaves, residual, grad), retain_graph=True, materialize_grads=True
                )
                of_s = torch.autograd.grad(kept[0].square().sum(), leaves)
                found.append([y, *first, *second, *of_s])
            for mine, theirs in zip(*found, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@needs_operators
def test_opcheck():
    """Schema, fake kernel (strides too) and registration as torch checks them, permuted layouts included."""
    norm, gate, nchw = random(4, 8), random(2, 8, seed=1), random(2, 8, 5, 6)
    for x in (nchw, *map(strided(nchw).get, CHECKED)):
        torch.library.opcheck(MOMENTS[NATIVE], (x,))
        torch.library.opcheck(GRADIENTS[NATIVE], (x, x, norm, random(2, 2, 8), random(2, 8), 2))
        for post in (0, 1, 2):
            arguments = (x, gate, norm, x, 2, post, post == 1)
            torch.library.opcheck(SCALE[NATIVE], arguments)
            bits = SCALE[NATIVE](*arguments)[1] if post == 1 else None
            of_gate = None if post == 0 else gate
            torch.library.opcheck(DOTS[NATIVE], (x, x, bits, x if post == 2 else None, norm, of_gate, 2, post))
    for affine, wanted in (((None, None), True), ((random(8).bfloat16(), random(8)), False)):  # of x, its sizes
        torch.library.opcheck(COEFFICIENTS[NATIVE], (nchw, random(2, 3, 8).abs(), *affine, 1e-5, wanted))
        torch.library.opcheck(FACTORS[NATIVE], (nchw, random(2, 6, 8), gate if wanted else None, norm, wanted))
    for layout in LAYOUTS:
        x = in_layout(nchw, layout)
        torch.library.opcheck(SCALE_INTO[NATIVE], (x, gate, norm, None, torch.empty_like(x), 2, 1, True))


def test_checkpointing():
    found = []
    for recompute in (False, True):
        x = random(2, 6, 5, 4).requires_grad_()
        function = functools.partial(
            functional.norm_gate, training=True, activation="silu", excitation=torch.sigmoid, residual=x
        )
        y = checkpoint(function, x, use_reentrant=False) if recompute else function(x)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*found)


def test_autocast():
    """x keeps its dtype, the excitation runs under autocast, parameters are read as they are."""
    tail = Tail(16, "silu")
    tail.fused = True
    x = random(2, 16, 6, 5, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = tail(x, torch.zeros_like(x))
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in tail.parameters())


@pytest.mark.slow  # a compilation
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.long)])
def test_compiles_in_one_graph(training):
    tail = Tail(6, "silu").train(training)
    tail.fused = True
    other = copy.deepcopy(tail)
    compiled = torch.compile(tail, fullgraph=True, dynamic=True)
    for shape in ((2, 6, 5, 7), (3, 6, 8, 9)):
        found = []
        for module, block in ((compiled, tail), (other, other)):
            x, residual = random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()
            block.zero_grad()
            y = module(x, residual)
            y.square().sum().backward()
            found.append([y, x.grad, residual.grad, *(p.grad for p in block.parameters()), *block.buffers()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_torch_func_runs_the_reference():
    x = random(2, 4, 3, 3)
    value = torch.func.grad(lambda x: functional.norm_gate(x, training=True, activation="silu").square().sum())(x)
    leaf = x.clone().requires_grad_()
    functional.norm_gate(leaf, training=True, activation="silu").square().sum().backward()
    torch.testing.assert_close(value, leaf.grad, rtol=1e-4, atol=1e-5)


def test_forced_reference():
    with fused_attn.backend("reference"):
        y = functional.norm_gate(random(2, 4, 3, 3).requires_grad_(), training=True)
    assert "BatchNorm" in type(y.grad_fn).__name__


SYNCHRONISED = """
import sys
import torch
import torch.distributed as dist
import fused_attn
from fused_attn import functional
from tests.checks import random

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
mine = slice(0, 3) if rank == 0 else slice(3, 5)  # batches of different sizes
for backend in (None, "reference"):
    for activation, post in (("identity", "relu"), ("silu", "identity")):
        found = []
        for group, part in ((dist.group.WORLD, mine), (None, slice(0, 5))):
            x = (random(5, 6, 4, 3, dtype=torch.float64) * 2 + 3).requires_grad_()
            residual = random(5, 6, 4, 3, seed=1, dtype=torch.float64).requires_grad_()
            parameters = [random(6, seed=s, dtype=torch.float64).requires_grad_() for s in (2, 3)]
            running = torch.zeros(6).double(), torch.ones(6).double()
            with fused_attn.backend(backend or "reference") if group is None or backend else torch.enable_grad():
                y = functional.norm_gate(
                    x[part], *parameters, *running, training=True, activation=activation, excitation=torch.sigmoid,
                    residual=residual[part], post_activation=post, group=group,
                )
            y.backward(random(5, 6, 4, 3, seed=4, dtype=torch.float64)[part])
            sums = [p.grad for p in parameters]
            if group is not None:
                for grad in sums:  # each process's own, as SyncBatchNorm's
                    dist.all_reduce(grad)
            y = y if group is not None else y[mine]
            found.append([y, x.grad[mine], residual.grad[mine], *sums, *running])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
dist.destroy_process_group()
"""


@pytest.mark.slow  # two processes
def test_statistics_of_two_processes():
    """Two gloo processes with parts of a batch: outputs, gradients and running statistics of the whole batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", SYNCHRONISED, str(rank), port] for rank in (0, 1)]
    started = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)


ERRORS = {
    "x: expected more than one value a channel in training; got shape (1, 4, 1, 1)": lambda: functional.norm_gate(
        random(1, 4, 1, 1), training=True
    ),
    "running_mean: expected running_mean and running_var where it is not training; got None": lambda: (
        functional.norm_gate(random(2, 4, 3, 3))
    ),
    "save: expected one of all, least; got 'some'": lambda: functional.norm_gate(random(2, 4, 3, 3), save="some"),
    "weight: expected shape (4,); got (3,)": lambda: functional.norm_gate(random(2, 4, 3, 3), random(3), training=True),
    "residual: expected x's shape, (2, 4, 3, 3); got (2, 4, 3, 1)": lambda: functional.norm_gate(
        random(2, 4, 3, 3), training=True, residual=random(2, 4, 3, 1)
    ),
    "excitation: expected it to return (2, 4); got (2, 3)": lambda: functional.norm_gate(
        random(2, 4, 3, 3), training=True, excitation=lambda s: s[:, :3]
    ),
    "activation: expected one of identity, relu, silu, gelu, gelu_tanh, hard_swish, sigmoid, hard_sigmoid, tanh,"
    " leaky_relu, relu6; got 'swish'": lambda: functional.norm_gate(
        random(2, 4, 3, 3), training=True, activation="swish"
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
