"""Squeeze: global pooling of a feature map to one descriptor a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codes import FUNCTIONS

Affine = tuple[Tensor, Tensor]
#: From the (B, C) descriptor to the gate.
Excitation = Callable[[Tensor], Tensor]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) shaped to multiply x, (B, C, *spatial)."""
    for _ in range(x.dim() - 2):
        values = values.unsqueeze(-1)
    return values


def space(x: Tensor) -> tuple[int, ...]:
    """The spatial axes of x, (B, C, *spatial)."""
    return tuple(range(2, x.dim()))


def prologue(x: Tensor, affine: Affine | None, pre_activation: str) -> Tensor:
    """pre_activation(x * weight + bias), weight and bias one value a channel."""
    if affine is not None:
        weight, bias = (per_channel(p, x) for p in affine)
        x = torch.addcmul(bias, x, weight).to(x.dtype)
    return FUNCTIONS[pre_activation](x)


def global_max(x: Tensor, ties: str) -> Tensor:
    """Maximum over space, (B, C); ties "first": the gradient goes to the first maximum, "even": shared."""
    return x.amax(space(x)) if ties == "even" else x.flatten(2).max(2).values


def squeeze(
    x: Tensor,
    pool: str = "avg",
    *,
    ties: str = "first",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor]:
    """See `fused_attn.functional.squeeze`."""
    x = prologue(x, affine, pre_activation)
    if pool == "avg":
        return x.mean(space(x))
    if pool == "max":
        return global_max(x, ties)
    return x.mean(space(x)), global_max(x, ties)
