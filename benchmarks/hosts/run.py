"""What `python -m benchmarks.hosts` starts in its environment: a network at a time, in a process that may die of it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from fused_attn.hosts import define_torchvision_operators
from fused_attn.qualification.process import Lost, Process, answering
from fused_attn.verdicts import write_whole

from .measure import failed, measure
from .networks import networks, package_of
from .table import page, summary, text_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1500.0  # for a network, of a machine that others use, too
Record = dict[str, Any]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.hosts", description=__doc__.splitlines()[0])
    add_options(parser)
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", type=re.compile, default=None, help="networks in whose name this is found")
    parser.add_argument("--json", type=Path, default=None, help="rows are kept here; what is there is not run again")
    parser.add_argument("--again", action="store_true", help="run those that are there, too")
    parser.add_argument("--counts", action="store_true", help="count products only; a later run compares the values")
    parser.add_argument("--page", type=Path, default=None, help="write the table of all rows here, in Markdown")


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    rows = json.loads(given.json.read_text())["rows"] if given.json is not None and given.json.exists() else {}
    known = networks()
    rows = {name: row for name, row in rows.items() if name in known}  # what is not measured any more
    wanted = [name for name in known if given.only is None or given.only.search(name)]
    todo = [name for name in wanted if given.again or not is_whole(rows.get(name), given.counts)]
    for name, row in each_measured(todo, not given.counts):
        rows[name] = {"version": version_of(package_of(name)), **row}
        print(text_of(name, rows[name]), flush=True)
        rows = {name: rows[name] for name in known if name in rows}
        if given.json is not None:
            save(given.json, rows)
    print(summary({name: rows[name] for name in wanted if name in rows}))
    if given.page is not None:
        given.page.write_text(page(rows))
    return int(any(row.get("wrong") or row.get("called fused") for row in rows.values()))


def is_whole(row: Record | None, counts: bool) -> bool:
    return row is not None and (counts or "failed" in row or "wrong" in row)


def save(path: Path, rows: dict[str, Record]) -> None:
    """Whole or not at all, one line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    write_whole(path, f'{{"rows": {{\n{lines}\n}}}}\n')


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def each_measured(names: list[str], values: bool) -> Any:
    """The networks with their rows, measured in a process; one that it dies or hangs of has a row that says so."""
    while names:
        child = Process(f"{__package__}.run", {}, ROOT, "its process")
        try:
            child.send({"networks": names, "values": values})
            while names:
                answer = child.answer(time.monotonic() + SECONDS)
                if answer is None:
                    yield names.pop(0), {"failed": f"it took more than {SECONDS:.0f} s"}
                    break
                yield names.pop(0), answer
        except Lost as lost:
            yield names.pop(0), {"failed": str(lost)}
        finally:
            child.end()


def child() -> None:
    """Its process: reads the names, and answers a line for each."""
    say = answering()
    define_torchvision_operators()  # most packages import it
    known = networks()
    given = json.loads(sys.stdin.readline())
    for name in given["networks"]:
        began = time.process_time()
        try:
            row = measure(known[name], given["values"])
        except Exception as error:
            row = failed(error)
        say(**row, seconds=round(time.process_time() - began, 1))


if __name__ == "__main__":
    child()
