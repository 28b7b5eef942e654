"""A BatchNorm with what follows it, one fused op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional, reference
from ..reference.block_attention import NORMS, count_batch, uses_batch_statistics


def normalised(
    norm: Any,
    x: Tensor,
    *,
    activation: str = "identity",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """As the reference, by `functional.norm_gate`; what somebody put in place of the BatchNorm, and
    maps that are to become another dtype, run as they are."""
    same = residual is None or residual.dtype == x.dtype
    if type(norm) not in NORMS or not same or x.dim() != 2 + 1 + NORMS.index(type(norm)):
        return reference.normalised.normalised(
            norm, x, activation=activation, gate=gate, residual=residual, post_activation=post_activation
        )
    return norm_gate(
        norm,
        x,
        activation=activation,
        excitation=None if gate is None else lambda _: gate,
        residual=residual,
        post_activation=post_activation,
    )


def norm_gate(norm: Any, x: Tensor, **options: Any) -> Tensor:
    """`functional.norm_gate` with a BatchNorm's parameters and statistics, which it keeps as its own forward would."""
    tracked = not norm.training or norm.track_running_stats
    return functional.norm_gate(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        training=uses_batch_statistics(norm),
        momentum=count_batch(norm),
        eps=norm.eps,
        **options,
    )
