"""Where recognition runs: in a thread of its own, so that nothing of the moment has a part in it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

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
        return function()
