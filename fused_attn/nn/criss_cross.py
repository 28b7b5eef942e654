"""CCNet's criss-cross attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .. import functional, reference
from ..backends import are_plain, autocasts, choose, is_ordinary
from ..ops.common import apply_of, below, differentiable_backward, wants_graph
from ..ops.criss_cross_attention import BACKWARD, FORWARD, RELAYOUT
from ..reference.layout import lies_channels_last
from .pointwise import are_products, map_of, matrix, rows_of


def attend(x: Tensor, query: Any, key: Any, value: Any, gamma: Tensor, recurrence: int) -> Tensor:
    """As `fused_attn.reference.criss_cross.attend`, with the map itself attended to, and the values' convolution taken
    of the sums: that is the same, as the weights add up to 1."""
    if not is_ordinary(x):
        return reference.criss_cross.attend(x, query, key, value, gamma, recurrence)
    # In half precision gamma times the values' weight would be rounded.
    exact = x.dtype in (torch.float32, torch.float64) and not autocasts(x) and are_products(query, key, value)
    products = exact and are_plain(query.weight, key.weight, value.weight, query.bias, key.bias, value.bias, gamma)
    if not (products and {t.dtype for t in (query.weight, key.weight, value.weight, gamma)} == {x.dtype}):
        return attend_to_values(x, query, key, value, gamma, recurrence)
    weight = torch.cat([matrix(query), matrix(key)])
    biases = [torch.zeros_like(c.weight[:, 0, 0, 0]) if c.bias is None else c.bias for c in (query, key)]
    of_value = None if value.bias is None else gamma * value.bias
    inputs = x, weight, torch.cat(biases), gamma * matrix(value), of_value
    backend = choose("criss_cross_attention", x, (), (x, x))
    if torch.compiler.is_compiling() or backend == "reference":
        return attend_to_map(recurrence, *inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y: Tensor = _apply_attend(backend, recurrence, *inputs)
        return y
    return _steps(None, backend, recurrence, *inputs)


def attend_to_values(x: Tensor, query: Any, key: Any, value: Any, gamma: Tensor, recurrence: int) -> Tensor:
    """The layers are called; a position's channels are next to each other, where columns and rows are read alike."""
    y = x.contiguous(memory_format=torch.channels_last)
    for _ in range(recurrence):
        attended = functional.criss_cross_attention(query(y), key(y), value(y))
        y = functional.scale(attended.to(x.dtype), gamma.expand(x.shape[:2]), residual=y)
    return y if lies_channels_last(x) else y.contiguous()


def attend_to_map(
    recurrence: int, x: Tensor, weight: Tensor, bias: Tensor, of_value: Tensor, bias_of_value: Tensor | None
) -> Tensor:
    """weight, bias: of query and key together; of_value and its bias have gamma in them."""
    y, depth = x.contiguous(memory_format=torch.channels_last), weight.shape[0] // 2
    for _ in range(recurrence):
        maps = conv2d(y, weight[..., None, None], bias)
        attended = functional.criss_cross_attention(maps[:, :depth], maps[:, depth:], y)
        y = conv2d(attended, of_value[..., None, None], bias_of_value) + y
    return y if lies_channels_last(x) else y.contiguous()


def _rows(x: Tensor, backend: str) -> Tensor:
    return rows_of(x if lies_channels_last(x) else below(RELAYOUT[backend], x, 1))


def _in_layout_of(rows: Tensor, x: Tensor, backend: str) -> Tensor:
    y = map_of(rows, x.shape[0], x.shape[2:])
    return y if lies_channels_last(x) else below(RELAYOUT[backend], y, 0)


def _steps(
    kept: list[Tensor] | None,
    backend: str,
    recurrence: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    of_value: Tensor,
    bias_of_value: Tensor | None,
) -> Tensor:
    """`attend_to_map` without gradients. kept: gets the map before each step, queries, keys, sums and their state."""
    rows, depth = _rows(x, backend), weight.shape[0] // 2
    for _ in range(recurrence):
        maps = map_of(torch.addmm(bias, rows, weight.t()), x.shape[0], x.shape[2:])
        query, key = (t.contiguous(memory_format=torch.channels_last) for t in (maps[:, :depth], maps[:, depth:]))
        y = map_of(rows, x.shape[0], x.shape[2:])
        attended, state = below(FORWARD[backend], query, key, y)
        if kept is not None:
            kept += [query, key, y, attended, state]
        rows = rows.clone() if bias_of_value is None else rows + bias_of_value
        rows.addmm_(rows_of(attended), of_value.t())
    return _in_layout_of(rows, x, backend)


class _Attend(torch.autograd.Function):
    """`attend_to_map`, whose products add to what is there and whose gradients are summed where they are made: a map
    less is written in every step, and two less in its backward."""

    @staticmethod
    def forward(ctx: Any, backend: str, recurrence: int, *inputs: Any) -> Tensor:
        ctx.backend, ctx.recurrence = backend, recurrence
        kept: list[Tensor] = []
        y = _steps(kept, backend, recurrence, *inputs)
        ctx.save_for_backward(*inputs, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, bias, of_value, bias_of_value, *kept = ctx.saved_tensors
        if wants_graph(grad):
            function = functools.partial(attend_to_map, ctx.recurrence)
            inputs = x, weight, bias, of_value, bias_of_value
            return None, None, *differentiable_backward(function, inputs, ctx.needs_input_grad[2:], grad)
        of_weight, of_bias, of_last = (torch.zeros_like(t) for t in (weight, bias, of_value))
        of_last_bias = None if bias_of_value is None else torch.zeros_like(bias_of_value)
        rows = _rows(grad, ctx.backend)
        of_attended = torch.empty_like(rows)
        while kept:
            *kept, query, key, y, attended, state = kept
            of_last.addmm_(rows.t(), rows_of(attended))
            if of_last_bias is not None:
                of_last_bias += rows.sum(0)
            of_sums = map_of(torch.mm(rows, of_value, out=of_attended), x.shape[0], x.shape[2:])
            of_maps = below(BACKWARD[ctx.backend], of_sums, query, key, y, attended, state)
            of_products = torch.cat([rows_of(t) for t in of_maps[:2]], 1)
            of_weight.addmm_(of_products.t(), rows_of(y))
            of_bias += of_products.sum(0)
            rows = rows_of(of_maps[2]).add_(rows).addmm_(of_products, weight)
        del of_attended, of_sums, of_maps, of_products  # before there is one more
        return None, None, _in_layout_of(rows, x, ctx.backend), of_weight, of_bias, of_last, of_last_bias


_apply_attend = apply_of(_Attend)


class CrissCrossAttention(reference.CrissCrossAttention):
    """Criss-cross attention: x + gamma * (values of the row and the column, weighted), as often as `recurrence` says.

    Query, key and value are 1x1 convolutions of x. The weights of a position are one softmax of query . key over the
    H positions of its column, itself left out, and the W of its row; there is no scale. Twice, with the same
    parameters, every position has met every other. gamma, one number, starts at 0.

    Args:
        channels: of the map.
        reduction: queries and keys have channels // reduction channels.
        recurrence: how often the block is applied to its own result; the authors' R. Their class is one application.

    `forward(x)`: x (B, channels, H, W); a map of the same shape and layout.

    Keys: those of the authors' code, `query_conv.*`, `key_conv.*`, `value_conv.*`, `gamma` (1,). `load_state_dict` also
    takes mmcv's `gamma.scale`.

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or is not 2-D.

    Source: CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv:1811.11721; equivalent to the authors'
    `CrissCrossAttention`, the form in plain PyTorch.
    """

    _attend = staticmethod(attend)
