"""What a call on a small map costs, counted and not timed, and that it is the same function."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn.nn
from fused_attn import backend, backends, functional, fuse, keep_operators, reference
from fused_attn.bench import calls
from fused_attn.nn.normalised import affine_of
from fused_attn.ops.common import fresh_memory_by_torch
from tests.checks import random, randomised
from tests.ops.test_autograd import Marked

needs_operators = pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason="no native library on this machine")

#: Those of which small maps run as plain PyTorch, in forward and backward.
EAGER = {
    *("SCSE", "BAM", "CoordinateAttention", "EMA", "DoubleAttention", "ExternalAttention", "BilinearTransform"),
    *("BilinearAttention", "GSoP", "norm_gate"),
}


@pytest.fixture(autouse=True)
def small_maps_run_as_for_users(monkeypatch) -> None:
    monkeypatch.setattr(backends._Small, "most", 1 << 14)


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def fused(self) -> list[str]:
        return [name for name in self.names if name.startswith("fused_attn")]


def maps(name: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    return [random(batch, *calls.SHAPE[1:], seed=i, dtype=dtype) for i in range(1 + (name in calls.TWO_MAPS))]


def step(block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)  # of dropout
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = block(*leaves)
    return [y, *torch.autograd.grad(y, [*leaves, *block.parameters()], random(*y.shape, seed=9, dtype=y.dtype))]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    found = calls.pair(name)
    if found is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    eager, ours = (block.double() for block in found)
    randomised(eager)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def test_every_block_is_measured():
    assert {name.partition(" ")[0] for name in calls.OWN} >= set(fused_attn.nn.__all__)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", calls.NAMES)
def test_is_the_same_function(name, training):
    eager, ours = (block.train(training) for block in pair(name))
    inputs = maps(name, torch.float64)
    for mine, theirs in zip(step(ours, inputs), step(eager, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    for mine, theirs in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*inputs), eager.eval()(*inputs), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", calls.OWN)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_results_lie_as_the_map_does(name, batch):
    """Of no sample, too, where eager has a result of none."""
    eager, ours = (block.eval() for block in pair(name))
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in maps(name, torch.float64, batch)]
    plain = [t.contiguous() for t in inputs]
    try:
        expected = eager(*plain)
    except (RuntimeError, ValueError):
        return
    for given in (inputs, plain):
        found = ours(*given)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        if found.shape == given[0].shape and batch > 1 and name != "EMA":  # which makes groups of its channels
            assert found.stride() == given[0].stride()


#: More operators than eager has, in forward or with backward, and how many.
MORE = {
    "SpatialTransformer": (0, 1),
    "ChannelSelfAttention": (2, 0),
    "NonLocal concatenation": (1, 1),
}


@needs_operators
@pytest.mark.parametrize("name", calls.NAMES)
def test_no_more_operators_than_eager(name):
    """Each is a call from Python or from autograd, and most of a small map's time."""
    found = calls.pair(name)
    if found is None:
        pytest.skip(f"{name.partition('.')[0]} is not installed")
    counts: list[tuple[int, int]] = []
    fused: list[list[str]] = []
    for block in found:
        inputs = maps(name)
        with torch.no_grad(), Dispatched() as forward:
            block.eval()(*inputs)
        with Dispatched() as both:
            step(block.train(), inputs)
        counts.append((len(forward.names), len(both.names)))
        fused.append([*forward.fused, *both.fused])
    eager, ours = counts
    more = MORE.get(name, (0, 0))
    assert ours[0] <= eager[0] + more[0] and ours[1] <= eager[1] + more[1], (eager, ours)
    assert not fused[0]
    if name.partition(" ")[0] in EAGER:
        assert not fused[1]


def python_calls(call: Callable[[], object]) -> int:
    """How many functions, in Python and in C, one call of it enters."""
    count = 0

    def see(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for _ in range(3):
        call()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


#: Calls from Python beside eager's, of blocks that run eager's code on small maps.
TO_SEE_THAT_IT_IS_SMALL = 12


@pytest.mark.parametrize("name", sorted(EAGER - {"norm_gate"}))
def test_a_small_map_is_seen_at_once(name):
    counts = []
    for block in calls.pair(name) or ():
        counts.append(python_calls(functools.partial(block.eval(), *maps(name))))
    eager, ours = counts
    nested = name.startswith("BilinearAttention")  # and the transform inside it
    assert ours <= eager + TO_SEE_THAT_IT_IS_SMALL * (1 + nested), counts


#: Of one call under no_grad: what it may grow to.
MOST_CALLS = {
    "SqueezeExcite": 130,
    "ECA": 110,
    "SimAM": 60,
    "ChannelAttention": 130,
    "CBAM": 350,
    "norm_gate without a gate": 100,
}


@needs_operators
@pytest.mark.parametrize("name", MOST_CALLS)
def test_calls_of_a_fused_block(name):
    _, ours = calls.pair(name)  # type: ignore[misc]
    inputs = maps(name)
    with torch.no_grad():
        count = python_calls(lambda: ours.eval()(*inputs))
    assert count <= MOST_CALLS[name]


SCSE = fused_attn.nn.SCSE


def is_fused(block: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    with Dispatched() as seen:
        block(x)
    return bool(seen.fused)


@needs_operators
def test_what_is_small():
    block, x = SCSE(16), maps("SCSE")[0]
    assert not is_fused(block, x)
    assert is_fused(block, random(4, 16, 10, 10))
    assert is_fused(block, x.contiguous(memory_format=torch.channels_last))
    assert is_fused(block.bfloat16(), x.bfloat16())
    block.float()
    with backend("cpu"):
        assert is_fused(block, x)
    with backends.small_as_large():
        assert is_fused(block, x)
    assert not is_fused(block, x)
    assert not backends.is_small(x.to("meta")) and not backends.is_small(x.as_subclass(Marked))
    assert not backends.is_small(torch.zeros(2, 16, 7, 7, dtype=torch.int32)) and not backends.is_small(None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not backends.is_small(x)


@needs_operators
def test_programs_are_for_maps_of_any_size():
    block, x = SCSE(16).eval(), maps("SCSE")[0]
    with keep_operators():
        program = torch.export.export(block, (x,))
    assert any("fused_attn" in str(node.target) for node in program.graph.nodes)
    seen: list[str] = []

    def backend_that_looks(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(block, backend=backend_that_looks, fullgraph=True)(x)
    assert any("fused_attn" in name for name in seen)
    traced = torch.jit.trace(block, x, check_trace=False)
    large = random(2, 16, 20, 20)
    torch.testing.assert_close(traced(large), block(large))


def test_what_is_derived_is_not_passed_by():
    """Nor are hooks and parametrisations of what is inside."""

    class Doubled(SCSE):
        def _squeeze(self, x):  # type: ignore[override]
            return 2 * functional.squeeze(x)

    torch.manual_seed(0)
    block, x = SCSE(16), maps("SCSE")[0]
    derived = Doubled(16)
    derived.load_state_dict(block.state_dict())
    assert not torch.allclose(derived(x), block(x))
    called: list[int] = []
    handle = block.register_forward_hook(lambda *_: called.append(1))
    block(x)
    handle.remove()
    assert called == [1]
    expected = block(x)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(block.sSE["0"], "weight", Double())
    assert not torch.allclose(block(x), expected)
    again = reference.SCSE(16)
    again.load_state_dict({**derived.state_dict(), "sSE.0.weight": 2 * derived.state_dict()["sSE.0.weight"]})
    torch.testing.assert_close(block(x), again(x))


def laid_out(x: Tensor) -> Iterator[Tensor]:
    """As a map may lie of which the gradients may come to one sample: the strides of its first axis mean nothing."""
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, x.shape[2:])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "silu"},
        {"post_activation": "relu"},
        {"excitation": torch.sigmoid},
        {"residual": random(1, 16, 7, 7)},
        {"residual": random(1, 16, 7, 7), "post_activation": "relu"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_gradients_of_one_sample(training, options):
    """torch 2.13's BatchNorm has wrong ones where they lie otherwise than the map."""
    x, grad = (random(1, 16, 7, 7, seed=i) for i in range(2))
    parameters = [random(16, seed=i).abs() for i in range(4)]
    found = []
    for of_x in laid_out(x):
        for of_grad in laid_out(grad):
            leaves = [t.clone().requires_grad_() for t in parameters[:2]]
            leaf = of_x.clone(memory_format=torch.preserve_format).requires_grad_()
            statistics = [t.clone() for t in parameters[2:]]
            y = functional.norm_gate(leaf, *leaves, *statistics, training=training, **options)
            found.append(torch.autograd.grad(y, [leaf, *leaves], of_grad))
    for one in found[1:]:
        for mine, first in zip(one, found[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-4, atol=1e-4)


CHANGES: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "in place": lambda norm: norm.weight.detach().mul_(2),
    "in the data, which no version counts": lambda norm: norm.weight.data.mul_(2),
    "other data": lambda norm: setattr(norm.bias, "data", norm.bias.data + 1),
    "another parameter": lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight.detach() + 1)),
    "loaded": lambda norm: norm.load_state_dict({k: v + 1 for k, v in norm.state_dict().items()}),
    "statistics in place": lambda norm: norm.running_var.mul_(3),  # type: ignore[union-attr]
    "another buffer": lambda norm: setattr(norm, "running_mean", norm.running_mean + 1),  # type: ignore[operator]
    "by numpy": lambda norm: norm.weight.detach().numpy().__imul__(2),
    "eps": lambda norm: setattr(norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_folded_coefficients_are_never_stale(change):
    eager = reference.SpatialAttention(16).eval()
    ours = fused_attn.nn.SpatialAttention(16).eval()
    x = maps("SpatialAttention")[0]
    ours.load_state_dict(eager.state_dict())
    with torch.no_grad():
        for block in (eager, ours):
            before = block(x)
            CHANGES[change](block.conv["bn"])  # type: ignore[index]
            after = block(x)
            assert not torch.equal(before, after)
        torch.testing.assert_close(ours(x), eager(x))
        other = copy.deepcopy(ours)
        other.conv["bn"].weight.data.mul_(-1)  # type: ignore[index, union-attr]
        assert not torch.equal(other(x), ours(x))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), eager(x))
    swapped = {"conv.bn.weight": torch.full((1,), 5.0)}
    found = [torch.func.functional_call(block, swapped, (x,)) for block in (ours, eager)]
    torch.testing.assert_close(*found)


@needs_operators
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_coefficients_are_one_operator(dtype, affine):
    norm = randomised(nn.BatchNorm2d(7, affine=affine)).to(dtype).eval()
    with torch.no_grad(), Dispatched() as seen:
        found = affine_of(norm)
    assert [name.split(".")[1] for name in seen.fused] == ["norm_running"]
    for mine, theirs in zip(found, reference.block_attention.affine_of(norm), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    if affine:  # with gradients they are plain PyTorch's
        factor, _ = affine_of(norm)
        assert torch.autograd.grad(factor.sum(), norm.weight)[0].shape == (7,)
    wrong = torch.zeros(3, dtype=dtype)
    with pytest.raises(RuntimeError, match="expected as many values in each"):
        torch.ops.fused_attn.norm_running.cpu(wrong, None, norm.running_mean, norm.running_var, 0.1)


def test_a_fused_block_runs_fused_on_small_maps():
    """What explain calls fused is, though it is several operators."""
    assert is_fused(fuse(reference.SCSE(16)).eval(), maps("SCSE")[0])


@needs_operators
def test_tensors_that_a_transform_left_behind():
    """They are what they were inside, without the transform."""
    left: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        left.append(x * 1)
        return x.sum()

    block, x = fused_attn.nn.SqueezeExcite(16, hidden=4), maps("SqueezeExcite")[0]
    torch.func.grad(keep)(x)
    (dead,) = left
    found = block(dead)
    torch.testing.assert_close(found, block(x))
    for mine, theirs in zip(
        *(torch.autograd.grad(y.sum(), [*block.parameters()]) for y in (found, block(x))), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@needs_operators
def test_fresh_memory_may_be_torchs():
    assert fresh_memory_by_torch(True)  # as the tests have it
    assert fresh_memory_by_torch(False) and not fresh_memory_by_torch(True)
    x = random(2, 1, 3, 5).as_strided((2, 1, 3, 5), (15, 7, 5, 1))
    fresh_memory_by_torch(False)
    try:
        for of_x in (x, x.contiguous(memory_format=torch.channels_last), x[:0], random(2, 3, 4)):
            assert functional.simam(of_x).stride() == torch.empty_like(of_x).stride()
    finally:
        fresh_memory_by_torch(True)
