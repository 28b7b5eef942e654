"""A BatchNorm with what follows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..codes import FUNCTIONS


def normalised(
    norm: Any,
    x: Tensor,
    *,
    activation: str = "identity",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """post_activation(activation(norm(x)) * gate + residual). gate: (B, C, 1, ...)."""
    x = FUNCTIONS[activation](norm(x))
    if gate is not None:
        x = x * gate
    if residual is not None:
        x = x + residual
    return FUNCTIONS[post_activation](x)
