"""What a block is, in the terms of the fused functions, and how host libraries' classes are turned into that.

An adapter is a function from a block to a `ChannelGate` or `SplitGate`, registered for its exact class, or to a
string that says why this one is left alone. It runs once, at `fuse`; parameters are read at every call.
A class is known by itself, or, where its library must not be imported for it, by its qualified name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


Recipe = ChannelGate | SplitGate
Adapter = Callable[[nn.Module], "Recipe | str"]

ADAPTERS: dict[type | str, Adapter] = {}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register(*classes: type | str) -> Callable[[Adapter], Adapter]:
    """Decorator: this adapter recognises blocks of exactly these classes, given themselves or by qualified name.

    Raises:
        TypeError: what was given is neither an `nn.Module` class nor a name.
    """
    for cls in classes:
        if not (isinstance(cls, str) or (isinstance(cls, type) and issubclass(cls, nn.Module))):
            raise TypeError(f"register: expected nn.Module classes or their qualified names; got {cls!r}")

    def add(adapter: Adapter) -> Adapter:
        for cls in classes:
            ADAPTERS[cls] = adapter
        return adapter

    return add


def known_class(cls: type) -> type | None:
    """The class itself or the base of it that an adapter is registered for."""
    return next((base for base in cls.__mro__ if adapter_of(base) is not None), None)


def adapter_of(cls: type) -> Adapter | None:
    return ADAPTERS.get(cls) or ADAPTERS.get(qualified_name(cls))


def recognise(block: nn.Module) -> Recipe | str | None:
    """What a block is; a string: why it is left alone; None: it is of no known class."""
    cls = type(block)
    known = known_class(cls)
    if known is None:
        return None
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    changed = changed_by_subclass(cls, known)
    if changed:
        return changed
    adapter = adapter_of(known)
    assert adapter is not None
    recipe = adapter(block)
    if isinstance(recipe, ChannelGate):
        return swapped_layer(block, recipe) or recipe
    return recipe


_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def swapped_layer(block: nn.Module, recipe: ChannelGate) -> str | None:
    """Why a layer whose weight is read cannot be bypassed: LoRA and (fake-)quantised layers have a `weight` too,
    so that an adapter which only names the path would drop what they add to it."""
    for path in (recipe.weight1, recipe.weight2):
        owner = block.get_submodule(path.rpartition(".")[0]) if path else block
        plain = _DENSE if recipe.layer == "dense" else (nn.Conv1d,)
        if owner is not block and type(owner) not in plain:
            return f"{path} belongs to a {type(owner).__name__}, not to a plain layer"
    return None


def changed_by_subclass(cls: type, known: type) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(known)]:
        if base.__module__.startswith("torch.distributed"):
            return "already sharded: fuse before fully_shard"
        for attribute in base.__dict__:
            if not attribute.startswith("__") and hasattr(known, attribute):
                return f"{cls.__name__} overrides {attribute} of {known.__name__}"
    return None
