"""What is measured is one function, plain and fused, and every block has shapes that it takes."""

from __future__ import annotations

import pytest
import torch

from fused_attn.bench import blocks
from fused_attn.bench.measure import peak_memory
from tests.checks import LAYOUTS

CPU = torch.device("cpu")

#: Of a map and a video, in small.
SMALL = {2: (2, 16, 14, 14), 3: (2, 16, 3, 6, 6)}
#: Blocks that have a form for videos and volumes.
VOLUMES = ("se", "eca", "cbam", "scse", "bam", "global-context", "position-attention", "channel-self-attention")
CASES = [(name, rank) for name in blocks.BLOCKS for rank in SMALL if rank == 2 or name in VOLUMES or "non-" in name]


@pytest.mark.parametrize(("name", "rank"), CASES)
def test_fused_is_the_same_function(name, rank):
    shape = SMALL[rank]
    pair = [block.eval() for block in blocks.pair(name, shape[1], torch.float64, CPU, rank)]
    torch.manual_seed(0)
    inputs = tuple(blocks.make_map(shape, torch.float64, "nchw", CPU) for _ in range(1 + blocks.BLOCKS[name].residual))
    expected, found = (blocks.forward_call(block, inputs)() for block in pair)
    assert expected.shape != inputs[0].shape or not torch.equal(expected, inputs[0])  # it does something
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(*(blocks.training_call(block, inputs, grad)() for block in pair), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_shapes_are_those_of_the_block():
    assert {block.shapes for block in blocks.BLOCKS.values()} <= set(blocks.SHAPES)
    for block in blocks.BLOCKS.values():
        assert all(n % block.multiple == 0 for shape in blocks.SHAPES[block.shapes] for n in shape[2:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_lies_as_asked(layout):
    for shape in SMALL.values():
        x = blocks.make_map(shape, torch.float32, layout, CPU)
        assert x.shape == shape and (x.stride(1) == 1) == (layout == "channels_last")


def test_the_peak_is_counted_and_not_the_sum():
    """Two maps at a time, of the five that are made."""
    x = torch.randn(1000, 100)

    def call() -> None:
        y = x + 1
        for _ in range(4):
            y = y + 1

    assert 2 * 4 * x.numel() <= peak_memory(call, CPU) < 2.1 * 4 * x.numel()  # 1 is a tensor, too


def test_position_attention_has_no_matrix_of_pairs():
    shape = (1, 16, 32, 32)
    pair = blocks.pair("position-attention", shape[1], torch.float32, CPU)
    x, grad = (blocks.make_map(shape, torch.float32, "nchw", CPU) for _ in range(2))
    eager, fused = (peak_memory(blocks.training_call(block, (x,), grad), CPU) for block in pair)
    matrix = 4 * (32 * 32) ** 2
    assert eager >= 2 * matrix and fused < matrix / 2
