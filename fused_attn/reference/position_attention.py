"""Attention between positions: the softmax over all of them of products of queries and keys."""

from __future__ import annotations

from torch import Tensor


def position_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """See `fused_attn.functional.position_attention`."""
    logits = query.flatten(2).transpose(1, 2) @ key.flatten(2)
    return weighted_values((logits * scale).softmax(2), value, query)


def weighted_values(weights: Tensor, value: Tensor, query: Tensor) -> Tensor:
    """Sums over the keys, weights (B, queries, keys) times value (B, E, *other_space), in the query's space."""
    sums = value.flatten(2) @ weights.transpose(1, 2)
    return sums.to(value.dtype).reshape(*value.shape[:2], *query.shape[2:])
