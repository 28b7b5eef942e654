"""The same matcher on graphs: a backend of torch.compile that puts fused blocks in front of Inductor, and exported
programs. Blocks are found wherever they lie in a graph, with what stands around them: an eval BatchNorm and its
activation before, a residual sum and a ReLU after."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ... import functional
from ...codes import ACTIVATIONS
from . import templates
from .capture import Recorder
from .graph import Graph, Node, Unsupported, Value
from .match import Match, unify
from .recipes import _input

#: Sizes that stand for those a dynamic graph leaves open: all different.
_PRIMES = (5, 13, 11, 17, 19, 23, 29, 31, 37, 41)
_ADDS = {torch.add, operator.add, operator.iadd, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}
_RELUS = {torch.relu, torch.relu_, torch.nn.functional.relu, torch.ops.aten.relu.default, torch.ops.aten.relu_.default}


def backend(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable:
    """For `torch.compile(model, backend="fused_attn")`: blocks in the graph fused, the rest compiled by Inductor."""
    from torch._inductor.compile_fx import compile_fx

    rewrite(graph, inputs)
    compiled: Any = compile_fx(graph, list(inputs), **options)
    return compiled


def fuse_exported(program: Any) -> fx.GraphModule:
    """The module of an exported program with its blocks fused."""
    module = program.module(check_guards=False)
    values, _ = program.example_inputs
    rewrite(module, values)
    return module


def rewrite(module: fx.GraphModule, inputs: Sequence[Any]) -> int:
    """Fuse the blocks in a graph; how many there were. A graph that cannot be followed is left as it is."""
    try:
        seen = _follow(module, inputs)
    except Exception:
        return 0
    count = sum(_replace(module, seen, node) for node in reversed(list(module.graph.nodes)) if node in seen.values)
    if count:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return count


class _Followed:
    """Canonical values of a graph's nodes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Value] = {}

    def holder(self, node: Node, before: fx.Node) -> fx.Node | None:
        """What holds this value as it is, before a place in the graph."""
        for other, value in self.values.items():
            if value.node is node and value.layout == tuple((i,) for i in range(len(node.sizes))) and other < before:
                return other
        return None

    def leaf(self, node: Node) -> fx.Node | None:
        return next((n for n, v in self.values.items() if v.node is node and n.op in ("placeholder", "get_attr")), None)


def _follow(module: fx.GraphModule, inputs: Sequence[Any]) -> _Followed:
    graph = Graph()
    recorder = Recorder(graph, limit=100_000)
    symbols: dict[Any, int] = {}

    def size(n: Any) -> int:
        if isinstance(n, int):
            return n
        expression = n.node.expr
        for symbol in expression.free_symbols:
            symbols.setdefault(symbol, _PRIMES[len(symbols)])
        return int(expression.subs(symbols))

    found = _Followed(graph)

    def stand_in(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes = [size(n) for n in value.shape]
            strides = None if any(not isinstance(n, int) for n in value.shape) else [size(s) for s in value.stride()]
            t = torch.empty(sizes, dtype=value.dtype, device="meta")
            if strides is not None:
                t = torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
            recorder.put(t, graph.leaf("leaf", name, sizes))
            return t
        return size(value) if isinstance(value, torch.SymInt) else value

    class Follower(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "call_method" and n.target == "item":  # an option of a layer that dynamo keeps open
                return n.meta["example_value"].node.hint
            held = n.op == "get_attr"
            result = stand_in(n.name, self.fetch_attr(str(n.target))) if held else super().run_node(n)
            if isinstance(result, Tensor):
                try:
                    found.values[n] = recorder.get(result)
                except Unsupported:
                    found.values.pop(n, None)
            return result

    holders = module.graph.find_nodes(op="placeholder")
    # The values that dynamo keeps have the symbols of the graph in their sizes.
    kept = [n.meta.get("example_value", n.meta.get("val", v)) for n, v in zip(holders, inputs, strict=True)]
    args = [stand_in(n.name, v) for n, v in zip(holders, kept, strict=True)]
    modes = torch.is_grad_enabled()
    with torch.set_grad_enabled(True), recorder:
        Follower(module, garbage_collect_values=False).run(*args, enable_io_processing=False)
    torch.set_grad_enabled(modes)
    if any(t.is_floating_point() and id(t) in {id(a) for a in args} and t.dim() > 2 for t in recorder.written):
        raise Unsupported
    return found


def _replace(module: fx.GraphModule, seen: _Followed, last: fx.Node) -> bool:
    value = seen.values[last]
    rank = len(value.node.sizes) - 2
    whole = value.layout == tuple((i,) for i in range(rank + 2))
    if value.node.op != "poly" or rank not in (1, 2, 3) or not whole or not last.users:
        return False
    if any(t.node is value.node and n is not last and n > last for n, t in seen.values.items()):
        return False  # a view or copy of it follows, which is the better end
    for function, template, match, second in _matches(seen.graph, value.node, rank):
        names = {t.name: seen.leaf(c) for t, c in match.nodes.items() if t.op == "leaf"}
        if second is not None:
            names |= {t.name: seen.leaf(c) for t, c in second[1].nodes.items() if t.op == "leaf"}
        source = (second or (template, match))[1].nodes[_input((second or (template, match))[0])]
        x = seen.holder(source, last)
        if x is None or any(n is None for n in names.values()):
            continue
        _insert(module.graph, seen, last, x, source, _call(function, template, match, second), names)
        return True
    return False


def _matches(graph: Graph, node: Node, rank: int) -> Any:
    """(function, template, match, the channel gate inside with its match or None)."""
    for template in templates.spatial_gates(rank):
        if template.options["norm"]:
            continue
        for match in unify(template.output, node, graph, Match()):
            gated = match.nodes.get(_input(template))
            plain = all(
                c.options[:2] == ((1,) * rank, 1) and all(k % 2 for k in c.options[2])
                for t, c in match.nodes.items()
                if t.op == "conv"
            )
            if gated is None or not plain:
                continue
            if gated.op == "poly":
                for inner in templates.channel_gates(rank):
                    for second in unify(inner.output, gated, graph, Match()):
                        yield "cbam", template, match, (inner, second)
            yield "spatial_gate", template, match, None
    for template in templates.channel_gates(rank):
        for match in unify(template.output, node, graph, Match()):
            yield "channel_gate", template, match, None


def _call(function: str, template: Any, match: Match, second: Any) -> tuple[Callable, dict[str, Any], dict[str, str]]:
    """The function, its options, and for each of its tensor arguments the template's name of it."""
    channel = {name: name for name in ("weight1", "bias1", "weight2", "bias2")}
    if function == "channel_gate":
        options = {**template.options, "gate": match.options["gate"]}
        options["activation"] = match.options.get("activation", "identity")
        return functional.channel_gate, options, channel
    weight = {"weight": "block.conv.weight", "bias": "block.conv.bias"}
    if function == "spatial_gate":
        options = {k: template.options[k] for k in ("order", "ties")}
        return functional.spatial_gate, {**options, "gate": match.options["gate"]}, weight
    inner, found = second
    options = {k: v for k, v in inner.options.items() if k in ("pool", "layer")}
    options |= {
        "channel_ties": inner.options.get("ties", "first"),
        "activation": found.options.get("activation", "identity"),
        "channel_gate": found.options["gate"],
        "order": template.options["order"],
        "spatial_ties": template.options["ties"],
        "spatial_gate": match.options["gate"],
    }
    return functional.cbam, options, {**channel, **{f"spatial_{k}": v for k, v in weight.items()}}


def _insert(
    graph: fx.Graph, seen: _Followed, last: fx.Node, x: fx.Node, source: Node, call: Any, names: dict[str, Any]
) -> None:
    function, options, arguments = call
    options = {**options, **{argument: names[name] for argument, name in arguments.items() if name in names}}
    end = last
    added = _sum_after(seen, end)
    if added is not None:
        end, options["residual"] = added
        if len(end.users) == 1 and _is_relu(user := next(iter(end.users))):
            end, options["post_activation"] = user, "relu"
    with graph.inserting_before(end):
        before = _normalised(graph, seen, last, x, source)
        if before is not None:
            x, options["affine"], options["pre_activation"] = before
        new = graph.call_function(function, (x,), options)
    end.replace_all_uses_with(new)
    node: fx.Node = end
    _erase_dead(graph, node)


def _erase_dead(graph: fx.Graph, end: fx.Node) -> None:
    """Nodes that only the old end needed, in-place ones too: what they wrote into was theirs."""
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if not node.users and node.op in ("call_function", "call_method"):
            before = list(dict.fromkeys(node.all_input_nodes))
            graph.erase_node(node)
            waiting += [n for n in before if n not in waiting]


def _sum_after(seen: _Followed, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum with another map of the same shape that is the only use of a node, and that map."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    method = user.op == "call_method" and user.target in ("add", "add_")
    if not (method or (user.op == "call_function" and user.target in _ADDS)) or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or other not in seen.values:
        return None
    writes = user.target in (operator.iadd, "add_", torch.ops.aten.add_.Tensor)
    if writes and user.args[0] is not node:
        return None
    return (user, other) if seen.values[other].shape == seen.values[node].shape else None


def _is_relu(node: fx.Node) -> bool:
    method = node.op == "call_method" and node.target in ("relu", "relu_")
    return method or (node.op == "call_function" and node.target in _RELUS)


def _normalised(graph: fx.Graph, seen: _Followed, last: fx.Node, x: fx.Node, source: Node) -> Any:
    """Where the map is an eval BatchNorm's, perhaps activated, and nothing else reads it: what that was computed from,
    the BatchNorm as (weight, bias), and the activation's name."""
    activation, norm = "identity", source
    if norm.op == "act" and norm.attrs[0] in ACTIVATIONS:
        activation, norm = norm.attrs[0], norm.inputs[0]
    if norm.op != "batch_norm" or norm.attrs != (1, False, (True,) * 4) or not _only_inside(x, last):
        return None
    below = seen.holder(norm.inputs[0], last)
    tensors = [seen.leaf(n) for n in norm.inputs[1:]]
    if below is None or any(t is None for t in tensors):
        return None
    return below, graph.call_function(folded, (*tensors, norm.options[0])), activation


def _only_inside(x: fx.Node, last: fx.Node) -> bool:
    """Whether all that reads a node ends in `last`."""
    inside = {last}
    for node in reversed(list(x.graph.nodes)):
        if node < last and node.users and set(node.users) <= inside:
            inside.add(node)
    return x in inside


def folded(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A BatchNorm that uses its running statistics as x * weight + bias."""
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale
