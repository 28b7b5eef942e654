"""A process of our own that answers in lines of JSON, and may die of what it does."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

#: Of the environment, what would have it measure something else.
HIDDEN = ("FUSED_ATTN_BACKEND", "CUDA_LAUNCH_BLOCKING")
#: In its environment, the file descriptor that it answers on: none that anything prints to.
ANSWERS = "FUSED_ATTN_ANSWERS"
PR_SET_PDEATHSIG = 1  # of Linux


class Lost(Exception):
    """The process is gone, or was ended; the message says why. foreign: nothing in it did that."""

    def __init__(self, why: str, foreign: bool = False) -> None:
        super().__init__(why)
        self.foreign = foreign


class Process:
    """`python -m module`, without what is `HIDDEN` of the environment. called: in what is said of its end."""

    def __init__(
        self, module: str, environment: Mapping[str, str], folder: Path | None = None, called: str = "it"
    ) -> None:
        self.called = called
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self.answers, theirs = os.pipe()
        hers = {**environment, ANSWERS: str(theirs)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=folder,
                env={**{k: v for k, v in os.environ.items() if k not in HIDDEN}, **hers},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # until it is at `answering`
                stderr=self.errors,
                pass_fds=[theirs],
                start_new_session=True,  # ctrl-C is for this process, which then ends that one and what it started
            )
        except BaseException:
            os.close(self.answers)
            self.errors.close()
            raise
        finally:
            os.close(theirs)
        self.read = b""

    def send(self, record: dict[str, Any]) -> None:
        """Raises Lost."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(record).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self._last_words() from error

    def answer(self, until: float) -> dict[str, Any] | None:
        """The next line, or None where there is none by then. Raises Lost."""
        with selectors.DefaultSelector() as ready:  # select() knows of the first 1024 files only
            ready.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self.read:
                left = until - time.monotonic()
                if left <= 0 or not ready.select(left):
                    return None
                more = os.read(self.answers, 1 << 16)
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
            return Lost(f"{self.called} closed its output")
        if status < 0:
            return Lost(f"{self.called} died of {signal.Signals(-status).name}", status == -signal.SIGKILL)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return Lost(f"{self.called} ended with status {status}" + (f": {lines[-1].strip()}" if lines else ""))

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.errors):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(OSError):
            os.close(self.answers)


def answering() -> Callable[..., None]:
    """In that process: what says a line. What it prints goes where its errors do. It ends with the one that started it,
    however that ends: a kernel that hangs would keep the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(2, 1)
    theirs = int(os.environ.pop(ANSWERS))
    os.set_inheritable(theirs, False)
    answers = os.fdopen(theirs, "w", buffering=1)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return say


def first_line(error: BaseException) -> str:
    """Of its message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
