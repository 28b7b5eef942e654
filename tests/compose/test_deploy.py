"""The native library without Python's part of this package: what a program without Python loads."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_attn import backends, fuse, keep_operators, reference
from fused_attn.ops.common import OPERATORS, OUTDATED, is_defined
from tests.checks import randomised

pytestmark = [
    pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR)),
    pytest.mark.skipif(backends.forced() == "reference", reason="the reference was asked for: there are no operators"),
]

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "deploy" / "main.cpp"
X = torch.arange(2.0 * 3 * 9 * 8).view(2, 3, 9, 8) / 432


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, float]:
    """A folder with a program and a trace that hold operators, and the sum of what they compute."""
    folder = tmp_path_factory.mktemp("saved")
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), reference.CBAM(8, reduction=2), reference.SKConv(8, groups=4)))
    model = fuse(model.float().eval())
    with torch.no_grad(), keep_operators():
        program = torch.export.export(model, (X,))
        trace = torch.jit.trace(program.module(), (X,))
    assert "fused_attn::cbam" in str(trace.inlined_graph)
    torch.export.save(program, folder / "model.pt2")
    torch.jit.save(trace, str(folder / "model.pt"))
    return folder, model(X).sum().item()


def test_the_library_defines_its_operators():
    """With the schemas that Python has: `define` compares them."""
    assert not OUTDATED
    for name in (name for names in OPERATORS.values() for name in names):
        assert is_defined(name, "cpu") and is_defined(name, "cuda")


def test_loaded_without_this_package(saved):
    folder, expected = saved
    code = f"""
import sys, torch
torch.ops.load_library({str(backends.LIBRARY_PATH)!r})
x = torch.arange(2.0 * 3 * 9 * 8).view(2, 3, 9, 8) / 432
with torch.no_grad():
    for model in (torch.jit.load("model.pt"), torch.export.load("model.pt2").module()):
        assert abs(model(x).sum().item() - {expected}) < 1e-3 * abs({expected})
assert "fused_attn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


@pytest.mark.slow
def test_a_compiled_package_without_this_one(tmp_path):
    """Of AOTInductor."""
    block = fuse(reference.SimAM(3)).eval()
    with torch.no_grad(), keep_operators():
        program = torch.export.export(block, (X,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    code = f"""
import sys, torch
torch.ops.load_library({str(backends.LIBRARY_PATH)!r})
x = torch.arange(2.0 * 3 * 9 * 8).view(2, 3, 9, 8) / 432
y = torch._inductor.aoti_load_package("model.pt2")(x)
assert abs(y.sum().item() - {block(X).sum().item()}) < 1e-3
assert "fused_attn" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_this_package_after_the_library():
    """Nothing is defined twice, and the operators are what they are in the other order."""
    code = f"""
import torch
torch.ops.load_library({str(backends.LIBRARY_PATH)!r})
import fused_attn
from fused_attn.ops.common import OUTDATED
op = torch.ops.fused_attn.simam.cpu
assert torch.Tag.pt2_compliant_tag in op.tags and torch.Tag.flexible_layout in op.tags and not OUTDATED
assert set(torch.ops.fused_attn.simam.overloads()) == {{"cpu", "triton", "cuda"}}
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=backends.LIBRARY_PATH.parents[1])


@pytest.mark.slow
def test_from_cpp(saved, tmp_path):
    folder, expected = saved
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    paths = ["-isystem", include, "-isystem", include / "torch/csrc/api/include", f"-L{libraries}"]
    link = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{libraries}"]
    subprocess.run([compiler, "-std=c++20", EXAMPLE, "-o", tmp_path / "deploy", *paths, *link], check=True)
    command = [tmp_path / "deploy", backends.LIBRARY_PATH, folder / "model.pt"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(expected, rel=1e-3)
