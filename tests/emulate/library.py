"""The backend "cuda" where there is no GPU: its kernels and the host side of their launches, as they are, on the
emulated machine. Without pytest, for the GPU suite's dry run, too."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from fused_attn import backends

from ..workers import one_at_a_time

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STAND_IN = ROOT / "tests" / "cuda" / "stand_in"
FOLDER = ROOT / "build" / "emulate"
SOURCES = ("channel_gate", "select", "spatial_gate")
FLAGS = ("-std=c++17", "-Og", "-fPIC", "-shared", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-DFUSED_ATTN_EMULATE")
LIMITS = "resident_limits"
#: By the native library, of the cards that are there: it was built with CUDA.
LIMITS_ARE_KNOWN = hasattr(torch.ops.fused_attn, LIMITS)
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def libraries() -> list[Path]:
    """Where they lie: named by what they are made of."""
    made_of = hashlib.sha256(str((torch.__version__, FLAGS, TARGET, LIMITS_ARE_KNOWN)).encode())
    for folder in (ROOT / "csrc", ROOT / "csrc" / "cuda", HERE, STAND_IN):
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cu", ".cuh", ".cpp")):
            made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    return [FOLDER / f"{name}-{made_of.hexdigest()[:12]}.so" for name in SOURCES]


def build() -> str | None:
    """Build what is not there, at once; why it cannot be, or None."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        return "there is no g++"
    torchs = Path(torch.__file__).parent
    own = [f"-I{HERE}", f"-I{STAND_IN}", "-isystem", str(torchs / "include")]
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(FOLDER / "library"):
            missing = [path for path in libraries() if not path.exists()]
            started = []
            for path in missing:
                name = path.name.partition("-")[0]
                for old in FOLDER.glob(f"{name}-*"):
                    old.unlink()
                source = ["-DLIMITS_ARE_KNOWN"] if LIMITS_ARE_KNOWN else []
                source += [f'-DKERNELS="../../csrc/cuda/{name}.cu"', str(HERE / "library.cpp")]
                linked = ["-o", f"{path}.new", f"-L{torchs / 'lib'}", "-ltorch_cpu"]
                command = [compiler, *FLAGS, TARGET, *own, *source, *linked]
                started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            said = [process.communicate()[1] for process in started]
            for path, process, errors in zip(missing, started, said, strict=True):
                if process.returncode:
                    return next((line for line in errors.splitlines() if "error" in line), errors.strip())[-300:]
                os.replace(f"{path}.new", path)
    except OSError as error:
        return str(error)
    return None


@contextlib.contextmanager
def on_the_cpu() -> Iterator[bool]:
    """Within it "cuda" serves tensors on the CPU; nothing of it where it was not built."""
    there = all(path.exists() for path in libraries())
    before, candidates = dict(backends.UNAVAILABLE), backends.CANDIDATES["cpu"]
    if there:
        for path in libraries():
            torch.ops.load_library(str(path))
        backends.CANDIDATES["cpu"] = (*candidates, "cuda")
        for op in backends.OPS:
            if ("cuda", op) not in backends.MISSING:
                backends.UNAVAILABLE["cuda", op, "cpu"] = None
    try:
        yield there
    finally:
        backends.CANDIDATES["cpu"] = candidates
        backends.UNAVAILABLE.clear()
        backends.UNAVAILABLE.update(before)


def with_limits() -> torch.library.Library:
    """As long as it is kept, what the stand-in's card holds can be asked for, within `on_the_cpu`: for a process of its
    own, because torch goes on to list what was looked up once."""
    defined = torch.library.Library("fused_attn", "FRAGMENT")
    if not LIMITS_ARE_KNOWN:
        defined.define(f"{LIMITS}(int device) -> (int shared, int cluster)")
    return defined
