"""What the JSONs say, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import BAD
from .run import Part, Record


def lines_of(part: Part) -> Iterator[str]:
    counts = {
        s: sum(row["status"] == s for row in part.rows) for s in dict.fromkeys(row["status"] for row in part.rows)
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no rows"
    left = f", {len(part.left_out)} left out for time" if part.left_out else ""
    problem = f"; {part.problem}" if part.problem else ""
    yield f"{part.name}: {said}{left}{problem} ({part.seconds:.0f} s)"
    for row in part.rows:
        if row["status"] in BAD:
            yield f"  {row['row']}: {row['status']}: {row.get('why', '')}"
    if part.name in TABLES:
        yield from (f"  {line}" for row in part.rows if row["status"] == "ok" for line in TABLES[part.name](row))


def of_kernels(row: Record) -> Iterator[str]:
    if "kernels" in row:
        yield f"{row['kernels']} Triton kernels compiled on {row['cores']} cores; seconds {row['seconds']}"


def of_speed(row: Record) -> Iterator[str]:
    """Times as fast as eager, on the device and by the wall clock."""
    for what, by_name in row.get("passes", {}).items():
        eager = by_name["eager"]
        cells = []
        for name, mine in by_name.items():
            clock = "device" if "device" in mine and "device" in eager else "wall"
            cell = f"{name} {1e6 * mine[clock]:.1f} us"
            if name != "eager":
                cell += f" {eager[clock] / mine[clock]:.2f}x (wall {eager['wall'] / mine['wall']:.2f}x)"
            cells.append(cell + (f" {100 * mine['of copy']:.0f} % of copy" if "of copy" in mine else ""))
        yield f"{row['row']}, {what}: {'; '.join(cells)}"


def of_models(row: Record) -> Iterator[str]:
    for what, by_name in row["passes"].items():
        cells = [
            f"{name} {1e3 * of['wall']:.2f} ms, tax {100 * of['tax']:.0f} %, {of['peak bytes'] >> 20} MiB"
            for name, of in by_name.items()
        ]
        yield f"{row['row']}, {what}: {'; '.join(cells)}"


def of_memory(row: Record) -> Iterator[str]:
    for what in ("kept bytes", "peak bytes"):
        cells = [f"{name} {bytes_ >> 20} MiB" for name, bytes_ in row.get(what, {}).items()]
        if cells:
            yield f"{row['row']}, {what}: {'; '.join(cells)}"


def of_table(row: Record) -> Iterator[str]:
    yield f"{row['row']}: {row['backend']}: {row['why']}"


TABLES = {"right": of_kernels, "speed": of_speed, "models": of_models, "memory": of_memory, "table": of_table}
