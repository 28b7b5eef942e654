"""What the modules of `fused_attn.reference` and `fused_attn.nn` have in common."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class Block(nn.Module):
    """A block that TorchScript's compiler refuses, with words of its own: options that a forward branches on, functions
    with keywords. torch.jit.script asks every module of a model for `__prepare_scriptable__` before it compiles any."""

    def __prepare_scriptable__(self) -> NoReturn:
        """
        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"torch.jit.script takes no {type(self).__name__} of fused_attn, fused or not: use torch.jit.trace, which "
            "gives PyTorch's own operators, or torch.export"
        )
