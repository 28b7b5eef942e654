"""What compiled code reads and writes is counted by Inductor; a fused network's code moves fewer bytes."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from fused_attn import fuse
from fused_attn.bench import traffic
from fused_attn.reference import SqueezeExcite

FLOAT = 4


def test_a_pointwise_step_reads_and_writes_its_map_once():
    class Block(nn.Module):
        def forward(self, x):
            return torch.relu(x * 2 + 1).exp()

    from torch._inductor import compile_fx

    x, before = torch.randn(2, 8, 16, 16), compile_fx.inductor_metrics_log.level
    # Twice: a graph from a cache would have been counted before.
    counted = [traffic.compiled_bytes(Block(), x, "inference", torch.float32) for _ in range(2)]
    assert counted == [2 * FLOAT * x.numel()] * 2
    assert compile_fx.inductor_metrics_log.level == before
    assert not any(isinstance(h, logging.NullHandler) for h in compile_fx.inductor_metrics_log.handlers)


class Network(nn.Module):
    def __init__(self, attends: bool):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.block = SqueezeExcite(16, hidden=4) if attends else nn.Identity()
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.head(torch.relu(self.block(self.stem(x))))


def test_a_fused_network_moves_less(monkeypatch):
    def networks(*_: object) -> dict[str, nn.Module]:
        original = Network(True)
        return {"backbone": Network(False), "eager": original, "fused": fuse(copy.deepcopy(original))}

    monkeypatch.setattr(traffic, "networks", networks)
    device = torch.device("cpu")
    (figure,) = traffic.measure_traffic("a", "b", (2, 3, 20, 20), "nchw", device, passes=("inference",))
    of = figure.facts["compiled bytes"]
    assert set(of) == {"backbone, compile", "compile", "fused, compile", "backend, compile"}
    assert of["backbone, compile"] < of["fused, compile"] < of["compile"]
    assert of["backend, compile"] < of["compile"]
    assert figure.case["pass"] == "inference" and not figure.timings
