"""Measuring in another process: what crashes or hangs there does not serve, and the rest goes on in a new one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import torch

from ..verdicts import Verdict, verdict_from_json
from .calls import Call, call_as_json

#: Seconds for a process to start, for one step of a trial (a few kernels are compiled in it), and for all of them.
START, STEP, ALL = 120.0, 120.0, 300.0


class Job(NamedTuple):
    call: Call
    training: bool


class Lost(Exception):
    """The process is gone, or was ended; the message says why. foreign: nothing in it did that."""

    def __init__(self, why: str, foreign: bool = False) -> None:
        super().__init__(why)
        self.foreign = foreign


class _Process:
    def __init__(self, device: torch.device) -> None:
        # Modules come from where they come from here and from nowhere else, and no backend is asked for.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        kept = {k: v for k, v in os.environ.items() if k not in ("FUSED_ATTN_BACKEND", "CUDA_LAUNCH_BLOCKING")}
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child"],
            env={**kept, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # ctrl-C is for this process, which then ends that one
        )
        self.read = b""
        try:
            self.send({"device": str(device), "threads": torch.get_num_threads()})
            self.answer(START)
        except BaseException:
            self.end()
            raise

    def send(self, record: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(record).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._last_words() from error

    def answer(self, limit: float) -> dict[str, Any]:
        """The next line. Raises Lost."""
        assert self.process.stdout is not None
        until = time.monotonic() + limit
        while b"\n" not in self.read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise Lost(f"no answer within {limit:g} seconds")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise self._last_words()
            self.read += more
        line, _, self.read = self.read.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> Lost:
        """How it died. Killed it is by others, as where the machine has no memory left."""
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return Lost("it closed its output")
        if status < 0:
            return Lost(f"it died of {signal.Signals(-status).name}", status == -signal.SIGKILL)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return Lost(f"it ended with status {status}" + (f": {lines[-1].strip()}" if lines else ""))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def measure(
    jobs: Sequence[Job], device: torch.device, show: Callable[[int, str], None], limit: float = ALL
) -> Iterator[Verdict | str]:
    """For each of these a verdict, or why it could not be measured now.

    show: gets how many are done, and what is next. limit: seconds for all of them.
    """
    until = time.monotonic() + limit
    failed: dict[str, dict[str, str]] = {}  # by op, backends that are given up
    hopeless = ""
    process: _Process | None = None
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
                    process = process or _Process(device)
                    process.send({"call": call_as_json(job.call), "training": job.training, "failed": given_up})
                    while "tried" in (answer := process.answer(STEP)):
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
