"""What a call costs where the map costs nothing: every block of `fused_attn.nn`, and those of libraries as `fuse`
leaves them, on one small map."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import fuse, reference
from .. import nn as fused
from ..hosts import UnknownModel, import_host
from ..timing import digits
from .blocks import Selection, Tail, forward_call, make_map, training_call
from .measure import Figure, interleaved

SHAPE = (1, 16, 7, 7)
#: Calls in one repetition: the clock is too coarse for one.
CALLS = 10

#: Of 16 channels, from `fused_attn.nn` or `fused_attn.reference`.
OWN: dict[str, Callable[[Any], nn.Module]] = {
    "SqueezeExcite": lambda m: m.SqueezeExcite(16, reduction=4),
    "SqueezeExcite max": lambda m: m.SqueezeExcite(16, reduction=4, pool="avgmax"),
    "EffectiveSE": lambda m: m.EffectiveSE(16),
    "ECA": lambda m: m.ECA(16),
    "GatherExcite": lambda m: m.GatherExcite(16),
    "ChannelAttention": lambda m: m.ChannelAttention(16, reduction=4),
    "SpatialAttention": lambda m: m.SpatialAttention(16),
    "CBAM": lambda m: m.CBAM(16, reduction=4),
    "CBAM without BatchNorm": lambda m: m.CBAM(16, reduction=4, batch_norm=False),
    "BAM": lambda m: m.BAM(16, reduction=4),
    "SCSE": lambda m: m.SCSE(16, reduction=4),
    "SimAM": lambda m: m.SimAM(16),
    "TripletAttention": lambda m: m.TripletAttention(16),
    "CoordinateAttention": lambda m: m.CoordinateAttention(16),
    "EMA": lambda m: m.EMA(16, factor=4),
    "GlobalContext": lambda m: m.GlobalContext(16, ratio=1 / 4),
    "GlobalContext scale": lambda m: m.GlobalContext(16, ratio=1 / 4, fuse="scale"),
    "SRM": lambda m: m.SRM(16),
    "SelectiveKernel": lambda m: m.SelectiveKernel(16, 16),
    "SKConv": lambda m: m.SKConv(16, groups=4),
    "SplitAttention": lambda m: m.SplitAttention(16),
    "PositionAttention": lambda m: m.PositionAttention(16),
    "ChannelSelfAttention": lambda m: m.ChannelSelfAttention(16),
    "DualAttention": lambda m: m.DualAttention(16, hidden=8),
    "SelfAttention2d": lambda m: m.SelfAttention2d(16),
    "NonLocal": lambda m: m.NonLocal(16),
    "NonLocal dot": lambda m: m.NonLocal(16, mode="dot"),
    "NonLocal gaussian": lambda m: m.NonLocal(16, mode="gaussian"),
    "NonLocal concatenation": lambda m: m.NonLocal(16, mode="concatenation"),
    "DoubleAttention": lambda m: m.DoubleAttention(16),
    "CrissCrossAttention": lambda m: m.CrissCrossAttention(16),
    "ExternalAttention": lambda m: m.ExternalAttention(16),
    "GSoP": lambda m: m.GSoP(16),
    "ResidualAttention": lambda m: m.ResidualAttention(16, depth=1),
    "BilinearAttention": lambda m: m.BilinearAttention(16, drop_rate=0),
    "BilinearTransform": lambda m: m.BilinearTransform(16),
    "SpatialTransformer": lambda m: m.SpatialTransformer(
        16, localization=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), features=16
    ),
    "AttentionGate": lambda m: m.AttentionGate(16),
    "GlobalResponseNorm": lambda m: m.GlobalResponseNorm(16),
    "GatedChannelTransformation": lambda m: m.GatedChannelTransformation(16),
    "norm_gate": lambda m: Tail(m, 16, "silu", "identity"),
    "norm_gate residual": lambda m: Tail(m, 16, "identity", "relu"),
    "norm_gate without a gate": lambda m: Tail(m, 16, "identity", "relu", gated=False),
    "select": lambda m: Selection(m, 16, batch_norm=False),
}
#: Those that take a second map.
TWO_MAPS = frozenset({"norm_gate residual", "norm_gate without a gate", "select", "AttentionGate"})

#: By path of a block's class: what makes it.
HOSTED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "timm.layers.SEModule": ((16,), {"rd_channels": 4}),
    "timm.layers.EffectiveSEModule": ((16,), {}),
    "timm.layers.EcaModule": ((16,), {}),
    "timm.layers.CecaModule": ((16,), {}),
    "timm.layers.GatherExcite": ((16,), {"add_maxpool": True, "use_mlp": False}),
    "timm.layers.cbam.CbamModule": ((16,), {"rd_channels": 4}),
    "timm.layers.cbam.LightCbamModule": ((16,), {"rd_channels": 4}),
    "timm.layers.cbam.SpatialAttn": ((), {}),
    "timm.layers.coord_attn.CoordAttn": ((16,), {}),
    "timm.layers.GlobalContext": ((16,), {}),
    "timm.layers.NonLocalAttn": ((16,), {}),
    "timm.layers.BatNonLocalAttn": ((16,), {}),
    "timm.layers.SelectiveKernel": ((16, 16), {}),
    "timm.layers.SplitAttn": ((16,), {}),
    "timm.models._efficientnet_blocks.SqueezeExcite": ((16,), {"rd_ratio": 0.25}),
    "torchvision.ops.misc.SqueezeExcitation": ((16, 4), {}),
}


NAMES = (*OWN, *HOSTED)


def pair(name: str) -> tuple[nn.Module, nn.Module] | None:
    """The block in plain PyTorch and fused, with the same weights; None where its library is not installed."""
    torch.manual_seed(0)
    if name in OWN:
        eager, ours = OWN[name](reference), OWN[name](fused)
        for parameter in eager.parameters():
            if not parameter.any():
                nn.init.constant_(parameter, 0.5)
        ours.load_state_dict(eager.state_dict())
        return eager, ours
    library, *path = name.split(".")
    try:
        found = import_host(library)
    except UnknownModel:
        return None
    args, options = HOSTED[name]
    eager = functools.reduce(getattr, path, found)(*args, **options)
    return eager, fuse(copy.deepcopy(eager))


def trains_on_one(block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    """A BatchNorm behind a global pool does not train on one sample."""
    try:
        copy.deepcopy(block).train()(*inputs)
    except ValueError:
        return False
    return True


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def measure_calls(name: str, budget: float = 1.0) -> Iterator[Figure]:
    """Forward in evaluation under no_grad, then forward + backward in training (in evaluation where the block does not
    train on one sample), of float32 maps on the CPU: seconds of this process a call, by one thread."""
    found, device = pair(name), torch.device("cpu")
    if found is None:
        return
    candidates = dict(zip(("eager", "fused"), found, strict=True))
    maps = tuple(make_map(SHAPE, torch.float32, "nchw", device) for _ in range(1 + (name in TWO_MAPS)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for what in ("forward", "forward + backward"):
            training = what != "forward" and trains_on_one(found[0], maps)
            grad = torch.randn_like(found[0].train(training)(*maps))
            calls = {}
            for who, block in candidates.items():
                block.train(training)
                one = forward_call(block, maps) if what == "forward" else training_call(block, maps, grad)
                calls[who] = repeated(one)
            timings = interleaved(calls, device, budget=budget, most=400, clock=time.process_time)
            for timing in timings.values():
                timing.seconds = [digits(seconds / CALLS) for seconds in timing.seconds]
            case = {"call": name, "pass": what, "training": training, "shape": list(SHAPE)}
            yield Figure(case, timings)
    finally:
        torch.set_num_threads(threads)
