"""What Inductor makes of the operators: they get maps as the convolutions around them write them."""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from fused_attn import nn
from fused_attn.backends import choose
from tests.checks import random


@pytest.mark.slow  # a compilation
@pytest.mark.parametrize("training", [False, True])
def test_no_map_is_copied_between_convolutions(training):
    """Convolutions on the CPU write channels last; a map copied to the strides that were traced would lie otherwise."""
    if choose("channel_gate", torch.empty(0)) == "reference":
        pytest.skip("no native library on this machine: the blocks are plain PyTorch")
    torch._dynamo.reset()
    channels, positions = 16, 18 * 18
    blocks = nn.SqueezeExcite(channels), torch.nn.Conv2d(channels, channels, 1), nn.CBAM(channels)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3), *blocks, torch.nn.Conv2d(channels, channels, 1))
    model.train(training)
    compiled, x = torch.compile(model), random(2, 3, 20, 20)
    with torch.set_grad_enabled(training), torch._inductor.config.patch(force_disable_caches=True):
        y, codes = run_and_get_code(lambda: compiled(x).square().sum().backward() if training else compiled(x))
    last = f"({channels * positions}, 1, {18 * channels}, {channels})"
    result = rf"\(2, {channels}, 18, 18\), (\(.*?\)), 'torch.ops.fused_attn.(\w+)"
    written = [re.findall(result, code) for code in codes]
    operators = {"channel_gate", "cbam"}
    expected = [operators, {f"{name}_backward" for name in operators}] if training else [operators]
    assert [{name for _, name in of_graph} for of_graph in written] == expected
    assert {strides for of_graph in written for strides, _ in of_graph} == {last}
    if not training:
        torch.testing.assert_close(y, model(x))
