"""Which backend serves a call, and that it says why not another."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

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
        monkeypatch.setitem(backends.MEASURED, "cuda", "cuda")
        assert backends.default(name, "cuda") == ("reference", backends.MISSING["cuda", name])


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
        assert backends.default(op, "cpu") == ("cpu", "measured fastest")
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
    """The narrower kernels, which this machine would not choose, against the reference."""
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
from tests.ops.test_every_op import ALL, check_special_values
for name in ALL:
    for layout in LAYOUTS:
        check_special_values(name, layout)
print("same")
"""
    assert python(code, FUSED_ATTN_ISA=isa) == "same"


def test_import_starts_nothing():
    """No CUDA initialisation, no Triton, none of the shell's packages or host libraries."""
    code = """
import sys, torch
before = set(sys.modules)
import fused_attn
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(sorted(new & {"triton", "click", "rich", "matplotlib", "sklearn", "timm", "torchvision", "monai"}))
print(torch.cuda.is_initialized())
"""
    assert python(code).splitlines() == ["[]", "False"]
