"""MONAI: ChannelSELayer and ResidualSELayer, in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..reading.layers import activation_name, is_dense, two_dense_layers
from ..recipes.recipe import ChannelGate, Recipe, SplitGate
from .registry import register

_RANKS = {nn.AdaptiveAvgPool1d: 3, nn.AdaptiveAvgPool2d: 4, nn.AdaptiveAvgPool3d: 5}


def _excite(block: Any, descriptor: Tensor) -> Tensor:
    return block.fc(descriptor)


@register(
    "monai.networks.blocks.squeeze_and_excitation.ChannelSELayer",
    "monai.networks.blocks.squeeze_and_excitation.ResidualSELayer",
)
def channel_se(block: Any) -> Recipe | str:
    rank = _RANKS.get(type(block.avg_pool))
    if rank is None or block.avg_pool.output_size not in (1, (1,) * (rank - 2)):
        return "its pool is not global"
    if type(block.fc) is not nn.Sequential:
        return "its excitation is not MONAI's"
    common: dict[str, Any] = {"rank": rank, "adds_input": block.add_residual}
    layers = list(block.fc)
    if len(layers) == 4 and all(is_dense(layer) for layer in layers[::2]):
        activation, gate = activation_name(layers[1]), activation_name(layers[3])
        if activation is not None and gate is not None:
            return ChannelGate(**two_dense_layers("fc.0", "fc.2"), activation=activation, gate=gate, **common)
    return SplitGate(_excite, **common, bypassed=("avg_pool",))
