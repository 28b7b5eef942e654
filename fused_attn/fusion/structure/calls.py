"""What stands in a graph in place of a block, where it is more than one call of `fused_attn.functional`: functions of
the block's tensors, which are traced like anybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional

#: A BatchNorm: weight, bias, running mean and variance.
Norm = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


def folded(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A BatchNorm that uses its running statistics as x * weight + bias; in float32 for half precision."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    scale = (var.to(dtype) + eps).rsqrt()
    scale = scale if weight is None else scale * weight.to(dtype)
    shift = -mean.to(dtype) * scale
    return scale, shift if bias is None else shift + bias.to(dtype)


def _with_norm(function: Callable[..., Any], prefix: str) -> Callable[..., Tensor]:
    """A gate whose convolution has a BatchNorm behind it, which keeps its statistics as `batch_norm` does."""

    def run(x: Tensor, *, norm: Norm, training: bool, momentum: float, eps: float, **options: Any) -> Tensor:
        weight, bias, running_mean, running_var = norm
        if not training:
            conv, shift = options[f"{prefix}weight"], options.pop(f"{prefix}bias", None)
            scale, offset = folded(*norm, eps)
            options[f"{prefix}weight"] = conv.to(scale.dtype) * scale
            options[f"{prefix}bias"] = offset if shift is None else shift.to(scale.dtype) * scale + offset
            return function(x, **options)
        y, mean, variance = function(x, batch_norm=(weight, bias, eps), **options)
        count = x.shape[0] * x.shape[2:].numel()
        with torch.no_grad():
            for running, now in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
                running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
        return y

    run.__name__ = run.__qualname__ = f"{function.__name__}_with_batch_norm"
    return run


spatial_gate_with_batch_norm = _with_norm(functional.spatial_gate, "")
cbam_with_batch_norm = _with_norm(functional.cbam, "spatial_")


class Block:
    """A module of `fused_attn.nn` without parameters of its own: they come with each call, by their names."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes = {name: p.shape for name, p in module.named_parameters()}
        #: As a function has them: graphs are printed as code.
        self.__name__ = self.__qualname__ = type(module).__name__
        self.__module__ = type(module).__module__

    def __call__(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        found: Any = torch.func.functional_call(
            self.module, {name: self._fitting(name, t) for name, t in tensors.items()}, (x,)
        )
        return found

    def _fitting(self, name: str, tensor: Tensor) -> Tensor:
        """A weight of a Linear as that of a 1x1 convolution or the other way round."""
        rank = len(self.shapes.get(name, tensor.shape))
        if tensor.dim() > rank:
            return tensor.flatten(rank - 1)
        return tensor.reshape(*tensor.shape, *(1,) * (rank - tensor.dim()))
