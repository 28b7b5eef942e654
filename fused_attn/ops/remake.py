"""What a layer would keep of a map for its backward, made again there.

A convolution keeps its input. Where that is the y of a `norm_gate(save="least")`, `through` has it keep a `Remake`: the
saved inputs of the operator that y came from, which are kept for the gradient of that anyway, and one read and one
write make y again, bit for bit, once for all layers that would have kept it. Graphs, their versions and hooks are as
they would be: autograd gives what it unpacks its place in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

#: What of maps is kept for backward: those that every layer keeps, or what the least of them are made from.
SAVES = {"all": 0, "least": 1}

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _outer() -> Hooks | None:
    """The hooks (pack, unpack) for what autograd saves here: those of a checkpoint, of whoever counts or offloads."""
    found: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return found


class Remake:
    """make: from the tensors saved by `node`, an autograd node that the map y comes from, to y."""

    def __init__(self, y: Tensor, node: Any, make: Callable[..., Tensor]) -> None:
        self.version, self.node, self.make = y._version, node, make
        self.keepers = 0  # how many keep this in place of the map
        self.hooks = _outer()
        self._left = 0
        self._made: Tensor | None = None

    def __call__(self) -> Tensor:
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self.make(*self.node.saved_tensors)
            self._left = self.keepers
        self._left -= 1
        self._made = made if self._left > 0 else None
        return made

    def drop(self) -> None:
        """What was made for a keeper that did not come."""
        self._made = None


def _remake_of(y: Tensor) -> Remake | None:
    """What makes this map again, unless layers here keep what they keep by other hooks: a checkpoint that is run again
    has its inputs, but not what they came from."""
    if torch.compiler.is_compiling() or y.grad_fn is None:
        return None
    found: Remake | None = getattr(y.grad_fn, "remake", None)
    if found is None:
        return None
    now = _outer()
    same = now is found.hooks or (now is not None and found.hooks is not None and now[0] is found.hooks[0])
    allowed: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return found if same and allowed else None


def is_kept(y: Tensor) -> bool:
    """Whether layers that were given this map by `through` kept it, if they keep their inputs at all."""
    remake = _remake_of(y)
    return remake is None or remake.keepers == 0


class _Unhooked:
    """A tensor as autograd keeps it where nobody hooks it: whoever has written into it since is told so."""

    def __init__(self, tensor: Tensor) -> None:
        # Not itself: an operator's own result would hold the operator that holds it.
        self.tensor, self.version = tensor.detach(), tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation:"
                f" [{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version};"
                f" expected version {self.version} instead"
            )
        return self.tensor


class _Packed:
    """What the hooks around these have made of a tensor."""

    def __init__(self, tensor: Tensor, hooks: Hooks) -> None:
        self.packed, self.unpack = hooks[0](tensor), hooks[1]

    def __call__(self) -> Tensor:
        return self.unpack(self.packed)


def _place(y: Tensor) -> tuple[Any, ...]:
    return y.untyped_storage()._cdata, y.storage_offset(), y.dtype, y.shape, y.stride()


def through(layer: nn.Module, y: Tensor) -> Tensor:
    """layer(y), which keeps of y how it is made again, where that is known."""
    remake = _remake_of(y)
    if remake is None or _torch_module._global_forward_pre_hooks:
        return layer(y)
    for part in layer.modules():
        if part._forward_pre_hooks:  # who sees y before the layer does may write into its values past autograd
            return layer(y)
    found, outer = remake, remake.hooks
    place = _place(y)

    def pack(t: Tensor) -> Callable[[], Tensor]:
        if _place(t) == place and t._version == found.version:  # else it is another, or was written into
            found.keepers += 1
            return found
        return _Unhooked(t) if outer is None else _Packed(t, outer)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept()):
        return layer(y)
