"""Whole networks, and the attention tax: time(network with attention) / time(the same without) - 1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import fuse
from ..hosts import build_model
from .measure import Figure, interleaved, peak_memory

#: (with attention, without).
TAX_PAIRS = (
    ("timm:seresnet50", "timm:resnet50"),
    ("timm:ecaresnet50d", "timm:resnet50d"),
    ("timm:regnety_016", "timm:regnetx_016"),
    ("timm:resnet50+cbam", "timm:resnet50"),
    ("timm:skresnet18", "timm:resnet18"),
    ("timm:skresnet50", "timm:resnet50"),
    ("timm:resnest50d", "timm:resnet50d"),
)


def inference_call(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.eval()

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return call


def training_call(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    model.train()

    def call() -> None:
        model(x).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


def measure_pair(
    attention: str,
    plain: str,
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    *,
    with_compile: bool = True,
    budget: float = 10.0,
) -> Iterator[Figure]:
    """Inference and training step of a network with attention, eager, compiled and fused, beside its backbone."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, device=device).to(memory_format=memory_format)
    original = build_model(attention).to(device, memory_format=memory_format)
    models = {
        "backbone": build_model(plain).to(device, memory_format=memory_format),
        "eager": original,
        "fused": fuse(copy.deepcopy(original)),
    }
    if with_compile:
        torch._dynamo.reset()
        models["backbone, compile"] = torch.compile(copy.deepcopy(models["backbone"]))
        models["compile"] = torch.compile(copy.deepcopy(original))
        models["fused, compile"] = torch.compile(copy.deepcopy(models["fused"]))
    for what, make in (("inference", inference_call), ("training", training_call)):
        calls = {name: make(model, x) for name, model in models.items()}
        timings = interleaved(calls, device, budget=budget, least=3)
        case = {"model": attention, "backbone": plain, "pass": what, "layout": layout, "shape": list(shape)}
        facts: dict[str, object] = {
            name: timings[name].median / timings[base].median - 1
            for name, base in (
                ("eager", "backbone"),
                ("fused", "backbone"),
                ("compile", "backbone, compile"),
                ("fused, compile", "backbone, compile"),
            )
            if name in timings
        }
        facts = {"attention tax": facts}
        if device.type == "cuda":
            facts["peak bytes"] = {name: peak_memory(call, device) for name, call in calls.items()}
        yield Figure(case, timings, facts)
