"""Op `channel_pool`: maximum and mean over the channels of a map in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .common import define, differentiable_backward, empty_map, like_or_none, needs_grad, wants_graph
from .scale import ACTIVATION_NAMES
from .spatial_gate import ORDER_NAMES
from .squeeze import TIE_NAMES

_ARGUMENTS = "Tensor? affine_weight, Tensor? affine_bias, int pre_activation, int mean_first, int ties"


def _fake(x, affine_weight, affine_bias, pre_activation, mean_first, ties):
    batch, _, *spatial = x.shape
    return x.new_empty((batch, 2, *spatial)), x.new_empty((batch, *spatial), dtype=torch.int32)


def _fake_backward(grad, x, pooled, index, affine_weight, affine_bias, pre_activation, mean_first, ties):
    return empty_map(x), like_or_none(affine_weight, x), like_or_none(affine_bias, x)


FORWARD = define("channel_pool", f"(Tensor x, {_ARGUMENTS}) -> (Tensor pooled, Tensor index)", _fake)
BACKWARD = define(
    "channel_pool_backward",
    f"(Tensor grad, Tensor x, Tensor pooled, Tensor index, {_ARGUMENTS})"
    " -> (Tensor grad_x, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


class _ChannelPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, affine_weight, affine_bias, *codes):
        pooled, index = FORWARD[backend](x, affine_weight, affine_bias, *codes)
        ctx.save_for_backward(x, affine_weight, affine_bias, pooled, index)
        ctx.backend, ctx.codes = backend, codes
        return pooled

    @staticmethod
    def backward(ctx, grad):
        x, affine_weight, affine_bias, pooled, index = ctx.saved_tensors
        if wants_graph():
            grads = _differentiable(ctx, x, affine_weight, affine_bias, grad)
        else:
            grads = BACKWARD[ctx.backend](grad, x, pooled, index, affine_weight, affine_bias, *ctx.codes)
            if affine_weight is None:
                grads = (grads[0], None, None)
        return None, *grads, *(None,) * len(ctx.codes)


def _differentiable(ctx, x, affine_weight, affine_bias, grad):
    pre_activation, mean_first, ties = ctx.codes

    def function(x, weight, bias):
        return reference.channel_pool(
            x,
            order=ORDER_NAMES[mean_first],
            ties=TIE_NAMES[ties],
            affine=None if weight is None else (weight, bias),
            pre_activation=ACTIVATION_NAMES[pre_activation],
        )

    return differentiable_backward(function, (x, affine_weight, affine_bias), ctx.needs_input_grad[1:4], grad)


def channel_pool(backend, *arguments) -> Tensor:
    """(B, 2, *spatial) in x's dtype, contiguous; `arguments` as in the operator's schema."""
    if needs_grad(*arguments[:3]):
        return _ChannelPool.apply(backend, *arguments)
    return FORWARD[backend](*arguments)[0]
