"""A driver for Triton where there is no GPU: its host side runs as it would for an sm_90 or another card, and launches
are only noted.

For a process without TRITON_INTERPRET, under which Triton has no host side.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fused_attn
from fused_attn import backends, kernels
from fused_attn.kernels import maps
from fused_attn.ops.common import KERNELS, LIBRARY, OPERATORS, kernel_of

MULTIPROCESSORS = 132  # an H100's
SHARED_MEMORY = 227 << 10
UNSERVED = ("position_attention", "spatial_logits")  # no Triton kernels


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Utilities:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": MULTIPROCESSORS}


class StandIn(DriverBase):
    """Device 0, on which nothing runs. launches: what was launched on it; None: not noted, which would take time.

    asked: by what tells them apart, (kernel, signature, constants, options, attributes) of what was asked for.
    """

    def __init__(self, capability: int = 90) -> None:
        super().__init__()
        self.capability = capability
        self.asked: dict[Any, tuple[Any, ...]] = {}
        self.launches: list[Launch] | None = []
        self.compiled: dict[str, set[str]] = {}  # by kernel, what was asked for
        self.utils = _Utilities()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher(self, name: str) -> Any:
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            if enter is not None:
                enter(launch_metadata)
            if self.launches is not None:
                self.launches.append(Launch(name, (x, y, z), arguments))

        return launch

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launcher(source.fn.__name__)

    def variants(self) -> int:
        return sum(map(len, self.compiled.values()))


class Uncompiled(CompiledKernel):
    """Stands for a compiled kernel."""

    def __init__(self, run: Any) -> None:
        self.module, self.function, self.packed_metadata, self._run = 1, 1, (), run
        self.src, self.name, self._module_pid = None, "", None


@contextlib.contextmanager
def stand_in(
    *, compiles: bool = False, capability: int = 90, multiprocessors: int = MULTIPROCESSORS
) -> Iterator[StandIn]:
    """Within it the backend "triton" serves tensors on the CPU, and within `OnMeta`, too, such as have no numbers.

    compiles: kernels are compiled for the card; else only their variants are counted.
    """
    standing, compile_it = StandIn(capability), JITFunction._do_compile

    def counted(self, key, signature, device, constexprs, options, attrs, warmup):
        standing.compiled.setdefault(self.__name__, set()).add(key)
        standing.asked[self.__name__, key] = self, signature, constexprs, options, attrs
        if compiles:
            return compile_it(self, key, signature, device, constexprs, options, attrs, warmup)
        kernel = self.device_caches[device][0][key] = Uncompiled(standing.launcher(self.__name__))
        return kernel

    driver.set_active(standing)
    forget_kernels()
    before, of_device = dict(backends.UNAVAILABLE), maps.multiprocessors
    registered = torch.library.Library("fused_attn", "IMPL")
    JITFunction._do_compile, maps.multiprocessors = counted, lambda device: multiprocessors
    try:
        for module, names in OPERATORS.items():
            if module in UNSERVED:
                continue
            for name in names:
                KERNELS[name] = kernel_of(module, name)
                registered.impl(f"{name}.triton", KERNELS[name], "CPU")
        for name, op, device in before:
            if name == "triton" and op not in UNSERVED:
                backends.UNAVAILABLE[name, op, device] = backends.UNAVAILABLE[name, op, "meta"] = None
        with fused_attn.backend("triton"):
            yield standing
    finally:
        JITFunction._do_compile, maps.multiprocessors = compile_it, of_device
        backends.UNAVAILABLE.clear()
        backends.UNAVAILABLE.update(before)
        registered._destroy()
        KERNELS.clear()


class OnMeta(TorchDispatchMode):
    """Operators on meta tensors run their host side, not their fake kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == LIBRARY.ns and func._overloadname == "triton" and func._opname in KERNELS:
            return KERNELS[func._opname](*args)
        return func(*args, **(kwargs or {}))


def forget_kernels() -> None:
    """What Triton has compiled in this process."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        for kernel in vars(importlib.import_module(module.name)).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
