"""External attention: positions against a memory that all samples share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..backends import is_ordinary
from .normalised import normalised
from .pointwise import are_products, matrix, product, spread
from .small import eager_where_small


def look_up(x: Tensor, query: Any, keys: Any, values: Any, output: Any) -> Tensor:
    """As `fused_attn.reference.external_attention.look_up`, with the two layers before the softmax as one, and the two
    behind it."""
    if not (is_ordinary(x) and are_products(query, keys, values, output)):
        return reference.external_attention.look_up(x, query, keys, values, output)
    weight, bias = matrix(keys) @ matrix(query), keys.bias
    if query.bias is not None:
        of_query = matrix(keys) @ query.bias
        bias = of_query if bias is None else bias + of_query
    a = product(weight, x.flatten(2), bias).softmax(2)
    a = a / (1e-9 + a.sum(1, keepdim=True))
    weight, bias = matrix(output) @ matrix(values), output.bias
    if values.bias is not None:
        of_values = matrix(output) @ values.bias
        bias = of_values if bias is None else bias + of_values
    return spread(weight.expand(x.shape[0], -1, -1), a, bias, x)


@eager_where_small()
class ExternalAttention(reference.ExternalAttention):
    """External attention: each position reads a memory of a few rows, which all samples share; linear in positions.

    a = softmax of K (W1 x + b) over positions, each position's then divided by their sum over the memory;
    y = relu(BatchNorm(W2 V a) + x). K W1 and W2 V are multiplied first: instead of two convolutions of C to C channels
    there are products with (memory, C) matrices, and no maps between; BatchNorm, sum and ReLU of large maps are
    one fused op.

    Args:
        channels: C, of the map.
        memory: rows of the memory, S.

    `forward(x)`: x (B, C, H, W); a map of the same shape.

    Keys: those of the authors' code, `conv1.weight` (C, C, 1, 1), `conv1.bias`, `linear_0.weight` (S, C, 1),
    `linear_1.weight` (C, S, 1), `conv2.0.weight` (C, C, 1, 1), `conv2.1.*`.

    Raises:
        ValueError: an option is out of range; in `forward`: x of another shape.

    Source: External Attention, arXiv:2105.02358; equivalent to the authors' `External_attention`, whose two memories
    start as one.
    """

    _look_up = staticmethod(look_up)
    _normalised = staticmethod(normalised)
