"""`python -m benchmarks.gpu` without a GPU: every part runs, saves its rows, and fails when it should."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import memory, models, networks, right, run, sanitizer, speed, symbols, table
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.child import found_by, warm
from benchmarks.gpu.rows import Row, Setting
from benchmarks.gpu.run import PARTS
from fused_attn import backends
from fused_attn.timing import Timing
from fused_attn.verdicts import read_table
from tests.emulate.library import LIMITS_ARE_KNOWN, build

ROOT = Path(__file__).parents[2]
PLANTED = Path(__file__).with_name("planted")

needs_kernels = pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR))


def suite(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """torch.compile leaves its modules as they are: what it makes of eager takes most of the time, and is not ours."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), *arguments]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


DRY = Setting(True, Path(), 10.0)


def parts_in(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("dry-*/*.json")}


def statuses(part: Any, words: int = 1) -> dict[str, str]:
    """By the first words of a row's name."""
    return {" ".join(row["row"].split()[:words]): row["status"] for row in part["rows"]}


def test_it_says_that_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "benchmarks.gpu: no CUDA device here; --dry-run runs the same code on the CPU"


def test_a_part_that_is_none(capsys):
    with pytest.raises(SystemExit):
        main(["--part", "right,write"])
    assert "got 'write'" in capsys.readouterr().err


@needs_kernels
@pytest.mark.slow  # about 25 s: a process for each part
def test_every_part_runs_dry_and_is_taken_up(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: no GPU figures" in done.stdout
    found = parts_in(tmp_path)
    assert set(found) == set(PARTS)
    for name, part in found.items():
        assert part["rows"] and not part["left out"] and not part["problem"], name
        assert {row["status"] for row in part["rows"]} <= {"ok", "absent"}, part["rows"]
    assert statuses(found["symbols"], 2)["launch cpu"] == "ok"
    if build() is None:  # the resident kernels, on the emulated machine
        there = statuses(found["symbols"], 2)
        assert there["operators"] == there["launch cuda"] == "ok"
        assert LIMITS_ARE_KNOWN or there["limits"] == there["clusters"] == "ok"
        assert statuses(found["right"], 2)["cbam cuda"] == "ok"
        assert "cuda" in found["speed"]["rows"][1]["passes"]["forward + backward"]
        assert "cuda" in found["table"]["rows"][0]["seconds"]
    assert found["right"]["rows"][0]["kernels"] > 3  # compiled for an H100
    for passes in (row["passes"] for part in ("speed", "models") for row in found[part]["rows"] if "passes" in row):
        assert all(cell["wall"] > 0 and cell["peak bytes"] >= 0 for of in passes.values() for cell in of.values())
    (table,) = (path for path in tmp_path.glob("dry-*/tables/*.json"))
    assert read_table(table).verdicts and "driver" not in read_table(table).environment
    assert "classes" in found["models"]["rows"][0]["served by"]

    resumed = ["--dry-run", "--out", str(tmp_path), "--part", "symbols", "--resume"]
    # A row that is not there is measured, and no other.
    (path,) = tmp_path.glob("dry-*/symbols.json")
    record = found["symbols"]
    kept = [row | {"took": -1} for row in record["rows"] if row["row"] != "triton"]
    path.write_text(json.dumps(record | {"rows": kept}))
    assert main(resumed) == 0
    again = parts_in(tmp_path)["symbols"]["rows"]
    assert again[:-1] == kept and again[-1]["row"] == "triton" and again[-1]["took"] >= 0
    assert parts_in(tmp_path)["models"] == found["models"]


@needs_kernels
@pytest.mark.slow  # a minute: one row hangs, and one takes its process with it
def test_what_is_planted_costs_its_own_rows(tmp_path):
    """Also where it is in the resident kernels alone."""
    done = suite(tmp_path, "--part", "symbols,right,speed", "--step", "40", PYTHONPATH=f"{PLANTED}:{ROOT}")
    assert done.returncode == 1, done.stderr
    found, resident = parts_in(tmp_path), build() is None
    launches = {name: status for name, status in statuses(found["symbols"], 2).items() if "launch" in name}
    assert launches == {"launch cpu": "ok", "launch cuda": "wrong" if resident else "absent"}
    assert {row["row"] for row in found["symbols"]["rows"] if row["status"] == "wrong"} <= {"launch cuda"}
    assert statuses(found["right"], 2) == {
        "compile": "ok",
        "se cpu": "ok",
        "eca cpu": "hung",
        "spatial-attention cpu": "does not fit",
        "se cuda": "ok" if resident else "absent",
        "cbam cuda": "ok" if resident else "absent",
        "select cuda": "wrong" if resident else "absent",
        "simam cpu": "wrong",
    }
    se = "wrong" if resident else "ok"
    assert statuses(found["speed"]) == {"copy": "ok", "se": se, "norm-gate": "crashed", "bam": "ok"}
    whys = {row["row"].split()[0]: row.get("why", "") for part in found.values() for row in part["rows"]}
    assert "not finished after 40 seconds" in whys["eca"] and "SIGABRT" in whys["norm-gate"]
    assert "error" in whys["simam"]
    assert found["speed"]["rows"][1].get("why", "").startswith("cuda: ") == resident
    for line in ("  simam cpu float32 nchw 2x16x6x6 inference: wrong: simam:", "1 crashed"):
        assert line in done.stdout
    for row in found["speed"]["rows"][1], found["speed"]["rows"][3]:  # what is wrong is not timed
        assert set(row["passes"]["forward + backward"]) == {"eager", "cpu", "compile"}


def test_a_first_kernel_that_is_wrong(monkeypatch):
    setting, row = DRY, next(row for row in symbols.rows(DRY) if row.what)
    assert found_by(symbols, setting, row)["status"] == "ok"
    monkeypatch.setattr(symbols.functional, "channel_gate", lambda x: 1.01 * x.sigmoid())
    assert found_by(symbols, setting, row) == {"status": "wrong", "why": "error 0.00731"}


@pytest.mark.parametrize("part", [models, memory])
def test_a_network_that_fails(part, monkeypatch):
    """Its row says so, and no other is touched."""

    def fails(self, x):
        raise RuntimeError("no algorithm found\nto run it")

    monkeypatch.setattr(torch.nn.AdaptiveAvgPool2d, "forward", fails)
    rows = part.rows(DRY)
    assert found_by(part, DRY, rows[0]) == {"status": "failed", "why": "RuntimeError: no algorithm found"}


def test_a_wrong_kernel_serves_nothing(tmp_path, monkeypatch):
    """The table says why."""
    monkeypatch.setattr(type(table.judge_of(DRY)), "against", lambda *_: "wrong with ties")
    setting = Setting(True, tmp_path, 1.0)
    found = found_by(table, setting, table.rows(setting)[0])
    assert found["backend"] == "reference" and "wrong with ties" in found["why"]
    (verdict,) = networks.found_before(setting)
    assert verdict.backend == verdict.anywhere == "reference"


@pytest.mark.parametrize("part", [speed, models, table])
def test_what_rows_need_is_compiled_before(part, tmp_path, monkeypatch, capsys):
    """All that is for the first rows, by so many processes; what fails there is said where it is measured."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    setting, done = Setting(True, tmp_path, 1.0), []
    monkeypatch.setattr(part, "warm", lambda setting, row, warm=part.warm: (warm(setting, row), done.append(row.key)))
    for nth in range(3):
        warm(part, setting, nth, 3)
    assert sorted(done) == sorted(row.key for row in part.rows_to_warm(setting)) and done
    monkeypatch.setattr(part, "warm", lambda setting, row: 1 / 0)
    warm(part, setting, 0, 1)
    assert "division by zero" in capsys.readouterr().err


def test_all_cores_compile_until_their_time_is_over(monkeypatch):
    """Those that have crashed, too."""
    child = Scripted([{"done": True}], [run.Lost("it died")], [None])
    monkeypatch.setattr(run, "started", lambda *given, **more: copy.copy(child(*given, **more)))
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: range(3))
    ended = []
    monkeypatch.setattr(Scripted, "end", lambda self: ended.append(self))
    began = time.monotonic()
    run.warm("speed", SETTING, began + 0.1)
    assert [started["warm"] for started in child.started] == [[0, 3], [1, 3], [2, 3]]
    assert len(ended) == 3 and time.monotonic() - began < 5


def test_what_the_sanitizer_finds(tmp_path, monkeypatch):
    setting, row = Setting(True, tmp_path, 10.0), Row("cpu", "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitizer.measure(setting, row) == {"status": "absent", "why": "no compute-sanitizer on PATH"}
    tool = tmp_path / sanitizer.TOOL
    for script, status in (
        ("echo '========= Invalid __global__ read of size 4 bytes'; exit 99", "wrong"),
        ("echo 'unknown option'; exit 1", "failed"),
        ("echo '========= ERROR SUMMARY: 0 errors'", "ok"),
    ):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        found = sanitizer.measure(setting, row)
        assert found["status"] == status and ("Invalid" in found.get("why", "")) == (status == "wrong")


class Scripted:
    """A process that gives these answers; None: nothing any more; an exception: it is lost."""

    started: list[dict[str, Any]]

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.started, self.ended = list(scripts), [], 0

    def __call__(self, part: str, setting: Setting, environment: Any = None, **more: Any) -> Scripted:
        self.started.append(json.loads(json.dumps(more)))
        self.answers = iter(self.scripts.pop(0))
        return self

    def answer(self, until: float) -> Any:
        found = next(self.answers)
        if isinstance(found, Exception):
            raise found
        if found is None:
            time.sleep(max(0.0, until - time.monotonic()))
        return found

    def end(self) -> None:
        self.ended += 1


def trying(key: str) -> dict[str, str]:
    return {"trying": key, "group": key[0]}


def ended(key: str) -> dict[str, Any]:
    return {"row": {"row": key, "status": "ok"}}


def a_part(tmp_path: Path, monkeypatch, *scripts: list[Any], seconds: float = 60.0, step: float | None = None):
    child = Scripted(*scripts)
    monkeypatch.setattr(run, "started", child)
    part = run.Part("symbols", tmp_path / "symbols.json", {"device": "none"})
    run.run_part(part, Setting(True, tmp_path, seconds), step, lambda row: None)
    assert child.ended == len(child.started)
    assert json.loads(part.path.read_text())["left out"] == part.left_out
    return part, child


ROWS = {"rows": ["a1", "a2", "b1"]}


def test_a_deadline_cuts_the_tail(tmp_path, monkeypatch):
    """What is left out is named, and fails nothing."""
    part, _ = a_part(tmp_path, monkeypatch, [ROWS, trying("a1"), ended("a1"), None], seconds=0.2)
    assert part.left_out == ["a2", "b1"] and not part.problem and statuses({"rows": part.rows}) == {"a1": "ok"}
    part, _ = a_part(tmp_path, monkeypatch, [], seconds=0.0)
    assert part.left_out == ["all that is not there"] and part.rows == []


def test_a_row_that_hangs(tmp_path, monkeypatch):
    """Also one that takes half of its part's time."""
    for step, seconds in ((0.1, 60.0), (None, 0.3)):
        scripts = [ROWS, trying("a1"), None], [ROWS, trying("b1"), ended("b1"), {"done": True}]
        part, child = a_part(tmp_path, monkeypatch, *scripts, seconds=seconds, step=step)
        assert statuses({"rows": part.rows}) == {"a1": "hung", "b1": "ok"} and part.left_out == ["a2"]
        assert child.started[1] == {"skip": ["a1"], "given up": {"a": "a1 hung"}}


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    """Unless another environment had them, or the file is none."""
    a_part(tmp_path, monkeypatch, [ROWS, trying("a1"), ended("a1"), {"done": True}])
    for device, there in (("none", ["a1"]), ("another", [])):
        part = run.Part("symbols", tmp_path / "symbols.json", {"device": device, "date": "today"})
        part.take_up()
        assert [row["row"] for row in part.rows] == there
    part.path.write_text("{")
    part.take_up()
    assert part.rows == []


def test_what_kills_every_process_ends(tmp_path, monkeypatch):
    scripts = [[ROWS, trying(f"{i}"), run.Lost("it died")] for i in range(run.MOST_DEATHS + 1)]
    part, child = a_part(tmp_path, monkeypatch, *scripts)
    assert len(child.started) == len(part.rows) == run.MOST_DEATHS and "given up after 8 processes" in part.problem


def test_a_device_that_is_lost(tmp_path, monkeypatch):
    scripts = [ROWS, trying("a1"), {"lost": "illegal access"}], [ROWS, {"done": True}]
    part, _ = a_part(tmp_path, monkeypatch, *scripts)
    assert part.failures == [{"row": "a1", "status": "crashed", "why": "the device was lost: illegal access"}]


def test_a_part_that_does_not_start(tmp_path):
    planted = tmp_path / "planted" / "sitecustomize.py"
    planted.parent.mkdir()
    planted.write_text("import sys\nif '--part' not in sys.argv:\n    sys.exit('no disk')\n")
    done = suite(tmp_path / "out", "--part", "symbols,memory", PYTHONPATH=f"{planted.parent}:{ROOT}")
    assert done.returncode == 1 and done.stdout.count("no disk") == 2


SETTING = Setting(False, Path(), 0.0)


def test_rows_have_names_of_their_own():
    for module in (right, speed):
        keys = [row.key for row in module.rows(SETTING)]
        assert len(set(keys)) == len(keys)


def test_what_is_checked_covers_what_is_measured():
    """Each op that a measured block calls is checked before, on the streaming kernels."""
    checked = {call.question.op for call, _ in right.streamed(SETTING)}
    blocks = {row.what[0] for row in speed.rows(SETTING) if row.what}
    measured = {
        call.question.op
        for block in blocks
        for call in right.calls_of(block, (2, 64, 8, 8), "bfloat16", "channels_last", True)
    }
    assert measured - checked == set()


def test_one_sample_is_in_evaluation_mode():
    """BatchNorm does not train on one value a channel, which BAM's has there."""
    made = speed.Made("bam", (1, 32, 4, 4), torch.float32, "nchw", torch.device("cpu"), 1)
    assert not made.eager.training and not made.ours.training
    made.calls(made.ours, "reference", "forward + backward")[0]()
    assert speed.Made("bam", (2, 32, 4, 4), torch.float32, "nchw", torch.device("cpu"), 1).ours.training


def test_a_wrong_block_is_not_timed(monkeypatch):
    made = speed.Made("bam", (2, 32, 4, 4), torch.bfloat16, "nchw", torch.device("cpu"), 1)
    assert speed.agreement(made, "reference") == {"status": "ok"}  # its buffers are cast with it
    forward = type(made.ours).forward
    monkeypatch.setattr(type(made.ours), "forward", lambda self, x: forward(self, x) * 1.1)
    assert speed.agreement(made, "reference")["status"] == "wrong"


def test_device_times_are_of_one_copy(monkeypatch):
    """A graph holds a call on each copy; the L2 is left behind, and what cannot be captured is timed by the wall."""
    made = speed.Made("se", (2, 32, 4, 4), torch.float32, "nchw", torch.device("cpu"), 3)
    graphs = []

    def graph_of(call, copies):
        outputs = [call(i) for i in range(copies)]
        if len(graphs) == 1:
            graphs.append(None)
            raise RuntimeError("operation not permitted when stream is capturing")
        graphs.append(outputs)
        return lambda: None

    def interleaved(calls, device, **options):
        assert len(graphs) in (0, 3)
        return {name: Timing([3e-3 if graphs else 5e-3] * 5) for name in calls}

    for name, stand_in in (("graph_of", graph_of), ("interleaved", interleaved)):
        monkeypatch.setattr(speed, name, stand_in)
    monkeypatch.setattr(speed, "bytes_of_copy", lambda device: 1e7)
    monkeypatch.setattr(speed, "peak_memory", lambda call, device: 7)
    setting = SimpleNamespace(device=SimpleNamespace(type="cuda"), budget=lambda seconds: seconds)
    candidates = {"eager": (made.eager, "reference"), "odd": (made.eager, "reference"), "cpu": (made.ours, "reference")}
    found = speed.timed(setting, made, candidates, "forward")
    assert found["cpu"]["device"] == 1e-3 and found["cpu"]["wall"] == 5e-3 and found["cpu"]["peak bytes"] == 7
    rate = 3 * 2 * 32 * 16 * 4 / 1e-3  # three passes over the map
    assert found["cpu"]["bytes a second"] == pytest.approx(rate, rel=1e-3)
    assert found["cpu"]["of copy"] == round(rate / 1e7, 3)
    assert "device" not in found["odd"] and "capturing" in found["odd"]["no graph"]
    assert len({y.data_ptr() for y in graphs[0]}) == 3


def test_copies_are_beyond_twice_the_cache(monkeypatch):
    monkeypatch.setattr(speed, "last_cache", lambda device: 50 << 20)
    for name, shape, copies in (("se", (32, 256, 56, 56), 2), ("se", (8, 512, 7, 7), 131), ("eca", (1, 8, 2, 2), 256)):
        assert speed.copies_for(SETTING, name, shape, torch.bfloat16) == copies
        enough = copies * 2 * 2 * torch.Size(shape).numel() >= 100 << 20
        assert enough == (copies < speed.MOST_COPIES)


def test_the_table_is_of_networks_or_else_of_blocks(monkeypatch):
    """Under autocast and in training first, each class once."""
    monkeypatch.setattr(table, "placed", lambda model, setting: model)
    for pairs in (networks.DRY, (("timm:none", "timm:none"),)):
        monkeypatch.setattr(table, "pairs", lambda setting, pairs=pairs: pairs)
        rows = table.rows(SETTING)
        assert len({row.key for row in rows}) == len(rows) > 2
        call, training = rows[0].what
        assert call.question.dtype == torch.bfloat16 and call.autocast and training


def test_networks_that_cannot_be_built_are_absent(monkeypatch):
    setting = Setting(True, Path(), 1.0)
    for part, what in ((models, ("timm:none", "timm:none", "eager")), (memory, ("timm:none", "timm:none"))):
        assert part.measure(setting, Row("timm:none", "", what))["status"] == "absent"
