"""The resident kernels with the host side of their launches, on the emulated machine, as torch calls them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fused_attn
from fused_attn import backends
from fused_attn.equivalence import LAYOUTS, in_layout
from tests.checks import assert_equivalent, random
from tests.emulate import library

pytestmark = pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR))


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    if why := library.build():
        pytest.skip(why)
    with library.on_the_cpu() as there:
        assert there
        yield
    assert backends.unavailable("cuda", "select", "cpu") == "serves cuda tensors only"


def functions():
    f, reference = fused_attn.functional, fused_attn.reference
    weights = {"weight1": random(3, 9), "bias1": random(3), "weight2": random(9, 3), "bias2": random(9)}
    x, residual = random(2, 9, 5, 7), random(2, 9, 5, 7)
    select = {"weight1": random(4, 9, scale=0.3), "weight2": random(18, 4, scale=0.3)}

    def of_two(module):
        return lambda a, b, **given: module.select((a, b), **given)

    return {
        "channel_gate": (f.channel_gate, reference.channel_gate, {"x": x, **weights}),
        "residual": (
            lambda **given: f.channel_gate(**given, post_activation="relu"),
            lambda **given: reference.channel_gate(**given, post_activation="relu"),
            {"x": x, **weights, "residual": residual},
        ),
        "both": (
            lambda **given: f.channel_gate(**given, pool="both"),
            lambda **given: reference.channel_gate(**given, pool="both"),
            {"x": x, **weights},
        ),
        "spatial_gate": (f.spatial_gate, reference.spatial_gate, {"x": x, "weight": random(1, 2, 3, 3)}),
        "cbam": (f.cbam, reference.cbam, {"x": x, **weights, "spatial_weight": random(1, 2, 3, 3)}),
        "select": (of_two(f), of_two(reference), {"a": x, "b": residual, **select}),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", functions())
def test_forward_and_gradients(name, dtype, layout):
    """With a gradient in the other layout, from an address that is not aligned."""
    ours, theirs, tensors = functions()[name]
    inputs = {k: v.to(dtype) for k, v in tensors.items()}
    inputs |= {k: in_layout(v, layout) for k, v in inputs.items() if v.shape == (2, 9, 5, 7)}
    grad = in_layout(random(2, 9, 5, 7, dtype=dtype), LAYOUTS[layout == LAYOUTS[0]])
    place = torch.empty(grad.numel() + 1, dtype=dtype)
    with fused_attn.backend("cuda"):
        assert_equivalent(ours, theirs, inputs, [place.as_strided(grad.shape, grad.stride(), 1).copy_(grad)])


def test_a_sample_that_does_not_fit_is_named():
    with fused_attn.backend("cuda"), pytest.raises(RuntimeError, match="does not fit the shared memory of a cluster"):
        fused_attn.functional.channel_gate(random(1, 1024, 64, 64))


def test_no_samples():
    with fused_attn.backend("cuda"):
        x = random(0, 9, 5, 7).requires_grad_()
        fused_attn.functional.channel_gate(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize(("compiler", "why"), [("/bin/false", ""), ("/none", "/none")])
def test_what_cannot_be_built_is_said(compiler, why, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setenv("CXX", compiler)
    said = library.build()
    assert said is not None and why in said
    with library.on_the_cpu() as there:
        assert not there
    assert not list(Path(tmp_path).glob("*.so"))
