"""Norm gate: BatchNorm, activation, channel gate, residual and activation."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..codes import FUNCTIONS
from .scale import scale
from .squeeze import space

Excitation = Callable[[Tensor], Tensor]


def norm_gate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    excitation: Excitation | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.norm_gate`."""
    u = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    u = FUNCTIONS[activation](u)
    if excitation is not None:
        gate = excitation(u.mean(space(u)))
        return scale(u, gate.flatten(1), residual=residual, post_activation=post_activation)
    return FUNCTIONS[post_activation](u if residual is None else u + residual)
