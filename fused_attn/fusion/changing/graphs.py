"""The same matcher on graphs: a backend of torch.compile that puts fused blocks in front of Inductor, and exported
programs. Blocks are found wherever they lie in a graph, with what stands around them: an eval BatchNorm and its
activation before, a residual sum and an activation after. Each is checked numerically before it is used (`trial`)."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from ... import backends, functional, reference
from ... import nn as fused_nn
from ...codes import ACTIVATIONS
from ...reference.block_attention import folded_affine
from ..reading import templates
from ..reading.canonical import Node, Spread, Value
from ..reading.capture import BATCH, SPACE
from ..reading.context import in_its_own_context
from ..reading.cores import context_of, crossed, crossed_template
from ..reading.find import scale_of
from ..reading.followed import Followed, follow, is_whole
from ..reading.match import Match, reached, unify
from ..reading.region import Region, is_number, region
from ..reading.selections import Weighted, branch_dimension, one_map, weighted_sum
from ..reading.spans import MOST_NODES, is_bounded, kind_of_gate
from ..reading.templates import Template
from ..reading.trial import Trial
from . import calls

if TYPE_CHECKING:
    from torch.export import ExportedProgram

logger = logging.getLogger(__name__)

#: The calls that are one op.
_OPS: dict[Callable, str] = {
    functional.channel_gate: "channel_gate",
    functional.spatial_gate: "spatial_gate",
    functional.cbam: "cbam",
    calls.spatial_gate_with_batch_norm: "spatial_gate/batch_norm",
    calls.cbam_with_batch_norm: "cbam/batch_norm",
    functional.select_with: "select/with",
}

_PRODUCTS: set[Any] = {torch.mul, torch.multiply, operator.mul, operator.imul, "mul", "mul_", "multiply"}
_PRODUCTS |= {torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor}
_QUOTIENTS: set[Any] = {torch.div, torch.divide, operator.truediv, "div", torch.ops.aten.div.Tensor}
_ADDS = {torch.add, operator.add, operator.iadd, torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable:
    """For `torch.compile(model, backend="fused_attn")`: blocks in the graph fused, the rest compiled by Inductor.

    Args:
        mode, options: as `torch.compile` takes them for Inductor.

    Raises:
        RuntimeError: there is no such mode or option.
    """
    inductor = torch._TorchCompileInductorWrapper(mode, options, dynamic=None)  # dynamic only sets the graph's sizes
    rewrite(graph, inputs, compiled=backends.forced() is None)
    compiled: Callable = inductor(graph, list(inputs))
    return compiled


def is_program(model: object) -> TypeGuard[ExportedProgram]:
    """Whether it is one of torch.export's, which is not imported for it: that takes as long as all else here."""
    found = sys.modules.get("torch.export.exported_program")
    return found is not None and isinstance(model, found.ExportedProgram)


def fuse_exported(program: ExportedProgram, left: list[str]) -> ExportedProgram:
    """An exported program with its blocks fused, exported again: of the same inputs, with the same open sizes and
    `state_dict`. The program itself where it has no block. left: gets what was left alone, and why."""
    if program.example_inputs is None:
        left.append("the program has no example inputs, with which it is exported again")
        return program
    return in_its_own_context(lambda: _fuse_exported(program, left))


def _fuse_exported(program: ExportedProgram, left: list[str]) -> ExportedProgram:
    module: Any = program.module(check_guards=False)
    holders = module.graph.find_nodes(op="placeholder")
    _write_down_numbers(module)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # what a `.to` was traced with: it would have to see what blocks no longer write
    if not rewrite(module, [n.meta.get("val") for n in holders], left, products=True):
        return program
    assert program.example_inputs is not None
    dims: dict[Any, Any] = {}
    sizes = [_open(n.meta.get("val"), program.range_constraints, dims) for n in holders]
    args, kwargs = tree_unflatten(sizes, tree_structure(program.example_inputs))
    shapes = (*args, *kwargs.values())
    try:
        with backends.keep_operators():
            return torch.export.export(module, *program.example_inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        left.append(f"the fused program cannot be exported: {type(error).__name__}: {error}")
        return program


def _write_down_numbers(module: Any) -> None:
    """A number that code has made a tensor of, which a program has as a constant of its own, is one in the graph."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default):
        held = node.args[0]
        number = operator.attrgetter(held.target)(module) if held.op == "get_attr" else None
        if type(number) is Tensor and number.dim() == 0 and number.is_floating_point() and not number.is_meta:
            with module.graph.inserting_before(node):
                kept = {"dtype": number.dtype, "device": number.device}
                made = module.graph.call_function(torch.ops.aten.full.default, ([], number.item()), kept)
            made.meta.update(node.meta)
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)


def _open(value: Any, ranges: Any, known: dict[Any, Any]) -> Any:
    """The open sizes of an input of an exported program as `torch.export.export` takes them. known: those so far."""
    if isinstance(value, Tensor):
        return {i: _dimension(n, ranges, known) for i, n in enumerate(value.shape)}
    return torch.export.Dim.DYNAMIC if isinstance(value, torch.SymInt) else None


def _dimension(n: Any, ranges: Any, known: dict[Any, Any]) -> Any:
    if isinstance(n, int):
        return torch.export.Dim.STATIC
    symbol = n.node.expr
    if symbol not in known:
        bounds = ranges.get(symbol)
        if not symbol.is_symbol or bounds is None:
            known[symbol] = torch.export.Dim.AUTO
        else:
            highest = {"max": int(bounds.upper)} if bounds.upper.is_Integer and bounds.upper < 2**31 else {}
            known[symbol] = torch.export.Dim(str(symbol), min=int(bounds.lower), **highest)
    return known[symbol]


def rewrite(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    left: list[str] | None = None,
    *,
    compiled: bool = False,
    products: bool = False,
) -> int:
    """Fuse the blocks in a graph, which will run under the autocast of the moment; how many there were. A graph that
    cannot be followed is left as it is. left: as in `fuse_exported`. compiled: ops are left to the compiler that comes
    next where it makes faster code of them. products: fuse those with gates of any kind by themselves, too; a compiler
    makes them part of the pass before or behind."""
    left = [] if left is None else left
    device = next((t.device.type for t in inputs if isinstance(t, Tensor)), "cpu")
    of_autocast = device if torch.amp.is_autocast_available(device) else "cpu"
    enabled = torch.is_autocast_enabled(of_autocast)
    dtypes = {t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point()}
    skipped = {
        function
        for function, op in _OPS.items()
        if compiled and not enabled and all(backends.is_left_to_compilers(op, device, dtype) for dtype in dtypes)
    }
    if not products:
        skipped.add(calls.scale_by_gate)
    if compiled and device == "cpu":  # whose passes a pool and a product by themselves would break in two
        skipped.add(calls.scale_by_channels)
    autocast = torch.autocast(of_autocast, enabled=enabled, dtype=torch.get_autocast_dtype(of_autocast))
    return in_its_own_context(lambda: _rewrite(module, inputs, autocast, left, skipped))


def _rewrite(
    module: fx.GraphModule, inputs: Sequence[Any], autocast: torch.autocast, left: list[str], skipped: set[Callable]
) -> int:
    for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
        if not node.users:  # such as the indices of a maximum, which would keep it, and what it reads
            module.graph.erase_node(node)
    try:
        seen = follow(module, inputs, autocast)
    except Exception as error:
        left.append(f"a graph is left as it is: {type(error).__name__}: {error}")
        logger.info(left[-1])
        return 0
    trial = Trial(seen)
    count = 0
    for node in reversed(list(module.graph.nodes)):
        if node in seen.values:  # no longer so for what a block has replaced
            try:
                count += _replace(seen, trial, node, left, skipped)
            except Exception as error:
                left.append(f"{node} is left as it is: {type(error).__name__}: {error}")
                logger.warning(left[-1])
    left += [
        f"{node} multiplies a map by a gate, in a form that is not fused in graphs"
        for node in module.graph.nodes
        if _is_gated(seen, node) and not any(line.startswith(f"{node} is") for line in left)
    ]
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _is_gated(seen: Followed, node: fx.Node) -> bool:
    """Whether it is the product of a map and what a function of gates makes of an input, one number along some axes."""
    if node not in seen.values or node.target not in _PRODUCTS:
        return False
    for x, gate in _factors(seen, node):
        of, shape = seen.values[gate], seen.values[node].shape
        smaller = len(of.shape) == len(shape) > 2 and of.shape != shape == seen.values[x].shape
        if smaller and of.shape[0] == shape[0] and max(of.shape[1:]) > 1 and of.node.op != "softmax":
            return _is_of_gates(seen, gate) and _is_of_input(gate)
    return False


def _is_of_gates(seen: Followed, gate: fx.Node) -> bool:
    """Whether it is a function of gates, or is made of one number a sample and channel over another, as response norms
    have it: no number over a count, which is a mean."""
    of = seen.values[gate]
    if is_bounded(of):
        return True
    most, waiting, known = math.prod(of.shape), [gate], {gate}
    while waiting:
        node = waiting.pop()
        if node.target in _QUOTIENTS and all(isinstance(a, fx.Node) for a in node.args[:2]):
            return True
        small = (n for n in node.all_input_nodes if n in seen.values and math.prod(seen.values[n].shape) <= most)
        new = [n for n in small if n not in known and n.op != "placeholder"]
        known.update(new)
        waiting += new
    return False


def _is_of_input(node: fx.Node) -> bool:
    """Whether it is computed from an input of the graph."""
    waiting, known = [node], set()
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in known:
            known.add(node)
            waiting += node.all_input_nodes
    return False


@dataclass
class Found:
    """A block: the map it reads, and the call that computes it.

    tensors: names of arguments -> canonical values; one that is a dictionary of them, or a tuple, is passed as such.
    around: whether the function takes a BatchNorm before and a sum after it. maps: as tensors; the graph computes them.
    unseen: arguments for parameters that are read and make no difference, such as the bias of a softmax's logits.
    """

    function: Callable
    x: Node
    tensors: dict[str, Any]
    options: dict[str, Any]
    around: bool = True
    maps: dict[str, Node] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()


def _replace(seen: Followed, trial: Trial, last: fx.Node, left: list[str], skipped: set[Callable]) -> bool:
    value = seen.values[last]
    if not last.users or any(seen.values.get(n) == value for n in last.all_input_nodes):
        return False  # a copy in another layout, which is wanted
    products = value.node.op == "maximum" or (
        value.node.op == "poly" and (any(len(f) > 1 for _, f in value.node.attrs) or _attends(value.node))
    )
    candidates = [_contexts(seen, value)]
    if products and len(value.shape) in (3, 4, 5):
        candidates += [_matches(seen, value) if is_whole(value) else iter(()), _criss_crosses(seen, value)]
    reason = ""
    for found in itertools.chain(*candidates):
        if found.function in skipped:
            # Of a channel gate, alone or in CBAM, the compiler gets the plain formula: its excitation is products of
            # matrices, which cost less than convolutions of one position, above all in backward.
            if found.function is not functional.channel_gate or found.options.get("layer", "dense") != "dense":
                continue
            found = replace(found, function=reference.channel_gate, around=False)
        for before, after in ((True, True), (False, True), (True, False), (False, False)):
            if found.around or not (before or after):
                why = _try(seen, trial, last, found, before, after)
                if why is None:
                    return True
                reason = reason or f"{found.function.__name__}: {why}" if why else reason
    if not reason and calls.scale_by_channels not in skipped and last.target in _PRODUCTS:
        why = _gate_of_own_layers(seen, trial, last)
        alone = why == "" and calls.scale_by_gate not in skipped
        if why is None or (alone and _product_alone(seen, trial, last)):
            return True
        reason = why
    if not reason and functional.select_with not in skipped:
        why = _selection(seen, trial, last)
        if why is None:
            return True
        reason = why
    if reason:
        left.append(f"{last} is no block that is known, though it looks like one: {reason}")
        logger.warning(left[-1])
    return False


def _try(seen: Followed, trial: Trial, last: fx.Node, found: Found, before: bool, after: bool) -> str | None:
    """Put a block's call into the graph, with what stands before and after it; or why not, "" where there is nothing
    to be said."""
    tensors: Any = fx.node.map_aggregate(found.tensors, lambda n: seen.leaf(n) if isinstance(n, Node) else n)
    leaves: list[Any] = [seen.leaf(n) for n in tree_leaves(found.tensors) if isinstance(n, Node)]
    if found.maps:
        computed = {name: next(reversed(seen.holders(n, last)), None) for name, n in found.maps.items()}
        tensors, leaves = {**tensors, **computed}, [*leaves, *computed.values()]
    norm = _normalised(seen, last, found.x) if before else None
    end, options = _epilogue(seen, last) if after else (last, {})
    if None in leaves or (before and norm is None) or (after and end is last):
        return ""
    around = [options["residual"]] if "residual" in options else []
    if norm is not None:
        around += [norm.x, *(t for t in norm.tensors if t is not None)]
    for x in reversed(seen.holders(found.x, last)):
        unseen = _others(seen, end, {x, *leaves}) if found.unseen else []
        block = region(seen, end, (*leaves, *unseen, *around, *((x,) if norm is None else ())))
        if block is None or (norm is not None and x not in block.gone) or _is_counted_elsewhere(seen, block):
            continue
        if len(unseen) > len(found.unseen) or _has_readers(seen, block):
            continue
        given = _with_unseen(tensors, dict(zip(found.unseen, unseen, strict=False)))
        if _is_typed(seen, block, given, x if norm is None else norm.x, options.get("residual")):
            return _insert(seen, trial, block, x, norm, found.function, {**given, **found.options, **options})
    return ""


def _has_readers(seen: Followed, block: Region) -> bool:
    """Whether an attention's weights are read outside too: then they are written all the same."""
    return any(n not in block.gone and n in seen.values and seen.values[n].node.op == "softmax" for n in block.nodes)


def _with_unseen(tensors: dict[str, Any], unseen: dict[str, fx.Node]) -> dict[str, Any]:
    return {"tensors": {**tensors["tensors"], **unseen}} if "tensors" in tensors else {**tensors, **unseen}


def _others(seen: Followed, end: fx.Node, stops: set[fx.Node]) -> list[fx.Node]:
    """The tensors of the graph that a node is computed from beside these, as from the bias of a softmax's logits."""
    found: dict[fx.Node, None] = {}
    waiting, known = [end], set(stops)
    while waiting:
        node = waiting.pop()
        if node in known or is_number(seen.results.get(node)):
            continue
        known.add(node)
        if node.op in ("placeholder", "get_attr"):
            found[node] = None
        waiting += node.all_input_nodes
    return list(found)


# A gate that the graph's own layers make of the map's pools


def _gate_of_own_layers(seen: Followed, trial: Trial, last: fx.Node) -> str | None:
    """Fuse the pools of a map and its product with a gate, around the layers between; why not, or "" where a product is
    none of that."""
    for x, gate in _factors(seen, last):
        value, rank = seen.values[x], len(seen.values[x].shape) - 2
        kind = kind_of_gate(seen.values[gate], rank, samples=value.shape[0]) if is_whole(value) else None
        if kind == "channels" and value.shape == seen.values[last].shape:
            block = _private(seen, last, x)
            leaves = [] if block is None else [n for n in block.stops if n is not x]
            if block is None or any(n.op not in ("placeholder", "get_attr") for n in leaves):
                continue
            if any(n.name in seen.subclasses for n in block.stops):
                continue
            if not leaves and not is_bounded(seen.values[gate]):
                continue  # neither layers nor a function of gates
            if not _is_counted_elsewhere(seen, block) and _is_typed(seen, block, leaves, x, None):
                return _put_around(seen, trial, block, x, gate)
    return ""


def _product_alone(seen: Followed, trial: Trial, last: fx.Node) -> bool:
    """Fuse the product of a map and a gate a channel or a position that is made in any other way, as of another map."""
    for x, gate in _factors(seen, last):
        value, of = seen.values[x], seen.values[gate]
        if not is_whole(value) or value.shape != seen.values[last].shape or len(value.shape) < 3:
            continue
        kind = kind_of_gate(of, len(value.shape) - 2, samples=value.shape[0])
        if kind is None or (kind == "positions" and value.shape[1] == 1) or min(value.shape[2:]) == 1:
            continue
        if not _is_of_gates(seen, gate) or of.node.op == "softmax":  # the weights of a mean
            continue
        block = region(seen, last, (x, gate))
        if block is None or any(n.name in seen.subclasses for n in block.stops):
            continue
        if not _is_typed(seen, block, [gate], x, None):
            continue
        seen.other_sizes()  # while there is nothing new in the graph
        with last.graph.inserting_before(last):
            product = last.graph.call_function(calls.scale_by_gate, (x, gate))
        if _finish(seen, trial, block, x, [product]) is None:
            return True
    return False


def _factors(seen: Followed, product: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Its factors, either way round: what may be a map, and what may be its gate, as it was before it was expanded."""
    for x, gate in (product.args, product.args[::-1]) if len(product.args) == 2 and not product.kwargs else ():
        if isinstance(x, fx.Node) and isinstance(gate, fx.Node) and {x, gate} <= seen.values.keys():
            yield x, _narrow(seen, gate)


def _narrow(seen: Followed, node: fx.Node) -> fx.Node:
    """What was expanded, of as many dimensions."""
    for source in node.all_input_nodes[:1]:
        value, before = seen.values[node], seen.values.get(source)
        if before is not None and before.node is value.node and len(before.layout) == len(value.layout):
            bare = tuple(() if isinstance(e, Spread) else e for e in value.layout)
            return source if before.layout == bare != value.layout else node
    return node


def _private(seen: Followed, last: fx.Node, *maps: fx.Node) -> Region | None:
    """What a node computes from maps and whatever else that nobody else sees; None where there is more to it."""
    inside, stops = {last}, set(maps)
    waiting = set(last.all_input_nodes) - stops
    while waiting:
        node = max(waiting)  # behind all whose users are not known yet
        waiting.remove(node)
        if is_number(seen.results.get(node)):
            continue
        if node.op in ("call_function", "call_method") and all(u in inside or _is_a_size(seen, u) for u in node.users):
            inside.add(node)
            waiting |= set(node.all_input_nodes) - stops - inside
        else:
            stops.add(node)
        if len(inside) > MOST_NODES:
            return None
    block = region(seen, last, stops)
    return block if block is not None and set(block.nodes) == block.gone else None


def _is_a_size(seen: Followed, node: fx.Node) -> bool:
    result = seen.results.get(node)
    return node in seen.results and (is_number(result) or isinstance(result, torch.Size))


def _put_around(seen: Followed, trial: Trial, block: Region, x: fx.Node, gate: fx.Node) -> str | None:
    """Pools by `squeeze`, what is behind them once more, and the product by `scale`."""
    graph, source, rank = block.end.graph, seen.values[x].node, len(seen.values[x].shape) - 2
    of_x: set[fx.Node] = {x}
    pools: dict[fx.Node, calls.Pool] = {}
    behind: set[fx.Node] = set()
    kept: set[fx.Node] = set()  # of parameters alone
    for node in block.nodes[:-1]:
        inputs = set(node.all_input_nodes)
        found = None if inputs & (behind | pools.keys()) else _pool_in(seen, node, source, rank)
        if found is not None:
            pools[node] = found
        elif inputs & (behind | pools.keys()):
            shaped = {x} if node.target in _AS_OTHERS else set()
            if (inputs & of_x) - behind - pools.keys() - shaped:
                return ""  # computed from the map itself, too
            behind.add(node)
        elif not inputs & of_x:
            kept.add(node)
        if inputs & of_x:
            of_x.add(node)
    if not pools or gate not in behind | pools.keys():
        return ""
    copies: dict[fx.Node, fx.Node] = {}  # by what they have the place of
    with graph.inserting_before(block.end):
        for node in block.nodes:
            if node in pools:
                copies[node] = graph.call_function(pools[node], (x,))
            elif node in behind:
                copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        product = graph.call_function(calls.scale_by_channels, (x, copies[gate]))
    places = {new: node for node, new in copies.items()}
    return _finish(seen, trial, block, x, [*copies.values(), product], sorted(kept), places)


#: Methods that ask another tensor for its shape alone.
_AS_OTHERS = {"expand_as", "view_as", "reshape_as"}


def _pool_in(seen: Followed, node: fx.Node, x: Node, rank: int) -> calls.Pool | None:
    """The pool of a map over all positions that a node is, with its channels second and nothing behind them."""
    value = seen.values.get(node)
    if value is None:
        return None
    pooled, total = value.node, False
    terms = pooled.terms if pooled.op == "poly" else []
    if len(terms) == 1 and len(terms[0][1]) == 1:
        ((factor, ((inner, _),)),) = terms
        total = inner.op == "mean" and inner.inputs[0] is x and factor == math.prod(x.sizes[a] for a in inner.attrs[0])
        pooled = inner if total else pooled
    space = tuple(range(len(x.sizes) - rank, len(x.sizes)))
    if pooled.op not in ("mean", "max") or pooled.inputs[0] is not x or pooled.attrs[0] != space:
        return None
    flat = len(value.shape) > 1 and all(n == 1 for n in value.shape[2:])
    if not flat or math.prod(value.shape[:2]) != math.prod(pooled.sizes):
        return None
    maximum = pooled.op == "max"
    return calls.Pool("max" if maximum else "avg", pooled.attrs[1] if maximum else "first", total, len(value.shape))


# A sum of branches by weights that the graph's own layers make of their mean


def _selection(seen: Followed, trial: Trial, last: fx.Node) -> str | None:
    """Fuse the mean of a sum of maps and their weighted sum, around the layers between; why not, or "" where a node is
    none of that."""
    found = weighted_sum(seen.values[last].node) if is_whole(seen.values[last]) else None
    if found is None or len(seen.values[last].shape) < 3:
        return ""
    whole = one_map(found.maps, 1 - (seen.values[last].shape[0] == 1))
    sources = found.maps if whole is None else [whole]
    reason = ""
    for before in (True, False):
        held = [next(reversed(seen.holders(source, last)), None) for source in sources]
        norms = [_normalised(seen, last, source) if before else None for source in sources]
        if None in held or (before and (None in norms or len({n.activation for n in norms if n}) > 1)):
            continue
        maps = [h if n is None else n.x for h, n in zip(held, norms, strict=True)]
        folded = [n for n in norms if n is not None]
        why = _select(seen, trial, last, found, maps, folded, None if whole is None else len(found.maps))
        if why is None:
            return None
        reason = reason or why
    return reason


def _select(
    seen: Followed,
    trial: Trial,
    last: fx.Node,
    found: Weighted,
    maps: list[Any],
    norms: list[_Norm],
    paths: int | None,
) -> str | None:
    block = _private(seen, last, *maps)
    held = [n for n in block.nodes if n in seen.values] if block is not None else []
    means = [n for n in held if seen.values[n].node is found.descriptor and _place(seen.values[n]) is not None]
    weights = [n for n in held if seen.values[n].node is found.softmax and branch_dimension(seen.values[n]) is not None]
    if block is None or not means or not weights:
        return ""
    own, read = _between(seen, means[0], weights[0])
    normed = {t for n in norms for t in n.tensors if t is not None}
    tensors = [n for n in read if not is_number(seen.results.get(n))]
    if set(read) & set(block.nodes) or set(tensors) & set(maps) or any(n.name in seen.subclasses for n in block.stops):
        return ""
    if any(n.op not in ("placeholder", "get_attr") for n in (*tensors, *normed)):
        return ""
    if _is_counted_elsewhere(seen, block) or not all(_is_typed(seen, block, tensors, x, None) for x in maps):
        return ""
    of_mean, of_weights = seen.values[means[0]], seen.values[weights[0]]
    place, branch = _place(of_mean), branch_dimension(of_weights)
    assert place is not None and branch is not None
    activation = norms[0].activation if norms else "identity"
    call = calls.Selection(_module_of(own, means[0], read), len(of_mean.shape), place, branch, paths, activation)
    seen.other_sizes()  # while there is nothing new in the graph
    graph = last.graph
    with graph.inserting_before(last):
        new = [graph.call_function(folded_affine, (*n.tensors, n.eps)) for n in norms]
        new.append(graph.call_function(call, (maps, read, list(new))))
    return _finish(seen, trial, block, maps[0], new)


def _place(mean: Value) -> int | None:
    """The dimension of its channels, where the others are samples, first, or of size one."""
    (place,) = [i for i, entry in enumerate(mean.layout) if entry == (len(mean.node.sizes) - 1,)] or [0]
    others = [n for i, n in enumerate(mean.shape) if i not in (0, place)]
    return place if place > 0 and all(n == 1 for n in others) else None


def _between(seen: Followed, first: fx.Node, last: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that compute one from another, and what else they read."""
    own: set[fx.Node] = set()
    read: dict[fx.Node, None] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node is first or node in own or node in read:
            continue
        if node.op in ("placeholder", "get_attr") or is_number(seen.results.get(node)):
            read[node] = None
            continue
        own.add(node)
        waiting += node.all_input_nodes
    return sorted(own), sorted(read)


def _module_of(own: list[fx.Node], first: fx.Node, read: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in (first, *read)}
    for node in own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[own[-1]])
    return fx.GraphModule({}, graph)


def _insert(
    seen: Followed, trial: Trial, block: Region, x: fx.Node, norm: _Norm | None, function: Callable, arguments: Any
) -> str | None:
    """A call in place of a block; or why it is none."""
    seen.other_sizes()  # while there is nothing new in the graph
    graph = block.end.graph
    new: list[fx.Node] = []
    with graph.inserting_before(block.end):
        if norm is not None:
            new.append(graph.call_function(folded_affine, (*norm.tensors, norm.eps)))
            x, arguments["affine"], arguments["pre_activation"] = norm.x, new[-1], norm.activation
        new.append(graph.call_function(function, (x,), arguments))
    return _finish(seen, trial, block, x, new)


def _finish(
    seen: Followed,
    trial: Trial,
    block: Region,
    x: fx.Node,
    new: list[fx.Node],
    kept: Sequence[fx.Node] = (),
    places: dict[fx.Node, fx.Node] | None = None,
) -> str | None:
    """New nodes in place of a block, if they compute the same; or why they do not. kept: nodes of it that they need.
    places: of those that are copies, and what of."""
    end, graph = block.end, block.end.graph
    buffers = _statistics(seen, block)
    sixths = any(n.op == "act" and str(n.attrs[0]).startswith("hard_") for n in reached(seen.values[end].node))
    try:
        reason = trial.why_not(block, x, [*kept, *new], buffers, sixths, bool(places))
    except Exception as error:
        reason = f"the check raises {type(error).__name__}: {error}"
    if reason is not None:
        for node in reversed(new):
            graph.erase_node(node)
        return reason
    for node in () if places else block.sizes:
        known = node.meta.get("example_value")
        if isinstance(known, torch.SymFloat):
            float(known)  # an option that is now written into the graph: another one compiles anew
    for name in ("example_value", "val", "stack_trace", "nn_module_stack"):
        if name in end.meta:
            new[-1].meta[name] = end.meta[name]
    end.replace_all_uses_with(new[-1])
    gone = block.gone - set(kept)
    seen.replace(end, new, gone, places)
    for node in sorted(gone, reverse=True):
        graph.erase_node(node)
    return None


def _statistics(seen: Followed, block: Region, live: bool = False) -> dict[fx.Node, bool]:
    """The running statistics that a block reads, and whether they are variances. live: those that are written."""
    given = {seen.values[s].node: s for s in block.stops}
    norms = [n for n in reached(seen.values[block.end].node) if n.op == "batch_norm" and n.attrs[2][2:] == (True, True)]
    found = [pair for n in norms if n.attrs[1] or not live for pair in zip(n.inputs[-2:], (False, True), strict=True)]
    return {given[n]: variance for n, variance in found if n in given}


def _is_counted_elsewhere(seen: Followed, block: Region) -> bool:
    """Whether a BatchNorm in training is used outside too, before the end: its statistics are then written in turns."""
    written = _statistics(seen, block, live=True)
    return any(user < block.end and user not in block.gone for s in written for user in s.users)


# Which block


#: Modules whose form says how large the map is: they divide by a number of positions, or split what they put together.
_SIZED = ("CoordinateAttention", "SimAM")
#: Modules that are products of a map; the others are sums with an attention.
_GATES = ("BAM", "SCSE", "TripletAttention", "CoordinateAttention", "SimAM")


@functools.cache
def _variant(template: Template, training: bool, batch: int, space: tuple[int, ...]) -> Template | None:
    """A template for another map; in training only where it has a BatchNorm."""
    variant = replace(template, training=training, batch=batch, space=space)
    try:
        norm = any(n.op == "batch_norm" for n in reached(variant.output))
    except Exception:  # it raises for the statistics of one value
        return None
    return variant if norm or not training else None


def _templates(kind: str, shape: tuple[int, ...], modes: set[bool], wanted: Callable) -> Iterator[Template]:
    """For maps of a shape, of which a single sample has an axis less. modes: whether they are in training."""
    batch = 1 if shape[0] == 1 else BATCH
    for template in getattr(templates, kind)(len(shape) - 2):
        if wanted(template):  # only then is it captured
            for training in modes:
                sized = template.name in _SIZED or template.options.get("mode") == "dot"
                space = shape[2:] if sized else SPACE
                variant = _variant(template, training, batch, space)
                if variant is not None:
                    yield variant


def _matches(seen: Followed, value: Value) -> Iterator[Found]:
    node, shape = value.node, value.shape
    inside = reached(node)
    modes = {False} | {n.attrs[1] for n in inside if n.op == "batch_norm"}
    maxima = any(n.op == "max" for n in inside)

    def pooled(template: Template) -> bool:
        return maxima or template.options["pool"] == "avg"

    def channel_gates(of: Node) -> Iterator[tuple[Template, Match]]:
        for template in _templates("channel_gates", shape, {False}, pooled):
            for match in unify(template.output, of, seen.graph, Match()):
                if _plain(match):
                    yield template, match

    if node.op == "poly" and maxima:
        for template in _templates("spatial_gates", shape, modes, lambda template: True):
            for match in unify(template.output, node, seen.graph, Match()):
                yield from _spatial(template, match, channel_gates)
    if node.op == "poly":
        for template, match in channel_gates(node):
            yield Found(functional.channel_gate, match.nodes[template.input], *_channel(template, match))
    for template in _templates("modules", shape, modes, lambda template: _may_be(template.name, node)):
        for match in unify(template.output, node, seen.graph, Match()):
            found = _block(template, match)
            if found is not None:
                yield found
    for template in _templates("self_attentions", shape, {False}, lambda template: _attends(node)):
        for match in unify(template.output, node, seen.graph, Match()):
            yield _self_attention(template, match)


def _criss_crosses(seen: Followed, value: Value) -> Iterator[Found]:
    """CCNet's block, or its attention alone, of queries, keys and values that are made in any way."""
    if value.node.op != "poly" or len(value.shape) != 4:
        return
    for found in filter(is_whole, crossed(seen.graph, value)):
        for template in _templates("criss_crosses", value.shape, {False}, lambda template: True):
            for match in unify(crossed_template(template), found.node, seen.graph, Match()):
                yield _self_attention(template, match)
        if found.node.op == "criss_cross":
            query, key, attended = found.node.inputs
            maps = {"key": key, "value": attended}
            yield Found(functional.criss_cross_attention, query, {}, {}, around=False, maps=maps)


def _contexts(seen: Followed, value: Value) -> Iterator[Found]:
    """What global context begins with; all that follows is the graph's own."""
    found = context_of(seen.graph, value)
    if found is not None:
        options = {"place": found.place, "rank": len(value.shape)}
        yield Found(calls.context_pool, found.x, {"weight": found.weight}, options, around=False, unseen=("bias",))


#: Steps from the sum at the end of an attention to the softmax or the product in it.
_STEPS = 8


def _attends(node: Node) -> bool:
    """Whether a node is a sum with what is a softmax or a product of maps not far from it."""
    if node.op != "poly":
        return False
    row = [node]
    for _ in range(_STEPS):
        row = [n for n in dict.fromkeys(n for above in row for n in above.inputs) if n.op != "leaf"]
        if any(n.op in ("softmax", "product") for n in row):
            return True
    return False


def _may_be(name: str, node: Node) -> bool:
    """Whether a node has the outer shape of a block; there are many templates, which take time to capture."""
    if node.op != "poly":
        return name == "SCSE"
    if name not in _GATES:
        return _attends(node)
    terms = [factors for _, factors in node.terms]
    least = min(map(len, terms))
    if name == "BAM":
        gates = [n.inputs[0] for factors in terms for n, _ in factors if n.op == "act"]
        return len(terms) > 1 and any(g.op == "poly" and any(len(f) > 1 for _, f in g.terms) for g in gates)
    if name in ("SCSE", "TripletAttention"):
        return len(terms) > 1 and least > 1
    return least > {"CoordinateAttention": 2, "SimAM": 1}[name]


def _plain(match: Match) -> bool:
    """Whether the convolutions are neither dilated nor grouped, and odd."""
    convs = [c.options for t, c in match.nodes.items() if t.op == "conv"]
    return all(set(dilation) == {1} and groups == 1 and _odd(kernel) for dilation, groups, kernel in convs)


def _odd(kernel: tuple[int, ...]) -> bool:
    return all(k % 2 for k in kernel)


def _channel(template: Template, match: Match) -> tuple[dict[str, Node], dict[str, Any]]:
    options = {**template.options, "gate": match.options["gate"]}
    options["activation"] = match.options.get("activation", "identity")
    return _leaves(match), options


def _leaves(match: Match) -> dict[str, Node]:
    return {t.name: c for t, c in match.nodes.items() if t.op == "leaf"}


def _spatial(template: Template, match: Match, channel_gates: Callable) -> Iterator[Found]:
    """A spatial gate, or both gates where it reads the result of a channel gate."""
    gated = match.nodes.get(template.input)
    if gated is None or not _plain(match):
        return
    tensors: dict[str, Any] = {
        name.rpartition(".")[2]: node for name, node in _leaves(match).items() if ".bn." not in name
    }
    options = {k: template.options[k] for k in ("order", "ties")} | {"gate": match.options["gate"]}
    norm: dict[str, Any] = {}
    if template.options["norm"]:
        (layer,) = (c for t, c in match.nodes.items() if t.op == "batch_norm")
        tensors["norm"] = layer.inputs[1:]
        eps, momentum = layer.options
        norm = {"training": template.training, "eps": eps, "momentum": momentum}
    if gated.op == "poly":
        both: Callable = calls.cbam_with_batch_norm if norm else functional.cbam
        for inner, second in channel_gates(gated):
            yield Found(both, second.nodes[inner.input], *_both(tensors, options, inner, second, norm))
    function: Callable = calls.spatial_gate_with_batch_norm if norm else functional.spatial_gate
    yield Found(function, gated, tensors, {**options, **norm})


def _both(
    spatial: dict[str, Any], options: dict[str, Any], inner: Template, match: Match, norm: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `cbam`: those of its gates under other names."""
    tensors, channel = _channel(inner, match)
    renamed = {f"spatial_{k}" if k in ("weight", "bias") else k: v for k, v in spatial.items()}
    return {**tensors, **renamed}, {
        **{k: v for k, v in channel.items() if k in ("pool", "layer", "activation")},
        "channel_ties": channel.get("ties", "first"),
        "channel_gate": channel["gate"],
        "order": options["order"],
        "spatial_ties": options["ties"],
        "spatial_gate": options["gate"],
        **norm,
    }


def _block(template: Template, match: Match) -> Found | None:
    """A module of `fused_attn.nn` that takes the tensors of the graph."""
    x = match.nodes[template.input]
    layers = {
        t.inputs[1].name.removesuffix(".weight"): c.options
        for t, c in match.nodes.items()
        if t.op in ("conv", "batch_norm")
    }
    if template.name == "TripletAttention" and not _plain(match):
        return None
    if not all(_odd(c.options[2]) for t, c in match.nodes.items() if t.op == "conv"):
        return None
    options = tuple(sorted({**template.options, **match.options}.items()))
    channels = x.sizes[1 - (template.batch == 1)]
    scale = scale_of(match) if template.name == "NonLocal" else None
    call = _module(template.name, options, tuple(sorted(layers.items())), channels, template.training, scale)
    unseen: tuple[str, ...] = ()
    if template.name == "DoubleAttention":
        unseen = ("convB.bias",) if template.options["distribute"] == "channels" else ("convB.bias", "convV.bias")
    return Found(call, x, {"tensors": _leaves(match)}, {}, around=False, unseen=unseen)


def _self_attention(template: Template, match: Match) -> Found:
    """A block with a parameter of its own beside its layers."""
    leaves = _leaves(match)
    options: dict[str, Any] = {"bare": ()}
    scale = None
    if template.name != "ChannelSelfAttention":
        layers = ("query_conv", "key_conv", "value_conv")
        options["bare"] = tuple(name for name in layers if f"{name}.bias" not in leaves)
    if template.name == "PositionAttention":
        options["rank"] = template.rank
        scale = scale_of(match)
    elif template.name == "CrissCrossAttention":
        options["recurrence"] = 1
    call = _module(template.name, tuple(sorted(options.items())), (), templates.CHANNELS, False, scale)
    return Found(call, match.nodes[template.input], {"tensors": leaves}, {}, around=False)


@functools.cache
def _module(
    name: str, options: tuple, layers: tuple, channels: int, training: bool, scale: float | None = None
) -> calls.Block:
    """scale: of the products in an attention's softmax; None: it has none."""
    chosen = dict(options)
    bare = chosen.pop("bare")
    with torch.device("meta"):
        module: Any = templates.without_bias(
            getattr(fused_nn, name), bare, channels=templates.CHANNELS, **chosen
        ).train(training)
    module.channels = channels if name in ("SCSE", "DoubleAttention", "ExternalAttention") else None
    if name == "NonLocal":
        module.scale = scale
    elif scale is not None:
        module._position_attention = functools.partial(functional.position_attention, scale=scale)
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.num_batches_tracked = None  # the graph counts them itself
    for path, given in layers:
        layer: Any = module.get_submodule(path)
        if len(given) == 2:
            layer.eps, layer.momentum = given
        else:
            layer.dilation, layer.groups, layer.kernel_size = given
            layer.padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return calls.Block(module)


def _is_typed(seen: Followed, block: Region, tensors: Any, x: fx.Node, residual: fx.Node | None) -> bool:
    """Whether the fused call takes tensors of these dtypes, and gives the dtype that the nodes give; they round to none
    of less precision on the way."""
    given = [x, block.end] if residual is None else [x, block.end, residual]
    if seen.modes[block.end][1] is None:  # under autocast parameters are read as they are
        given += [n for n in tree_leaves(tensors) if isinstance(n, fx.Node)]
        own = [(n, d) for n in block.nodes if (d := seen.dtype(n)) is not None and d.is_floating_point]
        if any(torch.finfo(d).eps > torch.finfo(own[-1][1]).eps and _varies(seen, n) for n, d in own):
            return False
    return len({seen.dtype(n) for n in given}) == 1


def _varies(seen: Followed, node: fx.Node) -> bool:
    """Whether it is more than numbers that the code has written down."""
    return node not in seen.values or any(n.op not in ("poly", "diagonal") for n in reached(seen.values[node].node))


# What stands around it


def _epilogue(seen: Followed, last: fx.Node) -> tuple[fx.Node, dict[str, Any]]:
    """The end of a block with the sum and the activation that follow it, and the arguments that stand for them."""
    end, found = last, {}
    added = _sum_after(seen, end)
    if added is not None:
        end, found["residual"] = added
    user = _only_user(end)
    if user is not None and user in seen.values and end in seen.values and len(user.all_input_nodes) == 1:
        value, before = seen.values[user], seen.values[end]
        of_end = value.node.op == "act" and value == Value(value.node, before.layout)
        if of_end and value.node.inputs[0] is before.node and value.node.attrs[0] in ACTIVATIONS:
            end, found["post_activation"] = user, value.node.attrs[0]
    return end, found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sum_after(seen: Followed, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum with another map of the same shape that is the only use of a node, and that map."""
    user = _only_user(node)
    if user is None or user not in seen.values:
        return None
    method = user.op == "call_method" and user.target in ("add", "add_")
    if not (method or (user.op == "call_function" and user.target in _ADDS)) or user.kwargs or len(user.args) != 2:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or other not in seen.values:
        return None
    return (user, other) if seen.values[other].shape == seen.values[node].shape else None


@dataclass
class _Norm:
    x: fx.Node
    tensors: tuple[fx.Node | None, ...]
    eps: float
    activation: str


def _normalised(seen: Followed, last: fx.Node, source: Node) -> _Norm | None:
    """Where the map is an eval BatchNorm's, perhaps activated: what that was computed from, and the BatchNorm."""
    activation, norm = "identity", source
    if norm.op == "act" and norm.attrs[0] in ACTIVATIONS:
        activation, norm = norm.attrs[0], norm.inputs[0]
    if norm.op != "batch_norm" or norm.attrs[1]:
        return None
    axis, _, present = norm.attrs
    below = seen.holders(norm.inputs[0], last)
    if not below or present[2:] != (True, True) or axis != 1 - (seen.results[below[-1]].shape[0] == 1):
        return None
    leaves = iter([seen.leaf(n) for n in norm.inputs[1:]])
    tensors = [next(leaves) if there else None for there in present]
    if any(there and t is None for there, t in zip(present, tensors, strict=True)):
        return None
    return _Norm(below[-1], tuple(tensors), norm.options[0], activation)
