"""Attention of every position to those of its row and column, and CCNet's block of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .block_attention import check_channels
from .checkpoints import OtherNames
from .scale import scale
from .squeeze_excite import hidden_channels, positive_int


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See `fused_attn.functional.criss_cross_attention`."""
    height, width = query.shape[2:]
    itself = torch.eye(height, dtype=torch.bool, device=query.device)[:, None]
    of_column = torch.einsum("bchw,bcgw->bhwg", query, key).masked_fill(itself, -torch.inf)
    of_row = torch.einsum("bchw,bchv->bhwv", query, key)
    weights = torch.cat([of_column, of_row], 3).softmax(3)
    of_column, of_row = weights.split([height, width], 3)
    summed = torch.einsum("bhwg,bcgw->bchw", of_column, value) + torch.einsum("bhwv,bchv->bchw", of_row, value)
    return summed.to(value.dtype)


def attend(x: Tensor, query: Any, key: Any, value: Any, gamma: Tensor, recurrence: int) -> Tensor:
    """x + gamma * (what the values of its row and column are, weighted), `recurrence` times; the layers are called."""
    for _ in range(recurrence):
        attended = criss_cross_attention(query(x), key(x), value(x))
        x = scale(attended.to(x.dtype), gamma.expand(x.shape[:2]), residual=x)
    return x


class CrissCrossAttention(OtherNames):
    """See `fused_attn.nn.CrissCrossAttention`."""

    other_names: ClassVar[dict[str, str]] = {"gamma.scale": "gamma"}

    #: What the forward pass does; `fused_attn.nn` puts the fused function here.
    _attend = staticmethod(attend)

    def __init__(self, channels: int, *, reduction: float = 8, recurrence: int = 2) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.recurrence = positive_int("recurrence", recurrence)
        inner = hidden_channels(channels, reduction, None)
        self.query_conv = nn.Conv2d(channels, inner, 1)
        self.key_conv = nn.Conv2d(channels, inner, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"{self.channels}, recurrence={self.recurrence}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x: expected (B, C, H, W); got shape {tuple(x.shape)}")
        check_channels(self.channels, x)
        return self._attend(x, self.query_conv, self.key_conv, self.value_conv, self.gamma, self.recurrence)
