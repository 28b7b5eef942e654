"""One network: the gates that it runs, which of them fuse takes, and whether the values and gradients stay."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fused_attn import explain, fuse
from fused_attn.backends import small_as_large
from fused_attn.fusion.report import Report, Row
from fused_attn.qualification.process import first_line

from .products import Product, products_of

Inputs = tuple[Any, ...]
Results = dict[str, Tensor]
#: Times what eager itself makes of an input moved by one unit in the last place: in training a BatchNorm over a few
#: values amplifies rounding by many orders.
FACTOR = 30.0
#: Times eager's error in float32, on the input and on one moved by a unit in the last place: draws of a random figure.
FACTOR_OF_FLOAT32 = 4.0
#: Of the largest value of its sort. A ReLU that decides otherwise at a rounding is worth up to a hundredth of the
#: largest gradient in float32: so far does eager part from itself.
FLOORS: dict[torch.dtype, dict[str, float]] = {torch.float64: {}, torch.float32: {"gradient": 1e-2}}
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-5}
SILENT = "nothing is said of it"


@small_as_large()  # what is recognised is asked, not what is faster on images as small as these
def measure(build: Callable[[], tuple[nn.Module, Inputs]], values: bool = True) -> dict[str, Any]:
    """A network's row. values: compare them, too. Raises what the network raises."""
    torch.manual_seed(0)
    model, inputs = build()
    prepare(model)
    model.eval()
    fused = fuse(copy.deepcopy(model))
    report = explain(fused)
    eager, _ = products_of(copy.deepcopy(model), inputs)
    left, operators = products_of(copy.deepcopy(fused), inputs)
    training = [len(products_of(_training(copy.deepcopy(m)), inputs)[0]) for m in (model, fused)]
    names = [row.name for row in report if row.fused]
    row = {
        "gates": len(eager),
        "fused": len(eager) - len(left),
        "gates in training": training[0],
        "fused in training": training[0] - training[1],
        "left": reasons(left, report),
        "blocks": len(names),
        "operators": operators.total(),
        "called fused": sorted({p.name or "(the model)" for p in left} & {r.name for r in report if is_whole(r)}),
    }
    with_tails = fuse(copy.deepcopy(model), tails=True)
    row["tails"] = sum(n for name, n in products_of(copy.deepcopy(with_tails), inputs)[1].items() if "norm" in name)
    if values:
        copies = {"": fused, "tails: ": with_tails}
        row["wrong"] = [what for training in (False, True) for what in differences(model, copies, inputs, training)]
    return row


def _training(model: nn.Module) -> nn.Module:
    model.train()  # some return nothing
    return model


def prepare(model: nn.Module) -> None:
    """No chance in it, and no BatchNorm that hides what comes before it: some start at 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in (
            "drop_prob",
            "drop_rate",
            "dropout",
            "drop_path_prob",
            "_drop_rate",
            "dropout_rate",
            "drop_connect_rate",
        ):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def is_whole(row: Row) -> bool:
    """Whether `explain` says that a block runs fused, and names no case of this call in which it does not."""
    return row.fused and " is written where " not in row.reason


def reasons(left: list[Product], report: Report) -> list[dict[str, Any]]:
    """What is left by module, with what `explain` says of it or of what is around it."""
    said = {row.name: row.reason for row in report if not is_whole(row)}
    counts: Counter[tuple[str, str]] = Counter()
    for product in left:
        around = product.name
        while around not in said and around:
            around = around.rpartition(".")[0]
        counts[product.name, said.get(around or "(the model)", SILENT)] += 1
    return [{"name": name or "(the model)", "reason": reason, "count": n} for (name, reason), n in counts.items()]


def differences(model: nn.Module, copies: dict[str, nn.Module], inputs: Inputs, training: bool) -> Iterator[str]:
    """What of outputs, gradients and buffers is not the network's own, by mode and dtype."""
    mode = "training" if training else "evaluation"
    doubles = _cast(inputs, torch.float64)
    exact = _results(copy.deepcopy(model).double(), doubles, training)
    moved = _results(copy.deepcopy(model).double(), _moved(doubles), training)
    singles = [_results(copy.deepcopy(model), x, training) for x in (inputs, _moved(inputs))]
    for kind, fused in copies.items():
        found = _results(copy.deepcopy(fused).double(), doubles, training)
        for name, value, bound in _compared(found, exact, [moved], FACTOR, torch.float64):
            yield f"{kind}float64, {mode}: {name} is off by {value:.1e} where {bound:.1e} may be"
        found = _results(copy.deepcopy(fused), inputs, training)
        for name, value, bound in _compared(found, exact, singles, FACTOR_OF_FLOAT32, torch.float32):
            yield f"{kind}float32, {mode}: {name} is off by {value:.1e} where {bound:.1e} may be"


def _compared(
    found: Results, exact: Results, others: list[Results], factor: float, dtype: torch.dtype
) -> Iterator[tuple[str, float, float]]:
    """The worst tensor of each sort whose error is above so many times the others' and the floor."""
    scales: Counter[str] = Counter()
    for name, tensor in exact.items():
        scales[_sort(name)] = max(scales[_sort(name)], _largest(tensor))  # type: ignore[assignment]
    worst: dict[str, tuple[float, str, float, float]] = {}
    for name, tensor in exact.items():
        if name not in found or found[name].shape != tensor.shape:
            yield f"{name}, which is not there or of another shape", math.nan, 0.0
            continue
        floor = FLOORS[dtype].get(_sort(name), FLOOR[dtype])
        error = _largest(found[name].double() - tensor)
        bound = factor * max(_largest(other[name].double() - tensor) for other in others) + floor * scales[_sort(name)]
        if not error <= bound:
            worst[_sort(name)] = max(worst.get(_sort(name), (0.0, "", 0.0, 0.0)), (error / bound, name, error, bound))
    yield from ((name, error, bound) for _, name, error, bound in worst.values())


def _sort(name: str) -> str:
    return name.split(" ")[0]


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _results(model: nn.Module, inputs: Inputs, training: bool) -> Results:
    """Outputs, the gradients of a random sum of them, and buffers after it."""
    model.train(training)
    leaves = tuple(x.detach().clone().requires_grad_() if _is_real(x) else x for x in inputs)
    torch.manual_seed(1)
    outputs = [t for t in tree_leaves(model(*leaves)) if _is_real(t)]
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    sums = [(t * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    wanted = {f"gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad}
    wanted |= {f"gradient of input {i}": x for i, x in enumerate(leaves) if _is_real(x)}
    grads = torch.autograd.grad(sum(sums), list(wanted.values()), allow_unused=True) if sums else [None] * len(wanted)
    results = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    results |= {name: g for name, g in zip(wanted, grads, strict=True) if g is not None}
    results |= {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers() if _is_real(b)}
    return results


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(x.to(dtype) if _is_real(x) else x for x in inputs)


def _moved(inputs: Inputs) -> Inputs:
    return tuple(torch.nextafter(x, torch.full_like(x, torch.inf)) if _is_real(x) else x for x in inputs)


def failed(error: BaseException) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {first_line(error)}"}
