"""The host side of a launch, on a stand-in for the CUDA runtime: devices, streams, clusters, drivers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.workers import folder_of_the_run, one_at_a_time

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
#: A torch with CUDA, as far as it is looked up: the stream of device n is at 100 + n.
LIBTORCH_CUDA = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
    *stream = reinterpret_cast<void*>(100L + device);
    return device > 1;
}
"""


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("there is no g++ to build with")
    return found


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    target = folder_of_the_run(tmp_path_factory) / "device"
    command = [compiler(), *FLAGS, f"-I{HERE / 'stand_in'}", "-isystem", Path(torch.__file__).parent / "include"]
    with one_at_a_time(target):
        if not target.exists():
            subprocess.run([*command, HERE / "device.cpp", "-o", target, "-ldl", "-pthread"], check=True)
    return target


def standin_of_torch(folder: Path) -> Path:
    """libtorch_cuda.so, with that one function."""
    (folder / "cuda.cpp").write_text(LIBTORCH_CUDA)
    library = folder / "libtorch_cuda.so"
    shared = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so"]
    subprocess.run([compiler(), *shared, folder / "cuda.cpp", "-o", library], check=True)
    return library


def run(program: Path, scenario: str, *arguments: Path) -> dict[str, list[str]]:
    """What a scenario printed: the first word of a line -> what follows."""
    done = subprocess.run([program, scenario, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = defaultdict(list)
    for line in done.stdout.splitlines():
        word, _, rest = line.partition(" ")
        found[word].append(rest)
    return found


def calls(found: dict[str, list[str]]) -> dict[str, int]:
    return {name: int(count) for name, _, count in (line.rpartition(" ") for line in found["calls"])}


def error(found: dict[str, list[str]]) -> str:
    (line,) = found["error"]
    return line.partition("fused_attn: ")[2]


def test_torchs_stream_is_found_where_torch_keeps_it(program, tmp_path):
    """Python loads torch's libraries for nobody but those that name them."""
    assert run(program, "stream", standin_of_torch(tmp_path))["stream"] == ["101"]


def test_a_torch_without_cuda_says_so(program):
    assert error(run(program, "stream")) == "this torch has no CUDA (no libtorch_cuda.so is loaded)"


def test_a_kernel_is_prepared_once_a_device(program):
    """By eight threads that launch two kernels on two devices."""
    counts = calls(run(program, "threads"))
    assert counts["launch"] == 400
    assert [counts[name] for name in ("attributes", "shared", "allowed", "occupancy")] == [4, 4, 4, 4]
    assert counts["driver"] == 1


def test_leaving_a_device_makes_no_context_elsewhere(program):
    found = run(program, "restore")
    assert found["context"] == ["1"]
    assert found["of"][0] == "torch 0"  # which goes on where it was


def test_leaving_a_device_goes_back(program):
    assert run(program, "restore a context")["current"] == ["0"]


def test_a_launch_is_on_the_device_of_its_maps(program):
    """Even if torch's CUDA runtime, another than the one linked in, made it current for itself alone."""
    assert run(program, "apart")["launched-on"] == ["1"]
    assert run(program, "restore")["launched-on"] == ["1"]


@pytest.mark.parametrize(
    "machine, cluster",
    [
        ("room 16", 16),
        ("room 8", 8),
        ("room 2", 2),
        ("room 1", 1),  # a part of a card
        ("largest 8", 8),
        ("registers 65", 16),  # of a block of 512 threads: one a multiprocessor
        ("non_portable 0", 8),
        ("clusters 0 capability 80", 1),
        ("clusters 0 capability 80 ptx 80", 1),
        ("ptx 80", 1),  # code for 8.0 on a newer card: its blocks know of no cluster
    ],
)
def test_no_larger_cluster_than_finds_a_place(program, machine, cluster):
    found = run(program, machine)
    assert found["launched"] == [str(cluster)]
    assert found["last"] == ["error 0"]
    expected = {200: 1, 1700: 8, 3500: 16, 4000: 32}  # KiB -> blocks of 227 KiB, a power of two
    if cluster > 1 and "registers" not in machine:
        expected[200] = 2  # two blocks of a multiprocessor
    spread = {int(kib): int(blocks) for kib, blocks in (line.split() for line in found["cluster"])}
    assert spread == {kib: blocks if blocks <= cluster else 0 for kib, blocks in expected.items()}


@pytest.mark.parametrize(
    "versions, problem",
    [
        ("driver 13000 runtime 13020", None),  # within a major version any driver serves
        ("driver 13020 runtime 12080", None),
        ("driver 12080 runtime 13000", "built with CUDA 13.0, this driver serves CUDA 12.8: update the driver, "),
        ("driver 0", "there is no CUDA driver"),
    ],
)
def test_an_older_driver_is_named(program, versions, problem):
    found = run(program, versions)
    if problem is None:
        assert not found["error"] and found["launched"]
    else:
        assert problem in error(found)
        assert calls(found) == {"driver": 1} and not found["context"]


@pytest.mark.parametrize(
    "machine, words",
    [
        ("capability 75", "the CUDA kernels need compute capability 8.0 or newer, CUDA device 1 has 7.5; use "),
        (
            "ptx 0 capability 110",
            "the CUDA kernels that were built do not run on CUDA device 1 (no kernel image is available for execution"
            ' on the device): build fused_attn with TORCH_CUDA_ARCH_LIST="11.0", or use the triton backend',
        ),
    ],
)
def test_a_device_that_nothing_was_built_for_is_named(program, machine, words):
    assert error(run(program, machine)).startswith(words)
