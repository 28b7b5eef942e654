"""The GPU suite: numerical tests, then every block and network against eager and torch.compile, within eight minutes.

    python -m benchmarks.gpu [--minutes 8] [--out benchmarks/results] [--dry-run]

Device time is that of a CUDA graph replayed over rotated buffers, so that the L2 cache is cold; wall time, launches
included, stands beside it. A speed is printed only for a block whose numerical test passed in this run. What was
measured is saved after every block, so a run that is cut short loses nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fused_attn
from fused_attn.bench import blocks, models
from fused_attn.bench.measure import Figure, Timing, copy_bandwidth, environment, interleaved, peak_memory
from fused_attn.bench.memory import measure_memory
from fused_attn.cli import show_memory, show_taxes
from fused_attn.hosts import UnknownModel
from fused_attn.timing import graph_of

ROOT = Path(__file__).resolve().parents[1]
DRY_SHAPES = ((2, 32, 14, 14), (1, 16, 28, 28))
BACKENDS = ("triton", "cuda")

console = Console(width=None if sys.stdout.isatty() else 150)


def numerical_tests(minutes: float) -> tuple[bool, str]:
    """Whether tests/gpu passed, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-n", "0", "--no-header", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return False, f"not finished after {minutes:.1f} minutes"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    if done.returncode:
        console.print(done.stdout[-4000:])
    return done.returncode == 0, lines[-1]


def agrees(eager: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor) -> bool:
    """Output and gradients within twice eager's own error against float64 (float32 maps: against float64 too)."""

    def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        parameters = {k: v.detach().to(dtype).requires_grad_() for k, v in module.named_parameters()}
        buffers = {k: v.to(dtype, copy=True) if v.is_floating_point() else v.clone() for k, v in module.named_buffers()}
        y = torch.func.functional_call(module, parameters | buffers, tuple(leaves))
        return [y, *torch.autograd.grad(y, [*leaves, *parameters.values()], grad.to(dtype))]

    dtype = inputs[0].dtype
    with fused_attn.backend("reference"):
        exact = results(eager, torch.float64)
    # The gradient of a parameter before a BatchNorm cancels to nothing: it is measured on the scale of all parameters'.
    scales = [t.abs().max().item() for t in exact]
    first = 1 + len(inputs)
    scales[first:] = [max(scales[first:], default=0.0)] * len(scales[first:])
    for ours_i, eager_i, exact_i, scale in zip(results(ours, dtype), results(eager, dtype), exact, scales, strict=True):
        floor = 8 * torch.finfo(dtype).eps * (scale or 1.0)
        error = (ours_i.double() - exact_i).abs().max().item()
        if not error <= 2 * (eager_i.double() - exact_i).abs().max().item() + floor:
            return False
    return True


def measure(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    backend: str,
    device: torch.device,
    copy_bytes_per_second: float,
    budget: float,
) -> Iterator[Figure]:
    """One block on one backend, forward and forward + backward; nothing where it does not agree with float64."""
    torch.manual_seed(0)  # which of two almost equal numbers is the largest is not to change between runs
    block = blocks.BLOCKS[name]
    eager, ours = blocks.pair(name, shape[1], dtype, device, len(shape) - 2)
    case = {"block": name, "backend": backend, "dtype": str(dtype)[6:], "layout": layout, "shape": list(shape)}
    x = blocks.make_map(shape, dtype, layout, device)
    bytes_ = x.numel() * x.element_size()
    copies = max(1, min(8, -(-4 * 60 * 2**20 // (3 * bytes_)))) if device.type == "cuda" else 1
    inputs = [
        tuple(blocks.make_map(shape, dtype, layout, device) for _ in range(1 + block.residual)) for _ in range(copies)
    ]
    result = blocks.forward_call(eager, inputs[0])()
    grads = [blocks.make_map(result.shape, dtype, layout, device) for _ in range(copies)]
    context = fused_attn.backend(backend) if device.type == "cuda" else nullcontext()
    with context:
        try:
            correct = agrees(eager, ours, inputs[0], grads[0])
        except RuntimeError as error:  # a sample that does not fit the cluster's memory, say
            yield Figure({**case, "pass": "refused"}, {}, {"reason": str(error).splitlines()[0]})
            return
        if not correct:
            yield Figure({**case, "pass": "WRONG"}, {}, {})
            return
        torch._dynamo.reset()
        candidates: dict[str, Any] = {"eager": eager, "fused": ours, "compile": torch.compile(eager)}
        if device.type == "cuda":
            candidates["max-autotune"] = torch.compile(eager, mode="max-autotune-no-cudagraphs")
        for what, passes in zip(("forward", "forward + backward"), block.passes or (None, None), strict=True):

            def make(module: nn.Module, what: str = what) -> list[Callable[[], object]]:
                if what == "forward":
                    return [blocks.forward_call(module, i) for i in inputs]
                return [blocks.training_call(module, i, g) for i, g in zip(inputs, grads, strict=True)]

            calls = {n: make(module) for n, module in candidates.items()}
            wall = interleaved({n: c[0] for n, c in calls.items()}, device, budget=budget, least=5)
            timings = {f"{n}, wall": t for n, t in wall.items()}
            if device.type == "cuda":
                replays = {n: graph_of(lambda i, c=c: c[i](), copies) for n, c in calls.items()}
                for n, t in interleaved(replays, device, budget=budget, least=5).items():
                    timings[n] = Timing([s / copies for s in t.seconds])
            else:
                timings |= wall
            facts: dict[str, object] = {}
            if passes is not None:
                moved = passes * bytes_ / timings["fused"].median
                facts = {"passes": passes, "bytes a second": moved, "of copy": moved / copy_bytes_per_second}
            if what == "forward + backward":
                facts["peak bytes"] = {n: peak_memory(c[0], device) for n, c in calls.items()}
            yield Figure({**case, "pass": what}, timings, facts)


def show(figures: list[Figure], title: str) -> None:
    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(
        ("block", "pass", "fused us", "eager", "compile", "max-autotune", "wall eager", "of copy")
    ):
        shown.add_column(column, justify="left" if i < 2 else "right")
    for f in figures:
        label = " ".join(str(f.case[k]) for k in ("block", "backend", "dtype", "layout") if k in f.case)
        label = label or f"{f.case.get('model')} over {f.case.get('backbone')}"
        label += " " + "x".join(map(str, f.case["shape"]))
        if "fused" not in f.timings:
            shown.add_row(label, str(f.case["pass"]), *("-",) * 6)
            continue
        ratios = [f"{f.ratio(n):.2f}x" if n in f.timings else "-" for n in ("eager", "compile", "max-autotune")]
        wall = f"{f.ratio('eager, wall', 'fused, wall'):.2f}x" if "eager, wall" in f.timings else "-"
        share = f"{100 * f.facts['of copy']:.0f} %" if "of copy" in f.facts else "-"
        microseconds = f"{1e6 * f.timings['fused'].median:.1f}"
        shown.add_row(label, str(f.case["pass"]), microseconds, *ratios, wall, share)
    console.print(shown)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(0.05), default=8.0, help="All of it ends within this. Default: 8.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "benchmarks" / "results")
@click.option(
    "--dry-run", is_flag=True, help="The same code on the CPU and tiny maps: no GPU figures, nothing written."
)
def main(minutes: float, out: Path, dry_run: bool) -> None:
    """Test and measure on this machine's GPU."""
    if not torch.cuda.is_available() and not dry_run:
        click.echo("benchmarks.gpu: no CUDA device here; --dry-run runs the same code on the CPU", err=True)
        sys.exit(2)
    start = time.monotonic()

    def left() -> float:
        return 60 * minutes - (time.monotonic() - start)

    device = torch.device("cpu" if dry_run else "cuda")
    facts: dict[str, Any] = environment(device)
    facts["copy bytes a second"] = copy = copy_bandwidth(device, 1 << (20 if dry_run else 30))
    if dry_run:
        console.print("dry run: no GPU figures")
        facts["numerical tests"] = "not run"
    else:
        passed, line = numerical_tests(minutes / 2)
        facts["numerical tests"] = line
        console.print(f"numerical tests: {line}")
        if not passed:
            console.print("they did not pass: no speed is measured")
            sys.exit(1)
    path = out / facts["device"].replace(" ", "-") / f"suite-torch{torch.__version__.split('+')[0]}.json"
    figures: list[Figure] = []

    def save() -> None:
        if dry_run:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"environment": facts, "figures": [f.as_json() for f in figures]}
        path.write_text(json.dumps(record, indent=1) + "\n")

    cases = [
        (name, shape, dtype, layout, backend)
        for name, block in blocks.BLOCKS.items()
        for shape in (DRY_SHAPES if dry_run else blocks.SHAPES[block.shapes])
        for layout in ("channels_last", "nchw")
        for dtype in (torch.bfloat16, torch.float32)
        for backend in (("cpu",) if dry_run else BACKENDS)
    ]
    if dry_run:
        cases = cases[:: max(1, len(cases) // 4)]
    cases.sort(key=lambda case: (case[2] != torch.bfloat16, list(blocks.BLOCKS).index(case[0])))
    budget = 0.02 if dry_run else 0.3
    skipped = 0
    for case in cases:
        if left() < 60 * minutes / 4:  # the last quarter is for the networks
            skipped += 1
            continue
        figures += measure(*case, device, copy, budget)
        save()
    if not dry_run:
        for backend in BACKENDS[:1]:
            for attention, plain in models.TAX_PAIRS:
                if left() < 60:
                    skipped += 1
                    continue
                try:
                    with fused_attn.backend(backend), torch.autocast("cuda", torch.bfloat16):
                        pair = attention, plain, (64, 3, 224, 224), "channels_last", device
                        figures.append(measure_memory(*pair, search=False))  # which takes minutes
                        figures += models.measure_pair(*pair, budget=5)
                except UnknownModel as error:
                    console.print(f"left out: {error}")
                save()
    facts["cases left out for time"] = skipped
    save()
    shown = [f for f in figures if "kept bytes" not in f.facts]
    show(shown, f"{facts['device']}: times as long as fused" + (" (dry run: no GPU figures)" if dry_run else ""))
    show_taxes([f for f in figures if "attention tax" in f.facts])
    show_memory([f for f in figures if "kept bytes" in f.facts])
    console.print(f"{skipped} cases left out for time" if skipped else "every case was measured")
    if not dry_run:
        console.print(f"figures: {path}")


if __name__ == "__main__":
    main()
