"""Scale: a map times one gate a channel or a position, with what stands before and after it."""

from __future__ import annotations

from torch import Tensor

from ..codes import FUNCTIONS
from .squeeze import Affine, per_channel, prologue


def scale(
    x: Tensor,
    gate: Tensor,
    *,
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.scale`."""
    gate = gate if gate.dim() == x.dim() else per_channel(gate, x)
    y = prologue(x, affine, pre_activation) * gate.to(x.dtype)
    if residual is not None:
        y = y + residual
    return FUNCTIONS[post_activation](y)
