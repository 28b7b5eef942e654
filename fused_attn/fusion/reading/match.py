"""Whether two canonical graphs are the same computation, and what stands in one for the parameters of the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...codes import ACTIVATIONS
from .canonical import Graph, Node, Unsupported

#: Activations by which a template marks that any may stand there, and the option that this one is.
MARKERS = {"gelu_tanh": "activation", "hard_swish": "gate"}
#: Names of weights by which a template marks that any computation may stand for the layer that has them.
ANY = "any"


@dataclass
class Match:
    """Nodes of a template -> those that stand for them; and the options read off. scale: of the products that a softmax
    is of, where the template has none."""

    nodes: dict[Node, Node] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    scale: float = 1.0

    def with_node(self, template: Node, node: Node) -> Match:
        return replace(self, nodes={**self.nodes, template: node})

    def leaves(self) -> dict[str, str]:
        """Names of the template's parameters -> those of the other's."""
        return {t.name: c.name for t, c in self.nodes.items() if t.op == "leaf"}


def unify(template: Node, node: Node, graph: Graph, match: Match) -> Iterator[Match]:
    """The ways in which a node of `graph` is a template, its input standing for any map of the same rank."""
    if template in match.nodes:
        if match.nodes[template] is node:
            yield match
        return
    if template.op == "input":
        used = any(t.op == "input" and c is node for t, c in match.nodes.items())
        if len(node.sizes) == len(template.sizes) and not used:
            yield match.with_node(template, node)
        return
    if template.op == "dense" and template.inputs[1].name.startswith(ANY):
        yield from _unify_any(template, node, graph, match)
        return
    if template.op == "leaf":
        free = node.op == "leaf" and len(node.sizes) == len(template.sizes)
        if free and not any(t.op == "leaf" and c is node for t, c in match.nodes.items()):
            yield match.with_node(template, node)
        return
    if template.op == "poly":
        yield from _unify_sums(template, node, graph, match)
        return
    if template.op != node.op or len(template.inputs) != len(node.inputs):
        return
    if template.op == "act" and template.attrs[0] in MARKERS:
        option, name = MARKERS[template.attrs[0]], node.attrs[0]
        if name not in ACTIVATIONS or match.options.get(option, name) != name:
            return
        match = replace(match, options={**match.options, option: name})
    elif template.op == "softmax" and template.inputs[0].op == "product" and node.inputs[0].op == "poly":
        yield from _unify_scaled(template, node, graph, match)
        return
    elif template.attrs != node.attrs:
        return
    orders = [node.inputs, node.inputs[::-1]] if template.op == "maximum" else [node.inputs]
    for inputs in orders:
        for found in _unify_all(template.inputs, inputs, graph, match):
            yield found.with_node(template, node)


def _unify_scaled(template: Node, node: Node, graph: Graph, match: Match) -> Iterator[Match]:
    """A softmax of products, and one of such that are scaled."""
    terms = node.inputs[0].terms
    if template.attrs != node.attrs or [len(factors) for _, factors in terms] != [1]:
        return
    ((scale, ((products, axes),)),) = terms
    if axes == tuple(range(len(axes))) and match.scale == 1:
        for found in unify(template.inputs[0], products, graph, replace(match, scale=scale)):
            yield found.with_node(template, node)


def _unify_any(template: Node, node: Node, graph: Graph, match: Match) -> Iterator[Match]:
    """Whatever is computed from what the template's is, and from nothing else but parameters."""
    if len(node.sizes) != len(template.sizes):
        return
    for source in reached(node):
        if all(n.op != "input" for n in reached(node, source)):
            for found in unify(template.inputs[0], source, graph, match):
                yield found.with_node(template, node)


def _unify_all(templates: tuple[Node, ...], nodes: tuple[Node, ...], graph: Graph, match: Match) -> Iterator[Match]:
    if not templates:
        yield match
        return
    for found in unify(templates[0], nodes[0], graph, match):
        yield from _unify_all(templates[1:], nodes[1:], graph, found)


def _unify_sums(template: Node, node: Node, graph: Graph, match: Match) -> Iterator[Match]:
    """Factors are matched with factors in any order; then the sum of products that they make must be the node."""
    if node.op != "poly":
        return
    # The input last: what else there is says which map it is, also where that is a product itself.
    factors = sorted(template.inputs, key=lambda n: n.op == "input")
    for found in _assign(factors, node.inputs, graph, match):
        if _instance(template, graph, found) is node:
            yield found.with_node(template, node)


def _assign(factors: list[Node], nodes: tuple[Node, ...], graph: Graph, match: Match) -> Iterator[Match]:
    if not factors:
        yield match
        return
    if factors[0] in match.nodes:
        yield from _assign(factors[1:], nodes, graph, match)
        return
    for node in nodes:
        for found in unify(factors[0], node, graph, match):
            yield from _assign(factors[1:], nodes, graph, found)


def _instance(template: Node, graph: Graph, match: Match) -> Node | None:
    """The sum of products with what stands for its factors."""
    sizes = [0] * len(template.sizes)
    terms = []
    for coefficient, factors in template.terms:
        for factor, axes in factors:
            for n, axis in zip(match.nodes[factor].sizes, axes, strict=True):
                if sizes[axis] not in (0, n):
                    return None
                sizes[axis] = n
        terms.append((coefficient, tuple((match.nodes[f], axes) for f, axes in factors)))
    try:
        node, order = graph.poly(terms, sizes)
    except Unsupported:
        return None
    return node if order == tuple(range(len(sizes))) else None


def reached(node: Node, end: Node | None = None) -> list[Node]:
    """A node and all it is computed from, each once; not through `end`."""
    seen: dict[int, Node] = {}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen and current is not end:
            seen[id(current)] = current
            waiting += current.inputs
    return list(seen.values())
