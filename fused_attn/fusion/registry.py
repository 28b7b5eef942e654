"""What a block is, in the terms of the fused functions, and how host libraries' classes are turned into that.

An adapter is a function from a block to a recipe (`ChannelGate`, `SpatialGate`, `CbamGate`, `SplitGate` or
`OwnLayers`), registered for its exact class, or to a string that says why this one is left alone. It runs once, at
`fuse`; parameters are read at every call.
A class is known by itself, or, where its library must not be imported for it, by its qualified name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ChannelGate:
    """A block that is one `functional.channel_gate`.

    weight1 ... bias2 are paths of parameters in the block ("fc1.weight"), None for those it has not. rank is that
    of the maps it takes (None: any): others go to the block's own forward. adds_input: y = x * gate + x. The rest
    as in `functional.channel_gate`.
    """

    weight1: str | None = None
    bias1: str | None = None
    weight2: str | None = None
    bias2: str | None = None
    layer: str = "dense"
    pool: str = "avg"
    ties: str = "first"
    activation: str = "relu"
    gate: str = "sigmoid"
    adds_input: bool = False
    rank: int | None = 4


@dataclass(frozen=True)
class SpatialGate:
    """A block that is one `functional.spatial_gate`.

    layers: paths of the convolution and, where there is one, of the BatchNorm behind it. What uses running statistics
    is folded into the convolution at every call; what takes them from the batch is part of the op. merged: the
    convolution has one input, the mean of both pools. The rest as in `functional.spatial_gate` and `ChannelGate`.
    """

    layers: tuple[str] | tuple[str, str]
    order: tuple[str, str] = ("max", "mean")
    ties: str = "first"
    gate: str = "sigmoid"
    merged: bool = False
    adds_input: bool = False
    rank: int | None = 4


@dataclass(frozen=True)
class CbamGate:
    """A block that is one `functional.cbam`: a channel gate, then a spatial gate on its output."""

    channel: ChannelGate
    spatial: SpatialGate

    @property
    def rank(self) -> int | None:
        return self.spatial.rank

    @property
    def adds_input(self) -> bool:
        return self.spatial.adds_input


@dataclass(frozen=True)
class SplitGate:
    """A block whose excitation is not one we fuse: `squeeze`, the block's own layers, `scale`.

    excite(block, descriptor): from the (B, C) descriptor to the gate, (B, C) or (B, C, 1, ...). bypassed: paths of
    the layers it does not run (the pool), whose hooks would be skipped.
    """

    excite: Callable[[nn.Module, Tensor], Tensor]
    pool: str = "avg"
    ties: str = "first"
    adds_input: bool = False
    rank: int | None = 4
    bypassed: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnLayers:
    """A block that runs its own layers, with fused functions before, between or after them.

    forward(block, x): what it runs; `functions` are the fused functions in it, as `fused_attn.backends.OPS` has them,
    the main one first. bypassed as in `SplitGate`; adds_input only describes: forward adds it. whole: its parts are
    no blocks by themselves. covers: paths of blocks in it that it serves, so that they are not fused by themselves.
    """

    forward: Callable[[Any, Tensor], Tensor]
    name: str
    functions: tuple[str, ...]
    adds_input: bool = False
    rank: int | None = 4
    bypassed: tuple[str, ...] = ()
    whole: bool = False
    covers: tuple[str, ...] = ()


Recipe = ChannelGate | SpatialGate | CbamGate | SplitGate | OwnLayers
Adapter = Callable[[nn.Module], "Recipe | str"]

ADAPTERS: dict[type | str, Adapter] = {}

#: Adapters of whole residual blocks, whose tails are fused: see `tails.py`.
TAILS: dict[type | str, Adapter] = {}

#: Modules of `fused_attn.reference` -> their classes in `fused_attn.nn`, whose functions the fused ones get.
FUSED_FORMS: dict[type[nn.Module], type[nn.Module]] = {}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def class_name(block: Any) -> str:
    """The qualified name of a block's class; of the class it had, where it is fused."""
    cls = type(block)
    return qualified_name(getattr(cls, "_fused_attn_host", cls))


def register(*classes: type | str, adapters: dict[type | str, Adapter] = ADAPTERS) -> Callable[[Adapter], Adapter]:
    """Decorator: this adapter recognises blocks of exactly these classes, given themselves or by qualified name.

    Raises:
        TypeError: what was given is neither an `nn.Module` class nor a name.
    """
    for cls in classes:
        if not (isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Module))):
            raise TypeError(f"register: expected nn.Module classes or their qualified names; got {cls!r}")

    def add(adapter: Adapter) -> Adapter:
        for cls in classes:
            adapters[cls] = adapter
        return adapter

    return add


def known_class(cls: type, adapters: dict[type | str, Adapter] = ADAPTERS) -> type | None:
    """The class itself or the base of it that an adapter is registered for."""
    return next((base for base in cls.__mro__ if adapter_of(base, adapters) is not None), None)


def adapter_of(cls: type, adapters: dict[type | str, Adapter] = ADAPTERS) -> Adapter | None:
    return adapters.get(cls) or adapters.get(qualified_name(cls))


def recognise(block: nn.Module, adapters: dict[type | str, Adapter] = ADAPTERS) -> Recipe | str | None:
    """What a block is; a string: why it is left alone; None: it is of no known class, and (of `ADAPTERS`) looks like no
    known block."""
    from .structure import recipe_of  # imports this module

    cls = type(block)
    known = known_class(cls, adapters)
    if known is None:
        return recipe_of(block) if adapters is ADAPTERS else None
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    changed = changed_by_subclass(cls, known)
    if changed:
        return changed
    adapter = adapter_of(known, adapters)
    assert adapter is not None
    recipe = adapter(block)
    return recipe if isinstance(recipe, str) else swapped_layer(block, recipe) or recipe


def recognise_with_tail(block: nn.Module) -> Recipe | str | None:
    """As `recognise`; of what is no block to be fused by itself, its tail."""
    recipe = recognise(block)
    if recipe is None or isinstance(recipe, str):
        recipe = recognise(block, TAILS) or recipe
    return recipe


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, "timm.layers.norm_act.BatchNormAct2d")


def swapped_layer(block: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer whose weight is read cannot be bypassed: LoRA and (fake-)quantised layers have a `weight` too,
    so that an adapter which only names the path would drop what they add to it."""
    read: list[tuple[str, tuple[type | str, ...]]] = []
    channel = recipe.channel if isinstance(recipe, CbamGate) else recipe
    if isinstance(channel, ChannelGate):
        plain = (nn.Linear, *_CONVOLUTIONS) if channel.layer == "dense" else (nn.Conv1d,)
        read += [(path.rpartition(".")[0], plain) for path in (channel.weight1, channel.weight2) if path]
    spatial = recipe.spatial if isinstance(recipe, CbamGate) else recipe
    if isinstance(spatial, SpatialGate):
        read += zip(spatial.layers, (_CONVOLUTIONS, _NORMS), strict=False)
    for path, kinds in read:
        layer: Any = block.get_submodule(path)
        kind = type(layer)
        if path and kind not in kinds and qualified_name(kind) not in kinds:
            return f"{path}.weight belongs to a {kind.__name__}, not to a plain layer"
        if path and layer.weight is None:
            return f"{path} has no weight"
    return None


def changed_by_subclass(cls: type, known: type) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(known)]:
        if base.__module__.startswith("torch.distributed"):
            return "already sharded: fuse before fully_shard"
        for attribute in base.__dict__:
            if not attribute.startswith("__") and hasattr(known, attribute):
                return f"{cls.__name__} overrides {attribute} of {known.__name__}"
    return None
