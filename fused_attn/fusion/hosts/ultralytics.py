"""ultralytics: CBAM and its ChannelAttention and SpatialAttention, as YOLO models name them in their YAML files.

Their channel attention is the average alone through one C x C convolution. These names are common, so each is known by
its module and by its parts, which must be the whole of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..reading.layers import activation_name, bias_of, is_dense, is_global_average, is_spatial_convolution
from ..recipes.names import class_name
from ..recipes.recipe import CbamGate, ChannelGate, Recipe, SpatialGate
from .registry import register

_MODULE = "ultralytics.nn.modules.conv"


def _has_exactly(block: nn.Module, *names: str) -> bool:
    return tuple(name for name, _ in block.named_children()) == names and not block._parameters and not block._buffers


def _channel_attention(block: Any, path: str) -> ChannelGate | str:
    if not _has_exactly(block, "pool", "fc", "act") or not is_global_average(block.pool, 2):
        return "its layers are not ultralytics'"
    gate = activation_name(block.act)
    if not is_dense(block.fc) or block.fc.weight.shape[0] != block.fc.weight.shape[1]:
        return "its layers are not ultralytics'"
    if gate is None:
        return "its gate is not one we fuse"
    return ChannelGate(f"{path}fc.weight", bias_of(f"{path}fc"), gate=gate)


def _spatial_attention(block: Any, path: str) -> SpatialGate | str:
    if not _has_exactly(block, "cv1", "act") or not is_spatial_convolution(block.cv1, 2):
        return "its layers are not ultralytics'"
    gate = activation_name(block.act)
    if gate is None:
        return "its gate is not one we fuse"
    return SpatialGate((f"{path}cv1",), order=("mean", "max"), gate=gate)


@register(f"{_MODULE}.ChannelAttention")
def channel_attention(block: Any) -> Recipe | str:
    return _channel_attention(block, "")


@register(f"{_MODULE}.SpatialAttention")
def spatial_attention(block: Any) -> Recipe | str:
    return _spatial_attention(block, "")


@register(f"{_MODULE}.CBAM")
def cbam(block: Any) -> Recipe | str:
    if not _has_exactly(block, "channel_attention", "spatial_attention"):
        return "its parts are not ultralytics'"
    parts = block.channel_attention, block.spatial_attention
    if [class_name(p) for p in parts] != [f"{_MODULE}.ChannelAttention", f"{_MODULE}.SpatialAttention"]:
        return "its parts are not ultralytics'"
    channel = _channel_attention(parts[0], "channel_attention.")
    spatial = _spatial_attention(parts[1], "spatial_attention.")
    if isinstance(channel, str):
        return channel
    return spatial if isinstance(spatial, str) else CbamGate(channel, spatial)
