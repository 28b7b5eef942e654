"""Calls that are replayed on a real device: the bits of the call as it is written, on any stream or device."""

from __future__ import annotations

import pytest
import torch

from fused_attn import functional
from fused_attn.ops.common import KERNELS

from ..checks import random

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("streaming")]

CODES = (0, 0, 0, 1, 5, 0, 0)  # of a squeeze and excitation


def weights(device: str) -> list[torch.Tensor]:
    shapes = (16, 256), (16,), (256, 16), (256,)
    return [random(*shape, seed=i).to(device, torch.bfloat16) for i, shape in enumerate(shapes)]


def a_map(seed: int, device: str = "cuda") -> torch.Tensor:
    return random(8, 256, 14, 14, seed=seed).to(device, torch.bfloat16)


def as_written(x: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
    return KERNELS["channel_gate"].__wrapped__(x, *given, None, None, None, *CODES)[0]


def replays() -> int:
    return sum(type(plan) is not bool for plan in KERNELS["channel_gate"].plans.values())


def test_the_same_bits():
    given, kept = weights("cuda"), []
    for i in range(5):
        x = a_map(i)
        kept.append((x, functional.channel_gate(x, *given), as_written(x, given)))
    assert replays() >= 1
    assert all(torch.equal(found, expected) for _, found, expected in kept)


def test_on_another_stream():
    given, stream = weights("cuda"), torch.cuda.Stream()
    for i in range(4):
        x = a_map(i)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = functional.channel_gate(x, *given)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, as_written(x, given))


def test_in_a_graph():
    given, x = weights("cuda"), a_map(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            functional.channel_gate(x, *given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = functional.channel_gate(x, *given)
    for i in range(1, 4):
        x.copy_(a_map(i))
        graph.replay()
        assert torch.equal(found, as_written(x, given))


def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = weights("cuda:1")
    for i in range(4):
        x = a_map(i, "cuda:1")
        found = functional.channel_gate(x, *given)
        assert found.device == x.device and torch.equal(found, as_written(x, given))
    assert torch.cuda.current_device() == 0
