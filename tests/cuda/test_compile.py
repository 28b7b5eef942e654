"""The CUDA kernels of the library that was built, for every architecture: no spills, no stack, few enough registers."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def plan():
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


# The smallest clusters, forward and backward, of bfloat16 samples: (layout, cbam) in each column.
FITS = {
    (256, 56): {(False, False): (16, 16), (False, True): (16, 16), (True, False): (8, 16), (True, True): (16, 16)},
    (512, 28): {(False, False): (4, 8), (False, True): (4, 8), (True, False): (4, 8), (True, True): (8, 8)},
    (1024, 14): {(False, False): (2, 4), (False, True): (4, 4), (True, False): (2, 4), (True, True): (4, 8)},
    (2048, 7): {(False, False): (1, 2), (False, True): (2, 4), (True, False): (1, 2), (True, True): (2, 4)},
    (64, 112): {(False, False): (0, 0), (False, True): (0, 0), (True, False): (16, 0), (True, True): (16, 0)},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cbam", [False, True])
def test_where_samples_gated_by_position_fit(plan, channels_last, cbam):
    def ask(channels, size, *, itemsize=2, backward=False, capability=90):
        arguments = (channels, 1, size, size, 1, 7, 7, itemsize, channels_last, cbam, 2 * cbam, channels // 16)
        return torch.ops.fused_attn.resident_space_cluster_size(*arguments, 0, 3, False, False, backward, capability)

    for shape, expected in FITS.items():
        assert (ask(*shape), ask(*shape, backward=True)) == expected[channels_last, cbam]
    assert ask(256, 56, itemsize=4, backward=True) == 0
    assert ask(256, 14, capability=80) == 1 and ask(256, 14, capability=80, backward=True) == 0


# The smallest clusters, forward and backward, of two bfloat16 branches.
SELECT_FITS = {(64, 56): (4, 8), (128, 56): (8, 16), (256, 28): (4, 8), (512, 14): (2, 4), (1024, 7): (1, 2)}


@pytest.mark.parametrize("channels_last", [False, True])
def test_where_branches_fit(plan, channels_last):
    def ask(channels, size, *, paths=2, itemsize=2, affine=False, capability=90):
        arguments = (channels, size * size, itemsize, channels_last, paths, max(channels // 16, 32), affine, False)
        plan = torch.ops.fused_attn.resident_select_cluster_size
        return plan(*arguments, False, capability), plan(*arguments, True, capability)

    for shape, expected in SELECT_FITS.items():
        assert ask(*shape) == expected
    assert ask(1024, 7, affine=True) == ((2, 2) if channels_last else (1, 2))  # the tables are of all channels
    assert ask(64, 56, paths=4, itemsize=4) == (16, 0)
    assert ask(128, 56, paths=4, itemsize=4) == (0, 0)
    assert ask(512, 7, capability=80) == ((1, 0) if channels_last else (1, 1))
    assert ask(512, 14, capability=80) == (0, 0)
    assert ask(64, 7, paths=9) == (0, 0)
