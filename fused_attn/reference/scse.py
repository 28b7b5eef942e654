"""scSE: concurrent spatial and channel squeeze-and-excitation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .channel_gate import excite
from .checkpoints import OtherNames
from .mixed_scale import mixed_scale
from .squeeze import squeeze
from .squeeze_excite import hidden_channels, positive_int


class SCSE(OtherNames):
    """See `fused_attn.nn.SCSE`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _squeeze = staticmethod(squeeze)
    _mixed_scale = staticmethod(mixed_scale)

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
        descriptor = self._squeeze(x)
        assert isinstance(descriptor, Tensor)
        channel = excite(descriptor, reduce.weight, reduce.bias, expand.weight, expand.bias).sigmoid()
        weight = project.weight.reshape(1, self.channels, *(1 for _ in x.shape[2:]))
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[x.dim() - 3]
        spatial = convolve(x, weight, project.bias).sigmoid()
        return self._mixed_scale(x, channel=channel, spatial=spatial, combine=self.combine)
