"""The products of a map and a gate that a forward runs, each with the module whose code it stands in."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.addcmul.default, aten.addcmul_.default)
#: They take a tensor for its shape, or say nothing of what is in it.
_FACTORIES = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
#: What a tensor comes from is seen through these.
_VIEWS = ("view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute", "transpose", "clone", "slice")
#: A map times one over its deviation is normalised, not gated.
_NORMALISING = ("rsqrt", "reciprocal")


class Product(NamedTuple):
    """Where it stands (the name of the module), and the shapes of map and gate."""

    name: str
    map: tuple[int, ...]
    gate: tuple[int, ...]


class Products(TorchDispatchMode):
    """Lists the products of a map that comes from the inputs with a smaller tensor that comes from them, too, spread
    over axes other than the batch's; and counts the fused operators that run, by name.

    Tensors are known by their storages, which are kept until the end, so that no address is met twice.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.found: list[Product] = []
        self.operators: Counter[str] = Counter()
        self.kept: dict[int, tuple[Tensor, str]] = {}  # of what comes from the inputs: by which operator
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self.kept[_storage(tensor)] = (tensor, "")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        if function.namespace == "fused_attn":
            self.operators[name] += 1
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        depends = [t for t in given if _storage(t) in self.kept]
        if not depends or name.startswith(_FACTORIES):
            return results
        if function in _PRODUCTS and len(depends) > 1:
            self._add(results, *args[-2:])
        origin = self.kept[_storage(depends[0])][1] if name in _VIEWS else name
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self.kept[_storage(tensor)] = (tensor, origin)
        return results

    def _add(self, result: Tensor, left: Any, right: Any) -> None:
        for map_, gate in ((left, right), (right, left)):
            if _is_gate_of(map_, gate, result) and self.kept.get(_storage(gate), (None, ""))[1] not in _NORMALISING:
                self.found.append(Product(self._where(), tuple(map_.shape), _own_shape(gate)))
                return

    def _where(self) -> str:
        """The innermost module whose method is running."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            name = self.names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
            frame = frame.f_back
        return ""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _own_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape before it was expanded."""
    return tuple(1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_gate_of(map_: Any, gate: Any, result: Tensor) -> bool:
    if not (isinstance(map_, Tensor) and isinstance(gate, Tensor) and map_.shape == result.shape and map_.dim() > 2):
        return False
    own = _own_shape(gate)
    own = (1,) * (map_.dim() - len(own)) + own
    spread = any(mine == 1 < theirs for mine, theirs in zip(own[1:], map_.shape[1:], strict=True))
    return spread and max(own[1:]) > 1 and map_.is_floating_point() and 0 not in _own_shape(map_)[1:]


def products_of(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Product], Counter[str]]:
    """Those of one forward without gradients, in the mode that the model is in; and the fused operators that ran."""
    with torch.no_grad(), Products(model, inputs) as mode:
        model(*inputs)
    return mode.found, mode.operators
