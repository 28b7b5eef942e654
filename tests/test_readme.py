"""The README: its Python runs, and its shell commands and their options exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

import fused_attn.nn
from fused_attn import cli, functional, reference
from fused_attn.bench.blocks import BLOCKS, SHAPES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def blocks(language: str) -> list[tuple[int, str]]:
    """The README's code in a language, each with the line it starts on."""
    text = README.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start()) + 2, match[1]) for match in found]


RUN = """
import os, runpy, sys
import torch  # once for all: each runs in a fork, with its own __main__

failed = []
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        runpy.run_path(path, run_name="__main__")
        sys.exit()
    if os.waitpid(child, 0)[1]:
        failed.append(path)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def test_python_runs(tmp_path: Path):
    paths = []
    for line, code in blocks("python"):
        paths.append(tmp_path / f"line{line}.py")
        paths[-1].write_text(code)
    assert paths
    environment = {**os.environ, "FUSED_ATTN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", RUN, *paths]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


OF_BLOCKS = re.search(r"^## The blocks\n(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
BEFORE = re.search(r"^```python\n(.*?)^```$", OF_BLOCKS, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
LINES = [
    code
    for row in re.findall(r"^\|.*\|$", OF_BLOCKS, re.MULTILINE)
    for code in re.findall("`([^`]*)`", row.split("|")[-2])
]


@pytest.mark.parametrize("line", LINES)
def test_the_code_of_a_block_is_its_reference(line: str):
    """In training and evaluation, from the same random numbers."""
    for training in (True, False):
        results = []
        for modules, functions in ((fused_attn.nn, functional), (reference, reference)):
            names: dict = {}
            torch.manual_seed(0)
            exec(BEFORE, names)
            names |= {"nn": modules, "functional": functions}
            module = re.fullmatch(r"(nn\..*)\((x|x, x)\)", line)
            maps = [names["x"]] * len(module[2].split(",")) if module else []
            results.append(eval(module[1], names).train(training)(*maps) if module else eval(line, names))
        for mine, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert mine.isfinite().all()
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


#: What modules are made of and other code rarely needs.
PARTS = {"axis_pool_with_map", "context_pool_with_map", "spatial_logits"}


def test_every_block_and_function_has_its_line():
    assert {name for line in LINES for name in re.findall(r"\bnn\.(\w+)", line)} == set(fused_attn.nn.__all__)
    functions = {name for name in vars(functional) if name in vars(reference) and callable(getattr(functional, name))}
    rows = "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", OF_BLOCKS, re.MULTILINE))
    assert set(re.findall(r"\w+", rows)) == functions - PARTS


SHELL = "".join(code for _, code in blocks("sh"))
PROSE = re.sub(r"^```.*?^```$", "", README.read_text(), flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^(fused-attn .+)", SHELL, re.MULTILINE) + re.findall(r"`(fused-attn [^`]+)`", PROSE)
#: Of pip, and of benchmarks.gpu.
OTHERS = {"--no-build-isolation", "--part", "--resume"}


@pytest.mark.parametrize("line", sorted({" ".join(shlex.split(line, comments=True)) for line in COMMANDS}))
def test_commands_and_their_options_exist(line: str):
    _, name, *arguments = line.split()
    command = cli.main.commands[name]
    given = command.make_context(name, arguments).params  # reads the options as a call does, and calls nothing
    if name == "bench":
        assert set(given["ops"].split(",")) <= set(BLOCKS)
        assert given["shapes"] in (None, *SHAPES)


def test_options_named_in_sentences_exist():
    context = click.Context(cli.main)
    known = {
        option
        for command in cli.main.commands.values()
        for parameter in command.get_params(context)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    spans = re.findall(r"`(--[^`]+)`", PROSE)
    assert spans
    for span in spans:
        named = {word for word in span.split() if word.startswith("--")}
        assert named <= known | OTHERS, span
        if "--ops" in named:
            given = cli.main.commands["bench"].make_context("bench", span.split()).params
            assert set(given["ops"].split(",")) <= set(BLOCKS) and given["shapes"] in (None, *SHAPES)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", SHELL, re.MULTILINE))
    assert named and named <= targets


def test_files_named_exist():
    text = README.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing
