"""What a recipe runs in place of a block's forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...codes import FUNCTIONS
from ...nn.normalised import affine_of
from ...reference.block_attention import fold_batch_norm, run_normalised, uses_batch_statistics
from .recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate

#: (submodule, name) of weight1, bias1, weight2 and bias2 of an excitation that is part of a block's function.
Paths = tuple[tuple[str, str] | None, ...]


def split_path(path: str | None) -> tuple[str, str] | None:
    if path is None:
        return None
    layer, _, name = path.rpartition(".")
    return layer, name


def parameter_paths(recipe: Recipe) -> Paths:
    """Of the excitation that is part of the block's function."""
    gate = recipe.channel if isinstance(recipe, CbamGate) else recipe
    if not isinstance(gate, ChannelGate):
        return ()
    return tuple(split_path(path) for path in (gate.weight1, gate.bias1, gate.weight2, gate.bias2))


def parameter_at(block: nn.Module, path: tuple[str, str] | None) -> Tensor | None:
    if path is None:
        return None
    return getattr(layer_at(block, path[0]), path[1])


def layer_at(block: nn.Module, path: str) -> Any:
    owner = block
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    return owner


class Unsuited(TypeError):
    """Raised before any layer of a block has run: for a map that its own forward may take."""


def number_at(block: nn.Module, path: tuple[str, str] | None) -> Tensor:
    """A parameter that was one number when the block was recognised; Unsuited where it is not any more."""
    number: Any = parameter_at(block, path)
    if not isinstance(number, Tensor) or number.numel() != 1:
        raise Unsuited(f"{path}: expected a tensor of one number")
    return number


#: The tensors at `parameter_paths`.
Parameters = tuple[Tensor | None, ...]


def parameters_of(block: nn.Module, paths: Paths) -> Parameters:
    return tuple([parameter_at(block, path) for path in paths])


def run(block: nn.Module, recipe: Recipe, parameters: Parameters, x: Tensor, *others: Tensor, **options: Any) -> Tensor:
    """parameters: those at the recipe's `parameter_paths`. others, options: its further maps, and its options."""
    if isinstance(recipe, OwnLayers):
        return recipe.forward(block, x, *others, **options)
    residual = x if recipe.adds_input else None
    if isinstance(recipe, SplitGate):
        try:
            pooled = functional.squeeze(x, recipe.pool, ties=recipe.ties)
        except (TypeError, ValueError) as error:
            raise Unsuited(str(error)) from error
        descriptor = pooled if isinstance(pooled, Tensor) else 0.5 * pooled[0] + 0.5 * pooled[1]
        return functional.scale(x, recipe.excite(block, descriptor), residual=residual)
    return run_gate(block, recipe, parameters, x, residual=residual)


def run_gate(
    block: nn.Module,
    recipe: ChannelGate | SpatialGate | CbamGate,
    parameters: Parameters,
    x: Tensor,
    **around: Any,
) -> Tensor:
    """The one function that the block is. around: its arguments affine, pre_activation, residual, post_activation."""
    if isinstance(recipe, SpatialGate):
        return _run_spatial(block, recipe, x, around)
    if isinstance(recipe, CbamGate):
        return _run_cbam(block, recipe, parameters, x, around)
    return _run_channel(recipe, parameters, x, around)


#: What stands around a gate: `run_gate`.
Around = dict[str, Any]
_BEFORE = ("affine", "pre_activation")


def _run_channel(recipe: ChannelGate, parameters: Parameters, x: Tensor, around: Around) -> Tensor:
    return functional.channel_gate(
        x,
        *parameters,
        layer=recipe.layer,
        pool=recipe.pool,
        ties=recipe.ties,
        activation=recipe.activation,
        gate=recipe.gate,
        **around,
    )


def _spatial_convolution(block: nn.Module, recipe: SpatialGate) -> tuple[Tensor, Tensor | None, Any] | None:
    """Weight and bias of the convolution, and its BatchNorm where that takes its statistics from the batch; one that
    does not is folded in. None where the op does not know such a BatchNorm."""
    conv, *norms = (layer_at(block, path) for path in recipe.layers)
    weight, bias, live = conv.weight, conv.bias, None
    for norm in norms:
        if not uses_batch_statistics(norm):
            weight, bias = fold_batch_norm(weight, bias, norm, affine_of)
        elif norm is norms[-1] and norm.weight is not None and norm.bias is not None:
            live = norm
        else:
            return None
    return (torch.cat([weight, weight], 1) * 0.5 if recipe.merged else weight), bias, live


def _run_spatial(block: nn.Module, recipe: SpatialGate, x: Tensor, around: Around) -> Tensor:
    convolution = _spatial_convolution(block, recipe)
    if convolution is not None:
        weight, bias, norm = convolution
        run = functools.partial(functional.spatial_gate, x, weight, bias, **around)
        return run_normalised(norm, x, functools.partial(run, order=recipe.order, ties=recipe.ties, gate=recipe.gate))
    before = {key: around[key] for key in _BEFORE if key in around}
    z = functional.channel_pool(x, order=recipe.order, ties=recipe.ties, **before)
    if recipe.merged:
        z = 0.5 * z[:, :1] + 0.5 * z[:, 1:]
    for path in recipe.layers:
        z = layer_at(block, path)(z)
    return functional.scale(x, FUNCTIONS[recipe.gate](z), **around)


def _run_cbam(block: nn.Module, recipe: CbamGate, parameters: Parameters, x: Tensor, around: Around) -> Tensor:
    channel, spatial = recipe.channel, recipe.spatial
    convolution = _spatial_convolution(block, spatial)
    if convolution is None:
        before = {key: around.pop(key) for key in _BEFORE if key in around}
        return _run_spatial(block, spatial, _run_channel(channel, parameters, x, before), around)
    *weights, norm = convolution
    run = functools.partial(
        functional.cbam,
        x,
        *parameters,
        *weights,
        layer=channel.layer,
        pool=channel.pool,
        channel_ties=channel.ties,
        activation=channel.activation,
        channel_gate=channel.gate,
        order=spatial.order,
        spatial_ties=spatial.ties,
        spatial_gate=spatial.gate,
        **around,
    )
    return run_normalised(norm, x, run)
