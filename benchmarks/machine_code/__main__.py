"""What the machine code of the GPU kernels says of their speed on an H100, without one.

    python -m benchmarks.machine_code [--op OP] [--kernel NAME] [--shape CxHxW] [--layout LAYOUT] [--json FILE]

Compiles the kernels for sm_90 as they are launched in bfloat16, walks through their instructions (`walk`) and prints a
row a launch: registers, programs a multiprocessor, kilobytes from memory in flight there, instructions and accesses a
thread for 16 bytes of the maps that it moves, in the innermost loop that moves most of them and in the whole launch,
microseconds, the speed in per cent of a copy's (`model`), and what binds it. `/n`: divisions and calls in loops.
Last the sum over a training step of SE-ResNet-50 beside the bytes that eager moves.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import triton

from fused_attn import info

from . import cases, launch, model, resident

HEAD = (
    f"{'op shape layout':<38}{'kernel':<24}{'regs':>5}{'fit':>4}{'KB':>6}"
    f"{'loop: instr':>12}{'acc':>6}{'all: instr':>11}{'us':>8}{'copy':>6}  bound"
)


def line(row: dict[str, Any]) -> str:
    name = f"{row['op']} {'x'.join(map(str, row['shape']))} {row['layout']}"
    if row["bound"] == "library":
        return f"{name:<38}{row['kernel']:<24}{'':>44}{1e6 * row['seconds']:8.1f}{'':>6}  torch"
    loop = row["loop"] or {}
    of_loop = (loop.get("instructions for 16 bytes", ""), loop.get("accesses for 16 bytes", ""))
    of_copy = "" if row["of copy"] is None else f"{100 * row['of copy']:.0f}%"
    marks = f" /{row['divisions in loops']}" if row["divisions in loops"] else ""
    marks += f" not followed: {row['not followed']}" if "not followed" in row else ""
    return (
        f"{name:<38}{row['kernel']:<24}{row['registers']:>5}{row['programs a multiprocessor']:>4}"
        f"{row['bytes in flight'] / 1024:>6.0f}{of_loop[0]:>12}{of_loop[1]:>6}"
        f"{row['instructions for 16 bytes'] or '':>11}{1e6 * row['seconds']:8.1f}{of_copy:>6}  {row['bound']}{marks}"
    )


def step() -> dict[str, dict[str, float]]:
    """Of a training step, by layout: the seconds of SE's launches, and eager's bytes at the speed of a copy."""
    found = {}
    for layout in cases.LAYOUTS:
        ours = eager = 0.0
        for shape, blocks in cases.BLOCKS.items():
            case = cases.Case("se", (cases.STEP, *shape), layout)
            seconds = sum(row["seconds"] + model.GAP for row in launch.rows(case))
            bytes_ = cases.map_of(case).nbytes
            ours += blocks * seconds
            eager += blocks * cases.EAGER_PASSES * bytes_ / model.COPY
        found[layout] = {"batch": cases.STEP, "seconds": ours, "eager": eager}
    return found


def environment() -> dict[str, str]:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, **info.versions(), "triton": triton.__version__, "target": f"sm_{launch.CAPABILITY}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--op", action="append", choices=sorted((*cases.OPS, *cases.RESIDENT)), help="these only")
    parser.add_argument("--kernel", action="append", help="these only, by name")
    parser.add_argument("--shape", action="append", help="maps of these CxHxW only")
    parser.add_argument("--layout", choices=cases.LAYOUTS)
    parser.add_argument("--step", action="store_true", help="the sum over a training step, too, of a selection")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chosen = [
        case
        for case in cases.cases()
        if (not given.op or case.op in given.op)
        and (not given.layout or case.layout == given.layout)
        and (not given.shape or "x".join(map(str, case.shape[1:])) in given.shape)
    ]
    found: list[dict[str, Any]] = []
    print(HEAD)
    for case in chosen:
        of = resident.rows if case.op in cases.RESIDENT else launch.rows
        for row in of(case, given.kernel):
            found.append(row)
            print(line(row), flush=True)
    of_step = step() if given.step or not (given.op or given.kernel or given.layout or given.shape) else {}
    for layout, s in of_step.items():
        print(
            f"SE of a training step of seresnet50, batch {s['batch']}, {layout}: {1e3 * s['seconds']:.2f} ms, "
            f"{100 * s['seconds'] / s['eager']:.0f} % of eager's {1e3 * s['eager']:.2f} ms at the speed of a copy"
        )
    if given.json:
        head = json.dumps({"environment": environment(), "model": model.CONSTANTS, "step": of_step}, indent=1)
        rows = ",\n  ".join(json.dumps(row) for row in found)
        given.json.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    main()
