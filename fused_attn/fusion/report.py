"""explain(model): what every attention block is, what serves it, or why it was left alone."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import backends
from ..ops.resident import held_on
from ..reference import CBAM, SpatialAttention
from .api import Candidate, candidates, is_own
from .changing.graphs import fuse_exported, is_program
from .changing.parents import PIXEL_GATE
from .changing.plan import changes, intact, plan_of
from .changing.swap import save_of, why_no_class
from .hosts.registry import TAILS, known_class
from .reading.statistics import WhereLarge
from .recipes.along import GateAlong
from .recipes.describe import describe
from .recipes.names import class_name, host_of
from .recipes.own import own_functions
from .recipes.recipe import ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Row:
    """One block: its name in the model, what it is, its class, whether it runs fused, and by what or why not."""

    name: str
    block: str
    host: str
    fused: bool
    served_by: str
    reason: str


class Report(list[Row]):
    """Rows, one a block; printed as a table."""

    def __str__(self) -> str:
        if not self:
            return "no attention block of a known class"
        head = ("name", "block", "class", "served by", "why")
        table = [head, *((r.name, r.block, r.host, r.served_by, r.reason) for r in self)]
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        fused = sum(r.fused for r in self)
        return "\n".join([*lines, f"{fused} of {len(self)} blocks run fused"])


def explain(model: nn.Module, *, tails: bool = False) -> Report:
    """A printable report of the attention blocks in a model, fused or not: what each is and what serves it.

    Args:
        model: any module; or a program of torch.export: its operators of this library, those that `fuse(program)` would
            put there, and what that would leave alone.
        tails: also say of residual blocks what `fuse(tails=True)` would fuse in them, or why it left them alone.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    if is_program(model):
        return Report(_rows_of_program(model))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    return Report(row for found in candidates(model, tails) for row in _rows(found))


def _rows_of_program(program: ExportedProgram) -> Iterator[Row]:
    left: list[str] = []
    there = dict(_operators(program))
    for name, op in there.items():
        yield Row(name, op, "", True, "its operator", "")
    for name, op in _operators(fuse_exported(program, left)) if not there else ():
        yield Row(name, op, "", False, "its own nodes", "not fused yet: fused_attn.fuse(program)")
    for text in left:
        name, _, reason = text.partition(" ")
        yield Row(name, "", "", False, "its own nodes", reason)


def _operators(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Names of the nodes that call an operator of this library, and of the operator."""
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "fused_attn":
            yield node.name, node.target._opname


def _rows(candidate: Candidate) -> Iterator[Row]:
    """Of one module: two where some of what its forward multiplies by a gate is fused."""
    row = _row(candidate)
    if row is None:
        return
    yield row
    if candidate.left is not None and not isinstance(candidate.found, str):
        yield Row(row.name, "", row.host, False, "its own forward", candidate.left)


def _row(candidate: Candidate) -> Row | None:
    block, found = candidate.block, candidate.found
    name, cls = candidate.name or "(the model)", class_name(block)
    if is_own(block):
        served, why = _own_backend(block)
        return Row(name, type(block).__name__, cls, True, served, why)
    if candidate.served:
        return None
    plan = plan_of(block)
    if plan is not None:
        if "forward" in block.__dict__ or not intact(block, plan):
            return Row(name, "", cls, False, "its own forward", changes(block, plan))
        served, why = _backend(block, _ops(plan.recipe))
        least = "; saves the least" if save_of(block) == "least" else ""
        given = _given(block, plan.recipe)
        how = "as it is written" if plan.weighted is None else "squeezed as it is written"
        why += f"; {how} where {' or '.join(given)} is not the default" if given else ""
        why += "; as it is written on small maps" if _is_for_large(block, plan.recipe) else ""
        lacking = _lacking(block, plan.recipe)
        why += f"; as it is written without {' or '.join(lacking)}" if lacking else ""
        return Row(name, describe(block, plan.recipe) + least, cls, True, served, why)
    if found is None:
        return None
    call = "model, tails=True" if known_class(host_of(type(block)), TAILS) else "model"
    if isinstance(found, str):
        return Row(name, "", cls, False, "its own forward", found)
    why = why_no_class(host_of(type(block))) or f"not fused yet: fused_attn.fuse({call})"
    return Row(name, describe(block, found), cls, False, "its own forward", why)


def _given(block: nn.Module, recipe: Recipe) -> list[str]:
    """What a forward may be given beside its maps, such as lengths: then it runs as it is written."""
    parameters = list(inspect.signature(host_of(type(block)).forward).parameters.values())[2:]
    known = (*recipe.options, *recipe.maps) if isinstance(recipe, OwnLayers) else ()
    return [p.name for p in parameters if p.default is not p.empty and p.name not in known]


def _is_for_large(block: nn.Module, recipe: Recipe) -> bool:
    """Whether a block is on the CPU and runs as it is written on small maps there."""
    tensor = next(block.parameters(), None)
    large = isinstance(recipe, OwnLayers) and (
        isinstance(recipe.forward, (WhereLarge, GateAlong)) or PIXEL_GATE in recipe.name
    )
    return large and tensor is not None and tensor.is_cpu


def _lacking(block: nn.Module, recipe: Recipe) -> list[str]:
    """Maps that a forward needs not be given: without them it runs as it is written."""
    maps = recipe.maps if isinstance(recipe, OwnLayers) else ()
    parameters = inspect.signature(host_of(type(block)).forward).parameters
    return [name for name in maps if name in parameters and parameters[name].default is None]


def _ops(recipe: Recipe) -> tuple[str, ...]:
    if isinstance(recipe, SplitGate):
        return "squeeze", "scale"
    if isinstance(recipe, OwnLayers):
        return recipe.functions
    if isinstance(recipe, ChannelGate):
        return (_channel_op(recipe.pool),)
    return ("spatial_gate" if isinstance(recipe, SpatialGate) else "cbam",)


def _channel_op(pool: str) -> str:
    return "channel_gate/both" if pool == "both" else "channel_gate"


def _own_backend(block: Any) -> tuple[str, str]:
    if getattr(block, "extent", 0):
        return "reference", "its windows are pooled by PyTorch"
    functions = own_functions(block)
    if functions is not None:
        return _backend(block, functions)
    if isinstance(block, SpatialAttention):
        return _backend(block, ("spatial_gate",))
    if isinstance(block, CBAM):
        return _backend(block, ("cbam",)) if block.spatial is not None else _own_backend(block.channel)
    return _backend(block, (_channel_op(block.pool),))


def _backend(block: nn.Module, ops: tuple[str, ...]) -> tuple[str, str]:
    """The backend on the device of the block's parameters, and why it is that one."""
    if not ops:
        return "reference", "it is made of PyTorch's operators"
    tensor = next(itertools.chain(block.parameters(), block.buffers()), None)
    device = tensor.device.type if tensor is not None else "cpu"
    forced = backends.forced()
    if forced is None:
        served, why = backends.default(ops[0], device)
    else:
        served = forced
        why = next((r for op in ops if (r := backends.unavailable(forced, op, device))), "asked for")
    if served in backends.RESIDENT and tensor is not None and device == "cuda":
        why += f"; {held_on(tensor.device.index or 0)}"
    return served, why
