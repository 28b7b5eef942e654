"""How host libraries' classes are turned into recipes.

An adapter is a function from a block to a recipe (`ChannelGate`, `SpatialGate`, `CbamGate`, `SplitGate` or
`OwnLayers`), registered for its exact class, or to a string that says why this one is left alone. It runs once, at
`fuse`; parameters are read at every call.
A class is known by itself, or, where its library must not be imported for it, by its qualified name.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from torch import nn

from ..reading.layers import swapped_layer
from ..reading.recognise import recipe_of
from ..recipes.names import host_of, qualified_name
from ..recipes.recipe import Recipe

Adapter = Callable[[nn.Module], "Recipe | str"]

ADAPTERS: dict[type | str, Adapter] = {}

#: Adapters of whole residual blocks, whose tails are fused: see `tails.py`.
TAILS: dict[type | str, Adapter] = {}


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
    cls = host_of(type(block))
    known = known_class(cls, adapters)
    if known is None or is_patched(known):
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


def is_patched(known: type) -> bool:
    """Whether a class has methods that somebody put in since it was written: then it is what it computes."""
    for base in known.__mro__[: known.__mro__.index(nn.Module)]:
        for member in vars(base).values():
            function = member.fget if isinstance(member, property) else member
            if isinstance(function, types.FunctionType):
                written = function.__module__ == base.__module__
                if not (written and function.__qualname__.startswith(f"{base.__qualname__}.")):
                    return True
    return False


def changed_by_subclass(cls: type, known: type) -> str | None:
    for base in cls.__mro__[: cls.__mro__.index(known)]:
        if str(base.__module__).startswith("torch.distributed"):
            return "already sharded: fuse before fully_shard"
        for attribute in base.__dict__:
            changes = not attribute.startswith("__") or attribute in ("__call__", "__getattr__")
            if changes and hasattr(known, attribute):
                return f"{cls.__name__} overrides {attribute} of {known.__name__}"
    return None
