"""The CUDA kernels of the library that was built, for every architecture: no spills, no stack, few enough registers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from fused_attn import backends

SOURCES = Path(__file__).parents[2] / "csrc"
REGISTERS = 65536  # of an SM, for one block of 512 threads: at most 128 a thread; two blocks of small samples: 64
#: In each of three sources (3 storage types, any in float, float64) x 2 layouts x 2 directions, and 2 for parameters.
KERNELS = 3 * 22


def test_no_spills_no_stack():
    cuda = backends.build_record().get("cuda", {"built": False, "reason": "no record of a build"})
    if not cuda["built"]:
        pytest.skip(f"the native library was built without CUDA: {cuda['reason']}")
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("triton, which brings cuobjdump, is not installed")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", backends.LIBRARY_PATH]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[tuple[str, ...]]] = {}
    for part in report.split("arch = ")[1:]:  # a source and an architecture each
        found = re.findall(r"Function (\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        if found:  # else PTX
            kernels.setdefault(part.split()[0], []).extend(found)
    assert len(kernels) == len(cuda["architectures"])
    for architecture, found in kernels.items():
        assert len(found) == KERNELS
        for name, registers, stack, local in found:
            assert (stack, local) == ("0", "0"), name
            assert int(registers) * 512 <= REGISTERS, name
            print(f"{architecture} {registers} registers {name}")


def test_ptx_stays_in_the_primitives():
    primitives = ("cluster.cuh", "io.cuh", "reduce.cuh")
    kernels = [p for p in (SOURCES / "cuda").iterdir() if p.name not in primitives]
    assert len(kernels) >= 6
    assert not [p.name for p in kernels if "asm" in p.read_text()]
