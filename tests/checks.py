"""How a result is judged: against float64, beside the error of eager PyTorch in the same dtype."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

#: The rounding floor, in units of the dtype's epsilon at the largest value. float64 has no exacter reference
#: than eager itself, so there the floor carries the whole difference between two orders of summation.
FLOOR_EPS = {torch.float64: 256.0, torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN and infinity (what overflows the dtype, too) must stand in the same places."""
    largest = torch.finfo(actual.dtype).max
    actual, expected = actual.detach().double(), expected.detach().double()
    expected = torch.where(expected.abs() > largest, expected * torch.inf, expected)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    special = ~torch.isfinite(expected)
    same = torch.equal(actual[special].nan_to_num(1.5), expected[special].nan_to_num(1.5))
    assert same, "NaN or infinity is not where the reference has it"
    assert torch.isfinite(actual[~special]).all(), "NaN or infinity where the reference is finite"
    difference = (actual - expected)[~special].abs()
    return difference.max().item() if difference.numel() else 0.0


def largest(tensor: Tensor | None) -> float:
    """The largest finite magnitude."""
    if tensor is None:
        return 0.0
    finite = tensor.detach().double()[torch.isfinite(tensor)].abs()
    return finite.max().item() if finite.numel() else 0.0


def assert_as_good_as_eager(
    actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result", scale: float = 0.0
) -> None:
    """Error against float64 at most twice that of eager in the same dtype, plus the rounding floor.

    scale: magnitude of the terms of a sum, where they may cancel to less than that.
    """
    scale = max(scale, largest(exact), 1e-30)
    bound = 2 * error(eager, exact) + FLOOR_EPS[actual.dtype] * torch.finfo(actual.dtype).eps * scale
    found = error(actual, exact)
    assert found <= bound, f"{name}: error {found:.3g} is above {bound:.3g} ({actual.dtype})"


Inputs = dict[str, Tensor | None]


def run(function: Callable[..., Tensor | Sequence[Tensor]], inputs: Inputs, grads: Sequence[Tensor]):
    """Outputs and the gradient of every floating-point input, for the given output gradients."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
    outputs = function(**{k: leaves.get(k) for k in inputs})
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return outputs, dict(zip(leaves, found, strict=True))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: None if v is None else v.to(dtype) for k, v in inputs.items()}


def assert_equivalent(function: Callable, reference: Callable, inputs: Inputs, grads: Sequence[Tensor]) -> None:
    """function against reference: outputs and all gradients, by the rule above; layouts of outputs too."""
    actual, actual_grads = run(function, inputs, grads)
    eager, eager_grads = run(reference, inputs, grads)
    exact, exact_grads = run(reference, cast(inputs, torch.float64), [g.double() for g in grads])
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        assert a.dtype == e.dtype
        assert_as_good_as_eager(a, e, x, f"output {i}")
    # A parameter's gradient is a sum over the batch that may cancel; its terms are as large as its fellows' sums.
    terms = max((largest(g) for name, g in exact_grads.items() if name != "x"), default=0.0)
    full = all(v is None or v.dtype in (torch.float32, torch.float64) for v in inputs.values())
    for name, grad in actual_grads.items():
        if exact_grads[name] is None:
            assert grad is None or not grad.any(), f"gradient of {name}: expected none"
            continue
        assert grad is not None, f"gradient of {name}: none"
        assert grad.dtype == inputs[name].dtype
        assert_as_good_as_eager(
            grad, eager_grads[name], exact_grads[name], f"gradient of {name}", terms if full else 0.0
        )


def gradcheck(function: Callable[..., Tensor], inputs: Inputs, *, twice: bool = False) -> None:
    """torch's numerical check of the gradients of every input, or with `twice` of theirs."""

    def positional(*values: Tensor) -> Tensor:
        return function(**dict(zip(inputs, values, strict=True)))

    check = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    assert check(positional, [t.clone().requires_grad_() for t in inputs.values() if t is not None])


LAYOUTS = ("nchw", "channels_last")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with channels last in memory, for any spatial rank, or NCHW."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape) + len(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


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
