"""Which backend serves a call, and that it says why not another."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fused_attn
from fused_attn import backends, functional
from fused_attn.ops.common import OPERATORS
from tests.checks import random


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_backend_names_are_checked():
    expected = "backend: expected one of reference, cpu, triton, cuda; got 'gpu'"
    with pytest.raises(ValueError, match=expected), fused_attn.backend("gpu"):
        pass


def test_a_backend_that_cannot_serve_says_why():
    with fused_attn.backend("cuda"), pytest.raises(RuntimeError, match="serves cuda tensors only"):
        functional.channel_gate(random(1, 4, 2, 2))
    with fused_attn.backend("triton"):
        if os.environ.get("TRITON_INTERPRET") == "1":
            functional.squeeze(random(1, 4, 2, 2))
        else:
            with pytest.raises(RuntimeError, match="triton"):
                functional.squeeze(random(1, 4, 2, 2))


def test_what_a_backend_has_no_kernel_for(monkeypatch):
    """It is not chosen, and says so when it is asked for."""
    x = random(1, 4, 2, 2)
    for name, call in {
        "scale/space": lambda: functional.scale(x, random(1, 1, 2, 2)),
        "channel_pool": lambda: functional.channel_pool(x),
    }.items():
        assert backends.MISSING["cuda", name] == backends.unavailable("cuda", name, "cuda")
        with fused_attn.backend("cuda"), pytest.raises(RuntimeError, match=f"cannot serve {name} on cpu"):
            call()
        monkeypatch.setitem(backends.SHIPPED, (name, "cuda"), ("cuda", "measured"))
        assert backends.default(name, "cuda") == ("reference", backends.MISSING["cuda", name])


def test_a_thread_free_of_the_forced_backend():
    """It alone, and only as long as it says so."""
    x, ready, done, found = random(1, 4, 2, 2), threading.Event(), threading.Event(), {}
    usual = backends.choose("cbam/batch_norm", x)

    def work():
        with backends.unforced():
            found["free"] = backends.choose("cbam/batch_norm", x), backends.forced()
            with backends.unforced():
                pass
            ready.set()
            done.wait(10)
            found["still free"] = backends.choose("cbam/batch_norm", x), backends.forced()
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
            backends.choose("cbam/batch_norm", x)
        found["again"] = backends.forced()

    with fused_attn.backend("cuda"):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        ready.wait()
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
            backends.choose("cbam/batch_norm", x)
        done.set()
        thread.join()
    assert found == {"free": (usual, None), "still free": (usual, None), "again": "cuda"}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_context_free_of_the_forced_backend(compiled):
    def name_of(x):
        return x + backends.NAMES.index(backends.choose("simam", x))

    function = torch.compile(name_of, backend="eager", fullgraph=True) if compiled else name_of
    x = torch.zeros(1, 4, 2, 2)
    usual = function(x)[0, 0, 0, 0].item()
    assert backends.NAMES[int(usual)] == backends.default("simam", "cpu")[0]
    with fused_attn.backend("reference"):
        assert function(x).eq(backends.NAMES.index("reference")).all()
        with backends.unforced():
            assert function(x).eq(usual).all()
        assert function(x).eq(backends.NAMES.index("reference")).all()


class Subclass(torch.Tensor):
    pass


@torch._dynamo.config.patch(recompile_limit=16)  # there are more kinds of tensors and contexts here than usual
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_ordinary(compiled):
    """The same where dynamo traces the question."""

    def asked(x):
        return x + 1 if backends.is_ordinary(x) else x - 1

    def called(function):
        return torch.compile(function, backend="eager", fullgraph=True) if compiled else function

    function, x = called(asked), torch.zeros(3)

    def ordinary(y: torch.Tensor) -> bool:
        return bool(function(y).sum() > 0)

    assert ordinary(x) and ordinary(torch.nn.Parameter(x)) and ordinary(torch.nn.Buffer(x))
    assert not ordinary(x.as_subclass(Subclass)) and not ordinary(torch.nn.Parameter(x.as_subclass(Subclass)))
    with torch.inference_mode():
        assert ordinary(x) and ordinary(torch.zeros(3))
    with torch.autograd.forward_ad.dual_level():
        assert not ordinary(x)
    assert called(torch.func.vmap(asked))(x.view(1, 3)).sum() < 0
    assert called(lambda x: torch.func.jvp(asked, (x,), (x,))[0])(x).sum() < 0
    assert ordinary(x)


def test_what_is_ordinary_in_tracing():
    """torch's own tensors without values are; those of torch.jit are not, nor of an export that keeps no operators."""
    seen = []

    def asked(x):
        seen.append((backends.is_ordinary(x), type(x)))
        return x + 1

    with FakeTensorMode():
        asked(torch.zeros(3))
    with backends.keep_operators():
        torch.export.export(Asks(asked), (torch.zeros(3),))
    make_fx(asked)(torch.zeros(3))
    assert len(seen) >= 3 and all(ordinary for ordinary, _ in seen), seen
    seen.clear()
    torch.jit.trace(asked, torch.zeros(3), check_trace=False)
    torch.export.export(Asks(asked), (torch.zeros(3),))
    assert not any(ordinary for ordinary, _ in seen) and len(seen) >= 2


class Asks(torch.nn.Module):
    def __init__(self, asked):
        super().__init__()
        self.forward = asked


def test_context_is_left_even_after_an_error():
    with pytest.raises(ZeroDivisionError), fused_attn.backend("reference"):
        raise ZeroDivisionError
    assert backends.forced() is None


def test_contexts_nest():
    with fused_attn.backend("reference"):
        with fused_attn.backend("cpu"):
            assert backends.forced() == "cpu"
        assert backends.forced() == "reference"
        assert backends.choose("squeeze", random(1, 4, 2, 2)) == "reference"
        with pytest.raises(ValueError), fused_attn.backend("gpu"):
            pass
        assert backends.forced() == "reference"


def test_the_native_library_serves_every_op():
    """One operator that is not registered, and its op would be the reference's: slower, and no result would tell."""
    if backends.LIBRARY_ERROR:
        pytest.skip(backends.LIBRARY_ERROR)
    missing = {op for op in backends.OPS if ("cpu", op) in backends.MISSING}
    assert missing == {"select/many"}
    for op in (op for op in backends.OPS if op not in missing):
        assert backends.default(op, "cpu") == backends.SHIPPED[op, "cpu"] and backends.SHIPPED[op, "cpu"][0] == "cpu"
    assert {op.partition("/")[0] for op in backends.OPS} | {"spatial_logits"} == set(OPERATORS)
    for operator in itertools.chain(*OPERATORS.values()):
        name = f"fused_attn::{operator}.cpu"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name


def test_no_backend_but_the_reference_serves_an_unknown_device():
    for name, op in itertools.product(backends.NAMES[1:], backends.OPS):
        assert backends.unavailable(name, op, "mps")
    assert backends.unavailable("cpu", "simam", "mps") == "there are no kernels for mps"
    assert backends.default("simam", "mps") == ("reference", "there are no kernels for mps")
    with fused_attn.backend("cpu"), pytest.raises(RuntimeError, match="cannot serve simam on meta: there are no"):
        functional.simam(random(1, 4, 2, 2).to("meta"))


def test_every_combination_has_an_answer():
    for name in backends.NAMES:
        for op in backends.OPS:
            for device in ("cpu", "cuda", "mps", "xpu"):
                reason = backends.unavailable(name, op, device)
                assert reason is None or (reason and "\n" not in reason)
                chosen, why = backends.default(op, device)
                assert backends.unavailable(chosen, op, device) is None and why


def test_reference_is_plain_pytorch():
    x = random(2, 4, 3, 3).requires_grad_()
    with fused_attn.backend("reference"):
        assert "Mul" in type(functional.channel_gate(x).grad_fn).__name__


def test_environment_forces_a_backend():
    code = "import fused_attn; print(fused_attn.backends.forced())"
    assert python(code, FUSED_ATTN_BACKEND="reference") == "reference"


def test_an_environment_that_names_no_backend_is_an_error():
    environment = {**os.environ, "FUSED_ATTN_BACKEND": "gpu"}
    done = subprocess.run([sys.executable, "-c", "import fused_attn"], env=environment, capture_output=True, text=True)
    expected = "ValueError: FUSED_ATTN_BACKEND: expected one of reference, cpu, triton, cuda; got 'gpu'"
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set_gives_the_same_function(isa):
    """The narrower kernels, which a machine with AVX-512 would not choose, against the reference."""
    if backends.LIBRARY_ERROR:
        pytest.skip(backends.LIBRARY_ERROR)
    code = """
import torch
from fused_attn import functional, reference
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random
from tests.ops.test_channel_gate import apply, excitation
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for layout in LAYOUTS:
        for shape in ((2, 19, 7, 7), (1, 40, 33, 31)):
            for pool in ("avg", "avgmax"):
                tensors, options = excitation("se", shape[1], dtype)
                tensors["residual"] = random(*shape, seed=5, dtype=dtype)
                options = {**options, "pool": pool, "post_activation": "silu", "activation": "hard_swish"}
                x = in_layout(random(*shape, dtype=dtype), layout)
                grad = [random(*shape, seed=9, dtype=dtype)]
                assert_equivalent(apply(functional, options), apply(reference, options), {"x": x, **tensors}, grad)
from tests.ops import test_cbam
for dtype in (torch.float64, torch.float32):
    for layout in LAYOUTS:
        for shape in ((2, 19, 7, 7), (1, 40, 33, 31), (3, 2, 3)):
            for ties in ("first", "even"):
                tensors, options = test_cbam.weights("se", shape, dtype)
                tensors |= test_cbam.affine(shape[1], dtype) | {"residual": random(*shape, seed=5, dtype=dtype)}
                options |= {"channel_ties": ties, "spatial_ties": ties, "post_activation": "silu"}
                test_cbam.check(in_layout(random(*shape, dtype=dtype), layout), tensors, options)
for dtype in (torch.float16, torch.bfloat16):
    for layout in LAYOUTS:
        for shape in ((2, 19, 7, 7), (1, 40, 33, 31)):
            tensors, options = test_cbam.weights("se", shape, dtype)
            x = in_layout(test_cbam.separated(shape, dtype), layout)
            test_cbam.check(x, {name: tensor * 0.25 for name, tensor in tensors.items()}, options)
from tests.ops import test_position_attention
for dtype in (torch.float32, torch.bfloat16):
    for layout in LAYOUTS:
        for shape in test_position_attention.SHAPES:
            test_position_attention.check(test_position_attention.inputs_of(shape, dtype, layout))
from tests.ops.test_every_op import ALL, check_special_values
for name in ALL:
    for layout in LAYOUTS:
        check_special_values(name, layout)
print("same")
"""
    assert python(code, FUSED_ATTN_ISA=isa) == "same"


def test_import_starts_nothing():
    """Nothing comes along but the package and the standard library (time is counted in modules here: sympy, which
    torch.export brings, is two thirds of a second); nothing of torch is replaced; no compiler or other program runs;
    no CUDA initialisation."""
    code = """
import subprocess, sys, torch
def refuse(*args, **kwargs):
    raise AssertionError(args)
subprocess.Popen.__init__ = refuse
places = torch, torch.nn, torch.nn.Module, torch.nn.Conv2d, torch.nn.functional, torch.Tensor, torch.autograd.Function
def found():
    return [{name: id(value) for name, value in vars(place).items() if name[:2] != "__"} for place in places]
modules, before = set(sys.modules), found()
import fused_attn
new = set(sys.modules) - modules
others = {m for m in new if m.split(".")[0] not in {"fused_attn", *sys.stdlib_module_names}}
heavy = sorted(m for m in others if not m.startswith("torch.") or m.startswith(("torch._dynamo", "torch._inductor",
               "torch.export", "torch.fx.experimental.symbolic_shapes", "torch._decomp")))
print(heavy, len(others) < 10, len(new) < 250)
print([name for b, a in zip(before, found()) for name, value in b.items() if a.get(name) != value])
print(torch.cuda.is_initialized())
"""
    assert python(code).splitlines() == ["[] True True", "[]", "False"]


@pytest.mark.parametrize("damage", ["library", "half", "record"])
def test_a_damaged_installation_runs_plain_pytorch_and_says_so_once(damage, tmp_path):
    """A library that is none, or was cut short, as by a full disk, where the system's loader would end the process; no
    library, with a record that was."""
    package = Path(fused_attn.__file__).parent
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(package, tmp_path / "fused_attn", ignore=leave_out)
    if damage == "library":
        (tmp_path / "fused_attn/_native.so").write_bytes(b"\x7fELF" + bytes(60))
    elif damage == "half":
        if not backends.LIBRARY_PATH.exists():
            pytest.skip("no native library on this machine")
        whole = backends.LIBRARY_PATH.read_bytes()
        (tmp_path / "fused_attn/_native.so").write_bytes(whole[: len(whole) // 2])
    else:
        (tmp_path / "fused_attn/_build_info.json").write_text('{"cpu": {"bui')
    code = """
import torch, fused_attn
x = torch.randn(2, 32, 5, 5)
block = fused_attn.nn.SqueezeExcite(32)
for _ in range(2):
    block(x)
model = fused_attn.fuse(torch.nn.Sequential(torch.nn.Conv2d(32, 32, 1), fused_attn.nn.CBAM(32)))
print(fused_attn.__file__, fused_attn.backends.choose("channel_gate", x), tuple(model(x).shape))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "always"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=2) == [str(tmp_path / "fused_attn/__init__.py"), "reference", "(2, 32, 5, 5)\n"]
    said = [line for line in done.stderr.splitlines() if "fused_attn: the CPU runs plain PyTorch" in line]
    expected = {
        "library": "does not load",
        "half": "cut short; install it again",
        "record": "was not built: no record of a build",
    }
    assert len(said) == 1 and expected[damage] in said[0], done.stderr
