"""Times that can be compared: medians, their spread, and candidates in turn."""

from __future__ import annotations

import pytest
import torch

from fused_attn.bench import blocks
from fused_attn.bench.measure import Figure, Timing, interleaved


def test_medians_and_their_spread():
    assert Timing([1.0, 90.0, 2.0]).median == 2 and Timing([4.0, 1.0, 2.0, 90.0]).median == 3
    assert Timing([4.0, 1.0, 2.0]).spread == 1.5  # (most - least) / median, of a few
    assert Timing([7.0, 1.0, 2.0, 6.0, 3.0, 5.0, 4.0]).spread == 1  # (6 - 2) / 4


def test_figures_are_ratios_of_medians():
    figure = Figure({}, {"eager": Timing([6.0, 6.0, 0.1]), "fused": Timing([2.0, 90.0, 2.0])})
    assert figure.ratio("eager") == 3 and figure.ratio("fused", "eager") == pytest.approx(1 / 3)
    assert figure.as_json()["medians"] == {"eager": 6.0, "fused": 2.0}


def test_candidates_take_turns():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleaved(candidates, torch.device("cpu"), budget=0.0, least=4)
    assert "".join(calls) == "aaabbb" + "baab" * 2  # once warm, neither is always the second
    assert [len(timing.seconds) for timing in timings.values()] == [4, 4]
    assert len(interleaved(candidates, torch.device("cpu"), budget=60.0, most=3)["a"].seconds) == 3


def test_a_look_at_a_fused_block_costs_little():
    """At most 1 µs a watched value."""
    found = blocks.look("cbam-batch-norm")
    assert found["watched"] > 20 and found["look"] < 1e-6 * found["watched"]
    assert blocks.look("norm-gate") == {}  # which fuse does not know
