"""Context pool: the mean of a map over its positions, weighted by a softmax."""

from __future__ import annotations

from torch import Tensor

from .scale import scale
from .squeeze import Excitation


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `fused_attn.functional.context_pool`."""
    positions = x.flatten(2)
    logits = weight.reshape(1, x.shape[1]) @ positions
    if bias is not None:
        logits = logits + bias
    return (positions @ logits.softmax(2).transpose(1, 2)).squeeze(2)


def context_pool_with_map(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `fused_attn.functional.context_pool_with_map`."""
    return x, context_pool(x, weight, bias)


def context_gate(x: Tensor, weight: Tensor, bias: Tensor | None, excitation: Excitation) -> Tensor:
    """See `fused_attn.functional.context_gate`."""
    return scale(x, excitation(context_pool(x, weight, bias)).flatten(1))
