"""Blocks of which only the gates are modules: `out = x * self.ca(x); out = out * self.sa(out)` in a parent's forward.

The parent's forward is traced with torch.fx, its children as they are; products of a map and its gate are replaced.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import OwnLayers, Recipe, known_class
from .capture import stores
from .recognise import host_of, outcome_of, recipe_of_one

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply}
_PRODUCT_METHODS = {"mul", "mul_", "multiply", "multiply_"}
_FRESH = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Composite(nn.Module):
    """One or two gates in a row, each a module that returns its gate, or the gated map."""

    def __init__(self, gates: list[tuple[nn.Module, bool]]) -> None:
        super().__init__()
        self.masks = tuple(mask for _, mask in gates)
        for i, (gate, _) in enumerate(gates):
            self.add_module(f"gate{i}", gate)

    def forward(self, x: Tensor) -> Tensor:
        for i, mask in enumerate(self.masks):
            gate = self._modules[f"gate{i}"]
            assert gate is not None
            x = x * gate(x) if mask else gate(x)
        return x


def composite_of(block: nn.Module) -> OwnLayers | None:
    """How a module runs with the gates of its children fused into the products in its forward; None: it has none."""
    cls = host_of(type(block))
    forward = cls.forward
    if cls.__module__.partition(".")[0] == "torch" or not inspect.isfunction(forward) or "forward" in block.__dict__:
        return None
    gates = _gates_of(block)
    masks = [path for path, (_, mask) in gates.items() if mask]
    if not masks and len(gates) < 2:
        return None
    if len(inspect.signature(forward).parameters) != 2 or _is_impure(cls, forward):
        return None
    try:
        graph = _Tracer(gates).trace(block)
    except Exception:
        return None
    graph.owning_block = block  # type: ignore[attr-defined]
    if _writes_in_place(cls, forward) and not all(_may_be_written(node, gates) for node in graph.nodes):
        return None
    regions = _rewrite(graph, gates)
    if not regions:
        return None
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {cls.__name__}>", "exec"), space)
    covered = tuple(path for _, paths in regions for path in paths)
    parts = tuple(n for n, _ in block.named_modules() if any(n == p or n.startswith(f"{p}.") for p in covered))
    name = ", ".join(name for name, _ in regions) + " in its forward"
    functions = ("cbam",) if any("CBAM" in name for name, _ in regions) else ("channel_gate",)
    return OwnLayers(space["forward"], name, functions, rank=4, bypassed=parts, covers=covered)


def _gates_of(block: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Paths of the gates among a module's children, its own or in containers -> the gate, whether it is a mask."""
    found: dict[str, tuple[nn.Module, bool]] = {}

    def look(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if type(child) in _CONTAINERS:
                look(child, f"{path}.")
            elif known_class(host_of(type(child))) is None:
                outcome = outcome_of(child)
                if outcome.found is not None and outcome.found.kind in ("channel", "spatial"):
                    found[path] = child, outcome.found.mask

    look(block, "")
    return found


_FORBIDDEN = {
    "print", "open", "input", "no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "autocast", "checkpoint",
    "training", "random", "rand", "randn", "bernoulli", "time", "logging", "logger", "is_scripting", "is_tracing",
    "requires_grad", "append", "setattr", "eval", "exec", "dropout", "register_buffer", "record_function",
}  # fmt: skip


def _reached_code(cls: type, forward: Callable) -> list[CodeType]:
    """Of a forward and of what it calls of its class and file."""
    waiting: list[Any] = [forward]
    seen: list[CodeType] = []
    while waiting:
        function = waiting.pop()
        if function.__code__ in seen:
            continue
        codes = [function.__code__, *(c for c in function.__code__.co_consts if isinstance(c, CodeType))]
        seen += codes
        for name in (n for c in codes for n in c.co_names):
            for found in (getattr(cls, name, None), function.__globals__.get(name)):
                if inspect.isfunction(found) and not found.__module__.startswith("torch"):
                    waiting.append(found)
    return seen


def _is_impure(cls: type, forward: Callable) -> bool:
    """Whether it may do something that a trace does not show."""
    return any(_FORBIDDEN & set(code.co_names) or stores(code) for code in _reached_code(cls, forward))


def _writes_in_place(cls: type, forward: Callable) -> bool:
    """Whether there is a `+=` or the like."""
    return any(
        i.opname.startswith("INPLACE_") or (i.opname == "BINARY_OP" and i.argrepr.endswith("="))
        for code in _reached_code(cls, forward)
        for i in dis.get_instructions(code)
    )


class _Tracer(torch.fx.Tracer):
    def __init__(self, gates: dict[str, Any]) -> None:
        super().__init__()
        self._gates = gates

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(path.startswith(f"{module_qualified_name}.") for path in self._gates)
        return not (inside and type(m) is nn.Sequential)


def _gated(node: torch.fx.Node, gates: dict[str, tuple[nn.Module, bool]]) -> tuple[torch.fx.Node, str, list] | None:
    """Of a node that is a map times its gate: the map, the gate's path, and the nodes in between."""
    if node.op == "call_module" and node.target in gates and not gates[node.target][1]:
        return (node.args[0], node.target, []) if len(node.args) == 1 and not node.kwargs else None  # type: ignore[return-value]
    product = (node.op == "call_function" and node.target in _PRODUCTS) or (
        node.op == "call_method" and node.target in _PRODUCT_METHODS
    )
    if not product or len(node.args) != 2 or node.kwargs:
        return None
    for x, gate in (node.args, node.args[::-1]):
        between = []
        if isinstance(gate, torch.fx.Node) and gate.op == "call_method" and gate.target == "expand_as":
            if gate.args[1] is not x or len(gate.users) != 1:
                continue
            between.append(gate)
            gate = gate.args[0]
        if not isinstance(gate, torch.fx.Node) or gate.op != "call_module" or gate.target not in gates:
            continue
        if not gates[gate.target][1] or gate.args != (x,) or gate.kwargs or len(gate.users) != 1:
            continue
        in_place = node.target is operator.imul or str(node.target).endswith("mul_") or node.target == "multiply_"
        between.append(gate)
        if in_place and not _is_fresh(x, {node, *between}, gates):
            continue
        return x, gate.target, between  # type: ignore[return-value]
    return None


def _is_fresh(x: Any, users: set, gates: dict) -> bool:
    """Whether nobody else sees what is written into x."""
    if set(x.users) - users:
        return False
    if _gated(x, gates) is not None:
        return True
    if x.op == "call_module":
        layer = x.graph.owning_block.get_submodule(x.target)
        return type(layer) in _FRESH or x.target in gates
    return False


def _may_be_written(node: torch.fx.Node, gates: dict[str, tuple[nn.Module, bool]]) -> bool:
    """Whether it makes no difference if an operator writes into its first operand: `x += y` is traced as `x + y`."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator" or not node.args:
        return True
    x = node.args[0]
    if not isinstance(x, torch.fx.Node) or node.target is operator.getitem:
        return True
    made_here = x.op == "call_function" and getattr(x.target, "__module__", "") == "_operator"
    reading = {user for user in x.users if user.op == "call_module" and user.target in gates}
    between = {u for r in reading for u in r.users if u.op == "call_method" and u.target == "expand_as"}
    users = {node, *reading, *between}
    return _is_fresh(x, users, gates) if not made_here else not set(x.users) - users


def _rewrite(graph: torch.fx.Graph, gates: dict[str, tuple[nn.Module, bool]]) -> list[tuple[str, tuple[str, ...]]]:
    regions: list[tuple[str, tuple[str, ...]]] = []
    done: set[torch.fx.Node] = set()
    for node in list(graph.nodes):
        if node in done:
            continue
        first = _gated(node, gates)
        if first is None:
            continue
        x, path, dead = first
        last, paths, erased = node, [path], [node, *dead]
        for user in node.users:
            second = _gated(user, gates)
            if second is not None and second[0] is node and set(node.users) <= {user, *second[2]} and second[1] != path:
                last, paths, erased = user, [path, second[1]], [user, *second[2], *erased]
                break
        region = _region([gates[p] for p in paths])
        if region is None and len(paths) == 2:
            last, paths, erased = node, [path], [node, *dead]
            region = _region([gates[path]])
        masks = any(gates[p][1] for p in paths)
        if region is None or (len(paths) == 1 and not masks):
            continue
        run, name = region
        with graph.inserting_before(last):
            new = graph.call_function(run, (x,))
        last.replace_all_uses_with(new)
        # Users first: a node may only go when nobody reads it.
        for gone in sorted(erased, key=list(graph.nodes).index, reverse=True):
            graph.erase_node(gone)
        done.update(erased)
        regions.append((name, tuple(paths)))
    return regions


def _region(gates: list[tuple[nn.Module, bool]]) -> tuple[Callable[[Tensor], Tensor], str] | None:
    from ..report import describe
    from ..swap import intact, plan, run

    composite = Composite(gates)
    recipe: Recipe | str | None = recipe_of_one(composite)
    if recipe is None or isinstance(recipe, str):
        return None
    found = recipe
    seen: list[Any] = []  # the plan, made when it is first run: by then the gates are what they will be

    def fused_attention(x: Tensor) -> Tensor:
        if not seen:
            seen.append(plan(composite, found))
        if x.dim() != found.rank or not intact(composite, seen[0]):
            return composite.forward(x)
        return run(composite, seen[0], x)

    return fused_attention, describe(composite, recipe)
