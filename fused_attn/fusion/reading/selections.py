"""Selections between branches: the layers that make the branches, and those of the excitation, stay the block's own;
what is fused is the weighted sum, with the branches' BatchNorms and activation before it where all have the same.

What lies between a match and the block's layers is written down as steps: calls of parts of the block, by path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...codes import ACTIVATIONS, FUNCTIONS
from ...nn.selection import selection
from ...reference.block_attention import CONVOLUTIONS, NORMS
from ...reference.select import branch_weights
from ...reference.selection import Layers
from ..recipes.recipe import OwnLayers, Recipe
from ..recipes.run import layer_at
from . import templates
from .canonical import Entry, Node, Spread, Value, axis_of, plain
from .capture import Call, Captured
from .layers import paths_but
from .match import Match, reached, unify

Function = Callable[[nn.Module, Tensor], Tensor]


class Elsewhere(Exception):
    """Something is not computed by layers of the block; the message says what."""


def find_selections(captured: Captured, x: Node, rank: int) -> Iterator[Callable[[nn.Module], Recipe | str]]:
    """Makers of recipes, where the output of a capture is a selection between branches."""
    node = captured.output.node
    if captured.output != plain(node) or len(_weights(node)) < 2:
        return
    if _is_called(captured):
        return
    for template in templates.selections(len(node.attrs), rank):
        for match in unify(template.output, node, captured.graph, Match()):
            try:
                yield _maker(template, match, captured.calls, x, rank)
            except Elsewhere as reason:
                text = str(reason)
                yield lambda block, text=text: text  # type: ignore[misc]
            return


def _is_called(captured: Captured) -> bool:
    """Whether the output is that of a part, which is then the block."""
    node = captured.output.node
    return any(call.output.node is node is not call.input.node for call in captured.calls)


# What looks like one


def _softmax_of(node: Node) -> Node | None:
    """The softmax that a node is a part of."""
    while node.op in ("select", "slice", "flatten", "unflatten"):
        node = node.inputs[0]
    return node if node.op == "softmax" else None


def _weights(node: Node) -> list[tuple[float, Node | None, Node, list[Node]]]:
    """Of a sum of products: coefficient, softmax, what of it is a factor, and the other factors of each term; empty
    where a term has no share of a softmax."""
    found = []
    for coefficient, factors in node.terms if node.op == "poly" else ():
        nodes = [n for n, _ in factors]
        share = next((n for n in nodes if _softmax_of(n) is not None), None)
        if share is None:
            return []
        nodes.remove(share)
        found.append((coefficient, _softmax_of(share), share, nodes))
    return found


def _chosen(share: Node) -> Node:
    """A share of a softmax before its groups were put together."""
    return share.inputs[0] if share.op == "flatten" else share


def _why_not_weighted(terms: list[tuple[float, Node | None, Node, list[Node]]]) -> str | None:
    """What keeps these from being maps, each once and with one part of a softmax over them as its weight."""
    for _, soft, share, _ in terms:
        chosen = _chosen(share)
        if soft is None or chosen.inputs[0] is not soft or chosen.op != "select" or soft.attrs[0] != chosen.attrs[0]:
            return "its softmax is not over the branches"
    if any(c != 1 for c, *_ in terms):
        return "a branch is scaled"
    if len({share for _, _, share, _ in terms}) < len(terms) or any(len(maps) != 1 for *_, maps in terms):
        return "it is not a sum of branches, each with a weight of its own"
    if len({maps[0] for *_, maps in terms}) < len(terms):
        return "a branch is used twice"
    return None


class Weighted(NamedTuple):
    """A sum of branches, each weighted by its own part of one softmax: the maps in the order of their parts, the
    softmax, and the mean over space of the maps' sum, which it is computed from."""

    maps: list[Node]
    softmax: Node
    descriptor: Node


def weighted_sum(node: Node) -> Weighted | None:
    """What a node is as such a sum, whatever computes the softmax from the mean; None: it is none."""
    terms = _weights(node)
    softmaxes = {soft for _, soft, _, _ in terms if soft is not None}
    if len(softmaxes) != 1 or _why_not_weighted(terms) or any(maps[0].sizes != node.sizes for *_, maps in terms):
        return None
    (soft,) = softmaxes
    parts = {_chosen(share).attrs[1]: maps[0] for _, _, share, maps in terms}
    if not len(terms) == len(parts) == soft.sizes[soft.attrs[0]] > 1:
        return None
    maps = [parts[i] for i in sorted(parts)]
    for mean in (n for n in reached(soft) if n.op == "mean" and n.inputs[0].op == "poly"):
        total, over_space = mean.inputs[0].terms, len(mean.attrs[0]) == len(node.sizes) - len(mean.sizes)
        if over_space and all(c == 1 and len(f) == 1 for c, f in total) and {f[0][0] for _, f in total} == set(maps):
            return Weighted(maps, soft, mean)
    return None


def branch_dimension(value: Value) -> int | None:
    """Which dimension of a softmax over branches has the branches, where the others are samples and channels, in
    order; None where they are not."""
    branches = (value.node.attrs[0],)
    entries = [entry for entry in value.layout if not isinstance(entry, Spread)]
    others = [axis for entry in entries if entry != branches for axis in entry]
    if len(entries) < len(value.layout) or branches not in entries or others != sorted(set(others)):
        return None
    return entries.index(branches)


def why_no_selection(captured: Captured) -> str | None:
    """What keeps a sum of branches, weighted by a softmax, from being a known block; None: it is no such sum."""
    terms = _weights(captured.output.node)
    if len(terms) < 2 or _is_called(captured) or not any(len(n.sizes) > 2 for _, _, _, maps in terms for n in maps):
        return None
    return _why_not_weighted(terms) or "its descriptor is not the mean of the sum of its branches"


# From nodes to the layers that compute them


class Step(NamedTuple):
    """function(block, the value at this place) is the next value."""

    function: Function
    place: int


class Program(NamedTuple):
    """How the block computes some values, those at these places, from one that is given, which is at place 0; and the
    paths of the parts that it calls."""

    steps: list[Step]
    places: list[int]
    paths: list[str]

    def run(self, block: nn.Module, given: Tensor) -> list[Tensor]:
        values = [given]
        for step in self.steps:
            values.append(step.function(block, values[step.place]))
        return [values[i] for i in self.places]

    def only(self, block: nn.Module, given: Tensor) -> Tensor:
        """The value, where that is one."""
        return self.run(block, given)[0]


def program_of(calls: Sequence[Call], given: Node, wanted: Sequence[Node]) -> Program:
    """How the block computes these nodes.

    Raises:
        Elsewhere: it does so by other means than its layers.
    """
    writer = _Writer(calls, given)
    places = [writer.place_of(node) for node in wanted]
    return Program(writer.steps, places, writer.paths)


class _Writer:
    def __init__(self, calls: Sequence[Call], given: Node) -> None:
        self.calls: dict[Node, Call] = {c.output.node: c for c in calls if c.output.node is not c.input.node}
        self.places = {given: 0}
        self.steps: list[Step] = []
        self.paths: list[str] = []

    def place_of(self, node: Node) -> int:
        """Where its value will be."""
        if node not in self.places:
            step = self._step(node)
            self.steps.append(step)
            self.places[node] = len(self.steps)
        return self.places[node]

    def _step(self, node: Node) -> Step:
        call = self.calls.get(node)
        if call is not None:  # the outermost with this result
            place = self.place_of(call.input.node)
            self.paths.append(call.path)
            return Step(_called(call.path, laid_out(call.input), _as_axes(call.output)), place)
        if node.op == "act" and node.attrs[0] in FUNCTIONS:
            function = FUNCTIONS[node.attrs[0]]
            return Step(lambda block, t: function(t), self.place_of(node.inputs[0]))
        if node.op == "slice" and len(node.attrs) == 3:
            axis, part, count = node.attrs
            return Step(lambda block, t: t.chunk(count, axis)[part], self.place_of(node.inputs[0]))
        raise Elsewhere("its branches or their weights are not computed by layers of its own")


def _called(path: str, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> Function:
    return lambda block, t: after(layer_at(block, path)(before(t)))


def laid_out(value: Value) -> Callable[[Tensor], Tensor]:
    """From a tensor whose dimensions are the axes of the value's node to one in the value's layout."""
    order, ones = _order(value.layout)

    def arrange(t: Tensor) -> Tensor:
        t = t if order == sorted(order) else t.permute(order)
        for d in ones:
            t = t.unsqueeze(d)
        return t

    return arrange


def _as_axes(value: Value) -> Callable[[Tensor], Tensor]:
    """The way back."""
    order, ones = _order(value.layout)
    back = [order.index(a) for a in range(len(order))]

    def arrange(t: Tensor) -> Tensor:
        for d in reversed(ones):
            t = t.squeeze(d)
        return t if order == sorted(order) else t.permute(back)

    return arrange


def _order(layout: tuple[Entry, ...]) -> tuple[list[int], list[int]]:
    """The axes in the order of their dimensions, and the dimensions of size one."""
    if any(not isinstance(e, tuple) or len(e) > 1 for e in layout):
        raise Elsewhere("a layer gets a flattened or expanded map")
    return [axis_of(e) for e in layout if e], [d for d, e in enumerate(layout) if not e]


# The recipe


class Branches(NamedTuple):
    """What makes the branches: one map if they lie in one. norms: paths."""

    program: Program
    norms: list[str]
    activation: str


class Dense(NamedTuple):
    """Paths of an excitation's layers: two dense ones, of which the second may be one a branch, and a BatchNorm."""

    first: str
    norm: str | None
    activation: str
    second: list[str]


def _maker(template: templates.Template, match: Match, calls: list[Call], x: Node, rank: int) -> Any:
    found = {t.name: n for t, n in match.nodes.items() if t.op == "input"}
    maps = [found[name] for name in template.maps]
    paths = len(maps)
    whole = one_map(maps)
    branches = _branches(calls, maps if whole is None else [whole], x)
    (descriptor,) = (n for t, n in match.nodes.items() if t.op == "mean")
    layers = {t.inputs[1].name: n for t, n in match.nodes.items() if t.op == "dense"}
    logits = [layers[name] for name in sorted(layers)]
    excitation = program_of(calls, descriptor, logits)
    dense = _dense(calls, logits, descriptor)
    (soft,) = (n for t, n in match.nodes.items() if t.op == "softmax")
    if soft.sizes[soft.attrs[0]] != paths:
        raise Elsewhere("its softmax is over more than its branches")
    groups = soft.sizes[1] if len(soft.sizes) == 4 else 1

    def weights(block: nn.Module, s: Tensor) -> Tensor:
        flat = excitation.run(block, s)
        return branch_weights(flat[0] if len(flat) == 1 else torch.cat(flat, 1), paths, groups, "softmax")

    def make(block: nn.Module) -> Recipe | str:
        known = dense is not None and _is_dense(block, dense, groups)
        runs = [*branches.program.paths, *(() if known else excitation.paths)]
        return OwnLayers(
            _Selection(branches, weights, dense if known else None, paths, groups, whole is not None),
            "SelectiveKernel" if whole is None else "SplitAttention",
            ("select", "select/with"),
            rank=rank + 2,
            bypassed=paths_but(block, *runs),
        )

    return make


def one_map(maps: list[Node], axis: int = 1) -> Node | None:
    """What the branches are equal parts of along the axis of channels, in their order; None: maps of their own."""
    source = maps[0].inputs[0] if maps[0].op == "slice" else None
    parts = [(n.op, n.inputs[:1], n.attrs) for n in maps]
    return source if parts == [("slice", (source,), (axis, i, len(maps))) for i in range(len(maps))] else None


def _branches(calls: list[Call], maps: list[Node], x: Node) -> Branches:
    """With as much as possible left to the fused function: BatchNorm and activation, activation, nothing."""
    names = {n.attrs[0] if n.op == "act" else "identity" for n in maps}
    activation = names.pop() if len(names) == 1 else "identity"
    activation = activation if activation in ACTIVATIONS else "identity"
    bare = [n.inputs[0] for n in maps] if activation != "identity" else maps
    norms = [c for n in bare if (c := _layer(calls, n, NORMS)) is not None]
    attempts: list[tuple[list[Node], list[str], str]] = [(bare, [], activation), (maps, [], "identity")]
    if len(norms) == len(bare) and all(v == plain(v.node) for c in norms for v in (c.input, c.output)):
        attempts.insert(0, ([c.input.node for c in norms], [c.path for c in norms], activation))
    reason = Elsewhere()
    for nodes, paths, name in attempts:
        try:
            return Branches(program_of(calls, x, nodes), paths, name)
        except Elsewhere as why:
            reason = why
    raise reason


def _layer(calls: list[Call], node: Node, kinds: tuple[Any, ...]) -> Call | None:
    """The call of a layer of exactly one of these kinds that gives a node."""
    return next((c for c in calls if c.output.node is node and c.kind in kinds and c.input.node is not node), None)


_DENSE = (nn.Linear, *CONVOLUTIONS)


def _dense(calls: list[Call], logits: list[Node], descriptor: Node) -> Dense | None:
    """The excitation's layers, where they are those that the whole fused function knows."""
    second = [_layer(calls, n, _DENSE) for n in logits]
    hidden = {c.input.node for c in second if c is not None}
    if None in second or len(hidden) != 1:
        return None
    (node,) = hidden
    activation = "identity"
    if node.op == "act" and node.attrs[0] in ACTIVATIONS:
        activation, node = node.attrs[0], node.inputs[0]
    norm = _layer(calls, node, NORMS)
    first = _layer(calls, node if norm is None else norm.input.node, _DENSE)
    if first is None or first.input.node is not descriptor:
        return None
    return Dense(first.path, None if norm is None else norm.path, activation, [c.path for c in second if c is not None])


def _is_dense(block: nn.Module, dense: Dense, groups: int) -> bool:
    """Whether the layers are plain: 1x1 convolutions in these many groups, or Linears."""
    layers = [block.get_submodule(path) for path in (dense.first, *dense.second)]
    biases = {getattr(layer, "bias", None) is None for layer in layers[1:]}
    return len(biases) == 1 and all(_is_pointwise(layer, groups) for layer in layers)


def _is_pointwise(layer: Any, groups: int) -> bool:
    if type(layer) is nn.Linear:
        return groups == 1
    return (
        type(layer) in CONVOLUTIONS
        and all(k == 1 for k in (*layer.kernel_size, *layer.stride))
        and layer.padding in ((0,) * len(layer.kernel_size), 0)
        and layer.groups == groups
    )


class _Joined(NamedTuple):
    """Layers one a branch, as one."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class _Own(Layers):
    """Layers that are read by the fused function, and where that cannot, run by the block's own steps."""

    run: Any = None

    def __call__(self, descriptor: Tensor) -> Tensor:
        return self.run(descriptor)


class _Selection:
    """What the fused block runs."""

    def __init__(
        self, branches: Branches, weights: Function, dense: Dense | None, paths: int, groups: int, one_map: bool
    ) -> None:
        self.branches, self.weights, self.dense = branches, weights, dense
        self.paths, self.groups, self.one_map = paths, groups, one_map

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        maps: Any = self.branches.program.run(block, x)
        norms = [layer_at(block, path) for path in self.branches.norms]
        excitation: Any = lambda s: self.weights(block, s)  # noqa: E731
        if self.dense is not None:
            first, norm, activation, second = self.dense
            layers = [layer_at(block, path) for path in second]
            last = layers[0] if len(layers) == 1 else _joined(layers)
            options = layer_at(block, first), norm and layer_at(block, norm), activation, last, self.paths, self.groups
            excitation = _Own(*options, run=excitation)
        branches, paths = (maps[0], self.paths) if self.one_map else (maps, None)
        return selection(branches, norms, self.branches.activation, excitation, paths)


def _joined(layers: list[Any]) -> _Joined:
    weight = torch.cat([layer.weight.flatten(1) for layer in layers])
    return _Joined(weight, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]))
