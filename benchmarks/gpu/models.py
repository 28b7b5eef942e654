"""The attention tax: time(network with attention) / time(the same without) - 1, eager and compiled, AMP in bfloat16,
channels_last, in training and inference; with the bytes at the peak."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

import fused_attn
from fused_attn.bench.measure import peak_memory
from fused_attn.bench.models import in_place, inference_call, networks, training_call
from fused_attn.hosts import UnknownModel
from fused_attn.timing import digits, interleaved

from .networks import amp, chosen, images, pairs
from .rows import Row, Setting, first_line, state_of_card

SECONDS, STEP = 130, 100
#: Of the seconds, those in which all cores compile, and of how many pairs.
WARM, FIRST = 0.45, 2
MAKE = {"training": training_call, "inference": inference_call}

#: And the backend that it asks for, if any.
Model = tuple[nn.Module, str | None]


def rows(setting: Setting) -> list[Row]:
    return [
        Row(f"{attention} {how}", f"{attention} {how}", (attention, plain, how))
        for how in ("eager", "compiled")
        for attention, plain in pairs(setting)
    ]


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    """Of the backbone, and of the network with attention as it is and fused, as verdicts say; eager, also with the
    streaming kernels alone, and with its tails fused."""
    attention, plain, how = row.what
    try:
        made = networks(attention, plain, with_tails=how == "eager")
    except UnknownModel as error:
        return {"status": "absent", "why": first_line(error)}
    x = in_place(torch.randn(images(setting)), "channels_last", setting.device)
    served_by, backend = chosen(setting)
    models: dict[str, Model] = {}
    for name, model in made.items():
        by = {"fused": backend, "tails": setting.backends[0]}.get(name)
        models[name] = in_place(model, "channels_last", setting.device), by
    if how == "eager" and backend is None:
        models["fused, streaming"] = models["fused"][0], setting.backends[0]
    passes = {what: timed(setting, models, x, what, how) for what in MAKE}
    return {"status": "ok", "served by": served_by, "passes": passes, "state": state_of_card()}


def timed(setting: Setting, models: dict[str, Model], x: torch.Tensor, what: str, how: str) -> dict[str, Any]:
    torch._dynamo.reset()
    calls = {name: step(setting, model, x, what, how) for name, model in models.items()}
    timings = interleaved(calls, setting.device, budget=setting.budget(1.5), least=5)
    base, found = timings["backbone"].median, dict[str, Any]()
    for name, timing in timings.items():
        tax, peak = round(timing.median / base - 1, 4), peak_memory(calls[name], setting.device)
        found[name] = {"wall": digits(timing.median), "spread": round(timing.spread, 3), "tax": tax, "peak bytes": peak}
    return found


def step(setting: Setting, model: Model, x: torch.Tensor, what: str, how: str) -> Callable[[], object]:
    """A step of a network, under autocast, in its mode from now on."""
    network, backend = model
    run = MAKE[what](torch.compile(network) if how == "compiled" else network, x)

    def call() -> object:
        with amp(setting), nullcontext() if backend is None else fused_attn.backend(backend):
            return run()

    return call


def rows_to_warm(setting: Setting) -> list[Row]:
    """A network each, in one mode."""
    return [
        Row(f"{attention} {what} {name}", attention, (attention, plain, what, name))
        for attention, plain in pairs(setting)[:FIRST]
        for what in MAKE
        for name in ("eager", "fused", "backbone")
    ]


def warm(setting: Setting, row: Row) -> None:
    """Have the disk hold what torch.compile and Triton make for it."""
    attention, plain, what, name = row.what
    x = in_place(torch.randn(images(setting)), "channels_last", setting.device)
    model = in_place(networks(attention, plain, with_tails=False)[name], "channels_last", setting.device)
    step(setting, (model, chosen(setting)[1] if name == "fused" else None), x, what, "compiled")()
