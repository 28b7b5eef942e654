"""Whole networks, and the attention tax: time(network with attention) / time(the same without) - 1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from operator import truediv
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from .. import fuse
from ..fusion.changing.graphs import backend
from ..fusion.hosts.registry import TAILS, known_class
from ..fusion.recipes.names import host_class
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

#: What has a tax: each against the backbone run the same way.
TAXES = ("eager", "fused", "tails", "least", "compile", "fused, compile", "tails, compile", "backend, compile")

#: How often one function may be compiled: torch counts over all networks of a class, in both modes.
_COMPILATIONS = 64


def inference_call(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """dtype: of autocast, where it is not float32."""
    model.eval()

    def call() -> torch.Tensor:
        with torch.no_grad(), _autocast(x, dtype):
            return model(x)

    return call


def training_call(model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    model.train()

    def call() -> None:
        with _autocast(x, dtype):
            y = model(x)
        y.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


def _autocast(x: torch.Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)


#: What a figure of networks is asked for: a step of which kind.
PASSES: dict[str, Callable[[nn.Module, torch.Tensor, torch.dtype], Callable[[], object]]] = {
    "inference": inference_call,
    "training": training_call,
}


def over_the_original(figure: Figure) -> dict[str, tuple[float, float, float]]:
    """How long each way with us takes over the original: over its eager runs where nothing is compiled, else over the
    better of its eager and its compiled. Quartiles of the ratios of neighbouring runs, which what else the machine does
    changes less than medians."""
    timings = figure.timings
    better = min((n for n in ("eager", "compile") if n in timings), key=lambda name: timings[name].median)
    return {
        name: tuple(quantiles(map(truediv, timing.seconds, timings[base].seconds), n=4))  # type: ignore[misc]
        for name, timing in timings.items()
        if name not in ("backbone", "backbone, compile", "eager", "compile") and len(timing.seconds) > 1
        for base in (better if name.endswith("compile") else "eager",)
    }


def in_place(thing: Any, layout: str, device: torch.device) -> Any:
    """A network or images on this device, in this layout."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return thing.to(device, memory_format=memory_format)


def name_compiled(name: str) -> str:
    """Of one of `networks` once it is compiled."""
    return "compile" if name == "eager" else f"{name}, compile"


def networks(attention: str, plain: str, with_tails: bool) -> dict[str, nn.Module]:
    """The backbone, and the network with attention as it is, fused, and (where it has any) fused with its tails."""
    torch.manual_seed(0)
    original = build_model(attention)
    found = {"backbone": build_model(plain), "eager": original, "fused": fuse(copy.deepcopy(original))}
    if with_tails:
        tails = fuse(copy.deepcopy(original), tails=True)
        if any(known_class(host, TAILS) for module in tails.modules() if (host := host_class(module))):
            found["tails"] = tails
    return found


def with_least(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """And where there is one with tails, one whose layers save the least."""
    if "tails" not in models:
        return models
    return models | {"least": fuse(copy.deepcopy(models["tails"]), tails=True, save="least")}


def measure_pair(
    attention: str,
    plain: str,
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    *,
    with_compile: bool = True,
    with_tails: bool = True,
    budget: float = 10.0,
    dtype: torch.dtype = torch.float32,
    passes: tuple[str, ...] = tuple(PASSES),
) -> Iterator[Figure]:
    """Inference and training step of a network with attention, beside its backbone: eager, compiled, fused, both, and
    compiled by `backend="fused_attn"`. dtype: of autocast, where it is not float32."""
    models = {name: in_place(model, layout, device) for name, model in networks(attention, plain, with_tails).items()}
    x = in_place(torch.randn(shape), layout, device)
    if with_compile:
        torch._dynamo.reset()
        for name, model in tuple(models.items()):
            models[name_compiled(name)] = torch.compile(copy.deepcopy(model))
        models["backend, compile"] = torch.compile(copy.deepcopy(models["eager"]), backend=backend)
    for what in passes:
        if what == "training":
            models = with_least(models)
        calls = {name: PASSES[what](model, x, dtype) for name, model in models.items()}
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS):  # else the last of them would run as they are
            timings = interleaved(calls, device, budget=budget, least=3)
        case = {"model": attention, "backbone": plain, "pass": what, "layout": layout, "shape": list(shape)}
        case["dtype"] = str(dtype).removeprefix("torch.")
        taxes: dict[str, float] = {}
        for name in TAXES:
            base = "backbone, compile" if name.endswith("compile") else "backbone"
            if name in timings:
                taxes[name] = timings[name].median / timings[base].median - 1
        facts: dict[str, object] = {"attention tax": taxes}
        if device.type == "cuda":
            facts["peak bytes"] = {name: peak_memory(call, device) for name, call in calls.items()}
        yield Figure(case, timings, facts)
