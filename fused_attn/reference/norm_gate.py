"""Norm gate: BatchNorm, activation, channel gate, residual and activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import FUNCTIONS
from .scale import scale
from .squeeze import Excitation, per_channel, space


def update_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, variance: Tensor, momentum: float
) -> None:
    """Moves the running statistics, where they are given, towards those of a batch (variance: the unbiased one)."""
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, variance)):
            if running is not None and running.dtype == new.dtype:
                running.lerp_(new, momentum)
            elif running is not None:
                running.copy_(running.to(new.dtype).lerp_(new, momentum))


def _synchronised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """BatchNorm with the statistics of all processes of a group, by sums that autograd goes through."""
    from torch.distributed.nn.functional import all_reduce

    axes = (0, *space(x))
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    count = all_reduce(values.new_tensor(float(x.numel() // x.shape[1])), group=group)
    mean = all_reduce(values.sum(axes), group=group) / count
    values = values - per_channel(mean, x)
    var = all_reduce(values.square().sum(axes), group=group) / count
    update_statistics(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
    values = values * per_channel((var + eps).rsqrt(), x)
    values = values if weight is None else values * per_channel(weight, x)
    return (values if bias is None else values + per_channel(bias, x)).to(x.dtype)


def norm_gate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    excitation: Excitation | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
    group: Any = None,
    inplace: bool = False,
    save: str = "all",
) -> Tensor:
    """See `fused_attn.functional.norm_gate`. save: plain PyTorch keeps what it keeps."""
    if group is not None and training:
        u = _synchronised(x, weight, bias, running_mean, running_var, momentum, eps, group)
    else:
        u = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    u = FUNCTIONS[activation](u)
    if excitation is not None:
        gate = excitation(u.mean(space(u)))
        y = scale(u, gate.flatten(1), residual=residual, post_activation=post_activation)
    else:
        y = FUNCTIONS[post_activation](u if residual is None else u + residual)
    if not inplace:
        return y
    over = residual if torch.is_grad_enabled() else x
    assert over is not None
    return over.copy_(y)
