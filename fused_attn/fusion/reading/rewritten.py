"""Whether a forward that was written anew for a module is the module's: on twins of it, by `check.differences`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .capture import never_compiled
from .check import TOLERANCE, Copies, Runner, differences, is_same, put_buffers, random_tensor
from .recognise import channel_guesses
from .twin import twin

#: Parameters of a module up to which it is checked at all, and up to which on more than one map.
MOST, FEW = 2**26, 2**20

#: Sizes of maps that networks take, and of further ones that small modules are tried on.
_SPACES = ((9, 8, 7), (33, 30, 31), (64, 64, 64))
_FURTHER = ((3, (6, 7, 5)), (1, (12, 9, 10)))


class Verdict(NamedTuple):
    """why_not: what keeps a forward from being the module's. differentiable: whether the module's results are, of which
    the gradients are compared too; those of one that writes over what they need are not."""

    why_not: str | None
    differentiable: bool = True


class _Input(NamedTuple):
    """A map that a module takes in both modes, and whether its results can be differentiated in both. last: it has its
    channels last. fixed: the axis of space that its layers want of this size, such as that of frequencies."""

    shape: tuple[int, ...]
    differentiable: bool
    last: bool
    fixed: int | None = None

    def further(self) -> Iterator[tuple[int, ...]]:
        """Others that the module may take."""
        rank, channels = len(self.shape) - 2, self.shape[-1 if self.last else 1]
        for batch, sizes in _FURTHER:
            space = [self.shape[2 + i] if i == self.fixed else n for i, n in enumerate(sizes[:rank])]
            yield _shape(batch, channels, tuple(space), self.last)


def check_rewritten(
    block: nn.Module,
    forward: Callable[..., Any],
    ranks: Sequence[int],
    tolerance: float = TOLERANCE,
    **options: float,
) -> Verdict:
    """Whether forward(twin, x, **options) is twin(x, **options) for maps of these ranks that the module takes.

    Random numbers are drawn from a generator of its own; parts that draw some by an operator that takes none are run as
    in evaluation.

    Raises:
        NoTwin: as in `twin`.
    """
    size = sum(p.numel() for p in block.parameters())
    if size > MOST:
        return Verdict("it is too large to be checked")
    twins = _Twins(block, options)
    inputs = [found for rank in ranks if (found := twins.input_of(rank)) is not None]
    if not inputs:
        return Verdict("it cannot be checked: no map was found that it can be run on, the same at every run")
    for found in inputs:
        more = list(found.further()) if size <= FEW else []
        why = differences(
            (twins.next(), twins.runner(found, lambda module, x: module.forward(x, **options))),
            (twins.next(), twins.runner(found, lambda module, x: forward(module, x, **options))),
            iter([(found.shape, size <= FEW), *((shape, False) for shape in more)]),
            "the forward",
            tolerance,
        )
        if why is not None:
            return Verdict(why)
    return Verdict(None, all(found.differentiable for found in inputs))


class _Twins:
    """Equal twins of a module with random values of a size that layers in a row keep. They share parameters."""

    def __init__(self, block: nn.Module, options: dict[str, float]) -> None:
        self.block, self.options = block, options
        generator = torch.Generator().manual_seed(0)
        self.parameters: dict[int, Tensor | None] = {}
        large = sum(p.numel() for p in block.parameters()) > FEW
        for name, p in block.named_parameters():
            fan = math.prod(p.shape[1:]) if p.dim() > 1 else 1
            spread = math.sqrt(24 / fan) if fan > 1 else 1.5
            value = random_tensor(p.shape, generator, spread=spread, positive=name.endswith("var"))
            # Of a large network those with one axis: they are everywhere, and cost nothing.
            self.parameters[id(p)] = nn.Parameter(value, requires_grad=p.dim() == 1 or not large)
        self.calm: set[str] = set()  # paths of parts that draw random numbers in training

    def next(self, called: Any = None) -> nn.Module:
        tensors = Copies(self.parameters)
        put_buffers(self.block, tensors, torch.Generator().manual_seed(1))
        return twin(self.block, tensors, called)

    def runner(self, found: _Input, run: Callable[[nn.Module, Tensor], Any]) -> Runner:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(found.differentiable), _OwnRandom():
                for path in self.calm:
                    module.get_submodule(path).training = False
                # Not a leaf, so that it may be written into.
                return _as_one(run(module, x * 1))

        return call

    def input_of(self, rank: int) -> _Input | None:
        """The first map that can be run in both modes."""
        guesses = channel_guesses(self.block)
        spaces = [space[: rank - 2] for space in _SPACES]
        for last, space, channels in itertools.product((False, True), spaces, guesses):
            found = self._input(_shape(2, channels, space, last), last, None)
            if found is not None:
                return found
        for axis, size, channels in itertools.product(range(min(rank - 2, 2)), guesses, guesses):
            space = tuple(size if i == axis else n for i, n in enumerate(_SPACES[0][: rank - 2]))
            found = self._input(_shape(2, channels, space, False), False, axis) if rank > 3 else None
            if found is not None:
                return found
        return None

    def _input(self, shape: tuple[int, ...], last: bool, fixed: int | None) -> _Input | None:
        try:
            modes = [self._try(shape, training) for training in (True, False)]
        except Exception:  # of whatever kind: it is somebody's, on a map that it may not take
            return None
        return _Input(shape, all(modes), last, fixed)

    def _try(self, shape: tuple[int, ...], training: bool) -> bool:
        """Whether its result can be differentiated there. Raises what it raises, and where it cannot be compared."""
        paths: dict[nn.Module, str] = {}

        def called(part: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except _Drawn:  # it is the innermost
                if not part.training:
                    raise
                self.calm.add(paths[part])
                part.training = False
                return forward(*args, **kwargs)

        x = random_tensor(shape, torch.Generator().manual_seed(2), spread=5)
        runs = []
        for scale in (1, 1 + _NUDGE):
            module = self.next(called)  # anew: it may count what it is run
            for path, part in module.named_modules():
                paths[part] = path
                part.training = training and path not in self.calm
            runs.append(_values(module, x * scale, self.options))
        (values, differentiable), (others, _) = runs
        if not all(is_same(*pair, _RESPONSE) for pair in zip(values, others, strict=True)):
            raise ValueError("it makes much of rounding")  # as a BatchNorm of two values does
        return differentiable


def _shape(batch: int, channels: int, space: tuple[int, ...], last: bool) -> tuple[int, ...]:
    return (batch, *space, channels) if last else (batch, channels, *space)


#: A relative change of a map, and the change in what is computed from it that rounding is not mistaken for.
_NUDGE, _RESPONSE = 1e-13, 1e-10


def _values(module: nn.Module, x: Tensor, options: dict[str, float]) -> tuple[list[Tensor], bool]:
    """The result and the gradients, and whether there may be any: not where what they need is written over.

    Raises:
        Exception: what the module raises, and where its result is not finite.
    """
    leaves = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    with _OwnRandom():
        y = _as_one(module.forward(x * 1, **options))
    if not y.isfinite().all():
        raise ValueError("its results are not finite")
    try:
        grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True) if y.requires_grad else ()
    except RuntimeError:
        return [y.detach()], False
    return [y.detach(), *(g for g in grads if g is not None)], True


class _Drawn(Exception):
    pass


@never_compiled
class _OwnRandom(TorchDispatchMode):
    """Draws random numbers, the same in every run, from a generator of its own: torch's is everybody's. Raises where an
    operator takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            if not any(a.name == "generator" for a in function._schema.arguments):
                packet = function.overloadpacket
                if "generator" not in packet.overloads():
                    raise _Drawn
                function = packet.generator
            kwargs = {**kwargs, "generator": self.generator}
        return function(*args, **kwargs)


def _as_one(result: Any) -> Tensor:
    """All numbers in what a forward returns, and the sizes of its tensors.

    Raises:
        TypeError: there is something else in it, or no tensor.
    """
    if isinstance(result, Tensor):
        return result
    parts: list[Tensor] = []
    for value in tree_flatten(result)[0]:
        if isinstance(value, Tensor):
            parts += [value.reshape(-1).double(), torch.tensor(value.shape, dtype=torch.float64, device="cpu")]
        elif isinstance(value, (int, float)):
            parts.append(torch.tensor([value], dtype=torch.float64, device="cpu"))
        elif value is not None:
            raise TypeError(f"returns a {type(value).__name__}")
    return torch.cat(parts)
