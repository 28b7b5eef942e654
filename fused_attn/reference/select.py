"""Select: branch maps weighted by an excitation of their sum's mean (selective kernels, split attention)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import FUNCTIONS
from .squeeze import Affine, Excitation, per_channel, prologue, space


def branch_maps(branches: Tensor | Sequence[Tensor], paths: int | None = None) -> list[Tensor]:
    """The M maps (B, C, *spatial) of `branches`: as they are, or views of (B, M, C, *spatial), or of
    (B, M * C, *spatial) where `paths` gives M."""
    if not isinstance(branches, Tensor):
        return list(branches)
    return list((branches if paths is None else branches.unflatten(1, (paths, -1))).unbind(1))


def branch_prologue(maps: Sequence[Tensor], affine: Affine | None, pre_activation: str) -> list[Tensor]:
    """The prologue of each branch, with its row of weight and bias (M, C), in the maps' dtype."""
    rows = zip(*affine, strict=True) if affine is not None else [None] * len(maps)
    return [prologue(u, row, pre_activation).to(u.dtype) for u, row in zip(maps, rows, strict=True)]


def select_weights(
    descriptor: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    paths: int,
    groups: int = 1,
    activation: str = "relu",
    gate: str = "softmax",
) -> Tensor:
    """(B, C) descriptors to (B, M, C) branch weights."""

    def layer(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        row = row.to(weight.dtype)  # which a folded BatchNorm makes float32
        if groups == 1:
            return F.linear(row, weight.flatten(1), bias)
        return F.conv1d(row.unsqueeze(2), weight.flatten(1).unsqueeze(2), bias, groups=groups).squeeze(2)

    z = layer(FUNCTIONS[activation](layer(descriptor, weight1, bias1)), weight2, bias2)
    return branch_weights(z, paths, groups, gate)


def branch_weights(logits: Tensor, paths: int, groups: int, gate: str) -> Tensor:
    """(B, M * C) logits, each group's M branches together, to (B, M, C) weights."""
    z = logits.unflatten(1, (groups, paths, -1)).transpose(1, 2).flatten(2)
    return z.softmax(1) if gate == "softmax" else z.sigmoid()


def select(
    branches: Tensor | Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    paths: int | None = None,
    groups: int = 1,
    activation: str = "relu",
    gate: str = "softmax",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.select`."""
    count = len(branch_maps(branches, paths))

    def excitation(descriptor: Tensor) -> Tensor:
        return select_weights(
            descriptor,
            weight1,
            bias1,
            weight2,  # type: ignore[arg-type]
            bias2,
            paths=count,
            groups=groups,
            activation=activation,
            gate=gate,
        )

    return select_with(branches, excitation, paths=paths, affine=affine, pre_activation=pre_activation)


def select_with(
    branches: Tensor | Sequence[Tensor],
    excitation: Excitation,
    *,
    paths: int | None = None,
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.select_with`."""
    if not isinstance(branches, Tensor):
        maps = branch_prologue(branches, affine, pre_activation)
        total = functools.reduce(torch.add, maps)
        weights = excitation(total.mean(space(total))).flatten(2).to(total.dtype)
        weighted = [u * per_channel(a, u) for u, a in zip(maps, weights.unbind(1), strict=True)]
        return functools.reduce(torch.add, weighted)
    stacked = branches if paths is None else branches.unflatten(1, (paths, -1))
    if affine is not None:
        weight, bias = (per_channel(p, stacked[:, 0]) for p in affine)
        stacked = torch.addcmul(bias, stacked, weight)
    stacked = FUNCTIONS[pre_activation](stacked).to(branches.dtype)
    total = stacked.sum(1)
    weights = excitation(total.mean(space(total))).flatten(2).to(total.dtype)
    return (stacked * per_channel(weights, total)).sum(1)
