"""What a block is, in the terms of the fused functions: plain data."""

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
    options: names of what forward takes beside the map, in their order; it raises `Unsuited` for other values.
    maps: names of the maps of a block of several, in their order; it takes no options then. keys: where they are in
    the one list, tuple or dictionary that it takes; none: it takes the maps.
    save: of a block with tails, what its layers keep for backward, one of `ops.remake.SAVES`; None: it has none.
    left: why it still multiplies a map by a gate as it is written; None: it does not.
    """

    forward: Callable[..., Tensor]
    name: str
    functions: tuple[str, ...]
    adds_input: bool = False
    rank: int | None = 4
    bypassed: tuple[str, ...] = ()
    whole: bool = False
    covers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    keys: tuple[str | int, ...] = ()
    save: str | None = None
    left: str | None = None


Recipe = ChannelGate | SpatialGate | CbamGate | SplitGate | OwnLayers
