"""A part in a process of its own: what was measured is saved after every row, whatever happens to the process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fused_attn.qualification.process import Lost, Process
from fused_attn.verdicts import write_whole

from .rows import BAD, Setting

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("symbols", "right", "sanitizer", "speed", "table", "models", "memory")
#: Deaths of its process after which a part is given up.
MOST_DEATHS = 8
MOST_WARMING = 16
START = 90.0  # seconds for a process to say what it will measure

Record = dict[str, Any]


class Failed(Exception):
    """status: of the row that the process was at."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


def started(part: str, setting: Setting, environment: dict[str, str] | None = None, **more: Any) -> Process:
    process = Process(f"{__package__}.child", environment or {}, ROOT, "its process")
    with contextlib.suppress(Lost):  # it is gone, which is seen when it is asked
        process.send({"part": part, **setting.as_json(), "warm": None, **more})
    return process


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
        write_whole(self.path, f'{{{head},\n"rows": [\n{rows}\n]}}\n')

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
    child = started(part.name, setting, skip=[row["row"] for row in part.rows], **{"given up": given_up})
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
                    raise Failed("hung", f"not finished after {step:g} seconds")
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
                raise Failed("crashed", f"the device was lost: {answer['lost']}")
            else:
                return True
    except (Lost, Failed) as error:
        status = error.status if isinstance(error, Failed) else "crashed"
        if trying is None:
            part.problem = str(error)
            return True
        given_up[trying["group"]] = f"{trying['trying']} {status}"
        add({"row": trying["trying"], "status": status, "why": str(error)})
        return False
    finally:
        child.end()


def warm(name: str, setting: Setting, until: float) -> None:
    """Have as many processes as there are cores compile what the rows need. What is not compiled then is when it is
    measured."""
    processes = min(len(os.sched_getaffinity(0)), MOST_WARMING)
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a core each
    children = [started(name, setting, alone, warm=[nth, processes]) for nth in range(processes)]
    try:
        for child in children:
            with contextlib.suppress(Lost):
                while (answer := child.answer(until)) is not None and "done" not in answer:
                    pass
    finally:
        for child in children:
            child.end()
