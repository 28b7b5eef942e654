"""What the demo says of its two trainings."""

from __future__ import annotations

from fused_attn.demo import Run, step_ratio


def test_step_ratio_is_above_one_where_the_fused_network_is_faster():
    """Of medians: a step that was disturbed does not count."""
    original, fused = (
        Run(name, model=None, optimizer=None, schedule=None, seconds=seconds)
        for name, seconds in (("original", [0.3, 0.3, 9.0]), ("fused", [5.0, 0.1, 0.1]))
    )
    assert abs(step_ratio(original, fused) - 3) < 1e-9
