"""Stand-ins for somebody's modules, so that their code can be run without anything of theirs being changed by it.

A twin has the class and the attributes of the module it stands for, but tensors, containers, parts and hooks of its
own. Nothing is called to make it: neither `__init__` nor what the class does to be copied.
"""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..recipes.names import host_of

#: called(part, forward, args, kwargs) runs a part of a twin; what it returns is the part's result.
Called = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: What every module has, without anything in it.
STATE: dict[str, Any] = dict(nn.Module().__dict__)
_OWN = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, set, frozenset, dict, collections.OrderedDict, collections.deque)


class NoTwin(Exception):
    """The module cannot be stood in for; the message says why."""


def twin(module: nn.Module, tensors: Mapping[int, Tensor | None], called: Called | None = None) -> nn.Module:
    """A stand-in for a module and all that is in it.

    Args:
        tensors: id of a parameter or buffer -> what stands for it; others are kept.
        called: runs each part instead of its call, hooks and those of all modules left out.

    Raises:
        NoTwin: a part is compiled (TorchScript), not initialised yet, or its class does not let instances be made.
    """
    return _Twins(tensors, called).of_module(module)


class _Twins:
    def __init__(self, tensors: Mapping[int, Tensor | None], called: Called | None) -> None:
        self.tensors, self.called = tensors, called
        self.known: dict[int, Any] = {}
        self.keep: list[Any] = []  # what `known` has by id

    def of_module(self, module: nn.Module) -> nn.Module:
        if id(module) in self.known:
            found: nn.Module = self.known[id(module)]
            return found
        if isinstance(module, torch.jit.ScriptModule):
            raise NoTwin("a part of it is TorchScript")
        cls = host_of(type(module))
        try:
            new: nn.Module = object.__new__(cls)
        except TypeError as error:
            raise NoTwin(f"a part of it is a {cls.__name__}, which cannot be stood in for") from error
        self.known[id(module)] = new
        self.keep.append(module)
        state = new.__dict__
        state.update({key: type(value)() if isinstance(value, dict) else value for key, value in STATE.items()})
        for key, value in list(module.__dict__.items()):
            if key not in STATE and not key.startswith("_fused_attn") and key != "_compiled_call_impl":
                state[key] = self.of(value)
        state["training"] = module.training
        for place in _OWN:
            state[place] = {name: self.of(value) for name, value in module.__dict__[place].items()}
        state["_call_impl"] = functools.partial(self._call, new)
        return new

    def _call(self, new: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.called is None:
            return new.forward(*args, **kwargs)
        return self.called(new, new.forward, args, kwargs)

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if is_lazy(value):
                raise NoTwin("it is not initialised yet")
            return self.tensors.get(id(value), value)
        if isinstance(value, nn.Module):
            return self.of_module(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {k: self.of(v) for k, v in value.keywords.items()}
            return functools.partial(self.of(value.func), *map(self.of, value.args), **keywords)
        if type(value) not in _CONTAINERS:
            return value
        if id(value) not in self.known:
            self.keep.append(value)
            self._fill(value)
        return self.known[id(value)]

    def _fill(self, value: Any) -> None:
        if isinstance(value, dict):
            self.known[id(value)] = new = type(value)()
            new.update((k, self.of(v)) for k, v in value.items())
        else:
            self.known[id(value)] = value  # one that has itself in it
            self.known[id(value)] = type(value)(map(self.of, value))
