"""The CPU kernels under AddressSanitizer and UBSan: their own tests, on a library built with both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]


def runtime(name: str) -> str | None:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.slow  # some minutes, half of them compiling
@pytest.mark.timeout(1800)
def test_cpu_kernels(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    preload = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in preload:
        pytest.skip("g++ has no AddressSanitizer or UBSan runtime")
    package, torch_root = tmp_path / "fused_attn", Path(torch.__file__).parent
    shutil.copytree(ROOT / "fused_attn", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "csrc" / "library.cpp"]

    def build(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        include = f"-I{torch_root / 'include'}"
        subprocess.run(["g++", *FLAGS, *SANITIZERS, include, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    library = ["-o", package / "_native.so", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    subprocess.run(["g++", "-shared", *SANITIZERS, *objects, *library], check=True)

    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": str(tmp_path),
    }
    ends = "prologue or epilogue or ties or convolution or mixed or pools or groups or branches or write_over"
    # Where vectors end and threads part, which their width decides; bfloat16 stands for float16.
    edges = "strides or empty or kernels or threads or parts or bits"
    ops = ("channel_gate", "spatial_gate", "cbam", "mixed_scale", "select", "norm_gate")
    files = [tmp_path / "tests" / "ops" / f"test_{op}.py" for op in ops]
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", tmp_path]
    for isa, selection in (("avx2", f"{ends} or {edges}"), ("baseline", edges)):
        selection = f"({selection}) and not (any_shape or gradcheck or opcheck or compiles or torch.float16)"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "-k", selection, *files],
            env={**environment, "FUSED_ATTN_ISA": isa},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert " passed" in done.stdout
