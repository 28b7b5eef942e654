"""Times that can be compared: every candidate in turn, again and again, and the ratio of medians."""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch


@dataclass
class Timing:
    """Seconds of every repetition of one candidate."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = quantiles(self.seconds, n=4)
        return (high - low) / self.median


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    budget: float = 2.0,
    least: int = 7,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run the candidates in turn until each has `least` repetitions and `budget` seconds are spent.

    The order is turned round at every repetition, so that none always follows the same one. Wall time, or that of
    another clock, the device synchronised before and after.
    """
    for call in candidates.values():
        for _ in range(3):
            call()
    timings = {name: Timing() for name in candidates}
    order = list(candidates.items())
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for repetition in range(most):
            for name, call in order if repetition % 2 else reversed(order):
                synchronize(device)
                begin = clock()
                call()
                synchronize(device)
                timings[name].seconds.append(clock() - begin)
            if repetition + 1 >= least and time.perf_counter() - start > budget:
                break
    finally:
        if enabled:
            gc.enable()
    return timings


def in_turn(calls: Sequence[Callable[[], object]], first: int = 0) -> Callable[[], None]:
    """What makes the next of the calls each time it is called. As many results as there are calls are alive, so that
    neither inputs nor outputs were just used."""
    results: deque[object] = deque(maxlen=len(calls))
    turns = itertools.cycle([*calls[first:], *calls[:first]])

    def call() -> None:
        results.append(next(turns)())

    return call


def nth(calls: Sequence[Callable[[], object]], i: int) -> object:
    return calls[i]()


def digits(seconds: float) -> float:
    """As many as mean something."""
    return float(f"{seconds:.4g}")


def graph_of(call: Callable[[int], object], copies: int) -> Callable[[], None]:
    """A CUDA graph of the call on each of the copies of its inputs. What it returns is kept until the capture is over,
    so that each copy has outputs of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph, outputs = torch.cuda.CUDAGraph(), list[object]()
    with torch.cuda.graph(graph):
        for i in range(copies):
            outputs.append(call(i))
    return graph.replay


def last_cache(device: torch.device) -> int:
    """Bytes of the cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)
