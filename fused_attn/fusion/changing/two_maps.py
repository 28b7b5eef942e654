"""Blocks that take two maps: the attention gate of Attention U-Net, and others that gate one map by another.

The forward is traced in both modes, products of a map with a gate of one number a channel or position become `scale`,
and a BatchNorm, a sum and a ReLU that follow each other one `norm_gate`; all layers else run as they are written. What
that gives is compared with the forward, on both maps as parts of one.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ... import functional
from ...backends import is_ordinary
from ...nn.normalised import normalised
from ...reference.block_attention import NORMS
from ..reading.check import TOLERANCE, TOLERANCE_OF_SIXTHS
from ..reading.layers import calls_itself
from ..reading.nodes import name_of
from ..reading.reads import Reads, Unstored, is_torch, multiplies, reads_of, taken_apart
from ..reading.recognise import channel_guesses, has_own_forward, once
from ..reading.rewritten import MOST, check_rewritten
from ..reading.trace import (
    IN_PLACE,
    Rank,
    Untraceable,
    is_same_code,
    trace_in_mode,
    trace_two_maps,
    unpacked,
)
from ..reading.twin import NoTwin, twin
from ..recipes.names import host_of
from ..recipes.recipe import OwnLayers
from ..recipes.run import layer_at

_known: weakref.WeakKeyDictionary[type, dict[Hashable, OwnLayers | str | None]] = weakref.WeakKeyDictionary()


def gate_of_two_maps(block: nn.Module) -> OwnLayers | None:
    """How a module of two maps runs with the products in its forward fused; None: it has none, or its forward cannot be
    written anew."""
    found = _look(block)
    return found if isinstance(found, OwnLayers) else None


def why_not_written_anew(block: nn.Module) -> str | None:
    """What keeps the forward of a module of two maps from being written anew; None: nothing, or it is none."""
    found = _look(block)
    return found if isinstance(found, str) else None


def _look(block: nn.Module) -> OwnLayers | str | None:
    names = _names_of_maps(block)
    held = names is None and has_own_forward(block) and taken_apart(host_of(type(block)).forward) is not None
    if not (names or held) or not multiplies(host_of(type(block))):
        return None
    if any(map(calls_itself, block.modules())):
        return None
    try:
        read = reads_of(block, most=sys.maxsize)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return None
    if read.remark is not None:
        return read.remark
    return once(
        _known, block, read, lambda: _without_stores(block, names, read), failed=None, changed=lambda: "keeps state"
    )


def _names_of_maps(block: nn.Module) -> tuple[str, str] | None:
    """Those of the two arguments of a forward that may be maps; the second may be left out in some other use."""
    cls = host_of(type(block))
    forward: Any = cls.forward
    if "forward" in block.__dict__ or is_torch(cls) or not inspect.isfunction(forward) or is_torch(forward):
        return None
    if forward.__code__.co_flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return None
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if len(parameters) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    first, second = parameters
    if first.default is not first.empty or second.default not in (second.empty, None):
        return None
    return first.name, second.name


def _without_stores(block: nn.Module, names: tuple[str, str] | None, read: Reads) -> OwnLayers | str | None:
    unstored = Unstored(read.stores)
    with unstored:
        for dims in (4, 5, 3):
            rank = Rank(dims)
            found = _rewritten(block, names, rank)
            if isinstance(found, OwnLayers) or not rank.asked:
                break
        return found
    return unstored.why


def _rewritten(block: nn.Module, names: tuple[str, str] | None, rank: Rank) -> OwnLayers | str | None:
    """names: of its two maps; None: they are in one argument."""

    def enters(path: str) -> bool:
        return type(block.get_submodule(path)) is nn.Sequential

    try:
        keys: Keys = ()
        if names is None:
            graphs = [trace_in_mode(block, enters, training, rank) for training in (False, True)]
            held = [_apart(graph) for graph in graphs]
            if len(set(held)) > 1 or not held[0]:
                return None
            keys, names = held[0], (str(held[0][0]), str(held[0][1]))
        else:
            graphs = [trace_two_maps(block, enters, training, rank, names[1]) for training in (False, True)]
        if is_same_code(graphs[0], graphs[1]):
            graphs.pop()
        sizes = _sizes_of(block, graphs[0], rank)
    except Untraceable as error:
        return str(error) if names is not None else None
    except NoTwin:
        return None
    if sizes is None:
        return None
    rewriters = [_Rewriter(block, graph, sizes) for graph in graphs]
    for rewriter in rewriters:
        if not rewriter.rewrite():
            return None
    paths = [path for path, _ in block.named_modules() if path]
    gone = {path for rewriter in rewriters for path in rewriter.gone}
    bypassed = tuple(path for path in paths if path in gone or enters(path))
    if reads_of(block, map(block.get_submodule, bypassed)).remark is not None:
        return None
    forward = _of_mode([_compiled(rewriter.graph, host_of(type(block)).__name__) for rewriter in rewriters])
    packed = Packed(block, sizes, keys)

    def unpacked(block: Any, x: Tensor) -> Any:
        return forward(block.block, *block.maps(x))

    tolerance = TOLERANCE_OF_SIXTHS if any(rewriter.sixths for rewriter in rewriters) else TOLERANCE
    verdict = check_rewritten(packed, unpacked, (sizes.dims,), tolerance)
    if verdict.why_not is not None or not verdict.differentiable:
        return None
    summed = all(rewriter.sums for rewriter in rewriters)
    gates = sum(len(rewriter.gates) for rewriter in rewriters[:1])
    name = "AttentionGate" if summed and gates == 1 else "gate from one map on another"
    functions = dict.fromkeys(f for rewriter in rewriters for f in rewriter.functions())
    return OwnLayers(forward, name, tuple(functions), rank=sizes.dims, bypassed=bypassed, maps=names, keys=keys)


Keys = tuple[str | int, ...]


def _apart(graph: fx.Graph) -> Keys:
    """Makes two inputs of one that holds two maps, in a graph that takes them from there and does nothing else with it;
    where they are in it. Empty: it does something else."""
    _, held, *_ = graph.nodes
    taken: list[tuple[Any, fx.Node]] = []
    for user in list(held.users):
        if user.target is operator.getitem and user.args[0] is held:
            taken.append((user.args[1], user))
        elif user.target is unpacked and user.args[1] == 2:
            taken += [(n.args[1], n) for n in user.users]
        else:
            return ()
    if any(key == -1 for key, _ in taken):
        taken = [(key % 2 if type(key) is int else key, node) for key, node in taken]
    keys = tuple(dict.fromkeys(key for key, _ in taken if type(key) in (str, int)))
    numbers = all(type(key) is int for key in keys)
    if len(keys) != 2 or any(type(key) not in (str, int) for key, _ in taken) or (numbers and set(keys) != {0, 1}):
        return ()
    keys = (0, 1) if numbers else keys
    if len({type(key) for key in keys}) > 1:
        return ()
    with graph.inserting_after(held):
        maps = dict(zip(keys, (held, graph.placeholder("y")), strict=True))
    for key, node in taken:
        source = node.args[0]
        node.replace_all_uses_with(maps[key])
        graph.erase_node(node)
        if source is not held and not source.users:  # type: ignore[union-attr]
            graph.erase_node(source)  # type: ignore[arg-type]
    return keys


Forward = Callable[..., Any]


def _compiled(graph: fx.Graph, name: str) -> Forward:
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {name}>", "exec"), space)
    made = space["forward"]

    return lambda block, x, y: made(block, block, x, y)


def _of_mode(forwards: list[Forward]) -> Forward:
    """Of those for evaluation and for training, if there are two."""
    evaluates, trains = forwards[0], forwards[-1]
    if evaluates is trains:
        return evaluates
    return lambda block, x, y: (trains if block.training else evaluates)(block, x, y)


# The maps


class Sizes(NamedTuple):
    """Of the maps that a module takes: channels, and by how much each is coarser than the finest one."""

    channels: tuple[int, ...]
    coarser: tuple[int, ...]
    dims: int

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """All from one map that has the channels of all, whose sizes are made multiples of the coarser's step."""
        space, most = x.shape[2:], max(self.coarser)
        found = []
        for part, step in zip(x.split(self.channels, 1), self.coarser, strict=True):
            for axis, n in enumerate(space, 2):
                part = part[(slice(None),) * axis + (slice(0, n // most * most, step),)]
            found.append(part)
        return tuple(found)


class Packed(nn.Module):
    """A module of two maps as one of one: `Sizes.split`. keys: where it takes them from one argument."""

    def __init__(self, block: nn.Module, sizes: Sizes, keys: Keys = ()) -> None:
        super().__init__()
        self.block, self.sizes, self.in_channels, self.keys = block, sizes, sum(sizes.channels), keys

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.sizes.split(x)

    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        if not self.keys:
            return self.block(*maps)
        return self.block(list(maps) if self.keys == (0, 1) else dict(zip(self.keys, maps, strict=True)))


#: Of decoders: maps of the same size, and one of half or a quarter of it.
_COARSER = ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4))
#: Differ from each other, from channels that layers have, and in what a quarter of them is.
_SPACE = (44, 28, 36)


def _sizes_of(block: nn.Module, graph: fx.Graph, rank: Rank) -> Sizes | None:
    """The first maps that a traced module takes, which it is run on without data."""
    if sum(p.numel() for p in block.parameters()) > MOST:
        return None
    guesses = channel_guesses(block)
    for dims in (rank.dims,) if rank.asked else (4, 5, 3):
        for coarser, channels in itertools.product(_COARSER, itertools.product(guesses, guesses)):
            sizes = Sizes(channels, coarser, dims)
            try:
                _shapes_of(block, graph, sizes)
            except Exception:  # of whatever kind: it is somebody's, on maps that it may not take
                continue
            return sizes
    return None


class _Shapes(fx.Interpreter):
    """Notes the shapes of all tensors in a graph."""

    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        super().__init__(block, graph=graph)
        self.extra_traceback = False
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


def shapes_in(block: nn.Module, graph: fx.Graph, rank: Rank) -> dict[fx.Node, tuple[int, ...]]:
    """Of all tensors in the graph of a module's forward on the first map that it takes; empty: none was found."""
    if sum(1 for _ in block.modules()) > _MOST_PARTS:
        return {}
    for dims, channels in itertools.product((rank.dims,) if rank.asked else (4, 5, 3), channel_guesses(block)):
        try:
            return _shapes_of(block, graph, Sizes((channels,), (1,), dims))
        except Exception:  # of whatever kind: it is somebody's, on a map that it may not take
            continue
    return {}


#: Parts up to which a module is tried on maps of many channels.
_MOST_PARTS = 200


def _shapes_of(block: nn.Module, graph: fx.Graph, sizes: Sizes) -> dict[fx.Node, tuple[int, ...]]:
    tensors: dict[int, Tensor | None] = {}
    for t in (*block.parameters(), *block.buffers()):
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        tensors[id(t)] = torch.empty(t.shape, dtype=dtype, device="meta")
    acting = twin(block, tensors)
    for part in acting.modules():
        part.training = False
    x = torch.empty((3, sum(sizes.channels), *_SPACE[: sizes.dims - 2]), dtype=torch.float32, device="meta")
    shapes = _Shapes(acting, graph)
    with torch.no_grad():
        shapes.run(acting, *sizes.split(x))
    return shapes.found


# The graph


def gated(x: Tensor, gate: Tensor, widened: Tensor) -> Tensor:
    """x * widened. gate: what that was widened from, which has a number a channel or position of x."""
    fits = gate.dim() == x.dim() and torch.promote_types(x.dtype, gate.dtype) == x.dtype
    if not (fits and (widened is gate or widened.shape == x.shape) and is_ordinary(x) and is_ordinary(gate)):
        return x * widened
    try:
        return functional.scale(x, gate)
    except (TypeError, ValueError):  # maps that the product may take and the fused function does not
        return x * widened


def repeated(gate: Tensor, *times: Any) -> Tensor:
    """gate.repeat(*times), without a copy of it where that repeats single numbers."""
    given = times if times and isinstance(times[0], int) else tuple(times[0])
    if len(given) == gate.dim() and all(n == 1 or (m == 1 and n > 0) for m, n in zip(gate.shape, given, strict=True)):
        return gate.expand([m * n for m, n in zip(gate.shape, given, strict=True)])
    return gate.repeat(*times)


def _summed(path: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """relu(norm(x) + residual), the BatchNorm at this path of the block."""

    def summed(block: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        norm = layer_at(block, path)
        if x.shape == residual.shape and is_ordinary(x) and is_ordinary(residual):
            return normalised(norm, x, residual=residual, post_activation="relu")
        return (norm(x) + residual).relu()

    return summed


#: Methods by which a gate gets the shape of its map.
_WIDENED = {"expand", "expand_as", "repeat"}
_PRODUCTS: set[Any] = {operator.mul, torch.mul, torch.multiply, "mul", "multiply"}
_SUMS: set[Any] = {operator.add, torch.add, "add", IN_PLACE["iadd"], "add_"}
_RELUS: set[Any] = {torch.relu, nn.functional.relu, nn.functional.relu_, torch.relu_, "relu", "relu_"}
_GATES: set[Any] = {nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.ReLU6, nn.Hardtanh}
_GATE_NAMES = {"sigmoid", "sigmoid_", "hardsigmoid", "tanh", "softmax", "relu6", "clamp"}


def narrowed(gate: fx.Node) -> fx.Node:
    """What was given the shape of a map."""
    while gate.op == "call_method" and gate.target in _WIDENED:
        gate = gate.all_input_nodes[0]
    return gate


def function_of(map_: tuple[int, ...], gate: tuple[int, ...]) -> str | None:
    """The function for the product of a map and a gate of these shapes; None: it is no gate."""
    if len(map_) < 3 or len(gate) != len(map_) or gate[0] != map_[0] or max(map_[2:]) == 1:
        return None
    if gate[1] == map_[1] and set(gate[2:]) == {1}:
        return "scale"
    return "scale/space" if map_[1] > 1 and gate == (map_[0], 1, *map_[2:]) else None


def is_gate(name: str, layer: nn.Module | None) -> bool:
    """Whether a node is a function of gates by its name, or a layer or part of somebody's that may have one."""
    return name in _GATE_NAMES if layer is None else type(layer) in _GATES or not is_torch(type(layer))


class _Rewriter:
    """gates, sums: what was put into the graph. gone: paths of layers that do not run as such any more."""

    def __init__(self, block: nn.Module, graph: fx.Graph, sizes: Sizes) -> None:
        self.block, self.graph = block, graph
        self.shapes = _shapes_of(block, graph, sizes)
        self.first = next(iter(graph.nodes))
        self.gates: list[str] = []
        self.sums = 0
        self.gone: set[str] = set()
        layers = (self._layer(n) for n in graph.nodes if n.op == "call_module")
        parts = (part for layer in layers for part in layer.modules())
        self.sixths = any(isinstance(part, (nn.Hardsigmoid, nn.Hardswish)) for part in parts) or any(
            "hards" in name_of(n) for n in graph.nodes
        )

    def functions(self) -> Iterator[str]:
        yield from dict.fromkeys(self.gates)
        if self.sums:
            yield "norm_gate"

    def rewrite(self) -> bool:
        """Whether there is a product with a gate."""
        for node in list(self.graph.nodes):
            if _calls(node, _PRODUCTS) and len(node.args) == 2 and not node.kwargs:
                self._product(node)
        if self.gates:
            for node in list(self.graph.nodes):
                self._sum(node)
        return bool(self.gates)

    def _layer(self, node: fx.Node) -> nn.Module:
        return self.block.get_submodule(str(node.target))

    def _product(self, node: fx.Node) -> None:
        for x, gate in (node.args, node.args[::-1]):
            if not (isinstance(x, fx.Node) and isinstance(gate, fx.Node) and x is not gate):
                continue
            widened, gate = gate, narrowed(gate)
            kind = function_of(self.shapes.get(x, ()), self.shapes.get(gate, ()))
            if kind is not None and self._is_gate(gate):
                self.gates.append(kind)
                self._put(node, gated, (x, gate, widened))
                while widened is not gate:
                    if widened.target == "repeat" and len(widened.users) == 1 and not widened.kwargs:
                        widened.op, widened.target = "call_function", repeated
                    widened = widened.all_input_nodes[0]
                return

    def _is_gate(self, gate: fx.Node) -> bool:
        """Whether a function of gates is in what it is computed by, or a part of somebody's that may have one."""
        waiting, seen = [gate], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_gate(name_of(node), self._layer(node) if node.op == "call_module" else None):
                return True
            waiting += node.all_input_nodes
        return False

    def _sum(self, node: fx.Node) -> None:
        relu = node.op == "call_module" and type(self._layer(node)) is nn.ReLU
        plain = len(node.args) == 1 and (not node.kwargs or set(node.kwargs) == {"inplace"})
        if not (plain and (relu or _calls(node, _RELUS))):
            return
        total = node.args[0]
        if not (isinstance(total, fx.Node) and _calls(total, _SUMS) and len(total.args) == 2 and not total.kwargs):
            return
        if len(total.users) > 1 or not all(isinstance(n, fx.Node) for n in total.args):
            return
        order = list(self.graph.nodes)
        for norm in sorted(total.all_input_nodes, key=order.index, reverse=True):
            others = [n for n in total.all_input_nodes if n is not norm]
            called = [n for n in order if n.op == "call_module" and n.target == norm.target]
            if (
                norm.op == "call_module"
                and type(self._layer(norm)) in NORMS
                and len(norm.users) == len(others) == len(called) == 1
                and len(norm.args) == 1
                and self.shapes.get(others[0], ()) == self.shapes[norm]
            ):
                self.gone |= {str(n.target) for n in (norm, node) if n.op == "call_module"}
                self.sums += 1
                self._put(node, _summed(str(norm.target)), (self.first, norm.args[0], others[0]))
                return

    def _put(self, old: fx.Node, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        """A call in the place of a node; what nobody uses any more is gone."""
        with self.graph.inserting_before(old):
            new = self.graph.call_function(function, args)
        old.replace_all_uses_with(new)
        self.shapes[new] = self.shapes.get(old, ())
        waiting = [old]
        while waiting:
            node = waiting.pop()
            if not node._erased and not node.users and node.op not in ("placeholder", "output"):
                before = node.all_input_nodes
                self.graph.erase_node(node)
                waiting += before


def _calls(node: fx.Node, targets: set[Any]) -> bool:
    """Whether it calls one of these functions or, by name, methods."""
    return node.op in ("call_function", "call_method") and node.target in targets
