"""Gates along one axis of space: a number a row of each sample, made of its mean over channels and the other axes, as
speaker networks have them for frequencies. They run by the functions for gates a channel, on views of the map."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import functional
from ...nn.small import up_to
from ...ops.common import is_channels_last
from .describe import describe
from .masks import channel_mask
from .recipe import ChannelGate, OwnLayers, Recipe, SplitGate
from .run import Unsuited, parameter_paths, parameters_of, run


class Turned(nn.Module):
    """A block on maps whose channels and this axis have changed places: of a gate along that axis, a channel gate."""

    def __init__(self, block: nn.Module, axis: int) -> None:
        super().__init__()
        self.block, self.axis = block, axis

    def forward(self, x: Tensor) -> Any:
        if x.dim() < self.axis + 2:  # along the last axis it is a channel gate of a map that has its channels last
            raise ValueError(f"x: expected an axis behind axis {self.axis}; got shape {tuple(x.shape)}")
        return self.block(x.transpose(1, self.axis)).transpose(1, self.axis)


class _View(NamedTuple):
    """A map as maps whose channels are one of its axes, `each` of them a sample. last: its own are last in memory."""

    maps: Tensor
    each: int
    last: bool


def _viewed(x: Tensor, axis: int) -> _View:
    last = not x.is_contiguous() and is_channels_last(x)
    x = x.movedim(1, -1) if last else x.contiguous()
    batch, *sizes = x.shape
    at = axis - 1 - last
    each = math.prod(sizes[:at])
    return _View(x.view(batch * each, sizes[at], math.prod(sizes[at + 1 :])), each, last)


#: Which maps are faster as a block is written, on the CPU: without gradients up to 4 MiB, and with them, NCHW, up to 2.
_is_small = up_to(4 << 20, 2 << 20)


class _Held(NamedTuple):
    """In place of a `Turned` block: what the paths in a recipe for one begin at."""

    block: nn.Module


@dataclass(frozen=True)
class GateAlong:
    """What a block runs whose gate is along this axis. gate: what it is for a `Turned` one, of the mean."""

    gate: ChannelGate | SplitGate
    axis: int

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        if _is_small(x if torch.is_grad_enabled() or x.is_contiguous() else x.movedim(1, -1)):
            raise Unsuited("x: is small")
        held: Any = _Held(block)
        maps, each, last = _viewed(x, self.axis)
        if each == 1:
            y = run(held, self.gate, parameters_of(held, parameter_paths(self.gate)), maps)
        else:
            squeeze = functools.partial(_means, maps, each)
            if isinstance(self.gate, ChannelGate):
                mask = channel_mask(held, self.gate, x, squeeze)
            else:
                mask = self.gate.excite(held, squeeze(x)).flatten(1)
            mask = mask.unsqueeze(1).expand(-1, each, -1).flatten(0, 1)
            y = functional.scale(maps, mask, residual=maps if self.gate.adds_input else None)
        return y.view(x.movedim(1, -1).shape).movedim(-1, 1) if last else y.view(x.shape)


def _means(maps: Tensor, each: int, x: Tensor, pool: str = "avg", ties: str = "first") -> Tensor:
    """Of the samples of x, each of which is so many maps."""
    try:
        means = functional.squeeze(maps, pool, ties=ties)
    except (TypeError, ValueError) as error:
        raise Unsuited(str(error)) from error
    assert isinstance(means, Tensor)
    return means.view(x.shape[0], each, maps.shape[1]).mean(1)


def gate_along(axis: int, make: Callable[[nn.Module], Recipe | str], rank: int, block: nn.Module) -> OwnLayers | str:
    """The recipe of a block. make: that of a `Turned` one on maps of this rank."""
    gate = make(Turned(block, axis))
    if not isinstance(gate, (ChannelGate, SplitGate)):
        return gate if isinstance(gate, str) else "it is none"
    bypassed = tuple(name for name, _ in block.named_modules() if name)
    if isinstance(gate, SplitGate):
        bypassed = tuple(path.removeprefix("block.") for path in gate.bypassed if path != "block")
    name = f"gate along axis {axis}: {describe(Turned(block, axis), gate)}"
    return OwnLayers(GateAlong(gate, axis), name, ("squeeze", "scale"), rank=rank + 2, bypassed=bypassed, whole=True)
