"""Blocks on the feature maps that real networks have."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, fuse, reference
from .. import nn as fused
from ..fusion.changing.plan import intact, plan_of
from ..reference.selection import Layers
from .measure import Figure, interleaved, peak_memory

#: (B, C, H, W) of the feature maps in timm's networks at 224 x 224, and the batch-of-one case of inference.
HEADLINE_SHAPES = ((32, 256, 56, 56), (32, 64, 112, 112), (32, 1024, 14, 14), (8, 512, 7, 7), (1, 256, 56, 56))
#: Where else those networks put their blocks: SE-ResNet-50, EfficientNet-B0, MobileNetV3, RegNetY-016.
MORE_SHAPES = (
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (32, 32, 112, 112),
    (32, 96, 56, 56),
    (32, 144, 28, 28),
    (32, 240, 14, 14),
    (32, 672, 14, 14),
    (32, 1152, 7, 7),
    (32, 48, 56, 56),
    (32, 336, 14, 14),
    (32, 888, 7, 7),
)
#: Where SE-ResNet-50's bottlenecks end, and where EfficientNet-B0's blocks have their gates.
BOTTLENECK_SHAPES = ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
MBCONV_SHAPES = ((32, 32, 112, 112), (32, 96, 56, 56), (32, 240, 28, 28), (32, 480, 14, 14), (32, 1152, 7, 7))
#: By the names that `--shapes` takes.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "headline": HEADLINE_SHAPES,
    "all": HEADLINE_SHAPES + MORE_SHAPES,
    "bottleneck": BOTTLENECK_SHAPES,
    "mbconv": MBCONV_SHAPES,
    # Where segmentation networks compare positions: an eighth of 512 x 512 and of 769 x 769.
    "positions": ((2, 512, 64, 64), (1, 256, 97, 97)),
    "criss-cross": ((2, 512, 97, 97),),
    # The second to fourth stage of a ResNet-50.
    "stages": ((8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14)),
    # Where SE-ResNet-50's bottlenecks end at 160 x 160, four images: maps that processors keep in cache.
    "cached": ((4, 256, 40, 40), (4, 512, 20, 20), (4, 1024, 10, 10), (4, 2048, 5, 5)),
    # I3D's third stage on clips of 32 frames, and the first one of MONAI's networks on volumes.
    "video": ((2, 512, 4, 14, 14),),
    "volume": ((2, 64, 32, 64, 64),),
}
TINY_SHAPE = (2, 16, 2, 2)


@dataclass(frozen=True)
class Block:
    """A block to measure: built from a module namespace (`fused_attn.nn` or `fused_attn.reference`), C, and the number
    of spatial axes.

    passes: over the map, forward and forward + backward, that a streaming kernel needs; None where products or
    convolutions take the time. residual: the block takes a second map. shapes: the name of those it is measured on.
    multiple: what divides its heights and widths.
    """

    build: Callable[[Any, int, int], nn.Module]
    passes: tuple[float, float] | None = None
    residual: bool = False
    shapes: str = "headline"
    multiple: int = 1


class Selection(nn.Module):
    """What follows the convolutions of two branches of C channels, which come as two maps, or as one of 2C channels.

    batch_norm: behind the branches, with a ReLU, and inside the excitation, as in networks.
    """

    def __init__(self, modules: Any, channels: int, *, stacked: bool = False, batch_norm: bool = True) -> None:
        super().__init__()
        hidden = max(channels // 16, 32)
        self.run = modules.SKConv._selection
        widths = ([2 * channels] if stacked else [channels] * 2) if batch_norm else []
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden) if batch_norm else None
        self.fc2 = nn.Conv2d(hidden, 2 * channels, 1, bias=False)

    def forward(self, *maps: Tensor) -> Tensor:
        excitation = Layers(self.fc1, self.norm, "relu", self.fc2, 2)
        stacked = len(maps) == 1
        activation = "identity" if self.norm is None else "relu"
        return self.run(maps[0] if stacked else maps, list(self.norms), activation, excitation, 2 if stacked else None)


class Folded(nn.Module):
    """What ends a bottleneck of an SE-ResNet in inference: a BatchNorm that is two numbers a channel, its gate, sum and
    ReLU."""

    def __init__(self, module: Any, channels: int) -> None:
        super().__init__()
        self.se = reference.SqueezeExcite(channels)
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.channel_gate = functional.channel_gate if module is fused else reference.channel_gate

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        layers = self.se.fc1.weight, self.se.fc1.bias, self.se.fc2.weight, self.se.fc2.bias
        affine = self.weight, self.bias
        return self.channel_gate(x, *layers, affine=affine, residual=residual, post_activation="relu")


class Tail(nn.Module):
    """What ends a block of a residual network in training, or stands in its middle: see `functional.norm_gate`."""

    def __init__(self, module: Any, channels: int, activation: str, post_activation: str, gated: bool = True) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.se = reference.SqueezeExcite(channels) if gated else None
        self.activation, self.post_activation = activation, post_activation
        self.norm_gate = functional.norm_gate if module is fused else reference.norm_gate

    def excite(self, s: Tensor) -> Tensor:
        assert self.se is not None
        return self.se.fc2(self.se.fc1(s).relu()).sigmoid()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm_gate(
            x,
            self.bn.weight,
            self.bn.bias,
            self.bn.running_mean,
            self.bn.running_var,
            training=True,
            activation=self.activation,
            excitation=None if self.se is None else self.excite,
            residual=residual,
            post_activation=self.post_activation,
        )


BLOCKS: dict[str, Block] = {
    "se": Block(lambda m, c, _: m.SqueezeExcite(c), (3, 7)),
    "eca": Block(lambda m, c, _: m.ECA(c), (3, 7)),
    "ese": Block(lambda m, c, _: m.EffectiveSE(c), (3, 7)),
    "se-max": Block(lambda m, c, _: m.SqueezeExcite(c, pool="avgmax"), (3, 7)),
    "se-residual-relu": Block(lambda m, c, _: m.SqueezeExcite(c, post_activation="relu"), (4, 10), residual=True),
    "se-folded": Block(lambda m, c, _: Folded(m, c), (4, 10), residual=True, shapes="cached"),
    "channel-attention": Block(lambda m, c, _: m.ChannelAttention(c), (3, 7)),
    "spatial-attention": Block(lambda m, c, rank: m.SpatialAttention(c, batch_norm=False, rank=rank), (3, 7)),
    "cbam": Block(lambda m, c, rank: m.CBAM(c, batch_norm=False, rank=rank), (4, 10)),
    # With the batch's statistics, as networks train.
    "cbam-batch-norm": Block(lambda m, c, rank: m.CBAM(c, rank=rank), (4, 10)),
    "triplet": Block(lambda m, c, _: m.TripletAttention(c), (3, 8)),
    "coordinate": Block(lambda m, c, _: m.CoordinateAttention(c), (3, 8)),
    # Beside its convolutions, which are most of its time.
    "bam": Block(lambda m, c, rank: m.BAM(c, rank=rank), (4, 11)),
    "scse": Block(lambda m, c, _: m.SCSE(c), (4, 11)),
    # Beside its convolutions; the second map gates.
    "attention-gate": Block(lambda m, c, rank: m.AttentionGate(c, rank=rank), residual=True),
    "norm-gate": Block(lambda m, c, _: Tail(m, c, "identity", "relu"), (4, 10), residual=True),  # of an SE-ResNet
    "norm-silu-gate": Block(lambda m, c, _: Tail(m, c, "silu", "identity"), (4, 9)),  # of an EfficientNet
    # What ends every block of a plain ResNet, and of one whose attention stands elsewhere.
    "norm-add-relu": Block(lambda m, c, _: Tail(m, c, "identity", "relu", gated=False), (4, 10), residual=True),
    "simam": Block(lambda m, c, _: m.SimAM(c), (3, 8)),
    "global-context": Block(lambda m, c, _: m.GlobalContext(c, fuse="scale", ratio=1 / 8), (3, 8)),
    "response-norm": Block(lambda m, c, _: m.GlobalResponseNorm(c), (3, 9)),
    "srm": Block(lambda m, c, _: m.SRM(c), (3, 10)),
    "channel-transformation": Block(lambda m, c, _: m.GatedChannelTransformation(c), (3, 8)),
    "select": Block(lambda m, c, _: Selection(m, c, batch_norm=False), (5, 11), residual=True),
    # In training, after their convolutions: the branches' BatchNorm is 6 passes forward and 10 backward of these.
    "sk": Block(lambda m, c, _: Selection(m, c), (11, 29), residual=True),
    "split-attention": Block(lambda m, c, _: Selection(m, c // 2, stacked=True), (5.5, 14.5)),
    # What compares positions or channels with each other.
    "position-attention": Block(lambda m, c, rank: m.PositionAttention(c, rank=rank), shapes="positions"),
    "self-attention": Block(lambda m, c, _: m.SelfAttention2d(c), shapes="positions"),
    "channel-self-attention": Block(lambda m, c, _: m.ChannelSelfAttention(c), shapes="positions"),
    "dual-attention": Block(lambda m, c, _: m.DualAttention(c, hidden=max(c // 4, 8)), shapes="positions"),
    "non-local": Block(lambda m, c, rank: m.NonLocal(c, rank=rank), shapes="positions"),
    "non-local-dot": Block(lambda m, c, rank: m.NonLocal(c, mode="dot", rank=rank), shapes="positions"),
    "non-local-concat": Block(lambda m, c, rank: m.NonLocal(c, mode="concatenation", rank=rank), shapes="positions"),
    "double-attention": Block(lambda m, c, rank: m.DoubleAttention(c, rank=rank), shapes="positions"),
    "external-attention": Block(lambda m, c, _: m.ExternalAttention(c), shapes="positions"),
    "criss-cross": Block(lambda m, c, _: m.CrissCrossAttention(c), shapes="criss-cross"),  # twice, as in CCNet
    "gsop": Block(lambda m, c, _: m.GSoP(c), shapes="stages"),
    "residual-attention": Block(lambda m, c, _: m.ResidualAttention(c, depth=1), shapes="stages"),
    "bilinear": Block(lambda m, c, _: m.BilinearAttention(c, drop_rate=0), shapes="stages", multiple=7),
}


def make_map(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def pair(
    name: str, channels: int, dtype: torch.dtype, device: torch.device, rank: int = 2
) -> tuple[nn.Module, nn.Module]:
    """The block in plain PyTorch and fused, with the same weights."""
    build = BLOCKS[name].build
    eager = build(reference, channels, rank).to(device, dtype)
    for parameter in eager.parameters():
        if not parameter.any():  # a block that starts as the identity would be measured on gradients of zero
            nn.init.constant_(parameter, 0.5)
    ours = build(fused, channels, rank).to(device, dtype)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def forward_call(block: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return block(*inputs)

    return call


def training_call(block: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    wanted = (*leaves, *block.parameters())

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(*leaves), wanted, grad)

    return call


def measure_block(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    *,
    with_compile: bool = True,
    budget: float = 2.0,
    copy_bytes_per_second: float | None = None,
) -> Iterator[Figure]:
    """Forward under no_grad, then forward + backward: eager, torch.compile and fused interleaved.

    In training mode, but for a batch of one, which is what inference has (and which some BatchNorms cannot train on).
    A clone of the map beside them: a read and a write, into memory as fresh and from caches as near as the blocks have.
    Of forward + backward also the bytes at the peak.
    """
    block = BLOCKS[name]
    eager, ours = (module.train(shape[0] > 1) for module in pair(name, shape[1], dtype, device, len(shape) - 2))
    candidates = {"eager": eager, "fused": ours}
    if with_compile:
        torch._dynamo.reset()
        candidates["compile"] = torch.compile(eager)
    x, residual = (make_map(shape, dtype, layout, device) for _ in range(2))
    inputs = (x, residual) if block.residual else (x,)
    grad = make_map(forward_call(eager, inputs)().shape, dtype, layout, device)
    calls = {
        "forward": {n: forward_call(m, inputs) for n, m in candidates.items()},
        "forward + backward": {n: training_call(m, inputs, grad) for n, m in candidates.items()},
    }
    for (what, functions), passes in zip(calls.items(), block.passes or (None, None), strict=True):
        timings = interleaved({**functions, "clone": x.clone}, device, budget=budget)
        facts: dict[str, object] = {}
        if passes is not None:
            moved = passes * x.numel() * x.element_size()
            facts |= {"passes": passes, "bytes a second": moved / timings["fused"].median}
            facts["of clone"] = passes / 2 * timings["clone"].median / timings["fused"].median
            if copy_bytes_per_second:
                facts["of copy"] = moved / timings["fused"].median / copy_bytes_per_second
        if what == "forward + backward":
            facts["peak bytes"] = {n: peak_memory(f, device) for n, f in functions.items()}
        case = {"block": name, "pass": what, "dtype": str(dtype)[6:], "layout": layout, "shape": list(shape)}
        yield Figure(case, timings, facts)


def measure_overhead(name: str, device: torch.device, budget: float = 0.5) -> Iterator[Figure]:
    """A map so small that only the call counts."""
    shape = *TINY_SHAPE[:2], *(BLOCKS[name].multiple * n for n in TINY_SHAPE[2:])
    for figure in measure_block(name, shape, torch.float32, "nchw", device, with_compile=False, budget=budget):
        figure.case["block"] = f"{name}, call overhead"
        figure.facts = look(name)
        yield figure


def look(name: str, runs: int = 2000) -> dict[str, object]:
    """What it costs to see that a fused block is unchanged: how many values are watched, and the seconds of one look at
    all of them; nothing of what `fuse` does not know."""
    block = fuse(BLOCKS[name].build(reference, TINY_SHAPE[1], 2))
    plan = plan_of(block)
    if plan is None:
        return {}
    seconds = min(timeit.repeat(lambda: intact(block, plan), number=runs, repeat=5)) / runs
    return {"watched": sum(map(len, plan.watched)), "look": seconds}
