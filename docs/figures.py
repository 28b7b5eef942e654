"""The pictures and tables of the pages: drawn and filled in from the stored results when the pages are built.

`python docs/figures.py` writes what the README has of them, which no build goes over: docs/gain.svg and its table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import exp, log, prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: The networks with attention beside those without, times and taxes; and what they keep.
NETWORKS = tuple(f"cpu/{path.stem}" for path in sorted((RESULTS / "cpu").glob("models*-float32-nchw.json")))
#: Networks compiled; and what the networks of a dtype run in.
COMPILED = tuple(f"cpu/{path.stem}" for path in sorted((RESULTS / "cpu").glob("compiled-*.json")))
COMPILED_IN = {"bfloat16": "bfloat16 autocast"}
MEMORY = "cpu/memory-float32-nchw"
TRAFFIC = "cpu/traffic-inference-float32-nchw"
PEAKS = ("cpu/peaks-float32-nchw", "cpu/criss-cross-non-local-float32-nchw")

# ---- the stored results ----


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def figures(*names: str) -> list[dict[str, Any]]:
    """What was measured, without what a call costs on a map of nothing."""
    every = [figure for name in names for figure in load(name)["figures"]]
    return [figure for figure in every if "overhead" not in figure["case"].get("block", "")]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs))


def measured_on(*names: str) -> str:
    """Where and when, in a sentence; "networks" and "compiled" are all files of them."""
    names = {("networks",): NETWORKS, ("compiled",): COMPILED}.get(names, names)
    places = []
    for name in names:
        of = load(name)["environment"]
        threads = "1 thread" if of["threads"] == 1 else f"{of['threads']} threads"
        place = f"{of['device']}, {threads}, torch {of['torch']}, {of['date'][:10]}"
        if place not in places:
            places.append(place)
    files = ", ".join(f"`benchmarks/results/{name}.json`" for name in names)
    return f"Measured on {'; '.join(places)}. Stored in {files}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %".replace("-", "−")


def short(model: str) -> str:
    return model.removeprefix("timm:")


BLOCKS = {
    "se": "SE",
    "se-folded": "folded BatchNorm, SE, sum, ReLU",
    "eca": "ECA",
    "cbam": "CBAM",
    "cbam-batch-norm": "CBAM with BatchNorm, training",
    "spatial-attention": "spatial attention of CBAM",
    "channel-attention": "channel attention of CBAM",
    "triplet": "triplet attention",
    "select": "selection of two branches",
    "norm-gate": "BatchNorm, SE, sum, ReLU",
    "norm-silu-gate": "BatchNorm, SiLU, SE",
    "global-context": "global context, multiplying",
    "position-attention": "position attention",
    "criss-cross": "criss-cross attention, twice",
    "non-local": "non-local, embedded Gaussian",
    "non-local-dot": "non-local, dot product",
    "non-local-concat": "non-local, concatenation",
    "self-attention": "self-attention of SAGAN",
    "dual-attention": "DANet's head",
    "channel-self-attention": "channel attention of DANet",
    "double-attention": "double attention",
    "external-attention": "external attention",
    "bilinear": "bilinear attention",
    "gsop": "GSoP",
    "residual-attention": "residual attention",
    "scse": "scSE",
}


def named(figure: dict[str, Any]) -> str:
    block = figure["case"]["block"]
    return BLOCKS.get(block, block)


FORWARD, BOTH = "forward", "forward + backward"


def ratios(*names: str, by_shape: bool = False) -> str:
    """How many times as long the others take: geometric means over the maps, in brackets the worst; or map by map."""
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for figure in figures(*names):
        case = figure["case"]
        key = (case["block"], case["dtype"], case["layout"], size(case["shape"]) if by_shape else "")
        groups.setdefault(key, {}).setdefault(case["pass"], []).append(figure["medians"])
    cases = {key[1:3] for key in groups}

    def ratio(medians: list[dict], other: str) -> str:
        all_of_them = [m[other] / m["fused"] for m in medians]
        worst = f" ({min(all_of_them):.2f})" if len(all_of_them) > 1 else ""
        return f"{mean(all_of_them):.2f}×{worst}"

    def what(block: str, dtype: str, layout: str, shape: str) -> str:
        return ", ".join(filter(None, (BLOCKS.get(block, block), *((dtype, layout) if len(cases) > 1 else ()), shape)))

    columns = [(passes, other) for passes in (FORWARD, BOTH) for other in ("eager", "compile")]
    head = ["", *(f"{passes}: {other} / fused" for passes, other in columns)]
    return table(
        head,
        (
            [what(*key), *(ratio(of[passes], other) if passes in of else "" for passes, other in columns)]
            for key, of in groups.items()
        ),
    )


def peak_figures() -> list[dict[str, Any]]:
    """One for each block and map."""
    found = {}
    for figure in figures(*PEAKS):
        if "peak bytes" in figure["facts"]:
            found.setdefault((figure["case"]["block"], size(figure["case"]["shape"])), figure)
    return list(found.values())


def peaks() -> str:
    """MiB at the peak of a training step above what was there before."""
    rows = []
    for figure in peak_figures():
        of = figure["facts"]["peak bytes"]
        shown = [f"{of[name] / 2**20:.1f}" if name in of else "" for name in ("eager", "compile", "fused")]
        rows.append([f"{named(figure)}, {size(figure['case']['shape'])}", *shown])
    return table(["", "eager", "torch.compile", "fused"], rows)


def calls() -> str:
    """Time over eager's on a map where nothing but the call costs."""
    rows: dict[str, list[str]] = {}
    for figure in figures("cpu/calls-float32-nchw"):
        case, of = figure["case"], figure["medians"]
        rows.setdefault(case["call"], []).append(f"{of['fused'] / of['eager']:.2f}×")
    return table(["", "forward, evaluation", "forward + backward"], ([f"`{name}`", *row] for name, row in rows.items()))


def networks() -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """(network, the same without attention) -> pass -> what runs -> time over the latter; the costliest first."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for figure in figures(*NETWORKS):
        case = figure["case"]
        pair = (short(case["model"]), short(case["backbone"]))
        found.setdefault(pair, {})[case["pass"]] = figure["facts"]["attention tax"]
    both = {pair: of for pair, of in found.items() if {"training", "inference"} <= of.keys()}
    return dict(sorted(both.items(), key=lambda item: -item[1]["training"]["eager"]))


def taxes() -> str:
    """Time over that of the same network without attention."""
    columns = [(passes, name) for passes in ("training", "inference") for name in ("eager", "fused", "tails")]
    words = {"eager": "eager", "fused": "`fuse`", "tails": "`tails=True`"}
    return table(
        ["", *(f"{passes}: {words[name]}" for passes, name in columns)],
        (
            [" / ".join(pair), *(percent(of[passes][name]) if name in of[passes] else "" for passes, name in columns)]
            for pair, of in networks().items()
        ),
    )


def compiled() -> str:
    """Time over the original's, of each way of running a network with us: median and quartiles."""
    from fused_attn.bench.measure import Figure
    from fused_attn.bench.models import over_the_original
    from fused_attn.timing import Timing

    ways = ("fused", "fused, compile", "backend, compile")
    rows = []
    for figure in figures(*COMPILED):
        case = figure["case"]
        timings = {name: Timing(timing["seconds"]) for name, timing in figure["timings"].items()}
        of = over_the_original(Figure(case, timings))
        rows.append([network_run(case), *("{1:.2f} ({0:.2f} to {2:.2f})".format(*of[way]) for way in ways)])
    return table(["", "`fuse`", "`torch.compile` of it", '`backend="fused_attn"`'], sorted(rows))


def network_run(case: dict[str, Any]) -> str:
    """Which network, and how it was run."""
    layout = [] if case["layout"] == "nchw" else [case["layout"]]
    what = (
        short(case["model"]),
        case["pass"],
        COMPILED_IN.get(case["dtype"], case["dtype"]),
        size(case["shape"]),
        *layout,
    )
    return ", ".join(what)


def compiled_taxes() -> str:
    """Time over that of the same network without attention, run the same way."""
    words = {"eager": "eager", "fused": "`fuse`", "compile": "`torch.compile`", "fused, compile": "of `fuse`"}
    words["backend, compile"] = '`backend="fused_attn"`'
    rows = []
    for figure in figures(*COMPILED):
        case, tax = figure["case"], figure["facts"]["attention tax"]
        if case["model"] != case["backbone"]:
            rows.append([network_run(case), *(percent(tax[way]) for way in words)])
    return table(["", *words.values()], sorted(rows))


def cached(*names: str) -> str:
    """Times of blocks whose maps are in cache: torch.compile's over theirs, and theirs over that of their passes at the
    speed of a clone of the map."""
    rows: dict[str, dict[str, list[str]]] = {}
    for source, figure in [(name, figure) for name in names for figure in figures(name)]:
        case, of = figure["case"], figure["medians"]
        isa = ["AVX2"] if source.endswith("avx2") else []
        key = ", ".join((named(figure), case["dtype"], case["layout"], *isa, size(case["shape"])))
        ratio = f"{of['compile'] / of['fused']:.2f}×"
        rows.setdefault(key, {})[case["pass"]] = [ratio, f"{1 / figure['facts']['of clone']:.2f}"]
    head = [f"{passes}: {what}" for passes in (FORWARD, BOTH) for what in ("compile / fused", "fused / its passes")]
    return table(["", *head], ([key, *of[FORWARD], *of[BOTH]] for key, of in rows.items()))


def moved() -> str:
    """MiB that a compiled step reads and writes, and how much more with attention."""
    from fused_attn.bench.traffic import over_the_backbone

    rows = []
    for figure in figures(TRAFFIC):
        case, of = figure["case"], figure["facts"]["compiled bytes"]
        more = (f"{100 * n:+.1f} %" for n in over_the_backbone(of))
        rows.append([short(case["model"]), f"{of['backbone, compile'] / 2**20:.0f}", *more])
    head = ["", "without attention, MiB", "`torch.compile`", "`torch.compile` of `fuse`", '`backend="fused_attn"`']
    return table(head, rows)


def kept() -> str:
    """MiB that a training step keeps for backward, and the largest batch."""
    rows = []
    for figure in figures(MEMORY):
        case, of, batch = figure["case"], figure["facts"]["kept bytes"], figure["facts"]["largest batch"]
        alone = "-" if case["model"] == case["backbone"] else f"{of['backbone'] / 2**20:.1f}"
        bytes_ = [f"{of[name] / 2**20:.1f}" for name in ("eager", "fused", "tails", "least")]
        rows.append([short(case["model"]), alone, *bytes_, *(str(batch[name]) for name in ("eager", "tails", "least"))])
    save = '`save="least"`'
    head = ["", "without attention", "eager", "`fuse`", "`tails=True`", save]
    return table([*head, "batch: eager", "`tails=True`", save], rows)


#: Of benchmarks.machine_code: the first kernels' estimates, and the last ones'.
LAYOUTS = "nchw", "channels_last"
MACHINE_CODE = (("se-before", "others-before"), ("se-after", "norm-gate-after", "others-after"))


def machine_code() -> str:
    """The slowest pass over a map of each op and shape, in per cent of a copy: of the first kernels, and now."""
    ways: list[dict[tuple[str, str], dict[str, tuple[float, str]]]] = []
    for names in MACHINE_CODE:
        found: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
        for row in (row for name in names for row in load(f"machine-code/{name}")["rows"]):
            of_map, op = 2 * prod(row["shape"]), row["op"]  # bytes of bfloat16
            if row.get("of copy") and row["bytes"] >= of_map and not op.endswith("resident"):
                of = found.setdefault((op, size(row["shape"])), {})
                of[row["layout"]] = min(of.get(row["layout"], (9.0, "")), (row["of copy"], row["kernel"]))
        ways.append(found)
    before, after = ways

    def cell(of: tuple[str, str], layout: str) -> str:
        (first, _), (last, kernel) = before[of][layout], after[of][layout]
        return f"{100 * first:.0f} → {100 * last:.0f} (`{kernel}`)"

    rows = ([f"{op}, {shape}", *(cell((op, shape), layout) for layout in LAYOUTS)] for op, shape in after)
    return table(["", *(layout.replace("nchw", "NCHW") for layout in LAYOUTS)], rows)


TABLES: dict[str, Callable[..., str]] = {
    "ratios": ratios,
    "ratios-by-map": lambda *names: ratios(*names, by_shape=True),
    "peaks": peaks,
    "calls": calls,
    "taxes": taxes,
    "compiled": compiled,
    "compiled-taxes": compiled_taxes,
    "cached": cached,
    "kept": kept,
    "machine-code": machine_code,
    "moved": moved,
    "measured": measured_on,
}

# ---- pictures ----

WIDTH = 440
#: For a picture that stands alone, as in the README; in a page the style sheet has the theme's (docs/_static/site.css).
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px }
.eager { fill: #6e7781 } .fused { fill: #2f6fde } .least { fill: #12805c }
.limit { stroke: #c9302c } .limit-text { fill: #c9302c }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3 } .eager { fill: #848d97 } .fused { fill: #5b9bff } .least { fill: #3fb98b }
 .limit { stroke: #ff7b72 } .limit-text { fill: #ff7b72 }
}
"""


class Picture:
    """An SVG of fixed width that grows downwards; its colours are classes."""

    def __init__(self, title: str) -> None:
        self.title, self.parts, self.height = title, [], 0.0

    def add(self, part: str, bottom: float) -> None:
        self.parts.append(part)
        self.height = max(self.height, bottom)

    def box(self, x: float, y: float, w: float, h: float, kind: str) -> None:
        self.add(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="2" class="{kind}"/>', y + h)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.add(f'<text {where} class="{kind}">{escape(text)}</text>', y + 4)

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str) -> None:
        ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        self.add(f'<line {ends} class="{kind}" stroke-width="1.5"/>', max(y, to_y))

    def arrow(self, x: float, y: float, to_y: float, kind: str) -> None:
        tip = 6 if to_y > y else -6
        self.line(x, y, x, to_y - tip, f"{kind} arrow")
        points = f"{x - 4:.1f},{to_y - tip:.1f} {x + 4:.1f},{to_y - tip:.1f} {x:.1f},{to_y:.1f}"
        self.add(f'<polygon points="{points}" class="{kind}"/>', max(y, to_y))

    def svg(self, style: str = "") -> str:
        width = f'width="{WIDTH * 4 // 3}" ' if style else ""  # by itself; in a page it is as wide as there is room
        sizes = f'{width}viewBox="0 0 {WIDTH} {self.height + 4:.0f}" role="img"'
        inner = "\n".join([f"<title>{escape(self.title)}</title>", *([f"<style>{style}</style>"] if style else [])])
        return f'<svg xmlns="http://www.w3.org/2000/svg" {sizes}>\n{inner}\n' + "\n".join(self.parts) + "\n</svg>\n"


def bars(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    names: dict[str, str],
    words: Callable[[float], str],
    limits: Sequence[float | None],
    limit_name: str,
) -> Picture:
    """A bar for each of a group's values, of the kinds that `names` has, and a line where the group's limit is; where
    all limits are 0, bars start there and go both ways."""
    picture = Picture(title)
    x = 2.0
    for kind, name in names.items():
        picture.box(x, 4, 11, 11, kind)
        picture.text(x + 16, 14, name)
        x += 30 + 7.2 * len(name)
    y = 14.0
    if x + 16 + 6.4 * len(limit_name) > WIDTH:  # below the colours where there is no room
        x, y = 2.0, 34.0
    picture.line(x + 5, y - 10, x + 5, y + 1, "limit")
    picture.text(x + 16, y, limit_name, "limit-text")
    values = [value for _, of in groups for _, value in of]
    low, high = min(0.0, *values), max(*values, *(limit or 0.0 for limit in limits))
    scale = (WIDTH - 70) / (high - low)
    zero = 2 - low * scale
    y += 12
    for (label, of), limit in zip(groups, limits, strict=True):
        picture.text(2, y + 16, label)
        y += 22
        top = y
        for kind, value in of:
            width = abs(value) * scale
            picture.box(zero + min(value, 0) * scale, y, max(width, 1), 13, kind)
            picture.text(zero + max(value, 0) * scale + 6, y + 11, words(value), "small")
            y += 16
        if limit is not None:
            picture.line(zero + limit * scale, top - 2, zero + limit * scale, y - 1, "limit")
        y += 6
    return picture


#: Colours of bars, and the names that the stored results have for what they show.
COLOURS = (("eager", "eager"), ("fused", "fused"), ("least", "tails"))


def gain(passes: str = "training") -> Picture:
    groups = []
    for (model, _), of in networks().items():
        groups.append((model, [(colour, of[passes][name]) for colour, name in COLOURS if name in of[passes]]))
    names = {"eager": "original", "fused": "fuse(model)", "least": "tails=True"}
    title = f"Time that attention adds to {passes}"
    return bars(title, groups, names, percent, [0] * len(groups), "the same network without attention")


def blocks_picture(*names: str) -> Picture:
    """Times in units of what a copy at full speed takes for the passes of the fused block."""
    groups: dict[str, list[dict]] = {}
    for figure in figures(*names):
        if figure["case"]["pass"] == BOTH and figure["facts"].get("of copy"):
            groups.setdefault(named(figure), []).append(figure)

    def over_the_limit(members: list[dict], name: str) -> float:
        return mean(f["medians"][name] / f["medians"]["fused"] / f["facts"]["of copy"] for f in members)

    kinds = {"eager": "eager", "compile": "torch.compile", "fused": "fused"}
    return bars(
        "Times of blocks, forward and backward, over the limit",
        [(label, [(kind, over_the_limit(members, kind)) for kind in kinds]) for label, members in groups.items()],
        kinds,
        lambda value: f"{value:.1f}×",
        [1.0] * len(groups),
        "limit: copying as many bytes",
    )


def kept_picture() -> Picture:
    groups, limits = [], []
    for figure in figures(MEMORY):
        case, of = figure["case"], figure["facts"]["kept bytes"]
        limits.append(None if case["model"] == case["backbone"] else of["backbone"] / 2**20)
        groups.append((short(case["model"]), [(k, of[n] / 2**20) for k, n in (*COLOURS[::2], ("compile", "least"))]))
    names = {"eager": "original", "least": "tails=True", "compile": 'save="least"'}
    title = "MiB that a training step keeps for backward"
    return bars(title, groups, names, lambda value: f"{value:.0f}", limits, "the same network without attention")


def peaks_picture() -> Picture:
    groups, limits = [], []
    kinds = {"eager": "eager", "compile": "torch.compile", "fused": "fused"}
    for figure in peak_figures():
        case, of = figure["case"], figure["facts"]["peak bytes"]
        if case["block"] in COMPARE_POSITIONS and len(case["shape"]) == 4:
            label = f"{named(figure)}, {size(case['shape'])}"
            groups.append((label, [(kind, of[kind] / 2**20) for kind in kinds if kind in of]))
            limits.append(4 * prod(case["shape"]) / 2**20)
    title = "MiB at the peak of a training step"
    return bars(title, groups, kinds, lambda value: f"{value:.0f}", limits, "one map of float32")


COMPARE_POSITIONS = ("position-attention", "criss-cross", "dual-attention", "self-attention", "non-local")


#: Reads (R) and writes (W) of the whole map, forward and backward, operator by operator.
PASSES = (
    ("eager: 13", ("R", "RW"), ("RRW", "RW", "R", "W", "RRW")),
    ("fused, streaming: 3 + 4", ("R", "RW"), ("RR", "RW")),
    ("fused, resident: 2 + 3", ("RW",), ("RRW",)),
)


def passes() -> Picture:
    picture = Picture("Squeeze-and-excitation, pass by pass")
    picture.box(2, 4, 12, 12, "fused")
    picture.text(20, 14, "R: the map is read")
    picture.box(170, 4, 12, 12, "compile")
    picture.text(188, 14, "W: it is written")
    y = 42.0
    for label, forward, backward in PASSES:
        picture.text(2, y, label)
        x = 2.0
        for of in (forward, backward):
            picture.text(x, y + 20, "forward" if of is forward else "backward", "small")
            for operator in of:
                for way in operator:
                    picture.box(x, y + 26, 22, 22, "fused" if way == "R" else "compile")
                    picture.text(x + 11, y + 42, way, "on-colour small", "middle")
                    x += 24
                x += 6
            x += 24
        y += 78
    return picture


def chips() -> Picture:
    """Where the map goes: streaming kernels read it in each phase, resident ones once."""
    picture = Picture("A streaming and a resident kernel")
    for row, (name, phases) in enumerate(
        (
            ("streaming: any size", (("squeeze", "R"), ("excite", ""), ("scale", "RW"))),
            ("resident: a sample fits on chip", (("squeeze", "R"), ("excite", ""), ("scale", "W"))),
        )
    ):
        y = 4 + 150 * row
        picture.text(2, y + 12, name)
        picture.box(2, y + 22, WIDTH - 4, 24, "plain")
        picture.text(WIDTH / 2, y + 38, "the map, in memory", anchor="middle")
        for column, (phase, ways) in enumerate(phases):
            x = 2 + column * 148
            picture.box(x, y + 92, 138, 24, "chip")
            picture.text(x + 69, y + 108, phase, anchor="middle")
            for way in ways:
                middle = x + (30 if way == "R" else 88)
                ends = (y + 46, y + 92) if way == "R" else (y + 92, y + 46)
                picture.arrow(middle, *ends, "fused" if way == "R" else "compile")
                picture.text(middle + 8, y + 73, "read" if way == "R" else "write", "small")
            if not ways:
                picture.text(x + 69, y + 73, "C numbers", "small", "middle")
        if row:
            picture.box(2, y + 118, WIDTH - 4, 3, "fused")
            picture.text(WIDTH / 2, y + 134, "the sample stays in shared memory", "small", "middle")
    return picture


def tail() -> Picture:
    """The tail of an SE-ResNet's block, operator by operator and as one."""
    picture = Picture("The tail of a residual block, before and after")
    names = ("conv", "norm", "squeeze", "excite", "scale", "sum", "ReLU")
    labels = ("eager: 26 passes, three maps kept", "tails=True: 10 passes, one map and a bit an element")
    for row, boxes in enumerate((tuple((name, 1) for name in names), (("conv", 1), ("norm_gate", 6)))):
        y = 4 + 92 * row
        picture.text(2, y + 12, labels[row])
        x = 2.0
        for name, span in boxes:
            width = span * 62 - 4
            picture.box(x, y + 24, width, 28, "plain" if name == "conv" else "eager" if not row else "fused")
            kind = "small" if name == "conv" else "on-colour small"
            picture.text(x + width / 2, y + 42, name, kind, "middle")
            if name not in ("squeeze", "excite"):
                picture.arrow(x + width / 2, y + 52, y + 74, "compile")
            x += span * 62
    picture.text(2, 188, "An arrow is a whole map that is written.", "small")
    return picture


PICTURES: dict[str, Callable[..., Picture]] = {
    "passes": passes,
    "chips": chips,
    "tail": tail,
    "gain": gain,
    "blocks": blocks_picture,
    "kept": kept_picture,
    "peaks": peaks_picture,
}

# ---- the findings ----


def findings() -> str:
    """The first sentence of each of findings/*.sh, with its name."""
    rows = []
    for path in sorted((ROOT / "findings").glob("*.sh")):
        comments = re.match(r"#!.*\n((?:#.*\n)+)", path.read_text())
        paragraph = " ".join(line.lstrip("# ") for line in comments[1].splitlines())  # type: ignore[index]
        rows.append([f"`{path.name}`", *said(paragraph)])
    return table(["script", "what it shows", "versions"], rows)


def said(paragraph: str) -> tuple[str, str]:
    found = re.match(r"(.*?)\s*Versions: (.*?)\s*Source: ", paragraph)
    return found[1], found[2]  # type: ignore[index]


TABLES["findings"] = findings

# ---- what the README has ----


def readme_table() -> str:
    """Networks: time that attention adds, before and after, and what is kept; from the files of the pictures."""
    memory = {short(f["case"]["model"]): f["facts"]["kept bytes"] for f in figures(MEMORY)}
    rows = []
    for (model, _), of in networks().items():
        taxes_of = (of["training"], of["inference"])
        times = [f"{percent(tax['eager'])} → {percent(tax.get('tails', tax['fused']))}" for tax in taxes_of]
        bytes_ = memory.get(model)
        mib = f"{bytes_['eager'] / 2**20:.0f} → {bytes_['least'] / 2**20:.0f}" if bytes_ else ""
        rows.append([model, *times, mib])
    return table(["", "training", "inference", "MiB kept for backward"], rows)


def write(readme: Path, picture: Path) -> None:
    text = readme.read_text()
    marks = r"(?<=<!-- of docs/figures.py -->\n).*?(?=<!-- -->)"
    readme.write_text(re.sub(marks, lambda _: f"\n{readme_table()}\n\n", text, flags=re.DOTALL))
    picture.write_text(gain().svg(STYLE))


if __name__ == "__main__":
    write(ROOT / "README.md", ROOT / "docs" / "gain.svg")
