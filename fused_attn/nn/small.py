"""Blocks of several parts on maps where calls cost more than passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..backends import is_small

Block = TypeVar("Block", bound=type[nn.Module])


def up_to(inference: int, training: int) -> Callable[[Any], bool]:
    """Which maps of so many bytes are small, without gradients and with them."""
    return lambda x: is_small(x, most=training if torch.is_grad_enabled() else inference)


def eager_where_small(
    fits: Callable[[Any], bool] = is_small, also: Callable[[Any, Any], bool] = lambda block, x: False
) -> Callable[[Block], Block]:
    """Decorator of a class whose base is its reference: small maps go through that, with the same parameters.

    What is derived from the class may have changed anything, so that none of it is passed by. fits: which maps do.
    also: which others, of one block.
    """

    def decorate(cls: Block) -> Block:
        plain: Any = cls.__base__
        run = plain.forward

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if type(self) is cls and (fits(x) or also(self, x)):
                block = object.__new__(plain)
                object.__setattr__(block, "__dict__", self.__dict__)
                self = block
            result: Tensor = run(self, x)
            return result

        forward.__doc__ = run.__doc__
        cls.forward = forward
        return cls

    return decorate
