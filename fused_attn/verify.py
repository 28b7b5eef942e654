"""verify: fused against original on the user's own device and dtypes, beside the error of eager itself.

The original in float64 is the truth. In every dtype the fused error may be twice the eager error plus a few
roundings of the largest value, for outputs, the gradient of the input and the gradients of all parameters.

Half precision rounds different elements to the same maximum: where the gradient of a maximum then goes is chance, for
eager as for fused. There too large an error is a miss only in more than one element of a hundred, and where the
root-mean-square error is more than twice eager's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import nn as fused_nn
from . import reference
from .backends import small_as_large
from .equivalence import is_chance
from .fusion import explain, fuse

#: Roundings allowed beside twice the eager error; float64 has no exacter truth than eager, so its share is larger.
FLOOR = {torch.float64: 256.0, torch.float32: 16.0, torch.float16: 4.0, torch.bfloat16: 4.0}

BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "SqueezeExcite": lambda m: m.SqueezeExcite(64),
    "SqueezeExcite, as in MobileNetV3": lambda m: m.SqueezeExcite(72, hidden=24, gate="hard_sigmoid"),
    "SqueezeExcite, as in EfficientNet": lambda m: m.SqueezeExcite(96, hidden=4, activation="silu"),
    "SqueezeExcite, max": lambda m: m.SqueezeExcite(64, pool="max", bias=False),
    "SqueezeExcite, avg and max": lambda m: m.SqueezeExcite(64, pool="avgmax", ties="even"),
    "SqueezeExcite, gelu": lambda m: m.SqueezeExcite(64, activation="gelu"),
    "SqueezeExcite, relu after": lambda m: m.SqueezeExcite(64, post_activation="relu"),
    "EffectiveSE": lambda m: m.EffectiveSE(64),
    "ECA": lambda m: m.ECA(64),
    "ECA, circular": lambda m: m.ECA(64, padding="circular"),
    "ChannelAttention": lambda m: m.ChannelAttention(64),
    "SpatialAttention": lambda m: m.SpatialAttention(64),
    "CBAM": lambda m: m.CBAM(64),
    "CBAM, as in timm": lambda m: m.CBAM(
        64, divisor=1, bias=False, layer="conv1x1", order=("mean", "max"), ties="even", momentum=0.1
    ),
    "CBAM, without BatchNorm": lambda m: m.CBAM(64, batch_norm=False),
    "BAM": lambda m: m.BAM(64),
    "TripletAttention": lambda m: m.TripletAttention(64),
    "SCSE": lambda m: m.SCSE(64),
    "CoordinateAttention": lambda m: m.CoordinateAttention(64),
    "SimAM": lambda m: m.SimAM(64),
    "CrissCrossAttention": lambda m: m.CrissCrossAttention(64),
    "EMA": lambda m: m.EMA(64, factor=8),
    "SKConv": lambda m: m.SKConv(64),
    "SelectiveKernel": lambda m: m.SelectiveKernel(64),
    "SplitAttention": lambda m: m.SplitAttention(64, groups=2),
    "SplitAttention, radix 1": lambda m: m.SplitAttention(64, radix=1),
}


@dataclass
class Result:
    """Worst errors of one subject in one dtype and layout, as shares of the largest value of each tensor."""

    subject: str
    dtype: torch.dtype
    layout: str
    fused: float
    eager: float
    worst: str
    passed: bool


def _values(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter."""
    torch.manual_seed(0)  # dropout, drop-path: the same in every run
    x = x.detach().requires_grad_()
    y = model(x)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(y, [x, *named.values()], grad.to(y), allow_unused=True)
    values = {"output": y, "input gradient": found[0]}
    values |= {f"gradient of {name}": g for name, g in zip(named, found[1:], strict=True)}
    return {name: v.detach().double() for name, v in values.items() if v is not None}


def compare(
    subject: str, original: nn.Module, fused: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> Result:
    """Both models in one dtype and layout against the original in float64."""
    device = next((p.device for p in original.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    # Samples and channels that differ: a BatchNorm over the means of plain noise would amplify rounding alone.
    offsets = torch.randn((*shape[:2], *(1,) * (len(shape) - 2)), generator=generator)
    x = (torch.randn(shape, generator=generator) + offsets).to(device, dtype)
    if layout == "channels_last" and x.dim() in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    with torch.no_grad():
        output = copy.deepcopy(original).to(dtype)(x)
    grad = torch.randn(output.shape, generator=generator).to(device, dtype)
    with small_as_large():
        eager, ours = (_values(copy.deepcopy(m).to(dtype), x, grad) for m in (original, fused))
    exact = _values(copy.deepcopy(original).double(), x.double(), grad.double())
    # A parameter's gradient may cancel to nothing (a bias before a BatchNorm): its error is measured on the scale
    # of all parameters' gradients.
    scales = {name: v.abs().max().item() if v.numel() else 0.0 for name, v in exact.items()}
    parameters = max((s for name, s in scales.items() if name.startswith("gradient of")), default=0.0)
    result = Result(subject, dtype, layout, 0.0, 0.0, "", True)
    margin = -1.0
    for name, truth in exact.items():
        scale = max(scales[name], parameters if name.startswith("gradient of") else 0.0) or 1.0
        if truth.numel() == 0:
            continue
        errors = [found[name] - truth for found in (ours, eager)]
        error_fused, error_eager = (error.abs().max().item() / scale for error in errors)
        allowed = 2 * error_eager + FLOOR[dtype] * torch.finfo(dtype).eps
        if not error_fused <= allowed:  # NaN does not pass
            fused_error, eager_error = errors
            result.passed &= is_chance(fused_error, eager_error, dtype, allowed * scale)
        share = error_fused / allowed
        share = math.inf if math.isnan(share) else share  # nothing is worse
        if share > margin:
            margin = share
            result.fused, result.eager, result.worst = error_fused, error_eager, name
    return result


def verify_blocks(device: torch.device, dtypes: list[torch.dtype], layouts: list[str]) -> Iterator[Result]:
    """Every block of the library against its reference, on a map of 13 x 17."""
    for name, build in BLOCKS.items():
        torch.manual_seed(0)
        original = build(reference).to(device)
        fused = build(fused_nn).to(device)
        fused.load_state_dict(original.state_dict())
        channels = getattr(original, "channels", None) or 64
        for dtype in dtypes:
            for layout in layouts:
                yield compare(name, original, fused, (3, channels, 13, 17), dtype, layout)


def verify_model(
    name: str,
    model: nn.Module,
    shape: tuple[int, ...],
    dtypes: list[torch.dtype],
    layouts: list[str],
    *,
    tails: bool = False,
) -> Iterator[Result]:
    """A model in training mode against its copy after `fuse(copy, tails=tails)`.

    Raises:
        ValueError: nothing in the model would be fused.
    """
    fused = fuse(copy.deepcopy(model), tails=tails)
    if not any(row.fused for row in explain(fused, tails=tails)):
        raise ValueError(f"{name}: no block was fused; fused_attn.explain(model) says why")
    for dtype in dtypes:
        for layout in layouts:
            yield compare(name, model, fused, shape, dtype, layout)
