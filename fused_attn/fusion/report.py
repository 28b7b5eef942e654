"""explain(model): what every attention block is, what serves it, or why it was left alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import nn

from .. import backends
from ..reference.squeeze_excite import _ChannelGate as OwnBlock
from .api import decide
from .registry import ChannelGate, Recipe, qualified_name
from .swap import PLAN, host_class, intact


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


def describe(block: nn.Module, recipe: Recipe) -> str:
    """Such as "SqueezeExcite(256 -> 16, relu, sigmoid)"."""
    pool = "" if recipe.pool == "avg" else f", {recipe.pool} pool"
    residual = ", adds its input" if recipe.adds_input else ""
    if not isinstance(recipe, ChannelGate):
        return f"squeeze, its own layers, scale{pool and f' ({pool[2:]})'}"
    if recipe.weight1 is None:
        return f"gate({recipe.gate}{pool}{residual})"
    shape = block.get_parameter(recipe.weight1).shape
    if recipe.layer != "dense":
        return f"ECA(kernel {shape[-1]}, {recipe.layer}, {recipe.gate}{pool}{residual})"
    if recipe.weight2 is None:
        return f"EffectiveSE({shape[1]}, {recipe.gate}{pool}{residual})"
    return f"SqueezeExcite({shape[1]} -> {shape[0]}, {recipe.activation}, {recipe.gate}{pool}{residual})"


def explain(model: nn.Module) -> Report:
    """A printable report of the attention blocks in a model, fused or not: what each is and what serves it.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    return Report(row for name, block in model.named_modules() if (row := _row(name, block)) is not None)


def _row(name: str, block: nn.Module) -> Row | None:
    name = name or "(the model)"
    if isinstance(block, OwnBlock) and type(block).__module__.startswith("fused_attn.nn"):
        served, why = _backend(block, ("channel_gate",))
        return Row(name, type(block).__name__, qualified_name(type(block)), True, served, why)
    host = host_class(block)
    if host is not None:
        plan = block.__dict__[PLAN]
        if not intact(block, plan):
            return Row(name, "", qualified_name(host), False, "its own forward", "changed since fuse")
        served, why = _backend(block, _ops(plan.recipe))
        return Row(name, describe(block, plan.recipe), qualified_name(host), True, served, why)
    found = decide(block)
    if found is None:
        return None
    cls = qualified_name(type(block))
    if isinstance(found, str):
        return Row(name, "", cls, False, "its own forward", found)
    return Row(name, describe(block, found), cls, False, "its own forward", "not fused yet: fused_attn.fuse(model)")


def _ops(recipe: Recipe) -> tuple[str, ...]:
    return ("channel_gate",) if isinstance(recipe, ChannelGate) else ("squeeze", "scale")


def _backend(block: nn.Module, ops: tuple[str, ...]) -> tuple[str, str]:
    """The backend on the device of the block's parameters, and why it is that one."""
    tensor = next(itertools.chain(block.parameters(), block.buffers()), None)
    device = tensor.device.type if tensor is not None else "cpu"
    forced = backends.forced()
    if forced is None:
        return backends.default(ops[0], device)
    reasons = [r for op in ops if (r := backends.unavailable(forced, op, device))]
    return (forced, reasons[0]) if reasons else (forced, "asked for")
