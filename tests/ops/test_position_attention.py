"""position_attention against its reference: forward and gradients, on the backend that serves this machine's CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_attn import functional, reference
from fused_attn.backends import backend, choose
from fused_attn.ops.position_attention import BACKWARD, FORWARD
from tests.checks import LAYOUTS, assert_equivalent, gradcheck, in_layout, random
from tests.ops.test_channel_gate import STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: Batch, width of query and key, width of the value, space of the query, space of the keys: blocks end in the middle,
#: begin anew, and are smaller than a vector.
SHAPES = (
    (2, 8, 24, (5, 7), (5, 7)),
    (1, 3, 5, (13, 11), (2, 9)),
    (2, 16, 33, (20, 21), (20, 21)),
    (3, 1, 1, (1,), (1,)),
    (2, 40, 70, (17, 13), (31, 20)),
    (1, 20, 10, (130,), (390,)),
    (2, 4, 6, (3, 4, 5), (2, 3, 4)),
    (1, 2, 200, (7, 28), (1, 2)),
)
needs_operators = pytest.mark.skipif(
    choose("position_attention", torch.empty(2, 4, 3, 3)) == "reference",
    reason="no native library on this machine, or the reference was asked for: nothing here is an operator",
)


def inputs_of(shape: tuple, dtype: torch.dtype = torch.float32, layout: str = "nchw") -> dict[str, Tensor]:
    batch, width, out, space, other = shape
    sizes = {"query": (width, *space), "key": (width, *other), "value": (out, *other)}
    maps = {name: random(batch, *size, seed=i, dtype=dtype) for i, (name, size) in enumerate(sizes.items())}
    return {name: in_layout(x, layout) for name, x in maps.items()}


def check(inputs: dict[str, Tensor], grad: Tensor | None = None, scale: float = 0.3) -> None:
    query, value = inputs["query"], inputs["value"]
    shape = value.shape[0], value.shape[1], *query.shape[2:]
    grad = random(*shape, seed=9, dtype=value.dtype) if grad is None else grad
    assert_equivalent(
        lambda **t: functional.position_attention(**t, scale=scale),
        lambda **t: reference.position_attention(**t, scale=scale),
        inputs,
        [grad],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, layout):
    inputs = inputs_of(shape, dtype, layout)
    check(inputs)
    if shape[3] == shape[4]:
        out = functional.position_attention(**inputs)
        assert out.stride() == inputs["value"].stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_another_layout_of_one(of, layout):
    inputs = inputs_of(SHAPES[2])
    inputs[of] = in_layout(inputs[of], "nchw" if layout == "channels_last" else "channels_last")
    check(inputs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.0, 30.0])
def test_scales(scale):
    """Large ones leave one key for a query, whose softmax keeps its digits."""
    check(inputs_of(SHAPES[0], torch.float64), scale=scale)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["query", "key", "value", "grad"])
def test_strides(of, strides):
    inputs = inputs_of((2, 12, 12, (6, 7), (6, 7)))
    other = strided(random(2, 12, 6, 7, seed=3))[strides]
    if of == "grad":
        check(inputs, other)
    else:
        check({**inputs, of: other})


@pytest.mark.parametrize("sizes", [(0, 6, 3, 3), (2, 0, 3, 3), (2, 6, 0, 3), (2, 6, 3, 0)])
def test_empty(sizes):
    batch, channels, rows, key_rows = sizes
    check(inputs_of((batch, 4, channels, (rows, 4), (key_rows, 4)), torch.float64))


def test_no_width_is_a_mean():
    inputs = inputs_of((2, 1, 6, (3, 4), (5, 2)), torch.float64)
    inputs["query"] = inputs["query"] * 0
    expected = inputs["value"].mean((2, 3), keepdim=True).expand(2, 6, 3, 4)
    torch.testing.assert_close(functional.position_attention(**inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["query", "key", "value"])
def test_special_values(of, value, dtype):
    inputs = inputs_of((2, 4, 6, (9, 11), (9, 11)), dtype)
    inputs[of][1, 1, 2, 3] = value
    out, expected = functional.position_attention(**inputs), reference.position_attention(**inputs)
    close = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out, expected, rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    gradcheck(lambda **t: functional.position_attention(**t, scale=0.7), inputs_of(SHAPES[1], torch.float64, layout))


def test_second_derivatives():
    inputs = inputs_of((1, 2, 3, (2, 3), (3, 2)), torch.float64)
    gradcheck(lambda **t: functional.position_attention(**t, scale=0.7), inputs, twice=True)
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = functional.position_attention(*leaves, scale=0.7).square().sum()
    first = [torch.autograd.grad(y, leaves, create_graph=again, retain_graph=True) for again in (False, True)]
    torch.testing.assert_close(*first)  # those that are differentiated again are the same


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_to_the_bit(dtype):
    inputs = {k: v.requires_grad_() for k, v in inputs_of((2, 16, 33, (40, 21), (40, 21)), dtype).items()}
    runs = []
    for _ in range(2):
        out = functional.position_attention(**inputs)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_number_of_threads_gives_the_same_bits(dtype):
    inputs = inputs_of((1, 16, 33, (40, 21), (40, 21)), dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(functional.position_attention(**inputs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_add_up_to_one(dtype):
    """Of values that are all 1 the mean is, whatever terms the probabilities are rounded to."""
    inputs = inputs_of(SHAPES[4], dtype)
    out = functional.position_attention(**{**inputs, "value": torch.ones_like(inputs["value"])})
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2 * torch.finfo(dtype).eps, atol=0)


@needs_operators
def test_what_is_kept():
    """The inputs, the result and two numbers a position: no matrix of pairs."""
    inputs = {k: v.requires_grad_() for k, v in inputs_of((2, 8, 16, (12, 10), (12, 10))).items()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = functional.position_attention(**inputs)
    assert sum(kept.values()) == sum(t.numel() for t in inputs.values()) + out.numel() + 2 * 2 * 120


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_matrix_of_pairs_is_written(dtype):
    """Forward and backward at 80 x 80 positions, whose matrix would be 156 or 78 MiB."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        pytest.skip("no peak of the resident memory that can be set back")

    def resident(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1]) / 1024

    inputs = {k: v.requires_grad_() for k, v in inputs_of((1, 8, 16, (80, 80), (80, 80)), dtype).items()}
    grad = random(1, 16, 80, 80, dtype=dtype)
    clear.write_text("5")
    before = resident("VmRSS")
    torch.autograd.grad(functional.position_attention(**inputs), list(inputs.values()), grad)
    assert resident("VmHWM") - before < 24


MEMORY = """
import resource, torch
from fused_attn import functional
torch.set_num_threads(1)
def run(side):
    q, k, v = (torch.randn(1, c, side, side, requires_grad=True) for c in (8, 8, 16))
    functional.position_attention(q, k, v).square().sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = run(8)
print(run({side}) - small)
"""


@needs_operators
@pytest.mark.slow
def test_memory_is_linear_in_positions():
    """A matrix of pairs would be 64 MiB at 64 x 64, and 1 GiB at 128 x 128."""
    used = {}
    for side in (64, 128):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY.format(side=side)], capture_output=True, text=True, check=True
        )
        used[side] = float(done.stdout)
    assert used[64] < 16 and used[128] < 4 * 16, used


@needs_operators
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_fake_kernels(shape, layout):
    inputs = inputs_of(shape, layout=layout)
    (batch, _, height, width), values = inputs["query"].shape, inputs["value"].shape[1]
    out, state = random(batch, values, height, width), random(batch, 2, height * width)
    for op, arguments in (
        (FORWARD["cpu"], (*inputs.values(), 0.5)),
        (BACKWARD["cpu"], (out, *inputs.values(), out, state, 0.5)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_operators
def test_compiles_in_one_graph():
    inputs = {k: v.requires_grad_() for k, v in inputs_of(SHAPES[0]).items()}
    compiled = torch.compile(functional.position_attention, fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.25, 0.125):  # the second makes it a symbol
        out, expected = compiled(**inputs, scale=scale), functional.position_attention(**inputs, scale=scale)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), list(inputs.values())) for y in (out, expected)]
        torch.testing.assert_close(*grads)


@pytest.fixture
def by_torch(monkeypatch):
    """What a GPU does, on this machine's CPU: no backend of ours serves, and torch's attention does."""
    calls = []

    def counted(*inputs, **options):
        calls.append(inputs)
        return attention(*inputs, **options)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(functional, "_WITH_TORCHS_ATTENTION", {"cpu"})
    monkeypatch.setattr(functional, "choose", lambda *_: "reference")
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_attention(shape, dtype, layout, by_torch):
    inputs = inputs_of(shape, dtype, layout)
    check(inputs)
    assert by_torch
    y = functional.position_attention(**inputs, scale=0.3)
    if inputs["value"].shape[2:] == y.shape[2:]:
        assert y.stride() == torch.empty_like(inputs["value"]).stride()
    assert functional.position_attention(**{k: t.requires_grad_() for k, t in inputs.items()}).grad_fn is not None


def test_torchs_attention_is_differentiated_twice(by_torch):
    inputs = {k: t.double() for k, t in inputs_of((2, 3, 4, (3, 4), (3, 4))).items()}
    gradcheck(functional.position_attention, inputs, twice=True)
    leaves = [t.requires_grad_() for t in inputs.values()]
    for graph, called in ((False, 2), (True, 1)):  # a GPU's kernels have no second derivative: the formula's has
        by_torch.clear()
        y = functional.position_attention(*leaves)
        torch.autograd.grad(y.sum(), leaves, create_graph=graph)
        assert len(by_torch) == called
    y = checkpoint(functional.position_attention, *leaves, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), leaves)
    expected = torch.autograd.grad(reference.position_attention(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, expected)
    grads = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    y, exact = functional.position_attention(*leaves), reference.position_attention(*leaves)
    found, expected = (torch.autograd.grad(v, leaves, grads, is_grads_batched=True) for v in (y, exact))
    torch.testing.assert_close(found, expected)


def test_torchs_attention_under_autocast_and_of_nothing(by_torch):
    inputs = inputs_of((2, 8, 24, (5, 7), (5, 7)))
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.position_attention(**inputs)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference.position_attention(**inputs), rtol=0.05, atol=0.05)
    by_torch.clear()
    assert functional.position_attention(**{k: t[:0] for k, t in inputs.items()}).shape == (0, 24, 5, 7)
    with backend("reference"):
        functional.position_attention(**inputs)
    assert not by_torch  # nothing to attend to, and the formula itself was asked for


def test_torchs_attention_compiles_in_one_graph(by_torch):
    torch._dynamo.reset()
    compiled = torch.compile(functional.position_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for side in (5, 8):
        leaves = [t.requires_grad_() for t in inputs_of((2, 8, 24, (side, 7), (side, 7))).values()]
        y, exact = compiled(*leaves), reference.position_attention(*leaves)
        torch.testing.assert_close(y, exact)
        found, expected = (torch.autograd.grad(v.square().sum(), leaves) for v in (y, exact))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
