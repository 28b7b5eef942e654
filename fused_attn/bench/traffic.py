"""What the compiled code of networks reads and writes, in bytes, as Inductor counts it: the same at every run, so that
it shows what attention costs where times do not."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..fusion.changing.graphs import backend
from .measure import Figure
from .models import PASSES, in_place, name_compiled, networks


def compiled_bytes(model: nn.Module, x: torch.Tensor, what: str, dtype: torch.dtype, **options: Any) -> int:
    """Bytes that a step reads and writes once `torch.compile(model, **options)` has compiled it anew: of every kernel,
    convolution and product, the tensors that it takes and gives, each once. An operator that reads a map more than once
    counts it once.

    Args:
        what: "inference" or "training".
        dtype: of autocast, where it is not float32.
    """
    from torch._inductor import config, metrics

    torch._dynamo.reset()
    with _counting(), config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # as it is to be
        before = metrics.num_bytes_accessed
        PASSES[what](torch.compile(model, **options), x, dtype)()
        return metrics.num_bytes_accessed - before


def over_the_backbone(of: dict[str, int]) -> list[float]:
    """How much more of a figure's "compiled bytes" there are with attention: compiled, fused and compiled, by the
    backend."""
    return [of[name] / of["backbone, compile"] - 1 for name in ("compile", "fused, compile", "backend, compile")]


@contextlib.contextmanager
def _counting() -> Iterator[None]:
    """Inductor counts only where it would log what it counts."""
    from torch._inductor import compile_fx

    log = compile_fx.inductor_metrics_log
    was = log.level, log.propagate, log.disabled
    silent = logging.NullHandler()
    log.addHandler(silent)
    log.setLevel(logging.INFO)
    log.propagate = log.disabled = False
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.setLevel(was[0])
        log.propagate, log.disabled = was[1:]


def measure_traffic(
    attention: str,
    plain: str,
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    passes: tuple[str, ...] = tuple(PASSES),
) -> Iterator[Figure]:
    """`compiled_bytes` of a network with attention, beside its backbone: compiled as it is, fused, and by
    `backend="fused_attn"`."""
    models = {name: in_place(model, layout, device) for name, model in networks(attention, plain, False).items()}
    x = in_place(torch.randn(shape), layout, device)
    for what in passes:
        found = {name_compiled(name): compiled_bytes(model, x, what, dtype) for name, model in models.items()}
        found["backend, compile"] = compiled_bytes(models["eager"], x, what, dtype, backend=backend)
        case = {"model": attention, "backbone": plain, "pass": what, "layout": layout, "shape": list(shape)}
        case["dtype"] = str(dtype).removeprefix("torch.")
        yield Figure(case, {}, {"compiled bytes": found})
