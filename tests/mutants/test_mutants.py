"""The planted faults fit the source they are planted in, and the tool that plants them tells caught from not caught."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import ALL
from tests.mutants.__main__ import verdict

ROOT = Path(__file__).resolve().parents[2]
EVERY = [pytest.param(mutant, id=f"{layer}/{mutant.name}") for layer, mutants in ALL.items() for mutant in mutants]


def test_names_are_unique_in_a_layer():
    assert len(EVERY) >= 80
    for mutants in ALL.values():
        assert not [name for name, n in Counter(m.name for m in mutants).items() if n > 1]


@pytest.mark.parametrize("mutant", EVERY)
def test_it_can_be_planted(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    planted = text.replace(mutant.old, mutant.new)
    assert planted != text
    if mutant.file.endswith(".py"):
        ast.parse(planted)


@pytest.mark.parametrize("mutant", EVERY)
def test_its_tests_exist(mutant):
    words = shlex.split(mutant.tests)
    options = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    files = [ROOT / word for word in words[:options]]
    assert files and all(path.is_file() for path in files)
    source = "".join(path.read_text() for path in files)
    names = set(re.findall(r"\btest_\w+", " ".join(words[options:])))
    assert not [name for name in names if f"def {name}" not in source]


@pytest.mark.parametrize(
    ("status", "printed", "expected"),
    [
        (0, "3 passed", {"by": None}),
        (1, "FAILED tests/a.py::test_b[1] - assert 0\n1 failed", {"by": "tests/a.py::test_b[1]"}),
        (1, "ERROR tests/a.py::test_b\n1 error", {"by": "tests/a.py::test_b"}),
        (2, "ERROR tests/a.py - ImportError: no\n1 error", {"by": "tests/a.py"}),
        (-11, "Fatal Python error", {"by": "a crash (exit status -11)"}),
        (None, "", {"by": "time"}),
    ],
)
def test_what_catches(status, printed, expected):
    assert verdict(status, printed) == expected


@pytest.mark.parametrize("status", [4, 5])
def test_no_tests_is_neither(status):
    assert "no such tests" in verdict(status, "ERROR: file or directory not found: tests/x.py")["invalid"]
