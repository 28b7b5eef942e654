"""What there is: the card, the driver, Triton, and whether the native library's CUDA operators find what they need."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
from typing import Any

import torch

from fused_attn import backends, functional, info
from fused_attn.ops import resident

from .rows import Row, Setting, state_of_card

SECONDS, STEP = 20, 20
STREAM = "aoti_torch_get_current_cuda_stream"


def rows(setting: Setting) -> list[Row]:
    launches = [Row(f"launch {backend}", "launch", (backend,)) for backend in setting.backends]
    return [Row(name, name) for name in PROBES] + launches


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    return launch(setting, *row.what) if row.what else PROBES[row.key](setting)


def launch(setting: Setting, backend: str) -> dict[str, Any]:
    """A first kernel, on the current stream and on another one."""
    why = backends.unavailable(backend, "channel_gate", setting.device.type)
    if why is not None:
        return {"status": "absent", "why": why}
    other = torch.cuda.stream(torch.cuda.Stream()) if setting.device.type == "cuda" else contextlib.nullcontext()
    for stream_ in (contextlib.nullcontext(), other):
        with stream_, backends.backend(backend):
            x = torch.ones(2, 16, 8, 8, device=setting.device)
            error = (functional.channel_gate(x) - x.sigmoid()).abs().max().item()
        if not error < 1e-6:
            return {"status": "wrong", "why": f"error {error:.3g}"}
    return {"status": "ok"}


def versions(setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {**info.versions(), "cuda of torch": torch.version.cuda}
    return {"status": "ok", **found, "devices": info.devices(), "state": state_of_card()}


def library(setting: Setting) -> dict[str, Any]:
    """Without the library there are no resident kernels, and the rest goes on."""
    if backends.LIBRARY_ERROR is not None:
        return {"status": "failed", "why": backends.LIBRARY_ERROR}
    return {"status": "ok", **info.built()}


def operators(setting: Setting) -> dict[str, Any]:
    found = {op: backends.unavailable("cuda", op, setting.device.type) or "there" for op in backends.OPS}
    there = [op for op, why in found.items() if why == "there"]
    return {"status": "ok" if there else "absent", "why": "" if there else found["channel_gate"], "operators": found}


def stream(setting: Setting) -> dict[str, Any]:
    """The current stream, which the native library takes from libtorch_cuda."""
    try:
        of_process = hasattr(ctypes.CDLL("libtorch_cuda.so"), STREAM)
    except OSError as error:
        return {"status": "absent" if torch.version.cuda is None else "failed", "why": str(error)}
    return {"status": "ok" if of_process else "failed", "why": "" if of_process else f"libtorch_cuda has no {STREAM}"}


def without_limits(setting: Setting) -> str | None:
    """Why nobody says what the resident kernels hold. In a dry run the emulator does, but for a library for cards."""
    if not hasattr(torch.ops.fused_attn, "resident_limits"):
        return "built without CUDA"
    return "no CUDA device" if setting.dry and backends.build_record()["cuda"]["built"] else None


def limits(setting: Setting) -> dict[str, Any]:
    """Which asks the runtime and the driver, on the current device."""
    if why := without_limits(setting):
        return {"status": "absent", "why": why}
    of_card = resident.limits_of(0)
    found = {"shared": of_card.shared, "cluster": of_card.cluster}
    given = of_card.shared if setting.dry else torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    if of_card.shared != given:
        return {"status": "wrong", "why": f"shared memory a block: {given}", **found}
    return {"status": "ok", **found}


def clusters(setting: Setting) -> dict[str, Any]:
    """Over how many blocks samples are spread, of an SE block in bfloat16: [forward, backward]."""
    if why := without_limits(setting):
        return {"status": "absent", "why": why}
    found = {}
    for shape in ((256, 56, 56), (64, 112, 112), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)):
        x, none = torch.empty(1, *shape, dtype=torch.bfloat16, device="meta"), (None,) * 7
        spread = resident.clusters("channel_gate", resident.limits_of(0), x, *none, 0, 0, 0, 0, 6, 0, 0)
        found["x".join(map(str, shape))] = list(spread)
    return {"status": "ok", "blocks": found}


def triton(setting: Setting) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return {"status": "absent", "why": "triton is not installed"}
    if setting.dry:
        return {"status": "ok", "version": version}
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return {"status": "ok", "version": version, "target": f"{target.backend} {target.arch}"}


PROBES = {f.__name__: f for f in (versions, library, operators, stream, triton, limits, clusters)}
