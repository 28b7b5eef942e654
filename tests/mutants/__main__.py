"""Plants faults one at a time in a copy of the checkout and says which of them the tests see: `make mutants`.

    python -m tests.mutants                      every mutant
    python -m tests.mutants cpu fusion/NAME      those of a layer, or one
    python -m tests.mutants --json FILE          writes what was found

A worker a core has a copy under .cache/mutants. CPU kernels are compiled there at -O1, only what an edit touches;
CUDA kernels are what the emulator's tests compile. A mutant is caught if a test that its record names fails. At the
end the tests that caught something run without any fault: one that fails there, too, caught nothing.

The exit status is 0 if at least 95 % are caught, of those that no line calls harmless, and nothing went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from tests.mutants import ALL
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIES = ROOT / ".cache" / "mutants"
PASS = 0.95
LIMIT = 1800  # seconds a mutant's tests may take
# An edit below these needs the library built again.
BUILT = ("csrc/cpu/", "csrc/library.cpp", "csrc/fit.cpp", "csrc/codes.h", "csrc/cuda/fit.h")


class Copy:
    """A copy of the checkout in which one mutant at a time is tried, with its library compiled by `flags`."""

    def __init__(self, folder: Path, flags: str, jobs: int = 1) -> None:
        self.folder, self.flags = folder, flags
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
        ).stdout
        names = {name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()}
        for name in names:
            source, target = ROOT / name, folder / name
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for path in folder.rglob("*"):  # what has gone since the last run
            inside = path.relative_to(folder)
            if path.is_file() and inside.parts[0] not in ("build", ".cache") and str(inside) not in names:
                path.unlink()
        self.build(jobs)
        self.kept = folder / ".cache" / "built"
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(folder / "build" / "native", self.kept)

    def build(self, jobs: int = 1) -> None:
        # The environment's own ninja, as in the tests: another version's log means compiling all again.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"CXXFLAGS": self.flags, "FUSED_ATTN_CUDA": "0", "MAX_JOBS": str(jobs), "PATH": path}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("does not build: " + done.stdout[-600:] + done.stderr[-200:])

    def pytest(self, arguments: Sequence[str], limit: int = LIMIT) -> tuple[int | None, str]:
        """pytest's exit status (None: it took too long) and what it printed."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        caches = {name: str(self.folder / ".cache" / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        environment = os.environ | threads | caches
        environment |= {"PYTHONPATH": str(self.folder), "PYTEST_ADDOPTS": "", "CUDA_HOME": "/without/CUDA"}
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return None, ""
        return done.returncode, done.stdout + done.stderr

    def judge(self, layer: str, mutant: Mutant) -> dict[str, Any]:
        """One mutant's record: `by` is the test that saw it, or None."""
        file = self.folder / mutant.file
        text, times = file.read_text(), (file.stat().st_atime, file.stat().st_mtime)
        native = mutant.file.startswith(BUILT)
        record: dict[str, Any] = {"name": f"{layer}/{mutant.name}", "tests": mutant.tests}
        started = time.monotonic()
        shutil.rmtree(self.folder / ".cache" / "TORCHINDUCTOR_CACHE_DIR", ignore_errors=True)
        try:
            if text.count(mutant.old) != 1:
                raise RuntimeError(f"its text is {text.count(mutant.old)} times in {mutant.file}")
            file.write_text(text.replace(mutant.old, mutant.new))
            if native:
                self.build()
            status, printed = self.pytest(shlex.split(mutant.tests))
            record |= verdict(status, printed)
            if not record["by"] and mutant.harmless:
                record["harmless"] = mutant.harmless
        except RuntimeError as error:
            record |= {"by": None, "invalid": str(error)}
        finally:
            file.write_text(text)
            os.utime(file, times)
            if native:
                shutil.rmtree(self.folder / "build" / "native")
                shutil.copytree(self.kept, self.folder / "build" / "native")
                shutil.copy2(self.kept / "_native.so", self.folder / "fused_attn" / "_native.so")
        return record | {"seconds": round(time.monotonic() - started, 1)}


def verdict(status: int | None, printed: str) -> dict[str, Any]:
    if status is None:
        return {"by": "time"}
    if status == 0:
        return {"by": None}
    if status in (4, 5):
        return {"by": None, "invalid": "no such tests: " + printed[-300:]}
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    return {"by": failed[0] if failed else f"a crash (exit status {status})"}


def chosen(words: Sequence[str]) -> list[tuple[str, Mutant]]:
    found = [(layer, mutant) for layer, mutants in ALL.items() for mutant in mutants]
    if not words:
        return found
    found = [(layer, m) for layer, m in found if layer in words or f"{layer}/{m.name}" in words]
    if not found:
        sys.exit(f"no mutant is called {' or '.join(words)}; layers: {', '.join(ALL)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Which planted faults the tests see.")
    parser.add_argument("words", nargs="*", metavar="LAYER[/NAME]")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    mutants = chosen(given.words)

    with ThreadPoolExecutor(given.jobs) as pool:
        # What packages the library compiles it as it is compiled for people; elsewhere the quicker way does.
        copies: dict[bool, Queue[Copy]] = {
            packaging: Queue() for packaging in {layer == "build" for layer, _ in mutants}
        }
        for packaging, queue in copies.items():
            first, *others = (COPIES / f"{'as-packaged' if packaging else 'quick'}-{i}" for i in range(given.jobs))
            flags = "" if packaging else "-O1"
            queue.put(Copy(first, flags, given.jobs))
            for folder in others:
                if not folder.exists():
                    shutil.copytree(first, folder)
                queue.put(Copy(folder, flags))

        def judge(pair: tuple[str, Mutant]) -> dict[str, Any]:
            queue = copies[pair[0] == "build"]
            copy = queue.get()
            try:
                record = copy.judge(*pair)
            finally:
                queue.put(copy)
            what = record.get("invalid") or record["by"] or "NOT CAUGHT"
            print(f"{record['seconds']:6.1f} s  {record['name']}: {what}", flush=True)
            return record

        records = list(pool.map(judge, mutants))
        control = []
        for packaging, queue in copies.items():
            control += without_fault(queue.get(), [r for r in records if packaging == r["name"].startswith("build/")])

    counted = [r for r in records if "harmless" not in r and "invalid" not in r]
    caught = [r for r in counted if r["by"]]
    invalid = [r for r in records if "invalid" in r]
    if given.json:
        by = {r["name"]: r.get("invalid") or r["by"] for r in records}
        result = {"caught": len(caught), "of": len(counted), "fail without a fault": control, "by": by}
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    for record in counted:
        if not record["by"]:
            print(f"not caught: {record['name']} ({record['tests']})")
    for record in invalid:
        print(f"invalid: {record['name']}: {record['invalid']}")
    for test in control:
        print(f"fails without a fault: {test}")
    print(f"{len(caught)} of {len(counted)} caught ({len(caught) / max(1, len(counted)):.1%})")
    return int(bool(control or invalid) or len(caught) < PASS * len(counted))


def without_fault(copy: Copy, records: list[dict[str, Any]]) -> list[str]:
    """Those of the tests that caught something that fail where there is no fault."""
    tests = sorted({r["by"] for r in records if r["by"] and "::" in r["by"]})
    failed = []
    while tests:
        status, printed = copy.pytest(tests, limit=10 * LIMIT)
        if status == 0:
            break
        word = verdict(status, printed).get("by") or printed[-300:]
        failed.append(word)
        if word not in tests:
            break
        tests.remove(word)
    return failed


if __name__ == "__main__":
    sys.exit(main())
