"""Bytes kept for backward are counted, not estimated; the largest batch is found in few steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_attn import fuse
from fused_attn.bench import memory
from fused_attn.bench.models import networks

FLOAT = 4


def test_every_map_is_counted_once():
    """A BatchNorm keeps its input and two numbers a channel, a ReLU in place its output; nobody counts the rest."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 8, 6)
    assert memory.kept_by_model(model, x) == FLOAT * (2 * x.shape[0] * 4 * 48 + 2 * 4)


def test_what_nothing_needs_any_more_is_not_kept():
    w = torch.randn(100, requires_grad=True)

    def call() -> torch.Tensor:
        w.exp().square()  # a branch that is thrown away
        y = w.exp()
        return y * y + y.sin()  # y three times over

    assert memory.kept_bytes(call, w) == FLOAT * 100
    assert memory.kept_bytes(call) == FLOAT * 100  # w is not needed: exp keeps its result


def test_a_view_keeps_its_whole_storage():
    w = torch.randn(100, requires_grad=True)
    assert memory.kept_bytes(lambda: (w + 1)[:10].sin(), w) == FLOAT * 100


@pytest.mark.parametrize("attention", ["se", None])
def test_tails_keep_a_map_less(attention):
    resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
    x = torch.randn(4, 64, 9, 9)
    kept = [
        memory.kept_by_model(fuse(block, tails=tails) if tails is not None else block, x)
        for tails in (None, False, True)
        for block in [resnet.Bottleneck(64, 16, attn_layer=attention)]
    ]
    map_bytes = FLOAT * x.numel()
    if attention is None:
        assert kept[0] == kept[1] and kept[2] <= kept[0] + 0.05 * map_bytes
    else:
        assert kept[1] - kept[2] >= 0.9 * map_bytes and kept[0] - kept[2] >= 0.9 * map_bytes


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 64, 100, 127, 1000])
def test_the_largest_batch(limit):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    assert memory.largest(fits, 100) == min(limit, 100)
    assert len(tried) <= 14 and max(tried) <= 100


class OutOfMemoryAbove(nn.Module):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.layer = most, nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.layer(x)


def test_a_step_that_runs_out_of_memory_does_not_fit():
    model, x = OutOfMemoryAbove(5), torch.randn(2, 3, 4, 4)
    assert memory.largest(memory.step_fits(model, x)) == 5
    assert all(p.grad is None for p in model.parameters())


NETWORKS = """
from torch import nn
from fused_attn.reference import SqueezeExcite

def network(*attention):
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *attention, nn.ReLU(), nn.Conv2d(16, 4, 1))

def attentive():
    return network(SqueezeExcite(16))

def plain():
    return network()
"""


@pytest.fixture
def pair(tmp_path):
    path = tmp_path / "two_networks.py"
    path.write_text(NETWORKS)
    return f"{path}:attentive", f"{path}:plain"


def test_the_batch_derived_from_a_budget_is_the_largest_one(pair):
    budget, device = 1_000_000, torch.device("cpu")
    figure = memory.measure_memory(*pair, (4, 3, 12, 10), "nchw", device, budget_bytes=budget)
    kept, batches = figure.facts["kept bytes"], figure.facts["largest batch"]
    assert list(kept) == list(batches) == ["backbone", "eager", "fused"]  # it has no tails that fuse knows
    assert kept["backbone"] < kept["fused"] <= 1.01 * kept["eager"]
    assert figure.facts["largest batch is"] == f"derived from {budget} bytes" and "peak bytes" not in figure.facts
    for name, model in networks(*pair, with_tails=False).items():
        x = torch.randn(batches[name] + 1, 3, 12, 10)

        def needed(x: torch.Tensor, model: nn.Module = model) -> int:
            return memory.state_bytes(model) + memory.kept_by_model(model, x) + FLOAT * x.numel()

        assert needed(x[1:].clone()) <= budget < needed(x)


def test_without_a_budget_nothing_is_said_of_the_largest_batch(pair):
    figure = memory.measure_memory(*pair, (2, 3, 8, 8), "channels_last", torch.device("cpu"))
    assert set(figure.facts) == {"kept bytes"} and figure.as_json()["timings"] == {}
    with pytest.raises(ValueError, match="a batch of at least 2"):
        memory.measure_memory(*pair, (1, 3, 8, 8), "nchw", torch.device("cpu"), budget_bytes=1)
