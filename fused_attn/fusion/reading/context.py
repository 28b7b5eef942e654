"""Where recognition runs: in a thread of its own, so that nothing of the moment has a part in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
    or any other of the modes that torch and Python keep by thread, and by no backend that was asked for."""
    if getattr(_inside, "already", False):
        return function()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_inner, function).result()


def _inner(function: Callable[[], T]) -> T:
    _inside.already = True
    with unforced():
        try:
            return function()
        except SystemExit as error:  # of somebody's code on a map that it does not take; the program goes on
            raise RuntimeError("it exits") from error


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
