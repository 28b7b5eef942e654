"""What every op file needs: definition of an operator's overloads, layouts, and double backward.

The schema and the fake kernel are defined here in Python, so that both exist where the native library does
not. The native library registers `.cpu` and `.cuda`; `.triton` imports its kernel at the first call.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fused_attn", "DEF")
BACKENDS = ("cpu", "triton", "cuda")

#: What `fused_attn.backends.OPS` calls an op -> the operators that it is made of.
OPERATORS: dict[str, list[str]] = {}


def define(name: str, schema: str, fake: Callable, module: str | None = None) -> dict[str, torch._ops.OpOverload]:
    """Define `fused_attn::name` with one overload a backend, all with this schema and fake kernel.

    The Triton kernel is the function of that name in `fused_attn.kernels.<module>`, by default the operator's own.
    """
    module = module or name.removesuffix("_backward")
    OPERATORS.setdefault(module, []).append(name)

    def triton_kernel(*args):
        return getattr(importlib.import_module(f"fused_attn.kernels.{module}"), name)(*args)

    for backend in BACKENDS:
        LIBRARY.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fused_attn::{name}.{backend}", fake, lib=LIBRARY)
    LIBRARY.impl(f"{name}.triton", triton_kernel, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        LIBRARY.impl(f"{name}.triton", triton_kernel, "CPU")
    packet = getattr(torch.ops.fused_attn, name)
    return {backend: getattr(packet, backend) for backend in BACKENDS}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, descriptors and gates: float64 for float64 maps, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether (B, C, *spatial) lies as (B, *spatial, C) in memory, for any spatial rank."""
    return x.movedim(1, -1).is_contiguous()


def empty_map(x: Tensor) -> Tensor:
    """An output map: x's strides where x is NCHW or channels_last, else NCHW (the kernels copy such an x)."""
    if x.is_contiguous() or is_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def like_or_none(tensor: Tensor | None, x: Tensor) -> Tensor:
    """The fake gradient of an optional input: contiguous and of its shape and dtype, or of size (0,)."""
    if tensor is None:
        return x.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def differentiable_backward(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grads: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again: the reference recomputed from the saved inputs.

    Only taken with `create_graph=True`; it costs what eager costs.
    """
    with torch.enable_grad():
        # Each input under a name of its own: one that was computed from another (a gate from the map) would pass its
        # gradient on to that one here, and once more outside.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, needed in zip(inputs, needs_grad, strict=True) if needed and t is not None]
        outputs = function(*inputs)
        found = torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True)
    remaining = iter(found)
    return tuple(
        next(remaining) if needed and t is not None else None for t, needed in zip(inputs, needs_grad, strict=True)
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call of these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def wants_graph() -> bool:
    """Inside a backward: whether it was asked for with `create_graph=True`."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
