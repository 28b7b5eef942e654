"""Checkpoints of other implementations: their names for our layers, accepted by `load_state_dict`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar

from torch import Tensor, nn


class OtherNames(nn.Module):
    """A module that loads checkpoints in which its layers have other names, `other_names[theirs] = ours`.

    Linear weights and those of 1x1 convolutions, equal up to trailing axes of size 1, are taken for each other, and a
    LayerNorm's over (C, 1, 1) for those over C.
    What is saved has our names and shapes.
    """

    other_names: ClassVar[dict[str, str]] = {}

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            for theirs, ours in self.other_names.items():
                found = f"{prefix}{theirs}."
                wanted = f"{prefix}{ours}.{key[len(found) :]}"
                if key.startswith(found) and wanted not in state_dict:
                    state_dict[wanted] = state_dict.pop(key)
        for name, parameter in self.named_parameters():
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, Tensor) and _trimmed(tensor) == _trimmed(parameter):
                state_dict[prefix + name] = tensor.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _trimmed(tensor: Tensor) -> tuple[int, ...]:
    """The shape without trailing axes of size 1 after the first."""
    shape = tuple(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
