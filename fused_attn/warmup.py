"""warmup(model, *inputs): compile what the first real call would otherwise compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .fusion.api import running
from .qualification.calls import buffers_kept, maps_in_run


def warmup(model: nn.Module, *inputs: Any, backward: bool = True, **keywords: Any) -> int:
    """Run every fused block once on maps like those it gets from these inputs, so that Triton has compiled.

    Parameters, their gradients, buffers, training mode and random state stay as they are. Dtypes, layouts and
    autocast count: call it as you will call the model.

    Args:
        model: a fused model (see `fuse`).
        inputs, keywords: what its forward takes.
        backward: run the blocks' backward too; False for inference.

    Returns:
        The number of (block, map) pairs that were run.
    """
    with torch.random.fork_rng():
        maps = maps_in_run(model, list(running(model)), inputs, keywords, torch.randn_like)
        for block, x in maps:  # in the block's own mode: training has kernels of its own
            with buffers_kept(block), torch.set_grad_enabled(backward):
                parameters = [p for p in block.parameters() if p.requires_grad]
                y = type(block).forward(block, x.requires_grad_(backward))
                if backward:
                    torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
    return len(maps)
