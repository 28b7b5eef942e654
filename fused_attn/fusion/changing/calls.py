"""What stands in a graph in place of a block, where it is more than one call of `fused_attn.functional`: functions of
the block's tensors, which are traced like anybody's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ... import functional
from ...reference.block_attention import fold_batch_norm, run_normalised

#: A BatchNorm: weight, bias, running mean and variance.
Norm = tuple[Tensor, Tensor, Tensor, Tensor]


def _with_norm(function: Callable[..., Any], prefix: str) -> Callable[..., Tensor]:
    """A gate whose convolution has a BatchNorm behind it, which keeps its statistics; the graph counts its batches."""

    def run(x: Tensor, *, norm: Norm, training: bool, momentum: float, eps: float, **options: Any) -> Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        layer = SimpleNamespace(**dict(zip(names, norm, strict=True)), eps=eps, momentum=momentum, training=training)
        layer.track_running_stats, layer.num_batches_tracked = True, None
        if training:
            return run_normalised(layer, x, functools.partial(function, x, **options))
        conv = options.pop(f"{prefix}weight"), options.pop(f"{prefix}bias", None)
        options[f"{prefix}weight"], options[f"{prefix}bias"] = fold_batch_norm(*conv, layer)
        return function(x, **options)

    run.__name__ = run.__qualname__ = f"{function.__name__}_with_batch_norm"
    return run


spatial_gate_with_batch_norm = _with_norm(functional.spatial_gate, "")
cbam_with_batch_norm = _with_norm(functional.cbam, "spatial_")


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, place: int, rank: int) -> Tensor:
    """A map's context as a tensor of `rank` dimensions: samples first, and channels in this place. weight, bias: in any
    shape."""
    context = functional.context_pool(x, weight.reshape(1, -1), None if bias is None else bias.reshape(1))
    return _placed(context, place, rank)


def _placed(s: Tensor, place: int, rank: int) -> Tensor:
    """(B, C) as a tensor of `rank` dimensions, its channels in this place."""
    return s.reshape(s.shape[0], *(1,) * (place - 1), s.shape[1], *(1,) * (rank - place - 1))


class _Function:
    """What graphs print as code, as a function of its class's name."""

    def __post_init__(self) -> None:
        for name in ("__name__", "__qualname__"):
            object.__setattr__(self, name, type(self).__name__.lower())


@dataclass(frozen=True)
class Pool(_Function):
    """A map's mean or maximum over all positions as a tensor of `rank` dimensions; total: the sum in place of the mean.

    What it is called with is all that a graph has written down of it: numbers there may be sizes.
    """

    kind: str
    ties: str
    total: bool
    rank: int

    def __call__(self, x: Tensor) -> Tensor:
        pooled: Any = functional.squeeze(x, self.kind, ties=self.ties)
        if self.total:
            pooled = pooled * x.shape[2:].numel()
        return _placed(pooled, 1, self.rank)


def scale_by_channels(x: Tensor, gate: Tensor) -> Tensor:
    """A map times a gate that has as many dimensions, one number a channel."""
    return functional.scale(x, gate.flatten(2)[:, :, 0])


def scale_by_gate(x: Tensor, gate: Tensor) -> Tensor:
    """A map times a gate that has as many dimensions, one number a channel or a position."""
    return functional.scale(x, gate)


@dataclass(frozen=True, eq=False)
class Selection(_Function):
    """A weighted sum of branches around layers that a graph has between their mean and their weights.

    layers: of the descriptor and whatever else they read. rank, place: how many dimensions the descriptor has for them,
    and where its channels stand. branch: the dimension of their result with the branches; the others are samples and
    channels. paths: how many branches lie in one map; None: they are maps of their own.
    """

    layers: fx.GraphModule
    rank: int
    place: int
    branch: int
    paths: int | None
    pre_activation: str

    def __call__(self, maps: list[Tensor], read: list[Any], norms: list[tuple[Tensor, Tensor]]) -> Tensor:
        """norms: the folded BatchNorms of the maps, one each; none: the maps are as they are."""

        def excitation(s: Tensor) -> Tensor:
            # Its own call would print what it raises, as it does for the sizes that do not fit which a check tries.
            branches: Any = self.layers.forward(_placed(s, self.place, self.rank), *read).movedim(self.branch, 0)
            return branches.reshape(branches.shape[0], *s.shape).transpose(0, 1)

        affine = None
        if norms:
            weight, bias = (
                torch.cat(rows).unflatten(0, (self.paths or len(maps), -1)) for rows in zip(*norms, strict=True)
            )
            affine = weight, bias
        branches = maps if self.paths is None else maps[0]
        return functional.select_with(
            branches, excitation, paths=self.paths, affine=affine, pre_activation=self.pre_activation
        )


class Block:
    """A module of `fused_attn.nn` without parameters of its own: they come with each call, by their names."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        #: As a function has them: graphs are printed as code.
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = type(module).__module__

    def __call__(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        found: Any = torch.func.functional_call(
            self.module, {name: self._fitting(name, t) for name, t in tensors.items()}, (x,)
        )
        return found

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        """A weight of a Linear as that of a 1x1 convolution or the other way round."""
        rank = len(self.shapes.get(name, tensor.shape))
        if tensor.dim() > rank:
            return tensor.flatten(rank - 1)
        return tensor.reshape(*tensor.shape, *(1,) * (rank - tensor.dim()))
