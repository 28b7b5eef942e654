"""What becomes of a block: known by its class, by what it computes, by its parts, or for its tail."""

from __future__ import annotations

from torch import nn

from ..hosts.registry import TAILS, known_class, recognise
from ..reading.recognise import UNKNOWN
from ..recipes.names import host_of
from ..recipes.recipe import Recipe
from .parents import composite_of, why_left
from .plan import why_bound


def decide(block: nn.Module, tails: bool = False) -> Recipe | str | None:
    """The recipe to fuse a block by; a string: why it is left alone; None: not a block we know. Raises nothing."""
    try:
        return _decide(block, tails)
    except Exception as error:
        return f"cannot be looked at: {type(error).__name__}: {error}" if known_class(host_of(type(block))) else None


def _decide(block: nn.Module, tails: bool) -> Recipe | str | None:
    recipe = recognise(block)
    if recipe is None or isinstance(recipe, str):
        left = why_left(block)
        recipe = composite_of(block) or (left if left is not None and _is_vague(recipe) else recipe)
    if tails and (recipe is None or isinstance(recipe, str)):
        recipe = recognise(block, TAILS) or recipe
    if recipe is None or isinstance(recipe, str):
        return recipe
    return why_bound(block, recipe) or recipe


def _is_vague(recipe: Recipe | str | None) -> bool:
    """Whether a reason says only that a gate is none of the known ones, which any gate may be."""
    return recipe is None or (isinstance(recipe, str) and recipe.startswith(("computes ", UNKNOWN)))
