"""The shell command: fused-attn, or python -m fused_attn."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    sys.exit(f"fused-attn: {error.name} is not installed; pip install '.[bench]' in a clone")

import torch

from . import __version__, demo, info, verify, viz
from .backends import LIBRARY_ERROR, forced
from .bench import blocks, calls, memory, models, traffic
from .bench.measure import Figure, copy_bandwidth, environment, geometric_means, keep_freed_memory
from .fusion import explain, fuse
from .fusion.difference import differences
from .hosts import UnknownModel, build_model, import_host
from .qualify import Qualified, qualify
from .verdicts import Verdict, environment_of, write_shipped

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("nchw", "channels_last")

#: As wide in a file or a pipe as most terminals are.
console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS") or 80))


class UserError(click.ClickException):
    """A mistake of the caller's: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"fused-attn: {self.message}", file=file or sys.stderr)


def need(package: str) -> None:
    """A package that only some commands need."""
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"{package} is not installed; pip install '.[bench]' in a clone") from None


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar on stderr, gone when done; yields a function that takes the next step's name."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(name: str = "") -> None:
            bar.update(task, advance=1, description=name)

        yield advance


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Figures to the right, words to the left; the title on one line, however narrow the table; without columns' names
    no line for them. Cells go on in the next line between words; no word and no figure is broken, so that lines of a
    table with many columns may be longer than the terminal's."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    shown = Table(box=None, show_header=any(columns), header_style="underline", pad_edge=False, padding=(0, 2, 0, 0))
    figures, widths, wanted = [], [], []
    for column, cells in zip(columns, zip(*rows, strict=True), strict=True) if rows else ():
        # "2 times as fast as ..." is a sentence.
        figures.append(all(re.match(r"[-+]?\d(?!.*[a-z] [a-z]+ )|-$|$", cell) for cell in cells))
        whole = [*column.split(), *(cells if figures[-1] else " ".join(cells).split()), ""]
        widths.append(max(map(len, whole)))
        wanted.append(max(map(len, (column, *cells))))
    spare = console.width - sum(widths) - 2 * (len(widths) - 1)
    while spare > 0 and (narrow := [i for i, width in enumerate(widths) if width < wanted[i]]):
        for i in narrow[:spare]:
            widths[i] += 1
        spare = max(0, spare - len(narrow))
    if spare < 0:  # columns would be left out
        shown.width = console.width - spare
    for column, figure, width in zip(columns, figures, widths, strict=bool(rows)):
        head = "\n".join(textwrap.wrap(column, width))
        shown.add_column(head, width=width, no_wrap=figure, justify="right" if figure else "left")
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown, crop=False)
    console.print()


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){2,4}", text):
        raise UserError(f"shape {text!r}: expected numbers joined by x, such as 32x256x56x56")
    return tuple(int(part) for part in text.split("x"))


def sizes_of(text: str) -> tuple[tuple[int, ...], ...]:
    """Of a name in `blocks.SHAPES`, or given one by one."""
    return blocks.SHAPES.get(text) or tuple(parse_shape(part) for part in text.split(","))


def parse_pair(text: str) -> tuple[str, str]:
    """Two networks joined by the slash that follows the first one's factory: files have slashes, too."""
    match = re.fullmatch(r"(.+?:[^:/]+)/(.+:[^:/]+)", text)
    if match is None:
        raise UserError("--pair: expected two networks joined by a slash, such as timm:seresnet50/timm:resnet50")
    return match[1], match[2]


def options(*decorators: Any) -> Any:
    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


device_option = click.option("--device", default=None, help="Where to run: cpu, cuda, cuda:1. Default: a GPU if any.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fused-attn")
def main() -> None:
    """The attention blocks of convolutional networks, fused: see it, check it, measure it."""


@main.command("demo", short_help="Train a network, its blocks original and fused.")
@click.option("--quick", is_flag=True, help="A few steps only: does it run.")
@click.option(
    "--steps", type=click.IntRange(1), default=None, help="Training steps. Default: 120, in about 20 seconds."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("fused_attn_demo.png"))
@click.option(
    "--weights", type=click.Path(dir_okay=False, path_type=Path), default=None, help="Keep the fused one's state_dict."
)
def demo_command(quick: bool, steps: int | None, out: Path, weights: Path | None) -> None:
    """Train a small network on real data with its blocks original and fused; write a picture."""
    need("sklearn")
    need("matplotlib")
    steps = steps or (4 if quick else 120)
    if LIBRARY_ERROR:
        console.print(f"fused is plain PyTorch here, because {LIBRARY_ERROR}")
    with demo.one_thread(), progress(steps) as advance:
        original, moved, fused = demo.train(steps, progress=lambda: advance("training, original and fused"))
        gains = demo.measure_blocks(original.model, fused.model, budget=0.1 if quick else 1.0)
    rows = [
        [run.name, f"{run.losses[-1]:.4f}", f"{100 * run.accuracy:.1f} %", f"{1e3 * median(run.seconds):.1f} ms"]
        for run in (original, fused, moved)
    ]
    table(
        f"scikit-learn's digits, {steps} steps from the same weights on the same batches",
        ["blocks", "last loss", "accuracy", "a step"],
        rows,
    )
    for run in (fused, moved):
        apart, images = run.apart(original), int((run.found != original.found).sum())
        console.print(
            f"{run.name}: losses within {max(apart[:10]):.1e} of the original's in the first 10 steps,"
            f" {max(apart):.1e} in all; {images} of {len(run.found)} held-out images classified otherwise"
        )
    console.print("(moved: each weight one unit in the last place higher; training amplifies any rounding as much)\n")
    rows = [
        [g.block, "x".join(map(str, g.shape)), *(f"{1e3 * s:.2f} ms" for s in (g.original, g.fused)), f"{g.ratio:.2f}x"]
        for g in gains
    ]
    step = [f"{1e3 * median(run.seconds):.2f} ms" for run in (original, fused)]
    rows.append(["a whole step", "-", *step, f"{demo.step_ratio(original, fused):.2f}x"])
    columns = ["forward and backward", "map", "original", "fused", "as fast"]
    table("times of one thread, medians of runs in turn", columns, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    demo.plot(original, moved, fused, gains, out)
    console.print(f"picture: {out}")
    if weights is not None:
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fused.model.state_dict(), weights)
        console.print(f"weights: {weights}")


@main.command("verify", short_help="Is fused the same function as the original?")
@options(
    click.option(
        "--model", "names", multiple=True, help="timm:NAME, torchvision:NAME, module:factory, file.py:factory"
    ),
    click.option("--all", "everything", is_flag=True, help="Blocks, and small models of every host library installed."),
    click.option(
        "--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Default: float32, bfloat16."
    ),
    click.option("--layout", "layouts", type=click.Choice(LAYOUTS), multiple=True, help="Default: both."),
    click.option("--shape", default=None, help="Input of the models. Default: 2x3x64x64."),
    click.option("--tails", is_flag=True, help="Of fuse(model, tails=True)."),
    device_option,
)
def verify_command(
    names: tuple[str, ...],
    everything: bool,
    dtypes: tuple[str, ...],
    layouts: tuple[str, ...],
    shape: str | None,
    tails: bool,
    device: str | None,
) -> None:
    """Check that fused is the same function as the original, on your device and dtypes."""
    place = pick_device(device)
    chosen = [DTYPES[d] for d in dtypes or ("float32", "bfloat16")]
    chosen_layouts = list(layouts or LAYOUTS)
    size = parse_shape(shape) if shape else (2, 3, 64, 64)
    results: list[verify.Result] = []
    if everything or not names:
        results += verify.verify_blocks(place, chosen, chosen_layouts)
    if everything:
        names = (*names, *installed_models())
    for name in names:
        torch.manual_seed(0)
        try:
            model = build_model(name).to(place)
            results += verify.verify_model(name, model, size, chosen, chosen_layouts, tails=tails)
        except (UnknownModel, ValueError) as error:
            raise UserError(str(error)) from None
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{name} on {'x'.join(map(str, size))}: {str(error).splitlines()[0]}") from None
    rows = [
        [
            r.subject,
            str(r.dtype)[6:],
            r.layout,
            f"{r.fused:.1e}",
            f"{r.eager:.1e}",
            r.worst,
            "ok" if r.passed else "MISS",
        ]
        for r in results
    ]
    columns = ["", "dtype", "layout", "fused error", "eager error", "worst at", ""]
    table(f"errors against float64 on {place}, relative to the largest value", columns, rows)
    missed = sum(not r.passed for r in results)
    console.print(f"{len(results) - missed} of {len(results)} checks passed")
    if missed:
        sys.exit(1)


def installed_models() -> list[str]:
    """One small model of each host library that is installed and takes images."""
    found = []
    hosts = {
        "timm": ("timm:seresnet18", "timm:mobilenetv3_small_100"),
        "torchvision": ("torchvision:mobilenet_v3_small",),
    }
    for host, names in hosts.items():
        try:
            import_host(host)
            found += names
        except UnknownModel as error:
            console.print(f"left out: {error}")
    return found


INPUTS = "Inputs of the networks, BxCxHxW[,BxCxHxW...]; with a --dtype, under autocast. Default: 8x3x224x224."
WITH_COMPILE = "torch.compile too. Default: yes; with --quick not of networks, which takes minutes."
MEMORY_BUDGET = "Without a GPU: derive the largest batch that fits this. Default: it is left out."


@main.command("bench", short_help="Measure original, compiled and fused in turn.")
@options(
    click.option("--blocks/--no-blocks", "with_blocks", default=True, help="Measure blocks. Default: yes."),
    click.option("--models/--no-models", "with_models", default=True, help="Measure networks. Default: yes."),
    click.option("--calls", "with_calls", is_flag=True, help="What a call of each block costs, on a small map."),
    click.option("--ops", default="se,eca", help=f"Blocks: of {', '.join(blocks.BLOCKS)}. Default: se,eca."),
    click.option(
        "--shapes", default=None, help=f"{', '.join(blocks.SHAPES)}, or BxCxHxW[,BxCxHxW...]. Default: by block."
    ),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32"),
    click.option("--layout", type=click.Choice(LAYOUTS), default="nchw"),
    click.option("--pair", "pairs", multiple=True, help="Networks WITH/WITHOUT attention, such as timm:a/timm:b."),
    click.option("--input", "model_inputs", default="8x3x224x224", help=INPUTS),
    click.option("--pass", "passes", type=click.Choice(list(models.PASSES)), multiple=True, help="Default: both."),
    click.option("--tails/--no-tails", "with_tails", default=True, help="Networks with tails=True too. Default: yes."),
    click.option("--memory", "with_memory", is_flag=True, help="What a training step of the networks keeps, in bytes."),
    click.option("--memory-budget", type=click.FloatRange(0.01), default=None, metavar="GIB", help=MEMORY_BUDGET),
    click.option("--traffic", "with_traffic", is_flag=True, help="What a compiled step reads and writes, in bytes."),
    click.option("--compile/--no-compile", "with_compile", default=None, help=WITH_COMPILE),
    click.option("--budget", type=click.FloatRange(0.01), default=2.0, help="Seconds a comparison. Default: 2."),
    click.option("--keep-memory", is_flag=True, help="Have the C allocator keep freed maps, as jemalloc does."),
    click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), default=None),
    click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), default=None),
    click.option("--quick", is_flag=True, help="Small shapes and few repetitions: does it run, not how fast."),
    device_option,
)
def bench_command(
    with_blocks: bool,
    with_models: bool,
    with_calls: bool,
    ops: str,
    shapes: str | None,
    dtype: str,
    layout: str,
    pairs: tuple[str, ...],
    model_inputs: str,
    passes: tuple[str, ...],
    with_tails: bool,
    with_memory: bool,
    memory_budget: float | None,
    with_traffic: bool,
    with_compile: bool | None,
    budget: float,
    keep_memory: bool,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
    device: str | None,
) -> None:
    """Measure eager, torch.compile and fused in turn; the attention tax of networks; ratios of medians."""
    place = pick_device(device)
    if plot_path:
        need("matplotlib")
    if quick:
        budget, shapes, model_inputs = 0.05, "4x32x14x14,2x16x28x28", "2x3x64x64"
        pairs = pairs or (("timm:seresnet18/timm:resnet18",) if with_models or with_memory or with_traffic else ())
    compile_networks = not quick if with_compile is None else with_compile
    names = [name for name in ops.split(",") if name]
    for name in names:
        if name not in blocks.BLOCKS:
            raise UserError(f"--ops: expected some of {', '.join(blocks.BLOCKS)}; got {name!r}")
    sizes = {name: sizes_of(shapes or blocks.BLOCKS[name].shapes) for name in names}
    split = [parse_pair(pair) for pair in pairs] or list(models.TAX_PAIRS)
    input_sizes = [parse_shape(text) for text in model_inputs.split(",")]
    if with_memory and memory_budget is not None and min(size[0] for size in input_sizes) < 2:
        raise UserError(f"--input: expected two images or more with --memory-budget; got {model_inputs}")

    figures: list[Figure] = []
    facts: dict[str, Any] = environment(place)
    if keep_memory and not keep_freed_memory():
        raise UserError("--keep-memory: this system's C library has no mallopt")
    facts["keeps freed memory"] = keep_memory
    complete = False
    try:
        facts["copy bytes a second"] = copy = copy_bandwidth(place, 1 << (22 if quick else 28))
        jobs = sum(len(of_block) + 1 for of_block in sizes.values()) * with_blocks
        cases = list(itertools.product(split, input_sizes))
        jobs += len(cases) * (with_models + with_memory + with_traffic) + len(calls.NAMES) * with_calls
        with progress(jobs) as advance:
            if with_blocks:
                for name in names:
                    for size in sizes[name]:
                        advance(f"{name} {'x'.join(map(str, size))}")
                        figures += blocks.measure_block(
                            name,
                            size,
                            DTYPES[dtype],
                            layout,
                            place,
                            with_compile=with_compile is not False,
                            budget=budget,
                            copy_bytes_per_second=copy,
                        )
                    advance(f"{name}, call overhead")
                    figures += blocks.measure_overhead(name, place, min(budget, 0.5))
            if with_calls:
                for name in calls.NAMES:
                    advance(name)
                    figures += calls.measure_calls(name, min(budget, 1.0))
            if with_models:
                for (attention, plain), input_size in cases:
                    advance(attention)
                    figures += models.measure_pair(
                        attention,
                        plain,
                        input_size,
                        layout,
                        place,
                        with_compile=compile_networks,
                        with_tails=with_tails,
                        budget=5 * budget,
                        dtype=DTYPES[dtype],
                        passes=passes or tuple(models.PASSES),
                    )
            if with_memory:
                for (attention, plain), input_size in cases:
                    advance(f"{attention}, memory")
                    limit = None if memory_budget is None else int(memory_budget * 2**30)
                    figures.append(
                        memory.measure_memory(
                            attention, plain, input_size, layout, place, with_tails=with_tails, budget_bytes=limit
                        )
                    )
            if with_traffic:
                for (attention, plain), input_size in cases:
                    advance(f"{attention}, traffic")
                    figures += traffic.measure_traffic(
                        attention,
                        plain,
                        input_size,
                        layout,
                        place,
                        dtype=DTYPES[dtype],
                        passes=passes or tuple(models.PASSES),
                    )
        complete = True
    except (UnknownModel, ValueError) as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        console.print("interrupted: what was measured so far follows")
    finally:
        if json_path:
            write_json(json_path, facts, figures, complete)
    show_figures(figures, facts)
    if plot_path and any(f.timings for f in figures):
        plot_ratios(figures, plot_path)
        console.print(f"picture: {plot_path}")
    if json_path:
        console.print(f"figures: {json_path}")
    if not complete:
        sys.exit(130)


def write_json(path: Path, facts: dict[str, Any], figures: list[Figure], complete: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"environment": facts, "complete": complete, "figures": [figure.as_json() for figure in figures]}
    path.write_text(json.dumps(record, indent=1) + "\n")


def show_figures(figures: list[Figure], facts: dict[str, Any]) -> None:
    show_blocks([f for f in figures if "block" in f.case], facts)
    show_calls([f for f in figures if "call" in f.case])
    show_taxes([f for f in figures if "attention tax" in f.facts])
    show_memory([f for f in figures if "kept bytes" in f.facts])
    show_traffic([f for f in figures if "compiled bytes" in f.facts])


def show_calls(figures: list[Figure]) -> None:
    if not figures:
        return
    rows = [
        [
            str(f.case["call"]),
            str(f.case["pass"]) + ("" if f.case["training"] else ", eval"),
            *(f"{1e6 * f.timings[n].median:.1f} ±{100 * f.timings[n].spread / 2:.0f}%" for n in ("eager", "fused")),
            f"{1 / f.ratio('eager'):.2f}x",
        ]
        for f in figures
    ]
    shape = "x".join(map(str, calls.SHAPE))
    table(f"a call on {shape}, one thread", ["block", "pass", "eager µs", "fused µs", "fused / eager"], rows)


def show_blocks(figures: list[Figure], facts: dict[str, Any]) -> None:
    if not figures:
        return
    rows = []
    for f in figures:
        shape = "x".join(map(str, f.case["shape"]))
        times = [
            f"{1e3 * f.timings[n].median:.3f} ±{100 * f.timings[n].spread / 2:.0f}%" if n in f.timings else "-"
            for n in ("eager", "compile", "fused")
        ]
        ratios = [f"{f.ratio(n):.2f}x" if n in f.timings else "-" for n in ("eager", "compile")]
        share = f"{100 * float(f.facts['of copy']):.0f} %" if "of copy" in f.facts else "-"
        peaks: dict[str, int] = f.facts.get("peak bytes", {})
        peak = ", ".join(f"{peaks[n] / 2**20:.1f}" for n in ("eager", "compile", "fused") if n in peaks)
        rows.append([f"{f.case['block']} {shape}", str(f.case["pass"]), *times, *ratios, share, peak])
    columns = ["block", "pass", "eager ms", "compile ms", "fused ms", "eager / fused", "compile / fused", "of copy"]
    columns.append("peak MiB of each")
    table(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}", columns, rows)
    means = [
        [f"{row['block']}, {row['pass']}, {row['dtype']}, {row['layout']}"]
        + [
            f"{row[c]:.2f}x" if c in row else "-"
            for c in ("eager / fused", "worst eager", "compile / fused", "worst compile")
        ]
        for row in geometric_means(figures)
    ]
    columns = ["", "eager / fused", "worst", "compile / fused", "worst"]
    table("geometric means over the shapes, and the worst shape", columns, means)


def show_taxes(figures: list[Figure]) -> None:
    if not figures:
        return
    found: list[dict[str, float]] = [f.facts["attention tax"] for f in figures]
    names = [name for name in models.TAXES if any(name in tax for tax in found)]
    rows, ratios = [], []
    for f, tax in zip(figures, found, strict=True):
        case = [
            f"{f.case['model']} over {f.case['backbone']}",
            "x".join(map(str, f.case["shape"])),  # type: ignore[call-overload]
            str(f.case["pass"]),
        ]
        rows.append([*case, *(f"{100 * tax[name]:+.1f} %" if name in tax else "-" for name in names)])
        over = models.over_the_original(f)
        if over:
            cells = {name: f"{mid:.2f} ({low:.2f} to {high:.2f})" for name, (low, mid, high) in over.items()}
            ratios.append([*case, *(cells.get(name, "-") for name in names if name not in ("eager", "compile"))])
    columns = ["attention tax", "input", "pass", *(name.replace(", compile", " + compile") for name in names)]
    table("time over the backbone's, each against the backbone run the same way", columns, rows)
    if ratios:
        columns = ["over the original", *(c for c in columns[1:] if c not in ("eager", "compile"))]
        title = "time over the original's: eager, or the better of its eager and compiled; median and quartiles"
        table(title, columns, ratios)


def show_memory(figures: list[Figure]) -> None:
    for fact, title, format_ in (
        ("kept bytes", "MiB that a training step keeps for backward", lambda n: f"{n / 2**20:.1f}"),
        ("peak bytes", "MiB at the peak of a training step", lambda n: f"{n / 2**20:.1f}"),
        ("largest batch", "the largest batch that fits", str),
    ):
        found: list[tuple[Figure, dict[str, int]]] = [(f, f.facts[fact]) for f in figures if fact in f.facts]
        names = ("backbone", "eager", "fused", "tails", "least")
        rows = [
            [
                f"{f.case['model']} over {f.case['backbone']} {'x'.join(map(str, f.case['shape']))}",
                *(format_(values[name]) if name in values else "-" for name in names),
            ]
            for f, values in found
        ]
        if rows:
            how = found[0][0].facts["largest batch is"] if fact == "largest batch" else ""
            table(f"{title}{how and f', {how}'}", ["", *names], rows)


def show_traffic(figures: list[Figure]) -> None:
    rows = []
    for f in figures:
        of: dict[str, int] = f.facts["compiled bytes"]  # type: ignore[assignment]
        rows.append(
            [
                f"{f.case['model']} over {f.case['backbone']}",
                "x".join(map(str, f.case["shape"])),
                str(f.case["pass"]),
                f"{of['backbone, compile'] / 2**20:.0f}",
                *(f"{100 * n:+.1f} %" for n in traffic.over_the_backbone(of)),
            ]
        )
    if rows:
        columns = ["", "input", "pass", "backbone, MiB", "compile", "fused + compile", "backend + compile"]
        table("what a compiled step reads and writes, and how much more with attention", columns, rows)


def plot_ratios(figures: list[Figure], path: Path) -> None:
    """Bars: how many times as long eager and torch.compile take, for every block, pass and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [f for f in figures if "block" in f.case] or [f for f in figures if f.timings]
    others = [n for n in ("eager", "compile") if any(n in f.timings for f in shown)]
    labels = [
        " ".join(
            [str(f.case.get("block", f.case.get("model"))), "x".join(map(str, f.case["shape"])), str(f.case["pass"])]
        )
        for f in shown
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.32 * len(shown)), layout="constrained")
    height = 0.8 / len(others)
    for i, other in enumerate(others):
        at = [row + (i - (len(others) - 1) / 2) * height for row in range(len(shown))]
        axes.barh(at, [f.ratio(other) if other in f.timings else 0 for f in shown], height, label=f"{other} / fused")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=range(len(shown)), yticklabels=labels, xlabel="times as long as fused")
    axes.invert_yaxis()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@main.command("fuse", short_help="What is fused in a model of yours.")
@click.argument("name", metavar="MODEL")
@click.option("--tails", is_flag=True, help="As fuse(model, tails=True).")
@click.option("--diff", is_flag=True, help="Show what runs in place of each forward.")
def fuse_command(name: str, tails: bool, diff: bool) -> None:
    """Fuse the blocks of a model of yours, path/to/model.py:factory, and list them; exit code 0 if any was fused.

    Nothing is written. Also package.module:factory, timm:NAME and torchvision:NAME.
    """
    try:
        with torch.device("meta") if name.startswith(("timm:", "torchvision:")) else nullcontext():
            model = build_model(name)
    except (UnknownModel, ValueError) as error:
        raise UserError(str(error)) from None
    report = explain(fuse(model, tails=tails), tails=tails)
    if not report:
        console.print(f"no attention block was found in {name}")
        sys.exit(1)
    rows = [[r.name, r.block or "-", r.host.rpartition(".")[2], r.served_by, r.reason] for r in report]
    table(f"attention blocks of {name}", ["name", "block", "class", "served by", "why"], rows)
    if diff:
        for text in differences(model):
            click.echo(f"\n{text}")
    fused = sum(r.fused for r in report)
    console.print(f"{fused} of {len(report)} blocks run fused")
    if not fused:
        sys.exit(1)


@main.command("qualify", short_help="Measure which backend is right and fastest.")
@options(
    click.option(
        "--model", "names", multiple=True, help="timm:NAME, torchvision:NAME, module:factory, file.py:factory"
    ),
    click.option("--shape", "shapes", multiple=True, help="Input of the models. Default: usual sizes of their blocks."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="Half precision: by autocast."),
    click.option("--layout", type=click.Choice(LAYOUTS), default="nchw"),
    click.option("--tails", is_flag=True, help="Of fuse(model, tails=True)."),
    click.option(
        "--table",
        type=click.Path(file_okay=False, path_type=Path),
        default=None,
        help="Write a table to ship there, too.",
    ),
    device_option,
)
def qualify_command(
    names: tuple[str, ...],
    shapes: tuple[str, ...],
    dtype: str,
    layout: str,
    tails: bool,
    table: Path | None,
    device: str | None,
) -> None:
    """Measure which backend is right and fastest on your device for what a model calls, and keep it for fuse."""
    if not names:
        raise UserError("--model: expected one, such as timm:seresnet50; got none")
    place = pick_device(device)
    sizes = [parse_shape(shape) for shape in shapes]
    if table is not None:
        try:
            table.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--table: {error}") from None
    format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    half = DTYPES[dtype].itemsize == 2
    found: list[Verdict] = []
    for name in names:
        try:
            model = fuse(build_model(name), tails=tails, qualify=False)
            model = model.to(place, memory_format=format_)
            model = model if half else model.to(DTYPES[dtype])
            with torch.autocast(place.type, DTYPES[dtype], enabled=half):
                for size in sizes:
                    x = torch.randn(size, dtype=torch.float32 if half else DTYPES[dtype], device=place)
                    found += qualify(model, x.contiguous(memory_format=format_))
                if not sizes:
                    found += qualify(model)
        except (UnknownModel, ValueError) as error:
            raise UserError(str(error)) from None
        except RuntimeError as error:
            raise UserError(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None
    found = list({v.asked: v for v in found}.values())
    click.echo(str(Qualified(found)))
    if table is not None:
        console.print(f"table: {write_shipped(table, environment_of(place), found)}")


@main.command("attention", short_help="Draw where a network looks on a photograph.")
@options(
    click.option("--model", "name", default=None, help="timm:NAME, torchvision:NAME, module:factory, file.py:factory"),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        default=None,
        help="A state_dict to load. Default: random weights.",
    ),
    click.option("--image", type=click.Path(path_type=Path), default=None, help="Default: scikit-image's cat."),
    click.option("--size", type=click.IntRange(1), default=224, help="Side of the network's input. Default: 224."),
    click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("fused_attn_maps.png")),
    device_option,
)
def attention_command(
    name: str | None, weights: Path | None, image: Path | None, size: int, out: Path, device: str | None
) -> None:
    """Show where and on which channels the attention blocks of a network look, on one photograph."""
    need("matplotlib")
    need("skimage")
    if name is None:
        raise UserError("--model: expected one, such as timm:seresnet18; got none")
    place = pick_device(device)
    torch.manual_seed(0)
    try:
        picture = viz.photograph(image, size)
        model = build_model(name)
        if weights is not None:
            load_weights(model, weights)
        elif name.startswith(("timm:", "torchvision:")):
            open_branches(model)
        model = fuse(model).to(place)
        maps = viz.attention_maps(model, viz.network_input(picture).to(place))
    except (UnknownModel, ValueError) as error:
        raise UserError(str(error)) from None
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} on 1x3x{size}x{size}: {reason}") from None
    rows = [
        [m.name, m.block]
        + ["-" if gate is None else f"{gate.min():.3g} to {gate.max():.3g}" for gate in (m.channel, m.spatial)]
        for m in maps
    ]
    table(f"gates on {image or 'the cat'}", ["name", "block", "channel gate", "spatial gate"], rows)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        viz.show(picture, maps, out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {str(error).splitlines()[0]}") from None
    console.print(f"picture: {out}")


def open_branches(model: torch.nn.Module) -> None:
    """Random weights often start with the last norm of every branch at 0, where each gate would see nothing."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1 and not weight.any():
            torch.nn.init.ones_(weight)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """A file that torch.save wrote: the state_dict, or what has it under "state_dict" or "model"."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state.get(key, state)
        model.load_state_dict(state)
    except Exception as error:  # what a file that is no checkpoint raises is anything
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise UserError(f"{path}: {' '.join(lines[:2])}") from None


@main.command("info", short_help="What is here, what serves what, and why.")
@click.option("--all", "everything", is_flag=True, help="Every operator, and why no other backend serves it.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def info_command(everything: bool, as_json: bool) -> None:
    """Versions, devices, what was built, which backend serves what and why: send it with a bug report."""
    record = {
        "versions": info.versions(),
        "devices": info.devices(),
        "built": info.built(),
        "families": info.families(),
        "serving": info.serving(),
        "measured": info.measured(),
    }
    if as_json:
        click.echo(json.dumps(record, indent=1))
        return
    versions, built = dict(record["versions"]), record["built"]
    facts = [["versions", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "platform")]]
    facts.append(["platform", versions["platform"]])
    for name, what in built.items():
        if everything or name not in ("library", "torch headers") or (name == "library" and LIBRARY_ERROR):
            facts.append([{"cpu": "C++ kernels", "cuda": "CUDA kernels"}.get(name, name), what])
    facts += [line.split(": ", 1) for line in record["devices"]]
    if forced():
        facts.append(["asked for", f"{forced()} serves every call that it can, others raise (FUSED_ATTN_BACKEND)"])
    table("what is here", ["", ""], facts)
    for device in dict.fromkeys(device for device, *_ in record["families"]):
        rows, above = [], ""
        for family, name, why in (rest for of, *rest in record["families"] if of == device):
            rows.append([family, name, "as above" if why == above else why])
            above = why
        table(f"what serves each family of blocks on {device}, and why", ["blocks", "by", "why"], rows)
    if not everything:
        console.print("--all: every operator. How fast is of stored results, not of this machine: bench")
        return
    for device in ("cpu", "cuda"):
        rows = [[op, name, others] for op, of, name, others in record["serving"] if of == device]
        table(f"every operator on {device}, and why not another backend", ["op", "backend", "others"], rows)
    if record["measured"]:
        columns = ["device", "op", "backend", "calls", "why, the first"]
        table("what is known of the devices here", columns, [list(map(str, row)) for row in record["measured"]])
    else:
        console.print("nothing is known of the devices here: fused-attn qualify --model ... measures")
