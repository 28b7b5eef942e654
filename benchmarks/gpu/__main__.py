"""The GPU suite: whether it works, whether it is right, and how fast it is, within eight minutes.

    python -m benchmarks.gpu [--part PART,...] [--resume] [--minutes 8] [--out benchmarks/results] [--dry-run]

Needs torch and Triton only; what else is missing is said. Each part runs in a process of its own, within its share of
the time, and leaves its JSON in a folder of the card, saved after every row; --resume measures what is not there. The
exit code is 1 where anything is wrong, failed, crashed or hung, and 0 where rows are only left out for time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fused_attn.bench.measure import environment
from fused_attn.verdicts import environment_of

from .networks import TABLES
from .report import lines_of
from .rows import Setting
from .run import PARTS, ROOT, Part, Record, run_part

RESULTS = ROOT / "benchmarks" / "results"
RESERVE = 5.0  # seconds for what is left to do


def parts_named(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}; got {name!r}")
    return [name for name in PARTS if name in names]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=parts_named, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends within this; default: 8")
    parser.add_argument("--step", type=float, default=None, help="seconds after which a row hangs; default: by part")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there, of the same environment")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results; dry: nowhere")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same code on the CPU, an emulator and tiny maps: no figures"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given, began = options(arguments), time.monotonic()
    if not torch.cuda.is_available() and not given.dry_run:
        print("benchmarks.gpu: no CUDA device here; --dry-run runs the same code on the CPU", file=sys.stderr)
        return 2
    if given.dry_run and (why := emulator()):
        print(f"benchmarks.gpu: without the resident kernels: {why}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        out = given.out
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory())) if given.dry_run else RESULTS
        out = out.resolve()  # children run elsewhere
        device = torch.device("cpu" if given.dry_run else "cuda")
        facts: dict[str, Any] = {**environment(device), **environment_of(device)}
        card = re.sub(r"[^A-Za-z0-9]+", "-", str(facts["device"])).strip("-")
        folder = out / (f"dry-{card}" if given.dry_run else card)
        parts = run(given, folder, facts, began + 60 * given.minutes - RESERVE)
        for part in parts:
            print("\n".join(lines_of(part)))
    print("dry run: no GPU figures" if given.dry_run else f"figures: {folder}")
    return int(any(part.failures or part.problem for part in parts))


def emulator() -> str | None:
    """Build it; why that cannot be, or None."""
    from tests.emulate.library import build

    return build()


def run(given: argparse.Namespace, folder: Path, facts: dict[str, Any], until: float) -> list[Part]:
    """Each part within its share of what is left, which its `SECONDS` are of all to come."""
    shares = {name: importlib.import_module(f"{__package__}.{name}").SECONDS for name in given.part}
    done: list[Part] = []
    for name in given.part:
        part = Part(name, folder / f"{name}.json", facts)
        if given.resume:
            part.take_up()
        if name == "table" and not part.rows:
            shutil.rmtree(folder / TABLES, ignore_errors=True)
        left = until - time.monotonic()
        seconds = left * shares[name] / sum(shares[other] for other in given.part[len(done) :])
        setting = Setting(given.dry_run, folder, max(seconds, 0.0))

        def heard(row: Record, name: str = name) -> None:
            print(f"{name}: {row['row']}: {row['status']} {row.get('why', '')}".rstrip(), file=sys.stderr, flush=True)

        run_part(part, setting, given.step, heard)
        done.append(part)
    return done


if __name__ == "__main__":
    sys.exit(main())
