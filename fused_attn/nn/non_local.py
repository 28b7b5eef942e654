"""Non-local blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reference
from ..backends import is_ordinary, is_small
from ..reference.non_local import concatenation_attention as matrix_concatenation_attention
from ..reference.non_local import dot_attention as matrix_dot_attention
from ..reference.non_local import project as project_a_map
from ..reference.non_local import weighted_channels
from .pointwise import are_products


def dot_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean over the key positions of query . key times the values, as (value key^T / N) query: linear in positions.

    Where the matrix of all pairs is the cheaper of the two it is also smaller than the maps it is made of, and is made.
    """
    queries, keys, values = query.flatten(2), key.flatten(2), value.flatten(2)
    (width, n), (out, m) = queries.shape[1:], values.shape[1:]
    # In a program of open sizes a comparison would bind them.
    if not torch.compiler.is_exporting() and n * m * (width + out) < width * out * (n + m):
        return matrix_dot_attention(query, key, value)
    # The division is the product's own: in half precision the sum would overflow, and divided keys lose digits.
    pairs = torch.baddbmm(values.new_zeros(()), values, keys.transpose(1, 2), beta=0, alpha=1 / m)
    return (pairs @ queries).reshape(*value.shape[:2], *query.shape[2:])


def concatenation_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean over the key positions of ReLU(query + key) times the values, without the matrix of pairs.

    The keys that a query sees, those above -query, are the first ones when keys are in falling order. So the sum is
    query * S0 + S1, where S0 and S1 are the sums of the first values and of the first keys times values: one sort, two
    running sums and a look-up. Time and memory, in backward too, are linear in positions (but for the sort).
    """
    # Where the matrix costs less than the sort, and for those who may not know one.
    if not is_ordinary(value) or is_small(value, query.numel() * math.prod(key.shape[1:]) * 4):
        return matrix_concatenation_attention(query, key, value)
    dtype = torch.promote_types(value.dtype, torch.float32)
    queries = query.flatten(1).to(dtype)
    keys, order = key.flatten(1).to(dtype).sort(descending=True)  # NaN first: every query sees it
    values = value.flatten(2)
    values = values.gather(2, order[:, None].expand(values.shape)).to(dtype)
    seen = torch.searchsorted(-keys.detach(), queries.detach())
    # A zero before the first: the sums of no key.
    values, keys = nn.functional.pad(values, (1, 0)), nn.functional.pad(keys, (1, 0))
    sums = torch.cat([values, values * keys[:, None]], 1).cumsum(2)
    of_values, of_products = sums.gather(2, seen[:, None].expand(-1, sums.shape[1], -1)).chunk(2, 1)
    y = torch.addcmul(of_products, of_values, queries[:, None]) / order.shape[1]
    return y.to(value.dtype).reshape(*value.shape[:2], *query.shape[2:])


def project(x: Tensor, conv: Any, weight: Tensor) -> Tensor:
    """As the reference's, in one convolution to one channel: the map in between is not made."""
    if is_small(x) or not are_products(conv):
        return project_a_map(x, conv, weight)
    projected = weighted_channels(x, weight @ conv.weight.flatten(1))
    return projected if conv.bias is None else projected + weight @ conv.bias


class NonLocal(reference.NonLocal):
    """Non-local block: x + W(y), y_i the sum over all positions j of f(x_i, x_j) g(x_j).

    f is a softmax over j of scaled theta(x_i) . phi(x_j) in mode "embedded" (Gaussian) and of x_i . x_j in "gaussian";
    theta(x_i) . phi(x_j) / N in "dot"; ReLU(w . [theta(x_i), phi(x_j)]) / N in "concatenation", N the number of keys.
    theta, phi, g and W are 1x1 convolutions, W with a BatchNorm that starts at zero, so that the block does.

    No matrix of all pairs of positions is kept: "dot" is theta (phi^T g) / N, "concatenation" a sort and two running
    sums, and the other two are `functional.position_attention`.

    Args:
        channels: of the map.
        mode: "embedded", "gaussian", "dot" or "concatenation".
        scale: of the products in mode "embedded" (the others have none): "inner" by (inner width)^-0.5, "input" by
            channels^-0.5, or None.
        pool: keys and values are maxima of 2x2 positions (1x2x2 in 3-D, 2 in 1-D), taken of x "before" their
            convolutions, "after" these, or None.
        reduction: the inner width is channels // reduction.
        divisor: the inner width is channels / reduction rounded to a multiple of this instead, as in timm.
        hidden: explicit inner width, instead.
        batch_norm: after the last convolution.
        out_bias: of the last convolution.
        zero_init: the BatchNorm, or the last convolution where there is none, starts at zero.
        rank: number of spatial axes, 1, 2 or 3.

    `NonLocal.preset(name, channels, **options)` is the block of another implementation: "caffe2" (video-nonlocal-net,
    SlowFast: the defaults here), "alexhex7" (Non-local_pytorch: no scale, pool after), "mmcv" (no pool, no BatchNorm;
    its `sub_sample` is pool="after", its `norm_cfg` batch_norm=True, out_bias=False) or "timm" (NonLocalAttn: scale by
    the input's width, no pool, an eighth of the channels).

    `forward(x)`: x (B, channels, *spatial); a map of the same shape and layout.

    Keys: `theta.*`, `phi.*`, `g.*`, `out.*` (1x1 convolutions with bias), `norm.*`, and `concat_project.weight`
    (1, 2 * inner, 1, 1) for theta, then phi. `load_state_dict` also takes those of the four implementations
    (`g.0`, `phi.0`, `W.0`, `W.1`; `g.conv`, `conv_out.conv`, ...; `t`, `p`, `z`; `conv_theta`, ...) and Caffe2's blobs
    without what stands before `theta_w`.

    Raises:
        ValueError: an option out of range; in `forward`: x has not `channels` channels or not `rank` spatial axes.

    Source: Non-local Neural Networks, arXiv:1711.07971; equivalent to the blocks of the presets.
    """

    _position_attention = staticmethod(functional.position_attention)
    _dot_attention = staticmethod(dot_attention)
    _concatenation_attention = staticmethod(concatenation_attention)
    _project = staticmethod(project)
