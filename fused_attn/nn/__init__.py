"""Attention blocks as modules, fused. `fused_attn.reference` has each of them in plain PyTorch."""

from .bam import BAM
from .block_attention import CBAM, ChannelAttention, SpatialAttention
from .ema import EMA
from .gather_excite import GatherExcite
from .scse import SCSE
from .simam import SimAM
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite

__all__ = [
    "BAM",
    "CBAM",
    "ChannelAttention",
    "ECA",
    "EMA",
    "EffectiveSE",
    "GatherExcite",
    "SimAM",
    "SCSE",
    "SpatialAttention",
    "SqueezeExcite",
]
