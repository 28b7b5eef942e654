"""What criss-cross attention and global context are about, in a graph in which anything may stand around it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from .attentions import criss_crosses
from .canonical import Entry, Graph, Node, Unsupported, Value, mapped
from .templates import Template


def crossed(graph: Graph, value: Value) -> Iterator[Value]:
    """For each criss-cross attention in a sum: the sum with one node, of queries, keys and values, in place of its
    columns and its rows."""
    for _, _, terms in criss_crosses(graph, value.node.terms):
        try:
            found, order = graph.poly([(c, tuple(factors)) for c, factors in terms], value.node.sizes)
        except Unsupported:
            continue
        yield Value(found, mapped(value.layout, order.index))


@functools.cache
def crossed_template(template: Template) -> Node:
    (found,) = crossed(template.graph, template.captured.output)
    return found.node


class Context(NamedTuple):
    """The mean of a map, weighted by a softmax over its positions of a layer to one channel; and which dimension of the
    tensor has its channels. The samples are the first, and all others of size one."""

    x: Node
    weight: Node
    place: int


#: From a context to the softmax in it: a number times a mean of products, or a product of matrices.
_STEPS = 3


def context_of(graph: Graph, value: Value) -> Context | None:
    """The context that a value is; it is compared with those of the maps that there is a softmax of."""
    row = [value.node]
    for _ in range(_STEPS):
        row = list(dict.fromkeys(n for above in row for n in above.inputs))
        for soft in row:
            found = _context(graph, value, soft) if soft.op == "softmax" else None
            if found is not None:
                return found
    return None


def _context(graph: Graph, value: Value, soft: Node) -> Context | None:
    found = _layer(soft.inputs[0])
    if found is None or found[2] not in (0, 1):
        return None
    x, weight, channel = found
    sample: Entry = (0,) if channel else ()  # none where the batch is one
    space: list[Entry] = [(a,) for a in range(channel + 1, len(x.sizes))]
    of_space: list[Entry] = [(a,) for a in range(channel, len(soft.sizes))]
    if not space or len(soft.sizes) != len(x.sizes) - 1:
        return None
    wide = Value(x, (sample, (channel,), *space)), Value(soft, (sample, (), *of_space))
    flat = (Value(v.node, (*v.layout[:2], tuple(a for (a,) in v.layout[2:]))) for v in wide)  # type: ignore[misc]
    for make in (_as_sum, _as_product):
        try:
            context = make(graph, *(wide if make is _as_sum else flat))
        except Unsupported:
            continue
        if context.node is value.node:
            return _placed(context, value, x, weight)
    return None


def _layer(logits: Node) -> tuple[Node, Node, int] | None:
    """Of a layer to one channel: the map, the weight, and which axis of the map has the channels."""
    if logits.op == "dense":
        x, weight = logits.inputs
        channel = logits.attrs[0]
    elif logits.op == "product" and ((), (), (0,)) in logits.attrs:  # a Linear of one sample
        i = logits.attrs.index(((), (), (0,)))
        weight, x = logits.inputs[i], logits.inputs[1 - i]
        (channel,) = logits.attrs[1 - i][2]
    else:
        return None
    return (x, weight, channel) if weight.op == "leaf" and len(weight.sizes) == 1 else None


def _as_sum(graph: Graph, x: Value, weights: Value) -> Value:
    return graph.reduce("sum", graph.multiply(x, weights), range(2, len(x.layout)), False)


def _as_product(graph: Graph, x: Value, weights: Value) -> Value:
    product = graph.product(x, Value(weights.node, (weights.layout[0], weights.layout[2], ())))
    return Value(product.node, product.layout[:2])


def _placed(context: Value, value: Value, x: Node, weight: Node) -> Context | None:
    sample, channels = context.layout
    if channels not in value.layout[1:] or value.layout[0] != sample:
        return None
    place = value.layout.index(channels, 1)
    others = [e for d, e in enumerate(value.layout) if d not in (0, place)]
    return Context(x, weight, place) if not any(e != () for e in others) else None
