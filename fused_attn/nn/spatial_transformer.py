"""Spatial transformer: a map sampled on a grid that a network chooses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import are_plain, autocasts, is_ordinary, is_small
from ..ops.common import accumulator, apply_of, differentiable_backward, needs_node, wants_graph
from ..reference.spatial_transformer import PADDINGS
from .deterministic import torch_has_no_deterministic
from .pointwise import map_of, rows_of


def affine_grid(theta: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """`torch.nn.functional.affine_grid`, rounded once, and in programs of open sizes: torch's is for one size there."""
    if math.prod(size) and is_small(theta, math.prod(size) * 4):  # torch's has none of an empty batch
        return reference.spatial_transformer.affine_grid(theta, size, align_corners=align_corners)
    dtype, space = accumulator(theta.dtype), size[2:]
    theta = theta.reshape(theta.shape[0], *(1 for _ in space), *theta.shape[1:])
    grid = theta[..., -1].to(dtype)
    for axis, n in enumerate(space):
        steps = 2 * torch.arange(n, dtype=dtype, device=theta.device) - (n - 1)
        coordinate = (steps / (max(n - 1, 1) if align_corners else n)).reshape(-1, *(1,) * (len(space) - axis))
        grid = grid + coordinate * theta[..., len(space) - 1 - axis].to(dtype)  # x is the last axis
    return grid.to(theta.dtype)


def _on_axis(coordinate: Tensor, size: int, padding_mode: str, align_corners: bool) -> Tensor:
    """Where coordinates of -1 to 1 lie on an axis, in steps from its first value, with the derivatives that torch's
    sampling has, at the border too."""
    if align_corners:
        at, low, span = (coordinate + 1) / 2 * (size - 1), 0.0, float(size - 1)
    else:
        at, low, span = ((coordinate + 1) * size - 1) / 2, -0.5, float(size)
    if padding_mode == "zeros":
        return at
    if padding_mode == "reflection":
        if span == 0:
            return torch.zeros_like(at)
        away = at - low
        away = torch.where(away < 0, -away, away)
        rest = away.fmod(span)
        at = low + torch.where((away / span).floor() % 2 == 0, rest, span - rest)
    return torch.where(at <= 0, 0, torch.where(at >= size - 1, size - 1, at))


def _corners(
    grid: Tensor, space: Sequence[int], padding_mode: str, align_corners: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The 2^rank values around every place, one after the other: index among all positions, weight, whether it is on
    the map; each (B, positions of the grid)."""
    axes = []
    for axis, size in enumerate(space):
        coordinate = grid[..., len(space) - 1 - axis].flatten(1)  # the last axis of the map comes first
        at = _on_axis(coordinate, size, padding_mode, align_corners)
        lower = at.detach().floor()
        # Numbers that no integer holds, NaN among them, are far outside.
        first = lower.nan_to_num(-2.0).clamp(-2, size).long()
        fraction = at - lower
        axes.append([(first, 1 - fraction, size), (first + 1, fraction, size)])
    corners = []
    for corner in itertools.product(*axes):
        index = torch.zeros_like(corner[0][0])
        inside = torch.ones_like(index, dtype=torch.bool)
        for at, _, size in corner:
            index = index * size + at.clamp(0, size - 1)
            inside = inside & (at >= 0) & (at < size)
        corners.append((index, functools.reduce(torch.mul, (weight for _, weight, _ in corner)), inside))
    return corners


def _in_rows(index: Tensor, positions: int) -> Tensor:
    """Positions in their samples as positions among all samples'."""
    samples = torch.arange(index.shape[0], device=index.device)
    return (index + positions * samples[:, None]).flatten()


def gathered(x: Tensor, grid: Tensor, padding_mode: str, align_corners: bool) -> Tensor:
    """The sampling of look-ups: any derivative of it is made of look-ups and sums with an index."""
    space = x.shape[2:]
    y: Any = 0
    for index, weight, inside in _corners(grid, space, padding_mode, align_corners):
        value = rows_of(x).index_select(0, _in_rows(index, math.prod(space)))
        y = y + torch.where(inside.flatten()[:, None], value * weight.flatten()[:, None], 0)
    return map_of(y, x.shape[0], grid.shape[1:-1])


def deterministic_gradients(
    grad: Tensor, x: Tensor, grid: Tensor, padding_mode: str, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Of x and the grid, in sums of fixed order: one corner after the other, each an `index_add_`, which sorts its
    indices on CUDA under deterministic algorithms. Half precision is summed in float32."""
    space, dtype = x.shape[2:], accumulator(x.dtype)
    positions = math.prod(space)
    rows, grads = rows_of(x), rows_of(grad).to(dtype)
    of_rows = torch.zeros(rows.shape, dtype=dtype, device=x.device)
    with torch.enable_grad():
        leaf = grid.detach().to(dtype).requires_grad_()
        corners = _corners(leaf, space, padding_mode, align_corners)
    of_weights = []
    for index, weight, inside in corners:
        at, outside = _in_rows(index, positions), ~inside.flatten()[:, None]
        products = (rows.index_select(0, at) * grads).masked_fill_(outside, 0)
        of_weights.append(products.sum(1).view_as(weight))
        of_rows.index_add_(0, at, (grads * weight.detach().flatten()[:, None]).masked_fill_(outside, 0))
    weights = [weight for _, weight, _ in corners]
    (of_grid,) = torch.autograd.grad(weights, leaf, of_weights, materialize_grads=True)
    return map_of(of_rows, x.shape[0], space).to(x.dtype), of_grid.to(grid.dtype)


#: By the map's dimensions.
_BACKWARD = {4: torch.ops.aten.grid_sampler_2d_backward.default, 5: torch.ops.aten.grid_sampler_3d_backward.default}


class _Sample(torch.autograd.Function):
    """torch's sampling. Its gradients are torch's, too, but where these raise or are to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, padding_mode: str, align_corners: bool) -> Tensor:
        ctx.save_for_backward(x, grid)
        ctx.options = padding_mode, align_corners
        return reference.spatial_transformer.grid_sample(
            x, grid, padding_mode=padding_mode, align_corners=align_corners
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, grid = ctx.saved_tensors
        padding_mode, align_corners = ctx.options
        needs = ctx.needs_input_grad[:2]
        if wants_graph():
            grads = differentiable_backward(
                lambda x, grid: gathered(x, grid, padding_mode, align_corners), (x, grid), needs, grad
            )
        elif torch_has_no_deterministic(x):
            grads = deterministic_gradients(grad, x, grid, padding_mode, align_corners)
        else:
            # Of the grid there is one in any case.
            grads = _BACKWARD[x.dim()](grad, x, grid, 0, PADDINGS.index(padding_mode), align_corners, [needs[0], True])
        return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None


_apply_sample = apply_of(_Sample)


def grid_sample(x: Tensor, grid: Tensor, *, padding_mode: str = "zeros", align_corners: bool = False) -> Tensor:
    """`torch.nn.functional.grid_sample` between the nearest values, in x's layout, with gradients that can be
    differentiated again, and deterministic on CUDA where `torch.use_deterministic_algorithms` asks for that."""
    if is_ordinary(x) and are_plain(grid) and needs_node(x, grid):
        if autocasts(x):
            x, grid = (t if t.dtype == torch.float64 else t.float() for t in (x, grid))  # as torch does
        if not torch.compiler.is_compiling():
            return _apply_sample(x, grid, padding_mode, align_corners)
        if torch_has_no_deterministic(x):
            return gathered(x, grid, padding_mode, align_corners)
    return reference.spatial_transformer.grid_sample(x, grid, padding_mode=padding_mode, align_corners=align_corners)


class SpatialTransformer(reference.SpatialTransformer):
    """A spatial transformer: x sampled where an affine map puts the positions of the result.

    theta, (B, rank, rank + 1), comes from the localisation network, and y = `grid_sample(x, affine_grid(theta))`,
    bilinear (trilinear). The sampling and its gradients are torch's, but on CUDA under
    `torch.use_deterministic_algorithms(True)`, where torch's gradients raise: there every sum has a fixed order, at the
    price of a sort of the positions by where they read, once for each of the 4 (8) neighbours. Gradients of gradients,
    which torch does not have of sampling, are made of look-ups.

    Args:
        channels: C, of the map.
        localization: from x to theta, (B, rank * (rank + 1)) or (B, rank, rank + 1); with `features` to that many
            numbers a sample, (B, features) or anything that flattens to it. It is taken in x's dtype.
        features: a last dense layer from these to theta, which starts at the identity: weight 0, bias the identity.
        rank: number of spatial axes, 2 or 3.
        size: spatial size of the result; None: x's.
        padding_mode: what lies outside the map: "zeros", "border" or "reflection".
        align_corners: whether -1 and 1 mean the middles of the outermost values (as torch did before 1.3, and the
            checkpoints of then) or their far sides.

    `forward(x)`: x (B, C, H, W) or (B, C, D, H, W); a map (B, C, *size) in x's layout.

    Keys: `localization.*`; with `features` `theta.weight` (rank * (rank + 1), features) and `theta.bias`.

    Raises:
        ValueError: an option is out of range; in `forward`: x or theta of another shape.

    Source: Spatial Transformer Networks, arXiv:1506.02025.
    """

    _affine_grid = staticmethod(affine_grid)
    _grid_sample = staticmethod(grid_sample)
