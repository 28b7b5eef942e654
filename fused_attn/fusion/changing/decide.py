"""What becomes of a block: known by its class, by what it computes, by its parts, or for its tail."""

from __future__ import annotations

from torch import nn

from ..hosts.registry import TAILS, known_class, recognise
from ..reading.recognise import UNKNOWN
from ..reading.statistics import gate_of_statistics
from ..recipes.names import host_of
from ..recipes.recipe import Recipe
from .parents import composite_of, why_left
from .plan import why_bound
from .two_maps import gate_of_two_maps, why_not_written_anew
from .weighted import gate_with_weights


def decide(block: nn.Module, tails: bool = False) -> Recipe | str | None:
    """The recipe to fuse a block by; a string: why it is left alone; None: not a block we know. Raises nothing."""
    try:
        return _decide(block, tails)
    except Exception as error:
        return f"cannot be looked at: {type(error).__name__}: {error}" if known_class(host_of(type(block))) else None


def _decide(block: nn.Module, tails: bool) -> Recipe | str | None:
    recipe = recognise(block)
    if recipe is None or isinstance(recipe, str):
        found = composite_of(block)
        if found is None or found.functions == ("scale",):  # of a product alone, which may be part of something known
            found = gate_of_two_maps(block) or gate_of_statistics(block) or found
        recipe = found or gate_with_weights(block) or _why(block, recipe)
    if tails and (recipe is None or isinstance(recipe, str)):
        recipe = recognise(block, TAILS) or recipe
    if recipe is None or isinstance(recipe, str):
        return recipe
    return why_bound(block, recipe) or recipe


def _why(block: nn.Module, recipe: Recipe | str | None) -> Recipe | str | None:
    """The reason, or that of a product in its forward where it says less."""
    left = why_left(block) if _is_vague(recipe) else None
    return recipe if left is None else why_not_written_anew(block) or left


def _is_vague(recipe: Recipe | str | None) -> bool:
    """Whether a reason says only that a gate is none of the known ones, which any gate may be."""
    return recipe is None or (isinstance(recipe, str) and recipe.startswith(("computes ", UNKNOWN)))
