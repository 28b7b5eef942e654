"""Attention over positions, wherever in a block it stands: what makes its queries, keys and values stays the block's
own, and so does what becomes of its result; what is fused is the attention, of which no matrix is written.

The block's layers are called as it calls them. What it computes between them, views, sums and pools, is written down
anew as steps; whether these are the block's computation is for the numerical check to say.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional
from ...codes import FUNCTIONS
from ...nn.non_local import concatenation_attention, dot_attention
from ...reference.block_attention import CONVOLUTIONS
from ...reference.non_local import weighted_channels
from ..recipes.recipe import OwnLayers, Recipe
from ..recipes.run import Unsuited, layer_at, number_at, parameter_at, split_path
from .canonical import Entry, Graph, Node, Spread, Unsupported, Value, plain
from .capture import EVEN_SPACE, Call, Captured
from .layers import is_dense, paths_but
from .match import reached
from .operators import LOWEST

Layout = tuple[Entry, ...]
#: function(block, the block's map, other values) is a value.
Function = Callable[..., Any]
Axes = tuple[int, ...]
#: Of a sum of products: coefficient, and factors with the places of their axes.
Terms = list[tuple[float, list[tuple[Node, Axes]]]]


#: Said of what has no better reason.
UNKNOWN = "its attention is none that we know"


class Elsewhere(Exception):
    """Something is computed in a way that is not written down; the message says what."""


def find_attentions(captured: Captured, x: Node, rank: int) -> Iterator[Callable[[nn.Module], Recipe | str]]:
    """Makers of recipes, where a block itself, not a part of it, computes attentions that its result is made of."""
    if not own_attentions(captured):
        return
    try:
        writer = _Writer(captured, x)
        writer.write(captured.output)
    except (Elsewhere, Unsupported, ValueError, IndexError, KeyError) as why:
        text = str(why) if isinstance(why, Elsewhere) else UNKNOWN
        yield lambda block: text
        return
    if writer.names:
        for in_place in (False, True):
            yield _maker(writer, rank, in_place, captured.space == EVEN_SPACE[:rank])


def own_attentions(captured: Captured) -> list[Node]:
    return [n for n in reached(captured.output.node) if n not in captured.inner and is_attention(n)]


def why_no_attention(captured: Captured) -> str | None:
    """What keeps a block that computes an attention itself from being a known one; None: it computes none."""
    own = [n for n in reached(captured.output.node) if n not in captured.inner]
    weighted = any(is_soft(i) for n in own if is_attention(n) and n.op == "product" for i in n.inputs)
    of_pairs = any(n.op == "softmax" and any(map(_is_of_pairs, reached(n))) for n in own)
    return UNKNOWN if weighted or of_pairs else None


def _is_of_pairs(node: Node) -> bool:
    """Whether it is products of two things that are computed from the map."""
    return node.op == "product" and all(any(n.op == "input" for n in reached(i)) for i in node.inputs)


def is_attention(node: Node) -> bool:
    """Whether it weighs something that is computed from the map by products of what is."""
    if node.op == "mean" and node.inputs[0].op == "poly" and len(node.inputs[0].terms) == 1:
        return any(is_soft(n) for n in node.inputs[0].inputs)
    if not _is_of_pairs(node):
        return False
    return any(is_soft(n) or n.op == "product" or _joined(n) is not None for n in node.inputs)


def is_soft(node: Node) -> bool:
    """Whether it is a softmax of products of what is computed from the map, or a part of one."""
    node = node.inputs[0] if node.op == "slice" else node
    return node.op == "softmax" and any(n.op in ("product", "dense") for n in reached(node))


# From one layout of a value to another


def _arrangement(value: Value, wanted: Layout, x: Node) -> Callable[[Tensor, Tensor], Tensor]:
    """arrange(t, the block's map): from a tensor in the layout of a value to one in another."""
    if any(isinstance(e, Spread) for e in (*value.layout, *wanted)):
        raise Elsewhere("a layer of it gets an expanded map")
    held: list[Any] = list(value.layout)
    steps: list[tuple[str, Any]] = []
    for d in reversed(range(len(held))):
        if held[d] == ():
            steps.append(("squeeze", (d,)))
            del held[d]
        elif len(held[d]) > 1 and held[d] not in wanted:
            steps.append(("unflatten", (d, [_size(value.node.sizes[a], x) for a in held[d]])))
            held[d : d + 1] = [(a,) for a in held[d]]
    try:
        order = [held.index(e) for part in wanted if part for e in ([part] if part in held else [(a,) for a in part])]  # type: ignore[union-attr]
    except ValueError:
        raise Elsewhere("what it flattens is not what it takes apart again") from None
    if order != list(range(len(held))):
        steps.append(("permute", order))
    for d, entry in enumerate(wanted):
        if entry == ():
            steps.append(("unsqueeze", (d,)))
        elif entry not in held:
            steps.append(("flatten", (d, d + len(entry) - 1)))  # type: ignore[arg-type]

    def arrange(t: Tensor, of: Tensor) -> Tensor:
        for name, arguments in steps:
            if name == "unflatten":
                d, sizes = arguments
                t = t.unflatten(d, [of.shape[n] if is_map else n for is_map, n in sizes])
            else:
                t = getattr(t, name)(*arguments)
        return t

    return arrange


def _size(n: int, x: Node) -> tuple[bool, int]:
    """The size of an axis: that of a dimension of the block's map, or a number."""
    found = [d for d in (*range(2, len(x.sizes)), 0) if x.sizes[d] == n]
    return (True, found[0]) if found else (False, n)


# Attentions


class Attention(NamedTuple):
    """What a node is: function(block, x, *inputs) in this layout of its axes, times 1 / ratio. inputs: nodes and the
    layouts they are wanted in. layer: that is read, not called."""

    name: str
    functions: tuple[str, ...]
    function: Function
    inputs: tuple[tuple[Node, Layout], ...]
    output: Layout
    ratio: float = 1.0
    layer: str | None = None


def _separate(axes: Sequence[int]) -> Layout:
    """Spatial axes, of which there are at most three."""
    return tuple((a,) for a in axes) if len(axes) <= 3 else (tuple(axes),)


def _attention(node: Node, x: Node) -> Attention | None:
    """An attention whose result a node is."""
    for side in (0, 1) if node.op == "product" else ():
        weights, of_weights = node.inputs[side], node.attrs[side]
        value, (samples, features, keys) = node.inputs[1 - side], node.attrs[1 - side]
        start = len(samples) + (0 if side == 0 else len(features))
        queries = range(start, start + len(of_weights[1]))
        rest = [a for a in range(len(samples), len(node.sizes)) if a not in queries]
        output = (tuple(range(len(samples))), tuple(rest), *_separate(queries))
        values = value, (samples, features, *_separate(keys))
        found = (
            _context(weights, of_weights, values, output)
            or _separable(weights, of_weights, values, output)
            or _pairs(weights, of_weights, values, output, x)
        )
        if found is not None:
            return found
    if node.op == "mean":  # of a map times its weights, written as such
        (inside,) = node.inputs
        terms = inside.terms if inside.op == "poly" else []
        if len(terms) == 1 and terms[0][0] == 1 and len(terms[0][1]) == 2:
            every = tuple(range(len(inside.sizes)))
            for (weights, places), (value, axes) in itertools.permutations(terms[0][1]):
                if weights.op == "softmax" and axes == every and every[2:] == node.attrs[0] and 1 not in places:
                    of_weights = (places.index(0),), (), tuple(places.index(a) for a in every[2:])
                    values = value, ((0,), (1,), *_separate(every[2:]))
                    found = _context(weights, of_weights, values, ((0,), (1,)))
                    return found and found._replace(ratio=math.prod(inside.sizes[2:]))
    return None


def _context(weights: Node, of_weights: Any, values: tuple[Node, Layout], output: Layout) -> Attention | None:
    """Weights of positions that are the same for all queries, from a layer to one channel: global context."""
    _, queries, keys = of_weights
    if weights.op != "softmax" or queries or sorted(weights.attrs) != sorted(keys):
        return None
    (logits,) = weights.inputs
    if logits.op != "dense" or logits.inputs[0] is not values[0] or logits.inputs[1].op != "leaf":
        return None
    path = logits.inputs[1].name.rpartition(".")[0]

    def context(block: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_at(block, path)
        return functional.context_pool_with_map(t, layer.weight, layer.bias)

    return Attention("GlobalContext", ("context_pool", "scale"), context, (values,), output, 1.0, path)


def _joined(node: Node) -> tuple[Node, Node] | None:
    """What is concatenated and goes through a layer and a ReLU, and the layer's weight."""
    node = node.inputs[0] if node.op == "act" and node.attrs[0] == "relu" else node
    found = node.op == "dense" and node.inputs[0].op == "concat" and node.inputs[0].attrs[0] == node.attrs[0]
    return (node.inputs[0], node.inputs[1]) if found and len(node.inputs[0].inputs) == 2 else None


def _separable(weights: Node, of_weights: Any, values: tuple[Node, Layout], output: Layout) -> Attention | None:
    """The ReLU of a layer to one channel of queries side by side with keys, divided by the number of keys."""
    joined = _joined(weights) if weights.op == "act" else None
    if joined is None or joined[1].op != "leaf" or weights.inputs[0].attrs[1]:
        return None
    joint, weight = joined
    channel = joint.attrs[0]
    samples, queries, keys = (tuple(a + (a >= channel) for a in entry) for entry in of_weights)
    inputs: list[tuple[Node, Layout]] = []
    first: list[int] = []
    for places in (queries, keys):
        i = next((i for i in (0, 1) if set(joint.attrs[1 + i]) == {*samples, channel, *places}), -1)
        if i < 0:
            return None
        order = joint.attrs[1 + i]
        axes = tuple(order.index(a) for a in places)
        inputs.append(
            (joint.inputs[i], (tuple(order.index(a) for a in samples), (order.index(channel),), *_separate(axes)))
        )
        first.append(i)
    if sorted(first) != [0, 1]:
        return None
    path = split_path(weight.name)

    def attend(block: nn.Module, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer: Any = parameter_at(block, path)
        parts = layer.flatten(1).split([t.shape[1] for t in ((query, key) if first[0] == 0 else (key, query))], 1)
        query, key = (weighted_channels(t, parts[i]) for t, i in zip((query, key), first, strict=True))
        return concatenation_attention(query, key, value)

    count = math.prod(joint.sizes[a] for a in keys)
    return Attention("NonLocal", (), attend, (*inputs, values), output, 1 / count, weight.name.rpartition(".")[0])


def _pairs(weights: Node, of_weights: Any, values: tuple[Node, Layout], output: Layout, x: Node) -> Attention | None:
    """Weights from products of queries and keys: their softmax over the keys, or themselves."""
    samples, queries, keys = of_weights
    products, scale, place = weights, 1.0, {a: a for a in range(len(weights.sizes))}
    numbers: list[tuple[Node, Layout]] = []
    if weights.op == "softmax" and sorted(weights.attrs) == sorted(keys):
        (products,) = weights.inputs
        if products.op == "poly" and len(products.terms) == 1:
            ((scale, factors),) = products.terms
            numbers = [(n, ()) for n, axes in factors if not axes]
            found = [(n, axes) for n, axes in factors if axes]
            if len(found) != 1:
                return None
            products, axes = found[0]
            place = {a: i for i, a in enumerate(axes)}
    if products.op != "product" or not queries or not keys:
        return None
    samples, queries, keys = ([place[a] for a in entry] for entry in (samples, queries, keys))
    sides = _sides(products, samples, queries, keys)
    of_space = (*products.attrs[0][0], *products.attrs[0][2])
    if sides is None or any(products.inputs[0].sizes[a] in x.sizes[2:] for a in of_space):
        return None  # of channels, or of lines of a map, the matrices are small
    (query, of_query), (key, of_key) = sides
    inputs: tuple[tuple[Node, Layout], ...] = (
        (query, (of_query[0], of_query[1], *_separate(of_query[2]))),
        (key, (of_key[0], of_key[1], *_separate(of_key[2]))),
        values,
        *numbers,
    )
    if weights is products:
        count = math.prod(key.sizes[a] for a in of_key[2])
        return Attention("NonLocal", (), _dot, inputs, output, 1 / count)

    def attend(block: nn.Module, x: Tensor, query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
        for number in numbers:
            query = (query * number).to(query.dtype)
        return functional.position_attention(query, key, value, scale=exact)

    exact = _exact(scale)
    return Attention("NonLocal", ("position_attention",), attend, inputs, output)


def _dot(block: nn.Module, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return dot_attention(query, key, value)


def _exact(number: float) -> float:
    """A number of which the first digits are known, where it is whole, one divided by such, or a root of these."""
    for power in (1, -1, 2, -2):
        whole = round(abs(number) ** power) if number else 0
        if 0 < whole < 2**24:
            exact = math.copysign(whole ** (1 / power), number)
            if math.isclose(exact, number, rel_tol=1e-8):
                return exact
    return number


def _sides(products: Node, samples: Sequence[int], queries: Sequence[int], keys: Sequence[int]) -> Any:
    """Queries and keys of products, each with its axes of samples, features and positions; of the axes of the products
    these are what is told by the arguments. None: they do not fit."""
    count = len(products.attrs[0][0])
    rows = [list(range(count, count + len(products.attrs[0][1]))), []]
    rows[1] = list(range(count + len(rows[0]), len(products.sizes)))
    for i in (0, 1):
        if sorted(queries) == rows[i] and sorted(keys) == rows[1 - i] and sorted(samples) == list(range(count)):
            return tuple(
                (
                    products.inputs[j],
                    (
                        tuple(products.attrs[j][0][a] for a in samples),
                        products.attrs[j][2],
                        tuple(products.attrs[j][1][a - rows[j][0]] for a in axes),
                    ),
                )
                for j, axes in ((i, queries), (1 - i, keys))
            )
    return None


# Criss-cross attention, the sum of two products that have parts of one softmax


class _Line(NamedTuple):
    """The part of the columns, or that of the rows. query, key, value: nodes, and their axes of samples and the other
    lines, of features, of this line. result: the axes of the node likewise. masked: without the position itself."""

    soft: Node
    masked: bool
    query: tuple[Node, tuple[Axes, Axes, Axes]]
    key: tuple[Node, tuple[Axes, Axes, Axes]]
    value: tuple[Node, tuple[Axes, Axes, Axes]]
    result: tuple[Axes, Axes, Axes]


def _line(node: Node) -> _Line | None:
    for side in (0, 1) if node.op == "product" else ():
        share, (samples, queries, keys) = node.inputs[side], node.attrs[side]
        value, of_value = node.inputs[1 - side], node.attrs[1 - side]
        soft = share.inputs[0] if share.op == "slice" else share
        if share is soft or soft.op != "softmax" or soft.attrs != keys or share.attrs[0] != keys[0]:
            continue
        (joint,) = soft.inputs
        if joint.op != "concat" or len(joint.inputs) != 2 or joint.attrs[0] != keys[0] or len(queries) != 1:
            continue
        part = int(share.attrs[1] != 0)
        masked, products, axes = _unmasked(joint.inputs[part])
        count = len(samples)  # one where the batch is one
        if products is None or count not in (1, 2) or len(of_value[1]) != 1:
            continue
        place = {joint.attrs[1 + part][a]: i for i, a in enumerate(axes)}
        found = _sides(products, *([place[a] for a in entry] for entry in (samples, queries, keys)))
        if found is None:
            continue
        (query, of_query), (key, of_key) = found
        row, feature = (count, count + 1) if side == 0 else (count + 1, count)
        return _Line(
            soft,
            masked,
            (query, of_query),
            (key, of_key),
            (value, of_value),
            (tuple(range(count)), (feature,), (row,)),
        )
    return None


def _unmasked(logits: Node) -> tuple[bool, Node | None, Axes]:
    """Whether there is minus infinity on the diagonal of products; these, and where their axes are."""
    if logits.op == "product":
        return False, logits, tuple(range(len(logits.sizes)))
    terms = logits.terms if logits.op == "poly" else []
    products = [f[0] for c, f in terms if c == 1 and len(f) == 1 and f[0][0].op == "product"]
    masks = [c * f[0][0].attrs[0] for c, f in terms if len(f) == 1 and f[0][0].op == "diagonal"]
    if len(terms) != 2 or len(products) != 1 or len(masks) != 1 or not masks[0] <= LOWEST:
        return False, None, ()
    return True, *products[0]


def _criss_cross(nodes: Sequence[tuple[Node, Axes]]) -> tuple[Attention, Layout] | None:
    """The attention that two products with their places in a sum are; and the places of its axes."""
    lines = [_line(n) for n, _ in nodes]
    if None in lines:
        return None
    ordered = sorted(zip(lines, (a for _, a in nodes), strict=True), key=lambda pair: pair[0].value[1][2])  # type: ignore[union-attr]
    (column, of_column), (row, of_row) = ordered
    assert column is not None and row is not None
    if column.soft is not row.soft or column.masked == row.masked:
        return None
    layouts: list[Layout] = []
    for ours, theirs in zip(column[2:5], row[2:5], strict=True):
        crossed = _crossed(ours[1], theirs[1]) if ours[0] is theirs[0] else None
        if crossed is None:
            return None
        layouts.append(crossed)
    places = [
        tuple(tuple(axes[a] for a in entry) for entry in line.result)
        for line, axes in ((column, of_column), (row, of_row))
    ]
    result = _crossed(*places)
    if result is None:
        return None
    nodes3 = tuple(zip((line[0] for line in column[2:5]), layouts, strict=True))
    output = (*(((0,),) if result[0] else ((),)), *((len(result[0]) + i,) for i in range(3)))  # type: ignore[arg-type]
    functions = ("criss_cross_attention",)
    return Attention("CrissCrossAttention", functions, _attend_criss_cross, nodes3, output), result


def _crossed(column: tuple[Axes, ...], row: tuple[Axes, ...]) -> Layout | None:
    """The axes of samples, features, columns and rows, of the same tensor seen from both lines."""
    (height,), (width,) = column[2], row[2]
    samples = set(column[0]) & set(row[0])
    fits = column[1] == row[1] and {*column[0]} == {*samples, width} and {*row[0]} == {*samples, height}
    return (tuple(samples), column[1], (height,), (width,)) if fits and len(samples) < 2 else None


def criss_crosses(graph: Graph, terms: Terms) -> Iterator[tuple[Node, Attention, Terms]]:
    """For each two terms of a sum that are the columns and the rows of one attention: a node that stands for it, whose
    inputs are queries, keys and values, with their layouts; and the sum with it in their place."""
    for (i, (c, f)), (j, (d, g)) in itertools.combinations(enumerate(terms), 2):
        if c != d or len(f) != len(g):
            continue
        for a, b in itertools.product(f, g):
            rest = [m for m in f if m is not a]
            if _sorted(rest) != _sorted([m for m in g if m is not b]):
                continue
            found = _criss_cross((a, b))
            if found is None:
                continue
            attention, places = found
            axes = tuple(e[0] for e in places if e)  # type: ignore[index]
            sizes = [dict(zip((*a[1], *b[1]), (*a[0].sizes, *b[0].sizes), strict=True))[e] for e in axes]
            nodes, layouts = zip(*attention.inputs, strict=True)
            node = graph.node("criss_cross", nodes, layouts, sizes)
            yield node, attention, [*(t for k, t in enumerate(terms) if k not in (i, j)), (c, [*rest, (node, axes)])]


def _attend_criss_cross(block: nn.Module, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.criss_cross_attention(query, key, value)


# From nodes to steps


class Step(NamedTuple):
    """function(block, the block's map, the values at these places) is the next value; gone: those not needed again."""

    function: Function
    places: tuple[int, ...]
    gone: tuple[int, ...] = ()


class _Writer:
    """steps: of which the first value is the block's map. paths: of the layers that are called."""

    def __init__(self, captured: Captured, x: Node) -> None:
        self.captured, self.x = captured, x
        self.calls: dict[Node, Call] = {c.output.node: c for c in captured.calls if c.output.node is not c.input.node}
        sums = [n for n in self.calls if n.op == "poly" and len(n.terms) > 1]
        self.sums = sorted(sums, key=lambda n: -len(n.terms))
        self.places: dict[Node, tuple[int, Value]] = {x: (0, plain(x))}
        self.steps: list[Step] = []
        self.paths: list[str] = []
        self.read: list[str] = []
        self.names: list[str] = []
        self.functions: list[str] = []
        self.criss_cross: dict[Node, Attention] = {}

    def write(self, output: Value) -> None:
        place = self._arranged(output.node, output.layout)
        if place != len(self.steps):
            self._add(lambda block, x, t: t, place)
        last = {p: i for i, step in enumerate(self.steps) for p in step.places}
        for i, step in enumerate(self.steps):
            gone = tuple(dict.fromkeys(p for p in step.places if last[p] == i))
            self.steps[i] = step._replace(gone=gone)

    def _add(self, function: Function, *places: int) -> int:
        self.steps.append(Step(function, places))
        return len(self.steps)

    def _arranged(self, node: Node, wanted: Layout) -> int:
        """The place of a node's value in this layout."""
        place, value = self.place_of(node)
        if value.layout == wanted:
            return place
        arrange = _arrangement(value, wanted, self.x)
        return self._add(lambda block, x, t: arrange(t, x), place)

    def place_of(self, node: Node) -> tuple[int, Value]:
        if node not in self.places:
            self.places[node] = self._write(node)
        return self.places[node]

    def _write(self, node: Node) -> tuple[int, Value]:
        call = self.calls.get(node)
        if call is not None:  # the outermost with this result
            return self._call(call)
        attention = self.criss_cross.get(node) or _attention(node, self.x)
        if attention is not None and attention.ratio == 1:
            return self._attend(node, attention)
        if node.op == "poly":
            return self._sum(node), plain(node)
        if node.op == "leaf":
            path = split_path(node.name)
            return self._add(lambda block, x: parameter_at(block, path).squeeze()), plain(node)  # type: ignore[union-attr]
        if node.op == "act" and node.attrs[0] in FUNCTIONS:
            function = FUNCTIONS[node.attrs[0]]
            place, value = self.place_of(node.inputs[0])
            return self._add(lambda block, x, t: function(t), place), Value(node, value.layout)
        if node.op in ("slice", "select", "unflatten", "flatten", "mean", "concat"):
            return getattr(self, f"_{node.op}")(node)
        if node.op == "opaque" and node.attrs[0] in _RESIZED:
            return self._resized(node, **_RESIZED[node.attrs[0]])
        pool = _POOLS.get(node.attrs[0]) if node.op == "opaque" else None
        if pool is not None:
            return self._pool(node, pool)
        if node.op == "product":
            return self._product(node)
        if node.op == "softmax":
            rest = [(a,) for a in range(len(node.sizes)) if a not in node.attrs]
            layout = (*rest, node.attrs)
            place = self._arranged(node.inputs[0], layout)
            return self._add(lambda block, x, t: t.softmax(-1), place), Value(node, layout)
        what = node.attrs[0].split(".")[1] if node.op == "opaque" and "." in node.attrs[0] else node.op
        raise Elsewhere(f"its attention stands beside something that is not written down anew: {what.strip('_')}")

    def _call(self, call: Call) -> tuple[int, Value]:
        place = self._arranged(call.input.node, call.input.layout)
        self.paths.append(call.path)
        path = call.path
        times = sum(c.path == path and c.output.node is call.output.node for c in self.captured.calls)

        def run(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
            layer = layer_at(block, path)
            for _ in range(times - 1 if layer.training else 0):  # it may count its calls
                layer(t)
            return layer(t)

        return self._add(run, place), call.output

    def _attend(self, node: Node, attention: Attention) -> tuple[int, Value]:
        places = [self._arranged(n, layout) for n, layout in attention.inputs]
        place = self._add(attention.function, *places)
        if attention.name not in self.names:
            self.names.append(attention.name)
            self.functions += attention.functions
        if attention.layer is not None:
            self.read.append(attention.layer)
        if attention.name == "GlobalContext":  # the rest goes on from the map that it returns: see the function
            ((source, layout),) = attention.inputs
            if self.places[source][1].layout == layout:
                self.places[source] = self._add(lambda block, x, both: both[0], place), self.places[source][1]
            place = self._add(lambda block, x, both: both[1], place)
        return place, Value(node, attention.output)

    def _product(self, node: Node) -> tuple[int, Value]:
        """One that is no attention between positions, as those of an attention between channels."""
        (left, (samples, rows, summed)), (right, of_right) = zip(node.inputs, node.attrs, strict=True)
        places = self._arranged(left, (samples, rows, summed)), self._arranged(right, (of_right[0], *of_right[:0:-1]))
        axes = iter(range(len(node.sizes)))
        layout = tuple(tuple(itertools.islice(axes, len(entry))) for entry in (samples, rows, of_right[1]))
        return self._add(lambda block, x, a, b: a @ b, *places), Value(node, layout)

    def _slice(self, node: Node) -> tuple[int, Value]:
        place = self._arranged(node.inputs[0], plain(node.inputs[0]).layout)
        axis, *part = node.attrs
        if len(part) == 2:
            i, count = part
            return self._add(lambda block, x, t: t.chunk(count, axis)[i], place), plain(node)
        start, length, _ = part
        return self._add(lambda block, x, t: t.narrow(axis, start, length), place), plain(node)

    def _select(self, node: Node) -> tuple[int, Value]:
        place = self._arranged(node.inputs[0], plain(node.inputs[0]).layout)
        axis, index = node.attrs
        return self._add(lambda block, x, t: t.select(axis, index), place), plain(node)

    def _concat(self, node: Node) -> tuple[int, Value]:
        axis, *orders = node.attrs
        places = []
        for piece, order in zip(node.inputs, orders, strict=True):
            if {*order, axis} != set(range(len(node.sizes))):
                raise Elsewhere("it puts together what is expanded and what is not")
            layout = tuple((order.index(a),) if a in order else () for a in range(len(node.sizes)))
            places.append(self._arranged(piece, layout))
        return self._add(lambda block, x, *pieces: torch.cat(pieces, axis), *places), plain(node)

    def _resized(self, node: Node, mode: str) -> tuple[int, Value]:
        """Interpolated to the size of the block's map."""
        _, layout, size, *rest = node.attrs
        corners, rest = (rest[0], rest[1:]) if mode == "bilinear" else (None, rest)
        if tuple(size or ()) != self.x.sizes[2:] or any(r not in (None, ()) for r in rest):
            raise Elsewhere("it is resized to another size than the map's")
        place = self._arranged(node.inputs[0], layout)

        def resize(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
            return F.interpolate(t, x.shape[2:], mode=mode, align_corners=corners)

        return self._add(resize, place), Value(node, tuple(() if e == () else (i,) for i, e in _numbered(layout)))

    def _unflatten(self, node: Node) -> tuple[int, Value]:
        place = self._arranged(node.inputs[0], plain(node.inputs[0]).layout)
        (axis,) = node.attrs
        sizes = [_size(n, self.x) for n in node.sizes[axis : axis + 2]]

        def split(block: nn.Module, x: Tensor, t: Tensor) -> Tensor:
            return t.unflatten(axis, [x.shape[n] if is_map else n for is_map, n in sizes])

        return self._add(split, place), plain(node)

    def _flatten(self, node: Node) -> tuple[int, Value]:
        first, *rest = node.attrs
        axes = [a for a in range(len(node.inputs[0].sizes)) if a not in rest]
        layout = tuple((first, *rest) if a == first else (a,) for a in axes)
        return self._arranged(node.inputs[0], layout), plain(node)

    def _mean(self, node: Node) -> tuple[int, Value]:
        place = self._arranged(node.inputs[0], plain(node.inputs[0]).layout)
        (axes,) = node.attrs
        if axes == tuple(range(2, len(node.inputs[0].sizes))):
            return self._add(lambda block, x, t: functional.squeeze(t), place), plain(node)
        return self._add(lambda block, x, t: t.mean(axes), place), plain(node)

    def _pool(self, node: Node, pool: Any) -> tuple[int, Value]:
        _, layout, *arguments, keywords = node.attrs
        (source,) = node.inputs
        if keywords or len([n for e in layout for n in e]) != len(node.sizes):
            raise Elsewhere("it pools a map to one position")
        place = self._arranged(source, layout)
        # Of its axes in the order of the dimensions.
        value = Value(node, tuple(() if e == () else (i,) for i, e in _numbered(layout)))
        return self._add(lambda block, x, t: pool(t, *arguments), place), value

    # Sums of products

    def _sum(self, node: Node) -> int:
        axes = range(len(node.sizes))
        terms = self._with_sums(self._with_criss_cross(node.terms))
        parts: list[tuple[float, list[int], bool]] = []
        for coefficient, factors in terms:
            attentions = [(n, a) for n, _ in factors if n not in self.calls and (a := _attention(n, self.x))]
            for n, attention in attentions:
                coefficient *= 1 / attention.ratio
                if n not in self.places:
                    self.places[n] = self._attend(n, attention)
            places = []
            for n, at in factors:
                if n.op == "leaf" and not n.sizes:
                    path = split_path(n.name)
                    places.append(self._add(functools.partial(_number, path=path, rank=len(axes))))
                else:
                    wanted = tuple((at.index(a),) if a in at else () for a in axes)
                    places.append(self._arranged(n, wanted))
            whole = len(factors) == 1 and len(factors[0][1]) == len(axes)
            parts.append((_exact(coefficient), places, whole))
        parts.sort(key=lambda part: not part[2])
        counts = [(c, len(places)) for c, places, _ in parts]
        return self._add(functools.partial(_added, counts), *(p for _, places, _ in parts for p in places))

    def _with_criss_cross(self, terms: Terms) -> Terms:
        for node, attention, others in criss_crosses(self.captured.graph, terms):
            self.criss_cross[node] = attention
            return self._with_criss_cross(others)
        return terms

    def _with_sums(self, terms: Terms) -> Terms:
        """With the results of layers, such as a convolution with its bias, in place of what these are sums of."""
        for node in self.sums:
            for term, factor in ((t, f) for t in terms for f in t[1]):
                found = _regrouped(terms, term, factor, node)
                if found is not None:
                    return self._with_sums(found)
        return terms


def _numbered(layout: Layout) -> Iterator[tuple[int, Entry]]:
    """Entries, each with the number of those before it that hold an axis."""
    count = 0
    for e in layout:
        yield count, e
        count += e != ()


def _sorted(factors: list[tuple[Node, Axes]]) -> list[tuple[int, Axes]]:
    return sorted((id(n), axes) for n, axes in factors)


def _regrouped(terms: Terms, term: Any, factor: tuple[Node, Axes], node: Node) -> Terms | None:
    """A sum in which, by this factor of this term, all terms of another sum are; with that in their place."""
    (c, factors), (n, axes) = term, factor
    rest = [f for f in factors if f is not factor]
    for d, inner in node.terms:
        if len(inner) != 1 or inner[0][0] is not n or len(inner[0][1]) != len(node.sizes):
            continue
        place = dict(zip(inner[0][1], axes, strict=True))
        ratio = c / d
        wanted = {}
        for e, f in node.terms:
            moved = [(m, tuple(place[a] for a in at)) for m, at in f]
            wanted[tuple(_sorted([*rest, *moved]))] = ratio * e
        left: Terms = []
        for e, f in terms:
            number = wanted.get(tuple(_sorted(f)))
            if number is not None and math.isclose(number, e, rel_tol=1e-6):
                del wanted[tuple(_sorted(f))]
            else:
                left.append((e, f))
        if not wanted:
            return [*left, (ratio, [*rest, (node, tuple(place[a] for a in range(len(node.sizes))))])]
    return None


def _number(block: nn.Module, x: Tensor, path: Any, rank: int) -> Tensor:
    """A parameter of one number, which counts in a result's dtype unless it has no dimension."""
    number: Any = parameter_at(block, path)  # checked before the first step
    return number if number.dim() == 0 else number.reshape((1,) * rank)


def _added(counts: list[tuple[float, int]], block: nn.Module, x: Tensor, *values: Tensor) -> Tensor:
    """The sum of products of values, of each of which the coefficient is given and how many factors it has."""
    total: Any = None
    rest = list(values)
    for coefficient, count in counts:
        factors, rest = rest[:count], rest[count:]
        if not factors:
            total = coefficient if total is None else total + coefficient
        elif count == 2 and isinstance(total, Tensor):
            total = torch.addcmul(total, *factors, value=coefficient)
        else:
            product = factors[0]
            for t in factors[1:]:
                product = product * t
            product = product if coefficient == 1 else product * coefficient
            total = product if total is None else total + product
    return total


_RESIZED = {
    "aten.upsample_bilinear2d.vec": {"mode": "bilinear"},
    "aten.upsample_bilinear2d.default": {"mode": "bilinear"},
    "aten.upsample_nearest2d.vec": {"mode": "nearest"},
    "aten.upsample_nearest2d.default": {"mode": "nearest"},
}

_POOLS: dict[Any, Callable[..., Tensor]] = {
    "aten.max_pool2d_with_indices.default": F.max_pool2d,
    "aten.max_pool3d_with_indices.default": F.max_pool3d,
    "aten.avg_pool2d.default": F.avg_pool2d,
    "aten.avg_pool3d.default": F.avg_pool3d,
}


# The recipe


class _Attending:
    """What the fused block runs. in_place: its result has the map's dtype, as that of a sum written into a copy of the
    map, whatever is added. even: it takes no other maps."""

    def __init__(self, steps: list[Step], in_place: bool, even: bool) -> None:
        self.steps, self.in_place, self.even = steps, in_place, even
        functions = [f for f, *_ in steps if isinstance(f, functools.partial) and f.func is _number]
        self.numbers = [f.keywords["path"] for f in functions]

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.even and any(n % 2 for n in x.shape[2:]):
            raise Unsuited(f"x: expected even sizes; got shape {tuple(x.shape)}")
        for path in self.numbers:  # before a layer has run
            number_at(block, path)
        values: list[Any] = [x]
        for function, places, gone in self.steps:
            given = [values[i] for i in places]
            for i in gone:
                values[i] = None
            values.append(function(block, x, *given))
            del given
        if self.in_place:
            values[-1] = values[-1].to(x.dtype)
        return values[-1]


def _maker(writer: _Writer, rank: int, in_place: bool, even: bool) -> Callable[[nn.Module], Recipe | str]:
    def make(block: nn.Module) -> Recipe | str:
        for path in writer.read:
            layer = block.get_submodule(path)
            if type(layer) not in CONVOLUTIONS and type(layer) is not nn.Linear or not is_dense(layer):
                return f"{path} is a {type(layer).__name__}, not a plain layer"
        bypassed = paths_but(block, *writer.paths)
        return OwnLayers(
            _Attending(writer.steps, in_place, even),
            " and ".join(writer.names),
            tuple(dict.fromkeys(writer.functions)),
            rank=rank + 2,
            bypassed=bypassed,
            covers=bypassed,
        )

    return make
