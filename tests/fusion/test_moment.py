"""What holds at the moment of `fuse` (modes, defaults, a profiler, other threads, what was seen before) decides nothing
about the blocks, and is as it was afterwards."""

from __future__ import annotations

import contextlib
import copy
import cProfile
import gc
import io
import pstats
import random as python_random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import explain, fuse, reference, unfuse
from tests.checks import random, randomised
from tests.fusion.counting import said_to_run_fused

X = random(2, 8, 6, 5, dtype=torch.float64)


def block_class() -> type[nn.Module]:
    """A class that was never seen before."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())

        def forward(self, x):
            return x * self.fc(F.adaptive_avg_pool2d(x, 1))

    return Block


class ChannelMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False))

    def forward(self, x):
        return torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))


class SpatialMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)))


def parent_class() -> type[nn.Module]:
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.ca, self.sa = nn.Conv2d(8, 8, 3, padding=1), ChannelMask(), SpatialMask()

        def forward(self, x):
            y = self.conv(x)
            y = self.ca(y) * y
            return self.sa(y) * y + x

    return Parent


CLASSES = {"block": block_class, "parent": parent_class}


class Plain(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def profiled():
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()


@contextlib.contextmanager
def traced(setter: Callable[[Any], None]):
    setter(lambda *_: None)
    try:
        yield
    finally:
        setter(None)


MOMENTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device meta": lambda: torch.device("meta"),
    "dtype float64": lambda: default_dtype(torch.float64),
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "reference": lambda: fused_attn.backend("reference"),
    "triton": lambda: fused_attn.backend("triton"),
    "cProfile": profiled,
    "setprofile": lambda: traced(sys.setprofile),
    "torch's profiler": torch.profiler.profile,
    "dispatch mode": Plain,
    "anomaly": torch.autograd.detect_anomaly,
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "dual level": torch.autograd.forward_ad.dual_level,
    "no threads": lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_moment_of_fuse_decides_nothing(moment, kind):
    cls = CLASSES[kind]()
    original = randomised(cls())
    model = copy.deepcopy(original)
    with MOMENTS[moment]():
        fuse(model)
    later = fuse(randomised(cls()))
    for fused in (model, later):
        assert said_to_run_fused(fused) >= 1, explain(fused)
        x = X.clone().requires_grad_()
        y = fused(x)
        torch.testing.assert_close(y, original(x), rtol=1e-9, atol=1e-9)
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("moment", ["inference_mode", "device meta", "dtype float64", "autocast"])
def test_built_and_fused_at_the_same_moment(moment):
    cls = block_class()
    with MOMENTS[moment]():
        assert said_to_run_fused(fuse(cls())) == 1
    assert said_to_run_fused(fuse(cls())) == 1


def test_the_profile_of_a_script_goes_on():
    def marker():
        return 0

    profile = cProfile.Profile()
    profile.enable()
    model = fuse(block_class()())
    marker()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).print_stats("marker")
    assert "(marker)" in text.getvalue() and said_to_run_fused(model) == 1


def test_nothing_of_the_process_is_left_changed():
    def state():
        return (
            nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, torch.Tensor.__torch_function__,
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            torch.get_default_device(), sys.getprofile(), sys.gettrace(), sys.stdout, sys.stderr, sys.displayhook,
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), threading.active_count(),
            sys.getrecursionlimit(), dict(torch.nn.modules.module._global_forward_hooks),
        )  # fmt: skip

    before = state()
    fuse(nn.Sequential(block_class()(), parent_class()(), reference.CBAM(8, reduction=2)))
    assert state() == before


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), python_random.getstate()


BUILT = {
    "block": lambda: block_class()(),
    "parent": lambda: parent_class()(),
    "cbam": lambda: reference.CBAM(8, reduction=2),
    "coordinate": lambda: reference.CoordinateAttention(8),
    "sk": lambda: reference.SKConv(8, groups=4),
}


@pytest.mark.parametrize("kind", BUILT)
def test_random_states_stay(kind):
    model = BUILT[kind]()
    x = random(2, 8, 6, 5)
    before = random_states()
    for step in (fuse, lambda m: m(x), copy.deepcopy, explain, lambda m: fuse(m, tails=True), unfuse):
        step(model)
        assert random_states() == before


def test_nothing_is_printed_or_warned(capfd, recwarn):
    fuse(nn.Sequential(block_class()(), parent_class()()))
    assert capfd.readouterr() == ("", "") and not recwarn.list


# What was seen before


def redefined(source: str) -> type[nn.Module]:
    """A class as a cell of a notebook makes it."""
    space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": "__main__"}
    exec(source, space)
    return space["Block"]


CELL = """
def gate(y):
    return {gate}

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
    def forward(self, x):
        return x * gate(self.b(torch.relu(self.a(x.mean((2, 3), keepdim=True))))){after}
"""


@pytest.mark.parametrize("after", ["", " + x", " * 2", " if x.dtype is torch.float32 else x * 3"])
def test_a_cell_that_is_run_again(after):
    for gate in ("torch.sigmoid(y)", "torch.tanh(y)", "torch.sigmoid(y) * 1.5"):
        block = randomised(redefined(CELL.format(gate=gate, after=after))())
        for dtype in (torch.float32, torch.float64):
            original = block.to(dtype)
            model, x = fuse(copy.deepcopy(original)), X.to(dtype)
            torch.testing.assert_close(model(x), original(x))


def test_a_helper_defined_anew_in_the_same_namespace():
    space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": "__main__"}
    exec(CELL.format(gate="torch.sigmoid(y)", after=""), space)
    old = fuse(randomised(space["Block"]()))
    assert said_to_run_fused(old) == 1
    space["gate"] = lambda y: torch.tanh(y)
    new = randomised(space["Block"]())
    for block in (old, fuse(copy.deepcopy(new))):
        torch.testing.assert_close(block(X), new(X), rtol=1e-9, atol=1e-9)
    assert said_to_run_fused(old) == 0


def test_what_is_refused_for_the_moment_is_asked_again():
    """Layers that get their sizes from the first map."""

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.LazyLinear(4), nn.LazyLinear(8)

        def forward(self, x):
            return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))[:, :, None, None]

    original = Lazy()
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) == 0
    x = random(2, 8, 6, 5)
    original(x), model(x)
    model.load_state_dict(original.state_dict())
    assert said_to_run_fused(fuse(model)) == 1
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("kind", BUILT)
def test_models_and_classes_are_freed(kind):
    model = BUILT[kind]()
    held = type("Held", (), {})()
    model.config = held
    model.forward  # noqa: B018
    fuse(model)
    model(random(2, 8, 6, 5)).sum().backward()
    explain(model)
    copied = copy.deepcopy(model)
    references = [weakref.ref(model), weakref.ref(held), weakref.ref(copied), *map(weakref.ref, model.parameters())]
    if kind in ("block", "parent"):
        references.append(weakref.ref(type(model)))
        references += [weakref.ref(c) for c in type(model).__mro__ if "<locals>" in c.__qualname__]
    del model, copied, held
    gc.collect()
    left = [r() for r in references if r() is not None]
    assert not left, [type(x) for x in left]


def test_a_model_without_cycles_is_freed_at_once():
    """So that a card's memory is free as soon as the last name of a model is gone."""
    model = block_class()()
    fuse(model)
    reference_ = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference_() is None
    finally:
        gc.enable()


# Threads


def run_all(*functions: Callable[[], None]) -> None:
    """Each in a thread; raises what one raised."""
    errors: list[BaseException] = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", CLASSES)
def test_fuse_beside_inference(kind):
    original = randomised(CLASSES[kind]()())
    model = fuse(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(X)
    done = threading.Event()

    def infer():
        while not done.is_set():
            with torch.inference_mode():
                torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)

    def change():
        try:
            for _ in range(6):
                other = fuse(CLASSES[kind]()())
                assert said_to_run_fused(other) >= 1, explain(other)
                copy.deepcopy(model), explain(model), unfuse(other)
        finally:
            done.set()

    run_all(infer, infer, change)


@pytest.mark.parametrize("kind", CLASSES)
def test_fuse_beside_fuse(kind):
    cls = CLASSES[kind]()
    original = randomised(cls())
    with torch.no_grad():
        expected = original(X)

    def once():
        for make in (cls, CLASSES[kind]()):
            model = make()
            model.double().load_state_dict(original.state_dict())
            fuse(model)
            assert said_to_run_fused(model) >= 1, explain(model)
            with torch.no_grad():
                torch.testing.assert_close(model(X), expected, rtol=1e-9, atol=1e-9)

    run_all(*[once] * 4)


def test_one_model_fused_by_two_threads():
    original = randomised(nn.Sequential(*(block_class()() for _ in range(4))))
    model = copy.deepcopy(original)
    run_all(*[lambda: fuse(model)] * 3)
    assert said_to_run_fused(model) == 4
    torch.testing.assert_close(model(X), original(X), rtol=1e-9, atol=1e-9)


def test_fused_in_a_thread_used_in_another():
    original = randomised(block_class()())
    model = copy.deepcopy(original)
    run_all(lambda: fuse(model))
    assert said_to_run_fused(model) == 1

    def train():
        with torch.enable_grad():
            model(X).sum().backward()

    run_all(train, train)
    torch.testing.assert_close(model(X), original(X), rtol=1e-9, atol=1e-9)


class Warns(block_class()):
    """`dropout2d` warns where its input is no map."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout2d(0.1)

    def forward(self, x):
        gate = self.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1)
        return x * self.dropout(gate)[:, :, None, None]


class OfTwo(nn.Module):
    """Takes two maps in a dictionary, which every trial with one map finds out by an error."""

    def __init__(self):
        super().__init__()
        self.low, self.block = nn.Conv2d(8, 8, 1), block_class()()

    def forward(self, maps):
        return self.low(maps["low"]) + self.block(maps["high"])


@pytest.mark.parametrize("action", ["error", "always"])
def test_warnings_of_what_is_tried(action):
    """They are nobody's, whether they are errors or not; filters are as they were."""
    model = nn.ModuleList([Warns(), OfTwo()]).double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        before = list(warnings.filters)
        fused = fuse(copy.deepcopy(model))
        count = said_to_run_fused(fused)
        assert list(warnings.filters) == before
    assert not said
    assert count == 2
