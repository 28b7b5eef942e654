"""Planted faults, by layer; `python -m tests.mutants` tries them."""

from __future__ import annotations

import importlib

from tests.mutants.mutant import Mutant

LAYERS = ("cpu", "cuda", "triton", "ops", "qualification", "fusion", "build")
ALL: dict[str, list[Mutant]] = {name: importlib.import_module(f"tests.mutants.{name}").MUTANTS for name in LAYERS}
