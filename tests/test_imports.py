"""Imports only go down: the floors of the package, no circle between modules, and none inside a function but a few."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "fused_attn"

#: From the ground up; a module is on the floor of its longest prefix here. What a floor's modules import of the package
#: is on their own floor or below.
FLOORS = (
    # Names, the native library, and how results, times and backends are judged.
    ("codes", "hosts", "native", "equivalence", "timing", "verdicts"),
    ("reference",),
    ("ops",),
    ("kernels",),  # above the ops, whose schemas they serve: an op finds its kernels by name when it first runs
    ("backends",),
    ("functional",),
    ("qualification",),  # measures the functions, for those above to call
    ("nn",),
    ("fusion.recipes",),
    ("fusion.reading",),
    ("fusion.hosts",),
    ("fusion.changing",),
    ("fusion",),  # api, report and difference
    ("qualify", "viz", "warmup"),
    ("",),  # what people import
    ("bench", "demo", "info", "verify"),
    ("cli",),
    ("__main__",),
)

#: (module, what it imports inside a function) -> why it is not at the top.
INSIDE = {
    ("bench.traffic", "torch"): "Inductor takes seconds to import, and the command need not measure it",
    ("cli", "matplotlib"): "optional: pictures",
    ("demo", "matplotlib"): "optional: pictures",
    ("viz", "matplotlib"): "optional: pictures",
    ("viz", "skimage"): "optional: the sample picture",
    ("demo", "sklearn"): "optional: the digits it learns",
    ("ops.formulas", "torch"): "the counter of operations imports Triton: after somebody else has",
    ("ops.inlined", "torch"): "Inductor takes seconds to import: after somebody else has",
    ("ops.position_attention", "torch"): "brings sympy, as long as all else: whoever has open sizes has imported it",
    ("reference.norm_gate", "torch"): "torch.distributed is not in every build of torch",
}

#: Modules that import by a name made at run time -> why.
BY_NAME = {
    "cli": "asks whether an optional package is there",
    "hosts": "the model's library is the user's choice",
    "ops.common": "kernels, at the first call that they serve: Triton is optional, and takes 0.15 s to import",
}


class Import(NamedTuple):
    """name: of a module, of the package's without "fused_attn."; inside: within a function."""

    name: str
    ours: bool
    inside: bool
    line: int


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")) if name else ROOT
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """Every import statement of a module of the package, in whatever block it stands."""
    path = MODULES[module]
    package = ("fused_attn", *module.split(".")) if module else ("fused_attn",)
    if path.name != "__init__.py":
        package = package[:-1]

    def found(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                for name in dict.fromkeys(_names(child, package)):
                    root, _, rest = name.partition(".")
                    ours = root == "fused_attn"
                    yield Import(rest if ours else name, ours, inside, child.lineno)
            yield from found(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return tuple(found(ast.parse(path.read_text()), False))


def _names(statement: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    base = package[: len(package) - statement.level + 1] if statement.level else ()
    source = ".".join((*base, statement.module) if statement.module else base)
    for alias in statement.names:  # of a package it may be a module
        inner = f"{source}.{alias.name}"
        yield inner if source.startswith("fused_attn") and is_module(inner.partition(".")[2]) else source


def floor_of(module: str) -> int:
    prefixes = {prefix: i for i, floor in enumerate(FLOORS) for prefix in floor}
    parts = module.split(".")
    name = next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in prefixes), None)
    assert name is not None, f"{module} is on no floor: give it one"
    return prefixes[name]


def test_imports_go_down():
    up = [
        f"{MODULES[module].relative_to(ROOT.parent)}:{i.line} imports fused_attn.{i.name}"
        for module in MODULES
        for i in imports(module)
        if i.ours and floor_of(i.name) > floor_of(module)
    ]
    assert not up, "\n".join(up)


def test_every_floor_is_there():
    assert {prefix for floor in FLOORS for prefix in floor if not is_module(prefix)} == set()
    assert {floor_of(module) for module in MODULES} == set(range(len(FLOORS)))


def test_no_module_imports_itself_by_others():
    graph = {module: {i.name for i in imports(module) if i.ours and i.name != module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle: " + " <- ".join(str(name) for name in error.args[1]))


def test_imports_inside_functions_are_the_few_listed():
    inside = {(module, i.name.partition(".")[0]): i for module in MODULES for i in imports(module) if i.inside}
    assert set(inside) == set(INSIDE)
    assert not any(i.ours for i in inside.values())


def test_imports_by_name_are_the_few_listed():
    def names(module: str) -> set[str]:
        nodes = ast.walk(ast.parse(MODULES[module].read_text()))
        return {name for n in nodes if (name := getattr(n, "attr", None) or getattr(n, "id", None))}

    assert {module for module in MODULES if {"import_module", "__import__"} & names(module)} == set(BY_NAME)
