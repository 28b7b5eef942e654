"""How a result is judged (`fused_attn.equivalence`, all of which can be had from here), and what the tests judge."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.equivalence import (
    LAYOUTS,
    Inputs,
    assert_as_good_as_eager,
    assert_equivalent,
    cast,
    error,
    in_layout,
    largest,
    run,
)

__all__ = [
    "LAYOUTS",
    "Inputs",
    "assert_as_good_as_eager",
    "assert_as_good_as_reference",
    "assert_equivalent",
    "assert_same_block",
    "cast",
    "checkpoint",
    "checkpoint_shapes",
    "error",
    "gradcheck",
    "in_layout",
    "largest",
    "random",
    "randomised",
    "results",
    "run",
    "with_state_of",
]


def gradcheck(function: Callable[..., Tensor], inputs: Inputs, *, twice: bool = False, fast: bool = False) -> None:
    """torch's numerical check of the gradients of every input, or with `twice` of theirs; `fast`: in one direction."""

    def positional(*values: Tensor) -> Tensor:
        return function(**dict(zip(inputs, values, strict=True)))

    check = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    assert check(positional, [t.clone().requires_grad_() for t in inputs.values() if t is not None], fast_mode=fast)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape) + len(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def results(block: nn.Module, x: Tensor, *args: Any, training: bool, allow_unused: bool = False) -> list[Tensor]:
    """What a block makes of a map and whatever else, the gradients of the map and its parameters, and its buffers.
    allow_unused: the gradients of what is not used are zero."""
    block.train(training)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(x, *args)
    leaves, grad = [x, *block.parameters()], random(*y.shape, seed=5, dtype=y.dtype)
    grads = torch.autograd.grad(y, leaves, grad, allow_unused=allow_unused, materialize_grads=allow_unused)
    return [y, *grads, *(b.clone() for b in block.buffers())]


def randomised(block: nn.Module) -> nn.Module:
    """The block in float64 with every parameter and running statistic random: some start at zero."""
    block.double()
    for i, (name, tensor) in enumerate(block.state_dict().items()):
        if tensor.is_floating_point():
            scale = max(1, tensor[0].numel() if tensor.dim() > 1 else 1) ** -0.5
            value = random(*tensor.shape, seed=i, dtype=torch.float64, scale=scale)
            tensor.copy_(value.abs() + 0.5 if name.endswith("running_var") else value)
    return block


def with_state_of(block: nn.Module, original: nn.Module) -> nn.Module:
    """The block with the original's state, tensor by tensor in order; a Linear's weight fits a 1x1 convolution."""
    theirs = original.state_dict().values()
    state = {k: v.reshape(w.shape) for (k, w), v in zip(block.state_dict().items(), theirs, strict=True)}
    block.load_state_dict(state)
    return block


def assert_same_block(ours: nn.Module, original: nn.Module, x: Tensor, *, training: bool) -> None:
    """Two blocks with the same parameters in the same order: output, every gradient and the buffers, in float64."""
    found = []
    for block in (ours, original):
        block = copy.deepcopy(block).double().train(training)
        leaf = x.detach().double().requires_grad_()
        y = block(leaf)
        y.backward(random(*y.shape, seed=1, dtype=torch.float64))
        assert leaf.grad is not None and all(p.grad is not None for p in block.parameters())
        found.append([y, leaf.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    assert found[0][0].shape == found[1][0].shape
    for mine, theirs in zip(*found, strict=True):
        theirs = theirs.reshape(mine.shape)  # a Linear's weight, and that of a 1x1 convolution
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)


def assert_as_good_as_reference(original: nn.Module, ours: nn.Module, x: Tensor, training: bool = True) -> None:
    """A fused block in x's dtype against its reference, which is float64 on entry: output and every gradient."""

    def results(block: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        block = copy.deepcopy(block).to(dtype).train(training)
        leaf = x.detach().to(dtype).requires_grad_()
        y = block(leaf)
        y.backward(random(*y.shape, seed=1, dtype=x.dtype).to(dtype))
        assert leaf.grad is not None and y.dtype == dtype
        return {"y": y, "x": leaf.grad} | {name: p.grad for name, p in block.named_parameters()}

    found, eager, exact = results(ours, x.dtype), results(original, x.dtype), results(original, torch.float64)
    terms = max(largest(v) for name, v in exact.items() if name not in ("y", "x"))
    for name, value in exact.items():
        assert_as_good_as_eager(found[name], eager[name], value, name, terms if name not in ("y", "x") else 0.0)


def checkpoint_shapes(source: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a checkpoint of other code, 64 channels."""
    shapes = json.loads(Path(__file__).with_name("checkpoint_keys.json").read_text())[source]
    return {key: tuple(shape) for key, shape in shapes.items()}


def checkpoint(source: str) -> dict[str, Tensor]:
    """Random values under those keys."""
    return {
        key: random(*shape, seed=i).abs() + 0.1 if shape else torch.tensor(3)
        for i, (key, shape) in enumerate(checkpoint_shapes(source).items())
    }
