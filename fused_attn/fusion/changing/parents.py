"""Blocks that are no modules: `out = x * self.ca(x); out = out * self.sa(out)` in a parent's forward, whether the gates
are modules or are computed there too.

The forward is traced (`reading.trace`) in both modes, products of a map and its gate are replaced in its graph, and
what that gives is compared with the forward (`reading.rewritten`). It is made once for all equal parents, from paths
and options: the layers that it runs are those of the module that it is called for.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ... import functional, reference
from ...backends import is_ordinary, is_small
from ...nn.small import up_to
from ...reference.block_attention import CONVOLUTIONS
from ..hosts.registry import known_class
from ..reading.canonical import Spread, Value
from ..reading.check import TOLERANCE, TOLERANCE_OF_SIXTHS
from ..reading.find import Found
from ..reading.layers import calls_itself
from ..reading.nodes import name_of
from ..reading.products import products_left
from ..reading.reads import Reads, Unstored, is_plain, is_torch, multiplies, reads_of
from ..reading.recognise import UNKNOWN, has_own_forward, is_of_somebody, names_a_gate, once, outcome_of
from ..reading.rewritten import check_rewritten
from ..reading.spans import (
    MOST_NODES,
    Pool,
    Span,
    is_bounded,
    is_size,
    kind_of_gate,
    outcome_of_span,
    pool_of,
    strip_of,
    values_in,
)
from ..reading.trace import (
    IN_PLACE,
    Option,
    Rank,
    Untraceable,
    is_same_code,
    trace_in_mode,
    trace_with_option,
    unpacked,
)
from ..reading.twin import NoTwin
from ..recipes.along import GateAlong
from ..recipes.describe import describe
from ..recipes.names import host_of
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, SpatialGate
from ..recipes.run import Unsuited, parameter_paths, parameters_of, run
from .two_maps import function_of, gated, is_gate, narrowed, shapes_in

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PRODUCTS = {operator.mul, torch.mul, torch.multiply, IN_PLACE["imul"]}
_PRODUCT_METHODS = {"mul", "mul_", "multiply", "multiply_"}
_SUMS: set[Any] = {operator.add, torch.add, "add"}
#: Layers whose output is in no one else's memory, and which do not write into their input.
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: What is said of a product with a gate an element; `explain` adds that small maps go without.
PIXEL_GATE = "its own layers, pixel gate"

_Single = ChannelGate | SpatialGate | CbamGate | OwnLayers


class _Looked(NamedTuple):
    """What is known of a forward: how it runs fused, and why what it multiplies by a gate, or some of it, does not."""

    found: OwnLayers | None = None
    left: str | None = None


_known: weakref.WeakKeyDictionary[type, dict[Hashable, _Looked]] = weakref.WeakKeyDictionary()


def composite_of(block: nn.Module) -> OwnLayers | None:
    """How a module runs with the gates in its forward fused into their products; None: it has none, or its forward
    cannot be written anew."""
    return _look(block).found


def why_left(block: nn.Module) -> str | None:
    """Why a map that a module's forward multiplies by a gate is multiplied as it is written; None: there is none."""
    return _look(block).left


def _look(block: nn.Module) -> _Looked:
    if not (has_own_forward(block) or is_of_somebody(block)):
        return _Looked()
    gates = dict(_gates_of(block)) if has_own_forward(block) else {}
    cls = host_of(type(block))
    if len(gates) < 2 and not any(gates.values()) and not multiplies(cls):
        return _Looked()
    try:
        read = reads_of(block, most=sys.maxsize)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return _Looked()
    called = next(filter(calls_itself, block.modules()), None)
    if called is not None:
        return _unread(block, read, f"runs a {host_of(type(called)).__name__}, which has a __call__ of its own")
    if read.remark is not None:
        return _unread(block, read, read.remark)
    return once(
        _known,
        block,
        read,
        lambda: _without_stores(block, gates, read),
        failed=_Looked(),
        changed=lambda: _unread(block, read, "keeps state"),
        key=tuple(gates.items()),
    )


def _unread(block: nn.Module, read: Reads, why: str) -> _Looked:
    """Of a module that is not run, so that what it does can only be guessed."""
    return _Looked(None, why if names_a_gate(block, read) else None)


def _without_stores(block: nn.Module, gates: dict[str, bool], read: Reads) -> _Looked:
    unstored = Unstored(read.stores)
    with unstored:
        why: list[str] = []
        found = _rewritten(block, gates, why) if has_own_forward(block) else None
        left = _left(block, found, why)
        return _Looked(found if found is None or left is None else replace(found, left=left), left)
    return _unread(block, read, unstored.why)


def _left(block: nn.Module, found: OwnLayers | None, why: list[str]) -> str | None:
    """Why a product of a map and a gate runs as it is written. why: what kept the forward from being written anew."""
    if not multiplies(host_of(type(block))):
        return None
    products = products_left(block) if found is None else products_left(block, found.forward, found.rank)
    if products is None:
        return None
    reasons = [*(reason for reason in products if reason is not None), *why, UNKNOWN]
    return reasons[0] if products else None


def _gates_of(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """The gates among a module's children, its own or in containers: their paths, and whether they return their gate,
    and not the gated map."""
    for name, child in block.named_children():
        path = f"{prefix}{name}"
        if type(child) in _CONTAINERS:
            yield from _gates_of(child, f"{path}.")
        elif known_class(host_of(type(child))) is None:
            found = outcome_of(child).found
            if found is not None and found.kind in ("channel", "spatial"):
                yield path, found.mask


def _rewritten(block: nn.Module, gates: dict[str, bool], why: list[str]) -> OwnLayers | None:
    """With the numbers that its forward may be given beside the map. why: gets what keeps it from being found."""
    spans: dict[Hashable, Found | None] = {}
    found = _rewritten_with(block, gates, spans, why)
    parameters = list(inspect.signature(host_of(type(block)).forward).parameters.values())[2:]
    if found is None or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return found
    defaults = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and is_plain(p.default)}
    variants: list[tuple[Option, Forward]] = []
    for name in defaults if len(defaults) == len(parameters) else ():
        for value in _OPTIONS:
            option = Option(name, [])
            variant = _rewritten_with(block, gates, spans, [], option, value)
            if variant is not None and (variant.bypassed, variant.covers) == (found.bypassed, found.covers):
                variants.append((option, variant.forward))
    known = {option.name: defaults[option.name] for option, _ in variants}  # others are not its own to read
    return replace(found, forward=_with_options(found.forward, known, variants), options=tuple(known))


Forward = Callable[..., Any]

#: Such as the rates at which a residual branch is dropped.
_OPTIONS = (0.25, 0.0)


def _with_options(plain: Forward, defaults: dict[str, Any], variants: list[tuple[Option, Forward]]) -> Forward:
    """A forward for its defaults, and others for one number that is given beside the map."""
    if not defaults:
        return plain

    def forward(block: Any, x: Tensor, **options: Any) -> Any:
        others = {n: v for n, v in options.items() if type(v) is not type(defaults[n]) or v != defaults[n]}
        if not others:
            return plain(block, x)
        for option, variant in variants:
            value = others.get(option.name)
            if len(others) == 1 and type(value) is float and option.holds(value):
                return variant(block, x, **others)
        raise Unsuited(f"expected the defaults; got {', '.join(others)}")

    return forward


def _rewritten_with(
    block: nn.Module,
    gates: dict[str, bool],
    known: dict[Hashable, Found | None],
    why: list[str],
    option: Option | None = None,
    value: float = 0.0,
) -> OwnLayers | None:
    """For maps of any rank, or, of a forward that asks for that, of the first that it is found for. option: one that
    its forward is given, with this value; it gets what the forward asks of it."""
    inside = _excitations_of(block, gates)
    for entered, dims in itertools.product((set(), inside) if inside else (set(),), (4, 5, 3)):
        rank = Rank(dims)
        found = _rewritten_for(block, gates, entered, known, rank, why, option, value)
        if found is not None or (not rank.asked and entered == inside):
            return found
    return None


def _excitations_of(block: nn.Module, gates: dict[str, bool]) -> set[str]:
    """Paths of parts of somebody's that may return a gate of no known kind: they pool or have a sigmoid, and multiply
    nothing."""
    found = set()
    for path, part in block.named_modules():
        mine = has_own_forward(part) and part is not block and path not in gates
        gates_or_pools = any(type(child) in _POOLS or type(child) is nn.Sigmoid for child in part.children())
        if mine and gates_or_pools and not multiplies(host_of(type(part))):
            found.add(path)
    return found


def _rewritten_for(
    block: nn.Module,
    gates: dict[str, bool],
    entered: set[str],
    known: dict[Hashable, Found | None],
    assumed: Rank,
    why: list[str],
    option: Option | None,
    value: float,
) -> OwnLayers | None:
    given = {} if option is None else {option.name: value}
    guards: list[Any] = []

    def traced(training: bool) -> fx.Graph | None:
        """None where no graph says what the forward does in this mode: then it runs as it is written."""
        try:
            if option is None:
                return trace_in_mode(block, enters, training, assumed)
            graph, found = trace_with_option(block, enters, training, assumed, option.name, value)
        except Untraceable as error:
            why.append(str(error))
            return None
        guards.extend(found.guards)
        return graph

    def enters(path: str) -> bool:
        part = block.get_submodule(path)
        if type(part) is not nn.Sequential:
            return path in entered
        layers = [type(layer) for layer in part.children()]
        inside = any(p.startswith(f"{path}.") for p in (*gates, *entered))
        return inside or bool(layers) and (layers[0] in _POOLS or layers[-1] is nn.Sigmoid)

    try:
        graphs = [traced(training) for training in (False, True)]
    except NoTwin as error:
        why.append(str(error))
        return None
    evaluates, trains = graphs
    if evaluates is not None and trains is not None and is_same_code(evaluates, trains):
        graphs.pop()
    rewriters = [_Rewriter(block, gates, graph, known, assumed) for graph in graphs if graph is not None]
    modes = [rewriter.regions() for rewriter in rewriters]
    regions = max(modes, key=len, default=[])
    if not regions:
        return None
    every = [region for found in modes for region in found]
    covers = tuple(dict.fromkeys(path for region in every for path in region.covers))
    names = [name for name, _ in block.named_modules() if name]
    owned = {path for rewriter in rewriters for path in rewriter.owned}
    skipped = {n for n in names if n in owned or enters(n) or any(f"{n}.".startswith(f"{p}.") for p in covers)}
    remark = reads_of(block, map(block.get_submodule, skipped)).remark
    if remark is not None:
        why.append(remark)
        return None
    ranks = {region.rank for region in every} - {None} | ({assumed.dims} if assumed.asked else set())
    if len(ranks) > 1:
        why.append("its gates are of maps of different ranks")
        return None
    rank = next(iter(ranks), None)
    name = host_of(type(block)).__name__
    forward = _of_mode([_as_written if graph is None else _compiled(graph, name) for graph in graphs])
    tolerance = TOLERANCE_OF_SIXTHS if any(region.sixths for region in every) else TOLERANCE
    verdict = check_rewritten(block, forward, (4, 5, 3) if rank is None else (rank,), tolerance, **given)
    if verdict.why_not is not None:
        why.insert(0, verdict.why_not)
        return None
    if option is not None:
        option.guards.extend(guards)
    mode = ", in training" if evaluates is None else ", in evaluation" if trains is None else ""
    name = ", ".join(region.name for region in regions) + f" in its forward{mode}"
    if not verdict.differentiable:
        forward, name = _without_gradients(forward), f"{name}, where no gradients are asked for"
    functions = dict.fromkeys(f for region in every for f in region.functions)
    return OwnLayers(
        forward,
        name,
        tuple(sorted(functions, key="cbam".__ne__)),  # the main one first
        rank=rank,
        bypassed=tuple(n for n in names if n in skipped),
        covers=(*covers, *(p for p in sorted(entered) if any(c.startswith(f"{p}.") for c in covers))),
    )


def _as_written(block: Any, x: Tensor, **options: Any) -> Any:
    return host_of(type(block)).forward(block, x, **options)


def _compiled(graph: fx.Graph, name: str) -> Forward:
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {name}>", "exec"), space)
    made = space["forward"]

    def forward(block: Any, x: Tensor, **options: Any) -> Any:
        return made(block, block, x, **options)

    return forward


def _of_mode(forwards: list[Forward]) -> Forward:
    """Of those for evaluation and for training, if there are two."""
    if len(forwards) == 1:
        return forwards[0]
    evaluates, trains = forwards

    def forward(block: Any, x: Tensor, **options: Any) -> Any:
        return trains(block, x, **options) if block.training else evaluates(block, x, **options)

    return forward


def _without_gradients(forward: Forward) -> Forward:
    """For a module that writes over what its gradients need: then its own forward, which says so in its backward."""

    def without(block: Any, x: Tensor, **options: Any) -> Any:
        return (_as_written if torch.is_grad_enabled() else forward)(block, x, **options)

    return without


# Regions


class _Region(NamedTuple):
    """Nodes that are one block, or of which what reads and what writes the map is fused. covers: paths of the layers
    that do not run any more. sixths: whether its gradients have torch's sixths."""

    name: str
    functions: tuple[str, ...]
    covers: tuple[str, ...]
    rank: int | None
    sixths: bool


_FUNCTIONS = {ChannelGate: ("channel_gate",), SpatialGate: ("spatial_gate",), CbamGate: ("cbam",)}


def _function_of(recipe: _Single, as_written: Forward, last: bool = False) -> Callable[[nn.Module, Tensor], Tensor]:
    """The fused function of a recipe. as_written: what it stands for. last: the map has its channels last."""
    paths = parameter_paths(recipe)

    def run_fused(block: nn.Module, x: Tensor) -> Tensor:
        parameters = parameters_of(block, paths)
        if last:
            return run(block, recipe, parameters, x.movedim(-1, 1)).movedim(1, -1)
        return run(block, recipe, parameters, x)

    def fused_attention(block: nn.Module, x: Tensor) -> Tensor:
        if recipe.rank not in (None, x.dim()) or not is_ordinary(x) or (last and not x.is_contiguous()):
            return as_written(block, x)
        if torch.compiler.is_compiling():
            return run_fused(block, x)
        try:
            return run_fused(block, x)
        except (TypeError, ValueError):  # a map that the gates may take and the fused function does not
            return as_written(block, x)

    return fused_attention


def _pools_of(over: str, kind: str, ties: str, last: bool) -> Callable[[Tensor], Any]:
    """Over positions: means (B, C), maxima, or "avgmax" for both; over channels: maxima and means, (B, 2, ...); over
    one axis: means (B, C, H, 1) and (B, C, 1, W). last: of a map that has its channels last."""

    def pools_by(functions: Any, x: Tensor) -> Any:
        if over == "strips":
            return functions.axis_pool(x)
        return functions.squeeze(x, kind, ties=ties) if over == "positions" else functions.channel_pool(x, ties=ties)

    def fused_pools(x: Tensor) -> Any:
        x = x.movedim(-1, 1) if last else x
        try:
            return pools_by(functional if is_ordinary(x) else reference, x)
        except (TypeError, ValueError):
            return pools_by(reference, x)

    return fused_pools


def _one_of(pool: Pool, kind: str) -> Callable[[Any], Tensor]:
    """One of such pools, where there are two."""
    both = kind == "avgmax"

    def one_pool(pools: Any) -> Tensor:
        if pool.over == "channels":
            return pool.arrange(pools[:, int(pool.kind == "avg")])
        if pool.over in _STRIPS:
            return pool.arrange(pools[_STRIPS.index(pool.over)].flatten(2))
        return pool.arrange(pools[int(pool.kind == "max")] if both else pools)

    return one_pool


def fused_product(x: Tensor, gate: Tensor, of_channels: bool, last: bool) -> Tensor:
    """x * gate, one number a sample and channel, or a sample and position; also in the dtype that this has. last: x has
    its channels last; the function keeps its layout only where that is the usual one."""
    if last and x.is_contiguous():
        return fused_product(x.movedim(-1, 1), gate.movedim(-1, 1), of_channels, False).movedim(1, -1)
    if last or not is_ordinary(x) or not is_ordinary(gate) or torch.promote_types(x.dtype, gate.dtype) != x.dtype:
        return x * gate
    try:
        return functional.scale(x, gate.flatten(2)[:, :, 0] if of_channels else gate[:, :1])
    except (TypeError, ValueError):
        return x * gate


def gated_if_large(x: Tensor, gate: Tensor, widened: Tensor) -> Tensor:
    """x * widened, as `gated` has it; also for maps on which that is slower."""
    return x * widened if is_small(x) else gated(x, gate, widened)


_STRIPS = ("rows", "columns")


def fused_strips(x: Tensor, rows: Tensor | None, columns: Tensor | None, combine: str) -> Tensor:
    """A map times a gate a channel and row, one a channel and column, or both: their "product", or the sigmoid of their
    sum ("strips")."""
    gates = [gate for gate in (rows, columns) if gate is not None]
    if is_ordinary(x) and all(is_ordinary(g) and torch.promote_types(x.dtype, g.dtype) == x.dtype for g in gates):
        narrow = None if rows is None else rows[..., :1], None if columns is None else columns[..., :1, :]
        try:
            return functional.mixed_scale(x, rows=narrow[0], columns=narrow[1], combine=combine)
        except (TypeError, ValueError):  # maps that the product may take and the fused function does not
            pass
    if combine == "strips":
        return x * sum(gates).sigmoid()  # type: ignore[union-attr]
    for gate in gates:
        x = x * gate
    return x


#: Where a processor's caches hold the map and the gate, plain PyTorch's passes cost less than one call does.
_is_small_for_pixels = up_to(1 << 21, 1 << 22)


def fused_pixels(x: Tensor, logits: Tensor) -> Tensor:
    """x * sigmoid(logits), a number an element; also for what the fused function does not take."""
    fits = x.shape == logits.shape and torch.promote_types(x.dtype, logits.dtype) == x.dtype
    if _is_small_for_pixels(x) or not (fits and is_ordinary(x) and is_ordinary(logits)):
        return x * logits.sigmoid()
    try:
        return functional.pixel_gate(x, logits)
    except (TypeError, ValueError):
        return x * logits.sigmoid()


def _is_an_element(values: dict[fx.Node, Value], x: fx.Node, gate: fx.Node) -> bool:
    """Whether a gate has a number for each element of the map."""
    if x not in values or gate not in values or any(isinstance(e, Spread) for e in values[gate].layout):
        return False
    return values[gate].shape == values[x].shape


class _Product(NamedTuple):
    """A map that is gated. gate: None where a module returns the gated map. nodes: what is computed from the map for
    that, in the order of the graph, the last of which is the gated map. in_place: it is written into the map."""

    x: fx.Node
    gate: fx.Node | None
    nodes: tuple[fx.Node, ...]
    in_place: bool


class _Rewriter:
    """known: what spans of this block are, by their code."""

    def __init__(
        self,
        block: nn.Module,
        gates: dict[str, bool],
        graph: fx.Graph,
        known: dict[Hashable, Found | None],
        rank: Rank,
    ) -> None:
        self.block, self.gates, self.graph, self.known = block, gates, graph, known
        self.rank = rank
        self.plain = fx.Graph()  # as it was
        self.copies: dict[fx.Node, fx.Node] = {}
        self.plain.output(self.plain.graph_copy(graph, self.copies))
        self.made: set[fx.Node] = set()
        self.owned: set[str] = set()  # paths of layers whose output would have been written into
        self.first = next(iter(graph.nodes))

    def regions(self) -> list[_Region]:
        found: list[_Region] = []
        for node in list(self.graph.nodes):
            first = None if node._erased else self._product(node)
            if first is None:
                alone = None if node._erased else self._alone(node)
                found += [] if alone is None else [alone]
                continue
            region = None
            for row in (*self._rows(first), [first]):
                region = region or self._whole(row)
            if region is None and first.gate is not None:
                region = self._split(first, first.gate) or self._pixels(first, first.gate) or self._alone(node)
            if region is not None:
                found.append(region)
        return found

    def _product(self, node: fx.Node) -> _Product | None:
        if node.op == "call_module" and self.gates.get(str(node.target)) is False:
            x = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            return _Product(x, None, (node,), False) if isinstance(x, fx.Node) else None
        for x, gate, in_place in _factors(node):
            between = self._between(x, gate)
            if between is not None and any(map(self._may_gate, between)):
                return _Product(x, gate, (*between, node), in_place)
        return None

    def _second(self, first: _Product) -> _Product | None:
        """The only use of a product, if that is its product with another gate that is computed from the same map."""
        last = first.nodes[-1]
        for user in last.users if len(last.users) == 1 and not first.in_place else ():
            for x, gate, in_place in _factors(user):
                between = self._between(first.x, gate) if x is last else None
                if between is not None and last not in between:
                    return _Product(x, gate, (*between, user), in_place)
        return None

    def _between(self, x: fx.Node, gate: fx.Node) -> list[fx.Node] | None:
        """What a gate is computed by from the map x, parameters and the sizes of maps, in the order of the graph; None
        where there is anything else in it."""
        found: set[fx.Node] = set()
        waiting = [gate]
        while waiting:
            node = waiting.pop()
            if node is x or node in found:
                continue
            if node.op == "placeholder" or len(found) > MOST_NODES:
                return None
            found.add(node)
            waiting += () if is_size(node) else node.all_input_nodes
        return sorted(found) if any(x in node.all_input_nodes for node in found) else None

    def _may_gate(self, node: fx.Node) -> bool:
        """Whether it may be a pool, or a function of gates behind a layer."""
        if node.op == "call_module":
            layer = self._layer(node)
            return type(layer) in (*_POOLS, *_GATES, nn.Sequential) or not is_torch(type(layer))
        name = name_of(node)
        if name in _GATE_NAMES:
            return any(n.op == "call_module" or name_of(n).startswith("conv") for n in node.all_input_nodes)
        return "pool" in name or name in ("mean", "max", "amax", "sum")

    def _rows(self, first: _Product) -> Iterator[list[_Product]]:
        """The product and one of its own."""
        for user in first.nodes[-1].users:
            second = self._product(user)
            if second is not None and second.x is first.nodes[-1]:
                yield [first, second]

    # Regions that are one block

    def _whole(self, row: list[_Product]) -> _Region | None:
        """One block in place of a row of products."""
        if (len(row) == 1 and row[0].gate is None) or not self._may_be_one(row):
            return None
        nodes = sorted({node for product in row for node in product.nodes})
        paths = tuple(str(n.target) for n in nodes if n.op == "call_module")
        if len(paths) > len(set(paths)):
            return None
        written = {product.nodes[-1] for product in row if product.in_place}
        for last in (False, True) if self._may_be_last(nodes) else (False,):
            span = Span(self.block, row[0].x, nodes, written=written, last=last)
            code = span.graph.python_code("self")
            key = code.src, tuple(code.globals.items()), last
            if key not in self.known:
                self.known[key] = outcome_of_span(span).found
            found = self.known[key]
            if found is not None:
                break
        recipe = None if found is None or found.mask else found.recipe(span)
        if isinstance(recipe, OwnLayers):
            if not isinstance(recipe.forward, GateAlong) and next(span.parameters(), None) is not None:
                return None  # it has the layers of this block in it
            functions = recipe.functions
        elif isinstance(recipe, (ChannelGate, SpatialGate, CbamGate)):
            functions = _FUNCTIONS[type(recipe)]
        else:
            return None
        name, sixths = describe(span, recipe), "hard_s" in repr(recipe)
        self._replace(row, nodes, _function_of(recipe, _compiled(span.graph, "a block in it"), last))
        return _Region(name, functions, paths, recipe.rank, sixths)

    def _may_be_last(self, nodes: list[fx.Node]) -> bool:
        """Whether the map may have its channels last: nothing in these nodes is a convolution."""
        layers = [self._layer(n) for n in nodes if n.op == "call_module"]
        return not any(isinstance(part, CONVOLUTIONS) for layer in layers for part in layer.modules())

    def _may_be_one(self, row: list[_Product]) -> bool:
        """Whether nobody else sees what is between map and result, or could tell when it is computed."""
        nodes = {node for product in row for node in product.nodes}
        last = row[-1].nodes[-1]
        inner = (node for node in nodes - {last} if not _is_of_sizes(node))
        if any(user not in nodes for node in inner for user in node.users):
            return False
        x = row[0].x
        writes = any(product.in_place for product in row)
        if row[0].in_place and not (set(x.users) <= nodes and self._is_fresh(x)):
            return False
        if writes and not row[0].in_place and row[0].gate is None:  # into what a module of somebody's returned
            return False
        order = list(self.graph.nodes)
        between = order[order.index(row[0].nodes[0]) : order.index(last)]
        return all(node in nodes or self._only_reads(node) for node in between)

    def _is_fresh(self, x: fx.Node) -> bool:
        """Whether a map is in memory of its own."""
        return x in self.made or (x.op == "call_module" and type(self._layer(x)) in _FRESH)

    def _layer(self, node: fx.Node) -> nn.Module:
        return self.block.get_submodule(str(node.target))

    def _only_reads(self, node: fx.Node) -> bool:
        """Whether it surely writes into nothing that it is given."""
        if node in self.made or node.op == "get_attr":
            return True
        if node.op == "call_module":
            return str(node.target) in self.gates or type(self._layer(node)) in _FRESH
        if "out" in node.kwargs:
            return False
        if name_of(node) not in _VIEWS and _has_true((node.args, node.kwargs)):  # inplace=True, by position too
            return False
        if node.op == "call_method":
            return not str(node.target).endswith("_") and hasattr(Tensor, str(node.target)) and node.target not in _SETS
        target: Any = node.target
        if target in (getattr, unpacked):
            return True
        module = str(getattr(target, "__module__", None) or "torch")
        named = str(getattr(target, "__name__", "_"))
        return module.partition(".")[0] in ("_operator", "torch") and not named.endswith("_") and target not in _WRITE

    def _replace(self, row: list[_Product], nodes: list[fx.Node], function: Callable[..., Tensor]) -> None:
        x, last = row[0].x, row[-1].nodes[-1]
        if row[0].in_place and x.op == "call_module":
            self.owned.add(str(x.target))  # a hook on it may keep what is now not written into
        with self.graph.inserting_before(last):
            new = self.graph.call_function(function, (self.first, x))
        self._put(new, last, nodes)

    def _put(self, new: fx.Node, old: fx.Node, nodes: list[fx.Node]) -> None:
        """A node in the place of another; of these, those are gone that nobody uses any more."""
        old.replace_all_uses_with(new)
        self.made.add(new)
        for node in reversed(nodes):
            if not node._erased and not node.users:
                self.graph.erase_node(node)

    # Products with a gate of whatever kind

    @functools.cached_property
    def _shapes(self) -> dict[fx.Node, tuple[int, ...]]:
        """Of the tensors in the graph as it was."""
        found = shapes_in(self.block, self.plain, self.rank)
        return {node: found[copy] for node, copy in self.copies.items() if copy in found}

    def _alone(self, node: fx.Node) -> _Region | None:
        """A map times a gate a channel or a position that is made of another map, or by another pool of this one: the
        product by `scale`."""
        for x, widened, in_place in _factors(node):
            gate = narrowed(widened)
            if in_place or not self._is_made(x, gate):
                continue
            shape = self._shapes.get(x, ())
            if len(shape) < 4 or min(shape[2:]) == 1 or function_of(shape, self._shapes.get(gate, ())) is None:
                continue
            with self.graph.inserting_before(node):
                new = self.graph.call_function(gated_if_large, (x, gate, widened))
            self._put(new, node, [node])
            return _Region("its own gate, scale", ("scale",), (), len(shape), False)
        return None

    def _is_made(self, x: fx.Node, gate: fx.Node) -> bool:
        """Whether a gate is made of the map x by a pool that is no mean and no maximum, with a function of gates, or of
        another map, and is neither what normalises a map nor the weights of a mean."""
        found: set[fx.Node] = set()
        waiting = [gate]
        while waiting:
            node = waiting.pop()
            if node not in found and len(found) <= MOST_NODES:
                found.add(node)
                waiting += () if node is x or is_size(node) else node.all_input_nodes
        layers = {n: self._layer(n) if n.op == "call_module" else None for n in found - {x}}
        names = {name_of(n) for n in layers}
        if "softmax" in names or any(type(layer) in _WEIGHTS for layer in layers.values()):
            return False
        if (names | {name_of(x)}) & _APART:
            return False
        if x in found:
            bounded = any(is_gate(name_of(n), layer) for n, layer in layers.items())
            return bounded and bool(names & _OTHER_POOLS)
        return any(n.op == "placeholder" and n is not self.first for n in found) and not names & _NORMALISING

    # Products with a gate an element

    def _pixels(self, product: _Product, gate: fx.Node) -> _Region | None:
        """A map times the sigmoid of what layers make of it, an element each: these two as one."""
        *between, last = product.nodes
        made = any(n is not gate and (n.op == "get_attr" or self._has_parameters(n)) for n in between)
        if product.in_place or not (made and self._is_sigmoid(gate)) or len(gate.users) > 1:
            return None
        span = Span(self.block, product.x, between, marked=True)
        rank = next((rank for rank, values in values_in(span) if _is_an_element(values, product.x, gate)), None)
        if rank is None:
            return None
        with self.graph.inserting_before(last):
            new = self.graph.call_function(fused_pixels, (product.x, gate.args[0]))
        self._put(new, last, [*between, last])
        gone = (str(gate.target),) if gate.op == "call_module" else ()
        return _Region(PIXEL_GATE, ("mixed_scale",), gone, rank + 2, False)

    def _has_parameters(self, node: fx.Node) -> bool:
        return node.op == "call_module" and next(self._layer(node).parameters(), None) is not None

    def _is_sigmoid(self, node: fx.Node) -> bool:
        layer = node.op == "call_module" and type(self._layer(node)) is nn.Sigmoid
        return (layer or name_of(node) == "sigmoid") and len(node.args) == 1 and not node.kwargs

    # Regions of which only the pool and the product are fused

    def _split(self, product: _Product, gate: fx.Node) -> _Region | None:
        """Pools of the map by `squeeze` or `channel_pool` and the product by `scale`; what is between them stays."""
        *between, last = product.nodes
        if product.in_place and not (set(product.x.users) <= {*between, last} and self._is_fresh(product.x)):
            return None
        for axes_last in (False, True) if self._may_be_last(between) else (False,):
            span = Span(self.block, product.x, between, marked=True, last=axes_last)
            for rank, values in values_in(span):
                kind = kind_of_gate(values[gate], rank, axes_last) if gate in values else None
                if kind is not None:
                    pools, direct = self._pools(product.x, gate, values, rank)
                    over = {pool.over for pool in pools.values()}
                    of_channels = kind == "channels" and not direct and over == {"positions"}
                    if of_channels or (kind == "positions" and over <= {"channels"} and is_bounded(values[gate])):
                        return self._put_around(product, gate, pools, rank, axes_last)
        return self._strips(product, gate)

    def _strips(self, product: _Product, gate: fx.Node) -> _Region | None:
        """The same of gates of rows and columns: pools by `axis_pool`, and the product, or both, by `mixed_scale`."""
        last, second = product.nodes[-1], self._second(product)
        between = sorted({*product.nodes[:-1], *(() if second is None else second.nodes[:-1])})
        for rank, values in values_in(Span(self.block, product.x, between, marked=True)):
            found = {strip_of(values[n], rank): n for n in self._summands(gate) if n in values}
            combine = "strips"
            if set(found) != set(_STRIPS):
                combine, found = "product", {strip_of(values[gate], rank) if gate in values else None: gate}
                of_second = None
                if second is not None and second.gate in values:
                    of_second = strip_of(values[second.gate], rank)
                if of_second is not None and of_second not in found:
                    assert second is not None and second.gate is not None
                    found[of_second], last = second.gate, second.nodes[-1]
            if None in found:
                continue
            pools: dict[fx.Node, Pool] = {}
            direct = False
            for node in found.values():
                of_gate, reads = self._pools(product.x, node, values, rank)
                pools, direct = pools | of_gate, direct or reads
            if pools and not direct and all(pool.kind == "avg" and pool.over != "channels" for pool in pools.values()):
                return self._put_around_strips(product, found, dict(sorted(pools.items())), combine, last)
        return None

    def _summands(self, gate: fx.Node) -> tuple[fx.Node, ...]:
        """Of the sigmoid of a sum."""
        sums = gate.all_input_nodes if self._is_sigmoid(gate) else []
        for total in sums:
            plain = total.op in ("call_function", "call_method") and len(total.args) == 2 and not total.kwargs
            if plain and total.target in _SUMS and all(isinstance(n, fx.Node) for n in total.args):
                return total.args  # type: ignore[return-value]
        return ()

    def _pools(
        self, x: fx.Node, gate: fx.Node, values: dict[fx.Node, Value], rank: int
    ) -> tuple[dict[fx.Node, Pool], bool]:
        """The nodes that are pools of the map, and whether the gate is computed from the map in other ways too."""
        found: dict[fx.Node, Pool] = {}
        waiting, seen = [gate], set()
        while waiting:
            node = waiting.pop()
            if node in seen or _is_of_sizes(node):
                continue
            seen.add(node)
            if node is x:
                continue
            before = (n for n in node.all_input_nodes if n in values)
            pool = pool_of(values[node], rank) if node in values else None
            is_first = pool is not None and not any(pool_of(values[n], rank) for n in before)
            if is_first and all(map(self._only_pools, self._between(x, node) or ())):
                found[node] = pool  # type: ignore[assignment]
                continue
            as_others = name_of(node) in ("expand_as", "view_as", "reshape_as")
            waiting += node.all_input_nodes[:1] if as_others else node.all_input_nodes
        return dict(sorted(found.items())), x in seen

    def _only_pools(self, node: fx.Node) -> bool:
        """Whether it is a view or a pool of torch's, in the dtype of the map."""
        if node.op == "call_module":
            return type(self._layer(node)) in (*_POOLS, nn.Identity, nn.Flatten)
        known = name_of(node) in _VIEWS or "_pool" in name_of(node)
        return _is_of_sizes(node) or (known and self._only_reads(node) and "dtype" not in node.kwargs)

    def _put_around(
        self, product: _Product, gate: fx.Node, pools: dict[fx.Node, Pool], rank: int, axes_last: bool
    ) -> _Region:
        x, last = product.x, product.nodes[-1]
        placed, gone = self._put_pools(x, pools, axes_last)
        gate = placed.get(gate, gate)
        positions = all(pool.over == "channels" for pool in pools.values())
        with self.graph.inserting_before(last):
            new = self.graph.call_function(fused_product, (x, gate, not positions, axes_last))
        if product.in_place and x.op == "call_module":
            self.owned.add(str(x.target))
        self._put(new, last, [last])
        first = () if not pools else ("channel_pool",) if positions else ("squeeze",)
        kinds = sorted({pool.kind for pool in pools.values()})
        which = "" if positions or kinds == ["avg"] else f" ({' and '.join(kinds)} pool)"
        name = ", ".join((*first, "its own layers", f"scale{which}"))
        return _Region(name, (*first, "scale"), tuple(gone), rank + 2, False)

    def _put_pools(
        self, x: fx.Node, pools: dict[fx.Node, Pool], axes_last: bool = False
    ) -> tuple[dict[fx.Node, fx.Node], set[str]]:
        """What has taken the place of each pool, and the paths of the layers that do not run any more."""
        placed: dict[fx.Node, fx.Node] = {}
        gone: set[str] = set()
        read: dict[Hashable, fx.Node] = {}  # what reads the map, once for both pools
        for node, pool in pools.items():
            upstream = self._between(x, node) or []
            gone |= {str(n.target) for n in upstream if n.op == "call_module"}
            over = "strips" if pool.over in _STRIPS else pool.over
            others = [p for p in pools.values() if p.kind != pool.kind]
            ties = others[0].ties if others and pool.kind == "avg" else pool.ties
            kind = "avgmax" if others else pool.kind
            with self.graph.inserting_before(node):
                if (over, ties) not in read:
                    read[over, ties] = self.graph.call_function(_pools_of(over, kind, ties, axes_last), (x,))
                placed[node] = self.graph.call_function(_one_of(pool, kind), (read[over, ties],))
            self._put(placed[node], node, upstream)
        self.made.update(read.values())
        return placed, gone

    def _put_around_strips(
        self,
        product: _Product,
        gates: dict[str | None, fx.Node],
        pools: dict[fx.Node, Pool],
        combine: str,
        last: fx.Node,
    ) -> _Region:
        both = set(_STRIPS) <= {pool.over for pool in pools.values()}  # one of them alone is PyTorch's
        pools = {n: pool for n, pool in pools.items() if both or pool.over not in _STRIPS}
        placed, gone = self._put_pools(product.x, pools)
        assert product.gate is not None
        if combine == "strips" and product.gate.op == "call_module":
            gone.add(str(product.gate.target))
        rows, columns = (placed.get(gates[of], gates[of]) if of in gates else None for of in _STRIPS)
        with self.graph.inserting_before(last):
            new = self.graph.call_function(fused_strips, (product.x, rows, columns, combine))
        if product.in_place and product.x.op == "call_module":
            self.owned.add(str(product.x.target))
        self._put(new, last, sorted({*product.nodes, last}))
        functions = (*(["axis_pool"] if both else ["squeeze"] if pools else []), "mixed_scale")
        name = ", ".join((*functions[:-1], "its own layers", functions[-1]))
        return _Region(name, functions, tuple(gone), 4, False)


_NORMALISING = {"rsqrt", "reciprocal", "sqrt", "std", "var", "norm", "vector_norm", "normalize"}
_OTHER_POOLS = {"abs", "std", "var", "std_mean", "var_mean", "norm", "vector_norm", "logsumexp", "pow", "square"}
#: By which a gate has gradients that its map has not, or one of them is in another dtype.
_APART = {"detach", "float", "double", "half", "bfloat16", "to", "type", "type_as"}
_WEIGHTS: set[Any] = {nn.Softmax, nn.Softmax2d}  # of a mean
_POOLS: set[Any] = {
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
}
_GATES: set[Any] = {nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax}
_GATE_NAMES = {"sigmoid", "hardsigmoid", "tanh", "softmax"}


def _factors(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """Of a product: what may be the map, what its gate, and whether it is written into the map."""
    function = node.op == "call_function" and node.target in _PRODUCTS
    method = node.op == "call_method" and node.target in _PRODUCT_METHODS
    if not (function or method) or len(node.args) != 2 or node.kwargs:
        return
    in_place = node.target is IN_PLACE["imul"] or str(node.target).endswith("_")
    for x, gate in (node.args,) if in_place else (node.args, node.args[::-1]):
        if isinstance(x, fx.Node) and isinstance(gate, fx.Node) and x is not gate:
            yield x, gate, in_place


def _is_of_sizes(node: fx.Node) -> bool:
    """Whether it is a size of a tensor, or computed from such."""
    if is_size(node):
        return True
    of_operators = getattr(node.target, "__module__", None) == "_operator" or node.target is unpacked
    inputs = node.all_input_nodes
    return node.op == "call_function" and of_operators and bool(inputs) and all(map(_is_of_sizes, inputs))


#: Views and reductions of maps, in the dtype of the map, that write into nothing whatever their options are.
_VIEWS = {
    *("mean", "sum", "amax", "max", "view", "reshape", "flatten", "squeeze", "unsqueeze", "permute", "transpose"),
    *("movedim", "contiguous", "getitem", "truediv", "div", "unpacked"),
}

#: Methods of tensors that change them, or what is done with them, without a name that says so.
_SETS = {"backward", "register_hook", "retain_grad", "resize", "resize_as", "set_", "share_memory_"}
_WRITE: set[Any] = {operator.setitem, operator.delitem, *IN_PLACE.values()}


def _has_true(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return any(map(_has_true, tree))
    return any(map(_has_true, tree.values())) if isinstance(tree, dict) else tree is True
