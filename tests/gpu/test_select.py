"""select and its two phases on a real device: streaming (Triton) and resident (CUDA) kernels, judged beside eager."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable

from ..checks import LAYOUTS, assert_equivalent, in_layout, random
from ..ops.test_select import FORMS, affine_of, apply, excitation_of, maps, parts, weights

pytestmark = pytest.mark.gpu

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADLINE = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
SHAPES = [(40, 13, 17), (9, 1, 1), (1, 5, 3), (40, 7, 7), (33, 3, 5, 2), (16, 31)]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    reason = unavailable(request.param, "select", "cuda")
    if reason is not None:
        pytest.skip(reason)
    with fused_attn.backend(request.param):
        yield request.param


def on_gpu(inputs):
    """The same strides, of parts of a larger tensor too."""

    def moved(t):
        whole = t if t._base is None else t._base
        return whole.to("cuda").as_strided(t.shape, t.stride(), t.storage_offset())

    return {k: moved(v) for k, v in inputs.items()}


def check(inputs, grad, paths=2, form="separate", **options):
    options = {"paths": paths if form == "joined" else None, **options}
    ours, theirs = (apply(module.select, **options) for module in (functional, reference))
    assert_equivalent(ours, theirs, on_gpu(inputs), [grad.to("cuda")])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", HEADLINE, ids=str)
def test_headline_shapes(shape, dtype, form, layout):
    for batch in (1, 4):
        grad = in_layout(random(batch, *shape, seed=9, dtype=dtype), layout)
        inputs = maps((batch, *shape), 2, form, layout, dtype) | weights(shape[0], 2, hidden=32, dtype=dtype)
        check(inputs, grad, form=form)
        check(inputs | affine_of(shape[0], 2, dtype), grad, form=form, pre_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, layout):
    grad = random(3, *shape, seed=9, dtype=dtype)
    inputs = maps((3, *shape), 2, "joined", layout, dtype) | weights(shape[0], 2, dtype=dtype)
    check(inputs, grad, form="joined")
    check(inputs | affine_of(shape[0], 2, dtype), grad, form="joined", pre_activation="silu", gate="sigmoid")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("paths", [1, 3, 4, 8])
def test_branches_and_groups(paths, groups, layout):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = maps((2, 48, 14, 14), paths, layout=layout, dtype=dtype)
        inputs |= weights(48, paths, groups, hidden=24, dtype=dtype) | affine_of(48, paths, dtype)
        check(inputs, random(2, 48, 14, 14, seed=9, dtype=dtype), paths=paths, groups=groups, pre_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", parts((1, 2, 3), "nchw"))
def test_parts_of_a_larger_tensor(which, layout):
    shape = (3, 24, 14, 14)
    check(parts(shape, layout)[which] | weights(24, 2), random(*shape, seed=9))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paths", [2, 3])
def test_two_phases(backend, paths, layout):
    reason = unavailable(backend, "select/with", "cuda")
    if reason is not None:
        pytest.skip(reason)
    inputs = on_gpu(maps((4, 40, 20, 20), paths, "joined", layout) | affine_of(40, paths))
    grad, found = random(4, 40, 20, 20, seed=9).to("cuda"), []
    for module in (functional, reference):
        block = excitation_of(40, paths).to("cuda")
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y = apply(module.select_with, paths, excitation=block, pre_activation="relu")(**leaves)
        grads = torch.autograd.grad(y, [*leaves.values(), *block.parameters()], grad)
        found.append([y, *grads, *block.buffers()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_agree_to_the_bit(layout):
    inputs = on_gpu(
        maps((4, 128, 28, 28), 2, layout=layout, dtype=torch.bfloat16) | weights(128, 2) | affine_of(128, 2)
    )
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}

    def once():
        y = apply(functional.select, pre_activation="relu")(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_what_does_not_fit_says_so_or_streams(backend):
    shape = (1, 256, 160, 160)
    if backend == "triton":
        return check(maps(shape, 2, dtype=torch.bfloat16) | weights(256, 2), random(*shape, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="does not fit the shared memory of a cluster"):
        apply(functional.select)(**on_gpu(maps(shape, 2) | weights(256, 2)))


def test_replays_from_a_cuda_graph():
    call, inputs = apply(functional.select), on_gpu(maps((4, 256, 14, 14), 2) | weights(256, 2))
    with torch.no_grad():
        expected = call(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(**inputs)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


def test_more_than_2_31_elements(backend):
    """Offsets past 2**31 in one stacked tensor of 8.6 GB, checked at its end."""
    if backend == "cuda":
        pytest.skip("no cluster holds such a sample: the resident kernels refuse it")
    x = torch.zeros(2, 2, 1, 1 << 30, dtype=torch.bfloat16, device="cuda")
    x[1, 1, 0, -5:] = 1024.0
    layers = {k: torch.zeros_like(v).to("cuda") for k, v in weights(1, 2).items()}
    y = functional.select(x, **layers)
    assert y[1, 0, -6:].tolist() == [0.0] + [512.0] * 5
    assert not y[0].any()
