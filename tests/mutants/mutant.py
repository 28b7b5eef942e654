"""What a planted fault is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One small edit that makes the product wrong, and the tests that should see it.

    name: short-words-with-hyphens, unique in its layer.
    file: the path edited, relative to the checkout.
    old, new: `old` stands in the file exactly once and becomes `new`.
    tests: pytest's arguments: files, and `-k` with names of tests where a file is long.
    harmless: why no test sees it, where it turned out to be no fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    harmless: str = ""
