"""CBAM: a channel gate, then a spatial gate on its output."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .channel_gate import channel_gate as gate_channels
from .channel_pool import Order
from .spatial_gate import BatchNorm
from .spatial_gate import spatial_gate as gate_space
from .squeeze import Affine


def cbam(
    x: Tensor,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
    layer: str = "dense",
    pool: str = "both",
    channel_ties: str = "first",
    activation: str = "relu",
    channel_gate: str = "sigmoid",
    order: Order = ("max", "mean"),
    spatial_ties: str = "first",
    spatial_gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """See `fused_attn.functional.cbam`."""
    if spatial_weight is None:
        raise TypeError("spatial_weight: expected a tensor; got NoneType")
    return gate_space(
        gate_channels(
            x,
            weight1,
            bias1,
            weight2,
            bias2,
            layer=layer,
            pool=pool,
            ties=channel_ties,
            activation=activation,
            gate=channel_gate,
            affine=affine,
            pre_activation=pre_activation,
        ),
        spatial_weight,
        spatial_bias,
        batch_norm=batch_norm,
        keep=keep,
        order=order,
        ties=spatial_ties,
        gate=spatial_gate,
        residual=residual,
        post_activation=post_activation,
    )
