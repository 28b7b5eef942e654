"""torchvision: SqueezeExcitation, in EfficientNet, MobileNetV3 and RegNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..reading.layers import activation_name, is_dense, is_global_average, two_dense_layers
from ..recipes.recipe import ChannelGate, Recipe, SplitGate
from .registry import register


def _excite(block: Any, descriptor: Tensor) -> Tensor:
    s = block.activation(block.fc1(descriptor[:, :, None, None]))
    return block.scale_activation(block.fc2(s))


@register("torchvision.ops.misc.SqueezeExcitation")
def squeeze_excitation(block: Any) -> Recipe | str:
    if not is_global_average(block.avgpool, 2):
        return "its pool is not global"
    activation, gate = activation_name(block.activation), activation_name(block.scale_activation)
    if not (is_dense(block.fc1) and is_dense(block.fc2)) or activation is None or gate is None:
        return SplitGate(_excite, bypassed=("avgpool",))
    return ChannelGate(**two_dense_layers("fc1", "fc2"), activation=activation, gate=gate)
