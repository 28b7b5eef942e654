"""timm: SEModule, SqueezeExcite, EffectiveSEModule, EcaModule, CecaModule, GatherExcite, CbamModule, LightCbamModule,
the two attentions that these are made of, CoordAttn, SimpleCoordAttn, EfficientLocalAttn, StripAttn, GlobalContext,
NonLocalAttn, BatNonLocalAttn, SelectiveKernel, SplitAttn, and the SE of older models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...nn.bilinear_attention import pool_blocks
from ...nn.normalised import norm_gate
from ...nn.selection import selection
from ...reference.bilinear_attention import mix_blocks
from ...reference.block_attention import uses_batch_statistics
from ...reference.select import branch_weights
from ...reference.selection import Layers
from ...reference.squeeze import Excitation
from ..reading.layers import (
    activation_name,
    bias_of,
    is_batch_norm,
    is_channel_convolution,
    is_dense,
    is_spatial_convolution,
    paths_but,
    two_dense_layers,
)
from ..recipes.names import class_name
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate
from ..recipes.run import Unsuited
from .registry import register


def _is_exactly(layer: Any, name: str) -> bool:
    return class_name(layer) == f"timm.layers.{name}"


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


@register("timm.layers.gather_excite.GatherExcite")
def gather_excite(block: Any) -> Recipe | str:
    gate = activation_name(block.gate)
    if block.gather is not None or block.extent != 0:
        return "its pool is not global"
    if gate is None:
        return "its gate is not one we fuse"
    mlp = block.mlp
    if type(mlp) is nn.Identity:
        return ChannelGate(**_pooling(block), gate=gate)
    plain = _is_exactly(mlp, "mlp.ConvMlp") and type(mlp.norm) is nn.Identity
    activation = activation_name(mlp.act) if plain else None
    if activation is None or mlp.drop.p != 0 or not (is_dense(mlp.fc1) and is_dense(mlp.fc2)):
        return "its layers are not timm's"
    return ChannelGate(**two_dense_layers("mlp.fc1", "mlp.fc2"), **_pooling(block), activation=activation, gate=gate)


def _channel_attention(block: Any, path: str, *, light: bool) -> ChannelGate | str:
    """Of a channel attention at this path of the block that is fused, "" or with a dot at its end."""
    if not (is_dense(block.fc1) and is_dense(block.fc2)):
        return "its layers are not timm's"
    # The light channel attention takes the sigmoid whatever its gate is.
    activation, gate = activation_name(block.act), "sigmoid" if light else activation_name(block.gate)
    if activation is None or gate is None:
        return "its activation or gate is not one we fuse"
    layers = two_dense_layers(f"{path}fc1", f"{path}fc2")
    return ChannelGate(**layers, pool="avgmax" if light else "both", ties="even", activation=activation, gate=gate)


def _spatial_attention(block: Any, path: str, *, light: bool) -> SpatialGate | str:
    if not _is_exactly(block.conv, "conv_bn_act.ConvNormAct"):
        return "its parts are not timm's"
    conv, norm = block.conv.conv, block.conv.bn
    if not (is_spatial_convolution(conv, 1 if light else 2) and is_batch_norm(norm)):
        return "its layers are not timm's"
    if block.conv.aa is not None:
        return "it blurs its gate"
    gate = activation_name(block.gate)
    if gate is None:
        return "its activation or gate is not one we fuse"
    layers = (f"{path}conv.conv", f"{path}conv.bn")
    return SpatialGate(layers, order=("mean", "max"), ties="even", gate=gate, merged=light)


@register("timm.layers.cbam.ChannelAttn")
def channel_attention(block: Any) -> Recipe | str:
    return _channel_attention(block, "", light=False)


@register("timm.layers.cbam.LightChannelAttn")
def light_channel_attention(block: Any) -> Recipe | str:
    return _channel_attention(block, "", light=True)


@register("timm.layers.cbam.SpatialAttn")
def spatial_attention(block: Any) -> Recipe | str:
    return _spatial_attention(block, "", light=False)


def _cbam(block: Any, *, light: bool) -> Recipe | str:
    kind = "Light" if light else ""
    parts = _is_exactly(block.channel, f"cbam.{kind}ChannelAttn"), _is_exactly(block.spatial, f"cbam.{kind}SpatialAttn")
    if not all(parts):
        return "its parts are not timm's"
    channel = _channel_attention(block.channel, "channel.", light=light)
    spatial = _spatial_attention(block.spatial, "spatial.", light=light)
    if isinstance(channel, str):
        return channel
    return spatial if isinstance(spatial, str) else CbamGate(channel, spatial)


@register("timm.layers.cbam.CbamModule")
def cbam(block: Any) -> Recipe | str:
    return _cbam(block, light=False)


@register("timm.layers.cbam.LightCbamModule")
def light_cbam(block: Any) -> Recipe | str:
    return _cbam(block, light=True)


def _coordinate(block: Any, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    x, rows, columns = functional.axis_pool_with_map(x)
    strip = block.conv1(torch.cat([rows, columns.transpose(2, 3)], 2))
    rows, columns = block.act(block.bn1(strip)).split([height, width], 2)
    rows, columns = block.conv_h(rows), block.conv_w(columns.transpose(2, 3))
    y = functional.mixed_scale(x, rows=block.gate(rows), columns=block.gate(columns))
    return y + x if block.has_skip else y


@register("timm.layers.coord_attn.CoordAttn")
def coordinate_attention(block: Any) -> Recipe | str:
    reduce, expand = block.conv1, (block.conv_h, block.conv_w)
    plain = all(type(layer) is nn.Conv2d and is_dense(layer) for layer in (reduce, *expand))
    if not plain or any(layer.out_channels != reduce.in_channels for layer in expand):
        return "its layers are not timm's"
    if activation_name(block.gate) is None:
        return "its gate is not one we fuse"
    return OwnLayers(_coordinate, "CoordinateAttention", ("axis_pool", "mixed_scale"), block.has_skip)


def _local(block: Any, x: Tensor) -> Tensor:
    x, rows, columns = functional.axis_pool_with_map(x)
    rows = block.gate(block.act(block.norm_h(block.conv_h(rows))))
    columns = block.gate(block.act(block.norm_w(block.conv_w(columns))))
    y = functional.mixed_scale(x, rows=rows, columns=columns)
    return y + x if block.has_skip else y


@register("timm.layers.coord_attn.EfficientLocalAttn")
def efficient_local_attention(block: Any) -> Recipe | str:
    if any(type(layer) is not nn.Conv2d for layer in (block.conv_h, block.conv_w)):
        return "its layers are not timm's"
    if activation_name(block.gate) is None:
        return "its gate is not one we fuse"
    return OwnLayers(_local, "EfficientLocalAttention", ("axis_pool", "mixed_scale"), block.has_skip)


def _strips(block: Any, x: Tensor, gates: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """gates: from both pools to what its gate is the sigmoid of the sum of."""
    x, rows, columns = functional.axis_pool_with_map(x)
    rows, columns = gates(block, rows, columns)
    y = functional.mixed_scale(x, rows=rows, columns=columns, combine="strips")
    return y + x if block.has_skip else y


def _simple(block: Any, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    rows = block.fc_h(block.act(block.fc1(rows.squeeze(3).transpose(1, 2))))
    columns = block.fc_w(block.act(block.fc1(columns.squeeze(2).transpose(1, 2))))
    return rows.transpose(1, 2).unsqueeze(3), columns.transpose(1, 2).unsqueeze(2)


def _of_strips(
    block: Any, name: str, gates: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]], *runs: str
) -> Recipe | str:
    if activation_name(block.gate) != "sigmoid":
        return "its gate is no sigmoid, of a sum of one number a row and one a column"
    forward = functools.partial(_strips, gates=gates)
    return OwnLayers(forward, name, ("axis_pool", "mixed_scale"), block.has_skip, bypassed=paths_but(block, *runs))


@register("timm.layers.coord_attn.SimpleCoordAttn")
def simple_coordinate_attention(block: Any) -> Recipe | str:
    layers = block.fc1, block.fc_h, block.fc_w
    if any(type(layer) is not nn.Linear for layer in layers):
        return "its layers are not timm's"
    if any(layer.out_features != block.fc1.in_features for layer in layers[1:]):
        return "its layers are not timm's"
    return _of_strips(block, "SimpleCoordinateAttention", _simple, "fc1", "act", "fc_h", "fc_w")


@register("timm.layers.coord_attn.StripAttn")
def strip_attention(block: Any) -> Recipe | str:
    def gates(block: Any, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        return block.conv_h(rows), block.conv_w(columns)

    for layer in (block.conv_h, block.conv_w):
        keeps = type(layer) is nn.Conv2d and layer.out_channels == layer.in_channels
        if not keeps and type(layer) is not nn.Identity:
            return "its layers are not timm's"
    return _of_strips(block, "StripAttention", gates, "conv_h", "conv_w")


def _non_local(block: Any, x: Tensor) -> Tensor:
    y = functional.position_attention(block.t(x), block.p(x), block.g(x), scale=block.scale)
    return block.norm(block.z(y)) + x


@register("timm.layers.non_local_attn.NonLocalAttn")
def non_local(block: Any) -> Recipe | str:
    layers = block.t, block.p, block.g
    plain = all(type(layer) is nn.Conv2d and is_dense(layer) for layer in layers)
    if not plain or len({layer.out_channels for layer in layers}) > 1 or type(block.scale) not in (int, float):
        return "its layers are not timm's"
    return OwnLayers(_non_local, "NonLocal", ("position_attention",))


def _bilinear_transform(block: Any, x: Tensor) -> Tensor:
    n, groups = block.block_size, block.groups
    batch, channels, height, width = x.shape
    if channels % groups or height % n or width % n:
        raise Unsuited(f"no {groups} groups of channels, or no {n} blocks of rows and of columns")
    rows, columns = pool_blocks(block.conv1(x), n)
    p = block.conv_p(rows).view(batch, groups, n, n).sigmoid()
    q = block.conv_q(columns).view(batch, groups, n, n).sigmoid()
    return block.conv2(mix_blocks(x, p / p.sum(3, keepdim=True), q / q.sum(2, keepdim=True)))


@register("timm.layers.non_local_attn.BilinearAttnTransform")
def bilinear_transform(block: Any) -> Recipe | str:
    if not type(block.block_size) is type(block.groups) is int:
        return "its block_size or groups is no integer"
    return OwnLayers(_bilinear_transform, "BilinearTransform", ())


#: Values in a map from which on BatchNorm, activation, dropout and sum in training are faster as one op on CPUs.
_LARGE = 1 << 18


def _bilinear_attention(block: Any, x: Tensor, activation: str | None) -> Tensor:
    """activation: the `_branch_activation` of its last layers, and None where these run as they are."""
    y, layer = block.ba(block.conv1(x)), block.conv2
    pays = activation is not None and uses_batch_statistics(layer.bn) and not torch.compiler.is_compiling()
    if not pays:
        return block.dropout(layer(y)) + x
    y = layer.conv(y)
    if y.numel() < _LARGE or not y.is_contiguous() or y.dtype != x.dtype:
        return block.dropout(layer.bn(y)) + x
    gate = None
    if block.dropout.training and block.dropout.p > 0:  # of whole channels
        gate = block.dropout(y.new_ones(*y.shape[:2], 1, 1))
    excitation = None if gate is None else lambda _: gate
    return norm_gate(layer.bn, y, activation=activation, excitation=excitation, residual=x)


@register("timm.layers.non_local_attn.BatNonLocalAttn")
def bilinear_attention(block: Any) -> Recipe | str:
    if not (_is_exactly(block.ba, "non_local_attn.BilinearAttnTransform") and type(block.dropout) is nn.Dropout2d):
        return "its parts are not timm's"
    activation = _branch_activation(block.conv2) if _is_exactly(block.conv2, "conv_bn_act.ConvNormAct") else None
    return OwnLayers(
        functools.partial(_bilinear_attention, activation=activation),
        "BilinearAttention",
        () if activation is None else ("norm_gate",),
        bypassed=() if activation is None else paths_but(block, "conv1", "ba", "conv2.conv"),
        covers=("ba",),
    )


def _global_context(block: Any, x: Tensor) -> Tensor:
    conv = block.conv_attn

    def gates(context: Tensor) -> Tensor:
        return block.gate(block.mlp_scale(context[:, :, None, None]))

    if conv is not None and block.mlp_scale is not None and block.mlp_add is None:
        return functional.context_gate(x, conv.weight, conv.bias, gates)
    context: Any
    if conv is None:
        context = functional.squeeze(x)
    else:
        x, context = functional.context_pool_with_map(x, conv.weight, conv.bias)
    y = x if block.mlp_scale is None else functional.scale(x, gates(context))
    return y if block.mlp_add is None else y + block.mlp_add(context[:, :, None, None])


@register("timm.layers.global_context.GlobalContext")
def global_context(block: Any) -> Recipe | str:
    conv, mlps = block.conv_attn, [mlp for mlp in (block.mlp_add, block.mlp_scale) if mlp is not None]
    if not all(_is_exactly(mlp, "mlp.ConvMlp") for mlp in mlps):
        return "its parts are not timm's"
    plain = all(is_dense(mlp.fc2) and mlp.fc2.out_channels == mlp.fc1.in_channels for mlp in mlps)
    if not plain or not (conv is None or (type(conv) is nn.Conv2d and is_dense(conv) and conv.out_channels == 1)):
        return "its layers are not timm's"
    if activation_name(block.gate) is None:
        return "its gate is not one we fuse"
    return OwnLayers(
        _global_context,
        "GlobalContext",
        ("squeeze" if conv is None else "context_pool", "scale"),
        bypassed=paths_but(block, "mlp_add", "mlp_scale", "gate"),
    )


def _normalise(norm: Any, x: Tensor) -> Tensor:
    """A BatchNorm without the activation that timm's has behind it."""
    return nn.BatchNorm2d.forward(norm, x)


def _excitation_activation(reduce: Any, norm: Any, activation: Any, expand: Any, groups: int = 1) -> str | None:
    """The activation between two 1x1 convolutions in these many groups, with a BatchNorm or none before it; None where
    the layers are not these."""

    def is_pointwise(layer: Any) -> bool:
        options = (1, 1), (1, 1), (0, 0), groups
        return type(layer) is nn.Conv2d and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == options

    plain = is_pointwise(reduce) and is_pointwise(expand) and type(norm) in (nn.Identity, nn.BatchNorm2d)
    return activation_name(activation) if plain else None


def _select(
    branches: Tensor | list[Tensor],
    norms: list[Any],
    branch_activation: str | None,
    layers: tuple[Any, Any, Any, Any],
    activation: str | None,
    **options: Any,
) -> Tensor:
    """norms and branch_activation: of the branches, where these have not been run. layers: the excitation's, run as
    they are where `activation` is not given."""
    reduce, norm, act, expand = layers

    def as_they_are(descriptor: Tensor) -> Tensor:
        return branch_weights(expand(act(norm(reduce(descriptor[:, :, None, None])))).flatten(1), **options)

    excitation: Excitation = as_they_are
    if activation is not None:
        excitation = Layers(reduce, None if type(norm) is nn.Identity else norm, activation, expand, **options)
    paths = options["paths"] if isinstance(branches, Tensor) else None
    norms = [n for n in norms if branch_activation is not None and type(n) is not nn.Identity]
    return selection(branches, norms, branch_activation or "identity", excitation, paths, _normalise)


def _selective_kernel(block: Any, x: Tensor, branch_activation: str | None, activation: str | None) -> Tensor:
    attn, paths = block.attn, block.paths
    inputs = x.split(block.in_channels // block.num_paths, 1) if block.split_input else [x] * block.num_paths
    maps = [path(u) if branch_activation is None else path.conv(u) for path, u in zip(paths, inputs, strict=True)]
    layers = attn.fc_reduce, attn.bn, attn.act, attn.fc_select
    norms = [path.bn for path in paths]
    options: dict[str, Any] = {"paths": block.num_paths, "groups": 1, "gate": "softmax"}
    return _select(maps, norms, branch_activation, layers, activation, **options)


def _branch_activation(path: Any) -> str | None:
    """Of a ConvNormAct that ends in a BatchNorm and this activation; None where it does not."""
    plain = path.aa is None and _is_exactly(path.bn, "norm_act.BatchNormAct2d") and type(path.bn.drop) is nn.Identity
    return activation_name(path.bn.act) if plain else None


@register("timm.layers.selective_kernel.SelectiveKernel")
def selective_kernel(block: Any) -> Recipe | str:
    attn, paths = block.attn, list(block.paths)
    parts = [_is_exactly(path, "conv_bn_act.ConvNormAct") for path in paths]
    if not all([*parts, _is_exactly(attn, "selective_kernel.SelectiveKernelAttn"), block.num_paths == attn.num_paths]):
        return "its parts are not timm's"
    names = {_branch_activation(path) for path in paths}
    branch_activation = names.pop() if len(names) == 1 else None
    activation = _excitation_activation(attn.fc_reduce, attn.bn, attn.act, attn.fc_select)
    runs = [f"paths.{i}" if branch_activation is None else f"paths.{i}.conv" for i in range(len(paths))]
    runs += [f"attn.{name}" for name in ("fc_reduce", "bn", "act", "fc_select")] if activation is None else []
    return OwnLayers(
        functools.partial(_selective_kernel, branch_activation=branch_activation, activation=activation),
        "SelectiveKernel",
        ("select", "select/with"),
        bypassed=paths_but(block, *runs),
        whole=True,
    )


@register("timm.layers.selective_kernel.SelectiveKernelAttn")
def selective_kernel_attention(block: Any) -> str:
    return "returns the weights of its branches alone; a SelectiveKernel around it is fused"


def _split_attention(block: Any, x: Tensor, branch_activation: str | None, activation: str | None) -> Tensor:
    splits = block.conv(x)
    if branch_activation is None:
        splits = block.act0(block.drop(block.bn0(splits)))
    layers = block.fc1, block.bn1, block.act1, block.fc2
    gate = "softmax" if block.radix > 1 else "sigmoid"
    options: dict[str, Any] = {"paths": block.radix, "groups": block.rsoftmax.cardinality, "gate": gate}
    return _select(splits, [block.bn0], branch_activation, layers, activation, **options)


@register("timm.layers.split_attn.SplitAttn")
def split_attention(block: Any) -> Recipe | str:
    if not _is_exactly(block.rsoftmax, "split_attn.RadixSoftmax") or block.rsoftmax.radix != block.radix:
        return "its parts are not timm's"
    plain = type(block.bn0) in (nn.Identity, nn.BatchNorm2d) and type(block.drop) is nn.Identity
    branch_activation = activation_name(block.act0) if plain else None
    layers = block.fc1, block.bn1, block.act1, block.fc2
    activation = _excitation_activation(*layers, groups=block.rsoftmax.cardinality)
    runs = ["conv", "bn0", "drop", "act0"] if branch_activation is None else ["conv"]
    runs += ["fc1", "bn1", "act1", "fc2"] if activation is None else []
    return OwnLayers(
        functools.partial(_split_attention, branch_activation=branch_activation, activation=activation),
        "SplitAttention",
        ("select", "select/with"),
        bypassed=paths_but(block, *runs),
        whole=True,
    )
