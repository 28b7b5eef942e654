"""SimAM, a gate a position and channel from an energy function, without parameters."""

from __future__ import annotations

from torch import Tensor, nn

from .block_attention import check_channels, optional_channels
from .squeeze import space
from .squeeze_excite import finite


class SimAM(nn.Module):
    """SimAM: x * sigmoid(d / (4 * (sum(d) / (n - 1) + e_lambda)) + 0.5) with d = (x - mean(x))^2.

    Sum and mean are over the n positions of each channel.

    Args:
        channels: C; None: any. The block has no parameters.
        e_lambda: the paper's lambda; where a channel is constant it keeps the quotient finite.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape. On maps of one position the
    variance is 0 / 0 and the result NaN, as in the original: put no SimAM behind a global pool.

    Raises:
        ValueError: e_lambda is not a finite number; in `forward`: x has not `channels` channels.

    Source: SimAM, ICML 2021, proceedings.mlr.press/v139/yang21o.html; equivalent to the authors' `simam_module`.
    """

    def __init__(self, channels: int | None = None, *, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        self.e_lambda = finite("e_lambda", e_lambda)

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda}"

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        axes = space(x)
        distance = (x - x.mean(axes, keepdim=True)).square()
        variance = distance.sum(axes, keepdim=True) / (x.shape[2:].numel() - 1)
        return x * (distance / (4 * (variance + self.e_lambda)) + 0.5).sigmoid()
