"""A recipe in a few words."""

from __future__ import annotations

from torch import nn

from .recipe import CbamGate, OwnLayers, Recipe, SpatialGate, SplitGate
from .run import layer_at, parameter_at, parameter_paths


def describe(block: nn.Module, recipe: Recipe) -> str:
    """Such as "SqueezeExcite(256 -> 16, relu, sigmoid)"."""
    residual = ", adds its input" if recipe.adds_input else ""
    if isinstance(recipe, OwnLayers):
        return recipe.name + (", adds its input" if recipe.adds_input else "")
    if isinstance(recipe, SpatialGate):
        return f"SpatialAttention({_describe_spatial(block, recipe)}{residual})"
    if isinstance(recipe, CbamGate):
        channel = describe(block, recipe.channel)
        return f"CBAM({channel}, {_describe_spatial(block, recipe.spatial)}{residual})"
    pool = {"avg": "", "both": ", both pools"}.get(recipe.pool, f", {recipe.pool} pool")
    if isinstance(recipe, SplitGate):
        return f"squeeze, its own layers, scale{pool and f' ({pool[2:]})'}"
    if recipe.weight1 is None:
        return f"gate({recipe.gate}{pool}{residual})"
    (path, *_) = parameter_paths(recipe)
    weight = parameter_at(block, path)
    assert weight is not None
    shape = weight.shape
    if recipe.layer != "dense":
        return f"ECA(kernel {shape[-1]}, {recipe.layer}, {recipe.gate}{pool}{residual})"
    if recipe.weight2 is None:
        return f"EffectiveSE({shape[1]}, {recipe.gate}{pool}{residual})"
    return f"SqueezeExcite({shape[1]} -> {shape[0]}, {recipe.activation}, {recipe.gate}{pool}{residual})"


def _describe_spatial(block: nn.Module, recipe: SpatialGate) -> str:
    size = " x ".join(str(k) for k in layer_at(block, recipe.layers[0]).weight.shape[2:])
    pools = "mean of both pools" if recipe.merged else " and ".join(recipe.order)
    return f"kernel {size}, {pools}, {recipe.gate}"
