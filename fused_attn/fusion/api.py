"""fuse and unfuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

from ..reference import CBAM
from .registry import FUSED_FORMS, OwnLayers, Recipe, SplitGate, recognise, recognise_with_tail
from .swap import PLAN, bypassed_hooks, host_class, refuse_sharded, restore, swap

Model = TypeVar("Model", bound=nn.Module)


class FusionError(ValueError):
    """Raised by `fuse(strict=True)`: a known block was left alone."""


def decide(block: nn.Module, tails: bool = False) -> Recipe | str | None:
    """The recipe to fuse a block by; a string: why it is left alone; None: not a block we know."""
    recipe = recognise_with_tail(block) if tails else recognise(block)
    if recipe is not None and not isinstance(recipe, str):
        hooked = bypassed_hooks(block, recipe)
        if hooked is not None:
            return f"{hooked} carries a hook or a forward of its own, which the fused block would skip"
    return recipe


def is_own(block: nn.Module) -> bool:
    """Whether it is one of `fused_attn.nn`: fused as it is."""
    return type(block).__module__.startswith("fused_attn.nn.")


def candidates(model: nn.Module, tails: bool = False) -> Iterator[tuple[str, nn.Module, Recipe | str | None]]:
    """Every module and, where it is neither fused nor one of `fused_attn.nn`, its `decide`. The parts of
    our own blocks, and of any block that is one op, are left out: they are served with it."""
    parts: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if f"{name}.".startswith(parts):
            continue
        done = is_own(module) or host_class(module) is not None
        found = None if done else decide(module, tails)
        yield name, module, found
        recipe = module.__dict__[PLAN].recipe if host_class(module) is not None else found
        one_op = not (recipe is None or isinstance(recipe, (str, SplitGate, OwnLayers)))
        one_op = one_op or (isinstance(recipe, OwnLayers) and recipe.whole)
        if one_op or is_own(module) or isinstance(module, (CBAM, *FUSED_FORMS)):
            covered: Iterable[str] = dict(module.named_children())
        else:
            covered = recipe.covers if isinstance(recipe, OwnLayers) else ()
        parts += tuple(f"{name}.{part}." if name else f"{part}." for part in covered)


def fuse(model: Model, *, tails: bool = False, strict: bool = False) -> Model:
    """Make every attention block that is recognised run fused, in place.

    Parameters, buffers, hooks, `state_dict` keys, training mode, dtype and device stay as they are; a fused block
    is an instance of a subclass of its class. What is not exactly recognised is left alone; `explain(model)` lists
    both. Fusing again changes nothing; `unfuse(model)` undoes it. Fuse before `fully_shard` and `torch.compile`.

    Args:
        model: any module, or a block itself; or a program of torch.export, which is left as it is: what is returned is
            another program, with the blocks in its graph fused and the same inputs, open sizes and `state_dict`.
        tails: also fuse what stands around the attention blocks of known networks: BatchNorm, activation, gate, sum
            and activation as one op (`fused_attn.functional.norm_gate`), in training too, and then the other BatchNorms
            of the same residual blocks with their activations. Networks: timm's ResNets, EfficientNets, MobileNetV3s
            and RegNets, torchvision's, and MONAI's SE-ResNets.
        strict: raise where a block of a known class was left alone; of a program, where what looks like a block was.

    Returns:
        The model.

    Raises:
        TypeError: model is no `nn.Module`.
        FusionError: with strict, naming the blocks left alone and why; nothing is changed then.
    """
    if type(model).__module__ == "torch.export.exported_program":
        from .structure.compiled import fuse_exported

        left: list[str] = []
        fused = fuse_exported(model, left)  # type: ignore[arg-type]
        if strict and left:
            raise FusionError("blocks left alone: " + "; ".join(left))
        return fused  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    decisions = list(candidates(model, tails))
    refused = [f"{name or '(the model)'}: {why}" for name, _, why in decisions if isinstance(why, str)]
    if strict and refused:
        raise FusionError("blocks left alone: " + "; ".join(refused))
    for _, block, recipe in reversed(decisions):  # what is inside first: the plan of a block says what is in it
        if recipe is not None and not isinstance(recipe, str):
            swap(block, recipe)
    return model


def unfuse(model: Model) -> Model:
    """Give every fused block its original class back; the model is then what it was before `fuse`.

    Raises:
        TypeError: model is no `nn.Module`.
        RuntimeError: it was sharded (fully_shard) after it was fused; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    for block in model.modules():
        refuse_sharded(block)
    for block in model.modules():
        restore(block)
    return model
