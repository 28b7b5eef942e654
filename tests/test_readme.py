"""The README: its Python runs, and its shell commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def blocks(language: str) -> list[tuple[int, str]]:
    """The README's code in a language, each with the line it starts on."""
    text = README.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [pytest.param(code, id=f"line{line}") for line, code in blocks("python")])
def test_python_runs(code: str, tmp_path: Path):
    run([sys.executable, "-c", code], tmp_path)


SHELL = "".join(code for _, code in blocks("sh"))
COMMANDS = sorted(set(re.findall(r"^fused-attn (\w+)", SHELL, re.MULTILINE)))


@pytest.mark.parametrize("name", COMMANDS)
def test_command_exists(name: str, tmp_path: Path):
    run([sys.executable, "-m", "fused_attn", name, "--help"], tmp_path)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", SHELL, re.MULTILINE))
    assert named and named <= targets


def test_files_named_exist():
    text = README.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing
