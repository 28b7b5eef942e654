"""Measuring in another process: what crashes or hangs there does not serve, and the rest goes on in a new one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..verdicts import Verdict, environment_of, verdict_from_json
from .calls import Call, call_as_json
from .process import Lost, Process

#: Seconds for a process to start, for one step of a trial (a few kernels are compiled in it), and for all of them.
START, STEP, ALL = 120.0, 120.0, 300.0


class Job(NamedTuple):
    call: Call
    training: bool


def _started(device: torch.device) -> Process:
    # Modules come from where they come from here and from nowhere else, and no backend is asked for.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str))
    process = Process(f"{__package__}.child", {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"})
    try:
        process.send({"device": str(device), "threads": torch.get_num_threads()})
        theirs, ours = _answer(process, START)["environment"], environment_of(device)
        if theirs != ours:
            differs = [f"{key} is {theirs.get(key)}, not {ours[key]}" for key in ours if theirs.get(key) != ours[key]]
            raise Lost(f"in its process {'; '.join(differs)}")
    except BaseException:
        process.end()
        raise
    return process


def _answer(process: Process, limit: float) -> dict[str, Any]:
    """The next line. Raises Lost."""
    found = process.answer(time.monotonic() + limit)
    if found is None:
        raise Lost(f"no answer within {limit:g} seconds")
    return found


def measure(
    jobs: Sequence[Job], device: torch.device, show: Callable[[int, str], None], limit: float = ALL
) -> Iterator[Verdict | str]:
    """For each of these a verdict, or why it could not be measured now.

    show: gets how many are done, and what is next. limit: seconds for all of them.
    """
    until = time.monotonic() + limit
    failed: dict[str, dict[str, str]] = {}  # by op, backends that are given up
    hopeless = ""
    process: Process | None = None
    try:
        for done, job in enumerate(jobs):
            question = job.call.question
            show(done, f"{question.op} {str(question.dtype)[6:]} {'x'.join(map(str, job.call.sizes))}")
            given_up = failed.setdefault(question.op, {})
            found: Verdict | str | None = None
            while found is None:
                if time.monotonic() > until:
                    hopeless = f"no time left after {limit:g} seconds"
                tried: list[str] = []
                try:
                    if hopeless:
                        raise Lost(hopeless)
                    process = process or _started(device)
                    process.send({"call": call_as_json(job.call), "training": job.training, "failed": given_up})
                    while "tried" in (answer := _answer(process, STEP)):
                        tried = answer["tried"]
                    if "lost" in answer:
                        raise Lost(answer["lost"])
                    found = verdict_from_json(answer["verdict"]) if "verdict" in answer else answer["unmeasured"]
                except Lost as error:
                    if process is None:
                        hopeless = str(error)
                    else:
                        process.end()
                        process = None
                    if tried and not error.foreign:
                        given_up |= dict.fromkeys(tried, f"failed: {error}")
                    else:
                        found = f"{question.op}: {error}"
            yield found
    finally:
        if process is not None:
            process.end()
