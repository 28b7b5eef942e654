"""Nodes of a traced forward as a module of their own, so that what they compute of one map can be recognised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..recipes.run import layer_at
from .canonical import Spread, Value
from .capture import Captured
from .layers import LISTS
from .match import reached
from .reads import Reads, Watched
from .recognise import Outcome, captures, examine
from .selections import Elsewhere, laid_out


class Span(nn.Module):
    """These nodes, a function of x, with the layers and parameters at the paths that they have in their parent.

    graph: copies of them, of "block", which has the layers, and of the map. marked: each result goes through a layer of
    its own that does nothing, "marks.0" and so on: a capture then says what each node is. written: products that are
    written into the map, and are not here. Where sizes of a map that is not here are asked for, those of x have to do.
    last: they read and write maps whose channels are the last axis; the module has them where maps have them.
    """

    def __init__(
        self,
        parent: nn.Module,
        x: fx.Node,
        nodes: Sequence[fx.Node],
        *,
        marked: bool = False,
        written: Collection[fx.Node] = (),
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.graph = fx.Graph()
        self.graph.placeholder("block")
        self.copies = {x: self.graph.placeholder("x")}
        for node in nodes:
            others = self.copies[x] if is_size(node) else None
            self.copies[node] = self.graph.node_copy(node, lambda n, o=others: self.copies.get(n, o))  # type: ignore[misc]
            if node in written:
                self.copies[node].op, self.copies[node].target = "call_function", torch.mul
            self._hold(parent, node)
        self.graph.output(self.copies[nodes[-1]])
        self.marks = nn.ModuleList(nn.Identity() for _ in self.copies) if marked else None

    def _hold(self, parent: nn.Module, node: fx.Node) -> None:
        if node.op not in ("call_module", "get_attr"):
            return
        *outer, last = str(node.target).split(".")
        owner: nn.Module = self
        held = parent
        for name in outer:
            held = held.get_submodule(name)
            if owner._modules.get(name) is None:
                owner._modules[name] = type(held)() if type(held) in LISTS else nn.Module()
            owner = owner.get_submodule(name)
        for place in ("_modules", "_parameters", "_buffers"):
            if last in held.__dict__[place]:
                owner.__dict__[place][last] = held.__dict__[place][last]

    def forward(self, x: Tensor) -> Any:
        return self._computed(x.movedim(1, -1)).movedim(-1, 1) if self.last else self._computed(x)

    def _computed(self, x: Tensor) -> Any:
        known: dict[fx.Node, Any] = {}
        for i, node in enumerate(self.copies.values()):
            known[node] = result = self._run(node, known, x)
            if self.marks is not None and isinstance(result, Tensor):
                known[node] = self.marks[i](result)
        return known[node]

    def _run(self, node: fx.Node, known: dict[fx.Node, Any], x: Tensor) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        target: Any = node.target
        if node.op == "placeholder":
            return x
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        found = layer_at(self, target)
        return found(*args, **kwargs) if node.op == "call_module" else found


def is_size(node: fx.Node) -> bool:
    """Whether a tensor is asked for its sizes."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim")


def outcome_of_span(span: Span) -> Outcome:
    """What a span is. Its parent's code was read."""
    return examine(span, Reads(Watched(), None, None, frozenset()))


def values_in(span: Span) -> Iterator[tuple[int, dict[fx.Node, Value]]]:
    """For the ranks that a marked span takes, what its nodes are, in evaluation; x is among them."""
    for rank, _, captured in captures(span):
        if isinstance(captured, Captured):
            calls = {call.path: call.output for call in captured.calls}
            yield rank, {n: calls[f"marks.{i}"] for i, n in enumerate(span.copies) if f"marks.{i}" in calls}


#: Nodes from a map to its gate, up to which it is looked at.
MOST_NODES = 60


class Pool(NamedTuple):
    """A pool of the map, over all positions, over the channels, or of a map (B, C, H, W) over one axis: the means of
    its rows or of its columns. arrange: from what is left, in the order of the map's axes, to the pool as the code has
    it."""

    over: str  # "positions", "channels", "rows" or "columns"
    kind: str  # "avg" or "max"
    ties: str
    arrange: Callable[[Tensor], Tensor]


def pool_of(value: Value, rank: int) -> Pool | None:
    """The pool that a value is; None: it is none. The value's axes are those of a map with its channels first."""
    node = value.node
    if node.op not in ("mean", "max") or node.inputs[0].op != "input":
        return None
    kinds: dict[Any, str] = {tuple(range(2, rank + 2)): "positions", (1,): "channels"}
    if rank == 2 and node.op == "mean":
        kinds |= {(3,): "rows", (2,): "columns"}
    over = kinds.get(node.attrs[0])
    if over is None:
        return None
    try:
        arrange = laid_out(value)
    except Elsewhere:
        return None
    return Pool(over, "avg", "first", arrange) if node.op == "mean" else Pool(over, "max", node.attrs[1], arrange)


def kind_of_gate(value: Value, rank: int, last: bool = False, samples: int = 2) -> str | None:
    """Of what, for products with a map, a value is one number each: of its "channels", or of its "positions"; None: of
    neither. last: the map has its channels last. samples: how many it has; of one there is no axis."""
    entries = [() if isinstance(e, Spread) else e for e in value.layout]
    if samples == 1:
        entries = [(0,), *(tuple(a + 1 for a in e) for e in entries[1:])] if entries[:1] == [()] else []
    if len(entries) != rank + 2 or entries[0] != (0,):
        return None
    if last:
        entries.insert(1, entries.pop())
    if entries[1:] == [(1,), *((),) * rank]:
        return "channels"
    return "positions" if entries[1:] == [(), *((i + 1,) for i in range(rank))] else None


def strip_of(value: Value, rank: int) -> str | None:
    """Of what of a map (B, C, H, W), for products with it, a value is one number each and channel: of its "rows", or of
    its "columns"; None: of neither."""
    entries = [() if isinstance(e, Spread) else e for e in value.layout]
    if rank != 2 or len(entries) != 4 or entries[0] != (0,):
        return None
    channel, row, column = (e != () for e in entries[1:])
    return None if not channel or row is column else "rows" if row else "columns"


def is_bounded(value: Value) -> bool:
    """Whether there is a function of gates in what a value is computed by."""
    return any(n.op == "softmax" or (n.op == "act" and n.attrs[0] in _BOUNDED) for n in reached(value.node))


_BOUNDED = ("sigmoid", "hard_sigmoid", "tanh", "relu6", "clamp 0.0 1.0", "clamp 0.0 6.0", "hardtanh 0.0 1.0")
