"""What a class is called, and which class a fused block had."""

from __future__ import annotations

from typing import Any

from torch import nn

#: Of a class that `fuse` made: the class that its instances had.
HOST = "_fused_attn_host"


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def host_of(cls: type) -> Any:
    """The class that a fused block had; any other class itself."""
    return getattr(cls, HOST, cls)


def host_class(block: nn.Module) -> type[nn.Module] | None:
    """The class that a fused block had; None for others. Seen through what fully_shard and parametrisations make of a
    class."""
    return getattr(type(block), HOST, None)


def class_name(block: Any) -> str:
    """The qualified name of a block's class; of the class it had, where it is fused."""
    return qualified_name(host_of(type(block)))
