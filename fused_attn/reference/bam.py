"""BAM: the bottleneck attention module."""

from __future__ import annotations

from torch import Tensor, nn

from .block import Block
from .block_attention import CONVOLUTIONS, NORMS, spatial_rank
from .mixed_scale import mixed_scale
from .squeeze import squeeze
from .squeeze_excite import hidden_channels, positive_int


class BAM(Block):
    """See `fused_attn.nn.BAM`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _squeeze = staticmethod(squeeze)
    _mixed_scale = staticmethod(mixed_scale)

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        num_layers: int = 1,
        dilated_convs: int = 2,
        dilation: int = 4,
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        width = hidden_channels(channels, reduction, None)
        positive_int("num_layers", num_layers)
        positive_int("dilated_convs", dilated_convs)
        positive_int("dilation", dilation)
        self.rank = spatial_rank(rank)
        conv, norm = CONVOLUTIONS[rank - 1], NORMS[rank - 1]

        gate_c = nn.Sequential()
        for i in range(num_layers):
            gate_c.add_module(f"gate_c_fc_{i}", nn.Linear(width if i else channels, width))
            gate_c.add_module(f"gate_c_bn_{i + 1}", nn.BatchNorm1d(width))
            gate_c.add_module(f"gate_c_relu_{i + 1}", nn.ReLU())
        gate_c.add_module("gate_c_fc_final", nn.Linear(width, channels))
        self.channel_att = nn.ModuleDict({"gate_c": gate_c})

        gate_s = nn.Sequential()
        gate_s.add_module("gate_s_conv_reduce0", conv(channels, width, 1))
        gate_s.add_module("gate_s_bn_reduce0", norm(width))
        gate_s.add_module("gate_s_relu_reduce0", nn.ReLU())
        for i in range(dilated_convs):
            gate_s.add_module(f"gate_s_conv_di_{i}", conv(width, width, 3, padding=dilation, dilation=dilation))
            gate_s.add_module(f"gate_s_bn_di_{i}", norm(width))
            gate_s.add_module(f"gate_s_relu_di_{i}", nn.ReLU())
        gate_s.add_module("gate_s_conv_final", conv(width, 1, 1))
        self.spatial_att = nn.ModuleDict({"gate_s": gate_s})

    def forward(self, x: Tensor) -> Tensor:
        channel = self.channel_att["gate_c"](self._squeeze(x))
        spatial = self.spatial_att["gate_s"](x)
        return self._mixed_scale(x, channel=channel, spatial=spatial, combine="sigmoid")
