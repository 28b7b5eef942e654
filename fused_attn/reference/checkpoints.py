"""Checkpoints of other implementations: their names for our layers, accepted by `load_state_dict`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar

from torch import Tensor

from .block import Block


class OtherNames(Block):
    """A module that loads checkpoints in which its layers or tensors have other names, `other_names[theirs] = ours`.

    Of several names that fit a key the first is taken. Linear weights and those of 1x1 convolutions, equal up to
    trailing axes of size 1, are taken for each other, and so are a LayerNorm's over (C, 1, 1) and over C, and a number
    and a tensor of one. What is saved has our names and shapes.
    """

    other_names: ClassVar[dict[str, str]] = {}

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            for theirs, ours in self.other_names.items():
                found = prefix + theirs
                wanted = prefix + ours + key[len(found) :]
                if (key == found or key.startswith(found + ".")) and wanted not in state_dict:
                    state_dict[wanted] = state_dict.pop(key)
                    break
        for name, parameter in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, Tensor) and _trimmed(tensor) == _trimmed(parameter):
                state_dict[prefix + name] = tensor.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _trimmed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without trailing axes of size 1 after the first; of a number, that of a vector of one."""
    shape = tuple(tensor.shape) or (1,)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
