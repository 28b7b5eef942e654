"""segmentation_models_pytorch: SCSEModule, the attention of its decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import functional
from ..reading.layers import activation_name, is_dense, is_global_average
from ..recipes.recipe import OwnLayers, Recipe
from .registry import register


def _scse(block: Any, x: Tensor) -> Tensor:
    channel = functional.squeeze(x)
    assert isinstance(channel, Tensor)
    channel = channel[:, :, None, None]
    for layer in list(block.cSE)[1:]:
        channel = layer(channel)
    return functional.mixed_scale(x, channel=channel, spatial=block.sSE(x), combine="sum")


@register("segmentation_models_pytorch.base.modules.SCSEModule")
def scse(block: Any) -> Recipe | str:
    parts = block.cSE, block.sSE
    if [name for name, _ in block.named_children()] != ["cSE", "sSE"] or any(
        type(p) is not nn.Sequential for p in parts
    ):
        return "its parts are not segmentation_models_pytorch's"
    channel, spatial = list(block.cSE), list(block.sSE)
    if not (
        len(channel) == 5
        and is_global_average(channel[0], 2)
        and is_dense(channel[1])
        and is_dense(channel[3])
        and len(spatial) == 2
        and type(spatial[0]) is nn.Conv2d
        and is_dense(spatial[0])
        and spatial[0].out_channels == 1
        and all(activation_name(layer) for layer in (channel[2], channel[4], spatial[1]))
    ):
        return "its layers are not segmentation_models_pytorch's"
    return OwnLayers(_scse, "SCSE", ("mixed_scale", "squeeze"), bypassed=("cSE", "cSE.0"))
