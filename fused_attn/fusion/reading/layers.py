"""Recognising the layers inside a block: exactly these, or not at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...nn.pointwise import is_pointwise
from ..recipes.names import host_of, qualified_name
from ..recipes.recipe import CbamGate, ChannelGate, Recipe, SpatialGate

#: Activation classes by qualified name; those with options are looked at in `activation_name`.
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Hardswish": "hard_swish",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hard_sigmoid",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.HardSwish": "hard_swish",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "monai.networks.blocks.activation.MemoryEfficientSwish": "silu",
}


def activation_name(layer: Any) -> str | None:
    """Its name in `fused_attn.codes.ACTIVATIONS`, None if it is none of them."""
    kind = type(layer)
    if kind is nn.GELU:
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    if kind is nn.LeakyReLU:
        return "leaky_relu" if layer.negative_slope == 0.01 else None
    if qualified_name(kind) == "monai.networks.blocks.activation.Swish":
        return "silu" if layer.alpha == 1 else None
    return _ACTIVATIONS.get(qualified_name(kind))


def is_dense(layer: Any) -> bool:
    """A Linear, or a convolution with a kernel of one position, without groups, stride or padding."""
    return type(layer) is nn.Linear or is_pointwise(layer)


def is_global_average(layer: Any, rank: int) -> bool:
    """An adaptive average pool of maps with this many spatial axes to one position."""
    kind = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
    return type(layer) is kind and layer.output_size in (1, (1,) * rank)


def is_channel_convolution(layer: Any, *, padded: bool) -> bool:
    """ECA's Conv1d over the channels: one row in, one out, odd kernel, zero padding that keeps the length."""
    if type(layer) is not nn.Conv1d or layer.padding_mode != "zeros":
        return False
    (k,) = layer.kernel_size
    return (
        k % 2 == 1
        and (layer.in_channels, layer.out_channels) == (1, 1)
        and layer.padding == ((k // 2,) if padded else (0,))
        and (layer.stride, layer.dilation) == ((1,), (1,))
    )


def is_spatial_convolution(layer: Any, inputs: int) -> bool:
    """A convolution to one channel of these many inputs, odd kernel, zero padding that keeps the size."""
    return (
        type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and (layer.in_channels, layer.out_channels, layer.groups, layer.padding_mode) == (inputs, 1, 1, "zeros")
        and all(k % 2 == 1 for k in layer.kernel_size)
        and (layer.padding == "same" or layer.padding == tuple(k // 2 for k in layer.kernel_size))
        and all(s == 1 for s in layer.stride)
        and all(d == 1 for d in layer.dilation)
    )


def is_batch_norm(layer: Any) -> bool:
    """A BatchNorm; timm's with an activation only where that is none."""
    if qualified_name(type(layer)) == "timm.layers.norm_act.BatchNormAct2d":
        return type(layer.act) is nn.Identity and type(layer.drop) is nn.Identity
    return type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def paths_but(block: nn.Module, *runs: str) -> tuple[str, ...]:
    """Paths of all layers of a block but these and what is in them: of those that it may not run."""
    kept = tuple(f"{path}." for path in runs)
    return tuple(path for path, _ in block.named_modules() if path and not f"{path}.".startswith(kept))


def bias_of(path: str) -> str:
    """Path of a layer's bias. It is read at every call, so that one set or taken away later counts."""
    return f"{path}.bias"


def two_dense_layers(first: str, second: str) -> dict[str, Any]:
    """The parameters' paths of a bottleneck."""
    return {
        "weight1": f"{first}.weight",
        "bias1": bias_of(first),
        "weight2": f"{second}.weight",
        "bias2": bias_of(second),
    }


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LISTS = (nn.ParameterList, nn.ParameterDict)


def calls_itself(layer: nn.Module) -> bool:
    """Whether it has a `__call__` of its own, beside its forward; that of torch's lists of parameters only raises."""
    cls = host_of(type(layer))
    return cls.__call__ is not nn.Module.__call__ and cls not in LISTS


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, "timm.layers.norm_act.BatchNormAct2d")


def swapped_layer(block: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer whose weight is read cannot be bypassed: LoRA and (fake-)quantised layers have a `weight` too,
    so that an adapter which only names the path would drop what they add to it."""
    read: list[tuple[str, tuple[type | str, ...]]] = []
    channel = recipe.channel if isinstance(recipe, CbamGate) else recipe
    if isinstance(channel, ChannelGate):
        plain = (nn.Linear, *_CONVOLUTIONS) if channel.layer == "dense" else (nn.Conv1d,)
        read += [(path.rpartition(".")[0], plain) for path in (channel.weight1, channel.weight2) if path]
    spatial = recipe.spatial if isinstance(recipe, CbamGate) else recipe
    if isinstance(spatial, SpatialGate):
        read += zip(spatial.layers, (_CONVOLUTIONS, _NORMS), strict=False)
    for path, kinds in read:
        layer: Any = block.get_submodule(path)
        kind = type(layer)
        if kind in LISTS:
            continue
        if path and kind not in kinds and qualified_name(kind) not in kinds:
            return f"{path}.weight belongs to a {kind.__name__}, not to a plain layer"
        if path and layer.weight is None:
            return f"{path} has no weight"
    return None
