"""The canonical form of a computation: what is left when every way of writing it down is taken away.

A `Node` is a value without axes of size one and without views; equal nodes of one `Graph` are the same object.
A `Value` is a tensor as the code has it: a node, and for each dimension of the tensor the axes of the node that lie
in it (none: size one; several: flattened together; `Spread`: expanded).

- Sums, products and constants are one node, `poly`: a sum of products of other nodes, each with the places of its
  axes among the result's. So the order of operands, broadcasting, `x * (1 + g)` and `x + x * g` make no difference.
- Linear layers and 1x1 convolutions are `dense`; their biases are terms of a `poly`.
- All means over the whole of some axes are `mean`, all maxima `max` with their rule for ties.
- Matrix products of two values are `product`, whichever of them comes first.
- What is on the diagonal of a square matrix alone is `diagonal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MAX_TERMS = 24
#: Nodes whose attrs behind the first may be sizes of the map.
SIZED = ("slice", "opaque", "unflatten")
MAX_PARTS = 8


class Unsupported(Exception):
    """This operation has no canonical form here; it becomes a node that equals nothing else."""


class Node:
    """One value. attrs are compared, options are not: they are what a match reads off."""

    __slots__ = ("attrs", "inputs", "name", "op", "options", "rank_key", "sizes")

    def __init__(self, op: str, inputs: tuple[Node, ...], attrs: tuple, options: tuple, sizes: tuple[int, ...]) -> None:
        self.op, self.inputs, self.attrs, self.options, self.sizes = op, inputs, attrs, options, sizes
        self.name = ""
        #: Names and sizes left out: the same for the nodes of two graphs that may match.
        told = () if op == "leaf" else attrs[:1] if op in SIZED else attrs
        self.rank_key: int = hash((op, told, tuple(n.rank_key for n in inputs), len(sizes)))

    def __repr__(self) -> str:
        if self.op in ("leaf", "input"):
            return f"{self.name or self.op}{list(self.sizes)}"
        if self.op == "poly":
            terms = (
                " * ".join([f"{coefficient:.4g}", *(f"{node!r}@{list(axes)}" for node, axes in factors)])
                for coefficient, factors in self.terms
            )
            return f"({' + '.join(terms)})"
        return f"{self.op}{list(self.attrs)}({', '.join(map(repr, self.inputs))})"

    @property
    def terms(self) -> list[tuple[float, list[tuple[Node, tuple[int, ...]]]]]:
        """Of a `poly`: (coefficient, [(factor, its axes among this node's)])."""
        return [(c, [(self.inputs[i], axes) for i, axes in factors]) for c, factors in self.attrs]


@dataclass(frozen=True)
class Spread:
    """A dimension of this size that holds no axis: the same value all along."""

    size: int


Entry = tuple[int, ...] | Spread


@dataclass(frozen=True)
class Value:
    node: Node
    layout: tuple[Entry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(e.size if isinstance(e, Spread) else math.prod(self.node.sizes[a] for a in e) for e in self.layout)


Factor = tuple[Node, tuple[int, ...]]
Term = tuple[float, tuple[Factor, ...]]


def plain(node: Node) -> Value:
    return Value(node, tuple((i,) for i in range(len(node.sizes))))


def axis_of(entry: Entry) -> int:
    """The one axis of a dimension that has exactly one."""
    if isinstance(entry, Spread) or len(entry) != 1:
        raise Unsupported
    return entry[0]


def axis_or_none(entry: Entry) -> int | None:
    return None if entry == () else axis_of(entry)


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")


class Graph:
    def __init__(self) -> None:
        self._nodes: dict[tuple, Node] = {}
        self._count = 0

    def node(
        self, op: str, inputs: Sequence[Node] = (), attrs: tuple = (), sizes: Sequence[int] = (), options: tuple = ()
    ) -> Node:
        key = (op, tuple(id(n) for n in inputs), attrs, options, tuple(sizes))
        if key not in self._nodes:
            self._nodes[key] = Node(op, tuple(inputs), attrs, options, tuple(sizes))
        return self._nodes[key]

    def nodes(self) -> list[Node]:
        """In the order in which they were first computed."""
        return list(self._nodes.values())

    @property
    def size(self) -> int:
        return len(self._nodes)

    def leaf(self, op: str, name: str, shape: Sequence[int]) -> Value:
        """An input of the computation, a parameter or a buffer."""
        self._count += 1
        sizes = tuple(n for n in shape if n != 1)
        node = self.node(op, attrs=(name,), sizes=sizes)
        node.name = name
        return of_shape(node, shape)

    # Sums of products

    def poly(self, terms: Iterable[Term], sizes: Sequence[int]) -> tuple[Node, tuple[int, ...]]:
        """A sum of products over axes of these sizes, as a node, and for each of its axes which one it is."""
        sums: dict[tuple, tuple[float, tuple[Factor, ...]]] = {}
        for coefficient, factors in _expanded(terms):
            ordered = tuple(sorted(factors, key=lambda f: (f[0].rank_key, f[1], id(f[0]))))
            key = tuple((id(node), axes) for node, axes in ordered)
            sums[key] = (sums[key][0] + coefficient if key in sums else coefficient, ordered)
        kept = [(_rounded(c), factors) for c, factors in sums.values() if abs(c) > 1e-12]
        if len(kept) > MAX_TERMS:
            raise Unsupported
        every = [f for _, factors in kept for f in factors]
        if {a for _, axes in every for a in axes} != set(range(len(sizes))):
            raise Unsupported  # an axis along which nothing varies any more
        order: list[int] = []
        if every:

            def rank(factor: Factor) -> tuple:
                node, axes = factor
                # In the order of the dimensions where any factor has all of them so.
                return len(axes), node.op == "input", axes == tuple(sorted(axes)), node.rank_key

            widest = max(every, key=rank)
            order = [*widest[1], *(a for a in range(len(sizes)) if a not in widest[1])]
        if len(kept) == 1 and kept[0][0] == 1 and len(kept[0][1]) == 1 and len(order) == len(kept[0][1][0][1]):
            return kept[0][1][0][0], tuple(order)
        place = {axis: i for i, axis in enumerate(order)}
        moved = [(c, tuple((n, tuple(place[a] for a in axes)) for n, axes in factors)) for c, factors in kept]
        atoms = sorted({n for _, factors in moved for n, _ in factors}, key=lambda n: (n.rank_key, id(n)))
        number = {n: i for i, n in enumerate(atoms)}
        attrs = sorted((c, tuple(sorted((number[n], axes) for n, axes in factors))) for c, factors in moved)
        return self.node("poly", atoms, tuple(attrs), [sizes[a] for a in order]), tuple(order)

    def _combine(self, values: Sequence[Value], terms: Callable[[list[list[Term]]], list[Term]]) -> Value:
        values = self._flattened(values)
        layout, places, sizes = align(values)
        parts = [_terms(v.node, place) for v, place in zip(values, places, strict=True)]
        node, order = self.poly(terms(parts), sizes)
        back = {axis: i for i, axis in enumerate(order)}
        return Value(node, tuple(e if isinstance(e, Spread) else tuple(back[a] for a in e) for e in layout))

    def _flattened(self, values: Sequence[Value]) -> list[Value]:
        """Where others have one axis in a dimension, several that lie flattened in it are made one."""
        found = list(values)
        for d in range(1, max(len(v.layout) for v in values) + 1):
            entries = [v.layout[-d] if d <= len(v.layout) else () for v in found]
            axes = {len(e) for e in entries if not isinstance(e, Spread)}
            if 1 in axes and max(axes) > 1:
                found = [
                    self._flatten(v, len(v.layout) - d) if not isinstance(e, Spread) and len(e) > 1 else v
                    for v, e in zip(found, entries, strict=True)
                ]
        return found

    def _flatten(self, value: Value, dim: int) -> Value:
        first, *rest = (a for a in value.layout[dim])  # type: ignore[union-attr]
        sizes = [n for a, n in enumerate(value.node.sizes) if a not in rest]
        at = first - sum(a < first for a in rest)
        sizes[at] = value.shape[dim]
        node = self.node("flatten", [value.node], (first, *rest), sizes)
        layout = list(mapped(value.layout, lambda a: a - sum(b < a for b in rest)))
        layout[dim] = (at,)
        return Value(node, tuple(layout))

    def add(self, values: Sequence[Value], factors: Sequence[float]) -> Value:
        return self._combine(
            values, lambda parts: [(f * c, t) for f, part in zip(factors, parts, strict=True) for c, t in part]
        )

    def affine(self, value: Value, factor: float, constant: float = 0.0) -> Value:
        return self._combine([value], lambda parts: [*((factor * c, t) for c, t in parts[0]), (constant, ())])

    def multiply(self, a: Value, b: Value) -> Value:
        for x, gate in ((a, b), (b, a)):
            found = self._self_gated(x, gate)
            if found is not None:
                return found
        return self._combine([a, b], _product)

    def _self_gated(self, x: Value, gate: Value) -> Value | None:
        """x * sigmoid(x) and x * hard_sigmoid(x) have names of their own."""
        node, factor = gate.node, 1.0
        if node.op == "poly" and len(node.attrs) == 1 and len(node.attrs[0][1]) == 1 and len(node.inputs) == 1:
            ((factor, ((_, axes),)),) = node.attrs
            if axes != tuple(range(len(axes))):
                return None
            node = node.inputs[0]
        names = {"sigmoid": "silu", "hard_sigmoid": "hard_swish"}
        if node.op != "act" or node.inputs[0] is not x.node or node.attrs[0] not in names or gate.layout != x.layout:
            return None
        return self.affine(Value(self.node("act", [x.node], (names[node.attrs[0]],), x.node.sizes), x.layout), factor)

    def constant(self, number: float, shape: Sequence[int]) -> Value:
        """A tensor of one number."""
        node, _ = self.poly([(number, ())], ())
        return Value(node, tuple(() if n == 1 else Spread(n) for n in shape))

    def diagonal(self, number: float, size: int) -> Value:
        """A matrix with this number on its diagonal, which may be infinite, and zeros beside it."""
        infinite = math.isinf(number)
        value = plain(self.node("diagonal", (), (math.inf if infinite else 1.0,), (size, size)))
        return self.affine(value, math.copysign(1.0, number) if infinite else number)

    def act(self, name: str, value: Value) -> Value:
        node = value.node
        if name == "relu6" and node.op == "poly":
            rest = [(c, f) for c, f in node.terms if f]
            if [c for c, f in node.terms if not f] == [3.0] and rest:
                inner, order = self.poly([(c, tuple(f)) for c, f in rest], node.sizes)
                back = {axis: i for i, axis in enumerate(order)}
                layout = tuple(e if isinstance(e, Spread) else tuple(back[a] for a in e) for e in value.layout)
                return self.affine(Value(self.node("act", [inner], ("hard_sigmoid",), inner.sizes), layout), 6.0)
        return Value(self.node("act", [node], (name,), node.sizes), value.layout)

    def product(self, a: Value, b: Value) -> Value:
        """Matrix products, (B, n, k) and (B, k, m)."""
        (factor, a), (other, b) = self._factored(a), self._factored(b)
        if factor * other != 1:
            return self.affine(self.product(a, b), factor * other)
        sides = [(a.node, a.layout), (b.node, (b.layout[0], b.layout[2], b.layout[1]))]
        # By what they are, or are parts of, first: keys also tell two scales, and two sizes, apart; a match does not.
        first, second = ((_whole(v.node).op, v.node.op, v.node.rank_key) for v in (a, b))
        swapped = first > second
        (left, of_left), (right, of_right) = sides[::-1] if swapped else sides
        if any(isinstance(e, Spread) for e in (*of_left, *of_right)):
            raise Unsupported

        def sizes(node: Node, entry: Entry) -> list[int]:
            return [node.sizes[axis] for axis in entry]  # type: ignore[union-attr]

        for i, dim in ((0, 0), (2, 1)):
            if sizes(left, of_left[i]) != sizes(right, of_right[i]):
                if 1 not in (len(of_left[i]), len(of_right[i])):  # type: ignore[arg-type]
                    raise Unsupported  # flattened from other axes
                # One is flattened already, as it lies in its node.
                a, b = (self._flat(v, d) for v, d in ((a, dim and 2), (b, dim)))
                return self.product(a, b)
        # The order in which the code has axes flattened, of samples and of what is summed over, makes no difference.
        samples, summed = (sorted(range(len(of_left[i])), key=of_left[i].__getitem__) for i in (0, 2))  # type: ignore[arg-type,index]
        of_left, of_right = (
            (tuple(e[0][j] for j in samples), e[1], tuple(e[2][j] for j in summed))  # type: ignore[index]
            for e in (of_left, of_right)
        )
        parts = sizes(left, of_left[0]), sizes(left, of_left[1]), sizes(right, of_right[1])
        node = self.node("product", [left, right], (of_left, of_right), [n for part in parts for n in part])
        ends = [len(parts[0]), len(parts[0]) + len(parts[1]), len(node.sizes)]
        batch, rows, columns = (tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False))
        batch = tuple(samples.index(j) for j in range(len(samples)))
        return Value(node, (batch, columns, rows) if swapped else (batch, rows, columns))

    def _flat(self, value: Value, dim: int) -> Value:
        """With one axis at most in this dimension."""
        entry = value.layout[dim]
        return value if isinstance(entry, Spread) or len(entry) < 2 else self._flatten(value, dim)

    def _factored(self, value: Value) -> tuple[float, Value]:
        """What one product is multiplied by, and the rest."""
        node = value.node
        if node.op != "poly" or len(node.attrs) != 1 or node.attrs[0][0] == 1:
            return 1.0, value
        ((factor, factors),) = node.terms
        inner, order = self.poly([(1.0, tuple(factors))], node.sizes)
        return factor, Value(inner, mapped(value.layout, order.index))

    def softmax(self, value: Value, dim: int) -> Value:
        """What is added to its argument and does not vary along the dimension makes no difference to it."""
        node, layout = value.node, value.layout
        along = layout[dim]
        if isinstance(along, Spread) or not along:
            raise Unsupported
        terms = node.terms if node.op == "poly" else []
        kept = [(c, tuple(f)) for c, f in terms if any(axis in along for _, places in f for axis in places)]
        if 0 < len(kept) < len(terms):
            node, order = self.poly(kept, node.sizes)
            layout = mapped(layout, order.index)
        return Value(self.node("softmax", [node], layout[dim], node.sizes), layout)  # type: ignore[arg-type]

    # Reductions

    def reduce(self, op: str, value: Value, dims: Sequence[int], keepdim: bool, ties: str = "") -> Value:
        """op "mean", "sum" or "max" over whole dimensions of the tensor."""
        dims = sorted(d % len(value.layout) for d in dims) if len(value.layout) else []
        axes: list[int] = []
        factor = 1.0
        for d in dims:
            entry = value.layout[d]
            if isinstance(entry, Spread):
                factor *= entry.size if op == "sum" else 1
            else:
                axes += entry
        kept = tuple(() if i in dims else e for i, e in enumerate(value.layout) if keepdim or i not in dims)
        node = value.node
        if op == "sum":
            spelled = self._sum_of_stack(node, axes)
            if spelled is not None:
                return self.affine(_without(spelled, kept, axes), factor)
            factor *= math.prod(node.sizes[a] for a in axes)
            op = "mean"
        if not axes:
            return self.affine(Value(node, kept), factor)
        if op == "mean":
            spelled = self._sum_of_stack(node, axes)
            if spelled is not None:
                return self.affine(_without(spelled, kept, axes), factor / node.sizes[axes[0]])
            if node.op == "poly" and len(node.attrs) == 1 and node.attrs[0][0] != 1:
                factor *= node.attrs[0][0]
                inner, order = self.poly([(1.0, f) for _, f in _terms(node, range(len(node.sizes)))], node.sizes)
                node, axes = inner, [order.index(a) for a in axes]
                kept = tuple(e if isinstance(e, Spread) else tuple(order.index(a) for a in e) for e in kept)
        result = self._reduce_axes(op, node, tuple(axes), ties)
        left = [a for a in range(len(node.sizes)) if a not in axes]
        layout = tuple(e if isinstance(e, Spread) else tuple(left.index(a) for a in e) for e in kept)
        return self.affine(Value(result, layout), factor)

    def _reduce_axes(self, op: str, node: Node, axes: tuple[int, ...], ties: str) -> Node:
        before: tuple[int, ...] = ()
        if node.op == op and op in ("mean", "max"):
            gone = node.attrs[0]
            source = node.inputs[0]
            left = [a for a in range(len(source.sizes)) if a not in gone]
            outer = tuple(left[a] for a in axes)
            # Among equal maxima the first along `outer`, then the first along the rest: that of a scan in this order.
            if op == "mean" or (ties == node.attrs[1] == "first"):
                node, before, axes = source, gone, outer
        all_axes = axes + before
        if op == "mean":
            all_axes = tuple(sorted(all_axes))
        sizes = [n for a, n in enumerate(node.sizes) if a not in all_axes]
        if ties == "even":
            all_axes = tuple(sorted(all_axes))
        return self.node(op, [node], (all_axes, ties) if op == "max" else (all_axes,), sizes)

    def _sum_of_stack(self, node: Node, axes: list[int]) -> Value | None:
        """The sum over a stack or over equal parts of an axis, or over the product of such with other values, spelled
        out; with the axes of the node that are left, in their order."""
        if len(axes) != 1:
            return None
        (axis,) = axes
        terms = _terms(node, range(len(node.sizes)))
        if not any(_is_branching(n, places.index(axis)) for _, f in terms for n, places in f if axis in places):
            return None
        left = [a for a in range(len(node.sizes)) if a != axis]
        spelled: list[Term] = []
        for c, factors in terms:
            if not any(axis in places for _, places in factors):
                return None
            for i in range(node.sizes[axis]):
                chosen = []
                for n, places in factors:
                    if axis not in places:
                        chosen.append((n, tuple(left.index(a) for a in places)))
                        continue
                    at = places.index(axis)
                    rest = [a for a in places if a != axis]
                    piece = self.select(plain(n), at, i)
                    # The layout of the piece: its axes, by the dimensions that `rest` names.
                    place = {entry[0]: left.index(a) for entry, a in zip(piece.layout, rest, strict=True) if entry}  # type: ignore[index]
                    chosen.append((piece.node, tuple(place[k] for k in range(len(piece.node.sizes)))))
                spelled.append((c, tuple(chosen)))
        result, order = self.poly(spelled, [node.sizes[a] for a in left])
        return Value(result, tuple((order.index(i),) for i in range(len(left))))

    # Pieces

    def pieces(self, value: Value, dim: int) -> list[Value]:
        """What is one behind the other in this dimension, where that is written down: of a stack, a concatenation."""
        entry, node = value.layout[dim], value.node
        if isinstance(entry, Spread) or len(entry) != 1:
            return [value]
        if node.op == "stack" and entry[0] == len(node.sizes) - 1:
            return [self.slice(value, dim, i, 1) for i in range(len(node.inputs))]
        if node.op != "concat" or entry[0] != node.attrs[0]:
            return [value]
        orders = node.attrs[1:]
        return [
            Value(piece, mapped(value.layout, lambda a, order=order: order.index(a)))  # type: ignore[misc]
            for piece, order in zip(node.inputs, orders, strict=True)
        ]

    def stack(self, values: Sequence[Value], dim: int) -> Value:
        """Values whose dimension `dim` has size one, one behind the other along it."""
        layout, places, sizes = align([Value(v.node, (*v.layout[:dim], (), *v.layout[dim + 1 :])) for v in values])
        if any(isinstance(e, Spread) for e in layout) or any(len(p) != len(sizes) for p in places):
            raise Unsupported
        if len(values) == 1:
            return values[0]
        order = places[0]
        maps = tuple(tuple(order.index(a) for a in p) for p in places)
        node = self.node("stack", [v.node for v in values], maps, [*(sizes[a] for a in order), len(values)])
        inside = tuple(tuple(order.index(a) for a in e) for e in layout)  # type: ignore[union-attr]
        return Value(node, (*inside[:dim], (len(sizes),), *inside[dim + 1 :]))

    def concatenate(self, values: Sequence[Value], dim: int) -> Value:
        values = [self._flat(v, dim) for v in values]
        axes = [axis_or_none(v.layout[dim]) for v in values]  # None: one of size one
        layout, places, sizes = align([Value(v.node, (*v.layout[:dim], (), *v.layout[dim + 1 :])) for v in values])
        if any(isinstance(e, Spread) for e in layout):
            raise Unsupported
        new = len(sizes)
        places = [tuple(new if i == axis else a for i, a in enumerate(p)) for p, axis in zip(places, axes, strict=True)]
        if any(len(set(p)) != len(p) or -1 in p for p in places):
            raise Unsupported
        # One that is the same all along an axis, as it was expanded, does not have it.
        order = next((p for p in places if len(p) == new + 1), tuple(range(new + 1)))
        maps = tuple(tuple(order.index(a) for a in p) for p in places)
        total = sum(v.shape[dim] for v in values)
        node = self.node(
            "concat",
            [v.node for v in values],
            (order.index(new), *maps),
            [total if a == new else sizes[a] for a in order],
        )
        inside = tuple(tuple(order.index(a) for a in e) for e in layout)  # type: ignore[union-attr]
        return Value(node, (*inside[:dim], (order.index(new),), *inside[dim + 1 :]))

    def select(self, value: Value, dim: int, index: int) -> Value:
        entry, rest = value.layout[dim], (*value.layout[:dim], *value.layout[dim + 1 :])
        if isinstance(entry, Spread) or entry == ():
            return Value(value.node, rest)
        axis, node = axis_of(entry), value.node
        index %= node.sizes[axis]
        if node.op == "stack" and axis == len(node.sizes) - 1:
            order = node.attrs[index]
            return Value(node.inputs[index], mapped(rest, lambda a: order.index(a)))
        if node.op == "unflatten" and axis == node.attrs[0]:  # one of equal parts of the axis that was split
            length = node.sizes[axis + 1]
            part = self.slice(plain(node.inputs[0]), axis, index * length, length)
            return Value(part.node, mapped(rest, lambda a: axis_of(part.layout[a - (a > axis)])))
        if node.op == "flatten":
            inner = [a for a in range(len(node.inputs[0].sizes)) if a not in node.attrs[1:]]
            if inner[axis] != node.attrs[0]:
                return self._select_inside(node, rest, inner, axis, index)
        sizes = [n for a, n in enumerate(node.sizes) if a != axis]
        chosen = self.node("select", [node], (axis, index), sizes)
        return Value(chosen, mapped(rest, lambda a: a - (a > axis)))

    def _select_inside(self, node: Node, rest: tuple[Entry, ...], inner: list[int], axis: int, index: int) -> Value:
        """Of flattened axes, what was chosen before they were flattened. inner: the axes as they were before."""
        part = self.select(plain(node.inputs[0]), inner[axis], index)

        def after(a: int) -> int:
            return axis_of(part.layout[a - (a > inner[axis])])

        joined = tuple(after(a) for a in node.attrs)
        entries = tuple(
            e
            if isinstance(e, Spread)
            else tuple(b for a in e for b in (joined if inner[a] == node.attrs[0] else (after(inner[a]),)))
            for e in rest
        )
        (dim,) = (d for d, e in enumerate(entries) if not isinstance(e, Spread) and joined[0] in e)
        return self._flatten(Value(part.node, entries), dim)

    def slice(self, value: Value, dim: int, start: int, length: int) -> Value:
        if length == value.shape[dim]:
            return value
        entry, node = value.layout[dim], value.node
        if isinstance(entry, Spread):
            new: Entry = Spread(length) if length != 1 else ()
            return Value(node, (*value.layout[:dim], new, *value.layout[dim + 1 :]))
        if length == 1:
            chosen = self.select(value, dim, start)
            return Value(chosen.node, (*chosen.layout[:dim], (), *chosen.layout[dim:]))
        if len(entry) > 1 and start % length == 0 and length == math.prod(node.sizes[a] for a in entry[1:]):
            split = Value(node, (*value.layout[:dim], entry[:1], entry[1:], *value.layout[dim + 1 :]))
            return self.select(split, dim, start // length)
        axis = axis_of(entry)
        if node.op == "stack" and axis == len(node.sizes) - 1:
            return self.stack([self.slice(value, dim, start + i, 1) for i in range(length)], dim)
        if node.op == "concat" and axis == node.attrs[0]:
            at = 0
            for i, piece in enumerate(node.inputs):
                order = node.attrs[1 + i]
                size = piece.sizes[order.index(axis)]
                if (at, size) == (start, length):
                    return Value(piece, mapped(value.layout, lambda a, order=order: order.index(a)))  # type: ignore[misc]
                at += size
        whole = node.sizes[axis]
        sizes = [length if a == axis else n for a, n in enumerate(node.sizes)]
        # Which of equal parts, or which of several: the sizes themselves are the map's.
        part = (start // length, whole // length) if whole % length == start % length == 0 else (start, length, whole)
        return Value(self.node("slice", [node], (axis, *part), sizes), value.layout)

    # Views

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        items: list[tuple[int, Entry]] = []
        for entry in value.layout:
            if isinstance(entry, Spread):
                items.append((entry.size, entry))
            else:
                items += [(value.node.sizes[a], (a,)) for a in entry]
        layout: list[Entry] = []
        at = 0
        for size in shape:
            group: list[Entry] = []
            product = 1
            while product < size:
                if at == len(items):
                    raise Unsupported
                n, item = items[at]
                if product * n > size:
                    return self.reshape(self._split(value, item, size, product, n), shape)
                product, at = product * n, at + 1
                group.append(item)
            if product != size:
                raise Unsupported
            if any(isinstance(e, Spread) for e in group):
                if len(group) != 1:
                    raise Unsupported
                layout.append(group[0])
            else:
                layout.append(tuple(a for e in group for a in e))  # type: ignore[union-attr]
        return self._rejoined(Value(value.node, tuple(layout)))

    def _split(self, value: Value, item: Entry, size: int, product: int, n: int) -> Value:
        """The axis of the item as two, so that the first fills what is left of a dimension of this size."""
        if isinstance(item, Spread) or size % product or n % (size // product):
            raise Unsupported
        (axis,) = item
        first = size // product
        if value.node.op == "concat" and axis == value.node.attrs[0] and len(value.node.inputs) == first:
            return self._stacked(value.node, axis, value.layout)
        sizes = [*value.node.sizes[:axis], first, n // first, *value.node.sizes[axis + 1 :]]
        node = self.node("unflatten", [value.node], (axis,), sizes)
        layout = tuple(
            e
            if isinstance(e, Spread)
            else tuple(b for a in e for b in ((a, a + 1) if a == axis else (a + (a > axis),)))
            for e in value.layout
        )
        return Value(node, layout)

    def _stacked(self, node: Node, axis: int, layout: tuple[Entry, ...]) -> Value:
        """A concatenation of equal pieces, split between them: the stack of these."""
        pieces = self.pieces(plain(node), axis)
        if len({p.shape for p in pieces}) != 1:
            raise Unsupported
        whole = self.stack([Value(p.node, (*p.layout[:axis], (), *p.layout[axis:])) for p in pieces], axis)
        place = [axis_of(e) for e in whole.layout]
        entries = (
            e
            if isinstance(e, Spread)
            else tuple(b for a in e for b in ((place[a], place[a + 1]) if a == axis else (place[a + (a > axis)],)))
            for e in layout
        )
        return Value(whole.node, tuple(entries))

    def _rejoined(self, value: Value) -> Value:
        """An axis that was split and lies flattened again is the axis it was."""
        if value.node.op != "unflatten":
            return value
        (axis,) = value.node.attrs
        joined: list[Entry] = []
        for entry in value.layout:
            if isinstance(entry, Spread) or axis not in entry:
                joined.append(entry)
                continue
            at = entry.index(axis)
            if entry[at + 1 : at + 2] != (axis + 1,):
                return value
            joined.append((*entry[: at + 1], *entry[at + 2 :]))
        return Value(value.node.inputs[0], mapped(joined, lambda a: a - (a > axis)))

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        layout: list[Entry] = list(value.layout)
        layout = [()] * (len(shape) - len(layout)) + layout
        for i, size in enumerate(shape):
            if layout[i] == () and size not in (1, -1):
                layout[i] = Spread(size)
        return Value(value.node, tuple(layout))

    # Layers

    def channels(
        self, op: str, inputs: Sequence[Node], attrs: tuple, options: tuple, value: Value, dim: int, out: int
    ) -> Value:
        """A layer that puts `out` channels in place of those in dimension `dim`."""
        axis = axis_or_none(value.layout[dim])
        sizes = list(value.node.sizes)
        layout: list[Entry] = list(value.layout)
        if axis is None:
            if out != 1:  # where it stands among the dimensions, so that a map has its axes in order
                new = _place(layout, dim)
                sizes.insert(new, out)
                layout = list(mapped(layout, lambda a: a + (a >= new)))
                layout[dim] = (new,)
        elif out != 1:
            sizes[axis] = out
        else:
            del sizes[axis]
            layout[dim] = ()
            layout = list(mapped(layout, lambda a: a - (a > axis)))
        return Value(self.node(op, inputs, attrs, sizes, options), tuple(layout))

    def dense(self, value: Value, dim: int, weight: Node, out: int, order: str) -> Value:
        value = self._flat(value, dim)
        axis = axis_or_none(value.layout[dim])
        if any(isinstance(e, Spread) for e in value.layout):
            raise Unsupported
        place = _place(value.layout, dim) if axis is None else axis
        return self.channels("dense", [value.node, weight], (axis, out != 1, order, place), (), value, dim, out)


def _place(layout: Sequence[Entry], dim: int) -> int:
    """Where an axis for this dimension, which has none, stands: behind those of the dimensions before it."""
    return max((a + 1 for e in layout[:dim] if not isinstance(e, Spread) for a in e), default=0)


def _whole(node: Node) -> Node:
    """What a node is a part of."""
    return _whole(node.inputs[0]) if node.op == "slice" else node


def _is_branching(node: Node, axis: int) -> bool:
    """Whether it has different things along an axis: what was stacked, or parts of an axis that was split."""
    return (node.op == "stack" and axis == len(node.sizes) - 1) or (
        node.op == "unflatten" and axis == node.attrs[0] and node.sizes[axis] <= MAX_PARTS
    )


def mapped(layout: Iterable[Entry], function: Callable[[int], int]) -> tuple[Entry, ...]:
    return tuple(e if isinstance(e, Spread) else tuple(function(a) for a in e) for e in layout)


def _without(value: Value, kept: tuple[Entry, ...], axes: list[int]) -> Value:
    """A value whose dimensions are the axes that `axes` leaves, in the layout that `kept` gives these."""
    gone = axes[0]
    inner = [axis_of(e) for e in value.layout]
    return Value(value.node, mapped(kept, lambda a: inner[a - (a > gone)]))


def of_shape(node: Node, shape: Sequence[int]) -> Value:
    """A value of this shape, whose dimensions above one are the node's axes in order."""
    axes = iter(range(len(node.sizes)))
    return Value(node, tuple(() if n == 1 else (next(axes),) for n in shape))


def align(values: Sequence[Value]) -> tuple[tuple[Entry, ...], list[tuple[int, ...]], list[int]]:
    """Dimensions side by side from the right, as broadcasting does: the layout of the result in new axes, for each
    value the new axis of each of its own, and their sizes."""
    rank = max(len(v.layout) for v in values)
    places: list[dict[int, int]] = [{} for _ in values]
    sizes: list[int] = []
    layout: list[Entry] = []
    for d in range(rank):
        entries = [
            (i, v.layout[d - rank + len(v.layout)]) for i, v in enumerate(values) if d - rank + len(v.layout) >= 0
        ]
        real = [(i, e) for i, e in entries if not isinstance(e, Spread) and e]
        if not real:
            layout.append(next((e for _, e in entries if isinstance(e, Spread)), ()))
            continue
        found = [values[real[0][0]].node.sizes[a] for a in real[0][1]]
        new = tuple(range(len(sizes), len(sizes) + len(found)))
        sizes += found
        for i, entry in real:
            if [values[i].node.sizes[a] for a in entry] != found:
                raise Unsupported
            places[i].update(zip(entry, new, strict=True))
        layout.append(new)
    # -1: an axis that no dimension holds, which only `concatenate` leaves out.
    axes = [tuple(p.get(a, -1) for a in range(len(v.node.sizes))) for v, p in zip(values, places, strict=True)]
    return tuple(layout), axes, sizes


def _terms(node: Node, places: Sequence[int]) -> list[Term]:
    """A node as a sum of products over axes of which `places` names each of its own."""
    if node.op != "poly":
        return [(1.0, ((node, tuple(places)),))]
    return [(c, tuple((n, tuple(places[a] for a in axes)) for n, axes in factors)) for c, factors in node.terms]


def _expanded(terms: Iterable[Term]) -> list[Term]:
    """Without sums among the factors."""
    result: list[Term] = []
    for coefficient, factors in terms:
        parts: list[Term] = [(coefficient, ())]
        for node, places in factors:
            parts = _product([parts, _terms(node, places)])
        result += parts
    return result


def _product(parts: list[list[Term]]) -> list[Term]:
    a, b = parts
    if len(a) * len(b) > 4 * MAX_TERMS:
        raise Unsupported
    return [(c * d, (*f, *g)) for c, f in a for d, g in b]
