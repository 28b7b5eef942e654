"""Which nodes of a graph a block is: what leads from its map and parameters to its result, and whether these nodes can
give way to one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .followed import Followed


@dataclass
class Region:
    """The nodes between `stops` and `end`, in order. sizes: numbers that they take from elsewhere. gone: those that
    nobody needs any more when another node has taken the place of the end."""

    end: fx.Node
    stops: set[fx.Node]
    nodes: list[fx.Node] = field(default_factory=list)
    sizes: set[fx.Node] = field(default_factory=set)
    gone: set[fx.Node] = field(default_factory=set)


def region(seen: Followed, end: fx.Node, stops: Iterable[fx.Node]) -> Region | None:
    """What `end` computes from the tensors `stops`; None where it is more than that, or where not all of it can go:
    others see what it writes, or what it reads has changed where it ends, or gradients are off in a part of it."""
    found = Region(end, set(stops))
    inside: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node in inside:
            continue
        if node not in seen.results:
            return None
        if is_number(seen.results[node]):
            found.sizes.add(node)
            continue
        if node.op not in ("call_function", "call_method") or seen.modes[node] != seen.modes[end]:
            return None
        inside.add(node)
        for source in node.all_input_nodes:
            if source not in found.stops:
                waiting.append(source)
            waiting += [m for m in _writers(seen, source) if source < m < node]
    found.nodes = sorted(inside)
    found.gone = _gone(seen, found)
    if end not in found.gone or any(seen.writes[n] and n not in found.gone for n in found.nodes):
        return None
    for stop in found.stops:
        if any(stop < m < end and m not in found.gone for m in _writers(seen, stop)):
            return None
    return found


def is_number(result: Any) -> bool:
    return result is None or isinstance(result, (bool, int, float, str))


def _writers(seen: Followed, source: fx.Node) -> list[fx.Node]:
    return [m for s in seen.storages.get(source, ()) for m in seen.readers.get(s, ()) if s in seen.writes[m]]


def _gone(seen: Followed, block: Region) -> set[fx.Node]:
    inputs = {s for n in block.end.graph.nodes if n.op in ("placeholder", "get_attr") for s in seen.storages.get(n, ())}
    found: set[fx.Node] = set()
    for node in reversed(block.nodes):
        if node is not block.end and not all(user in found for user in node.users):
            continue
        written = seen.writes[node]
        readers = {r for s in written for r in seen.readers[s]}
        if written & inputs or any(_reads(seen, r, written, node, block.end, found) for r in readers):
            continue
        found.add(node)
    return found


def _reads(
    seen: Followed, reader: fx.Node, storages: frozenset[int], after: fx.Node, end: fx.Node, found: set[fx.Node]
) -> bool:
    """Whether a node that stays sees what a node that goes has written, other than as the block's result."""
    if not after < reader or reader in found:
        return False
    return any(a is not end and not end < a and seen.storages[a] & storages for a in reader.all_input_nodes)
