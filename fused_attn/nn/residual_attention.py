"""Residual attention: (1 + mask) * trunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from ..backends import are_plain, is_ordinary, is_small
from ..ops.common import apply_of, needs_node


class _ResidualMask(torch.autograd.Function):
    """trunk + mask * trunk, both of one shape: 3 passes forward and 6 backward, where autograd's own of the same
    operator takes 9: it makes the trunk's gradient as two maps and their sum."""

    @staticmethod
    def forward(ctx: Any, trunk: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(trunk, mask)
        return torch.addcmul(trunk, trunk, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        trunk, mask = ctx.saved_tensors
        of_trunk, of_mask = ctx.needs_input_grad
        return torch.addcmul(grad, grad, mask) if of_trunk else None, grad * trunk if of_mask else None


_apply_residual_mask = apply_of(_ResidualMask)


def residual_mask(trunk: Tensor, mask: Tensor) -> Tensor:
    """(1 + mask) * trunk in one pass: of a mask of trunk's shape by addcmul, of one a channel or a position by
    `functional.scale`."""
    batch, channels, *space = trunk.shape
    small = (batch, channels, *(1,) * len(space)), (batch, 1, *space)
    if mask.shape != trunk.shape:
        if mask.shape not in small:
            raise ValueError(
                f"mask: expected trunk's shape, {tuple(trunk.shape)}, or one a channel or a position;"
                f" got {tuple(mask.shape)}"
            )
        return functional.scale(trunk, 1 + mask)
    if is_small(trunk) or mask.dtype != trunk.dtype or not (is_ordinary(trunk) and are_plain(mask)):
        return reference.residual_attention.residual_mask(trunk, mask)
    if needs_node(trunk, mask) and not torch.compiler.is_compiling():
        return _apply_residual_mask(trunk, mask)
    return torch.addcmul(trunk, trunk, mask)


class ResidualAttention(reference.ResidualAttention):
    """Residual attention: (1 + M(x)) * T(x), T the trunk and M the mask branch, both between residual units.

    Either branch is given or built as published. A unit is a bottleneck of channels // 4 that normalises first
    (BatchNorm, ReLU, convolution, three times) and adds its input. The trunk is t of them. The mask goes down `depth`
    times, a 3x3 max pool of stride 2 and r units (2 r at the bottom), and as often up, bilinear; there it adds, but for
    the last time, a unit of the map of that size on the way down, and goes through r units. BatchNorm, ReLU and a 1x1
    convolution, twice, and a sigmoid end it.

    The product with a mask of the trunk's shape is one `torch.addcmul`, trunk + trunk * mask, rounded once: 3 passes
    and 6 backward, which keeps both maps (as written, (1 + mask) * trunk: 5 and 6, and it keeps 1 + mask, too). Where
    the trunk is infinite and the mask 0 that is NaN, not infinite. A mask with one value a channel or a position goes
    through `functional.scale`: 2 passes.

    Args:
        channels: C, of the map, the trunk's result and the mask.
        trunk: from x to a map, any PyTorch code; None: built.
        mask: from x to the trunk's shape, or (B, C, 1, 1) or (B, 1, H, W), with its own sigmoid; None: built.
        depth: how often a built mask halves the map: 3, 2, 1 in the three stages of the published network, 0 in the
            last of that for small images.
        p: units before the branches and after the product; None: 1, or 0 where both branches are given.
        t, r: see above, of what is built.
        shortcuts: a built mask also adds, on its way up, the map of the same size on the way down itself, and in the
            end the trunk, as the published code does since its weights of 2018.

    `forward(x)`: x (B, C, H, W), with both branches given any that they take; a map of the trunk's shape.

    Keys: those of the published code, `first_residual_blocks.bn1.weight`, `trunk_branches.0.conv1.weight`,
    `softmax1_blocks.*`, `skip1_connection_residual_block.*`, `last_blocks.*` and so on; its names for small images
    (`down_residual_blocks1`, `middle_2r_blocks`, `up_residual_blocks1`, `conv1_1_blocks`) load too. Its `conv4` is used
    in no unit of this block and left out. A given branch is under `trunk_branches` or `mask`.

    Raises:
        ValueError: an option is out of range, channels are no multiple of 4, or shortcuts for a given mask; in
            `forward`: a mask of another shape.

    Source: Residual Attention Network, arXiv:1704.06904; equivalent to the `AttentionModule` classes of
    tengshaofeng/ResidualAttentionNetwork-pytorch (`AttentionModule_pre`: shortcuts=False, the others: True).
    """

    _residual_mask = staticmethod(residual_mask)
