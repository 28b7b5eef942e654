"""fuse and qualify: when they measure, what they collect, what is said of it, and that nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import torch
from click.testing import CliRunner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fused_attn
from fused_attn import backends, cli, info, qualification, verdicts
from fused_attn.nn import CBAM, ECA, SqueezeExcite
from fused_attn.ops import resident
from fused_attn.qualification import busy, ranks
from fused_attn.qualification.calls import seen
from fused_attn.qualification.parent import Job
from fused_attn.verdicts import Question, Verdict, cached, environment_of
from tests.checks import random

CPU = torch.device("cpu")


def judged(jobs, names=("reference",)):
    """A verdict on each of these jobs, the backends in turn."""
    for i, job in enumerate(jobs):
        name = names[i % len(names)]
        question = job.call.question._replace(training=job.training)
        yield Verdict(question, job.call.shape, (800, 80), name, name, f"{name} as planned")


@pytest.fixture
def measured(monkeypatch) -> list:
    """The jobs that are measured; no process is started for them."""
    found: list = []

    def measure(jobs, device, show):
        assert device == CPU
        found.extend(jobs)
        return judged(jobs)

    monkeypatch.setattr(qualification, "measure", measure)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(qualification, "BY_FUSE", frozenset({"cpu"}))


def model() -> torch.nn.Module:
    reference = fused_attn.reference
    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), reference.SqueezeExcite(32), reference.CBAM(32))


A_CARD = FakeTensorMode()


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """To a card that is not here: parameters are without data, and autograd, which asks for streams, is left out."""
    with A_CARD:
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    part._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, device="cuda"), False)
    return module


# ---- fuse ----


def test_fuse_on_a_processor_does_not_wait(measured):
    fused_attn.fuse(model())
    assert not measured and {"cuda"} == qualification.BY_FUSE


def test_fuse_on_a_gpu_qualifies_once(measured, as_on_a_gpu):
    fused_attn.fuse(model())
    ops = {job.call.question.op for job in measured}
    assert ops == {"channel_gate", "cbam", "cbam/batch_norm"}
    keys = [(job.call.question, job.training, job.call.shape) for job in measured]
    assert len(set(keys)) == len(keys) and {job.training for job in measured} == {True, False}
    assert len(backends.verdicts_on("cpu")) == len(measured)
    before = len(measured)
    fused_attn.fuse(model())  # from the cache
    assert len(measured) == before


def test_fuse_without(measured, as_on_a_gpu):
    fused_attn.fuse(model(), qualify=False)
    assert not measured and not backends.verdicts_on("cpu")


def test_fuse_where_a_backend_was_asked_for(measured, as_on_a_gpu):
    with fused_attn.backend("reference"):
        fused_attn.fuse(model())
    assert not measured


def test_fuse_of_a_program_does_not(measured, as_on_a_gpu):
    x = random(1, 3, 8, 8)
    fused_attn.fuse(torch.export.export(model().eval(), (x,)))
    assert not measured


def in_fake_mode(run):
    with FakeTensorMode():
        run()


def in_backward(run):
    x = random(2, 2).requires_grad_()
    y = x * 2
    y.register_hook(lambda grad: run())
    y.sum().backward()


def in_a_checkpoint(run):
    """Its recomputation."""
    first = []

    def part(x):
        if first:
            run()
        first.append(x)
        return x.sin()

    checkpoint(part, random(2, 2).requires_grad_(), use_reentrant=False).sum().backward()
    assert len(first) == 2


def in_vmap(run):
    torch.func.vmap(lambda x: (run(), x)[1])(random(2, 2))


def in_jit_trace(run):
    torch.jit.trace(lambda x: (run(), x + 1)[1], random(2), check_trace=False)


MOMENTS = {
    "fake": in_fake_mode,
    "a backward": in_backward,
    "checkpoint": in_a_checkpoint,
    "torch.func": in_vmap,
    "torch.jit": in_jit_trace,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_at_which_nothing_is_measured(moment, measured, as_on_a_gpu):
    """fuse leaves it out there, qualify raises."""
    fused, said = fused_attn.fuse(model(), qualify=False), []

    def run():
        said.append(busy())
        with pytest.raises(RuntimeError, match="qualify: not while"):
            fused_attn.qualify(fused)
        fused_attn.fuse(fused)

    assert busy() is None
    MOMENTS[moment](run)
    assert len(said) == 1 and moment in said[0]
    assert not measured and busy() is None


def test_not_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert busy() == "a CUDA graph is captured"


def test_not_while_dynamo_traces():
    @torch.compile(backend="eager", fullgraph=True)
    def traced(x):
        return x if busy() is None else x + 1

    assert traced(torch.zeros(1)).item() == 1 and busy() is None


# ---- qualify ----


def test_qualify_collects_what_a_run_calls(measured):
    """In both modes, on the maps of the run; and leaves the model as it was."""
    fused = fused_attn.fuse(torch.nn.Sequential(model(), torch.nn.Dropout(0.5)))
    fused[0][2].eval()
    state, modes = copy.deepcopy(fused.state_dict()), [m.training for m in fused.modules()]
    random_state = torch.get_rng_state()
    found = fused_attn.qualify(fused, random(2, 3, 6, 10))
    assert [(v.question, v.shape) for v in found] == [(v.question, v.shape) for v in backends.verdicts_on("cpu")]
    asked = sorted((job.call.question.op, job.training) for job in measured)
    gates = [("channel_gate", False), ("channel_gate", True)]
    assert asked == [("cbam", False), ("cbam", True), ("cbam/batch_norm", True), *gates]
    assert all(job.call.sizes == (2, 32, 6, 10) for job in measured)
    assert all(torch.equal(v, state[k]) for k, v in fused.state_dict().items())
    assert [m.training for m in fused.modules()] == modes and torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_pre_hooks for m in fused.modules())
    assert all(p.grad is None for p in fused.parameters())


def test_qualify_of_functions_and_keyword_arguments(measured):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = ECA(16)

        def forward(self, x):
            return fused_attn.functional.simam(self.block(x=x))

    fused_attn.qualify(Model(), random(2, 16, 5, 5))
    assert {job.call.question.op for job in measured} == {"channel_gate", "simam"}
    fused_attn.qualify(Model(), x=random(2, 16, 50, 50))
    assert len(measured) == 2 * 4


def test_qualify_of_a_compiled_model(measured):
    fused_attn.qualify(torch.compile(SqueezeExcite(32), backend="eager"), random(2, 32, 5, 5))
    assert {job.call.question.op for job in measured} == {"channel_gate"}


def test_qualify_between_forward_and_backward(measured):
    """Which reads the statistics that the forward used."""
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32), SqueezeExcite(32))
    x = random(2, 3, 8, 8)
    y = block(x)
    fused_attn.qualify(block, x)
    fused_attn.qualify(block)
    y.sum().backward()


def test_qualify_of_what_was_made_for_inference(measured):
    """Its buffers cannot be written to elsewhere, and are what they were."""
    with torch.inference_mode():
        block = CBAM(32)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    assert fused_attn.qualify(block, random(2, 32, 8, 8)) and fused_attn.qualify(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_qualify_without_data():
    """Where there is no device there is nothing to measure."""
    assert str(fused_attn.qualify(model().to("meta"))) == "no call that a backend could serve"


def test_qualify_without_an_example(measured):
    found = fused_attn.qualify(CBAM(32))
    assert len(found) == len(measured) > 6 and "2^5" in str(found)


def test_qualify_under_autocast(measured):
    with torch.autocast("cpu", torch.bfloat16):
        fused_attn.qualify(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), SqueezeExcite(32)), random(2, 3, 5, 5))
    assert {job.call.question.dtype for job in measured} == {torch.bfloat16} and all(j.call.autocast for j in measured)


def test_an_error_in_the_model_leaves_it_as_it_was(measured):
    fused = torch.nn.Sequential(SqueezeExcite(32)).train()
    with pytest.raises(ValueError):
        fused_attn.qualify(fused, random(2, 3, 5, 5))
    assert fused.training and not fused[0]._forward_pre_hooks and not measured


def test_mistakes():
    with pytest.raises(TypeError, match="model: expected an nn.Module; got Tensor"):
        fused_attn.qualify(random(1))
    assert str(fused_attn.qualify(torch.nn.Conv2d(3, 3, 1), random(1, 3, 4, 4))) == "no call that a backend could serve"


def test_what_cannot_be_measured_is_said_once(monkeypatch):
    def measure(jobs, device, show):
        return iter(["no memory"] * len(jobs))

    monkeypatch.setattr(qualification, "measure", measure)
    with pytest.warns(UserWarning, match="2 of 2 calls could not be measured; the first: no memory"):
        assert fused_attn.qualify(SqueezeExcite(32), random(2, 32, 5, 5)) == []
    assert not cached(environment_of(CPU))  # another time it may be
    monkeypatch.setattr(qualification, "measure", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError: division by zero"):
        assert fused_attn.qualify(SqueezeExcite(32), random(2, 32, 5, 5)) == []


def test_a_table_that_ships_needs_no_wait(monkeypatch, measured):
    block, x = SqueezeExcite(32), random(2, 32, 5, 5)
    kept = fused_attn.qualify(block, x)
    assert len(measured) == 2
    planned = tuple(v._replace(backend="cpu", why="shipped") for v in kept)
    monkeypatch.setattr(qualification, "shipped", lambda environment: planned)
    monkeypatch.setattr(qualification, "cached", lambda environment: pytest.fail("not needed"))
    monkeypatch.setattr(backends, "_VERDICTS", {})
    found = fused_attn.qualify(block, x)
    assert len(measured) == 2 and {v.why for v in found} == {"shipped"}


def test_it_shows_how_far_it_is(monkeypatch, capsys, as_on_a_gpu):
    """On a terminal; in a log it is one line."""

    def measure(jobs, device, show):
        for i, job in enumerate(jobs):
            show(i, job.call.question.op)
        return judged(jobs)

    monkeypatch.setattr(qualification, "measure", measure)
    fused_attn.qualify(SqueezeExcite(32), random(2, 32, 5, 5))
    shown = capsys.readouterr().err
    assert re.fullmatch(r"fused_attn qualifies itself on .+, once: 2 calls\n", shown)
    monkeypatch.setattr(qualification.sys.stderr, "isatty", lambda: True)
    fused_attn.qualify(SqueezeExcite(32), random(2, 32, 50, 50))
    shown = capsys.readouterr().err
    assert "once  [##########          ] 1/2  channel_gate" in shown and shown.endswith("\r\x1b[K")


def test_a_log_that_is_no_file_stops_nothing(monkeypatch, measured):
    """Programs put such in place of stderr."""
    for stderr in (None, types.SimpleNamespace(write=len), io.TextIOWrapper(io.BytesIO())):
        if isinstance(stderr, io.TextIOWrapper):
            stderr.close()
        monkeypatch.setattr(qualification.sys, "stderr", stderr)
        qualification._show(3, "a card", 0, "simam")


def test_a_verdict_that_cannot_serve_here_is_none(monkeypatch, measured):
    """Whatever the file says that it is in: no forward is to find out."""
    block, x = SqueezeExcite(32), random(2, 32, 5, 5)
    there = fused_attn.qualify(block, x)
    keep = [v._replace(backend="cuda", anywhere="triton") for v in there]
    verdicts.write_table(verdicts.cache_file(environment_of(CPU)), environment_of(CPU), keep)
    backends._VERDICTS.clear()
    backends._SERVED.clear()
    measured.clear()
    assert {v.backend for v in fused_attn.qualify(block, x)} == {"reference"} and len(measured) == len(there)


def test_a_table_of_resident_kernels_that_do_not_run_here(monkeypatch):
    """As where they were built for other cards."""
    question = Question("channel_gate", (), torch.float32, (), True)
    shape = verdicts.Shape("nchw", 5, 5, 12, True)
    resident_one = Verdict(question, shape, (800, 80), "cuda", "reference", "")
    monkeypatch.setitem(backends.UNAVAILABLE, ("cuda", "channel_gate", "cuda"), None)
    for limits_of, serves in ((lambda device: resident.Limits(232448, 16), True), (resident.limits_of, False)):
        monkeypatch.setattr(qualification, "limits_of", limits_of)
        assert qualification._can_serve(resident_one, torch.device("cuda", 0)) == serves


def test_cards_of_one_kind_share_their_verdicts(monkeypatch):
    """Those of this process; on stand-ins."""
    names = ["H", "H", "A"]
    cards = [types.SimpleNamespace(name=name, multi_processor_count=8) for name in names]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards[device.index])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setitem(backends.UNAVAILABLE, ("triton", "channel_gate", "cuda"), None)
    monkeypatch.setattr(qualification, "measure", lambda jobs, device, show: judged(jobs, ("triton",)))
    monkeypatch.setattr(ranks, "gathered", lambda value, device: [value])
    with seen() as found:
        SqueezeExcite(32)(random(2, 32, 5, 5))
    (call,) = (call._replace(device=torch.device("cuda", 0)) for call in found)
    qualification.settle([Job(call, True)], call.device)
    key = call.question._replace(training=True)
    served = {device: name for (device, *asked), name in backends._SERVED.items() if asked == [*key]}
    assert served == {torch.device("cuda", i): "triton" for i in (0, 1)}


# ---- what is said ----


def test_explain_says_why_with_figures():
    block = fused_attn.fuse(torch.nn.Sequential(fused_attn.reference.SqueezeExcite(32)))
    call = Question("channel_gate", (), torch.float32, (), True)
    shape = verdicts.Shape("nchw", 5, 5, 12, True)
    why = "cpu: 0.97 times as fast as plain PyTorch"
    backends.install(CPU, [Verdict(call, shape, (800, 80), "reference", "reference", why)])
    (row,) = fused_attn.explain(block)
    assert row.fused and row.served_by == "reference"
    assert row.reason.startswith(f"measured here: {why}")


def test_a_model_that_was_fused_before_it_was_moved(monkeypatch):
    """The first call says what to run; after it the card serves the model."""
    card = types.SimpleNamespace(name="H", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setitem(backends.UNAVAILABLE, ("triton", "channel_gate", "cuda"), None)
    measured = []
    monkeypatch.setattr(qualification, "measure", lambda jobs, *_: measured.extend(jobs) or judged(jobs, ("triton",)))
    network = moved(fused_attn.fuse(torch.nn.Sequential(fused_attn.reference.SqueezeExcite(32))))
    with A_CARD:
        x = torch.empty(2, 32, 8, 8, device="cuda")
    monkeypatch.setattr(backends, "_VALUED", frozenset({type(x)}))  # as if it had values
    with pytest.warns(UserWarning, match=r"plain PyTorch serves cuda:0.* run fused_attn.qualify\(model\) once") as said:
        network(x)
        network(x)
    assert len(said) == 1
    found = fused_attn.qualify(network, x)
    assert {(v.backend, v.question.training) for v in found} == {("triton", False), ("triton", True)}
    assert {job.call.device for job in measured} == {x.device} and len(measured) == len(found)
    assert {(device, name) for (device, *_), name in backends._SERVED.items()} == {(x.device, "triton")}
    (row,) = fused_attn.explain(network)
    assert row.served_by == "triton" and "triton as planned" in row.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_attn.qualify(network, x) == found  # from the cache


def test_what_a_card_holds_is_said(monkeypatch):
    """Where it decides: of a block that resident kernels serve, and of a card."""
    block = moved(SqueezeExcite(32))
    monkeypatch.setitem(backends.UNAVAILABLE, ("cuda", "channel_gate", "cuda"), None)
    monkeypatch.setattr(resident, "limits_of", lambda device: resident.Limits(232448, 16))
    held = "resident in shared memory are samples that fit 16 blocks of 227 KiB"
    card = types.SimpleNamespace(name="H", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert info.devices()[1] == f"cuda:0: H, sm_90, 132 multiprocessors, 80 GiB; {held}"
    with fused_attn.backend("cuda"):
        assert [(row.served_by, row.reason) for row in fused_attn.explain(block)] == [("cuda", f"asked for; {held}")]
    with fused_attn.backend("reference"):
        assert "resident" not in fused_attn.explain(block)[0].reason
    question = Question("channel_gate", (), torch.float32, (), True)
    shape = verdicts.Shape("nchw", 5, 5, 12, True)
    backends.install(torch.device("cuda", 0), [Verdict(question, shape, (800, 80), "cuda", "triton", "2.00 times")])
    (row,) = fused_attn.explain(block)
    assert (row.served_by, row.reason) == ("cuda", f"measured here: 2.00 times; {held}")

    def fails(device):
        raise RuntimeError("the CUDA kernels that were built do not run on CUDA device 0")

    monkeypatch.setattr(resident, "limits_of", fails)
    assert "; no resident kernels: the CUDA kernels that were built do not run" in info.devices()[1]


def test_the_command(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)
    monkeypatch.setattr(cli.console, "_file", None)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom fused_attn.reference import SqueezeExcite\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), SqueezeExcite(32))\n"
    )
    options = ["--device", "cpu", "--shape", "2x3x8x8", "--dtype", "bfloat16", "--layout", "channels_last"]
    command = ["qualify", "--model", f"{tmp_path}/net.py:net", *options, "--table", str(tmp_path / "tables")]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"channel_gate +bfloat16 +channels_last +training +2\^5 +2\^6 .*reference as planned", result.output
    )
    (table,) = (tmp_path / "tables").glob("*.json")
    assert len(json.loads(table.read_text())["verdicts"]) == 2 == len(measured)
    assert ("cpu", "channel_gate", "reference", 2, "reference as planned") in info.measured()
    assert "reference as planned" in CliRunner().invoke(cli.main, ["info"]).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model: expected one, such as timm:seresnet50; got none"),
        (["--model", "nothing"], "'nothing': expected timm:NAME"),
        (["--model", "fused_attn.reference:SimAM", "--shape", "3"], "shape '3': expected numbers joined by x"),
        (["--model", "torch.nn:Identity", "--table", "/dev/null/tables"], "--table: [Errno 20] Not a directory"),
    ],
)
def test_mistakes_of_the_command_are_one_line(arguments, said):
    result = CliRunner().invoke(cli.main, ["qualify", "--device", "cpu", *arguments])
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1


# ---- ranks ----


def key_of(i: int):
    return Question("simam", (i,), torch.float32, (), True), verdicts.Shape("nchw", 5, 5, 12, True)


def answer(i: int, backend: str, why: str = "why") -> Verdict:
    return Verdict(*key_of(i), (800, 80), backend, backend, why)


def test_hosts_that_differ():
    """A backend serves where all that were asked agree on it."""
    one = {key_of(i): answer(i, name) for i, name in enumerate(("triton", "triton", "reference", "triton"))}
    other = {key_of(i): answer(i, name) for i, name in enumerate(("triton", "cuda", "reference"))}
    other |= {key_of(3): "no memory", key_of(4): "no memory", key_of(5): answer(5, "cuda")}
    one |= {key_of(4): "no memory"}
    found = ranks.combined([one, {}, other])
    assert found[key_of(0)] == answer(0, "triton") and found[key_of(2)] == answer(2, "reference")
    assert found[key_of(1)] == answer(1, "reference", "the hosts differ: triton (why); cuda (why)")
    assert found[key_of(3)] == answer(3, "reference", "the hosts differ: triton (why); no memory")
    assert found[key_of(4)] == "no memory" and found[key_of(5)] == answer(5, "cuda")
    resident = answer(0, "cuda")._replace(anywhere="triton")
    assert ranks.combined([{key_of(0): resident}, {key_of(0): resident._replace(room=(700, 90))}]) == {
        key_of(0): resident._replace(room=(700, 80))
    }
    assert ranks.combined([{key_of(0): resident}, {key_of(0): answer(0, "cuda")}]) == {
        key_of(0): resident._replace(anywhere="reference")
    }


RANK = """
import os, sys
import torch, torch.distributed as dist
import fused_attn
from fused_attn import backends, qualification
from fused_attn.qualification import ranks
from fused_attn.verdicts import Verdict

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{os.environ['PLACE']}/meet", rank=rank, world_size=2)
qualification.BY_FUSE = frozenset({"cpu"})
gather = dist.all_gather_object

def measure(jobs, device, show):
    # Another clock on each host.
    for i, job in enumerate(jobs):
        name = "cpu" if i % 2 == 0 or rank == 0 else "reference"
        measured.append(job)
        question = job.call.question._replace(training=job.training)
        yield Verdict(question, job.call.shape, (800, 80), name, name, f"rank {rank}")

def fails(*_):
    raise AssertionError("a collective in a forward")

qualification.measure = measure
for hosts in (["a", "a"], ["a", "b"]):
    measured = []
    backends._VERDICTS.clear()
    backends._SERVED.clear()
    ranks.host = lambda: hosts[rank]
    os.environ["FUSED_ATTN_CACHE"] = "/proc/none"  # or a rank might find what another one measured
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), fused_attn.reference.SqueezeExcite(32))
    dist.all_gather_object = gather
    fused_attn.fuse(model)
    dist.all_gather_object = fails
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    print(len(measured), [(v.question.op, v.backend, v.why) for v in backends.verdicts_on("cpu")])

# A rank whose model does not run leaves no other one waiting.
dist.all_gather_object = gather
try:
    fused_attn.qualify(model, torch.randn(2, 3 + rank, 80, 80))
except RuntimeError as error:
    assert rank == 1 and "to have 3 channels" in str(error)
else:
    assert rank == 0
"""


def test_ranks_choose_alike(tmp_path):
    """One of a host measures; what the hosts find is combined; no forward waits for another rank."""
    environment = {**os.environ, "PLACE": str(tmp_path)}
    command, pipes = [sys.executable, "-c", RANK], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, env={**environment, "RANK": str(r)}, text=True, **pipes) for r in range(2)]
    printed = []
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        printed.append([line.partition(" ") for line in out.splitlines()])
    (first, second), (others_first, others_second) = printed
    assert first[2] == others_first[2] and second[2] == others_second[2]
    counts = [[int(line[0]) for line in lines] for lines in printed]
    assert counts[0][0] > 0 == counts[1][0] and "reference" not in first[2] and "rank 0" in first[2]
    assert counts[0][1] == counts[1][1] == counts[0][0]
    differ = "'reference', 'the hosts differ: cpu (rank 0); reference (rank 1)'"
    assert second[2].count(differ) == counts[0][1] // 2


def test_two_threads_measure_one_after_the_other(monkeypatch):
    """As two processes do, by the same lock: the second finds what the first one found."""
    started = []

    def measure(jobs, device, show):
        started.append(len(jobs))
        time.sleep(0.3)
        return judged(jobs)

    monkeypatch.setattr(qualification, "measure", measure)
    block, x = SqueezeExcite(32), random(2, 32, 5, 5)
    with seen() as found:
        block(x)
    threads = [threading.Thread(target=qualification.settle, args=([Job(found[0], True)], CPU)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert started == [1]


def test_what_was_found_before_an_interruption_is_kept(monkeypatch):
    def measure(jobs, device, show):
        yield from judged(jobs[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(qualification, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        fused_attn.qualify(SqueezeExcite(32), random(2, 32, 5, 5))
    assert len(cached(environment_of(CPU))) == 1
