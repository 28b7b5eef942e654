"""Self-attention over the positions and over the channels of a map: SAGAN's, and both of DANet."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .block_attention import CONVOLUTIONS, check_channels, check_rank, optional_channels, spatial_rank
from .checkpoints import OtherNames
from .position_attention import position_attention
from .squeeze_excite import finite, hidden_channels, positive_int

#: What others call the number in front of an attention.
_GAMMA = dict.fromkeys(("gamma.scale", "scale.alpha", "sigma"), "gamma")

#: What others call the layers of a position attention.
_PROJECTIONS = {f"{name}_project": f"{name}_conv" for name in ("query", "key", "value")}


def channel_self_attention(x: Tensor, gamma: Tensor) -> Tensor:
    """x + gamma * softmax(-x x^T) x over the channels of x, (B, C, *spatial); gamma: (1,)."""
    return add_scaled(x, gamma, attended_channels(x))


def attended_channels(x: Tensor) -> Tensor:
    """softmax(-x x^T) x over the channels of x, (B, C, *spatial)."""
    rows = x.flatten(2)
    weights = (-(rows @ rows.transpose(1, 2))).softmax(2)
    return (weights @ rows).reshape(x.shape)


def add_scaled(x: Tensor, gamma: Tensor, y: Tensor) -> Tensor:
    """x + gamma * y, in x's dtype and layout."""
    return torch.addcmul(x, gamma, y).to(x.dtype)


class SelfAttention2d(OtherNames):
    """See `fused_attn.nn.SelfAttention2d`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _position_attention = staticmethod(position_attention)

    other_names: ClassVar[dict[str, str]] = {
        **_GAMMA,
        **{
            prefix + theirs: ours
            for prefix in ("", "snconv1x1_", "conv1x1_", "conv_")
            for theirs, ours in (("theta", "query_conv"), ("phi", "key_conv"), ("g", "value_conv"))
        },
        **dict.fromkeys(("o", "snconv1x1_attn", "snconv1x1_o_conv", "conv1x1_attn", "conv_attn"), "out_conv"),
    }

    def __init__(
        self, channels: int, *, form: str = "original", reduction: float = 8, bias: bool | None = None
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if form not in ("original", "port"):
            raise ValueError(f"form: expected one of original, port; got {form!r}")
        self.form = form
        inner = hidden_channels(channels, reduction, None)
        bias = form == "port" if bias is None else bias
        values = channels if form == "port" else hidden_channels(channels, 2, None)
        self.query_conv = nn.Conv2d(channels, inner, 1, bias=bias)
        self.key_conv = nn.Conv2d(channels, inner, 1, bias=bias)
        self.value_conv = nn.Conv2d(channels, values, 1, bias=bias)
        self.out_conv = nn.Conv2d(values, channels, 1, bias=bias) if form == "original" else None
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"{self.channels}, form={self.form!r}"

    def forward(self, x: Tensor) -> Tensor:
        check_rank(2, x)
        check_channels(self.channels, x)
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        if self.out_conv is None:
            return add_scaled(x, self.gamma, self._position_attention(query, key, value))
        key, value = nn.functional.max_pool2d(key, 2), nn.functional.max_pool2d(value, 2)
        return add_scaled(x, self.gamma, self.out_conv(self._position_attention(query, key, value)))


class PositionAttention(OtherNames):
    """See `fused_attn.nn.PositionAttention`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _position_attention = staticmethod(position_attention)

    other_names: ClassVar[dict[str, str]] = {**_GAMMA, **_PROJECTIONS}

    def __init__(self, channels: int, *, reduction: float = 8, hidden: int | None = None, rank: int = 2) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.rank = spatial_rank(rank)
        inner = hidden_channels(channels, reduction, None) if hidden is None else positive_int("hidden", hidden)
        conv = CONVOLUTIONS[rank - 1]
        self.query_conv = conv(channels, inner, 1)
        self.key_conv = conv(channels, inner, 1)
        self.value_conv = conv(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"{self.channels}, rank={self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        check_rank(self.rank, x)
        check_channels(self.channels, x)
        return self._attend(x, self._position_attention)

    def _attend(self, x: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        return add_scaled(x, self.gamma, attention(self.query_conv(x), self.key_conv(x), self.value_conv(x)))


class ChannelSelfAttention(OtherNames):
    """See `fused_attn.nn.ChannelSelfAttention`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _channel_self_attention = staticmethod(channel_self_attention)

    other_names: ClassVar[dict[str, str]] = _GAMMA

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        return self._channel_self_attention(x, self.gamma)


class DualAttention(OtherNames):
    """See `fused_attn.nn.DualAttention`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _position_attention = staticmethod(position_attention)
    _channel_self_attention = staticmethod(channel_self_attention)

    other_names: ClassVar[dict[str, str]] = {
        theirs: ours
        for branch, name, first, attention, second, last in (
            ("pam", "pa", "conv5a", "sa", "conv51", "conv6"),
            ("cam", "ca", "conv5c", "sc", "conv52", "conv7"),
        )
        for theirs, ours in (
            (f"{branch}_in_conv.conv", f"{first}.0"),
            (f"{branch}_in_conv.bn", f"{first}.1"),
            (f"{branch}.gamma.scale", f"{attention}.gamma"),
            *((f"{branch}.{a}", f"{attention}.{b}") for a, b in _PROJECTIONS.items()),
            (f"{branch}_out_conv.conv", f"{second}.0"),
            (f"{branch}_out_conv.bn", f"{second}.1"),
            (f"{branch}_conv_seg", f"{last}.1"),
            (f"branch_{name}.conv1.conv", f"{first}.0"),
            (f"branch_{name}.conv1.bn", f"{first}.1"),
            (f"branch_{name}.att.scale.alpha", f"{attention}.gamma"),
            (f"branch_{name}.att", attention),
            (f"branch_{name}.conv2.conv", f"{second}.0"),
            (f"branch_{name}.conv2.bn", f"{second}.1"),
            (f"branch_{name}.conv3", f"{last}.1"),
        )
    } | {"conv_seg": "conv8.1", "conv": "conv8.1"}

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        hidden: int | None = None,
        reduction: float = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.out_channels = out_channels if out_channels is None else positive_int("out_channels", out_channels)
        if not 0 <= finite("dropout", dropout) <= 1:
            raise ValueError(f"dropout: expected a number from 0 to 1; got {dropout!r}")
        width = hidden_channels(channels, 4, None) if hidden is None else positive_int("hidden", hidden)
        self.conv5a, self.conv5c = _normalised(channels, width), _normalised(channels, width)
        self.sa = PositionAttention(width, reduction=reduction)
        self.sc = ChannelSelfAttention(width)
        self.conv51, self.conv52 = _normalised(width, width), _normalised(width, width)
        if out_channels is not None:
            self.conv6, self.conv7, self.conv8 = (_classifier(width, out_channels, dropout) for _ in range(3))

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.out_channels}"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        check_rank(2, x)
        check_channels(self.channels, x)
        positions = self.conv51(self.sa._attend(self.conv5a(x), self._position_attention))
        channels = self.conv52(self._channel_self_attention(self.conv5c(x), self.sc.gamma))
        both = positions + channels
        if self.out_channels is None:
            return both
        return self.conv8(both), self.conv6(positions), self.conv7(channels)


def _normalised(channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _classifier(channels: int, out_channels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, out_channels, 1))
