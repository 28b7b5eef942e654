"""Plain PyTorch under autograd: the definition of correct, and the baseline of every benchmark.

The functions and modules have the names and signatures of `fused_attn.functional` and `fused_attn.nn`,
and the modules the same `state_dict`. They check nothing beyond what PyTorch itself checks.
"""

from .attention_gate import AttentionGate
from .axis_pool import axis_pool, axis_pool_with_map
from .bam import BAM
from .bilinear_attention import BilinearAttention, BilinearTransform
from .block_attention import CBAM, ChannelAttention, SpatialAttention
from .cbam import cbam
from .channel_gate import channel_gate
from .channel_pool import channel_pool
from .context_pool import context_gate, context_pool, context_pool_with_map
from .coordinate import CoordinateAttention
from .criss_cross import CrissCrossAttention, criss_cross_attention
from .double_attention import DoubleAttention
from .ema import EMA
from .energy_gate import energy_gate
from .external_attention import ExternalAttention
from .gather_excite import GatherExcite
from .global_context import GlobalContext
from .gsop import GSoP
from .mixed_scale import mixed_scale, pixel_gate
from .moments_gate import moments_gate
from .non_local import NonLocal
from .norm_gate import norm_gate
from .position_attention import position_attention
from .residual_attention import ResidualAttention
from .response_norm import GatedChannelTransformation, GlobalResponseNorm
from .scale import scale
from .scse import SCSE
from .select import branch_maps, select, select_with
from .selective_kernel import SelectiveKernel, SKConv
from .self_attention import ChannelSelfAttention, DualAttention, PositionAttention, SelfAttention2d
from .simam import SimAM, simam
from .spatial_gate import spatial_gate, spatial_logits
from .spatial_transformer import SpatialTransformer
from .split_attention import SplitAttention
from .squeeze import squeeze
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite, eca_kernel_size
from .srm import SRM
from .triplet import TripletAttention

__all__ = [
    "AttentionGate",
    "BAM",
    "BilinearAttention",
    "BilinearTransform",
    "CBAM",
    "ChannelAttention",
    "ChannelSelfAttention",
    "CoordinateAttention",
    "DualAttention",
    "DoubleAttention",
    "CrissCrossAttention",
    "ECA",
    "EMA",
    "EffectiveSE",
    "ExternalAttention",
    "GSoP",
    "GatherExcite",
    "NonLocal",
    "PositionAttention",
    "GatedChannelTransformation",
    "GlobalContext",
    "GlobalResponseNorm",
    "ResidualAttention",
    "SCSE",
    "SRM",
    "SKConv",
    "SelectiveKernel",
    "SelfAttention2d",
    "SimAM",
    "SpatialAttention",
    "SpatialTransformer",
    "SplitAttention",
    "SqueezeExcite",
    "TripletAttention",
    "axis_pool",
    "axis_pool_with_map",
    "branch_maps",
    "cbam",
    "channel_gate",
    "channel_pool",
    "context_gate",
    "context_pool",
    "context_pool_with_map",
    "criss_cross_attention",
    "eca_kernel_size",
    "energy_gate",
    "mixed_scale",
    "moments_gate",
    "norm_gate",
    "pixel_gate",
    "position_attention",
    "scale",
    "select",
    "select_with",
    "simam",
    "spatial_gate",
    "spatial_logits",
    "squeeze",
]
