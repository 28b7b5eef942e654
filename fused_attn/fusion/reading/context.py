"""Where recognition runs: in a thread of its own, so that nothing of the moment has a part in it."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...backends import unforced

T = TypeVar("T")
_inside = threading.local()


def in_its_own_context(function: Callable[[], T]) -> T:
    """What a function returns or raises, run with gradients, without inference mode, autocast, default device, profiler
    or any other of the modes that torch and Python keep by thread, by no backend that was asked for, and without
    warnings: somebody's code would warn of maps that nobody but recognition gives it, or raise where warnings are
    errors."""
    if getattr(_inside, "already", False):
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_inner, function).result()


def _inner(function: Callable[[], T]) -> T:
    _inside.already = True
    with unforced(), _without_warnings():
        try:
            return function()
        except SystemExit as error:  # of somebody's code on a map that it does not take; the program goes on
            raise RuntimeError("it exits") from error


_counting = threading.Lock()
_silent: list[warnings.catch_warnings] = []  # one entry a thread that is inside; the first holds the filters of before


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """None but the library's own. Filters are the process's, or the thread's where Python is so built."""
    if getattr(sys.flags, "context_aware_warnings", False):
        with warnings.catch_warnings():
            _ignore()
            yield
        return
    with _counting:
        _silent.append(warnings.catch_warnings())
        if len(_silent) == 1:
            _silent[0].__enter__()
            _ignore()
    try:
        yield
    finally:
        with _counting:
            if len(_silent) == 1:
                _silent[0].__exit__(None, None, None)
            _silent.pop()


def _ignore() -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", message="fused_attn: ")


class OnOneDevice(TorchFunctionMode):
    """What code puts on a GPU stays, or is made, on this device: the authors of CCNet make a mask with `.cuda()`,
    wherever the map is. moved(tensor): is told of those that stay."""

    def __init__(self, device: str, moved: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self.device, self.moved = device, moved

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.cuda or (function is Tensor.to and len(args) == 2 and _is_gpu(args[1])):
            if self.moved is not None:
                self.moved(args[0])
            return args[0]
        if _is_gpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": self.device}
        return function(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
