"""The numerical check that everything has to pass that runs in place of somebody's code: both in float64 on the CPU,
with random values and with equal ones, results, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.recipe import OwnLayers, Recipe, SplitGate
from ..recipes.run import parameter_paths, parameters_of, run
from .context import OnOneDevice
from .twin import NoTwin, twin

TOLERANCE = 1e-9
#: torch's own backward of hard_sigmoid and hard_swish has its sixths in float32.
TOLERANCE_OF_SIXTHS = 1e-6


#: Batches and spaces of the maps that a block is tried on, of which it has to take the first two.
MAPS = ((2, 6, 5, 4), (3, 7, 9, 3), (1, 1, 3, 2), (2, 4, 4, 4), (2, 1, 1, 1))
#: Never one sample: torch's backward of a BatchNorm in evaluation is then wrong for gradients that lie as those of a
#: transposed product do.
MAPS_OF_ATTENTION = ((2, 6, 5, 4), (3, 7, 9, 3), (2, 1, 3, 2), (2, 4, 4, 4), (2, 1, 1, 1))
EVEN_MAPS = ((2, 6, 4, 4), (3, 8, 10, 2), (2, 2, 4, 2), (2, 4, 4, 4), (2, 2, 2, 2))
Maps = tuple[tuple[int, ...], ...]


def is_same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    scale = max(1.0, b.detach().nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0)
    return torch.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True)


@dataclass
class Run:
    """What one run gave: its result, the gradients of what it was computed from, and the buffers as they are then."""

    result: Tensor
    gradients: list[Tensor]
    buffers: list[Tensor]

    @staticmethod
    def of(function: Callable[[], Tensor], leaves: Sequence[Tensor], buffers: Sequence[Tensor]) -> Run:
        """Raises what the function or its backward raises. The incoming gradient is random, and the same for results of
        the same shape."""
        y = function()
        weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64, device="cpu")
        weights = (weights + 0.5).to(y.dtype)
        grads = torch.autograd.grad(y, leaves, weights, allow_unused=True) if y.requires_grad else [None] * len(leaves)
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        return Run(y.detach(), found, [b.detach().clone() for b in buffers])

    def difference(self, other: Run, tolerance: float = TOLERANCE) -> str | None:
        """What of this run is not as in the other: "result", "gradient" or "buffer"; None: nothing."""
        if not is_same(self.result, other.result, tolerance):
            return "result"
        for what, a, b in (
            ("gradient", self.gradients, other.gradients),
            ("buffer", self.buffers, other.buffers),
        ):
            if len(a) != len(b) or not all(is_same(*pair, tolerance) for pair in zip(a, b, strict=True)):
                return what
        return None


def check_autocast(
    block: nn.Module, make: Callable[[nn.Module], Recipe | str], channels: int, rank: int, maps: Maps = MAPS
) -> str | None:
    """Why a fused form that is right is not the block under autocast, where the dtype of its result depends on how its
    sums are written; None where it is."""
    shape = next(shape for shape, _ in _maps(channels, rank, maps))
    for dtype in (torch.float32, torch.bfloat16):
        results: list[torch.dtype] = []
        for fused in (False, True):
            acting = randomised(block).float()
            recipe = make(acting) if fused else None
            x = torch.ones(shape, dtype=dtype, device="cpu")
            try:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), OnOneDevice("cpu"):
                    if isinstance(recipe, str) or recipe is None:
                        results.append(acting(x).dtype)
                    else:
                        results.append(run(acting, recipe, parameters_of(acting, parameter_paths(recipe)), x).dtype)
            except Exception:
                break
        if len(results) == 1:
            return "raises under autocast when fused"
        if len(set(results)) > 1:
            return "returns another dtype under autocast"
    return None


def random_tensor(
    shape: Sequence[int], generator: torch.Generator, *, spread: float = 1.5, positive: bool = False, ties: bool = False
) -> Tensor:
    """float64, between plus and minus half the spread; whole numbers with ties; positive: from a half up."""
    t = torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    if positive:
        return t + 0.5
    return ((t - 0.5) * spread).round() if ties else (t - 0.5) * spread


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """A twin in float64 on the CPU with random parameters and buffers: those a block starts with are often zeros. Its
    other tensors are copies.

    Raises:
        NoTwin: as in `twin`.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = Copies()
    for name, p in module.named_parameters():
        tensors[id(p)] = nn.Parameter(random_tensor(p.shape, generator, positive=name.endswith("var")))
    put_buffers(module, tensors, generator)
    return twin(module, tensors)


class Copies(dict[int, Tensor | None]):
    """What stands for the tensors of a module, by id; for others, into which it may write, copies."""

    def get(self, key: int, default: Any = None) -> Any:
        if key not in self and isinstance(default, Tensor):
            dtype = torch.float64 if default.is_floating_point() else default.dtype
            self[key] = default.detach().to("cpu", dtype, copy=True)
        return super().get(key, default)


def put_buffers(module: nn.Module, tensors: dict[int, Tensor | None], generator: torch.Generator) -> None:
    """Random ones in place of a module's."""
    for name, b in module.named_buffers():
        if b.is_floating_point():
            tensors[id(b)] = random_tensor(b.shape, generator, positive=name.endswith("var"))
        else:
            tensors[id(b)] = torch.full(b.shape, 3, dtype=b.dtype, device="cpu")


def _maps(channels: int, rank: int, maps: Maps) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Shapes of maps, and whether a block has to take them."""
    for i, (batch, *space) in enumerate(maps):
        yield (batch, channels, *space[:rank]), i < 2


Runner = Callable[[nn.Module, Tensor], Tensor]


def check_block(
    block: nn.Module,
    make: Callable[[nn.Module], Recipe | str],
    channels: int,
    rank: int,
    tolerance: float = TOLERANCE,
    maps: Maps = MAPS,
) -> str | None:
    """Why the fused form of a block is not the block; None where it is."""
    try:
        original, fused = randomised(block), randomised(block)
    except NoTwin as why:
        return str(why)
    recipe = make(fused)
    if isinstance(recipe, str):
        return recipe
    found, paths = recipe, parameter_paths(recipe)

    def run_fused(module: nn.Module, x: Tensor) -> Tensor:
        try:
            return run(module, found, parameters_of(module, paths), x)
        except (TypeError, ValueError):
            if not isinstance(found, (SplitGate, OwnLayers)):
                module(x)  # which then runs in its place: it counts the batch, as a BatchNorm does before it raises
            raise

    return differences(
        (original, lambda m, x: m(x)),
        (fused, run_fused),
        _maps(channels, rank, maps),
        "the known block",
        tolerance,
    )


def differences(
    original: tuple[nn.Module, Runner],
    fused: tuple[nn.Module, Runner],
    shapes: Iterator[tuple[tuple[int, ...], bool]],
    what: str,
    tolerance: float = TOLERANCE,
) -> str | None:
    """Why two modules, each run its own way, are not the same in both modes; None where they are. They are equal twins.
    shapes: of maps, and whether the original has to take them, of which two are tried with equal values too."""
    generator = torch.Generator().manual_seed(1)
    for shape, required in list(shapes):
        for training, ties in ((t, e) for t in (False, True) for e in ((False, True) if required else (False,))):
            x = random_tensor(shape, generator, spread=5, ties=ties)
            mode = "training" if training else "evaluation"
            at = f"in {mode} on {'×'.join(map(str, shape))}"
            expected, actual = (_attempt(module, call, x, training) for module, call in (original, fused))
            if isinstance(expected, str):
                if required:
                    return f"cannot be run {at}: {expected}"
                if isinstance(actual, Run):
                    return f"differs from {what} {at}: it raises {expected}"
                continue
            if isinstance(actual, str):
                return f"differs from {what} {at}: the fused form raises {actual}"
            different = actual.difference(expected, tolerance)
            if different:
                return f"differs from {what} in {mode}: another {different}" + " where values are equal" * ties
    return None


def _attempt(module: nn.Module, call: Runner, x: Tensor, training: bool) -> Run | str:
    """What a run gives, or the name of what it raises."""
    for part in module.modules():
        part.training = training
    x = x.clone().requires_grad_()
    try:
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        with OnOneDevice("cpu"):
            return Run.of(lambda: call(module, x), leaves, list(module.buffers()))
    except Exception as error:
        return type(error).__name__
