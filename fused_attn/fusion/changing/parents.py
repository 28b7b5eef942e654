"""Blocks of which only the gates are modules: `out = x * self.ca(x); out = out * self.sa(out)` in a parent's forward.

The forward is traced (`reading.trace`), products of a map and its gate are replaced in its graph, and what that gives
is compared with the forward (`reading.rewritten`). It is made once for all equal parents, from paths and options: the
gates that it runs are those of the module that it is called for.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ...backends import is_ordinary
from ..hosts.registry import known_class
from ..reading.check import TOLERANCE, TOLERANCE_OF_SIXTHS
from ..reading.context import in_its_own_context
from ..reading.reads import reads_of, restore
from ..reading.recognise import has_own_forward, outcome_of, recipe_of
from ..reading.rewritten import check_rewritten
from ..reading.trace import IN_PLACE, Untraceable, trace, unpacked
from ..reading.twin import NoTwin
from ..recipes.describe import describe
from ..recipes.names import host_of
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, SpatialGate, SplitGate
from ..recipes.run import layer_at, parameter_paths, parameters_of, run

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PRODUCTS = {operator.mul, torch.mul, torch.multiply, IN_PLACE["imul"]}
_PRODUCT_METHODS = {"mul", "mul_", "multiply", "multiply_"}
#: Layers whose output is in no one else's memory, and which do not write into their input.
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_Gate = tuple[str, bool]  # a path, and whether what is there returns its gate, and not the gated map
_Single = ChannelGate | SpatialGate | CbamGate | SplitGate


class Composite(nn.Module):
    """One or two gates in a row, at the paths that they have in their parent."""

    def __init__(self, parent: nn.Module, gates: tuple[_Gate, ...]) -> None:
        super().__init__()
        self.in_a_row = gates
        for path, _ in gates:
            owner: nn.Module = self
            *outer, last = path.split(".")
            for name in outer:
                if owner._modules.get(name) is None:
                    owner._modules[name] = nn.Module()
                owner = owner.get_submodule(name)
            owner._modules[last] = parent.get_submodule(path)

    def forward(self, x: Tensor) -> Tensor:
        return as_written(self, self.in_a_row, x)


def as_written(parent: nn.Module, gates: tuple[_Gate, ...], x: Tensor) -> Tensor:
    for path, mask in gates:
        gate = layer_at(parent, path)
        x = x * gate(x) if mask else gate(x)
    return x


_known: weakref.WeakKeyDictionary[type, dict[Hashable, OwnLayers | None]] = weakref.WeakKeyDictionary()


def composite_of(block: nn.Module) -> OwnLayers | None:
    """How a module runs with the gates of its children fused into the products in its forward; None: it has none, or
    its forward cannot be written anew."""
    if not has_own_forward(block):
        return None
    gates = dict(_gates_of(block))
    if not any(gates.values()) and len(gates) < 2:
        return None
    if any(host_of(type(part)).__call__ is not nn.Module.__call__ for part in block.modules()):
        return None
    try:
        read = reads_of(block, most=sys.maxsize)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return None
    if read.remark is not None:
        return None
    known = _known.setdefault(host_of(type(block)), {})
    key = read.key, tuple(gates.items())
    if key not in known:
        try:
            found = in_its_own_context(lambda: _rewritten(block, gates))
        except Exception:
            return None
        known[key] = None if restore(read.watched) else found
    return known[key]


def _gates_of(block: nn.Module, prefix: str = "") -> Iterator[_Gate]:
    """The gates among a module's children, its own or in containers."""
    for name, child in block.named_children():
        path = f"{prefix}{name}"
        if type(child) in _CONTAINERS:
            yield from _gates_of(child, f"{path}.")
        elif known_class(host_of(type(child))) is None:
            found = outcome_of(child).found
            if found is not None and found.kind in ("channel", "spatial"):
                yield path, found.mask


def _rewritten(block: nn.Module, gates: dict[str, bool]) -> OwnLayers | None:
    def enters(path: str) -> bool:
        return type(block.get_submodule(path)) is nn.Sequential and any(p.startswith(f"{path}.") for p in gates)

    try:
        rewriter = _Rewriter(block, gates, trace(block, enters))
    except (Untraceable, NoTwin):
        return None
    regions = rewriter.regions()
    if not regions:
        return None
    covers = tuple(dict.fromkeys(path for region in regions for path, _ in region.gates))
    names = [name for name, _ in block.named_modules() if name]
    skipped = {n for n in names if n in rewriter.owned or enters(n) or any(f"{n}.".startswith(f"{p}.") for p in covers)}
    if reads_of(block, map(block.get_submodule, skipped)).remark is not None:
        return None
    ranks = {region.recipe.rank for region in regions} - {None}
    if len(ranks) > 1:
        return None
    rank = next(iter(ranks), None)
    forward = _compiled(rewriter.graph, host_of(type(block)).__name__)
    sixths = any("hard_s" in repr(region.recipe) for region in regions)
    tolerance = TOLERANCE_OF_SIXTHS if sixths else TOLERANCE
    verdict = check_rewritten(block, forward, (4, 5, 3) if rank is None else (rank,), tolerance)
    if verdict.why_not is not None:
        return None
    name = ", ".join(region.name for region in regions) + " in its forward"
    if not verdict.differentiable:
        forward, name = _without_gradients(forward), f"{name}, where no gradients are asked for"
    functions = dict.fromkeys(f for region in regions for f in region.functions)
    return OwnLayers(
        forward,
        name,
        tuple(sorted(functions, key="cbam".__ne__)),  # the main one first
        rank=rank,
        bypassed=tuple(n for n in names if n in skipped),
        covers=covers,
    )


def _compiled(graph: fx.Graph, name: str) -> Callable[[Any, Tensor], Any]:
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {name}>", "exec"), space)
    made = space["forward"]

    def forward(block: Any, x: Tensor) -> Any:
        return made(block, block, x)

    return forward


def _without_gradients(forward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """For a module that writes over what its gradients need: then its own forward, which says so in its backward."""

    def without(block: Any, x: Tensor) -> Any:
        return host_of(type(block)).forward(block, x) if torch.is_grad_enabled() else forward(block, x)

    return without


# Regions


class _Region(NamedTuple):
    """Gates in a row that are one block, in the place of these nodes."""

    recipe: _Single
    name: str
    gates: tuple[_Gate, ...]

    @property
    def functions(self) -> tuple[str, ...]:
        if isinstance(self.recipe, SplitGate):
            return "squeeze", "scale"
        kinds = {ChannelGate: "channel_gate", SpatialGate: "spatial_gate", CbamGate: "cbam"}
        return (kinds[type(self.recipe)],)


def _function_of(region: _Region) -> Callable[[nn.Module, Tensor], Tensor]:
    recipe, gates = region.recipe, region.gates
    paths = parameter_paths(recipe)

    def fused_attention(block: nn.Module, x: Tensor) -> Tensor:
        if recipe.rank not in (None, x.dim()) or not is_ordinary(x):
            return as_written(block, gates, x)
        if torch.compiler.is_compiling():
            return run(block, recipe, parameters_of(block, paths), x)
        try:
            return run(block, recipe, parameters_of(block, paths), x)
        except (TypeError, ValueError):  # a map that the gates may take and the fused function does not
            return as_written(block, gates, x)

    return fused_attention


class _Product(NamedTuple):
    """A map that is gated: by this gate, in these nodes, the last of which is the gated map; written into it or not."""

    x: fx.Node
    gate: _Gate
    nodes: tuple[fx.Node, ...]
    in_place: bool


class _Rewriter:
    def __init__(self, block: nn.Module, gates: dict[str, bool], graph: fx.Graph) -> None:
        self.block, self.gates, self.graph = block, gates, graph
        self.made: set[fx.Node] = set()
        self.owned: set[str] = set()  # paths of layers whose output would have been written into
        self.first = next(iter(graph.nodes))

    def regions(self) -> list[_Region]:
        found: list[_Region] = []
        gone: set[fx.Node] = set()
        for node in list(self.graph.nodes):
            first = None if node in gone else self._product(node)
            if first is None:
                continue
            for row in (*self._rows(first), [first]):
                region = self._region(row)
                if region is not None:
                    found.append(region)
                    gone.update(self._replace(row, region))
                    break
        return found

    def _product(self, node: fx.Node) -> _Product | None:
        if node.op == "call_module" and self.gates.get(str(node.target)) is False:
            x = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            return _Product(x, (str(node.target), False), (node,), False) if isinstance(x, fx.Node) else None
        function = node.op == "call_function" and node.target in _PRODUCTS
        if not function and not (node.op == "call_method" and node.target in _PRODUCT_METHODS):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        in_place = node.target is IN_PLACE["imul"] or str(node.target).endswith("_")
        for x, gate in (node.args,) if in_place else (node.args, node.args[::-1]):
            nodes = [node]
            if isinstance(gate, fx.Node) and (gate.op, gate.target) == ("call_method", "expand_as"):
                if gate.args[1:] != (x,) or gate.kwargs:
                    continue
                nodes.insert(0, gate)
                gate = gate.args[0]
            if not isinstance(gate, fx.Node) or gate.op != "call_module" or not self.gates.get(str(gate.target)):
                continue
            if gate.args != (x,) or gate.kwargs or not isinstance(x, fx.Node):
                continue
            return _Product(x, (str(gate.target), True), (gate, *nodes), in_place)
        return None

    def _rows(self, first: _Product) -> Iterator[list[_Product]]:
        """The product and one of its own."""
        for user in first.nodes[-1].users:
            second = self._product(user)
            if second is not None and second.x is first.nodes[-1] and second.gate[0] != first.gate[0]:
                yield [first, second]

    def _region(self, row: list[_Product]) -> _Region | None:
        gates = tuple(product.gate for product in row)
        if (len(row) == 1 and not gates[0][1]) or not self._may_be_one(row):
            return None
        composite = Composite(self.block, gates)
        recipe = recipe_of(composite)
        if not isinstance(recipe, _Single):
            return None
        return _Region(recipe, describe(composite, recipe), gates)

    def _may_be_one(self, row: list[_Product]) -> bool:
        """Whether nobody else sees what is between map and result, or could tell when it is computed."""
        nodes = {node for product in row for node in product.nodes}
        last = row[-1].nodes[-1]
        if any(user not in nodes for node in nodes - {last} for user in node.users):
            return False
        x = row[0].x
        writes = any(product.in_place for product in row)
        if row[0].in_place and not (set(x.users) <= nodes and self._is_fresh(x)):
            return False
        if writes and not row[0].in_place and row[0].gate[1] is False:  # into what a module of somebody's returned
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
        if "out" in node.kwargs or _has_true((node.args, node.kwargs)):  # inplace=True, by position too
            return False
        if node.op == "call_method":
            return not str(node.target).endswith("_") and hasattr(Tensor, str(node.target)) and node.target not in _SETS
        target: Any = node.target
        if target in (getattr, unpacked):
            return True
        module = str(getattr(target, "__module__", None) or "torch")
        named = str(getattr(target, "__name__", "_"))
        return module.partition(".")[0] in ("_operator", "torch") and not named.endswith("_") and target not in _WRITE

    def _replace(self, row: list[_Product], region: _Region) -> list[fx.Node]:
        nodes = [node for product in row for node in product.nodes]
        x = row[0].x
        if row[0].in_place and x.op == "call_module":
            self.owned.add(str(x.target))  # a hook on it may keep what is now not written into
        with self.graph.inserting_before(nodes[-1]):
            new = self.graph.call_function(_function_of(region), (self.first, x))
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.made.add(new)
        return nodes


#: Methods of tensors that change them, or what is done with them, without a name that says so.
_SETS = {"backward", "register_hook", "retain_grad", "resize", "resize_as", "set_", "share_memory_"}
_WRITE: set[Any] = {operator.setitem, operator.delitem, *IN_PLACE.values()}


def _has_true(tree: Any) -> bool:
    if isinstance(tree, (tuple, list)):
        return any(map(_has_true, tree))
    return any(map(_has_true, tree.values())) if isinstance(tree, dict) else tree is True
