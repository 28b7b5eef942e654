"""scSE: concurrent spatial and channel squeeze-and-excitation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .channel_gate import excite
from .checkpoints import OtherNames
from .scale import scale
from .squeeze import squeeze
from .squeeze_excite import hidden_channels, positive_int


class SCSE(OtherNames):
    """Concurrent squeeze-and-excitation: x * c and x * s, added or the larger of the two.

    c = sigmoid(W2 relu(W1 mean(x) + b1) + b2), one number a channel; s = sigmoid(w x + b), one a position.

    Args:
        channels: C, the channels of the map.
        reduction: c has channels // reduction hidden units (16: segmentation_models_pytorch; 2: the authors).
        combine: "sum" or "max" of x * c and x * s.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape.

    Keys: those of segmentation_models_pytorch, `cSE.1.weight` (hidden, C, 1, 1), `cSE.1.bias`, `cSE.3.weight`,
    `cSE.3.bias`, `sSE.0.weight` (1, C, 1, 1), `sSE.0.bias`. `load_state_dict` also takes the authors' `cSE.fc1`,
    `cSE.fc2` and `sSE.conv`.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel.

    Source: arXiv:1803.02579 and 1808.08127; equivalent to segmentation_models_pytorch's `SCSEModule`, and to the
    authors' `ChannelSpatialSELayer` (reduction=2, combine="max").
    """

    other_names: ClassVar[dict[str, str]] = {"cSE.fc1": "cSE.1", "cSE.fc2": "cSE.3", "sSE.conv": "sSE.0"}

    def __init__(self, channels: int, *, reduction: float = 16, combine: str = "sum") -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if combine not in ("sum", "max"):
            raise ValueError(f"combine: expected one of sum, max; got {combine!r}")
        self.combine = combine
        width = hidden_channels(channels, reduction, None)
        self.cSE = nn.ModuleDict({"1": nn.Conv2d(channels, width, 1), "3": nn.Conv2d(width, channels, 1)})
        self.sSE = nn.ModuleDict({"0": nn.Conv2d(channels, 1, 1)})

    def extra_repr(self) -> str:
        return f"{self.channels}, combine={self.combine!r}"

    def forward(self, x: Tensor) -> Tensor:
        layers: tuple[Any, Any, Any] = self.cSE["1"], self.cSE["3"], self.sSE["0"]
        reduce, expand, project = layers
        descriptor = squeeze(x)
        assert isinstance(descriptor, Tensor)
        channel = excite(descriptor, reduce.weight, reduce.bias, expand.weight, expand.bias).sigmoid()
        weight = project.weight.reshape(1, self.channels, *(1 for _ in x.shape[2:]))
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[x.dim() - 3]
        spatial = convolve(x, weight, project.bias).sigmoid()
        if self.combine == "sum":
            return scale(x, channel) + scale(x, spatial)
        return torch.maximum(scale(x, channel), scale(x, spatial))
