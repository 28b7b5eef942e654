"""The README and the pages of docs: their Python runs, their shell commands and options exist, their figures are those
that were stored, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
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
sys.path.insert(0, str(ROOT / "docs"))
import figures  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """The pages' code in a language, each with its page and the line it starts on."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            found.append((f"{page.stem}_line{line}", match[1]))
    return found


RUN = """
import os, runpy, sys
import torch  # once for all: each runs in a fork, with its own __main__
from fused_attn.hosts import define_torchvision_operators

define_torchvision_operators()

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


@pytest.mark.slow
def test_python_runs(tmp_path: Path):
    paths = []
    for name, code in blocks("python"):
        if name.startswith("works_with_"):  # one program, run by tests/test_works_with.py
            continue
        paths.append(tmp_path / f"{name}.py")
        paths[-1].write_text(code)
    assert paths
    environment = {**os.environ, "FUSED_ATTN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", RUN, *paths]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


OF_BLOCKS = (ROOT / "docs" / "blocks.md").read_text()
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


def test_parameters_of_blocks_are_as_the_page_says():
    names: dict = {}
    exec(BEFORE, names)
    rows = re.findall(r"^\|.*\| (\d+(?:; \d+)*) \| (`nn\..*`) \|$", OF_BLOCKS, re.MULTILINE)
    cells = [(counts.split("; "), lines[1:-1].split("`, `")) for counts, lines in rows]
    said = {line: int(count) for counts, lines in cells for count, line in zip(counts, lines, strict=True)}
    assert set(said) == {line for line in LINES if line.startswith("nn.")}
    for line, count in said.items():
        block = eval(re.sub(r"\((x|x, x)\)$", "", line), names)
        assert sum(parameter.numel() for parameter in block.parameters()) == count, line


SHELL = "".join(code for _, code in blocks("sh"))
PROSE = "\n".join(re.sub(r"^```.*?^```$", "", p.read_text(), flags=re.MULTILINE | re.DOTALL) for p in PAGES)
COMMANDS = re.findall(r"^(fused-attn .+)", SHELL, re.MULTILINE) + re.findall(r"`(fused-attn [^`]+)`", PROSE)
#: Of pip, and of benchmarks.gpu and benchmarks.hosts.
OTHERS = {"--no-build-isolation", "--part", "--resume", "--page"}


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
            assert set(given["ops"].split(",")) <= set(BLOCKS), span
            assert given["shapes"] is None or cli.sizes_of(given["shapes"]), span


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", SHELL, re.MULTILINE))
    assert named and named <= targets


#: Not ours.
THEIR_ERRORS = {
    "undefined symbol",
    "operator torchvision::nms does not exist",
    "Could not find schema for fused_attn::",
}


def test_errors_of_the_page_exist():
    folders = [(ROOT / "fused_attn").rglob("*.py"), (ROOT / "csrc").rglob("*.h"), (ROOT / "csrc").rglob("*.cpp")]
    source = "".join(path.read_text() for paths in [*folders, [ROOT / "setup.py"]] for path in paths)
    source = re.sub(r'"\n\s*f?"', "", source)  # sentences over two lines
    terms = re.findall(r"^(.*)\n: ", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    errors = set(re.findall("`([^`]+)`", "".join(terms)))
    assert errors > THEIR_ERRORS
    for error in errors - THEIR_ERRORS:
        for part in error.split("..."):  # of what stands there
            assert part.strip(" ;,'") in source, error


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_exist(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_readme_says_what_was_stored(tmp_path: Path):
    """`python docs/figures.py` writes its table and picture anew."""
    shutil.copy(README, tmp_path)
    figures.write(tmp_path / "README.md", tmp_path / "gain.svg")
    assert (tmp_path / "README.md").read_text() == README.read_text()
    assert (tmp_path / "gain.svg").read_text() == (ROOT / "docs" / "gain.svg").read_text()
    assert README.read_text().count("<!-- of docs/figures.py -->\n\n|") == 1


def test_the_readme_is_two_screens():
    assert len(README.read_text().splitlines()) <= 90


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="the site's theme is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path):
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [*build, ROOT / "docs", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in PAGES if page != README}
    assert pages <= {page.relative_to(tmp_path / "html") for page in (tmp_path / "html").rglob("*.html")}
    performance = (tmp_path / "html" / "performance.html").read_text()
    assert performance.count('class="picture') == 5 and "seresnet50 / resnet50" in performance
