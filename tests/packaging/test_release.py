"""What a release needs: the version in one place, and workflows that ask for what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fused_attn
from tools import wheels

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_version_is_in_one_place():
    """And the changelog's newest entry is of it."""
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == fused_attn.__version__
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile", *ROOT.glob("tools/*.py")]
    assert not [path for path in sources if fused_attn.__version__ in path.read_text()]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path: Path):
    """They are YAML, every job runs somewhere, and what they call is there."""
    jobs = pytest.importorskip("yaml").safe_load(path.read_text())["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert jobs and all(job["runs-on"] and job["steps"] for job in jobs.values())
    for job in jobs.values():
        for command in (step["run"] for step in job["steps"] if "run" in step):
            for line in re.findall(r"^make (.+)", command, re.MULTILINE):
                assert {word for word in line.split() if re.fullmatch("[a-z-]+", word)} <= targets
            assert all((ROOT / name).exists() for name in re.findall(r"(?:python|test) ((?:\w+/)+\w+\.py)", command))
    kinds = [job["strategy"]["matrix"]["kind"] for job in jobs.values() if "kind" in str(job.get("strategy"))]
    assert all(set(found) == set(wheels.KINDS) for found in kinds) and bool(kinds) == (path.stem == "wheels")


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["ci", "wheels"]
