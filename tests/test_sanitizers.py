"""The CPU kernels under AddressSanitizer and UBSan: tests of the operators, on a library built with both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.workers import folder_of_the_run, one_at_a_time

ROOT = Path(__file__).parents[1]
TORCH = Path(torch.__file__).parent
SOURCES = sorted([*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp")])
FLAGS = ["-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# AddressSanitizer sees what the checks left out would; without them and with its own as calls, a third of the time.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr,null,pointer-overflow,object-size"]
AS_CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]

#: Tests of what decides where a kernel reads and writes: shapes, layouts, pieces, prologue and epilogue.
ENDS = "prologue or epilogue or ties or convolution or mixed or pools or groups or branches or write_over"
#: Where vectors end and threads part, which their width decides; bfloat16 stands for float16.
EDGES = "strides or empty or kernels or threads or pieces or parts or bits or shapes_and_dtypes or squeeze or scale"
NOT = "any_shape or gradcheck or opcheck or compiles or one_graph or torch.float16"
#: instruction set -> its tests
CHOSEN = {"avx512bf16": f"({EDGES}) and bfloat16", "avx512": f"{ENDS} or {EDGES}", "avx2": EDGES, "baseline": EDGES}
#: run -> the ops
RUNS = {
    "avx512bf16: positions": ("position_attention",),
    "avx512: gates of channels": ("channel_gate", "squeeze_scale", "norm_gate", "simam", "context_pool"),
    "avx512: gates of positions": ("spatial_gate", "cbam", "spatial_logits", "axis_pool", "position_attention"),
    "avx512: mixtures": ("mixed_scale", "select", "criss_cross"),
    "avx2": ("channel_gate", "norm_gate", "spatial_gate", "axis_pool", "select", "criss_cross"),
    "baseline": (
        *("channel_gate", "norm_gate", "simam", "context_pool", "spatial_gate", "cbam", "axis_pool", "mixed_scale"),
        *("select", "position_attention", "criss_cross", "resident"),
    ),
}


def runtime(name: str) -> str | None:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all workers of a run build."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if None in (runtime("libasan.so"), runtime("libubsan.so")):
        pytest.skip("g++ has no AddressSanitizer or UBSan runtime")
    folder = folder_of_the_run(tmp_path_factory) / "sanitized"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(source: Path, folder: Path) -> Path:
    """The source's object, compiled once for all workers."""
    target = folder / f"{source.stem}.o"
    with one_at_a_time(target):
        if not target.exists():
            part = target.with_suffix(".part")
            command = ["g++", *FLAGS, *SANITIZERS, *AS_CALLS, f"-I{TORCH / 'include'}", "-c", source, "-o", part]
            subprocess.run(command, check=True)
            part.rename(target)
    return target


@pytest.mark.slow  # up to 40 s
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles(source, folder):
    """A test each, so that workers share them."""
    assert compiled(source, folder).stat().st_size


@pytest.fixture(scope="session")
def checkout(folder: Path) -> Path:
    """The package, with a library under sanitizers, and its tests."""
    objects = [compiled(source, folder) for source in SOURCES]
    checkout = folder / "checkout"
    with one_at_a_time(checkout):
        if not (library := checkout / "fused_attn" / "_native.so").exists():
            for name in ("fused_attn", "tests"):
                ignored = shutil.ignore_patterns("*.so", "__pycache__")
                shutil.copytree(ROOT / name, checkout / name, ignore=ignored, dirs_exist_ok=True)
            shutil.copyfile(ROOT / "pyproject.toml", checkout / "pyproject.toml")
            part = folder / "_native.so"
            command = ["g++", "-shared", *SANITIZERS, *objects, "-o", part, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            part.rename(library)
    return checkout


@pytest.mark.slow  # up to 40 s
@pytest.mark.parametrize("run", RUNS)
def test_operators(run, checkout):
    isa = run.partition(":")[0]
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(checkout),
        "PYTEST_ADDOPTS": "",
        "FUSED_ATTN_ISA": isa,
    }
    files = [f"tests/ops/test_{op}.py" for op in RUNS[run]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=8"]
    command += ["-k", f"({CHOSEN[isa]}) and not ({NOT})", *files]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    print(done.stdout)
