"""Rows as lines, a summary, and the page of the docs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .networks import networks

Rows = dict[str, dict[str, Any]]


def text_of(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name}: {row['failed']}"
    line = f"{name}: {row['fused']} of {row['gates']} fused{_training(row)}, {row['tails']} tails"
    said = [f"{n} left: {reason}" for reason, n in _reasons(row).most_common()]
    false = [f"called fused and is not: {block}" for block in row["called fused"]]
    return "\n  ".join([line, *said, *row.get("wrong", ()), *false])


def _training(row: dict[str, Any]) -> str:
    if (row["gates in training"], row["fused in training"]) == (row["gates"], row["fused"]):
        return ""
    return f" ({row['fused in training']} of {row['gates in training']} in training)"


def _reasons(row: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for left in row["left"]:
        counts[left["reason"]] += left["count"]
    return counts


def totals(rows: Rows) -> tuple[int, int, Counter[str]]:
    """Products, those fused, and why the others are not."""
    ran = [row for row in rows.values() if "failed" not in row]
    left = sum((_reasons(row) for row in ran), Counter[str]())
    return sum(row["gates"] for row in ran), sum(row["fused"] for row in ran), left


def summary(rows: Rows) -> str:
    gates, fused, left = totals(rows)
    ran = [row for row in rows.values() if "failed" not in row]
    lines = [
        f"{fused} of {gates} products fused ({100 * fused / max(gates, 1):.1f} %) in {len(ran)} networks;"
        f" {sum(bool(row.get('wrong')) for row in ran)} with wrong values,"
        f" {sum(bool(row['called fused']) for row in ran)} with blocks called fused that are not,"
        f" {len(rows) - len(ran)} failed",
    ]
    lines += [f"{n:5}  {reason}" for reason, n in left.most_common()]
    return "\n".join(lines)


HEAD = """# Networks of public packages

`python -m benchmarks.hosts` installs these packages in an environment of its own, builds the networks with random
weights, and writes this page (`--page docs/hosts.md`) from its rows (`--json benchmarks/results/hosts.json`).

*gates*: the products of a map and a smaller tensor, spread over it, that both come from the input, in one forward of
the network as it is, counted by its operators; *fused*: those of them that do not run after `fuse`. *right*: outputs,
gradients of parameters and inputs, and buffers after a step are the network's own, in float64 (within 30 times what
eager makes of an input moved by one unit in the last place) and float32 (within 4 times eager's error on the input or
on one so moved, and gradients within a hundredth of the largest: a ReLU may decide otherwise), in training and
evaluation, with `tails=True` and without; *not compared*: products were only counted. *tails*: fused operators with a
BatchNorm in them, with `tails=True`. Maps on which a block runs as it is written because they are small are served as
large ones here.
"""


def page(rows: Rows) -> str:
    gates, fused, left = totals(rows)
    share = f"**{fused} of {gates} products are fused ({100 * fused / max(gates, 1):.1f} %)**"
    known = networks()
    missing = len(known.keys() - rows.keys())
    rest = f" {missing} of the {len(known)} networks that it knows have not been run." if missing else ""
    lines = [HEAD, f"{share} in {len(rows)} networks.{rest}", ""]
    lines += ["| network | version | gates | fused | tails | right |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | {row['version']} | | | | {_cell('; '.join(row['failed'].splitlines()))} |")
        else:
            fine = _right(row)
            cells = (name, row["version"], row["gates"], f"{row['fused']}{_training(row)}", row["tails"], fine)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "## What is left, by what `explain` says of it",
        "",
        "| products | networks | why |",
        "| --- | --- | --- |",
    ]
    for reason, n in left.most_common():
        among = [name for name, row in rows.items() if "failed" not in row and _reasons(row)[reason]]
        shown = ", ".join(among[:3]) + (f" and {len(among) - 3} more" if len(among) > 3 else "")
        lines.append(f"| {n} | {shown} | {_cell(reason)} |")
    return "\n".join(lines) + "\n"


def _right(row: dict[str, Any]) -> str:
    if "wrong" not in row:
        return "not compared"
    return _cell("; ".join([*row["wrong"], *(f"{b} is called fused" for b in row["called fused"])])) or "yes"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
