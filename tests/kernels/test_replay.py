"""Calls that are replayed compute what the same calls compute as they are written.

Triton's interpreter has no compiled kernels to be replayed; here it stands for one, and gets addresses as such a one
does. What is replayed for a GPU, and how fast, is in test_host.py.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable
from fused_attn.ops.common import KERNELS, OPERATORS, kernel_of
from tests.checks import LAYOUTS, assert_equivalent, cast, in_layout, random
from tests.ops.test_every_op import ALL, gradients_for


@pytest.fixture
def replay(monkeypatch):
    """Replays of this test alone; `runs` counts them."""
    reason = unavailable("triton", "channel_gate", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    from fused_attn.kernels import maps, replay

    class Interpreted(replay.CompiledKernel):
        def __init__(self, kernel: Any, given: dict[str, Any]) -> None:
            self.kernel, self.given, self.module, self._module_pid = kernel, given, None, None
            self.function = self.packed_metadata = None
            self.params = [SimpleNamespace(name=name) for name in inspect.signature(kernel.fn).parameters]
            self.pre_run_hooks: list[Any] = []

        @property
        def run(self):
            return self.launch

        def launch(self, programs, y, z, stream, function, packed, metadata, enter, leave, *values):
            assert (y, z, stream, function, packed, metadata, enter, leave) == (1, 1, 7, *(None,) * 5)
            names = (p.name for p in self.params)
            self.kernel[(programs,)](**{n: tensor_at(self.given[n], v) for n, v in zip(names, values, strict=True)})

    def tensor_at(given: Any, value: Any) -> Any:
        """The tensor whose address a kernel gets in place of one like `given`."""
        if isinstance(given, tuple):
            return tuple(tensor_at(*pair) for pair in zip(given, value, strict=True))
        if not isinstance(given, torch.Tensor):
            assert given is value or given == value
            return value
        assert type(value) is int
        if value == 0:
            return torch.empty(0, dtype=given.dtype)
        bytes_there = (ctypes.c_char * given.element_size()).from_address(value)
        return torch.frombuffer(bytes_there, dtype=given.dtype)

    def launched(kernel, compiled, programs, given, note=replay.launched):
        stands_for = Interpreted(kernel, given)
        note(stands_for, stands_for, programs, given)

    def launch(kernel, on, programs, /, launch=maps.launch, **given):
        with _disable_current_modes():  # the interpreter is made of torch's operators, a compiled kernel of none
            launch(kernel, on, programs, **given)

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 7)
    counted = SimpleNamespace(runs=0, setting=(active, False, ""), module=replay)

    def counting(*given, run=replay._run):
        counted.runs += 1
        return run(*given)

    monkeypatch.setattr(maps, "launch", launch)
    monkeypatch.setattr(replay, "launched", launched)
    monkeypatch.setattr(replay, "_setting", lambda: counted.setting)
    monkeypatch.setattr(replay, "_run", counting)
    for module, names in OPERATORS.items():
        if module not in UNSERVED:
            for name in names:
                monkeypatch.setitem(KERNELS, name, replay.replayed(kernel_of(module, name)))
    with fused_attn.backend("triton"):
        yield counted


def plans_of(name: str) -> list[Any]:
    return list(KERNELS[name].plans.values())


UNSERVED = ("position_attention", "spatial_logits")
OPS = [name for name in ALL if name not in UNSERVED]
CASES = [(name, LAYOUTS[i % 2]) for i, name in enumerate(OPS)]


@pytest.mark.slow  # 20 s in all
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_op(name, layout, replay):
    """Three times, each with other numbers in other places: as it is written, recorded, and replayed."""
    op, kept = ALL[name], []
    function, expected = (op.call(module, "silu", "identity") for module in (functional, reference))
    for i in range(3):
        inputs = {
            k: v if v is None else in_layout(v + 0.01 * i, layout) if v.dim() == 4 else v + 0.01 * i
            for k, v in cast(op.inputs, torch.float32).items()
        }
        grads = [in_layout(g, layout) if g.dim() == 4 else g for g in gradients_for(expected(**inputs))]
        assert_equivalent(function, expected, inputs, grads)
        kept.append((inputs, grads))  # so that no address comes again
    used = {n: plans_of(n) for n in KERNELS if plans_of(n)}
    assert used and all(len(plans) < 6 for plans in used.values())
    assert replay.runs > 0
    assert all(isinstance(p, replay.module._Plan) for plans in used.values() for p in plans if p is not True), used


def gate(x, weights, **options):
    with torch.no_grad():
        return functional.channel_gate(x, *weights, **options)


def weights_of(channels: int) -> list[torch.Tensor]:
    return [random(2, channels), random(2), random(channels, 2, seed=1), random(channels, seed=1)]


def test_a_residual_that_was_the_map_and_is_another(replay):
    """One kind of call: what lay in one place may lie in two the next time."""
    weights = weights_of(4)
    for i in range(6):
        x = random(2, 4, 3, 3, seed=i)
        residual = x if i % 2 else random(2, 4, 3, 3, seed=10 + i)
        expected = reference.channel_gate(x, *weights, residual=residual)
        torch.testing.assert_close(gate(x, weights, residual=residual), expected)
    assert replay.runs == 4 and len(plans_of("channel_gate")) == 1


def test_what_makes_a_call_another_kind(replay):
    """Whatever Triton compiles for, and whatever the function looks at; not the numbers."""
    weights, space = weights_of(4), torch.empty(2 * 4 * 3 * 3 + 4)
    kinds = {
        "as it is": space[4:].view(2, 4, 3, 3),
        "another address modulo 16": space[1:-3].view(2, 4, 3, 3),
        "another shape": random(3, 4, 3, 3),
        "another layout": random(2, 4, 3, 3).to(memory_format=torch.channels_last),
        "no layout": random(2, 4, 3, 6)[..., ::2],
        "another dtype": random(2, 4, 3, 3, dtype=torch.float64),
    }
    for x in kinds.values():
        x.copy_(random(*x.shape))
        for _ in range(3):
            expected = reference.channel_gate(x, *(w.to(x.dtype) for w in weights))
            torch.testing.assert_close(gate(x, [w.to(x.dtype) for w in weights]), expected)
    plans = plans_of("channel_gate")
    assert len(plans) == len(kinds)
    assert replay.runs == len(kinds)
    gate(kinds["as it is"], weights, gate="hard_sigmoid")
    assert len(plans_of("channel_gate")) == len(kinds) + 1


def test_listeners_and_other_settings_are_not_passed_over(replay, monkeypatch):
    """A call runs as it is written where Triton's launches are listened to, or where it would compile anew."""
    x, weights = random(1, 4, 3, 3), weights_of(4)
    for _ in range(3):
        gate(x, weights)
    assert replay.runs == 1
    before = replay.setting
    for other in (None, (before[0], True, ""), (before[0], False, "gsan"), (object(), False, "")):
        replay.setting = other
        gate(x, weights)
        assert replay.runs == 1, other
    replay.setting = before
    (plan,) = plans_of("channel_gate")
    plan.hooks[1].append(lambda *arguments, **options: None)  # of a kernel
    gate(x, weights)
    assert replay.runs == 1
    plan.hooks[1].clear()
    gate(x, weights)
    assert replay.runs == 2


def test_tensors_that_are_more_than_their_numbers(replay):
    class Subclass(torch.Tensor):
        pass

    x, weights = random(1, 4, 3, 3), weights_of(4)
    codes = 0, 0, 0, 1, 5, 0, 0
    for _ in range(3):
        KERNELS["channel_gate"](x.as_subclass(Subclass), *weights, None, None, None, *codes)
    assert not replay.runs and not plans_of("channel_gate")


def test_memory_is_filled_where_torch_is_asked_to(replay):
    """As everywhere under deterministic algorithms; and otherwise not asked for."""
    x, weights = random(1, 4, 3, 3), weights_of(4)
    expected = gate(x, weights)
    for deterministic in (True, False):
        torch.use_deterministic_algorithms(deterministic)
        for _ in range(3):
            assert torch.equal(gate(x, weights), expected)


def test_no_more_kinds_are_kept_than_so_many(replay, monkeypatch):
    monkeypatch.setattr(replay.module, "MOST", 3)
    weights = weights_of(4)
    for height in range(1, 6):
        gate(random(1, 4, height, 3), weights)
    assert len(plans_of("channel_gate")) == 2


def test_threads(replay):
    """Each records for itself; what one has recorded another replays."""
    x, weights, failed = random(1, 4, 3, 3), weights_of(4), []
    expected = gate(x, weights)
    turn = threading.Lock()  # the interpreter runs one launch at a time

    def work():
        for _ in range(3):
            with turn:
                failed.append(not torch.equal(gate(x, weights), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [False] * 9 and replay.runs == 8


def test_inference_tensors(replay):
    """What was recorded in inference mode serves training, and the other way round."""
    x, weights = random(1, 4, 3, 3), weights_of(4)
    for _ in range(3):
        with torch.inference_mode():
            assert functional.channel_gate(x, *weights).is_inference()
    leaf = x.clone().requires_grad_()
    functional.channel_gate(leaf, *weights).sum().backward()
    assert replay.runs == 2 and leaf.grad is not None


@pytest.mark.slow  # 10 s
def test_compiled_functions(replay):
    """torch.compile's programs call the same operators; a batch of their own is a kind of its own."""
    weights = weights_of(4)
    function = torch.compile(
        lambda x, *w: functional.channel_gate(x, *w, residual=x), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for i in range(6):
        leaves = [t.clone().requires_grad_() for t in (random(2 + i % 2, 4, 3, 5, seed=i), *weights)]
        x, *given = leaves
        found = torch.autograd.grad(function(x, *given).square().sum(), leaves)
        expected = torch.autograd.grad(reference.channel_gate(x, *given, residual=x).square().sum(), leaves)
        torch.testing.assert_close(found, expected)
    assert replay.runs == 4  # the third of each batch, forward and backward
