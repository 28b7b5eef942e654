"""A graph of torch.fx, run once without data: what each node computes, where its result lies, who writes into it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Recorder
from .graph import Graph, Node, Unsupported, Value

#: Sizes that stand for those a dynamic graph leaves open, all different: for small ones (a batch), and for those that
#: strides will divide; the last for networks that take only what is divisible.
SIZES = (
    ((5, 13, 11, 17, 19, 23, 29, 31, 37, 41), (211, 173, 239, 193, 227, 181)),
    ((3, 7, 9, 6, 10, 8, 14, 12, 15, 16), (67, 99, 81, 75, 91, 105)),
    ((2, 6, 5, 9, 8, 10, 12, 7, 14, 15), (96, 64, 160, 128, 192, 224)),
)
#: From here on a size is taken for that of an image.
LARGE = 32


def is_whole(value: Value) -> bool:
    """Whether a tensor is its node's value with the axes in order, none of size one but for the batch's."""
    axes, shape = itertools.count(), value.shape
    layout = tuple((next(axes),) if n != 1 else () for n in shape)
    return value.layout == layout and all(n != 1 for n in shape[1:])


class Followed:
    """What is known of the nodes of a graph whose open sizes are those of `SIZES[choice]`."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any], choice: int = 0) -> None:
        self.module, self.choice = module, choice
        self.inputs = inputs
        self.graph = Graph()
        #: Canonical values of the nodes that are tensors.
        self.values: dict[fx.Node, Value] = {}
        #: All results: tensors without data, numbers, and what else there is.
        self.results: dict[fx.Node, Any] = {}
        #: The storages of the tensors that a node returns, those that it writes into, and who reads a storage.
        self.storages: dict[fx.Node, frozenset[int]] = {}
        self.writes: dict[fx.Node, frozenset[int]] = {}
        self.readers: dict[int, list[fx.Node]] = {}
        #: Whether gradients and autocast are on where a node runs.
        self.modes: dict[fx.Node, tuple[bool, bool]] = {}
        self.is_dynamic = False
        self._others: list[dict[fx.Node, Any]] | None = None

    def holders(self, node: Node, before: fx.Node) -> list[fx.Node]:
        """What holds this value as it is, before a place in the graph; the last is the one whose layout counts."""
        return [n for n, v in self.values.items() if v.node is node and is_whole(v) and n < before]

    def leaf(self, node: Node) -> fx.Node | None:
        """The input or attribute of the graph that is this value."""
        return next((n for n, v in self.values.items() if v.node is node and n.op in ("placeholder", "get_attr")), None)

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        value = _known(node, self.results.get(node))
        return value.dtype if isinstance(value, Tensor) else None

    def replace(self, end: fx.Node, new: Sequence[fx.Node], gone: set[fx.Node]) -> None:
        """New nodes, of which the last has the place of `end`, and without those that are gone."""
        tables: tuple[dict[fx.Node, Any], ...] = (self.values, self.results, self.storages, self.modes)
        for node in new:
            for table in tables:
                if end in table:
                    table[node] = table[end]
            self.writes[node] = frozenset()
            for storage in {s for a in node.all_input_nodes for s in self.storages.get(a, ())}:
                self.readers.setdefault(storage, []).append(node)
        for node in gone:
            self.writes.pop(node, None)
            for table in tables:
                table.pop(node, None)
        for storage, readers in self.readers.items():
            self.readers[storage] = [r for r in readers if r not in gone]
        for sizes in self._others or ():
            for node in new:
                sizes[node] = sizes.get(end)

    def other_sizes(self) -> list[dict[fx.Node, Any]]:
        """The results with other sizes in place of the open ones; none where no others are possible."""
        if self._others is None:
            self._others = []
            for choice in range(len(SIZES)) if self.is_dynamic else ():
                if choice != self.choice:
                    try:
                        self._others.append(_run(Followed(self.module, self.inputs, choice), None).results)
                    except Exception:  # the network does not take these
                        continue
        return self._others


def follow(module: fx.GraphModule, inputs: Sequence[Any]) -> Followed:
    """
    Raises:
        Unsupported: it writes into one of its maps.
        Exception: what the graph raises for tensors without data of all the sizes that are tried.
    """
    for choice in range(len(SIZES)):
        found = Followed(module, inputs, choice)
        try:
            return _run(found, Recorder(found.graph, limit=100_000))
        except Exception:
            if choice == len(SIZES) - 1 or not found.is_dynamic:
                raise
    raise Unsupported


def _known(node: fx.Node, value: Any) -> Any:
    """What dynamo or export say of a node's result: with the symbols of the graph in its sizes."""
    return node.meta.get("example_value", node.meta.get("val", value))


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors(part)


def _storages(result: Any) -> frozenset[int]:
    return frozenset(t.untyped_storage()._cdata for t in _tensors(result))


def _run(found: Followed, recorder: Recorder | None) -> Followed:
    module = found.module
    small, large = (iter(sizes) for sizes in SIZES[found.choice])
    symbols: dict[Any, int] = {}
    holders = module.graph.find_nodes(op="placeholder")
    kept = [_known(n, v) for n, v in zip(holders, found.inputs, strict=True)]
    device = next((t.device.type for t in _tensors(kept)), "cpu")

    def size(n: Any) -> int:
        if isinstance(n, int):
            return n
        found.is_dynamic = True
        for symbol in sorted(n.node.expr.free_symbols, key=str):
            if symbol not in symbols:
                hint = n.node.hint if n.node.expr == symbol else None
                symbols[symbol] = next(large if isinstance(hint, int) and hint >= LARGE else small)
        return int(n.node.expr.subs(symbols))

    def stand_in(name: str, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return size(value)
        if not isinstance(value, Tensor):
            return value
        sizes = [size(n) for n in value.shape]
        if any(not isinstance(n, int) for n in value.shape):
            t = torch.empty(sizes, dtype=value.dtype, device="meta")
        else:
            t = torch.empty_strided(sizes, value.stride(), dtype=value.dtype, device="meta")
        if recorder is not None:
            recorder.put(t, found.graph.leaf("leaf", name, sizes))
        return t

    class Follower(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            written = 0 if recorder is None else len(recorder.written)
            found.modes[n] = torch.is_grad_enabled(), torch.is_autocast_enabled(device)
            if n.op == "call_method" and n.target == "item":  # an option of a layer that dynamo keeps open
                result = n.meta["example_value"].node.hint
            elif n.op == "get_attr":
                result = stand_in(n.name, self.fetch_attr(str(n.target)))
            else:
                result = super().run_node(n)
            found.results[n] = result
            if recorder is None:
                return result
            if isinstance(result, Tensor):
                try:
                    found.values[n] = recorder.get(result)
                except Unsupported:
                    found.values.pop(n, None)
            found.storages[n] = _storages(result)
            found.writes[n] = _storages(recorder.written[written:])
            for storage in {s for a in n.all_input_nodes for s in found.storages[a]}:
                found.readers.setdefault(storage, []).append(n)
            return result

    args = [stand_in(n.name, v) for n, v in zip(holders, kept, strict=True)]
    # Both are put back as they were, whatever the graph does and wherever it stops.
    autocast = torch.autocast(device, enabled=torch.is_autocast_enabled(device), dtype=torch.get_autocast_dtype(device))
    with torch.enable_grad(), autocast:
        follower = Follower(module, garbage_collect_values=False)
        if recorder is None:
            follower.run(*args, enable_io_processing=False)
            return found
        with recorder:
            follower.run(*args, enable_io_processing=False)
    return found
