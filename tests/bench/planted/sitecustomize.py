"""Faults in the operators' kernels and tools, for the processes of the GPU suite: python runs this file where it is on
the path."""

from __future__ import annotations

import functools
import os
import time

import torch

from fused_attn import ops


def plant(op: str, fault) -> None:
    right = getattr(ops, op)

    def planted(backend, *arguments, **options):
        return fault(functools.partial(right, backend, **options), *arguments)

    setattr(ops, op, planted)


def plant_on_the_emulator(op: str, fault) -> None:
    everywhere = getattr(ops, op)

    def planted(backend, *arguments, **options):
        call = functools.partial(everywhere, backend, **options)
        return fault(call, *arguments) if backend == "cuda" else call(*arguments)

    setattr(ops, op, planted)


def wrong(right, *arguments):
    return right(*arguments) * 1.01


def hangs_on_a_convolution(right, x, weight1, *arguments):
    if weight1 is not None and weight1.dim() == 3:
        time.sleep(1000)
    return right(x, weight1, *arguments)


def refuses_its_own_map(right, x, *arguments):
    """As a resident kernel does: the odd maps are small, and one without data is only looked at."""
    if x.shape[2:] == (6, 6) and type(x) is torch.Tensor:
        raise RuntimeError("expected a sample that fits the shared memory of a cluster of at most 8 blocks")
    return right(x, *arguments)


def wrong_on_larger_maps(right, x, *arguments):
    """Than those that `right` has."""
    return wrong(right, x, *arguments) if x.shape[2] >= 8 else right(x, *arguments)


def crashes(right, *arguments):
    os.abort()


plant("simam", wrong)
plant("channel_gate", hangs_on_a_convolution)
plant("spatial_gate", refuses_its_own_map)
plant("norm_gate", crashes)
plant_on_the_emulator("select", wrong)
plant_on_the_emulator("channel_gate", wrong_on_larger_maps)
