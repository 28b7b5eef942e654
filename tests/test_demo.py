"""What the demo says of its two trainings."""

from __future__ import annotations

import pytest
import torch

from fused_attn.demo import DigitsNet, Run, measure_blocks, moved, one_thread, step_ratio, train
from fused_attn.fusion import fuse


def test_step_ratio_is_above_one_where_the_fused_network_is_faster():
    """Of medians: a step that was disturbed does not count."""
    original, fused = (
        Run(name, model=None, optimizer=None, schedule=None, seconds=seconds)
        for name, seconds in (("original", [0.3, 0.3, 9.0]), ("fused", [5.0, 0.1, 0.1]))
    )
    assert abs(step_ratio(original, fused) - 3) < 1e-9


def test_every_block_is_measured_at_its_size():
    torch.manual_seed(0)
    gains = measure_blocks(DigitsNet(16), fuse(DigitsNet(16)), batch=2, budget=0.0)
    expected = [("SEBlock", (2, 16, 32, 32)), ("CBAM", (2, 16, 16, 16)), ("SEBlock", (2, 32, 8, 8))]
    assert [(gain.block, gain.shape) for gain in gains] == expected
    assert all(gain.original > 0 and gain.fused > 0 and gain.ratio == gain.original / gain.fused for gain in gains)


def test_a_moved_network_has_the_next_numbers():
    weights = [parameter.clone() for parameter in DigitsNet(16).parameters()]
    model = DigitsNet(16)
    model.load_state_dict({name: weights[i] for i, (name, _) in enumerate(model.named_parameters())}, strict=False)
    for before, after in zip(weights, moved(model).parameters(), strict=True):
        assert (after > before).all() and torch.equal(torch.nextafter(after, before), before)


@pytest.mark.long  # about 20 s of processor time
def test_the_demo_convinces():
    """It learns, and fused differs from the original as much as rounding makes the original differ from itself."""
    pytest.importorskip("sklearn")
    with one_thread():
        original, moved_, fused = train(120)
    assert all(run.accuracy > 0.95 for run in (original, moved_, fused))
    assert max(fused.apart(original)[:10]) < 1e-4
    assert max(fused.apart(original)) < 10 * max(moved_.apart(original))
