"""Global second-order pooling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .normalised import normalised
from .scale import scale
from .squeeze_excite import positive_int

MODES = ("channel", "position", "avg", "max", "concat")

#: The position form looks at a map of this many rows and columns.
SIDE = 8


def covariance(x: Tensor, count: int | None = None) -> Tensor:
    """x x^T / count - s s^T / count^2 of x (B, rows, n), s the sums of its rows; the covariance where count is n, its
    default. (B, rows, rows)."""
    count = x.shape[2] if count is None else count
    s = x.sum(2, keepdim=True) / count
    return x @ x.transpose(1, 2) / count - s @ s.transpose(1, 2)


def windows(size: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The windows of an adaptive pool along an axis, as the (count, size) matrix of their means."""
    i, j = torch.arange(count, device=device)[:, None], torch.arange(size, device=device)
    inside = (j >= i * size // count) & (j < ((i + 1) * size + count - 1) // count)
    return inside.to(dtype) / inside.sum(1, keepdim=True)


def products_with_windows(x: Tensor, height: int, width: int) -> Tensor:
    """The same as `mean_of_windows` by two products with matrices, in x's dtype."""
    rows = windows(x.shape[2], height, x.dtype, x.device)
    return rows @ x @ windows(x.shape[3], width, x.dtype, x.device).T


def mean_of_windows(x: Tensor, height: int, width: int) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`, which makes maps larger, too. ONNX has none for maps of any size."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if exporting and torch.onnx.is_in_onnx_export():
        return products_with_windows(x, height, width)
    return F.adaptive_avg_pool2d(x, (height, width))


def reduced_to_side(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """(B, reduced, 8, 8)."""
    return mean_of_windows(norm(conv(x)), SIDE, SIDE)


class GSoP(Block):
    """See `fused_attn.nn.GSoP`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _covariance = staticmethod(covariance)
    _normalised = staticmethod(normalised)
    _mean_of_windows = staticmethod(mean_of_windows)
    _reduced_to_side = staticmethod(reduced_to_side)
    _scale = staticmethod(scale)

    def __init__(self, channels: int, *, mode: str = "channel", reduced: int = 128, stride: int = 1) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
        self.mode = mode
        positive_int("reduced", reduced)
        positive_int("stride", stride)
        if mode != "position":
            self.conv_for_DR = nn.Conv2d(channels, reduced, 1, stride)
            self.bn_for_DR = nn.BatchNorm2d(reduced)
            self.row_bn = nn.BatchNorm2d(reduced)
            self.row_conv_group = nn.Conv2d(reduced, 4 * reduced, (reduced, 1), groups=reduced)
            self.fc_adapt_channels = nn.Conv2d(4 * reduced, channels, 1)
        if mode != "channel":
            positions = SIDE * SIDE
            self.conv_for_DR_spatial = nn.Conv2d(channels, reduced, 1)
            self.bn_for_DR_spatial = nn.BatchNorm2d(reduced)
            self.row_bn_for_spatial = nn.BatchNorm2d(positions)
            self.row_conv_group_for_spatial = nn.Conv2d(positions, 4 * positions, (positions, 1), groups=positions)
            self.fc_adapt_channels_for_spatial = nn.Conv2d(4 * positions, positions, 1)
        if mode == "concat":
            groups = channels // 64
            if groups == 0 or channels % groups or groups > 32:
                raise ValueError(f"channels: expected a multiple of 64 up to 2048 for 'concat'; got {channels}")
            reach = int(math.log2(32 / groups)) + 2
            shape = {"kernel_size": (2 * reach + 1, 1), "padding": (reach, 0), "groups": groups}
            self.dilate_conv_for_concat1 = nn.Conv2d(channels, channels, **shape)  # type: ignore[arg-type]
            self.dilate_conv_for_concat2 = nn.Conv2d(channels, channels, **shape)  # type: ignore[arg-type]
            self.bn_for_concat = nn.BatchNorm2d(channels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def extra_repr(self) -> str:
        return f"{self.channels}, mode={self.mode!r}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected (B, {self.channels}, H, W); got shape {tuple(x.shape)}")
        rectified = F.relu(x)
        if self.mode == "channel":
            return self._scale(x, self._of_channels(rectified))
        of_positions = self._of_positions(rectified)
        if self.mode == "position":
            return self._scale(x, of_positions, post_activation="relu")
        by_channel = self._scale(x, self._of_channels(rectified))
        if self.mode == "avg":
            # The gate is not negative, so relu(x * gate) is relu(x) * gate.
            return self._scale(x, of_positions, pre_activation="relu", residual=by_channel)
        by_position = self._scale(x, of_positions, post_activation="relu")
        if self.mode == "max":
            return torch.maximum(by_channel, by_position)
        y = self.dilate_conv_for_concat1(by_channel) + self.dilate_conv_for_concat2(by_position)
        return self.bn_for_concat(y)

    def _of_channels(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1)."""
        x = self._normalised(self.bn_for_DR, self.conv_for_DR(x), activation="relu")
        rows = self.row_bn(self._covariance(x.flatten(2)).unsqueeze(3))
        return self.fc_adapt_channels(self.row_conv_group(rows)).sigmoid()

    def _of_positions(self, x: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        height, width = x.shape[2:]
        x = self._reduced_to_side(x, self.conv_for_DR_spatial, self.bn_for_DR_spatial)
        # As the authors have it: centred by sums over channels, but divided by the number of positions.
        rows = self._covariance(x.flatten(2).transpose(1, 2), SIDE * SIDE)
        rows = self.row_conv_group_for_spatial(self.row_bn_for_spatial(rows.unsqueeze(3)))
        gate = self.fc_adapt_channels_for_spatial(F.relu(rows)).sigmoid()
        return self._mean_of_windows(gate.reshape(x.shape[0], 1, SIDE, SIDE), height, width)
