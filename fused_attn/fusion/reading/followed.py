"""A graph of torch.fx, run once without data: what each node computes, where its result lies, who writes into it."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .canonical import Graph, Node, Unsupported, Value
from .capture import Recorder

#: Sizes that stand for those a dynamic graph leaves open, all different: for small ones (a batch), and for those that
#: strides will divide; the last two for networks that take only what is divisible, and for checks that take long.
SIZES = (
    ((5, 13, 11, 17, 19, 23, 29, 31, 37, 41), (211, 173, 239, 193, 227, 181)),
    ((3, 7, 9, 6, 10, 8, 14, 12, 15, 16), (67, 99, 81, 75, 91, 105)),
    ((2, 6, 5, 9, 8, 10, 12, 7, 14, 15), (96, 64, 160, 128, 192, 224)),
    ((4, 11, 8, 13, 6, 9, 15, 7, 10, 16), (32, 24, 40, 48, 56, 72)),
)
#: Methods that move a tensor to another device.
MOVES = {"cuda", "cpu", "xpu"}
#: In names of functions that change what others compute, or what runs backward, without a tensor that says so.
_CHANGING = ("functorch", "dual_level", "register_hook")
#: From here on a size is taken for that of an image.
LARGE = 32


def is_whole(value: Value) -> bool:
    """Whether a tensor is its node's value with the axes in order, none of size one but for the batch's."""
    axes, shape = itertools.count(), value.shape
    layout = tuple((next(axes),) if n != 1 else () for n in shape)
    return value.layout == layout and all(n != 1 for n in shape[1:])


class Followed:
    """What is known of the nodes of a graph whose open sizes are those of `SIZES[choice]`."""

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], autocast: torch.autocast, choice: int = 0
    ) -> None:
        self.module, self.inputs, self.autocast, self.choice = module, inputs, autocast, choice
        self.graph = Graph()
        #: Canonical values of the nodes that are tensors.
        self.values: dict[fx.Node, Value] = {}
        #: All results: tensors without data, numbers, and what else there is.
        self.results: dict[fx.Node, Any] = {}
        #: The storages of the tensors that a node returns, those that it writes into, and who reads a storage.
        self.storages: dict[fx.Node, frozenset[int]] = {}
        self.writes: dict[fx.Node, frozenset[int]] = {}
        self.readers: dict[int, list[fx.Node]] = {}
        #: Whether gradients are on where a node runs, and what autocast casts to there, if it is.
        self.modes: dict[fx.Node, tuple[bool, torch.dtype | None]] = {}
        #: Names of the inputs and attributes that are tensors of a subclass with others in it.
        self.subclasses: set[str] = set()
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

    def replace(
        self, end: fx.Node, new: Sequence[fx.Node], gone: set[fx.Node], copies: dict[fx.Node, fx.Node] | None = None
    ) -> None:
        """New nodes, of which the last has the place of `end`, and without those that are gone. copies: those of new
        nodes that have the place of another, or are that written once more."""
        copies = copies or {}
        tables: tuple[dict[fx.Node, Any], ...] = (self.values, self.results, self.storages, self.modes)
        for node in new:
            source = copies.get(node, end)
            for table in tables:
                if source in table:
                    table[node] = table[source]
            self.writes[node] = self.writes[source] if node in copies else frozenset()
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
                sizes[node] = sizes.get(copies.get(node, end))

    def other_sizes(self) -> list[dict[fx.Node, Any]]:
        """The results with other sizes in place of the open ones; none where no others are possible."""
        if self._others is None:
            self._others = []
            for choice in range(len(SIZES)) if self.is_dynamic else ():
                if choice != self.choice:
                    other = Followed(self.module, self.inputs, self.autocast, choice)
                    try:
                        self._others.append(_run(other, None).results)
                    except Exception:  # the network does not take these
                        continue
        return self._others


def follow(module: fx.GraphModule, inputs: Sequence[Any], autocast: torch.autocast) -> Followed:
    """autocast: what the graph will run under.

    Raises:
        Unsupported: it has transforms of torch.func in it, forward derivatives or hooks.
        Exception: what the graph raises for tensors without data of all the sizes that are tried.
    """
    for node in module.graph.nodes:
        name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
        if node.op.startswith("call_") and any(part in name for part in _CHANGING):
            raise Unsupported(f"it calls {name}")
    for choice in range(len(SIZES)):
        found = Followed(module, inputs, autocast, choice)
        try:
            return _run(found, Recorder(found.graph, limit=100_000))
        except Exception:
            if choice == len(SIZES) - 1 or not found.is_dynamic:
                raise
    raise Unsupported


def _known(node: fx.Node, value: Any) -> Any:
    """What dynamo or export say of a node's result: with the symbols of the graph in its sizes."""
    return node.meta.get("example_value", node.meta.get("val", value))


def _is_float(x: Any) -> bool:
    return isinstance(x, float) and not math.isnan(x)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _storages(result: Any) -> frozenset[int]:
    return frozenset(t.untyped_storage()._cdata for t in _tensors(result))


def _run(found: Followed, recorder: Recorder | None) -> Followed:
    module = found.module
    small, large = (iter(sizes) for sizes in SIZES[found.choice])
    symbols: dict[Any, int] = {}
    holders = module.graph.find_nodes(op="placeholder")
    kept = [_known(n, v) for n, v in zip(holders, found.inputs, strict=True)]
    device = found.autocast.device

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
        own: bool = is_traceable_wrapper_subclass(value)  # then what is computed with it is not known
        if own:
            found.subclasses.add(name)
        if recorder is not None and not own:
            recorder.put(t, found.graph.leaf("leaf", name, sizes))
        return t

    class Follower(fx.Interpreter):
        def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
            """Nothing gets data, or draws a random number, because a device is written down."""

            def without_device(value: Any) -> Any:
                named = n.target == "to" and isinstance(value, str)
                return torch.device("meta") if named or isinstance(value, torch.device) else value

            args, kwargs = fx.node.map_aggregate(super().fetch_args_kwargs_from_env(n), without_device)
            return args, {k: "meta" if k == "device" and v is not None else v for k, v in kwargs.items()}

        def run_node(self, n: fx.Node) -> Any:
            written = 0 if recorder is None else len(recorder.written)
            cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            found.modes[n] = torch.is_grad_enabled(), cast
            if n.op == "call_method" and n.target == "item":  # an option of a layer that dynamo keeps open
                result = n.meta["example_value"].node.hint
            elif n.op == "get_attr":
                result = stand_in(n.name, self.fetch_attr(str(n.target)))
            elif n.op == "call_method" and n.target in MOVES:
                result = self.env[n.all_input_nodes[0]]
            elif n.target is torch.tensor and n.args and _is_float(n.args[0]):  # without data it would not say which
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                result = torch.full((), args[0], dtype=kwargs.get("dtype"))
            elif n.target is torch.ops.aten._assert_tensor_metadata.default:  # autocast leaves meta tensors as they are
                result = None
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
    # Gradients and autocast are put back as they were, whatever the graph does and wherever it stops.
    with torch.enable_grad(), found.autocast, torch.device("meta"), recorder or contextlib.nullcontext():
        Follower(module, garbage_collect_values=False).run(*args, enable_io_processing=False)
    return found
