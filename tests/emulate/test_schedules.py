"""Every resident kernel, whatever order the emulated machine runs its threads in."""

from __future__ import annotations

import functools

import pytest
import torch

from .cases import Case, SelectCase, SpaceCase, build

pytestmark = pytest.mark.slow  # 14 s in all

CASES = {
    "channel_gate": ("channel_gate.cpp", Case),
    "spatial_gate": ("space.cpp", SpaceCase),
    "cbam": ("space.cpp", functools.partial(SpaceCase, gated=True, pool="both")),
    "select": ("select.cpp", SelectCase),
}
#: Barriers of a cluster, NCHW and channels_last, without the last one.
BARRIERS = {"channel_gate": (1, 3), "spatial_gate": (3, 1), "cbam": (4, 4), "select": (1, 3)}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", CASES)
def test_two_schedules_agree_to_the_bit(kernel, layout, tmp_path_factory, tmp_path):
    source, case = CASES[kernel]
    program = build(source, tmp_path_factory)
    runs = [case((2, 10, 6, 5), torch.bfloat16, layout, 4, seed=seed).run(program, tmp_path)[0] for seed in (1, 2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("kernel", CASES)
def test_every_cluster_barrier_is_needed(kernel, layout, tmp_path_factory, tmp_path):
    """Taken out one by one, and the last one (nobody leaves early): the emulator sees each."""
    source, case = CASES[kernel]
    program, count = build(source, tmp_path_factory), BARRIERS[kernel][layout == "channels_last"] + 1
    seen = []
    for drop in range(count):
        for seed in range(12):
            try:
                case((1, 16, 6, 6), torch.float32, layout, 4, seed=seed).check(program, tmp_path, drop)
            except (AssertionError, RuntimeError):
                seen.append(drop)
                break
    assert seen == list(range(count))
