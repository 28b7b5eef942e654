"""The native library that was built, beside a torch with CUDA and one without: what it needs of others is there."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_attn import backends

from .test_device import standin_of_torch

TORCH = Path(torch.__file__).parent / "lib"
#: Of the compiler's own start-up files, which do without them.
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}

pytestmark = pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR))


def output_of(*command: str | Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_symbol_is_in_a_library_that_it_names():
    """No other is looked up, because torch loads it into a scope of its own: a weak symbol is absent in silence."""
    dynamic = output_of("readelf", "-d", backends.LIBRARY_PATH)
    named = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    libraries = [ctypes.CDLL(str(TORCH / name) if (TORCH / name).exists() else name) for name in named]
    listed = output_of("nm", "-Du", backends.LIBRARY_PATH).splitlines()
    symbols = {line.split()[-1].partition("@")[0] for line in listed}
    assert "torch_call_dispatcher" in symbols
    assert [name for name in symbols - OPTIONAL if not any(hasattr(library, name) for library in libraries)] == []


@pytest.fixture
def limits():
    if not hasattr(torch.ops.fused_attn, "resident_limits"):
        pytest.skip("the native library was built without CUDA")
    return torch.ops.fused_attn.resident_limits


def test_beside_a_torch_without_cuda(limits):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with pytest.raises(RuntimeError, match="fused_attn: this torch has no CUDA"):
        limits(0)


def test_beside_a_torch_with_cuda(limits, tmp_path):
    """Itself, or a stand-in that is loaded as Python loads torch's libraries; what then is missing is a driver."""
    load = f"ctypes.CDLL({str(standin_of_torch(tmp_path))!r})" if torch.version.cuda is None else ""
    code = f"""
import ctypes
{load}
import torch
torch.ops.load_library({str(backends.LIBRARY_PATH)!r})
try:
    print(torch.ops.fused_attn.resident_limits(0))
except RuntimeError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "this torch has no CUDA" not in printed
    assert re.search(r"there is no CUDA driver|this driver serves CUDA|\(\d+, \d+\)", printed), printed
