"""Attention blocks as modules, fused. `fused_attn.reference` has each of them in plain PyTorch."""

from .block_attention import CBAM, ChannelAttention, SpatialAttention
from .gather_excite import GatherExcite
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite

__all__ = [
    "CBAM",
    "ChannelAttention",
    "ECA",
    "EffectiveSE",
    "GatherExcite",
    "SpatialAttention",
    "SqueezeExcite",
]
