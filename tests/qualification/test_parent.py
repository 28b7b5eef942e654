"""What is measured in another process: planted kernels are found out, whatever they do to it."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import backends, functional, qualification, reference
from fused_attn.qualification import calls as calls_of_models
from fused_attn.qualification import parent as measuring
from fused_attn.qualification import process as process_module
from fused_attn.qualification.calls import seen
from fused_attn.qualification.parent import Job, measure
from fused_attn.verdicts import Verdict, cpu_name
from tests.checks import random

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.slow,  # a process is started three times
    pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR)),
]


def calls() -> dict[str, list[Job]]:
    """By name, jobs on small maps; two classes of shape where a fault is in one of them."""
    x, other = random(2, 8, 8, 8), random(2, 8, 12, 12)
    maps = {"query": random(2, 8, 6, 6), "key": random(2, 8, 6, 6), "value": random(2, 8, 6, 6)}
    runs = {
        "simam": lambda: functional.simam(x),
        "squeeze": lambda: functional.squeeze(x, "max"),
        "channel_pool": lambda: (functional.channel_pool(x), functional.channel_pool(other)),
        "position_attention": lambda: functional.position_attention(**maps),
        "cbam": lambda: functional.cbam(x, spatial_weight=random(1, 2, 3, 3)),
        "mixed_scale": lambda: functional.mixed_scale(x, channel=random(2, 8)),
        "channel_gate": lambda: functional.channel_gate(x),
        "scale": lambda: functional.scale(x, random(2, 8)),
        "context_pool": lambda: functional.context_pool(x, random(1, 8)),
        "axis_pool": lambda: functional.axis_pool(x),
        "criss_cross_attention": lambda: functional.criss_cross_attention(**maps),
        "spatial_gate": lambda: functional.spatial_gate(x, random(1, 2, 3, 3)),
    }
    found = {}
    for name, run in runs.items():
        with seen() as of_run:
            run()
        found[name] = [Job(call, True) for call in of_run]
    # After what takes the process with it, the rest goes on in another; and the op that did is not tried again.
    found["scale"] *= 2
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[Verdict | str]]:
    """By name of the op, one process's verdicts; it is started again after a hang and after a crash."""
    jobs, starts, shown = calls(), [], []
    everything = [job for of_op in jobs.values() for job in of_op]
    process = measuring._started
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).with_name("planted")))
        patch.setattr(measuring, "STEP", 4.0)
        patch.setenv("FUSED_ATTN_BACKEND", "reference")  # of no concern to it
        patch.setattr(measuring, "_started", lambda device: starts.append(device) or process(device))
        answers = list(measure(everything, CPU, lambda done, what: shown.append((done, what))))
    assert len(starts) == 3
    assert [done for done, _ in shown] == list(range(len(everything))) and "simam float32 2x8x8x8" in shown[0][1]
    answers.reverse()
    return {name: [answers.pop() for _ in of_op] for name, of_op in jobs.items()}


@pytest.mark.parametrize(
    ("op", "why"),
    [
        ("simam", "wrong on a nchw map of (3, 8, 5, 7), not aligned: output 0: error"),
        ("squeeze", "with ties: gradient of x: error"),
        ("position_attention", "NaN or infinity where the reference is finite"),
        ("cbam", "with a NaN: output 0: NaN or infinity is not where plain PyTorch has it"),
        ("channel_gate", "wrong as it is called: two runs differ"),
        ("scale", "failed: no answer within 4 seconds"),
        ("context_pool", "failed: it died of SIGABRT"),
        ("axis_pool", "cannot serve it: a sample does not fit"),
        ("mixed_scale", "times as fast as plain PyTorch"),
    ],
)
def test_what_is_found_out(found, op, why):
    for verdict in found[op]:
        assert isinstance(verdict, Verdict) and verdict.question.op == op and verdict.question.training
        assert verdict.backend == "reference" and verdict.why.startswith("cpu: ") and why in verdict.why
        assert bool(verdict.seconds) == (op == "mixed_scale")


def test_slow_is_said_with_figures(found):
    (verdict,) = found["mixed_scale"]
    cpu, plain = (verdict.seconds[name]["wall"] for name in ("cpu", "reference"))
    assert cpu > 0.005 and f"cpu: {plain / cpu:.2f} times as fast" in verdict.why


def test_wrong_in_one_class_alone(found):
    """The other class is served by what is fastest there."""
    elsewhere, there = found["channel_pool"]
    assert isinstance(elsewhere, Verdict) and isinstance(there, Verdict)
    assert "reference" in there.backend and "wrong as it is called: output 0" in there.why
    assert "wrong" not in elsewhere.why and set(elsewhere.seconds) == {"reference", "cpu"}


def test_what_is_right_and_faster_serves(found):
    """Whatever it prints."""
    (verdict,) = found["spatial_gate"]
    assert isinstance(verdict, Verdict) and verdict.backend == "cpu"
    plain, mine = verdict.seconds["reference"]["wall"], verdict.seconds["cpu"]["wall"]
    assert verdict.why == f"{plain / mine:.2f} times as fast as plain PyTorch"


def test_no_memory_is_no_verdict(found):
    assert found["criss_cross_attention"] == ["no memory: tried to allocate 80 GiB"]


def test_a_process_that_does_not_start(monkeypatch):
    """Once, however many calls there are."""
    starts = []
    process = measuring._started
    monkeypatch.setattr(measuring, "_started", lambda device: starts.append(device) or process(device))
    monkeypatch.setattr(measuring.sys, "executable", "/bin/false")
    jobs = [job for of_op in calls().values() for job in of_op]
    answers = list(measure(jobs, CPU, lambda done, what: None))
    assert len(answers) == len(jobs) and len(starts) == 1
    assert all("it ended with status 1" in answer for answer in answers)


def test_what_is_printed_is_no_answer(monkeypatch, tmp_path):
    """Also while modules are imported; and a program may have many files open, and say oddly where its modules are."""
    (tmp_path / "sitecustomize.py").write_text("print('{}')\nprint('hello', flush=True)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(measuring.sys, "path", [tmp_path, *measuring.sys.path])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, limits[1]), limits[1]))
    files = [open(os.devnull) for _ in range(1100)]  # noqa: SIM115
    try:
        (answer,) = measure(calls()["simam"], CPU, lambda done, what: None)
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(answer, Verdict) and "times as fast" in answer.why


def test_it_ends_with_the_one_that_started_it(tmp_path):
    """However that one ends, and whatever this one is at."""
    loaded = f"import runpy, time\nprocess = runpy.run_path({process_module.__file__!r})\n"
    (tmp_path / "sleeper.py").write_text(
        f"{loaded}import os\nprocess['answering']()(pid=os.getpid())\nwhile True: time.sleep(9)"
    )
    starts = "p = process['Process']('sleeper', {})\nprint(p.answer(time.monotonic() + 30)['pid'], flush=True)\n"
    command = [sys.executable, "-c", f"{loaded}{starts}time.sleep(60)"]
    starter = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    starter.kill()
    starter.communicate()
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Not one that nobody has waited for yet."""
    try:
        return " (python" in (said := Path(f"/proc/{pid}/stat").read_text()) and ") Z " not in said
    except FileNotFoundError:
        return False


def test_another_device_is_not_measured(monkeypatch):
    """As where the program has changed which cards are seen since it saw them."""
    there = types.SimpleNamespace(send=len, end=lambda: None)
    there.answer = lambda until: {"environment": {**measuring.environment_of(CPU), "device": "another"}}
    monkeypatch.setattr(measuring, "Process", lambda *given: there)
    answers = list(measure(calls()["simam"] * 2, CPU, lambda done, what: None))
    assert answers == [f"simam: in its process device is another, not {cpu_name()}"] * 2


def test_time_is_limited():
    jobs = calls()["simam"]
    assert list(measure(jobs, CPU, lambda done, what: None, limit=-1)) == ["simam: no time left after -1 seconds"]


def test_all_of_it(monkeypatch):
    """fuse, as on a GPU, with nothing planted: what serves afterwards was right, and is said with figures; the second
    time no process is started."""
    monkeypatch.setattr(qualification, "BY_FUSE", frozenset({"cpu"}))
    monkeypatch.setattr(calls_of_models, "BATCH", 2)
    monkeypatch.setattr(calls_of_models, "_sides", lambda channels: (9, 4))
    block = reference.CBAM(32)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), copy.deepcopy(block)).eval()
    fused_attn.fuse(model)
    found = backends.verdicts_on("cpu")
    assert {v.question.op for v in found} == {"cbam", "cbam/batch_norm"} and len(found) == 16
    assert not [v.why for v in found if "wrong" in v.why or "cannot" in v.why]
    assert all(set(v.seconds) == {"reference", "cpu"} for v in found)
    (row,) = fused_attn.explain(model)
    assert row.fused and row.reason.startswith("measured here: ") and "times as fast as plain PyTorch" in row.reason
    x = random(3, 32, 7, 5)
    torch.testing.assert_close(model[1](x), block.eval()(x))
    monkeypatch.setattr(qualification, "measure", None)
    fused_attn.fuse(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), reference.CBAM(32)))
