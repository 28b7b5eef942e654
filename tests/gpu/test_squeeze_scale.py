"""The ops that are parts of blocks, and simam, by the Triton kernels on a real device."""

from __future__ import annotations

import pytest
import torch

from ..checks import LAYOUTS, assert_equivalent, in_layout, random
from ..ops.test_axis_pool import MODES, pools, shapes_of
from ..ops.test_mixed_scale import KINDS, gates_of, mixed_scale
from ..ops.test_squeeze_scale import scale, squeeze

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("streaming")]

SHAPES = (
    (4, 256, 56, 56),
    (1, 64, 112, 112),
    (8, 2048, 7, 7),
    (2, 40, 13, 17),
    (3, 9, 1, 1),
    (2, 6, 31),
    (2, 5, 3, 4, 5),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape, dtype, layout):
    from fused_attn import functional, reference

    def make(*size, seed):
        return random(*size, seed=seed).to("cuda", dtype)

    batch, channels = shape[:2]
    x = in_layout(make(*shape, seed=0), layout)
    ties_of_x = x.mul(2).round()
    for pool in ("avg", "max", "avgmax"):
        grads = [make(batch, channels, seed=i) for i in range(2 if pool == "avgmax" else 1)]
        for ties in ("first", "even"):
            options = {"pool": pool, "ties": ties}
            assert_equivalent(squeeze(functional, **options), squeeze(reference, **options), {"x": ties_of_x}, grads)
    inputs = {"x": x, "gate": make(batch, channels, seed=1), "residual": make(*shape, seed=2)}
    for post in ("identity", "relu", "silu"):
        assert_equivalent(
            scale(functional, post_activation=post),
            scale(reference, post_activation=post),
            inputs,
            [make(*shape, seed=3)],
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 4], ids=str)
def test_several_gates_against_the_reference(shape, dtype, layout):
    from fused_attn import functional, reference

    x, grad = (in_layout(random(*shape, seed=i).to("cuda", dtype), layout) for i in (0, 1))
    for combine, names in KINDS:
        gates = {name: gate.to("cuda") for name, gate in gates_of(shape, names, dtype).items()}
        assert_equivalent(mixed_scale(functional, combine), mixed_scale(reference, combine), {"x": x, **gates}, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 4], ids=str)
def test_pools_along_axes_against_the_reference(shape, dtype, layout):
    from fused_attn import functional, reference

    x = in_layout(random(*shape).mul(2).round().to("cuda", dtype), layout)
    for options in MODES:
        for ties in ("first", "even"):
            sizes = (shape, *shapes_of(x, **options))
            grads = [random(*size, seed=i).to("cuda", dtype) for i, size in enumerate(sizes, 1)]
            both = (pools(module, ties=ties, **options) for module in (functional, reference))
            assert_equivalent(*both, {"x": x}, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2:] != (1, 1)], ids=str)
def test_simam_against_the_reference(shape, dtype, layout):
    from fused_attn import functional, reference

    x, grad = (in_layout(random(*shape, seed=i).to("cuda", dtype), layout) for i in (0, 1))
    assert_equivalent(functional.simam, reference.simam, {"x": x}, [grad])
