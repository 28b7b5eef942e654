"""A part in a process of its own: what was measured is saved after every row, whatever happens to the process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .rows import BAD, Setting

ROOT = Path(__file__).resolve().parents[2]
#: Of the environment, what would have them measure something else.
HIDDEN = ("FUSED_ATTN_BACKEND", "CUDA_LAUNCH_BLOCKING")
PARTS = ("symbols", "right", "sanitizer", "speed", "table", "models", "memory")
#: Deaths of its process after which a part is given up.
MOST_DEATHS = 8
MOST_WARMING = 16
START = 90.0  # seconds for a process to say what it will measure

Record = dict[str, Any]


class Lost(Exception):
    """The process is gone or was ended. status: of the row that it was at."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


class Child:
    def __init__(self, part: str, setting: Setting, environment: dict[str, str] | None = None, **more: Any) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k not in HIDDEN} | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # so that what it started ends with it
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        start = {"part": part, **setting.as_json(), "warm": None, **more}
        with contextlib.suppress(OSError):  # it is gone, which is seen when it is asked
            self.process.stdin.write(json.dumps(start).encode() + b"\n")
            self.process.stdin.flush()
        self.pipe, self.read = self.process.stdout, b""

    def answer(self, until: float) -> Record | None:
        """The next line, or None where it is too late. Raises Lost."""
        while b"\n" not in self.read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                return None
            more = os.read(self.pipe.fileno(), 1 << 16)
            if not more:
                raise self._last_words()
            self.read += more
        line, _, self.read = self.read.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> Lost:
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return Lost("crashed", "its process closed its output")
        if status < 0:
            return Lost("crashed", f"its process died of {signal.Signals(-status).name}")
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return Lost("crashed", f"its process ended with status {status}" + (f": {lines[-1].strip()}" if lines else ""))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


@dataclass
class Part:
    """A part's JSON."""

    name: str
    path: Path
    environment: Record
    rows: list[Record] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    def save(self) -> None:
        """Whole or not at all, one line a row."""
        facts = {"environment": self.environment, "seconds": round(self.seconds, 1), "left out": self.left_out}
        head = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**facts, "problem": self.problem}.items())
        rows = ",\n".join(json.dumps(row) for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".part", delete=False) as file:
            file.write(f'{{{head},\n"rows": [\n{rows}\n]}}\n')
        os.replace(file.name, self.path)

    def take_up(self) -> None:
        """The rows that are there, of this environment."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            before = json.loads(self.path.read_text())
            kept = {k: v for k, v in before["environment"].items() if k != "date"}
            if kept == {k: v for k, v in self.environment.items() if k != "date"}:
                self.rows = before["rows"]

    @property
    def failures(self) -> list[Record]:
        return [row for row in self.rows if row["status"] in BAD]


def run_part(part: Part, setting: Setting, step: float | None, heard: Callable[[Record], None]) -> None:
    """Measure what is not there within the setting's seconds. step: for a row, else the part's own; one that takes half
    of the part's hangs."""
    module = importlib.import_module(f"{__package__}.{part.name}")
    began = time.monotonic()
    until = began + setting.seconds
    step = min(step or module.STEP, setting.seconds / 2)
    given_up: dict[str, str] = {}
    part.left_out = ["all that is not there"]  # until its process says what
    try:
        if hasattr(module, "WARM") and not setting.dry:
            warm(part.name, setting, began + module.WARM * setting.seconds)
        for _ in range(MOST_DEATHS):
            if time.monotonic() > until or _measured(part, setting, until, step, given_up, heard):
                break
        else:
            part.problem = part.problem or f"given up after {MOST_DEATHS} processes"
    finally:
        part.seconds = time.monotonic() - began
        part.save()


def _measured(
    part: Part, setting: Setting, until: float, step: float, given_up: dict[str, str], heard: Callable[[Record], None]
) -> bool:
    """Whether that is all, of what one process measures."""
    child = Child(part.name, setting, skip=[row["row"] for row in part.rows], **{"given up": given_up})
    trying: Record | None = None
    late = time.monotonic() + START

    def add(row: Record) -> None:
        part.rows.append(row)
        with contextlib.suppress(ValueError):
            part.left_out.remove(row["row"])
        part.save()
        heard(row)

    try:
        while True:
            answer = child.answer(min(until, late))
            if answer is None:
                if trying is not None and time.monotonic() >= late:
                    raise Lost("hung", f"not finished after {step:g} seconds")
                if trying is None and time.monotonic() >= late:
                    part.problem = f"its process did not start within {START:g} seconds"
                return True
            if "rows" in answer:
                there = {row["row"] for row in part.rows}
                part.left_out = [key for key in answer["rows"] if key not in there]
            elif "trying" in answer:
                trying, late = answer, time.monotonic() + step
            elif "row" in answer:
                trying = None
                add(answer["row"])
                late = time.monotonic() + START
            elif "lost" in answer:
                raise Lost("crashed", f"the device was lost: {answer['lost']}")
            else:
                return True
    except Lost as lost:
        if trying is None:
            part.problem = str(lost)
            return True
        given_up[trying["group"]] = f"{trying['trying']} {lost.status}"
        add({"row": trying["trying"], "status": lost.status, "why": str(lost)})
        return False
    finally:
        child.end()


def warm(name: str, setting: Setting, until: float) -> None:
    """Have as many processes as there are cores compile what the rows need. What is not compiled then is when it is
    measured."""
    processes = min(len(os.sched_getaffinity(0)), MOST_WARMING)
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a core each
    children = [Child(name, setting, alone, warm=[nth, processes]) for nth in range(processes)]
    try:
        for child in children:
            with contextlib.suppress(Lost):
                while (answer := child.answer(until)) is not None and "done" not in answer:
                    pass
    finally:
        for child in children:
            child.end()
