"""A BatchNorm with what follows it, one fused op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, functional, reference
from ..ops.common import below, needs_grad
from ..ops.norm_gate import RUNNING
from ..reference.block_attention import NORMS, count_batch, uses_batch_statistics
from .pointwise import is_hooked

_FOLDS = backends.unavailable("cpu", "norm_gate", "cpu") is None

#: Values in a map from which on the op is faster on CPUs than what it is made of.
LARGE = 1 << 17


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """As the reference's; in eager mode on the CPU one operator, where no gradient goes through it. It is found anew at
    each call: what a tensor's version counts does not see `weight.data.mul_(...)`."""
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    at_once = (
        _FOLDS
        and not torch.compiler.is_compiling()
        and backends.forced() in (None, "cpu")
        and backends.is_ordinary(norm.running_mean)
        and backends.are_plain(*tensors)
        and all(t is None or t.is_cpu for t in tensors)
        and not needs_grad(*tensors)
    )
    if not at_once:
        return reference.block_attention.affine_of(norm)
    factor, shift, *_ = below(RUNNING["cpu"], *tensors, norm.eps).unbind()
    return factor, shift


def pays(norm: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the op is as fast as what it is made of, or better in another way: in half precision it rounds once, and
    of one sample torch 2.13's BatchNorm has wrong gradients where they come with channels last."""
    exact = x.dtype in (torch.float32, torch.float64) and (x.shape[0] > 1 or not torch.is_grad_enabled())
    if torch.compiler.is_compiling() or x.device.type != "cpu" or backends.forced() is not None or not exact:
        return True
    # With the statistics of rows of channels only the sum that it spares a pass for makes up for its own.
    return x.numel() >= LARGE and (x.is_contiguous() or residual is not None or not uses_batch_statistics(norm))


def normalised(
    norm: Any,
    x: Tensor,
    *,
    activation: str = "identity",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """As the reference, by `functional.norm_gate` where that pays; what somebody put in place of the BatchNorm, and
    maps that are to become another dtype, run as they are."""
    same = residual is None or residual.dtype == x.dtype
    known = type(norm) in NORMS and not is_hooked(norm) and same and x.dim() == 2 + 1 + NORMS.index(type(norm))
    if not (known and pays(norm, x, residual)):
        return reference.normalised.normalised(
            norm, x, activation=activation, gate=gate, residual=residual, post_activation=post_activation
        )
    return norm_gate(
        norm,
        x,
        activation=activation,
        excitation=None if gate is None else lambda _: gate,
        residual=residual,
        post_activation=post_activation,
    )


def norm_gate(norm: Any, x: Tensor, **options: Any) -> Tensor:
    """`functional.norm_gate` with a BatchNorm's parameters and statistics, which it keeps as its own forward would."""
    tracked = not norm.training or norm.track_running_stats
    return functional.norm_gate(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean if tracked else None,
        norm.running_var if tracked else None,
        training=uses_batch_statistics(norm),
        momentum=count_batch(norm),
        eps=norm.eps,
        **options,
    )
