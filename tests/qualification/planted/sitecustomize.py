"""Faults in the operators' kernels, for the process that measures: python runs this file where it is on the path.

One fault an op, in what `functional` calls on any backend but the reference.
"""

from __future__ import annotations

import functools
import itertools
import os
import time

import torch

from fused_attn import ops, reference


def plant(op: str, fault) -> None:
    right = getattr(ops, op)

    def planted(backend, *arguments, **options):
        return fault(functools.partial(right, **options), backend, *arguments)

    setattr(ops, op, planted)


def wrong(right, *arguments):
    return right(*arguments) * 1.01


def wrong_on_ties(right, backend, x, *arguments):
    """The maxima's gradient goes to the last of equal ones."""
    flipped = right(backend, x.flip(2, 3).contiguous(), *arguments)
    return flipped


def wrong_in_one_class(right, backend, x, *arguments):
    y = right(backend, x, *arguments)
    return y * 2 if x.shape[2:] == (12, 12) else y


def unwritten(right, backend, x, *arguments):
    """The last element of its result is left as it was allocated."""
    y = right(backend, x, *arguments)
    fresh = torch.empty_like(y)
    last = torch.arange(y.numel(), device=y.device).view(y.shape) == y.numel() - 1
    return torch.where(last, fresh, y)


def swallows_nan(right, backend, x, *arguments):
    return right(backend, x.nan_to_num(), *arguments)


def slow(right, *arguments):
    time.sleep(0.005)
    return right(*arguments)


runs = itertools.count()


def differs(right, *arguments):
    return right(*arguments) * (1 + 2**-22 * (next(runs) % 2))


def hangs(right, *arguments):
    time.sleep(1000)


def crashes(right, *arguments):
    os.abort()


def refuses(right, *arguments):
    raise RuntimeError("a sample does not fit")


def has_no_memory(right, *arguments):
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")


def chatters(right, *arguments):
    print("{}")  # where its answers are expected
    return right(*arguments)


FAULTS = {
    "simam": wrong,
    "squeeze": wrong_on_ties,
    "channel_pool": wrong_in_one_class,
    "position_attention": unwritten,
    "cbam": swallows_nan,
    "mixed_scale": slow,
    "channel_gate": differs,
    "scale": hangs,
    "context_pool": crashes,
    "axis_pool": refuses,
    "criss_cross_attention": has_no_memory,
    "spatial_gate": chatters,
}
for op, fault in FAULTS.items():
    plant(op, fault)

of_space = reference.spatial_gate


def slowly(*arguments, **options):
    """Plain PyTorch that the kernel outdoes, whatever else this machine does."""
    time.sleep(0.005)
    return of_space(*arguments, **options)


reference.spatial_gate = slowly
