"""Whether the resident CUDA kernels hold a call's samples, asked before anything is launched.

A sample lies in the shared memory of a cluster of blocks; in the backward its gradient lies beside it, so that one that
fits forward need not fit there. `clusters` answers from shapes, layout and options alone, for any device's limits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Limits(NamedTuple):
    """What a device gives a kernel: bytes of shared memory a block may have, blocks a cluster may have."""

    shared: int
    cluster: int

    def __str__(self) -> str:
        return f"{self.cluster} block{'s' * (self.cluster > 1)} of {self.shared // 1024} KiB"


class Clusters(NamedTuple):
    """The fewest blocks that hold a sample, forward and backward; 0: no cluster of the device does."""

    forward: int
    backward: int

    def fit(self, needs_grad: bool) -> bool:
        """Whether the resident kernels serve a call whose output needs a gradient, or one whose does not."""
        return self.forward > 0 and (self.backward > 0 or not needs_grad)


#: Ops that have resident kernels -> what `clusters` asks of them; `common.differentiable` fills it.
QUESTIONS: dict[str, Callable[..., Clusters]] = {}


def clusters(op: str, limits: Limits, *arguments: Any) -> Clusters:
    """Over how many blocks an op's resident kernels spread a sample; `arguments` as in the operator's schema."""
    return QUESTIONS[op](limits, *arguments)


@functools.cache
def limits_of(device: int) -> Limits:
    """Those of a CUDA device.

    Raises:
        RuntimeError: the resident kernels do not run there; the message says why.
    """
    question = getattr(torch.ops.fused_attn, "resident_limits", None)
    if question is None:
        raise RuntimeError("the native library was built without CUDA")
    with _disable_current_modes():
        return Limits(*question(device))


def held_on(device: int) -> str:
    """In words, which samples the resident kernels hold on a CUDA device, or why none."""
    try:
        return f"resident in shared memory are samples that fit {limits_of(device)}"
    except RuntimeError as error:
        return f"no resident kernels: {error}".splitlines()[0]


def limits_at(x: Tensor) -> Limits | None:
    """Those of x's device; None where it is not a CUDA device that this process has."""
    return limits_of(x.get_device()) if x.device.type == "cuda" and torch.cuda.is_initialized() else None


@functools.lru_cache(4096)
def ask(op: str, *numbers: int) -> Clusters:
    """What the native library says of an op's samples (csrc/fit.cpp), whatever mode is being traced in."""
    with _disable_current_modes():
        return Clusters(*getattr(torch.ops.fused_attn, f"resident_{op}")(*numbers))


def require(op: str, arguments: tuple[Any, ...]) -> None:
    """Raise where a call whose output needs a gradient has one that the device does not hold.

    Not asked of sizes that a trace leaves open, which an answer would fix, and of devices that are not here: the
    operators themselves raise when it comes to a launch.
    """
    x: Tensor = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
    if not all(type(size) is int for size in x.shape[1:]):
        return
    limits = limits_at(x)
    if limits is None:
        return
    found = clusters(op, limits, *arguments)
    if found.fit(True):
        return
    where = " in the backward, where its gradient lies beside it" if found.forward else ""
    narrower = " or float16 or bfloat16 maps" if x.itemsize > 2 else ""
    raise RuntimeError(
        f"{op}: expected a sample that fits the shared memory of a cluster of at most {limits}; got one of"
        f" {tuple(x.shape[1:])} elements in {x.dtype}: it does not fit{where}; use the triton backend{narrower}"
    )
