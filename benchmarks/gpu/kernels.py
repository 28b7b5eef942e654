"""Compile the Triton kernels that `right` launches, before it does, on all cores: `python -m benchmarks.gpu.kernels`.

The calls are made with a stand-in for Triton's driver that says it is the card; what it is asked to compile is
compiled by as many processes as there are cores, and found in Triton's cache on disk by those that launch.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia import driver as nvidia

from .rows import Setting, first_line

#: Of `right`'s seconds, those of it all.
SHARE = 0.4


def compile_ahead(setting: Setting) -> dict[str, Any]:
    """Run it in a process of its own, which sees no GPU. What is not compiled in time is so when it is launched."""
    limit = SHARE * setting.seconds
    if setting.dry:
        card = {"capability": 90, "multiprocessors": 132}
    else:
        properties = torch.cuda.get_device_properties(0)
        capability = 10 * properties.major + properties.minor
        card = {"capability": capability, "multiprocessors": properties.multi_processor_count}
    hidden = ("TRITON_INTERPRET", "FUSED_ATTN_BACKEND")
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", __spec__.name, json.dumps({"dry": setting.dry, **card})]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": "ok", "why": f"not finished after {limit:.0f} seconds: the others are compiled when launched"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"status {process.returncode}"]
        return {"status": "failed", "why": lines[-1][:300]}
    return json.loads(said.splitlines()[-1])


def asked_for(setting: Setting, capability: int, multiprocessors: int) -> tuple[Any, list[tuple[Any, ...]]]:
    """The target, and what the checks have compiled for it."""
    from fused_attn.qualification import trial
    from tests.kernels.stand_in import stand_in

    from . import sanitizer
    from .right import streamed

    def run(made: trial.Made, training: bool, grad_for: Any = trial._gradient) -> None:
        """Ours alone: where nothing is launched there is nothing to compare."""
        with torch.no_grad():
            grads = [grad_for(y) for y in trial._listed(made.apply(trial.reference)(**made.tensors))]
        trial._once(made, trial.functional, grads if training else None)()

    def run_with_holes(made: trial.Made) -> None:
        trial._once(made, trial.functional, None)()

    calls = list(streamed(setting))  # before the stand-in serves the CPU
    with contextlib.ExitStack() as stack:
        standing = stack.enter_context(stand_in(capability=capability, multiprocessors=multiprocessors))
        stack.enter_context(mock.patch.object(trial, "_compare", run))
        stack.enter_context(mock.patch.object(trial, "_compare_holes", run_with_holes))
        for call, training in calls:
            for check in (trial.check_odd, trial.check_itself):
                # What was not computed does not agree, and has no place; some ops have no kernel.
                with contextlib.suppress(AssertionError, RuntimeError):
                    check(call, training, torch.device("cpu"))
        if not setting.dry:
            with contextlib.suppress(RuntimeError):
                sanitizer.main("cpu", "triton")
        return standing.get_current_target(), list(standing.asked.values())


_asked: tuple[Any, list[tuple[Any, ...]]]


def compiled(nth: int) -> str:
    """Why it cannot be compiled, or nothing."""
    target, everything = _asked
    kernel, signature, constants, options, attributes = everything[nth]
    try:
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        binary = kernel.compile(source, target=target, options=options.__dict__)
    except Exception as error:
        return f"{kernel.__name__}: {first_line(error)}"
    if hasattr(nvidia, "make_launcher"):  # this Triton builds a launcher a kernel, which is kept on disk, too
        with contextlib.suppress(Exception):  # as without a driver: it is built when it is launched
            nvidia.CudaLauncher(source, binary.metadata)
    return ""


def main() -> None:
    global _asked
    given = json.loads(sys.argv[1])
    began = time.monotonic()
    _asked = asked_for(Setting(given["dry"], Path(), 0.0), given["capability"], given["multiprocessors"])
    made, cores = time.monotonic(), len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        reasons = [why for why in pool.imap_unordered(compiled, range(len(_asked[1]))) if why]
    names: dict[str, int] = {}
    for kernel, *_ in _asked[1]:
        names[kernel.__name__] = names.get(kernel.__name__, 0) + 1
    seconds = {"to see them": round(made - began, 1), "to compile them": round(time.monotonic() - made, 1)}
    found = {"kernels": len(_asked[1]), "of": names, "cores": cores, "seconds": seconds}
    print(json.dumps({"status": "failed" if reasons else "ok", "why": "; ".join(reasons[:3]), **found}))


if __name__ == "__main__":
    main()
