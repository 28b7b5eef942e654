"""What compilers look at of a fused block: enough to compile it anew where it is another function.

Dynamo guards on all that it sees read, and evaluates the guards at every call. A plan does not change, so it reads what
is in there unseen, and once asks in plain Python whether the block is intact: it sees the block's own attributes alone,
about as many as of the original's forward.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..reading.reads import MISSING, Watched, is_of_torch, is_torch


class Layer(NamedTuple):
    """A layer of a block, or itself, by the names on the way to it: what must be as it was, in plain values, as their
    guards compare them.

    names: of its children, in order; None where nobody would ask. lacking: attributes that it does not have. absent:
    those that it has from its class, as its forward. empty and filled: parameters and buffers that are None, and that
    are not.
    """

    way: tuple[str, ...]
    names: tuple[str, ...] | None
    options: tuple[tuple[str, Any], ...]
    lacking: tuple[str, ...]
    absent: tuple[str, ...]
    empty: tuple[str, ...]
    filled: tuple[str, ...]


class Traced(NamedTuple):
    """layers: what is asked of them is read unseen. others: what has to be seen, as anything may be behind it."""

    layers: tuple[Layer, ...]
    others: Watched | None


_PLAIN = (bool, int, float, str, types.NoneType)


def _is_constant(value: Any) -> bool:
    return type(value) in _PLAIN or type(value) is tuple and all(map(_is_constant, value))


def _is_code(owner: Any, value: Any) -> bool:
    """Whether it is a function of a class or of torch, or the code of a function: compilers take those for constants
    in anybody's forward."""
    if isinstance(owner, type):
        return isinstance(value, (types.FunctionType, types.BuiltinFunctionType, property))
    return isinstance(owner, types.FunctionType) or (
        isinstance(owner, types.ModuleType) and is_of_torch(owner.__name__)
    )


def traced(block: nn.Module, watched: Watched) -> Traced:
    modules = {tuple(name.split(".")) if name else (): m for name, m in block.named_modules(remove_duplicate=False)}
    ways = {id(module): way for way, module in reversed(modules.items())} | {id(None): ()}

    def here(entries: tuple[Any, ...], *more: Callable[[Any], bool]) -> tuple[dict[tuple[str, ...], list[Any]], Any]:
        """The entries of modules of the block, without their owners, by the way to those; and the others."""
        found: dict[tuple[str, ...], list[Any]] = {}
        rest = []
        for owner, *entry in entries:
            if id(owner) in ways and all(is_so(entry[-1]) for is_so in more):
                found.setdefault(ways[id(owner)], []).append(tuple(entry) if len(entry) > 1 else entry[0])
            else:
                rest.append((owner, *entry))
        return found, tuple(rest)

    options, other_options = here(watched.options, lambda value: value is MISSING or _is_constant(value))
    absent, other_absent = here(watched.absent)
    empty, other_empty = here(watched.empty)
    filled, other_filled = here(watched.filled)
    layers = []
    for way, module in modules.items():
        children = tuple(module._modules)
        values = options.get(way, [])
        layers.append(
            Layer(
                way,
                children if children or not is_torch(type(module)) else None,
                tuple((name, value) for name, value in values if value is not MISSING),
                tuple(name for name, value in values if value is MISSING),
                tuple(dict.fromkeys((*absent.get(way, []), "forward"))),
                tuple(empty.get(way, [])),
                tuple(filled.get(way, [])),
            )
        )
    parts = tuple(entry for entry in watched.parts if not _is_code(entry[0], entry[2]))
    others = Watched(other_options, parts, other_absent, other_empty, other_filled, watched.contents)
    return Traced(tuple(layers), others if any(others) else None)
