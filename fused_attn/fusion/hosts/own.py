"""This library's own reference modules, which `fuse` runs as their fused forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...reference import (
    CBAM,
    AttentionGate,
    BilinearAttention,
    BilinearTransform,
    ChannelAttention,
    DoubleAttention,
    ExternalAttention,
    GatherExcite,
    NonLocal,
    SpatialAttention,
)
from ...reference.block_attention import check_channels
from ..reading.layers import paths_but
from ..recipes.describe import describe
from ..recipes.names import host_of
from ..recipes.own import AS_IN_NN, FUSED_FORMS, MAPS, blocks_in, own_functions
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate
from ..recipes.run import run
from .registry import register

_MODULE = "fused_attn.reference"
_EPILOGUE = "returns its gate alone or has an epilogue; use fused_attn.nn"


@register(
    f"{_MODULE}.squeeze_excite.SqueezeExcite",
    f"{_MODULE}.squeeze_excite.EffectiveSE",
    f"{_MODULE}.squeeze_excite.ECA",
    f"{_MODULE}.block_attention.ChannelAttention",
)
def channel_attention(block: Any) -> Recipe | str:
    if block.return_gate or block.post_activation != "identity":
        return _EPILOGUE
    return _odd_layer(block) or _channel_gate(block, "")


def _odd_layer(block: Any) -> str | None:
    """Why an excitation is not the one that its block is made with."""
    for name, layer in block.named_children():
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            return f"{name} is a {type(layer).__name__}"
        if not _has(layer, "weight"):
            return f"{name} has no weight"
    return None


def _has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has that parameter; one that is parametrised is not computed, which may change its buffers."""
    return is_parametrized(layer, name) or getattr(layer, name) is not None


def _channel_gate(block: Any, prefix: str) -> ChannelGate:
    """Of a block at this path, "" or with a dot at its end."""
    parameters: dict[str, Any] = {
        f"{kind}{i}": f"{prefix}{name}.{kind}"
        for i, (name, layer) in enumerate(block.named_children(), 1)
        for kind in ("weight", "bias")
        if _has(layer, kind)
    }
    return ChannelGate(
        **parameters,
        layer=block.layer,
        pool=block.pool,
        ties=block.ties,
        activation=block.activation,
        gate=block.gate,
        rank=None,
    )


@register(f"{_MODULE}.block_attention.SpatialAttention")
def spatial_attention(block: Any) -> Recipe | str:
    if block.return_gate or block.post_activation != "identity":
        return _EPILOGUE
    return _spatial_gate(block, "")


def _spatial_gate(block: Any, prefix: str) -> SpatialGate:
    _, norm = block._layers()
    return SpatialGate(
        (f"{prefix}conv",) if norm is None else (f"{prefix}conv.conv", f"{prefix}conv.bn"),
        order=block.order,
        ties=block.ties,
        gate=block.gate,
        rank=block.rank + 2,
    )


@register(f"{_MODULE}.block_attention.CBAM")
def cbam(block: Any) -> Recipe | str:
    channel, spatial = block.channel, block.spatial
    if type(channel) is not ChannelAttention or type(spatial) not in (SpatialAttention, type(None)):
        return "its parts are not plain ChannelAttention and SpatialAttention"
    last = channel if spatial is None else spatial
    if channel.return_gate or last.return_gate or last.post_activation != "identity":
        return _EPILOGUE
    odd = _odd_layer(channel)
    if odd is not None:
        return f"channel.{odd}"
    gate = _channel_gate(channel, "channel.")
    return gate if spatial is None else CbamGate(gate, _spatial_gate(spatial, "spatial."))


@register(f"{_MODULE}.gather_excite.GatherExcite")
def gather_excite(block: Any) -> Recipe | str:
    if block.extent:
        return "its pool is not global"
    gate = ChannelGate(pool=block.pool, ties=block.ties, gate=block.gate, rank=None)
    if block.channels is None:
        return gate

    def forward(block: Any, x: Tensor) -> Tensor:  # no weight says how many channels there are
        check_channels(block.channels, x)
        return run(block, gate, (), x)

    return OwnLayers(forward, describe(block, gate), ("channel_gate",), rank=None)


@register(*AS_IN_NN)
def as_in_nn(block: Any) -> Recipe | str:
    (cls,) = (cls for cls in AS_IN_NN if isinstance(block, cls))
    functions, rank = AS_IN_NN[cls]
    given = tuple(f"{name}." for name in blocks_in(block))
    for path, layer in block.named_modules():
        kind = host_of(type(layer))
        if (
            path
            and not f"{path}.".startswith(given)
            and not kind.__module__.startswith(("torch.nn.modules.", "fused_attn."))
        ):
            return f"{path} is a {kind.__name__}, not a plain layer"
    bypassed: tuple[str, ...] = ()
    if "select" in functions:  # the convolutions run; in eval the BatchNorms and the excitation do not
        bypassed = paths_but(block, *(path for path, layer in block.named_modules() if is_branch(path, layer)))
    elif isinstance(block, NonLocal) and block.mode == "concatenation":  # what only makes one number a position is read
        bypassed = ("theta",) if block.pool == "after" else ("theta", "phi")
    elif "norm_gate" in functions or isinstance(block, DoubleAttention):
        bypassed = tuple(path for path, layer in block.named_modules() if is_read(block, path, layer))
    covers = ("ba",) if isinstance(block, BilinearAttention) else ()
    maps = MAPS.get(cls, ())
    return OwnLayers(
        FUSED_FORMS[cls].forward, cls.__name__, functions, rank=rank, bypassed=bypassed, covers=covers, maps=maps
    )


def is_read(block: Any, path: str, layer: nn.Module) -> bool:
    """Whether a layer's parameters are read, and it itself not run, in some mode or for some maps."""
    if isinstance(block, (DoubleAttention, ExternalAttention)):
        return path != ""
    if isinstance(block, AttentionGate):
        return path in ("W_g", "W_x", "W_x.1")
    if isinstance(block, BilinearAttention):
        return path in ("conv1.bn", "conv2.bn")
    if isinstance(block, BilinearTransform):
        return isinstance(layer, nn.BatchNorm2d)
    return path in ("bn_for_DR", "bn_for_DR_spatial", "conv_for_DR_spatial")


def is_branch(path: str, layer: nn.Module) -> bool:
    """Whether it is a convolution that makes branches of a block that selects between them."""
    return type(layer) is nn.Conv2d and path.partition(".")[0] in ("conv", "paths")


def own_recipe(block: Any) -> Recipe | None:
    """The gate of one of the blocks above or of `fused_attn.nn`, whatever becomes of it; None: it has none, its
    pool is windows or it is neither of the squeeze-excite nor of the CBAM family."""
    if own_functions(block) is not None:
        return None
    if isinstance(block, CBAM):
        gate = _channel_gate(block.channel, "channel.")
        return gate if block.spatial is None else CbamGate(gate, _spatial_gate(block.spatial, "spatial."))
    if isinstance(block, SpatialAttention):
        return _spatial_gate(block, "")
    if isinstance(block, GatherExcite):
        return None if block.extent else ChannelGate(pool=block.pool, ties=block.ties, gate=block.gate, rank=None)
    return _channel_gate(block, "")
