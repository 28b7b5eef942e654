"""warmup(model, *inputs): compile what the first real call would otherwise compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fusion.api import running
from .qualification.calls import buffers_kept


def warmup(model: nn.Module, *inputs: Any, backward: bool = True) -> int:
    """Run every fused block once on maps like those it gets from these inputs, so that Triton has compiled.

    Parameters, their gradients, buffers, training mode and random state stay as they are. Dtypes, layouts and
    autocast count: call it as you will call the model.

    Args:
        model: a fused model (see `fuse`).
        inputs: what its forward takes.
        backward: run the blocks' backward too; False for inference.

    Returns:
        The number of (block, map) pairs that were run.
    """
    seen: dict[tuple, tuple[nn.Module, Tensor]] = {}

    def remember(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(keywords.values()))
        seen.setdefault((block, x.shape, x.stride(), x.dtype, x.device), (block, torch.randn_like(x)))

    blocks = list(running(model))
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[Any] = []
    with torch.random.fork_rng():
        try:
            for block in blocks:
                hooks.append(block.register_forward_pre_hook(remember, with_kwargs=True))
            with torch.no_grad():
                model.eval()
                model(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training
        for block, x in seen.values():  # in the block's own mode: training has kernels of its own
            with buffers_kept(block), torch.set_grad_enabled(backward):
                parameters = [p for p in block.parameters() if p.requires_grad]
                y = type(block).forward(block, x.requires_grad_(backward))
                if backward:
                    torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
    return len(seen)
