"""docs/works_with.md: its Python runs, block after block, where what a block imports is installed."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "works_with.md"


def test_the_page_runs():
    text, ran = PAGE.read_text(), 0
    space: dict[str, object] = {}
    for found in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        names = [name for line in re.findall(r"^(?:import|from) (.*)$", found[1], re.MULTILINE) for name in roots(line)]
        if all(find_spec(name) for name in names):
            line = text.count("\n", 0, found.start()) + 1
            exec(compile("\n" * line + found[1], str(PAGE), "exec"), space)
            ran += 1
    assert ran >= 4


def roots(line: str) -> list[str]:
    """The packages of an import."""
    return [name.split()[0].partition(".")[0] for name in line.partition(" import ")[0].split(",")]
