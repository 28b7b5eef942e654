"""pytest-benchmark suite: every block on its shapes, eager beside fused.

    pytest benchmarks --benchmark-only --benchmark-group-by=param:block,param:shape,param:what

For ratios measured in one interleaved run, and torch.compile beside them, use `fused-attn bench`.
"""

from __future__ import annotations

import pytest
import torch

from fused_attn.bench.blocks import BLOCKS, SHAPES, forward_call, make_map, pair, training_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("who", ["eager", "fused"])
@pytest.mark.parametrize("what", ["forward", "forward + backward"])
@pytest.mark.parametrize(
    ("block", "shape"),
    [(name, shape) for name, block in BLOCKS.items() for shape in SHAPES[block.shapes]],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_block(benchmark, block, shape, what, who, layout):
    eager, fused = pair(block, shape[1], torch.float32, DEVICE)
    module = eager if who == "eager" else fused
    x, residual = (make_map(shape, torch.float32, layout, DEVICE) for _ in range(2))
    inputs = (x, residual) if BLOCKS[block].residual else (x,)
    grad = make_map(forward_call(eager, inputs)().shape, torch.float32, layout, DEVICE)
    call = forward_call(module, inputs) if what == "forward" else training_call(module, inputs, grad)

    def run() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
