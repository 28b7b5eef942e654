"""What `fuse` makes of the networks of public packages, which are installed in an environment of their own.

    python -m benchmarks.hosts [--environment FOLDER] [--only PATTERN] [--json FILE] [--again] [--page FILE]

A network a row: the products of a map and a gate that eager runs, how many of them are fused, why the others are left
alone, and whether outputs, gradients and buffers are the network's own, in float64 and float32, in training and
evaluation, with tails and without. A network that fails is a row that says so. With --json an interrupted run goes on
where it was; with --environment what is installed is kept (2.5 GB). The exit code is 1 where a value is wrong, or a
block is called fused that is not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from .networks import HELPERS, PACKAGES
from .run import ROOT, add_options


def install(folder: Path) -> Path:
    """The environment's Python. What is there at the same versions is not installed again."""
    python = folder / "bin" / "python"
    listed = folder / "installed.txt"
    wanted = "\n".join((f"torch=={torch.__version__.split('+')[0]}", *HELPERS, *PACKAGES))
    if listed.exists() and listed.read_text() == wanted:
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, wanted.splitlines()[0], *HELPERS], check=True)
    for package in PACKAGES:
        if subprocess.run([*pip, "--no-deps", package]).returncode:
            print(f"{package} cannot be installed: its networks fail below", flush=True)
    listed.write_text(wanted)
    return python


def main(arguments: list[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--environment", type=Path, default=None, help="a folder to keep; default: a temporary one")
    parser = argparse.ArgumentParser("benchmarks.hosts", description=__doc__.splitlines()[0], parents=[own])
    add_options(parser)
    parser.parse_args(arguments)  # what it does not know is said before anything is installed
    given, rest = own.parse_known_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = given.environment or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = install(folder.resolve())
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        settings = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "1"}
        code = "import sys; from benchmarks.hosts.run import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.run([python, "-c", code, *rest], env={**os.environ, **settings}).returncode


if __name__ == "__main__":
    sys.exit(main())
