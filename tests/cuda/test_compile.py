"""The CUDA sources compile for every default architecture: no spills, no stack, few enough registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc"
REGISTERS = 65536  # of an SM, for one block of 512 threads: at most 128 a thread; two blocks of small samples: 64


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("there is no nvcc on this machine")
    return found


@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_no_spills_no_stack(tmp_path, architecture):
    include = Path(torch.__file__).parent / "include"
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-isystem",
        str(include),
    ]
    command += ["--expt-relaxed-constexpr", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Xptxas=-v", "-cubin", "-o", str(tmp_path / "cubin"), str(SOURCES / "cuda/channel_gate.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    # (3 storage types, any in float, float64) x 2 layouts x 2 directions; the parameters' in 2 accumulators
    assert len(kernels) == 22
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) * 512 <= REGISTERS, name
        print(f"sm_{architecture} {registers} registers {name}")


def test_ptx_stays_in_the_primitives():
    kernels = [p for p in (SOURCES / "cuda").glob("*.cu*") if p.name not in ("cluster.cuh", "io.cuh", "reduce.cuh")]
    assert len(kernels) >= 3
    assert not [p.name for p in kernels if "asm" in p.read_text()]


@pytest.fixture(scope="module")
def plan():
    import fused_attn  # noqa: F401  loads the native library

    if not hasattr(torch.ops.fused_attn, "resident_cluster_size"):
        pytest.skip("the native library was built without CUDA")

    def ask(channels, spatial, itemsize=2, backward=False, capability=90, channels_last=False, pool=0):
        arguments = (
            channels,
            spatial,
            itemsize,
            channels_last,
            2,
            channels // 16,
            0,
            pool,
            False,
            False,
            backward,
        )
        return torch.ops.fused_attn.resident_cluster_size(*arguments, capability)

    return ask


@pytest.mark.parametrize("channels_last", [False, True])
def test_where_samples_fit(plan, channels_last):
    shapes = {(256, 56 * 56): (8, 16), (512, 28 * 28): (4, 8), (1024, 14 * 14): (2, 4), (2048, 7 * 7): (1, 2)}
    if channels_last:  # partial sums of 2048 channels take the room that the last KiB of the sample needs
        shapes[2048, 7 * 7] = (2, 4)
    for (channels, spatial), (forward, backward) in shapes.items():
        assert plan(channels, spatial, channels_last=channels_last) == forward
        assert plan(channels, spatial, channels_last=channels_last, backward=True) == backward
    assert plan(256, 56 * 56, itemsize=4, backward=True) == 0  # 6.4 MB: more than any cluster holds
    assert plan(480, 14 * 14, capability=80) == 0 and plan(480, 14 * 14) == 1
    assert plan(256, 14 * 14, capability=80) == 1
    assert plan(256, 56 * 56, capability=120) == 0
