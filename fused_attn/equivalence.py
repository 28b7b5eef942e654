"""How a result is judged: against float64, beside the error of eager PyTorch in the same dtype.

The tests judge by this rule, and so does what qualifies a backend on a card (`fused_attn.qualification`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: The rounding floor, in units of the dtype's epsilon at the largest value. float64 has no exacter reference
#: than eager itself, so there the floor carries the whole difference between two orders of summation.
FLOOR_EPS = {torch.float64: 256.0, torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}

Inputs = dict[str, Tensor | None]
Function = Callable[..., Tensor | Sequence[Tensor]]


def demand(holds: bool, otherwise: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(otherwise)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN and infinity (what overflows the dtype, too) must stand in the same places."""
    largest = torch.finfo(actual.dtype).max
    actual, expected = actual.detach().double(), expected.detach().double()
    expected = torch.where(expected.abs() > largest, expected * torch.inf, expected)
    demand(actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    special = ~torch.isfinite(expected)
    same = torch.equal(actual[special].nan_to_num(1.5), expected[special].nan_to_num(1.5))
    demand(same, "NaN or infinity is not where the reference has it")
    demand(bool(torch.isfinite(actual[~special]).all()), "NaN or infinity where the reference is finite")
    difference = (actual - expected)[~special].abs()
    return difference.max().item() if difference.numel() else 0.0


def largest(tensor: Tensor | None) -> float:
    """The largest finite magnitude."""
    if tensor is None:
        return 0.0
    finite = tensor.detach().double()[torch.isfinite(tensor)].abs()
    return finite.max().item() if finite.numel() else 0.0


def assert_as_good_as_eager(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    name: str = "result",
    scale: float = 0.0,
    chance_in: torch.dtype | None = None,
) -> None:
    """Error against float64 at most twice that of eager in the same dtype, plus the rounding floor.

    scale: magnitude of the terms of a sum, where they may cancel to less than that. chance_in: the dtype that was
    rounded to on the way, and let pass what may come from another choice among equal maxima (`is_chance`).
    """
    scale = max(scale, largest(exact), 1e-30)
    rounded = chance_in or actual.dtype
    bound = 2 * error(eager, exact) + FLOOR_EPS[rounded] * torch.finfo(rounded).eps * scale
    found = error(actual, exact)
    if chance_in is None or not is_chance(actual.double() - exact, eager.double() - exact, chance_in, bound):
        demand(found <= bound, f"{name}: error {found:.3g} is above {bound:.3g} ({actual.dtype})")


def is_chance(ours: Tensor, eager: Tensor, dtype: torch.dtype, allowed: float) -> bool:
    """Whether errors in half precision may come from another choice among equal maxima: too large in no more than one
    element of a hundred, or no larger than twice eager's in the root of their mean square."""
    few = (~(ours.abs() <= allowed)).double().mean() <= 0.01
    small = ours.square().mean() <= 4 * eager.square().mean()
    return dtype.itemsize == 2 and bool(ours.isfinite().all() & (few | small))


def run(function: Function, inputs: Inputs, grads: Sequence[Tensor]):
    """Outputs and the gradient of every floating-point input, for the given output gradients."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
    outputs = function(**{k: leaves.get(k) for k in inputs})
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return outputs, dict(zip(leaves, found, strict=True))


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: None if v is None else v.to(dtype) for k, v in inputs.items()}


def assert_equivalent(
    function: Function, reference: Function, inputs: Inputs, grads: Sequence[Tensor], *, chance: bool = False
) -> None:
    """function against reference: outputs and all gradients, by the rule above.

    chance: where a choice among nearly equal maxima may differ, as on any map in half precision: gradients are then
    judged by the coarsest dtype of the inputs, and by `is_chance`.
    """
    actual, actual_grads = run(function, inputs, grads)
    eager, eager_grads = run(reference, inputs, grads)
    exact, exact_grads = run(reference, cast(inputs, torch.float64), [g.double() for g in grads])
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        demand(a.dtype == e.dtype, f"output {i}: {a.dtype}, expected {e.dtype}")
        assert_as_good_as_eager(a, e, x, f"output {i}")
    # A parameter's gradient is a sum over the batch that may cancel; its terms are as large as its fellows' sums.
    terms = max((largest(g) for name, g in exact_grads.items() if name != "x"), default=0.0)
    dtypes = [v.dtype for v in inputs.values() if v is not None]
    full = chance or all(dtype in (torch.float32, torch.float64) for dtype in dtypes)
    chance_in = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if chance else None
    for name, grad in actual_grads.items():
        if exact_grads[name] is None:
            demand(grad is None or not grad.any(), f"gradient of {name}: expected none")
            continue
        demand(grad is not None, f"gradient of {name}: none")
        demand(grad.dtype == eager_grads[name].dtype, f"gradient of {name}: {grad.dtype}, not that of the input")
        scale, what = terms if full else 0.0, f"gradient of {name}"
        assert_as_good_as_eager(grad, eager_grads[name], exact_grads[name], what, scale, chance_in)


LAYOUTS = ("nchw", "channels_last")


def in_layout(x: Tensor, layout: str) -> Tensor:
    """x with channels last in memory, for any spatial rank, or NCHW."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()
