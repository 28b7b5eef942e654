"""Bilinear attentional transforms: blocks of rows and of columns mixed by what the map has in them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .layout import in_layout_of
from .normalised import normalised
from .selection import make_divisible
from .squeeze_excite import finite, positive_int


def mix_blocks(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """P x Q for each channel of x (B, C, H, W), with the P and Q of its group: rows and columns, (B, groups, n, n), are
    between n blocks of rows and n of columns; in a block position i goes to position i. In x's layout."""
    batch, channels, height, width = x.shape
    groups, n = rows.shape[1:3]
    times, share = width // n, channels // groups
    if times > 1:
        within = torch.eye(times, dtype=x.dtype, device=x.device)[:, None]
        columns = (columns[..., None, :, None] * within).reshape(batch, groups, width, width)
    y = x.reshape(batch, groups, share * height, width) @ columns
    y = rows[:, :, None] @ y.view(batch, groups, share, n, height // n * width)
    return in_layout_of(y.view(x.shape), x)


def pool_blocks(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Maxima of n blocks of rows, (B, C, n, 1), and of n blocks of columns, (B, C, 1, n)."""
    return F.adaptive_max_pool2d(x, (n, 1)), F.adaptive_max_pool2d(x, (1, n))


def conv_norm(inputs: int, outputs: int) -> nn.ModuleDict:
    """A 1x1 convolution and a BatchNorm."""
    return nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 1, bias=False), "bn": nn.BatchNorm2d(outputs)})


class BilinearTransform(Block):
    """See `fused_attn.nn.BilinearTransform`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts its own here.
    _normalised = staticmethod(normalised)
    _pool_blocks = staticmethod(pool_blocks)

    def __init__(self, channels: int, *, block_size: int = 7, groups: int = 2) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.block_size, self.groups = positive_int("block_size", block_size), positive_int("groups", groups)
        if channels % groups:
            raise ValueError(f"groups: expected a divisor of channels, {channels}; got {groups}")
        n = block_size
        self.conv1 = conv_norm(channels, groups)
        self.conv_p = nn.Conv2d(groups, n * n * groups, (n, 1))
        self.conv_q = nn.Conv2d(groups, n * n * groups, (1, n))
        self.conv2 = conv_norm(channels, channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, block_size={self.block_size}, groups={self.groups}"

    def forward(self, x: Tensor) -> Tensor:
        n, size = self.block_size, (x.shape[0], self.groups, self.block_size, self.block_size)
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % n or x.shape[3] % n:
            multiples = f"with H and W multiples of {n}"
            raise ValueError(f"x: expected (B, {self.channels}, H, W) {multiples}; got shape {tuple(x.shape)}")
        rows, columns = self._pool_blocks(self._conv_norm_relu(self.conv1, x), n)
        p = self.conv_p(rows).view(size).sigmoid()
        q = self.conv_q(columns).view(size).sigmoid()
        y = mix_blocks(x, p / p.sum(3, keepdim=True), q / q.sum(2, keepdim=True))
        return self._conv_norm_relu(self.conv2, y)

    def _conv_norm_relu(self, layers: Any, x: Tensor) -> Tensor:
        return self._normalised(layers["bn"], layers["conv"](x), activation="relu")


class BilinearAttention(Block):
    """See `fused_attn.nn.BilinearAttention`."""

    _normalised = staticmethod(normalised)
    _transform = BilinearTransform

    def __init__(
        self,
        channels: int,
        *,
        block_size: int = 7,
        groups: int = 2,
        rd_ratio: float = 0.25,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        drop_rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if rd_channels is None:
            divisor = positive_int("rd_divisor", rd_divisor)
            rd_channels = make_divisible(channels * finite("rd_ratio", rd_ratio), divisor, divisor)
        width = positive_int("rd_channels", rd_channels)
        if not 0 <= finite("drop_rate", drop_rate) < 1:
            raise ValueError(f"drop_rate: expected a number of at least 0 and below 1; got {drop_rate!r}")
        self.conv1 = conv_norm(channels, width)
        self.ba = self._transform(width, block_size=block_size, groups=groups)
        self.conv2 = conv_norm(width, channels)
        self.dropout = nn.Dropout2d(drop_rate)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalised(self.conv1["bn"], self.conv1["conv"](x), activation="relu")
        y = self.conv2["conv"](self.ba(y))
        gate = None
        if self.dropout.training and self.dropout.p > 0:
            gate = self.dropout(y.new_ones(*y.shape[:2], 1, 1))
        return self._normalised(self.conv2["bn"], y, activation="relu", gate=gate, residual=x)
