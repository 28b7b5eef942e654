"""A trial of the backends on one call, in a process that may die of it: first whether each is right, then whether it is
faster than plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional, reference
from ..backends import CANDIDATES, RESIDENT, backend, unavailable
from ..equivalence import LAYOUTS, assert_as_good_as_eager, assert_equivalent, in_layout
from ..ops.common import fresh_memory_by_torch
from ..timing import digits, graph_of, in_turn, interleaved, last_cache, nth, synchronize
from ..verdicts import Verdict, dtype_named
from .calls import Call
from .process import first_line

#: A backend serves where it takes at most this share of plain PyTorch's time by one of the clocks, and by the other no
#: more than its time and what medians differ by from run to run.
FASTER, NOT_SLOWER = 1 / 1.05, 1.02
#: Seconds that the backends of a call are timed by one clock.
BUDGET = 0.15
#: The most copies of a call's maps that are rotated.
COPIES = 512

#: Arguments that are maps, or as large as one; first those in which an op may look for maxima.
_LOOKED_AT = {"x", "pooled", "branches"}
_MAPS = {*_LOOKED_AT, "residual", "gate", "channel", "spatial", "rows", "columns", "query", "key", "value"}
_STATISTICS = {"running_mean", "running_var"}


class Unmeasured(Exception):
    """Nothing was found out, as where the card has no memory left: another time it may be."""


# ---- making a call again ----


class Made(NamedTuple):
    """apply(module): the call as a function of `tensors`, by their names."""

    tensors: dict[str, Tensor]
    apply: Callable[[Any], Callable[..., Tensor | tuple[Tensor, ...]]]


def make(call: Call, device: torch.device, *, sizes: tuple[int, ...] | None = None, layout: str | None = None) -> Made:
    """The call with random tensors. sizes, layout: of its maps, where those of the call are not meant."""
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}

    def build(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [build(v, f"{name}.{i}") for i, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if "callable" in value:
            return _EXCITATIONS[call.function](call)
        root = name.partition(".")[0]
        shape = tuple(value["sizes"])
        if sizes is not None and root in _MAPS:
            shape = _resized(root, shape, call.sizes, sizes)
        tensor = _values(name, shape, generator, device).to(dtype_named(value["dtype"]))
        if root in _STATISTICS:
            statistics[name] = tensor
            return _Name(name)
        dense = tensor.permute(value["order"]).contiguous().permute(_inverse(value["order"]))
        as_map = root in _MAPS and len(shape) == len(call.sizes)
        tensors[name] = in_layout(tensor, layout) if layout is not None and as_map else dense
        return _Name(name)

    arguments = {name: build(value, name) for name, value in call.arguments.items()}

    def apply(module: Any) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        function = getattr(module, call.function)

        def run(**given: Tensor) -> Tensor | tuple[Tensor, ...]:
            double = next(iter(given.values())).dtype == torch.float64
            # They are written into; the truth is found in float64.
            extra = {k: v.to(torch.float64 if double else v.dtype, copy=True) for k, v in statistics.items()}
            # By itself in every run: weights that were cast are kept until its end.
            with torch.autocast(device.type, call.question.dtype) if call.autocast else contextlib.nullcontext():
                found = function(**{k: _with_tensors(v, given | extra) for k, v in arguments.items()})
            # Beside its map a gate with a BatchNorm returns statistics, which no gradient reaches.
            return found[0] if call.function in ("spatial_gate", "cbam") and isinstance(found, tuple) else found

        return run

    return Made(tensors, apply)


class _Name(str):
    """Of a tensor, in its place."""


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_with_tensors(v, tensors) for v in value)
    return tensors[value] if isinstance(value, _Name) else value


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _resized(root: str, shape: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """A map's shape, or that of what is as wide or as long, where x of shape `old` gets the shape `new`."""
    found = [shape[0] * new[0] // old[0], *shape[1:]]
    rank = len(old) - 2
    if len(shape) >= rank + 2:
        for axis in range(-rank, 0):
            collapsed = (root, axis) in (("rows", -1), ("columns", -2))
            if shape[axis] == old[axis] and not collapsed:
                found[axis] = new[axis]
    return tuple(found)


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers such as stand there in networks. A map has clear maxima: which of two nearly equal ones is the
    larger is chance, in eager too."""
    values = torch.randn(shape, generator=generator, device=device)
    root = name.partition(".")[0]
    if root in _LOOKED_AT and len(shape) > 2:
        values.clamp_(-2, 2)
        where = torch.rand(shape, generator=generator, device=device)
        values.add_(where == where.amax(1, keepdim=True), alpha=8)
        flat = where.flatten(2)
        values.add_((flat == flat.amax(2, keepdim=True)).view(shape), alpha=16)
    elif root not in _MAPS and len(shape) > 1:
        values *= math.prod(shape[1:]) ** -0.5  # a weight: by its fan-in
    elif root == "running_var" or name.endswith(".0") or name == "weight":
        values = values.abs() + 0.5
    return values


def _gate_of(call: Call) -> Callable[[Tensor], Tensor]:
    return torch.sigmoid


def _gate_of_two(call: Call) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda mean, variance: (mean + variance).sigmoid()


def _weights_of(call: Call) -> Callable[[Tensor], Tensor]:
    """Of as many branches as there are."""
    branches, paths = call.arguments["branches"], call.arguments.get("paths")
    count = len(branches) if isinstance(branches, list) else paths or branches["sizes"][1]
    return lambda s: torch.stack([s * (i + 1) for i in range(count)], 1).softmax(1)


#: What stands for the excitation that a function is given.
_EXCITATIONS: dict[str, Callable[[Call], Callable[..., Tensor]]] = {
    "norm_gate": _gate_of,
    "context_gate": _gate_of,
    "energy_gate": _gate_of,
    "moments_gate": _gate_of_two,
    "select_with": _weights_of,
}


# ---- right ----


def check_odd(call: Call, training: bool, device: torch.device) -> None:
    """On small maps of odd sizes, in both layouts: from an address that is not aligned, with gradients in the other
    layout; with ties, the gradient one expanded value; with NaN in one place. Raises AssertionError, with what is
    wrong, where results are not as good as plain PyTorch's."""
    rank = len(call.sizes) - 2
    sizes = 3, call.sizes[1], *(3, 5, 7)[-rank:]
    for layout, other in (LAYOUTS, LAYOUTS[::-1]):
        made = make(call, device, sizes=sizes, layout=layout)
        with saying(f"on a {layout} map of {sizes}, not aligned"):
            unaligned = {k: _unaligned(t) for k, t in made.tensors.items()}
            _compare(made._replace(tensors=unaligned), training, functools.partial(_gradient_in, other))
        tied = {k: _with_ties(t) if k.partition(".")[0] in _LOOKED_AT else t for k, t in made.tensors.items()}
        with saying(f"on a {layout} map of {sizes} with ties"):
            _compare(made._replace(tensors=tied), training, lambda y: y.new_ones(()).expand_as(y))
        with saying(f"on a {layout} map of {sizes} with a NaN"):
            holed = {k: _with_nan(t) if _is_map(k, t) else t for k, t in made.tensors.items()}
            _compare_holes(made._replace(tensors=holed))


def check_itself(call: Call, training: bool, device: torch.device) -> None:
    """On maps of its own sizes, twice."""
    made = make(call, device)
    with saying("as it is called"):
        _compare(made, training)
        run = _once(made, functional, _gradients_for(made) if training else None)
        first, second = run(), run()
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise AssertionError("two runs differ")


@contextlib.contextmanager
def saying(where: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as error_:
        raise AssertionError(f"wrong {where}: {error_}") from error_


def _gradient(y: Tensor) -> Tensor:
    """Random; small in float16, whose sums over a large map would overflow in plain PyTorch."""
    return torch.randn_like(y) * (2**-6 if y.dtype == torch.float16 else 1)


def _gradient_in(layout: str, y: Tensor) -> Tensor:
    return in_layout(_gradient(y), layout)


def _is_map(name: str, tensor: Tensor) -> bool:
    return name.partition(".")[0] in (*_LOOKED_AT, "query") and tensor.dim() > 2


def _unaligned(tensor: Tensor) -> Tensor:
    """The same, one element into its storage."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return place[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _with_ties(tensor: Tensor) -> Tensor:
    """Of five values."""
    return tensor.clamp(-1, 1).mul(2).round()


def _with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[tuple(n // 2 for n in tensor.shape)] = torch.nan
    return tensor


def _compare(made: Made, training: bool, grad_for: Callable[[Tensor], Tensor] = _gradient) -> None:
    """By the rule of the tests: outputs, and in training all gradients; in half precision a few gradients of maxima may
    go to another of equal ones."""
    if training:
        ours, theirs = made.apply(functional), made.apply(reference)
        with torch.no_grad():
            outputs = _listed(theirs(**made.tensors))
        torch.manual_seed(0)
        assert_equivalent(ours, theirs, dict(made.tensors), [grad_for(y) for y in outputs], chance=True)
        return
    for i, (actual, eager, truth) in enumerate(_outputs(made)):
        assert_as_good_as_eager(actual, eager, truth, f"output {i}")


def _compare_holes(made: Made) -> None:
    """NaN stands where it does in plain PyTorch, in the same dtype or in float64 (a convolution may spread it)."""
    for i, (actual, eager, truth) in enumerate(_outputs(made)):
        places = [y.isfinite() for y in (actual, eager, truth)]
        if not any(torch.equal(places[0], others) for others in places[1:]):
            raise AssertionError(f"output {i}: NaN or infinity is not where plain PyTorch has it")
        kept = places[0] & places[1] & places[2]
        assert_as_good_as_eager(actual[kept], eager[kept], truth[kept], f"output {i}")


def _outputs(made: Made) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each output, as plain PyTorch gives it, and as it does in float64."""
    exact = {k: t.double() for k, t in made.tensors.items()}
    with torch.no_grad():
        runs = (functional, made.tensors), (reference, made.tensors), (reference, exact)
        return zip(*(_listed(made.apply(module)(**tensors)) for module, tensors in runs), strict=True)


def _listed(found: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Every `empty` tensor starts as NaN, so that an element shows which a kernel forgets to write."""
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # plain PyTorch has operators that are not
    by_torch = fresh_memory_by_torch(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fresh_memory_by_torch(by_torch)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def _gradients_for(made: Made) -> list[Tensor]:
    """Random ones, for the call's outputs."""
    with torch.no_grad():
        return [_gradient(y) for y in _listed(made.apply(reference)(**made.tensors))]


def _once(made: Made, module: Any, grads: Sequence[Tensor] | None) -> Callable[[], list[Tensor]]:
    """What runs the call once: its outputs, and where there are gradients of these those of all inputs."""
    function = made.apply(module)
    if grads is None:

        def infer() -> list[Tensor]:
            with torch.no_grad():
                return _listed(function(**made.tensors))

        return infer
    leaves = {k: t.detach().requires_grad_() for k, t in made.tensors.items()}

    def train() -> list[Tensor]:
        outputs = _listed(function(**leaves))
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        return [y.detach() for y in outputs] + [g for g in found if g is not None]

    return train


# ---- faster ----


def times(call: Call, training: bool, names: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of a call, by backend and clock: by the wall, and on a GPU on the device alone, as a CUDA graph replayed.
    Inputs and outputs are rotated, so that none is in the last cache when it is used again, and the backends take
    turns, each on another copy. On a processor there is one clock."""
    made = make(call, device)
    bytes_ = sum(t.nbytes for k, t in made.tensors.items() if k.partition(".")[0] in _MAPS)
    copies = -(-2 * last_cache(device) // (bytes_ * (4 if training else 2)))  # outputs, and gradients of both
    copies = min(max(copies, len(names)), COPIES)
    sets = [made, *(_copied(made) for _ in range(copies - 1))]
    some = _gradients_for(made) if training else []
    grads = [[_gradient(g) for g in some] if training else None for _ in sets]
    modules = {name: reference if name == "reference" else functional for name in names}
    calls = {
        name: [functools.partial(served, name, _once(each, m, g)) for each, g in zip(sets, grads, strict=True)]
        for name, m in modules.items()
    }
    by_wall = {name: in_turn(of, at * copies // len(names)) for at, (name, of) in enumerate(calls.items())}
    wall = interleaved(by_wall, device, budget=BUDGET, least=5)
    seconds = {name: {"wall": digits(timing.median)} for name, timing in wall.items()}
    if device.type == "cuda":
        try:
            graphs = {"reference": graph_of(functools.partial(nth, calls["reference"]), copies)}
        except RuntimeError:  # it cannot be captured, and there is nothing to compare with
            return seconds
        graphs |= {n: graph_of(functools.partial(nth, of), copies) for n, of in calls.items() if n not in graphs}
        for name, timing in interleaved(graphs, device, budget=BUDGET, least=5).items():
            seconds[name]["device"] = digits(timing.median / copies)
    return seconds


def _copied(made: Made) -> Made:
    """With maps of its own."""
    copied = {k: t.clone() if k.partition(".")[0] in _MAPS else t for k, t in made.tensors.items()}
    return made._replace(tensors=copied)


def served(name: str, call: Callable[[], object]) -> object:
    """The call, served by this backend."""
    with backend(name):
        return call()


def ratios(mine: dict[str, float], plain: dict[str, float]) -> str:
    """How many times as fast as plain PyTorch, in words."""
    names = {"device": "on the device", "wall": "by the wall clock"}
    found = [f"{plain[clock] / mine[clock]:.2f}" + f" {names[clock]}" * (len(mine) > 1) for clock in sorted(mine)]
    return f"{' and '.join(found)} times as fast as plain PyTorch"


def is_faster(mine: dict[str, float], plain: dict[str, float]) -> bool:
    shares = [mine[clock] / plain[clock] for clock in mine]
    return min(shares) <= FASTER and max(shares) <= NOT_SLOWER


def fastest(seconds: dict[str, dict[str, float]]) -> str:
    """The backend that is fastest by both clocks together, of those that are faster than plain PyTorch."""
    faster = [n for n, mine in seconds.items() if n == "reference" or is_faster(mine, seconds["reference"])]
    return min(faster, key=lambda name: math.prod(seconds[name].values()), default="reference")


# ---- both ----


class Judge:
    """Gives the verdicts of a process. told: hears which backends are tried next, before it may die of them."""

    def __init__(self, device: torch.device, told: Callable[[Sequence[str]], None]) -> None:
        self.device, self.told = device, told
        self.odd: dict[tuple[Any, ...], str | None] = {}  # what was found on odd sizes, once for all classes of shape

    def verdict(self, call: Call, training: bool, failed: dict[str, str]) -> Verdict:
        """failed: backends that are not tried, and why.

        Raises:
            Unmeasured: it cannot be said now.
        """
        reasons: dict[str, str] = {}
        for name in CANDIDATES[self.device.type]:
            reason = failed.get(name) or unavailable(name, call.question.op, self.device.type)
            reasons[name] = reason or self.against(call, training, name) or ""
        right = [name for name, reason in reasons.items() if not reason]
        seconds: dict[str, dict[str, float]] = {}
        if right:
            self.told(right)
            seconds = self._when_there_is_memory(times, call, training, ["reference", *right], self.device)
        reasons |= {name: ratios(seconds[name], seconds["reference"]) for name in right}
        best = fastest(seconds)
        anywhere = fastest({name: of for name, of in seconds.items() if name not in RESIDENT})
        against = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        why = against if best == "reference" else reasons[best]
        return Verdict(*call.asked(training), call.room, best, anywhere, why, seconds)

    def against(self, call: Call, training: bool, name: str) -> str | None:
        """Why a backend does not serve a call; None where it is right."""
        self.told([name])
        others = {k: v for k, v in call.arguments.items() if k not in _MAPS}
        key = call.question, call.sizes[1], repr(others), training, name
        if key not in self.odd:
            self.odd[key] = self._found(check_odd, call, training, name)
        if self.odd[key] is not None:
            return self.odd[key]
        self.told([name])  # another step: kernels are compiled for each
        return self._found(check_itself, call, training, name)

    def _found(self, check: Callable[..., None], call: Call, training: bool, name: str) -> str | None:
        try:
            with backend(name), nan_in_fresh_memory():
                self._when_there_is_memory(check, call, training, self.device)
        except AssertionError as error:
            return str(error)
        except Unmeasured:
            raise
        except Exception as error:
            synchronize(self.device)  # raises where the device is lost
            return f"cannot serve it: {first_line(error)}"
        return None

    def _when_there_is_memory(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            found = function(*arguments)
            synchronize(self.device)
            return found
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise Unmeasured(f"no memory: {first_line(error)}") from error
