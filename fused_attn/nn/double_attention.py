"""Double attention: features gathered by one softmax and distributed by another."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import is_ordinary
from .pointwise import are_products, matrix, product, spread
from .small import eager_where_small


def _pays(x: Tensor, features: int, count: int) -> bool:
    """Whether the products are fewer than those of the convolutions in their places: not of maps that are smaller than
    their channels are many."""
    if torch.compiler.is_compiling():
        return True
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    return channels * count * (positions + features) < features * positions * (channels + count)


def gather_and_distribute(
    x: Tensor, features: Any, gather: Any, distribute: Any, reconstruct: Any, over: str = "channels"
) -> Tensor:
    """As `fused_attn.reference.double_attention.gather_and_distribute`: the features' convolution after the gathering,
    to which it is the same and which is smaller, and the last one before the distribution, where that is less work."""
    convs = (features, gather, distribute, *(() if reconstruct is None else (reconstruct,)))
    plain = is_ordinary(x) and are_products(*convs)
    if not (plain and _pays(x, len(features.weight), len(gather.weight))):
        return reference.double_attention.gather_and_distribute(x, features, gather, distribute, reconstruct, over)
    rows = x.flatten(2)
    weight = torch.cat([matrix(gather), matrix(distribute)])
    biases = gather.bias, distribute.bias
    bias = None if None in biases else torch.cat(biases)
    b, v = product(weight, rows, bias).split([len(gather.weight), len(distribute.weight)], 1)
    gathered = rows @ b.softmax(2).transpose(1, 2)
    descriptors = product(matrix(features), gathered, features.bias)
    bias = None
    if reconstruct is not None:
        descriptors, bias = product(matrix(reconstruct), descriptors, None), reconstruct.bias
    return spread(descriptors, v.softmax(1 if over == "channels" else 2), bias, x)


@eager_where_small()
class DoubleAttention(reference.DoubleAttention):
    """Double attention: descriptors gathered from all positions, a mixture of them at each; linear in positions.

    With A, B and V 1x1 convolutions of x and n the number of descriptors, G = A softmax(B)^T, over positions, has n
    vectors of `features` numbers; y = W (G softmax(V)) + b. A is made of what was gathered of x (that is the same: its
    weights sum to 1), W comes before the distribution, so that neither makes a map: x is read twice, the 2 n maps
    of B and V are written together, and y is written once, in x's layout. A map of fewer positions than
    channels, about, goes through the convolutions in their own places, which is less work.

    Args:
        channels: C, of the map.
        features, descriptors: width of A and number of descriptors; None: channels // 4, as in the paper.
        reconstruct: whether W is there; without it y has `features` channels.
        distribute: what the second softmax is over, "channels" (the paper: each position mixes the descriptors) or
            "positions" (most ports).
        rank: number of spatial axes, 1 to 3; the paper's are videos.

    `forward(x)`: x (B, C, *spatial); a map of the same shape, to which the paper adds x.

    Keys: those of the ports, `convA.*` (features, C, 1, 1), `convB.*`, `convV.*` (descriptors, C, 1, 1),
    `conv_reconstruct.*` (C, features, 1, 1), each with a bias.

    Raises:
        ValueError: an option is out of range; in `forward`: x of another shape.

    Source: A2-Nets: Double Attention Networks, arXiv:1810.11579; equivalent to External-Attention-pytorch's
    `DoubleAttention` with its softmax over positions (distribute="positions"; without the `dim` that it leaves out,
    torch takes it over the batch).
    """

    _gather_and_distribute = staticmethod(gather_and_distribute)
