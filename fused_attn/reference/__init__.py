"""Plain PyTorch under autograd: the definition of correct, and the baseline of every benchmark.

The functions and modules have the names and signatures of `fused_attn.functional` and `fused_attn.nn`,
and the modules the same `state_dict`. They check nothing beyond what PyTorch itself checks.
"""

from .channel_gate import channel_gate
from .scale import scale
from .squeeze import squeeze
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite, eca_kernel_size

__all__ = [
    "ECA",
    "EffectiveSE",
    "SqueezeExcite",
    "channel_gate",
    "eca_kernel_size",
    "scale",
    "squeeze",
]
