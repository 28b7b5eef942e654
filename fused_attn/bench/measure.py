"""Figures: what was timed, in what case, with what memory, on what machine."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from statistics import geometric_mean

import torch

from .. import __version__
from ..timing import Timing, interleaved, synchronize
from ..verdicts import cpu_name


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what is freed; whether it does now.

    By default every large map goes back to the system, and fresh pages then take most of an operator's time on CPUs:
    more of eager's, which makes more maps. Without them only the operators' own passes are compared.
    """
    mmap_max, trim_threshold, largest_int = -4, -1, 2**31 - 1  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, largest_int))


def copy_bandwidth(device: torch.device, bytes_: int = 1 << 28) -> float:
    """Bytes a second of a large copy, read and written counted: the ceiling of everything that is memory-bound."""
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, budget=0.5)["copy"]
    return 2 * bytes_ / timing.median


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak above what was there before, as torch's allocator counts them: what libraries and operators
    allocate for themselves while they run is not among them."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints two lines when it starts and stops
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def environment(device: torch.device) -> dict[str, object]:
    """What a figure depends on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fused_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }


@dataclass
class Figure:
    """One comparison: the candidates' times for one case, and what the case is."""

    case: dict[str, object]
    timings: dict[str, Timing]
    facts: dict[str, object] = field(default_factory=dict)

    def ratio(self, other: str, of: str = "fused") -> float:
        """How many times as long `other` takes."""
        return self.timings[other].median / self.timings[of].median

    def as_json(self) -> dict[str, object]:
        medians = {name: t.median for name, t in self.timings.items()}
        return {**asdict(self), "medians": medians}


def geometric_means(figures: list[Figure], others: tuple[str, ...] = ("eager", "compile")) -> Iterator[dict]:
    """For every group of figures of one block, pass, dtype and layout: the mean and the worst ratio to each other."""
    groups: dict[tuple, list[Figure]] = {}
    for figure in figures:
        key = tuple((k, v) for k, v in figure.case.items() if k != "shape")
        groups.setdefault(key, []).append(figure)
    for key, members in groups.items():
        row: dict[str, object] = dict(key)
        for other in others:
            ratios = [f.ratio(other) for f in members if other in f.timings]
            if ratios:
                row[f"{other} / fused"] = geometric_mean(ratios)
                row[f"worst {other}"] = min(ratios)
        yield row
