"""What a part measures, row by row, and where."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_attn.qualification.process import first_line

#: How a row may end: those that fail the run, and those that do not.
BAD = ("wrong", "failed", "crashed", "hung")
GOOD = ("ok", "does not fit", "refused", "absent")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "amp": torch.bfloat16}


class Row(NamedTuple):
    """key: its name in the JSON. group: where a row takes its process with it, the others of its group are left out."""

    key: str
    group: str
    what: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Setting:
    """dry: the same code on the CPU and an emulator, and tiny maps. folder: of the JSONs. seconds: of the part."""

    dry: bool
    folder: Path
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"dry": self.dry, "folder": str(self.folder), "seconds": self.seconds}

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpu", "cuda") if self.dry else ("triton", "cuda")

    def budget(self, seconds: float) -> float:
        """Seconds that a comparison is timed."""
        return 0.01 if self.dry else seconds


@contextlib.contextmanager
def in_place_of_a_card() -> Iterator[None]:
    """In a dry run the resident kernels serve the CPU, on an emulated machine, where that was built."""
    from tests.emulate.library import on_the_cpu, with_limits

    with on_the_cpu() as there:
        limits = with_limits() if there else None
        yield
        del limits


def sized(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def state_of_card() -> dict[str, Any]:
    """Clocks, temperature and power now, as nvidia-smi says them, or why not."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"absent": "no nvidia-smi"}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return dict(zip(fields, (float(number) for number in said.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"absent": first_line(error)}
