"""info: what is installed, what was built, and which backend serves what. The first thing to send with a bug report."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, backends
from .ops.resident import held_on
from .verdicts import cached, cpu_name, environment_of, shipped


def versions() -> dict[str, str]:
    found = {"fused_attn": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy", "timm", "torchvision", "monai"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["platform"] = platform.platform()
    return found


def devices() -> list[str]:
    """The processor, and every GPU with its compute capability and memory, and what the resident kernels hold there;
    why there is none."""
    threads = torch.get_num_threads()
    found = [f"cpu: {cpu_name()}, {threads} thread{'s' * (threads != 1)}"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        card = f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {memory}"
        found.append(f"{card}; {held_on(i)}")
    if len(found) == 1:
        with_gpus = torch.version.cuda or torch.version.hip
        found.append("cuda: " + ("torch finds no GPU" if with_gpus else "this torch is built without it"))
    return found


def built() -> dict[str, str]:
    """What the native library holds, and why not more."""
    found = {"library": backends.LIBRARY_ERROR or str(backends.LIBRARY_PATH)}
    record = backends.build_record()
    if not record:
        return {**found, "build": "no record of a build"}
    found["torch headers"] = str(record.get("torch_headers"))
    for part in ("cpu", "cuda"):
        details = record.get(part, {})
        if details.get("built"):
            found[part] = details.get("compiler") or f"nvcc {details['nvcc']} for {', '.join(details['architectures'])}"
        else:
            found[part] = f"not built: {details.get('reason')}"
    return found


#: What people call the blocks, and the ops that compute them: the first is what most calls are.
FAMILIES = {
    "squeeze-excite, ECA, channel": ("channel_gate", "channel_gate/both"),
    "spatial attention": ("spatial_gate", "spatial_gate/batch_norm"),
    "CBAM": ("cbam", "cbam/batch_norm"),
    "BAM, scSE, coordinate, triplet": ("mixed_scale", "axis_pool"),
    "selective kernels, split": ("select", "select/with", "select/many"),
    "BatchNorm, gate (tails=True)": ("norm_gate",),
    "SimAM": ("simam",),
    "response norm, GCT, SRM": ("select/energy", "norm_gate/moments"),
    "global context": ("context_pool",),
    "criss-cross attention": ("criss_cross_attention",),
    "non-local, self-attention": ("position_attention",),
    "parts of other blocks": ("squeeze", "scale", "scale/space", "channel_pool"),
}
IN_WORDS = {"reference": "plain PyTorch", "cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


def families() -> list[tuple[str, str, str, str]]:
    """(device, family, what serves it, why), in words, on the devices that are here."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for family, (op, *_) in FAMILIES.items():
            name, why = backends.default(op, device)
            if name == "reference" and ": " in why and "; " in why:  # a reason for each of the others: the last one's
                why = why.rpartition("; ")[2].partition(": ")[2]
            if "in benchmarks" in why:  # which stored figures, for --all
                why = why.partition(": ")[0]
            why = why.removeprefix("the processor's own kernel; ")
            rows.append((device, family, IN_WORDS[name], why))
    return rows


def serving() -> list[tuple[str, str, str, str]]:
    """(op, device, backend that serves it, why not the others)."""
    rows = []
    for device in ("cpu", "cuda"):
        for op in backends.OPS:
            name, why = backends.default(op, device)
            others = [
                f"{other}: {backends.unavailable(other, op, device) or 'on request: ' + why}"
                for other in backends.NAMES
                if other not in (name, "reference")
            ]
            rows.append((op, device, name, "; ".join(others)))
    return rows


def measured() -> list[tuple[str, str, str, int, str]]:
    """(device, op, backend, of how many calls, why) of what ships or was kept of the devices here: what `fuse` and
    `qualify` find without measuring."""
    rows = []
    for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]:
        environment = environment_of(device)
        found: dict[tuple[str, str], list[str]] = {}
        for verdict in {v.asked: v for v in (*cached(environment), *shipped(environment))}.values():
            found.setdefault((verdict.question.op, verdict.backend), []).append(verdict.why)
        rows += [(str(device), op, name, len(whys), whys[0]) for (op, name), whys in found.items()]
    return rows
