"""The passes of the ops, as they are launched on the maps that networks have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.codes import ACTIVATIONS, LAYERS, POOLS, SELECTIONS, TIES
from fused_attn.kernels import cbam, channel_gate, maps, norm_gate, select

from ..gpu.rows import sized

#: Where SE-ResNet-50's bottlenecks end, with what a GPU trains of each in a benchmark.
SHAPES = ((32, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (256, 2048, 7, 7))
LAYOUTS = ("nchw", "channels_last")
#: SE-ResNet-50 in training: how many of its blocks end on (C, H, W), in batches of STEP.
BLOCKS = {(256, 56, 56): 3, (512, 28, 28): 4, (1024, 14, 14): 6, (2048, 7, 7): 3}
STEP = 64
#: Passes over the map that eager reads and writes in SE's forward and backward.
EAGER_PASSES = 13
DTYPE = torch.bfloat16
IDENTITY, RELU, SIGMOID = (ACTIVATIONS[name] for name in ("identity", "relu", "sigmoid"))


class Case(NamedTuple):
    op: str
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{self.op} {sized(self.shape)} {self.layout}"


class Launch(NamedTuple):
    """kernel: Triton's, or the name of an operator of torch's; given: its arguments, of torch's the tensors."""

    kernel: Any
    programs: int
    given: dict[str, Any]


def cases() -> list[Case]:
    return [Case(op, shape, layout) for op in (*OPS, *RESIDENT) for shape in SHAPES for layout in LAYOUTS]


def launches(case: Case) -> list[Launch]:
    """What the op's functions launch, forward and backward, on maps that hold nothing."""
    with recorded() as found:
        OPS[case.op](case)
    return found


class Library(TorchDispatchMode):
    """Notes torch's own operators that read or write numbers."""

    QUIET = (
        "empty",
        "view",
        "as_strided",
        "slice",
        "select",
        "expand",
        "transpose",
        "permute",
        "detach",
        "unbind",
        "t.",
    )

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if func.namespace == "aten" and not any(quiet in name for quiet in self.QUIET):
            tensors = {f"{n}": a for n, a in enumerate(args) if isinstance(a, Tensor)}
            made = {"out": out} if isinstance(out, Tensor) else {}
            self.found.append(Launch(name, 0, tensors | made))
        return out


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made within, instead of them."""
    found: list[Launch] = []

    def launch(kernel: Any, on: Tensor, programs: int, /, **given: Any) -> None:
        found.append(Launch(kernel, programs, given))

    def launch_where(there: bool, kernel: Any, on: Tensor, programs: int, /, **given: Any) -> None:
        if there:
            launch(kernel, on, programs, **given)

    with mock.patch.multiple(maps, launch=launch, launch_where=launch_where), Library(found):
        yield found


def made(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device="meta")


def map_of(case: Case) -> Tensor:
    order = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    return torch.empty(case.shape, dtype=DTYPE, device="meta", memory_format=order)


def excitation(channels: int) -> tuple[Tensor, ...]:
    hidden = channels // 16
    return made(hidden, channels), made(hidden), made(channels, hidden), made(channels)


def gate(case: Case, layer: str, weights: tuple[Any, ...]) -> None:
    x, grad = map_of(case), map_of(case)
    codes = (LAYERS[layer], POOLS["avg"], TIES["first"], RELU, SIGMOID, IDENTITY, IDENTITY)
    _, state, index = channel_gate.channel_gate(x, *weights, None, None, None, *codes)
    channel_gate.channel_gate_backward(grad, x, None, state, index, *weights, None, None, None, *codes)


def se(case: Case) -> None:
    gate(case, "dense", excitation(case.shape[1]))


def eca(case: Case) -> None:
    gate(case, "conv", (made(1, 1, 5), None, None, None))


def cbam_of(case: Case) -> None:
    x, grad, weights = map_of(case), map_of(case), excitation(case.shape[1])
    weights = (weights[0], None, weights[2], None)
    space = (made(1, 2, 7, 7), None, None, None)
    codes = (
        LAYERS["dense"],
        POOLS["both"],
        TIES["first"],
        RELU,
        SIGMOID,
        0,
        TIES["first"],
        SIGMOID,
        IDENTITY,
        IDENTITY,
    )
    nothing = (None, None)
    _, *states = cbam.cbam(x, *weights, *space, *nothing, None, 1e-5, *codes)
    cbam.cbam_backward(grad, x, None, *states, *weights, *space, *nothing, None, 1e-5, *codes)


def select_of(case: Case) -> None:
    channels = case.shape[1]
    hidden = max(channels // 16, 32)
    branches = [map_of(case), map_of(case)]
    weights = made(hidden, channels), made(hidden), made(2 * channels, hidden), made(2 * channels)
    codes = 2, 1, RELU, SELECTIONS["softmax"], IDENTITY
    _, state = select.select(branches, *weights, None, None, *codes)
    select.select_backward(map_of(case), branches, state, *weights, None, None, *codes)


def norm_gate_of(case: Case) -> None:
    """A bottleneck's end in training: BatchNorm, SE, residual, ReLU; the excitation is torch's, and not here."""
    x, grad, residual = map_of(case), map_of(case), map_of(case)
    batch, channels = case.shape[:2]
    scale, shift = made(channels), made(channels)
    moments = norm_gate.moments(x)
    norm, _, descriptor = norm_gate.norm_coefficients(x, moments, scale, shift, 1e-5, True)
    gates = torch.empty(batch, channels, dtype=maps.accumulator(DTYPE), device="meta")
    _, bits = norm_gate.norm_scale(x, gates, norm, residual, IDENTITY, RELU, True)
    sums, _ = norm_gate.norm_dots(grad, x, bits, None, norm, gates, IDENTITY, RELU)
    *_, factors, constants = norm_gate.norm_factors(x, sums, descriptor, norm, True)
    norm_gate.norm_gradients(grad, x, norm, factors, constants, IDENTITY)


OPS: dict[str, Callable[[Case], None]] = {
    "se": se,
    "eca": eca,
    "cbam": cbam_of,
    "select": select_of,
    "norm_gate": norm_gate_of,
}
#: By the native library's resident kernels.
RESIDENT = ("se-resident",)
