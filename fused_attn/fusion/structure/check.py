"""The numerical check that a match is used after: fused against the original in float64, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..registry import Recipe
from ..swap import restore, swap
from .capture import HOOKS

TOLERANCE = 1e-9
#: torch's own backward of hard_sigmoid and hard_swish has its sixths in float32.
TOLERANCE_OF_SIXTHS = 1e-6


def _randomised(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy on the CPU with random parameters: those a block starts with are often zeros."""
    found = copy.deepcopy(block)
    found = (found.to_empty(device="cpu") if any(p.is_meta for p in found.parameters()) else found.cpu()).double()
    with torch.no_grad():
        for name, tensor in (*found.named_parameters(), *found.named_buffers()):
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(values + 0.5 if name.endswith("var") else (values - 0.5) * 1.5)
            else:
                tensor.fill_(3)
    for p in found.parameters():
        p.requires_grad_(True)
    for part in found.modules():
        restore(part)
        for hooks in HOOKS:
            if part.__dict__.get(hooks):
                part.__dict__[hooks] = type(part.__dict__[hooks])()
    return found


def _run(block: nn.Module, x: Tensor, weights: Tensor | None) -> tuple[list[Tensor], Tensor] | None:
    """Output and all gradients; None where it raises."""
    x = x.clone().requires_grad_()
    try:
        y = block(x)
    except Exception:
        return None
    if weights is None:
        weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype) + 0.5
    leaves = [x, *block.parameters()]
    if not y.requires_grad:
        return [y.detach()], weights
    grads = torch.autograd.grad(y, leaves, weights.expand_as(y), allow_unused=True)
    found = [torch.zeros(()) if g is None else g for g in grads]
    return [y.detach(), *found], weights


def is_same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    scale = max(1.0, b.detach().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0)
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


def check(
    block: nn.Module, make: Callable[[nn.Module], Recipe | str], channels: int, rank: int, tolerance: float = TOLERANCE
) -> str | None:
    """Why the fused form of a block is not the block; None where it is."""
    generator = torch.Generator().manual_seed(0)
    try:
        original = _randomised(block, generator)
        fused = copy.deepcopy(original)
    except Exception as error:
        return f"cannot be copied to be checked: {type(error).__name__}"
    recipe = make(fused)
    if isinstance(recipe, str):
        return recipe
    swap(fused, recipe)
    shapes: Sequence[tuple[int, ...]] = [
        (2, channels, *(6, 5, 4)[:rank]),
        (3, channels, *(7, 9, 3)[:rank]),
        (1, channels, *(1, 3, 2)[:rank]),
        (2, channels, *(4, 4, 4)[:rank]),
        (2, channels, *(1, 1, 1)[:rank]),
    ]
    for training in (False, True):
        original.train(training)
        fused.train(training)
        for i, shape in enumerate(shapes):
            for ties in (False, True) if i < 2 else (False,):
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                x = (x * 1.5).round() if ties else x
                mode = "training" if training else "evaluation"
                try:
                    expected = _run(original, x, None)
                except RuntimeError:
                    return f"raises in its backward pass in {mode}"
                if expected is None and i < 2:
                    return f"cannot be run on maps of {'×'.join(map(str, shape))}"
                actual = _run(fused, x, expected[1] if expected else None)
                if (expected is None) != (actual is None):
                    return f"differs from the known block in {mode} on {'×'.join(map(str, shape))}: one of them raises"
                if expected is None or actual is None:
                    continue
                for n, (a, b) in enumerate(zip(actual[0], expected[0], strict=True)):
                    if not is_same(a, b, tolerance):
                        what = "gradient" if n else "result"
                        where = " where values are equal" if ties else ""
                        return f"differs from the known block in {mode}: another {what}{where}"
                for (name, a), (_, b) in zip(fused.named_buffers(), original.named_buffers(), strict=True):
                    if not is_same(a.double(), b.double()):
                        return f"differs from the known block in {mode}: another {name}"
    return None
