"""Channel gate: squeeze, excite, scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import FUNCTIONS
from .scale import scale
from .squeeze import Affine, global_max, prologue, space


def excite(
    descriptor: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *,
    layer: str = "dense",
    activation: str = "relu",
) -> Tensor:
    """(B, C) descriptors to (B, C) gate logits through none, one or two layers."""
    if weight1 is None:
        return descriptor
    if layer != "dense":
        pad = weight1.shape[-1] // 2
        row = descriptor.unsqueeze(1)
        if layer == "conv":
            return F.conv1d(row, weight1, bias1, padding=pad).squeeze(1)
        return F.conv1d(_wrap(row, pad), weight1, bias1).squeeze(1)
    z = F.linear(descriptor, weight1.flatten(1), bias1)
    if weight2 is None:
        return z
    return F.linear(FUNCTIONS[activation](z), weight2.flatten(1), bias2)


def _wrap(row: Tensor, pad: int) -> Tensor:
    """Circular padding of the last axis; F.pad refuses a pad longer than the row, an index does not."""
    channels = row.shape[-1]
    index = [(i - pad) % channels for i in range(channels + 2 * pad)]
    return row[..., index]


def channel_logits(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    *,
    layer: str = "dense",
    pool: str = "avg",
    ties: str = "first",
    activation: str = "relu",
) -> Tensor:
    """(B, C, *spatial) to (B, C): what the gate's function is applied to."""

    def logits_of(descriptor: Tensor) -> Tensor:
        return excite(descriptor, weight1, bias1, weight2, bias2, layer=layer, activation=activation)

    if pool == "both":
        return logits_of(x.mean(space(x))) + logits_of(global_max(x, ties))
    if pool == "avgmax":
        return logits_of(0.5 * x.mean(space(x)) + 0.5 * global_max(x, ties))
    return logits_of(x.mean(space(x)) if pool == "avg" else global_max(x, ties))


def gate_alone(
    x: Tensor,
    squeeze: Callable[..., Tensor | tuple[Tensor, Tensor]],
    logits_of: Callable[[Tensor], Tensor],
    *,
    pool: str,
    ties: str,
    gate: str,
) -> Tensor:
    """(B, C, *spatial) to the (B, C) gate. squeeze: as `reference.squeeze`; logits_of: from descriptors to logits,
    each row by itself."""
    pooled = squeeze(x, "avgmax" if pool == "both" else pool, ties=ties)
    if isinstance(pooled, Tensor):
        logits = logits_of(pooled)
    elif pool == "both":  # rows do not see each other: one product a layer for both
        of_both = logits_of(torch.cat(pooled))
        logits = of_both[: x.shape[0]] + of_both[x.shape[0] :]
    else:
        logits = logits_of(0.5 * pooled[0] + 0.5 * pooled[1])
    return FUNCTIONS[gate](logits)


def channel_gate(
    x: Tensor,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    layer: str = "dense",
    pool: str = "avg",
    ties: str = "first",
    activation: str = "relu",
    gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.channel_gate`."""
    x = prologue(x, affine, pre_activation)
    logits = channel_logits(x, weight1, bias1, weight2, bias2, layer=layer, pool=pool, ties=ties, activation=activation)
    return scale(x, FUNCTIONS[gate](logits), residual=residual, post_activation=post_activation)
