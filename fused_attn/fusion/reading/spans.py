"""Nodes of a traced forward as a module of their own, so that what they compute of one map can be recognised."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..recipes.run import layer_at
from .canonical import Spread, Value
from .capture import Captured
from .reads import Reads, Watched
from .recognise import Outcome, captures, examine
from .selections import Elsewhere, laid_out


class Span(nn.Module):
    """These nodes, a function of x, with the layers and parameters at the paths that they have in their parent.

    graph: copies of them, of "block", which has the layers, and of the map. marked: each result goes through a layer of
    its own that does nothing, "marks.0" and so on: a capture then says what each node is. written: products that are
    written into the map, and are not here.
    """

    def __init__(
        self,
        parent: nn.Module,
        x: fx.Node,
        nodes: Sequence[fx.Node],
        *,
        marked: bool = False,
        written: Collection[fx.Node] = (),
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.graph.placeholder("block")
        self.copies = {x: self.graph.placeholder("x")}
        for node in nodes:
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
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
        for name in outer:
            if owner._modules.get(name) is None:
                owner._modules[name] = nn.Module()
            owner = owner.get_submodule(name)
        held = parent.get_submodule(".".join(outer))
        for place in ("_modules", "_parameters", "_buffers"):
            if last in held.__dict__[place]:
                owner.__dict__[place][last] = held.__dict__[place][last]

    def forward(self, x: Tensor) -> Any:
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


def outcome_of_span(span: Span) -> Outcome:
    """What a span is. Its parent's code was read."""
    return examine(span, Reads(Watched(), None, None, frozenset()))


def values_in(span: Span) -> Iterator[tuple[int, dict[fx.Node, Value]]]:
    """For the ranks that a marked span takes, what its nodes are, in evaluation; x is among them."""
    for rank, _, captured in captures(span):
        if isinstance(captured, Captured):
            calls = {call.path: call.output for call in captured.calls}
            yield rank, {n: calls[f"marks.{i}"] for i, n in enumerate(span.copies) if f"marks.{i}" in calls}


def pooled(value: Value, rank: int) -> tuple[str, str] | None:
    """Whether a value is a global pool of the map: the pool, and how ties share its gradient."""
    node = value.node
    if node.op not in ("mean", "max") or node.inputs[0].op != "input" or node.inputs[0].name != "x":
        return None
    if node.attrs[0] != tuple(range(2, rank + 2)) or any(isinstance(e, Spread) for e in value.layout):
        return None
    return ("avg", "first") if node.op == "mean" else ("max", node.attrs[1])


def put_as(value: Value) -> Any:
    """From the descriptor, (B, C), to a tensor in the layout of a value of it; None where that is none of it alone."""
    try:
        return laid_out(value)
    except Elsewhere:
        return None


def is_gate_of_channels(value: Value, rank: int) -> bool:
    """Whether a value is one number a sample and channel, for products with a map."""
    samples, channels, *space = [e if not isinstance(e, Spread) else None for e in value.layout] or [None, None]
    return len(space) == rank and samples == (0,) and channels == (1,) and not any(space)
