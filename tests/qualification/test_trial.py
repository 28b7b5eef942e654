"""Calls as plain data, made again, judged and timed: every op's kernels here pass, and what is faster is decided."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import types

import pytest
import torch

from fused_attn import backends, functional, fuse, nn, reference, timing
from fused_attn.qualification import calls, trial
from fused_attn.qualification.calls import call_as_json, call_from_json, calls_on, seen, typical_calls
from fused_attn.qualification.trial import Judge, check_itself, check_odd, is_faster, make, nan_in_fresh_memory
from tests.checks import LAYOUTS, cast, in_layout, random
from tests.ops.test_every_op import ALL

CPU = torch.device("cpu")


def calls_of(name: str, dtype: torch.dtype, layout: str = "nchw"):
    """What a call of an op, as the tests of all ops make it, is seen as; with the tensors that it was given."""
    op = ALL[name]
    inputs = {k: in_layout(v, layout) if v.dim() == 4 else v for k, v in cast(op.inputs, dtype).items()}
    with seen() as found, torch.no_grad():
        op.call(functional, "silu", "relu")(**inputs)
    return found, inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_a_call_is_made_again_from_json(name, layout):
    """With tensors of the same sizes, dtypes and layouts, and the same options."""
    found, inputs = calls_of(name, torch.float32, layout)
    assert len(found) == 1
    call = call_from_json(json.loads(json.dumps(call_as_json(found[0]))))
    assert call == found[0]
    with seen() as again, torch.no_grad():
        y = make(call, CPU).apply(functional)(**make(call, CPU).tensors)
    assert again == found
    assert all(t.isfinite().all() for t in (y if isinstance(y, tuple) else (y,)))
    made = [t.shape for t in make(call, CPU).tensors.values() if t.dim() == 4]
    assert made == [t.shape for t in inputs.values() if t.dim() == 4]


@pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_what_is_right_passes(name, dtype):
    """The processor's kernels: of what is right none is to be called wrong."""
    for call in calls_of(name, dtype)[0]:
        with backends.backend("cpu"), nan_in_fresh_memory():
            for training in (False, True):
                check_odd(call, training, CPU)
                check_itself(call, training, CPU)


def test_calls_of_other_threads_are_not_seen():
    x = random(2, 4, 3, 3)
    thread = threading.Thread(target=lambda: functional.simam(x))
    with seen() as found:
        thread.start()
        thread.join()
        functional.squeeze(x)
    functional.simam(x)
    assert [call.function for call in found] == ["squeeze"]


def test_a_profiler_goes_on_afterwards():
    def profile(*_):
        pass

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        with pytest.raises(ZeroDivisionError), seen():
            raise ZeroDivisionError
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(before)


def test_one_call_of_a_question_and_class():
    with seen() as found:
        for sizes in ((2, 4, 3, 3), (2, 4, 3, 3), (2, 4, 2, 4), (2, 4, 9, 9)):
            functional.simam(random(*sizes))
    assert [call.sizes for call in found] == [(2, 4, 3, 3), (2, 4, 2, 4), (2, 4, 9, 9)]


def test_what_is_not_plain_is_no_call():
    """A subclass, an empty map, a transform."""

    class Named(torch.Tensor):
        pass

    x = random(2, 4, 3, 3)
    with seen() as found:
        functional.simam(x.as_subclass(Named))
        functional.simam(x[:0])
        torch.func.vmap(functional.simam)(x[None])
    assert found == []


def test_under_autocast():
    x = random(2, 16, 3, 3, dtype=torch.bfloat16)
    with seen() as found, torch.autocast("cpu", torch.bfloat16):
        nn.SqueezeExcite(16, hidden=4)(x)
    (call,) = found
    assert call.autocast and call.question.others[:2] == (torch.float32, torch.float32)
    with nan_in_fresh_memory():
        check_itself(call, True, CPU)


BLOCKS = {
    "CBAM": lambda: nn.CBAM(64),
    "SKConv": lambda: nn.SKConv(64),
    "ECA": lambda: nn.ECA(64),
    "TripletAttention": lambda: nn.TripletAttention(64),
    "SplitAttention": lambda: nn.SplitAttention(64, groups=2),
    "GlobalContext": lambda: nn.GlobalContext(64),
    "CBAM, 3-D": lambda: nn.CBAM(64, rank=3),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_without_an_example(name):
    """It is run on maps of usual sizes without data, and is afterwards what it was."""
    block = BLOCKS[name]()
    state = {k: v.clone() for k, v in block.state_dict().items()}
    versions = [p._version for p in block.parameters()]
    modes = [m.training for m in block.modules()]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), block)
    random_state = torch.get_rng_state()
    found = typical_calls(model, [block])
    assert {training for _, training in found} == {True, False}
    assert {call.question.dtype for call, _ in found} == {torch.float32, torch.bfloat16}
    assert all(call.autocast == (call.question.dtype == torch.bfloat16) for call, _ in found)
    assert {call.sizes[0] for call, _ in found} >= {1, 32} and len(found) >= 12
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [p._version for p in block.parameters()] == versions and [m.training for m in block.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_people_cast_to(monkeypatch):
    """Every dtype of autocast on the device, of parameters in float32 alone."""
    monkeypatch.setitem(calls.AUTOCAST, "cpu", (torch.float16, torch.bfloat16))
    block = nn.SqueezeExcite(64)
    halves = {torch.float16, torch.bfloat16}
    assert {call.question.dtype for call, _ in typical_calls(block, [block])} == halves | {torch.float32}
    block.bfloat16()
    assert {call.question.dtype for call, _ in typical_calls(block, [block])} == {torch.bfloat16}


def test_calls_of_a_block_of_two_maps():
    """Found by `fuse`, and of `fused_attn.nn`."""
    for block in (nn.AttentionGate(64), fuse(reference.AttentionGate(64, rank=3))):
        assert {call.question.op for call, _ in typical_calls(block, [block])} == {"norm_gate", "scale/space"}


def test_a_block_that_takes_any_channels():
    """It has those of the layer before it."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(96), nn.SimAM(), torch.nn.Conv2d(96, 8, 1))
    found = typical_calls(model, [model[1]])
    assert {call.sizes[1] for call, _ in found} == {96} and {call.sizes[2] for call, _ in found} == {56, 28}


def test_the_layout_is_that_of_the_weights():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), nn.SqueezeExcite(64)).to(memory_format=torch.channels_last)
    found = typical_calls(model, [model[1]])
    assert {call.shape.layout for call, _ in found} == {"channels_last"}


def test_a_block_that_cannot_be_run_without_data():
    class Reads(nn.SqueezeExcite):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    block = Reads(64)
    assert calls_on(block, torch.empty(2, 64, 3, 3), True) == [] == typical_calls(block, [block])


# ---- faster ----


@pytest.mark.parametrize(
    ("device", "wall", "faster"),
    [(0.9, 1.0, True), (1.0, 0.9, True), (0.97, 0.97, False), (0.5, 1.1, False), (1.1, 0.5, False), (0.9, 1.015, True)],
)
def test_faster_by_one_clock_and_not_slower_by_the_other(device, wall, faster):
    plain = {"device": 1e-5, "wall": 2e-5}
    assert is_faster({"device": device * 1e-5, "wall": wall * 2e-5}, plain) == faster
    assert trial.ratios({"device": 5e-6, "wall": 2e-5}, plain) == (
        "2.00 on the device and 1.00 by the wall clock times as fast as plain PyTorch"
    )


def test_a_card_is_timed_by_both_clocks(monkeypatch):
    """On a stand-in: as a graph over all copies, and by the wall; the best of those that are right serves."""
    (call,), _ = calls_of("simam", torch.float32)
    gpu = types.SimpleNamespace(type="cuda")
    graphs, made = [], trial.make

    def graph_of(run, copies):
        for i in range(copies):
            run(i)
        graphs.append(copies)
        return lambda: None

    def interleaved(candidates, device, **_):
        """Of the wall clock the stand-ins are called; of graphs they are in order of plain, triton, cuda."""
        shares = {"reference": 1.0, "triton": 0.9, "cuda": 0.8}
        for run in candidates.values():
            run()
        return {name: timing.Timing([shares[name]]) for name in candidates}

    monkeypatch.setattr(trial, "make", lambda call, device, **options: made(call, CPU, **options))
    monkeypatch.setattr(trial, "graph_of", graph_of)
    monkeypatch.setattr(trial, "interleaved", interleaved)
    monkeypatch.setattr(trial, "last_cache", lambda device: 100_000)
    monkeypatch.setattr(trial, "synchronize", lambda device: None)
    monkeypatch.setattr(trial, "unavailable", lambda name, op, device: None)
    monkeypatch.setattr(trial, "backend", lambda name: contextlib.nullcontext())  # whatever serves here
    told = []
    verdict = Judge(gpu, told.append).verdict(call, False, {})
    assert (verdict.backend, verdict.anywhere, verdict.room) == ("cuda", "triton", (8 * 5 * 6, 0))
    assert told == [["triton"], ["triton"], ["cuda"], ["cuda"], ["triton", "cuda"]]
    bytes_ = 2 * 4 * 8 * 2 * 5 * 6  # of a map and its result
    copies = -(-200_000 // bytes_)
    assert graphs == [copies] * 3
    assert verdict.seconds["cuda"] == {"wall": 0.8, "device": float(f"{0.8 / copies:.4g}")}
    assert verdict.why == "1.25 on the device and 1.25 by the wall clock times as fast as plain PyTorch"
    failed = {"cuda": "failed: it died of SIGSEGV"}
    assert Judge(gpu, told.append).verdict(call, False, failed).backend == "triton"
    verdict = Judge(gpu, told.append).verdict(call, False, failed | {"triton": "failed: too"})
    assert verdict.backend == "reference" and verdict.why == "triton: failed: too; cuda: failed: it died of SIGSEGV"


def test_what_fits_forward_but_not_backward(monkeypatch):
    """A backend may serve inference and refuse training."""
    (call,), _ = calls_of("simam", torch.float32)

    def fits(backend, x, *arguments):
        if torch.is_grad_enabled():
            raise RuntimeError("a sample does not fit with its gradient")
        return reference.simam(x)

    monkeypatch.setattr(functional.ops, "simam", fits)
    judge = Judge(CPU, lambda names: None)
    assert judge.against(call, False, "cpu") is None
    assert judge.against(call, True, "cpu") == "cannot serve it: a sample does not fit with its gradient"


def test_a_graph_of_calls(monkeypatch):
    """On stand-ins: warmed up on another stream, each copy once within the capture, with results of its own."""
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    @contextlib.contextmanager
    def within(what):
        log.append(("in", type(what).__name__))
        yield
        log.append("out")

    class Graph:
        def replay(self):
            log.append("replay")

    for name, value in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", within)
    alive = []

    class Result:
        def __init__(self, i):
            alive.append(i)
            log.append((i, len(alive)))

        def __del__(self):
            alive.pop()

    timing.graph_of(Result, 3)()
    start = log.index(("in", "Graph"))
    assert log[start:] == [("in", "Graph"), (0, 1), (1, 2), (2, 3), "out", "replay"]
    assert log[1] == ("in", "Stream") and log[:start].count((0, 1)) == 3


def test_the_last_cache(monkeypatch):
    card = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert timing.last_cache(torch.device("cuda")) == 50 << 20
    assert timing.last_cache(CPU) >= 1 << 18


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")])
def test_no_memory_in_words_or_without(error):
    def lacking():
        raise error

    with pytest.raises(trial.Unmeasured, match=r"no memory: (MemoryError|tried to allocate 80 GiB)$"):
        Judge(torch.device("cpu"), lambda names: None)._when_there_is_memory(lacking)
