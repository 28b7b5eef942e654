"""The modules of this library that are no single fused function, and the functions in them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import nn as fused_nn
from ... import reference

#: Modules that run as their class in `fused_attn.nn` does -> the fused functions in it (none: it is made of PyTorch's),
#: and the rank of their maps.
AS_IN_NN: dict[type[nn.Module], tuple[tuple[str, ...], int | None]] = {
    reference.AttentionGate: (("scale/space", "norm_gate"), None),
    reference.BAM: (("mixed_scale", "squeeze"), None),
    reference.BilinearAttention: (("norm_gate",), 4),
    reference.BilinearTransform: (("norm_gate",), 4),
    reference.ChannelSelfAttention: ((), None),
    reference.CoordinateAttention: (("axis_pool", "mixed_scale"), 4),
    reference.DualAttention: (("position_attention",), 4),
    reference.CrissCrossAttention: (("criss_cross_attention",), 4),
    reference.DoubleAttention: ((), None),
    reference.EMA: (("scale/space",), 4),
    reference.ExternalAttention: (("norm_gate",), 4),
    reference.GatedChannelTransformation: (("select/energy", "scale"), None),
    reference.GlobalResponseNorm: (("select/energy", "scale"), None),
    reference.GSoP: (("scale", "scale/space", "norm_gate"), 4),
    reference.NonLocal: (("position_attention",), None),
    reference.PositionAttention: (("position_attention",), None),
    reference.GlobalContext: (("context_pool", "scale"), None),
    reference.ResidualAttention: (("scale", "scale/space"), None),
    reference.SCSE: (("mixed_scale", "squeeze"), None),
    reference.SKConv: (("select", "select/with"), 4),
    reference.SRM: (("norm_gate/moments", "scale"), None),
    reference.SelfAttention2d: (("position_attention",), 4),
    reference.SelectiveKernel: (("select", "select/with"), 4),
    reference.SimAM: (("simam",), None),
    reference.SpatialTransformer: ((), None),
    reference.SplitAttention: (("select", "select/with"), 4),
    reference.TripletAttention: (("axis_pool", "mixed_scale"), 4),
}

#: The maps of those that take several.
MAPS: dict[type[nn.Module], tuple[str, ...]] = {reference.AttentionGate: ("g", "x")}

#: Parts that are given: any PyTorch code, with blocks of its own in it.
_GIVEN: dict[type[nn.Module], tuple[str, ...]] = {
    reference.ResidualAttention: ("trunk_branches", "mask"),
    reference.SpatialTransformer: ("localization",),
}

#: Modules of `fused_attn.reference` -> their classes in `fused_attn.nn`, whose functions the fused ones get.
FUSED_FORMS: dict[type[nn.Module], type[nn.Module]] = {cls: getattr(fused_nn, cls.__name__) for cls in AS_IN_NN}


def own_functions(block: Any) -> tuple[str, ...] | None:
    """The fused functions in a block of `fused_attn.nn` that is not one of them alone; None for others."""
    return next((functions for cls, (functions, _) in AS_IN_NN.items() if isinstance(block, cls)), None)


def blocks_in(block: Any) -> tuple[str, ...]:
    """Names of its parts that are not its own: they run by their own call, and may be or hold blocks."""
    return next((names for cls, names in _GIVEN.items() if isinstance(block, cls)), ())
