"""timm: SEModule, SqueezeExcite, EffectiveSEModule, EcaModule, CecaModule, and the SE of older models."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layers import activation_name, bias_of, is_channel_convolution, is_dense, two_dense_layers
from .registry import ChannelGate, Recipe, SplitGate, register


def _pooling(block: Any) -> dict[str, Any]:
    return {"pool": "avgmax" if getattr(block, "add_maxpool", False) else "avg", "ties": "even"}


def _excite_se(block: Any, descriptor: Tensor) -> Tensor:
    s = block.fc1(descriptor[:, :, None, None])
    return block.gate(block.fc2(block.act(block.bn(s))))


@register("timm.layers.squeeze_excite.SEModule")
def se_module(block: Any) -> Recipe:
    activation, gate = activation_name(block.act), activation_name(block.gate)
    dense = is_dense(block.fc1) and is_dense(block.fc2) and type(block.bn) is nn.Identity
    if not dense or activation is None or gate is None:
        return SplitGate(_excite_se, **_pooling(block))
    return ChannelGate(**two_dense_layers("fc1", "fc2"), **_pooling(block), activation=activation, gate=gate)


@register("timm.layers.squeeze_excite.SqueezeExciteCl")
def squeeze_excite_cl(block: Any) -> str:
    return "takes (B, H, W, C); the fused functions take (B, C, H, W)"


def _excite_squeeze_excite(block: Any, descriptor: Tensor) -> Tensor:
    s = block.conv_reduce(descriptor[:, :, None, None])
    return block.gate(block.conv_expand(block.act1(s)))


@register("timm.models._efficientnet_blocks.SqueezeExcite")
def squeeze_excite(block: Any) -> Recipe:
    activation, gate = activation_name(block.act1), activation_name(block.gate)
    dense = is_dense(block.conv_reduce) and is_dense(block.conv_expand)
    if not dense or activation is None or gate is None:
        return SplitGate(_excite_squeeze_excite)
    return ChannelGate(**two_dense_layers("conv_reduce", "conv_expand"), activation=activation, gate=gate)


def _excite_effective(block: Any, descriptor: Tensor) -> Tensor:
    return block.gate(block.fc(descriptor[:, :, None, None]))


@register("timm.layers.squeeze_excite.EffectiveSEModule")
def effective_se(block: Any) -> Recipe:
    gate = activation_name(block.gate)
    if not is_dense(block.fc) or gate is None:
        return SplitGate(_excite_effective, **_pooling(block))
    return ChannelGate("fc.weight", bias_of("fc"), **_pooling(block), gate=gate)


def _excite_eca(block: Any, descriptor: Tensor) -> Tensor:
    y = block.conv(descriptor[:, None])
    if block.conv2 is not None:
        y = block.conv2(block.act(y))
    return block.gate(y).squeeze(1)


@register("timm.layers.eca.EcaModule")
def eca(block: Any) -> Recipe:
    gate = activation_name(block.gate)
    if block.conv2 is not None or gate is None or not is_channel_convolution(block.conv, padded=True):
        return SplitGate(_excite_eca)
    return ChannelGate("conv.weight", bias_of("conv"), layer="conv", gate=gate)


@register("timm.layers.eca.CecaModule")
def ceca(block: Any) -> Recipe | str:
    gate = activation_name(block.gate)
    if gate is None or not is_channel_convolution(block.conv, padded=False):
        return "its convolution or gate is not timm's"
    if block.padding != block.conv.kernel_size[0] // 2:
        return "its padding does not keep the number of channels"
    return ChannelGate("conv.weight", bias_of("conv"), layer="circular", gate=gate)


@register("timm.models.senet.SEModule")
def legacy_se(block: Any) -> Recipe | str:
    if not (is_dense(block.fc1) and is_dense(block.fc2) and activation_name(block.relu) == "relu"):
        return "its layers are not timm's"
    return ChannelGate(**two_dense_layers("fc1", "fc2"))


@register("timm.models.hgnet.EseModule")
def hgnet_ese(block: Any) -> Recipe | str:
    if not is_dense(block.conv):
        return "its layer is not timm's"
    return ChannelGate("conv.weight", bias_of("conv"))
