"""What Inductor makes of an operator on the CPU where nothing is kept for a gradient: code of its own.

An operator is opaque to Inductor: what stands before it is written and read again, and so is what stands after it. In
networks on the CPU that costs more than the operator's kernel spares, as Inductor writes over maps that nobody reads
any more. So an operator here has a formula, which Inductor lowers in place of a call; a sum and an activation after it
become part of the pass that gates. A BatchNorm before it, and a ReLU, are made the operator's own prologue first: each
pass then normalises anew, and the map between BatchNorm and gate, which Inductor writes where it compiles the block
that the operator stands for, is in no memory.

Any other compiler calls the operator, and so does Inductor where a backward is to come.
"""

from __future__ import annotations

import functools
import logging
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..codes import ACTIVATIONS

Formula = Callable[..., Tensor]

logger = logging.getLogger(__name__)

_waiting: dict[torch._ops.OpOverload, Formula] = {}
_called: list[torch._ops.OpOverload] = []
_aten = torch.ops.aten


def for_inductor(op: torch._ops.OpOverload, formula: Formula) -> None:
    """formula: from the operator's arguments, of which the first is its map, to its first result, in any layout. What
    it does to the map it does anew for each pass over it: of a tensor that is used twice Inductor may make a buffer.
    """
    _waiting[op] = formula


def called_by_inductor(op: torch._ops.OpOverload) -> None:
    """Have Inductor call the operator (unless it has a formula here) though it has a decomposition, which Inductor
    refuses of operators that nobody told it of: an error where the environment has CI set."""
    _called.append(op)


def tell_inductor() -> None:
    """Called by the fake kernels, which every compilation comes to before it lowers anything. Inductor takes seconds to
    import, so nothing is done before somebody else has."""
    if not (_waiting or _called) or "torch._inductor.lowering" not in sys.modules:
        return
    try:
        _tell_inductor()
    except ImportError as error:  # another version's Inductor
        logger.warning(f"Inductor calls the operators of gates: {error}")
        _waiting.clear()
        _called.clear()


def _tell_inductor() -> None:
    from torch._inductor.fx_passes.post_grad import pass_patterns
    from torch._inductor.lowering import lowerings, make_fallback, register_lowering, tag_to_layout_constraint
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern
    from torch._library.utils import get_layout_constraint_tag

    while _waiting:
        op, formula = _waiting.popitem()
        register_lowering(op, type_promotion_kind=None)(functools.partial(_lower, op, formula))
        register_graph_pattern(CallFunctionVarArgs(op), pass_dict=pass_patterns[0])(_absorb)
    while _called:
        op = _called.pop()
        if op not in lowerings:
            layout = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            make_fallback(op, layout, warn=False)


def _is_whole(node: fx.Node) -> bool:
    """Whether nothing but the first result is used."""
    op: Any = node.target
    return len(op._schema.returns) == 1 or all(
        user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )


# What Inductor lowers


def _lower(op: torch._ops.OpOverload, formula: Formula, *arguments: Any) -> Any:
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import V

    node = V.graph.current_node
    if _is_whole(node):
        try:
            return _lowered(node, op, formula, arguments)
        except Exception as error:  # what is used of Inductor is nobody's promise: the operator itself serves as well
            logger.warning(f"Inductor calls {op}: {type(error).__name__}: {error}")
    return fallback_handler(op, add_to_fallback_set=False)(*arguments)


def _lowered(node: fx.Node, op: torch._ops.OpOverload, formula: Formula, arguments: tuple[Any, ...]) -> Any:
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    leaves, spec = tree_flatten(fx.node.map_arg(tuple(node.args), lambda n: n.meta["val"]))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fakes, values = [leaves[i] for i in places], tree_leaves(arguments)
    for i in places:
        if leaves[i].dim() == 1:  # the factors of a BatchNorm, which every element of the map would compute anew
            values[i].realize()
        else:
            values[i].mark_reuse(2)

    def of_tensors(*tensors: Tensor) -> Tensor:
        given = dict(zip(places, tensors, strict=True))
        return formula(*tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec))

    with V.fake_mode, torch.no_grad():
        graph = make_fx(of_tensors, select_decomp_table())(*fakes).graph
    result = _run(V.graph, graph, [values[i] for i in places])
    results = len(op._schema.returns)
    return (result,) * results if results > 1 else result


def _run(into: Any, graph: fx.Graph, values: list[Any]) -> Any:
    """Lower a graph as part of the one that is being lowered. values: of its placeholders, lowered."""
    *nodes, output = graph.nodes
    result = output.args[0]
    graph.erase_node(output)  # what is given to one would be written, in the layout that was traced
    given = iter(values)
    for node in nodes:
        if node.op == "placeholder":
            into.env[node] = next(given)
        else:
            with into.set_current_node(node):
                into.env[node] = into.run_node(node)
    return into.env[result]


# What is made an operator's prologue


def _absorb(match: Any, *_: Any, **__: Any) -> None:
    """Have the operator take what a map is before it is normalised, with the BatchNorm's factor and shift."""
    node = match.output_node()
    names = [argument.name for argument in node.target._schema.arguments]
    if "affine_weight" not in names or len(node.args) != len(names) or not _is_whole(node):
        return
    at = {name: names.index(name) for name in ("affine_weight", "affine_bias", "pre_activation")}
    x, free = node.args[0], [node.args[i] for i in at.values()] == [None, None, ACTIVATIONS["identity"]]
    if not free or not isinstance(x, fx.Node) or x.meta["val"].dim() < 3:
        return
    activation = "identity"
    source = _before(x, _aten.relu.default)
    if source is not None:
        x, activation = source, "relu"
    found = _affine_before(x)
    if found is None or found[0].meta["val"].dtype != node.args[0].meta["val"].dtype:
        return
    source, steps = found
    factor = shift = None
    with node.graph.inserting_before(node):
        for target, value in steps:
            if target is _aten.mul.Tensor:
                factor = value if factor is None else _new(target, factor, value)
            if shift is not None:
                shift = _new(target, shift, value)
            elif target is not _aten.mul.Tensor:
                shift = value if target is _aten.add.Tensor else _new(_aten.neg.default, value)
        if factor is None or shift is None:
            return
        for name, value in (("affine_weight", factor), ("affine_bias", shift)):
            node.update_arg(at[name], _new(_aten.reshape.default, value, [-1]))
    node.update_arg(0, source)
    node.update_arg(at["pre_activation"], ACTIVATIONS[activation])


def _before(node: fx.Node, target: Any) -> fx.Node | None:
    """The map that this one is made of by that function alone; None where it is not, or is used elsewhere too."""
    if node.target is not target or len(node.users) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0]


def _affine_before(node: fx.Node) -> tuple[fx.Node, list[tuple[Any, fx.Node]]] | None:
    """What a map is an affine function of, a channel, and the steps from that to it. On the way it may be in a wider
    dtype."""
    steps: list[tuple[Any, fx.Node]] = []
    source: Any
    value: Any
    while len(node.users) == 1:
        source = _before(node, torch.ops.prims.convert_element_type.default)
        if source is None:
            if node.target not in (_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor) or node.kwargs:
                break
            source, value = node.args
            if not (isinstance(source, fx.Node) and isinstance(value, fx.Node) and _is_per_channel(value, source)):
                break
            steps.insert(0, (node.target, value))
        node = source
    return (node, steps) if steps else None


def _is_per_channel(value: fx.Node, x: fx.Node) -> bool:
    shape, of_map = value.meta["val"].shape, x.meta["val"].shape
    if len(of_map) < 3 or len(shape) > len(of_map):
        return False
    padded = (1,) * (len(of_map) - len(shape)) + tuple(shape)
    return all(n == (of_map[1] if axis == 1 else 1) for axis, n in enumerate(padded))


def _new(target: Any, *args: Any) -> Any:
    from torch._inductor.virtualized import V

    graph = next(a for a in args if isinstance(a, fx.Node)).graph
    node = graph.call_function(target, args)
    with V.fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node
