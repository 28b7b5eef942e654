"""Attention blocks as modules, fused. `fused_attn.reference` has each of them in plain PyTorch."""

from .attention_gate import AttentionGate
from .bam import BAM
from .bilinear_attention import BilinearAttention, BilinearTransform
from .block_attention import CBAM, ChannelAttention, SpatialAttention
from .coordinate import CoordinateAttention
from .criss_cross import CrissCrossAttention
from .double_attention import DoubleAttention
from .ema import EMA
from .external_attention import ExternalAttention
from .gather_excite import GatherExcite
from .global_context import GlobalContext
from .gsop import GSoP
from .non_local import NonLocal
from .residual_attention import ResidualAttention
from .response_norm import GatedChannelTransformation, GlobalResponseNorm
from .scse import SCSE
from .selective_kernel import SelectiveKernel, SKConv
from .self_attention import ChannelSelfAttention, DualAttention, PositionAttention, SelfAttention2d
from .simam import SimAM
from .spatial_transformer import SpatialTransformer
from .split_attention import SplitAttention
from .squeeze_excite import ECA, EffectiveSE, SqueezeExcite
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
    "SelfAttention2d",
    "GatedChannelTransformation",
    "GlobalContext",
    "GlobalResponseNorm",
    "ResidualAttention",
    "SimAM",
    "SCSE",
    "SRM",
    "SKConv",
    "SelectiveKernel",
    "SpatialAttention",
    "SpatialTransformer",
    "SplitAttention",
    "SqueezeExcite",
    "TripletAttention",
]
