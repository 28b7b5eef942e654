"""The fused forward pass of the modules that select between branches, from their convolutions on.

A BatchNorm that uses running statistics is folded: those behind the branches into the prologue of `functional.select`,
so that no normalised map is written, the one inside the excitation into its first layer. One that takes statistics of
the batch runs as itself, the branches' activation stays in the prologue, and `functional.select_with` goes around the
excitation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..reference.block_attention import uses_batch_statistics
from ..reference.selection import Layers
from ..reference.squeeze import Excitation
from .normalised import affine_of
from .pointwise import is_hooked


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a 1x1 convolution and of the BatchNorm behind it (None: none)."""
    weight = layer.weight.flatten(1)
    if norm is None:
        return weight, layer.bias
    factor, shift = affine_of(norm)
    bias = shift if layer.bias is None else shift + layer.bias.to(factor.dtype) * factor
    return weight.to(factor.dtype) * factor[:, None], bias


def _runs_itself(norm: Any) -> bool:
    """Whether a norm cannot be folded: it takes statistics from its input, is what somebody put in its place, or has
    somebody listening to it."""
    return not isinstance(norm, _BatchNorm) or uses_batch_statistics(norm) or is_hooked(norm)


def _is_one_op(excitation: Layers) -> bool:
    layers = excitation.fc1, excitation.fc2
    plain = all(isinstance(layer, torch.nn.Conv2d) and not is_hooked(layer) for layer in layers)
    return plain and (excitation.norm is None or not _runs_itself(excitation.norm))


def call(norm: Any, x: Tensor) -> Tensor:
    return norm(x)


def selection(
    branches: Tensor | Sequence[Tensor],
    norms: Sequence[Any],
    activation: str,
    excitation: Excitation,
    paths: int | None = None,
    normalise: Callable[[Any, Tensor], Tensor] = call,
) -> Tensor:
    """As `fused_attn.reference.selection`; normalise(norm, x) runs a branch's BatchNorm alone, without activation."""
    affine = None
    if any(map(_runs_itself, norms)):
        if isinstance(branches, Tensor):
            branches = normalise(norms[0], branches)
        else:
            branches = [normalise(norm, u) for norm, u in zip(norms, branches, strict=True)]
    elif norms:
        pairs = [affine_of(norm) for norm in norms]
        if paths is None:
            affine = torch.stack([factor for factor, _ in pairs]), torch.stack([shift for _, shift in pairs])
        else:
            affine = pairs[0][0].view(paths, -1), pairs[0][1].view(paths, -1)
    options: dict[str, Any] = {"paths": paths, "affine": affine, "pre_activation": activation}
    if not isinstance(excitation, Layers) or not _is_one_op(excitation):
        return functional.select_with(branches, excitation, **options)
    return functional.select(
        branches,
        *folded(excitation.fc1, excitation.norm),
        excitation.fc2.weight,
        excitation.fc2.bias,
        groups=excitation.groups,
        activation=excitation.activation,
        gate=excitation.gate,
        **options,
    )
