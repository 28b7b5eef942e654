"""Attention blocks as modules, fused. `fused_attn.reference` has each of them in plain PyTorch."""

from .gather_excite import GatherExcite
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite

__all__ = [
    "ECA",
    "EffectiveSE",
    "GatherExcite",
    "SqueezeExcite",
]
