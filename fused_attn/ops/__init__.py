"""The dispatcher operators: schema, fake kernel and backward, one file an op; one overload a backend."""

from .axis_pool import axis_pool
from .cbam import cbam
from .channel_gate import channel_gate
from .channel_pool import channel_pool
from .context_pool import context_gate, context_pool, context_pool_with_map
from .criss_cross_attention import criss_cross_attention
from .energy_gate import energy_gate
from .formulas import tell_counter
from .mixed_scale import mixed_scale
from .moments_gate import moments_gate
from .norm_gate import norm_gate
from .position_attention import by_torch as position_attention_by_torch
from .position_attention import position_attention
from .scale import scale
from .select import MOST_BRANCHES, select, select_with
from .simam import simam
from .spatial_gate import spatial_gate
from .spatial_logits import spatial_logits
from .squeeze import squeeze

__all__ = [
    "MOST_BRANCHES",
    "axis_pool",
    "cbam",
    "channel_gate",
    "channel_pool",
    "context_gate",
    "context_pool",
    "context_pool_with_map",
    "criss_cross_attention",
    "energy_gate",
    "mixed_scale",
    "moments_gate",
    "norm_gate",
    "position_attention",
    "position_attention_by_torch",
    "scale",
    "select",
    "select_with",
    "simam",
    "spatial_gate",
    "spatial_logits",
    "squeeze",
]

tell_counter()
