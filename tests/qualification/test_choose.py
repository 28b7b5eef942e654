"""What is read of verdicts where a call is served: in eager, and where torch traces."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn import backends, functional, nn
from fused_attn.backends import choose, default, install
from fused_attn.qualification.calls import Call, seen
from fused_attn.verdicts import Question, Verdict
from tests.checks import in_layout, random

CPU = torch.device("cpu")
SMALL, LARGE = (2, 8, 4, 4), (2, 8, 16, 16)


def call_of(sizes=SMALL, dtype=torch.float32, **options) -> Call:
    with backends.backend("reference"), seen() as found:
        functional.channel_gate(random(*sizes, dtype=dtype), **options)
    return found[0]


def served(sizes=SMALL, dtype=torch.float32, **options) -> str:
    """What serves such a call."""
    call = call_of(sizes, dtype, **options)
    absent = (None,) * len(call.question.others)
    return choose(call.question.op, torch.empty(sizes, dtype=dtype), call.question.options, absent)


def verdict_on(call: Call, backend: str, anywhere: str | None = None) -> Verdict:
    return Verdict(call.question._replace(training=True), call.shape, call.room, backend, anywhere or backend, "")


def verdict(backend: str, sizes=SMALL, anywhere: str | None = None) -> Verdict:
    return verdict_on(call_of(sizes), backend, anywhere)


def test_a_verdict_is_of_its_question_alone():
    """Other options, dtypes, tensors and modes are served as before."""
    usual = served()
    install(CPU, [verdict("triton")])
    assert served() == served(LARGE) == "triton"
    assert served(gate="tanh") == served(dtype=torch.bfloat16) == usual
    with torch.no_grad():
        assert served() == usual
    call = call_of()
    with_residual = (*(None,) * (len(call.question.others) - 1), torch.empty(SMALL))
    assert choose("channel_gate", torch.empty(SMALL), call.question.options, with_residual) == usual
    assert choose("simam", torch.empty(SMALL)) == usual


def test_classes_that_differ():
    """Each has its own; of those that were not measured nothing is known, and plain PyTorch serves."""
    install(CPU, [verdict("triton"), verdict("cpu", LARGE)])
    assert served() == "triton" and served(LARGE) == served((2, 8, 15, 16)) == "cpu"
    assert served((2, 8, 64, 64)) == served((2, 8, 15, 15)) == "reference"  # the second is not aligned
    x, call = in_layout(torch.empty(SMALL), "channels_last"), call_of()
    assert choose("channel_gate", x, call.question.options, (None,) * 7) == "reference"


def test_a_resident_backend_serves_what_fits():
    """Samples as large as the one that was measured, in its class; others, and those whose size is not known, are
    served by the best that takes any size."""
    measured = 2, 8, 15, 16
    install(CPU, [verdict("cuda", measured, "triton"), verdict("triton")])
    assert served(measured) == served((2, 8, 12, 16)) == "cuda"
    assert served(LARGE) == served() == served((2, 8, 64, 64)) == "triton"
    with FakeTensorMode():
        x = torch.empty(measured)
    assert choose("channel_gate", x, call_of().question.options, (None,) * 7) == "triton"


def test_a_resident_backend_has_room_for_weights_as_large_as_measured():
    """And for fewer samples, or more, with or without a residual as large as the map."""
    x, residual = torch.empty(SMALL), torch.empty(SMALL)
    dtypes = (torch.float32, torch.float32)
    question = Question("simam", (), torch.float32, dtypes, True)
    call = call_of()._replace(question=question, room=(8 * 4 * 4, 32))
    install(CPU, [verdict_on(call, "cuda", "triton")])
    assert choose("simam", x, (), (torch.empty(4, 8), residual)) == "cuda"
    assert choose("simam", x, (), (torch.empty(5, 8), residual)) == "triton"


def test_a_verdict_stays():
    """Whatever is found later."""
    install(CPU, [verdict("triton")])
    install(CPU, [verdict("reference")])
    assert served() == "triton"
    install(CPU, [verdict("reference", LARGE)])
    assert served() == "triton" and served(LARGE) == "reference"


def test_devices_are_told_apart():
    install(torch.device("cuda", 1), [verdict("triton")])
    assert served() != "triton"
    key = (torch.device("cuda", 1), *call_of().question._replace(training=True))
    assert backends._SERVED[key] == "triton" and len(backends._SERVED) == 1


def test_what_is_asked_for_goes_first():
    install(CPU, [verdict("triton")])
    with backends.backend("reference"):
        assert served() == "reference"
        with backends.unforced():
            assert served() == "triton"


def test_tensors_without_values():
    """Where nothing may depend on sizes, classes that agree are served, others by plain PyTorch."""
    with FakeTensorMode():
        x = torch.empty(SMALL)
    call = call_of()
    asked = call.question.op, x, call.question.options, (None,) * 7
    install(CPU, [verdict("triton")])
    assert choose(*asked) == "triton"
    install(CPU, [verdict("cpu", LARGE)])
    assert choose(*asked) == "reference"


@pytest.mark.parametrize("agree", [True, False])
def test_compiled_once_for_all_sizes(agree, monkeypatch):
    """In compiled code the verdict is fixed before it is traced: no size is guarded on."""
    monkeypatch.setattr(backends, "LEFT_TO_COMPILERS", frozenset())
    install(CPU, [verdict("cpu"), verdict("cpu" if agree else "reference", LARGE)])
    counter = CompileCounter()
    torch._dynamo.reset()
    options = call_of().question.options

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def name_of(x):
        return x + backends.NAMES.index(choose("channel_gate", x, options, (None,) * 7))

    for batch, side in itertools.product((2, 5), (4, 16, 33)):
        found = name_of(torch.zeros(batch, 8, side, side))
        assert found.eq(backends.NAMES.index("cpu" if agree else "reference")).all()
    assert counter.frame_count == 1


def test_a_compiled_block_of_all_sizes():
    """A whole block, whose verdicts differ by size."""
    block = nn.SqueezeExcite(8, hidden=4).requires_grad_(False)
    calls = []
    for sizes in (SMALL, LARGE):
        with seen() as found:
            block(random(*sizes))
        calls += found
    names = ("cpu", "reference")
    for call, name in zip(calls, names, strict=True):
        install(CPU, [verdict_on(call, name)])
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=counter, dynamic=True, fullgraph=True)
    for batch, side in itertools.product((2, 5), (4, 16, 33)):
        x = random(batch, 8, side, side)
        torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == 1


def test_an_exported_block_of_all_sizes():
    block = nn.SqueezeExcite(8, hidden=4).requires_grad_(False)
    for sizes, name in ((SMALL, "cpu"), (LARGE, "reference")):
        with seen() as found:
            block(random(*sizes))
        install(CPU, [verdict_on(found[0], name)])
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(block, (random(*SMALL),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for batch, side in itertools.product((2, 5), (4, 16, 33)):
        x = random(batch, 8, side, side)
        torch.testing.assert_close(program.module()(x), block(x))


def test_what_is_said_of_an_op():
    assert default("simam", "cuda") == (
        "reference",
        backends.unavailable("triton", "simam", "cuda")
        or "not measured here yet: fuse(model) and fused_attn.qualify(model, ...) do that",
    )
    gpu = torch.device("cuda", 0)

    def of(channels: int, backend: str, why: str) -> Verdict:
        shape = call_of().shape._replace(channels=channels)
        return Verdict(Question("simam", (), torch.float32, (), True), shape, (800, 80), backend, backend, why)

    install(gpu, [of(1, "triton", "1.50 times as fast")])
    assert default("simam", "cuda") == ("triton", "measured here: 1.50 times as fast")
    install(gpu, [of(2, "triton", "1.60 times as fast"), of(3, "reference", "triton: wrong")])
    name, why = default("simam", "cuda")
    assert name == "triton"
    assert why == "measured here: 1.50 times as fast, and 1 more like it; in 1 of 3 cases reference: triton: wrong"
    assert default("cbam", "cuda")[1] != why


def test_what_is_said_where_no_backend_can_serve(monkeypatch):
    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends.UNAVAILABLE, (name, "simam", "cuda"), f"no {name} here")
    assert default("simam", "cuda") == ("reference", "triton: no triton here; cuda: no cuda here")


def test_what_is_found_later_compiles_nothing_again(monkeypatch):
    """Of other ops, and of other sizes where it is the same; where it is not, compiled code follows."""
    monkeypatch.setattr(backends, "LEFT_TO_COMPILERS", frozenset())
    install(CPU, [verdict("cpu")])
    counter = CompileCounter()
    torch._dynamo.reset()
    options = call_of().question.options

    @torch.compile(backend=counter, fullgraph=True)
    def name_of(x):
        return x + backends.NAMES.index(choose("channel_gate", x, options, (None,) * 7))

    x = torch.zeros(SMALL)
    assert name_of(x).eq(backends.NAMES.index("cpu")).all()
    other = verdict("reference")
    install(CPU, [other._replace(question=other.question._replace(op="simam")), verdict("cpu", LARGE)])
    assert name_of(x).eq(backends.NAMES.index("cpu")).all() and counter.frame_count == 1
    install(CPU, [verdict("reference", (2, 8, 64, 64))])
    assert name_of(x).eq(backends.NAMES.index("reference")).all() and counter.frame_count == 2


@pytest.fixture
def call_on_a_card(monkeypatch):
    """A call on a map of a card that the Triton kernels could serve, which here is a fake tensor."""
    with FakeTensorMode():
        x = torch.empty(SMALL, device="cuda")
    monkeypatch.setattr(backends, "_VALUED", frozenset({type(x)}))
    monkeypatch.setattr(backends, "UNAVAILABLE", dict.fromkeys(backends.UNAVAILABLE))
    return lambda: choose("simam", x)


def test_a_card_on_which_nothing_was_measured_is_named_once(call_on_a_card):
    """A model that was fused on the CPU and moved then would be no faster in silence."""
    install(CPU, [verdict("cpu")])  # of no concern to a card
    with pytest.warns(UserWarning, match=r"plain PyTorch serves cuda:0, .* run fused_attn.qualify\(model\) once"):
        assert call_on_a_card() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_on_a_card() == "reference"


def test_a_card_is_named_where_its_calls_are_traced(call_on_a_card, monkeypatch):
    """A model that is compiled may make no other."""
    monkeypatch.setattr(backends, "_VALUED", frozenset({torch.Tensor}))  # as which it is traced
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x + (choose("simam", x) == "reference"), backend=counter, fullgraph=True)
    with FakeTensorMode():
        x = torch.empty(SMALL, device="cuda")
        with pytest.warns(UserWarning, match="plain PyTorch serves cuda:0"):
            compiled(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(x)
    assert counter.frame_count == 1


def test_a_card_on_which_something_was_measured_is_not_named(call_on_a_card):
    """What is served by plain PyTorch there is for `explain` to say."""
    install(torch.device("cuda", 0), [verdict("triton")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_on_a_card() == "reference"


def test_who_leaves_the_measuring_out_hears_nothing_of_it(call_on_a_card):
    fused_attn.fuse(torch.nn.Identity(), qualify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call_on_a_card() == "reference"
