"""fuse and unfuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from .. import backends, qualification
from ..codes import code
from ..ops.remake import SAVES
from ..qualification.calls import typical_calls
from ..qualification.parent import Job
from ..reference import CBAM, BilinearAttention
from .changing.decide import decide
from .changing.graphs import fuse_exported, is_program
from .changing.plan import intact, plan_of
from .changing.swap import restore, set_save, swap
from .recipes.names import host_class
from .recipes.own import FUSED_FORMS, blocks_in
from .recipes.recipe import OwnLayers, Recipe, SplitGate

Model = TypeVar("Model", bound=nn.Module)


class FusionError(ValueError):
    """Raised by `fuse(strict=True)`: a block, or a product of a map and a gate, was left alone."""


def is_own(block: nn.Module) -> bool:
    """Whether it is one of `fused_attn.nn`: fused as it is."""
    return str(type(block).__module__).startswith("fused_attn.nn.") and host_class(block) is None


class Candidate(NamedTuple):
    """A module with its name in the model. found: its `decide`, None where it runs fused already or is one of
    `fused_attn.nn`. served: it is run by a block around it, as long as that one runs fused. left: why it, or something
    that its forward multiplies by a gate, is left alone; None: nothing is."""

    name: str
    block: nn.Module
    found: Recipe | str | None
    served: bool
    left: str | None = None


def candidates(model: nn.Module, tails: bool = False) -> Iterator[Candidate]:
    """Every module but the parts of our own blocks, and of any block that is one op: they are served with it. Where
    such a block runs as it is written, those of its parts that run fused are there too."""
    parts: dict[bool, tuple[str, ...]] = {True: (), False: ()}  # by whether the block around them runs fused
    served = dict(parts)
    for name, module in model.named_modules():
        inside = f"{name}."
        if inside.startswith(parts[True]):
            continue
        plan = plan_of(module)
        done = plan is not None and intact(module, plan)
        runs = done or is_own(module)
        if inside.startswith(parts[False]) and not runs:
            continue
        found = None if runs else decide(module, tails or plan is not None)
        recipe = plan.recipe if plan is not None and done else found
        left = recipe if isinstance(recipe, str) else recipe.left if isinstance(recipe, OwnLayers) else None
        yield Candidate(
            name, module, found, inside.startswith(served[True] if runs else (*served[True], *served[False])), left
        )
        if isinstance(recipe, OwnLayers):
            served[runs] += _within(name, recipe.covers)
        one_op = not (recipe is None or isinstance(recipe, (str, SplitGate, OwnLayers)))
        whole = isinstance(recipe, OwnLayers) and recipe.whole
        if one_op or whole or is_own(module) or isinstance(module, (CBAM, *FUSED_FORMS)):
            parts[runs] += _within(name, _own_parts(module))


def _own_parts(module: nn.Module) -> tuple[str, ...]:
    """Names of those of its parts that are no blocks by themselves."""
    others = blocks_in(module)
    if isinstance(module, BilinearAttention) and not is_own(module):
        others = ("ba",)
    return tuple(name for name in module._modules if name not in others)


def _within(name: str, parts: Iterable[str]) -> tuple[str, ...]:
    """How the names begin of parts of a module, and of what is in them."""
    return tuple(f"{name}.{part}." if name else f"{part}." for part in parts)


def running(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that run fused now, without those that are served by one around them."""
    served: tuple[str, ...] = ()
    for name, module in model.named_modules():
        plan = plan_of(module)
        if f"{name}.".startswith(served) or not (is_own(module) or (plan is not None and intact(module, plan))):
            continue
        yield module
        recipe = None if plan is None else plan.recipe
        if isinstance(recipe, OwnLayers) and not recipe.whole:
            served += _within(name, recipe.covers)
        else:
            served += _within(name, _own_parts(module))


def fuse(model: Model, *, tails: bool = False, save: str = "all", strict: bool = False, qualify: bool = True) -> Model:
    """Make every attention block that is recognised run fused, in place.

    Parameters, buffers, hooks, `state_dict` keys, training mode, dtype and device stay as they are; a fused block
    is an instance of a subclass of its class. What is not exactly recognised is left alone; `explain(model)` lists
    both. What was changed since it was fused runs as it was written, until it is fused again; `unfuse(model)` undoes
    it all. Fuse before `fully_shard` and `torch.compile`.

    Args:
        model: any module, or a block itself; or a program of torch.export, which is left as it is: what is returned is
            another program, with the blocks in its graph fused and the same inputs, open sizes and `state_dict`.
        tails: also fuse what stands around the attention blocks of known networks: BatchNorm, activation, gate, sum
            and activation as one op (`fused_attn.functional.norm_gate`), in training too, and then the other BatchNorms
            of the same residual blocks with their activations. Networks: timm's ResNets, EfficientNets, MobileNetV3s
            and RegNets, torchvision's, and MONAI's SE-ResNets.
        save: what the convolutions of blocks with tails keep for backward. "all": their inputs. "least": where an input
            is what a BatchNorm and the activation or gate behind it gave, how that is made again: in one read of the
            BatchNorm's input, which is kept anyway, and one write. Every second sum in a row of blocks without a
            projection is made again, too. Gradients stay the same to the bit where BatchNorms take the statistics of
            the batch. Tails that are fused already are set to it, too. Inside `torch.compile` this does nothing: there
            the compiler decides what is kept, by its own `torch._functorch.config.activation_memory_budget`.
        strict: raise where a block of a known class, or a product of a map and a gate, was left alone, naming what
            `explain` lists as that; of a program, where what looks like a block was.
        qualify: of a model on a GPU, measure what its blocks call on maps of usual sizes, and have each call served by
            what is right and fastest on that card (see `fused_attn.qualify`). It takes seconds, once a card and
            version. Where `torch.distributed` is initialised all ranks take part, so all of them call `fuse`; False
            leaves it out.

    Returns:
        The model.

    Raises:
        TypeError: model is no `nn.Module`.
        ValueError: save is neither, or "least" without tails, or of a program, which keeps what its user keeps.
        FusionError: with strict, naming the blocks left alone and why; nothing is changed then.
    """
    code(SAVES, "save", save)
    program: Any = model
    if save == "least" and (not tails or is_program(program)):
        what = "a program" if is_program(program) else "tails=False"
        raise ValueError(f"save: expected 'all', which is all there is of {what}; got 'least'")
    if is_program(program):
        left: list[str] = []
        fused: Any = fuse_exported(program, left)
        if strict and left:
            raise FusionError("blocks left alone: " + "; ".join(left))
        return fused
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    again = any(plan_of(block) is not None for block in model.modules())
    decisions = list(candidates(model, tails))
    refused = [f"{c.name or '(the model)'}: {c.left}" for c in decisions if c.left is not None and not c.served]
    if strict and refused:
        raise FusionError("blocks left alone: " + "; ".join(refused))
    _swap(decisions, strict)
    if again:  # a block around one that was planned anew knows another
        _swap(candidates(model, tails), strict)
    if tails:
        for block in model.modules():
            set_save(block, save)
    if qualify:
        _qualify(model)
    else:
        backends.leave_unmeasured()
    return model


def _qualify(model: nn.Module) -> None:
    """Nothing where a backend was asked for, and where torch traces, captures or differentiates this call."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type in qualification.BY_FUSE and backends.forced() is None and qualification.busy() is None:
        calls = typical_calls(model, list(running(model)))
        qualification.settle([Job(*call) for call in calls], device)


def _swap(decisions: Iterable[Candidate], strict: bool) -> None:
    for _, block, recipe, *_ in reversed(list(decisions)):  # what is inside first: a plan says what is in its block
        if recipe is not None and not isinstance(recipe, str):
            try:
                swap(block, recipe)
            except TypeError as error:
                if strict:
                    raise FusionError(f"blocks left alone: {error}") from error


def unfuse(model: Model) -> Model:
    """Give every fused block its original class back; the model is then what it was before `fuse`.

    Raises:
        TypeError: model is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    for block in model.modules():
        restore(block)
    return model
