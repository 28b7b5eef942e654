"""What the modules that select between branches share: their layers, and the forward pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..codes import FUNCTIONS
from .select import branch_weights, select_with
from .squeeze import Excitation


@dataclass
class Layers:
    """The excitation: fc1, BatchNorm, activation, fc2, and the softmax or sigmoid over `paths` branches.

    fc1 and fc2 are 1x1 convolutions. norm: None where there is none.
    """

    fc1: Any
    norm: Any
    activation: str
    fc2: Any
    paths: int
    groups: int = 1
    gate: str = "softmax"

    def __call__(self, descriptor: Tensor) -> Tensor:
        """(B, C) descriptors to (B, M, C) branch weights."""
        z = self.fc1(descriptor[:, :, None, None])
        if self.norm is not None:
            z = self.norm(z)
        z = self.fc2(FUNCTIONS[self.activation](z))
        return branch_weights(z.flatten(1), self.paths, self.groups, self.gate)


def selection(
    branches: Tensor | Sequence[Tensor],
    norms: Sequence[Any],
    activation: str,
    excitation: Excitation,
    paths: int | None = None,
) -> Tensor:
    """select_with over activation(norm(branch)).

    norms: the BatchNorms behind the branches, one of all where `paths` says that they are stacked; or none.
    excitation: `Layers`, or any callable as `functional.select_with` takes it.
    """
    function = FUNCTIONS[activation]
    if isinstance(branches, Tensor):
        u = norms[0](branches) if norms else branches
        return select_with(function(u), excitation, paths=paths)
    maps = [norm(u) for norm, u in zip(norms, branches, strict=True)] if norms else branches
    return select_with([function(u) for u in maps], excitation)


def make_divisible(value: float, divisor: int, least: int) -> int:
    """timm's: the nearest multiple of divisor, at least `least` and nine tenths of value."""
    nearest = max(least, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def check_batch(x: Tensor, norm: Any) -> None:
    """Raises for a batch of one sample, of whose descriptors `norm` cannot take the statistics."""
    if x.shape[0] == 1 and norm is not None and norm.training:
        raise ValueError(
            "x: expected more than one sample in training: the BatchNorm inside the excitation sees one value a"
            f" channel; got shape {tuple(x.shape)}"
        )
