"""Spatial gate: channel pool, convolution of its two maps to one, scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import FUNCTIONS
from .channel_pool import Order, channel_pool
from .scale import scale
from .squeeze import Affine, prologue

#: Weight (1,), bias (1,) and eps of a BatchNorm of one channel that takes its statistics from the batch.
BatchNorm = tuple[Tensor, Tensor, float]


def spatial_logits(pooled: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, 2, *spatial) to (B, 1, *spatial): a convolution of odd kernel, zero-padded to the same size."""
    if weight.dtype != pooled.dtype and not torch.is_autocast_enabled(pooled.device.type):
        pooled = pooled.to(weight.dtype)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[pooled.dim() - 3]
    return convolve(pooled, weight, bias, padding=tuple(k // 2 for k in weight.shape[2:]))


def normalised(logits: Tensor, batch_norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The logits with mean 0 and variance 1 over the batch, scaled and shifted; that mean and (biased) variance."""
    weight, bias, eps = batch_norm
    variance, mean = torch.var_mean(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), correction=0)
    return F.batch_norm(logits, None, None, weight, bias, training=True, eps=eps), mean, variance


def spatial_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
    order: Order = ("max", "mean"),
    ties: str = "first",
    gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """See `fused_attn.functional.spatial_gate`."""
    x = prologue(x, affine, pre_activation)
    logits = spatial_logits(channel_pool(x, order=order, ties=ties), weight, bias)
    if batch_norm is None:
        return scale(x, FUNCTIONS[gate](logits), residual=residual, post_activation=post_activation)
    logits, mean, variance = normalised(logits, batch_norm)
    if keep is not None:
        keep(mean, variance)
    return scale(x, FUNCTIONS[gate](logits), residual=residual, post_activation=post_activation), mean, variance
