"""Global second-order pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, reference
from ..backends import is_ordinary, is_small
from ..ops.common import accumulator, apply_of, needs_node
from ..reference.block_attention import uses_batch_statistics
from ..reference.gsop import SIDE
from .deterministic import torch_has_no_deterministic
from .normalised import normalised
from .pointwise import are_products, is_hooked
from .selection import folded
from .small import eager_where_small


class _Covariance(torch.autograd.Function):
    """The covariance, and what its backward reads, results too so that this can be differentiated: the centred map and
    the means. Backward is one product, where autograd's own takes two, one for each side, and their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        centred, means = _centred(x)
        ctx.save_for_backward(centred, means)
        ctx.count = count
        ctx.set_materialize_grads(False)
        return _covariance(centred, means, count), centred, means

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_centred: Tensor | None, of_means: Tensor | None) -> Any:
        centred, means = ctx.saved_tensors
        n, count = centred.shape[2], ctx.count
        if grad is None and of_centred is None and of_means is None:
            return None, None
        of_x: Any = 0
        if grad is not None:
            both = (grad + grad.transpose(1, 2)) / count
            of_x = both @ centred
            if n != count:
                of_x = of_x + (1 - n / count) * (both @ means)
        if of_centred is not None:
            of_x = of_x + of_centred - of_centred.mean(2, keepdim=True)
        if of_means is not None:
            of_x = of_x + (of_means / n).expand(centred.shape)
        return of_x, None


_apply_covariance = apply_of(_Covariance)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    means = x.mean(2, keepdim=True)
    return x - means, means


def _covariance(centred: Tensor, means: Tensor, count: int) -> Tensor:
    n = centred.shape[2]
    of_means = means @ means.transpose(1, 2)  # which has no part in it where count is n
    factor = n / count * (1 - n / count)
    return torch.baddbmm(of_means, centred, centred.transpose(1, 2), beta=factor, alpha=1 / count)


def covariance(x: Tensor, count: int | None = None) -> Tensor:
    """As the reference, with the means taken off before the product: what this then rounds is as
    small as its result."""
    count = x.shape[2] if count is None else count
    if not is_ordinary(x):
        return reference.gsop.covariance(x, count)
    if needs_node(x) and not torch.compiler.is_compiling():
        return _apply_covariance(x, count)[0]
    return _covariance(*_centred(x), count)


def mean_of_windows(x: Tensor, height: int, width: int) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`; two products with matrices where its gradient raises."""
    if not torch_has_no_deterministic(x):
        return reference.gsop.mean_of_windows(x, height, width)
    return reference.gsop.products_with_windows(x.to(accumulator(x.dtype)), height, width).to(x.dtype)


def reduced_to_side(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """conv, BatchNorm and the means of 8x8 windows; these first where that saves work."""
    pays = not torch.compiler.is_compiling() and x.shape[2] * x.shape[3] >= 8 * SIDE * SIDE
    plain = are_products(conv) and type(norm) is nn.BatchNorm2d and not is_hooked(norm)
    if not (pays and plain) or uses_batch_statistics(norm):
        return mean_of_windows(norm(conv(x)), SIDE, SIDE)
    # Folded, also because torch 2.13's BatchNorm on CPUs has wrong gradients of one sample where those that come to it
    # lie channels_last, as those of a transposed map do.
    weight, bias = folded(conv, norm)
    x = mean_of_windows(x, SIDE, SIDE)
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fits(x: Any) -> bool:
    """Not where torch 2.13's BatchNorm may have wrong gradients, see `reduced_to_side`, which the channel form does not
    call."""
    return is_small(x) and (x.shape[0] > 1 or not torch.is_grad_enabled())


@eager_where_small(_fits, lambda block, x: block.mode == "channel" and is_small(x))
class GSoP(reference.GSoP):
    """Global second-order pooling: a gate from the covariance of the channels, of the positions, or both.

    Channel form: relu(x) through a 1x1 convolution to `reduced` channels, BatchNorm, ReLU; their covariance over the
    positions, (reduced, reduced), through a BatchNorm by row, four dot products a row with weights of its own, and a
    1x1 convolution; y = x * sigmoid. Position form: relu(x) through 1x1 convolution, BatchNorm, and means of 8x8
    windows; the 64x64 products of the positions, likewise, with a ReLU after the dot products, to 64 gates; these 8x8
    go to x's size by means of windows, and y = relu(x * gate). The others are fusions of the two products: "avg" their
    sum, "max" the larger, "concat" BatchNorm(conv(one) + conv(other)), with grouped convolutions along the height.

    relu(x) is written once, for both forms. BatchNorm and ReLU of the reduced map write one map, the covariance a
    second, centred one: it reads the first twice and that once, and backward reads that and writes one. The authors'
    code builds a centring matrix of positions x positions, a sample. In eval the position form takes the means of
    windows first where the map is much larger, so that its convolution runs on 64 positions. The gate is one pass (2
    reads and writes), "avg" two (5), "max" three (7).

    Args:
        channels: C, of the map; for "concat" a multiple of 64 up to 2048.
        mode: "channel" (the paper's), "position", "avg", "max" or "concat".
        reduced: channels of the covariance, and of the map that the position form looks at.
        stride: of the channel form's first convolution; the authors take 2 where the map has 256 channels.

    `forward(x)`: x (B, C, H, W); a map of the same shape, to which the authors then add the residual. The position
    form's sums are centred by a mean over channels that is off by reduced / 64, as in the authors' code and weights.

    Keys: those of the authors' bottleneck, `conv_for_DR.*`, `bn_for_DR.*`, `row_bn.*`, `row_conv_group.weight`
    (4 * reduced, 1, reduced, 1), `fc_adapt_channels.*`; `conv_for_DR_spatial.*`, `bn_for_DR_spatial.*`,
    `row_bn_for_spatial.*`, `row_conv_group_for_spatial.*`, `fc_adapt_channels_for_spatial.*`;
    `dilate_conv_for_concat1.*`, `dilate_conv_for_concat2.*`, `bn_for_concat.*`.

    Raises:
        ValueError: an option is out of range; in `forward`: x has another shape.

    Source: Global Second-order Pooling, arXiv:1811.12006; equivalent to the attention in the authors' `Bottleneck`,
    modes '1', '2', '+', 'M' and '&'.
    """

    _covariance = staticmethod(covariance)
    _normalised = staticmethod(normalised)
    _mean_of_windows = staticmethod(mean_of_windows)
    _reduced_to_side = staticmethod(reduced_to_side)
    _scale = staticmethod(functional.scale)
