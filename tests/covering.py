"""Which combinations of a test's parameters run.

Where a test's parameters multiply, a covering array of them runs: every pair of values (with `@pytest.mark.combine(n)`
any n values) occurs together in some case. The other cases get the mark `long`: `pytest -m long` runs them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import pytest
from allpairspy import AllPairs

STRENGTH = 2


def mark_long(items: Iterable[pytest.Item]) -> None:
    """Give the cases of each test that its covering array leaves out the mark `long`."""
    tests: dict[tuple, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            tests[item.parent, item.originalname].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("combine")
        kept = covering([values_of(case) for case in cases], mark.args[0] if mark else STRENGTH)
        for number, case in enumerate(cases):
            if number not in kept:
                case.add_marker(pytest.mark.long)


def values_of(case: pytest.Item) -> tuple[tuple[int, ...], ...]:
    """What tells a case's value on each axis from the others: an axis is one decorator's parameters, or a fixture's."""
    left = {name: id(value) for name, value in case.callspec.params.items()}
    axes = []
    for mark in case.iter_markers("parametrize"):
        names = mark.args[0]
        names = names.split(",") if isinstance(names, str) else names
        axes.append(tuple(left.pop(name.strip()) for name in names))
    return (*axes, *((value,) for value in left.values()))


def covering(cases: list[tuple], strength: int) -> set[int]:
    """Numbers of the cases of a covering array; of all, where the cases are no product of more axes than `strength`."""
    axes = [axis for axis in zip(*cases, strict=True) if len(set(axis)) > 1]
    numbers = [{value: number for number, value in enumerate(dict.fromkeys(axis))} for axis in axes]
    if len(axes) <= strength or math.prod(map(len, numbers)) != len(cases):
        return set(range(len(cases)))
    rows = {tuple(row) for row in AllPairs([list(of_axis.values()) for of_axis in numbers], n=strength)}
    found = [tuple(map(dict.__getitem__, numbers, case)) for case in zip(*axes, strict=True)]
    return {number for number, case in enumerate(found) if case in rows}
