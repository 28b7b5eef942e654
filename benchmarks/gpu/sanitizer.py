"""compute-sanitizer's memcheck over a few small calls of each backend, where it is on PATH."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

import fused_attn
from fused_attn import nn

from .rows import Row, Setting, in_place_of_a_card

SECONDS, STEP = 60, 60
TOOL = "compute-sanitizer"
FOUND = 99  # its exit code where it found something


def rows(setting: Setting) -> list[Row]:
    return [Row(backend, backend) for backend in setting.backends]


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    tool = shutil.which(TOOL)
    if tool is None:
        return {"status": "absent", "why": f"no {TOOL} on PATH"}
    calls = [sys.executable, "-m", __spec__.name, str(setting.device), row.key]
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), *calls]
    # Each tensor by itself, so that what is beyond one is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = 0.4 * setting.seconds
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "refused", "why": f"not finished after {limit:.0f} seconds"}
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return {"status": "ok", "said": lines[-1] if lines else ""}
    status = "wrong" if done.returncode == FOUND else "failed"
    shown = [line for line in lines if line.startswith("=========")] or lines
    return {"status": status, "why": " | ".join(shown[:4])[:600], "said": lines[-40:]}


def main(device: str, backend: str) -> None:
    """Training steps on maps of odd sizes, in both layouts."""
    with fused_attn.backend(backend):
        for block in (nn.SqueezeExcite(24), nn.ECA(24), nn.CBAM(24, batch_norm=False)):
            block.to(device, torch.bfloat16)
            for last in (False, True):
                x = torch.randn(2, 24, 5, 7, dtype=torch.bfloat16, device=device)
                x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
                block(x.requires_grad_()).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    with in_place_of_a_card() if sys.argv[1] == "cpu" else contextlib.nullcontext():
        main(*sys.argv[1:])
