"""select and select_with against their reference: forward and gradient, on the backend that serves this CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.ops.select import BACKWARD, DOTS, FORWARD, GRADIENTS, SQUEEZE, SUM, empty_gradients, empty_sum
from fused_attn.reference.select import select_weights
from tests.checks import LAYOUTS, assert_as_good_as_eager, assert_equivalent, gradcheck, in_layout, largest, random, run
from tests.ops.test_channel_gate import ACTIVATIONS, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    *((2, 16, 7, 7), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5), (1, 72, 40, 41), (3, 300, 2, 1)),
    *((2, 20, 1, 1), (1, 1, 1), (1, 9, 70, 70)),
)
FORMS = ("separate", "stacked", "joined")


def maps(shape, paths, form="separate", layout="nchw", dtype=torch.float32) -> dict[str, Tensor]:
    """The branches as inputs: M maps, or the one tensor that has them all."""
    batch, channels, *spatial = shape
    if form == "separate":
        return {f"u{m}": in_layout(random(*shape, seed=m, dtype=dtype), layout) for m in range(paths)}
    if form == "joined":
        return {"x": in_layout(random(batch, paths * channels, *spatial, dtype=dtype), layout)}
    stacked = random(batch, paths, channels, *spatial, dtype=dtype)
    return {"x": stacked.movedim(2, -1).contiguous().movedim(-1, 2) if layout == "channels_last" else stacked}


def weights(channels, paths, groups=1, hidden=12, dtype=torch.float32, bias=True, seed=20) -> dict[str, Tensor]:
    tensors = {
        "weight1": random(hidden, channels // groups, seed=seed, dtype=dtype, scale=(channels // groups) ** -0.5),
        "weight2": random(paths * channels, hidden // groups, seed=seed + 1, dtype=dtype, scale=2 * hidden**-0.5),
    }
    biases = {"bias1": random(hidden, seed=seed + 2, dtype=dtype), "bias2": random(paths * channels, dtype=dtype)}
    return tensors | biases if bias else tensors


def affine_of(channels, paths, dtype=torch.float32) -> dict[str, Tensor]:
    return {
        "affine_weight": random(paths, channels, seed=30, dtype=dtype),
        "affine_bias": random(paths, channels, seed=31, dtype=dtype),
    }


def apply(function, paths=None, **options):
    """A function of the branches with them, and the affine's two tensors, as inputs of their own."""

    def call(affine_weight=None, affine_bias=None, x=None, **tensors):
        branches = [tensors.pop(name) for name in sorted(tensors) if name.startswith("u")] if x is None else x
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return function(branches, **tensors, affine=affine, **options, **({"paths": paths} if paths else {}))

    return call


def check(inputs, grad: Tensor | None = None, *, paths=2, form="separate", **options) -> None:
    first = next(iter(inputs.values()))
    if grad is None:
        shape = {"separate": first.shape, "stacked": first[:, 0].shape}.get(form)
        shape = (first.shape[0], first.shape[1] // paths, *first.shape[2:]) if shape is None else shape
        grad = random(*shape, seed=9, dtype=first.dtype)
    options = {**options, "paths": paths if form == "joined" else None}
    ours, theirs = (apply(module.select, **options) for module in (functional, reference))
    assert_equivalent(ours, theirs, inputs, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, dtype, form, layout):
    check(maps(shape, 2, form, layout, dtype) | weights(shape[1], 2, dtype=dtype), form=form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("paths", [1, 2, 3, 4, 8])
def test_branches_and_gates(paths, gate, form, layout):
    shape = (3, 20, 6, 7)
    check(maps(shape, paths, form, layout) | weights(20, paths), paths=paths, form=form, gate=gate)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("paths", [1, 2, 4])
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups, paths, bias, gate):
    inputs = maps((2, 24, 5, 6), paths) | weights(24, paths, groups, bias=bias)
    check(inputs, paths=paths, groups=groups, gate=gate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_weights_larger_than_the_cache(groups, layout):
    """A thread takes a few samples at a time."""
    check(maps((9, 200, 3, 4), 2, "joined", layout) | weights(200, 2, groups, hidden=300), form="joined", groups=groups)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_excitation(activation):
    check(maps((2, 24, 5, 6), 2) | weights(24, 2), activation=activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_prologue(pre, affine, form, layout):
    inputs = maps((3, 20, 13, 17), 2, form, layout) | weights(20, 2)
    check(inputs | (affine_of(20, 2) if affine else {}), form=form, pre_activation=pre)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paths", [1, 3])
def test_prologue_dtypes_and_branches(paths, dtype, layout):
    inputs = maps((2, 12, 9, 40), paths, "joined", layout, dtype)
    inputs |= weights(12, paths, dtype=dtype) | affine_of(12, paths, dtype)
    check(inputs, paths=paths, form="joined", pre_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_another_dtype(layout):
    """As under autocast: bfloat16 maps, float32 parameters."""
    inputs = maps((2, 20, 7, 9), 2, "separate", layout, torch.bfloat16)
    inputs |= weights(20, 2) | affine_of(20, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = apply(functional.select, pre_activation="relu")(**inputs)
    exact = apply(reference.select, pre_activation="relu")(**{k: v.double() for k, v in inputs.items()})
    torch.testing.assert_close(y.double(), exact, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["u1", "grad", "both"])
def test_strides(of, strides, layout):
    """A branch of another layout than its fellow, and the gradient's."""
    shape = (2, 12, 6, 7)
    inputs, grad = maps(shape, 2, layout=layout), in_layout(random(*shape, seed=5), layout)
    if of == "both":
        inputs = {name: strided(random(*shape, seed=i))[strides] for i, name in enumerate(inputs)}
    elif of == "u1":
        inputs["u1"] = strided(random(*shape, seed=3))[strides]
    else:
        grad = strided(random(*shape, seed=3))[strides]
    check(inputs | weights(12, 2), grad)


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_of_a_joined_map(strides):
    check({"x": strided(random(2, 24, 6, 7))[strides]} | weights(12, 2), form="joined")


def parts(shape, layout) -> dict[str, dict[str, Tensor]]:
    """Branches that lie in a larger tensor, which are read there."""
    batch, channels, *spatial = shape
    joined = in_layout(random(batch, 3 * channels + 2, *spatial), layout)
    cut = (0, channels, 1), (channels + 1, 2 * channels + 1, 1)
    batches = in_layout(random(2 * batch, channels, *spatial, seed=1), layout)
    return {
        "channels of one map": {f"u{i}": joined[:, a:b] for i, (a, b, _) in enumerate(cut)},
        "a part, and a map": {"u0": joined[:, :channels], "u1": in_layout(random(*shape, seed=2), layout)},
        "every other sample": {"u0": batches[::2], "u1": batches[1::2]},
        "one sample for all": {"u0": batches[:1].expand(shape), "u1": batches[:batch]},
        "one map twice": {"u0": batches[:batch], "u1": batches[:batch]},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", parts((1, 2, 3), "nchw"))
@pytest.mark.parametrize("shape", [(3, 12, 6, 7), (2, 8, 33), (2, 3, 2, 3, 4), (1, 40, 30, 31)], ids=str)
def test_parts_of_a_larger_tensor(shape, which, layout):
    check(parts(shape, layout)[which] | weights(shape[1], 2) | affine_of(shape[1], 2), pre_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradients_keep_the_layout(shape, form, layout):
    inputs = {k: v.requires_grad_() for k, v in maps(shape, 2, form, layout).items()}
    y = apply(functional.select, paths=2 if form == "joined" else None)(
        **inputs, **weights(6 if shape[1] == 6 else 1, 2)
    )
    grads = torch.autograd.grad(y.sum(), list(inputs.values()))

    def strides(tensor):
        return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]

    assert strides(y) == strides(in_layout(y, layout))
    assert all(strides(g) == strides(v) for g, v in zip(grads, inputs.values(), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape, form):
    check(maps(shape, 2, form) | weights(shape[1], 2) | affine_of(shape[1], 2), form=form, pre_activation="relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_nan_and_infinity(gate, value, layout):
    """What eager makes of them, in the sample that has them alone."""
    inputs = maps((2, 11, 9, 19), 2, "joined", layout)
    inputs["x"][0, 3, 4, 5] = value
    inputs |= weights(11, 2)
    found = []
    for module in (functional, reference):
        (y,), grads = run(apply(module.select, paths=2, gate=gate), inputs, [random(2, 11, 9, 19, seed=1)])
        found.append([y, grads["x"]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.isnan(), theirs.isnan())
        torch.testing.assert_close(ours[1], theirs[1])
        assert ours[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("paths", [2, 5])
def test_logits_too_large_for_an_exponential(paths, dtype):
    """Whose softmax is that of their distances from the largest."""
    inputs = maps((6, 8, 5, 6), paths, dtype=dtype) | weights(8, paths, dtype=dtype)
    inputs["bias2"] = random(paths * 8, seed=3, dtype=dtype, scale=2) + torch.tensor(1000.0, dtype=dtype)
    check(inputs, paths=paths)


def test_the_sum_is_not_rounded():
    """Of float16 maps whose sum overflows, and whose mean does not."""
    shape = (2, 16, 40, 40)
    inputs = {f"u{m}": random(*shape, seed=m, dtype=torch.float16).abs() + 100 for m in range(3)} | weights(
        16, 3, dtype=torch.float16
    )
    actual = apply(functional.select)(**inputs).double()
    exact = apply(reference.select)(**{k: v.double() for k, v in inputs.items()})
    torch.testing.assert_close(actual, exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["separate", "joined"])
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 41, 43), (7, 24, 9, 40), (1, 1, 210, 200)], ids=str)
def test_threads(shape, form, layout, threads):
    """Whole samples a thread, and pieces."""
    torch.set_num_threads(threads)
    check(maps(shape, 2, form, layout) | weights(shape[1], 2) | affine_of(shape[1], 2), form=form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (5, 64, 14, 14)], ids=str)
def test_neither_runs_nor_threads_change_a_bit(shape, layout):
    inputs = maps(shape, 2, layout=layout) | weights(64, 2) | affine_of(64, 2)
    results = []
    for threads in (3, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(apply(functional.select), inputs, [random(*shape, seed=1)]))
    for (y,), grads in results[1:]:
        assert torch.equal(y, results[0][0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in inputs)


@given(
    rank=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 14),
    paths=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    form=st.sampled_from(FORMS),
    affine=st.booleans(),
)
@settings(max_examples=60)
def test_any_shape(rank, sizes, batch, groups, width, paths, layout, form, affine):
    shape = (batch, groups * width, *sizes[:rank])
    inputs = maps(shape, paths, form, layout) | weights(shape[1], paths, groups)
    inputs |= affine_of(shape[1], paths) if affine else {}
    check(inputs, paths=paths, form=form, groups=groups, pre_activation="silu" if affine else "identity")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        *(((2, 64, 144, 144), torch.float32), ((1, 40, 230, 231), torch.float32)),
        *(((1, 128, 200, 200), torch.bfloat16), ((1, 129, 200, 200), torch.float16)),
    ],
    ids=str,
)
def test_maps_larger_than_the_cache(shape, dtype, affine, layout):
    """Written around it where the rows are whole vectors, as those of the second and the last shape are not."""
    assert 2 * dtype.itemsize * torch.Size(shape).numel() >= 16 << 20  # kCached in csrc/cpu/select.cpp
    inputs = maps(shape, 2, "joined", layout, dtype) | weights(shape[1], 2, dtype=dtype)
    inputs |= affine_of(shape[1], 2, dtype) if affine else {}
    options = {"paths": 2, "pre_activation": "relu" if affine else "identity"}
    grad = random(*shape, seed=9, dtype=dtype)
    (y,), grads = run(apply(functional.select, **options), inputs, [grad])
    (expected,), expected_grads = run(apply(reference.select, **options), inputs, [grad])
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=eps, atol=4 * eps)
    torch.testing.assert_close(grads["x"], expected_grads["x"], rtol=eps, atol=8 * eps)


# The two-phase form.


def excitation_of(channels, paths, dtype=torch.float32, norm=True) -> nn.Module:
    torch.manual_seed(3)
    block = nn.Sequential(
        nn.Linear(channels, 10),
        nn.BatchNorm1d(10, eps=0.1) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Linear(10, paths * channels),
    )
    return nn.Sequential(block, nn.Unflatten(1, (paths, channels)), nn.Softmax(1)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("paths", [2, 3])
def test_around_an_excitation_with_a_batch_norm(paths, affine, dtype, form, layout):
    """Output, gradients of maps, affine and the excitation's parameters, and the running statistics."""
    inputs = maps((4, 20, 6, 7), paths, form, layout, dtype) | (affine_of(20, paths, dtype) if affine else {})
    grad, found = random(4, 20, 6, 7, seed=9, dtype=dtype), []
    for module, to in ((functional, dtype), (reference, dtype), (reference, torch.float64)):
        block = excitation_of(20, paths, to)
        leaves = {k: v.detach().to(to).requires_grad_() for k, v in inputs.items()}
        options = {"excitation": block, "pre_activation": "relu" if affine else "identity"}
        y = apply(module.select_with, paths if form == "joined" else None, **options)(**leaves)
        grads = torch.autograd.grad(y, [*leaves.values(), *block.parameters()], grad.to(to))
        found.append([y, *grads, *(t.to(to) for t in block.buffers())])
    scale = max(largest(t) for t in found[-1])  # a bias before a BatchNorm has a gradient of nothing but rounding
    for ours, eager, exact in zip(*found, strict=True):
        assert_as_good_as_eager(ours, eager, exact, scale=scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_forms_agree(dtype, layout):
    shape, excitation = (3, 16, 9, 11), weights(16, 2, dtype=dtype)
    inputs, grad = maps(shape, 2, "joined", layout, dtype), [random(*shape, seed=9, dtype=dtype)]
    full = torch.float64 if dtype == torch.float64 else torch.float32
    block = functools.partial(select_weights, **{k: v.to(full) for k, v in excitation.items()}, paths=2)

    def two_phase(x):
        return functional.select_with(x, lambda s: block(s.to(full)), paths=2)

    (one,), one_grads = run(apply(functional.select, 2), inputs | excitation, grad)
    (two,), two_grads = run(two_phase, inputs, grad)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(two, one, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(two_grads["x"], one_grads["x"], rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", [*STRIDES, "expanded scalar"])
def test_gradient_strides_of_the_two_phases(strides, layout):
    inputs, block = maps((2, 12, 6, 7), 2, "separate", layout), excitation_of(12, 2, norm=False)
    grad = strided(random(2, 12, 6, 7, seed=3))[strides]
    ours, theirs = (apply(module.select_with, excitation=block) for module in (functional, reference))
    (y,), grads = run(ours, inputs, [grad])
    (expected,), expected_grads = run(theirs, inputs, [grad])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", ["descriptor", "weights"])
def test_a_use_beside_the_sum(used):
    """The excitation hands its descriptor or its weights on, whose gradients come beside y's."""
    inputs, block = maps((2, 12, 6, 7), 2, "joined"), excitation_of(12, 2, norm=False)

    def losses(module, x):
        kept = {}

        def excitation(s):
            kept["descriptor"], kept["weights"] = s, block(s)
            return kept["weights"]

        y = module.select_with(x, excitation, paths=2)
        return y.square().sum() + kept[used].exp().sum()

    found = []
    for module in (functional, reference):
        x = inputs["x"].detach().requires_grad_()
        found.append(torch.autograd.grad(losses(module, x), [x, *block.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("two_phases", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_gradcheck(twice, two_phases, form, layout, fast=False):
    shape, dtype = (2, 3, 2, 3), torch.float64
    inputs = maps(shape, 2, form, layout, dtype) | affine_of(3, 2, dtype)
    inputs |= {} if two_phases else weights(3, 2, hidden=4, dtype=dtype)
    options = {"excitation": excitation_of(3, 2, dtype, norm=False)} if two_phases else {}
    function = functional.select_with if two_phases else functional.select
    call = apply(function, 2 if form == "joined" else None, pre_activation="sigmoid", **options)
    gradcheck(call, inputs, twice=twice, fast=fast)


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_branches_around_an_excitation_that_learns(affine):
    inputs = list(maps((4, 12, 6, 7), 2).values())
    options = {"affine": tuple(affine_of(12, 2).values()), "pre_activation": "relu"} if affine else {}
    found = []
    for module in (functional, reference):
        block = excitation_of(12, 2, norm=False)
        y = module.select_with(inputs, block, **options)
        found.append([y, *torch.autograd.grad(y, list(block.parameters()), random(4, 12, 6, 7, seed=9))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.any()


@pytest.mark.parametrize("two_phases", [False, True])
def test_saved_bytes(two_phases):
    """Backward keeps the branches and numbers a channel: no map besides."""
    shape = (2, 128, 28, 28)
    inputs = {k: v.requires_grad_() for k, v in maps(shape, 2).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if two_phases:
            functional.select_with(list(inputs.values()), excitation_of(128, 2))
        else:
            functional.select(list(inputs.values()), **weights(128, 2))
    branches = sum(u.untyped_storage().nbytes() for u in inputs.values())
    assert branches <= sum(saved.values()) <= branches * 1.03


@pytest.mark.parametrize(
    "form, layout, spatial",
    [
        *(("separate", "channels_last", (5, 6)), ("separate", "nchw", (2, 3, 4)), ("stacked", "channels_last", (7,))),
        *(("stacked", "nchw", (5, 6)), ("joined", "channels_last", (5, 6)), ("joined", "nchw", (1, 1))),
    ],
    ids=str,
)
def test_operators(form, layout, spatial):
    """Schema, fake kernel (strides too) and autograd registration as torch checks them."""
    shape, paths = (2, 8, *spatial), 2
    inputs = maps(shape, paths, "joined" if form == "joined" else form, layout)
    if form == "joined":
        inputs["x"] = inputs["x"].unflatten(1, (paths, 8))
    branches, parameters = list(inputs.values()), weights(8, paths)
    backend = choose("select", branches[0][:, 0] if form != "separate" else branches[0])
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    affine = tuple(affine_of(8, paths).values())
    all_parameters = *(parameters[name] for name in ("weight1", "bias1", "weight2", "bias2")), *affine
    phase = paths, *affine, 2
    check_op = torch.library.opcheck
    check_op(FORWARD[backend], (branches, *all_parameters, paths, 1, 1, 0, 2))
    y, state = FORWARD[backend](branches, *all_parameters, paths, 1, 1, 0, 2)
    grad = torch.ones_like(y)
    check_op(BACKWARD[backend], (grad, branches, state, *all_parameters, paths, 1, 1, 0, 2))
    s = SQUEEZE[backend](branches, *phase)
    a = torch.full((2, paths, 8), 0.5)
    for op, arguments in (
        (SQUEEZE, (branches, *phase)),
        (SUM, (branches, a, *phase)),
        (DOTS, (grad, branches, *phase)),
        (GRADIENTS, (grad, branches, a, s, *phase)),
    ):
        check_op(op[backend], arguments)
    grads = GRADIENTS[backend](grad, branches, a, s, *phase)[0]
    assert y.stride() == empty_sum(branches, paths).stride()
    assert [g.stride() for g in grads] == [g.stride() for g in empty_gradients(branches, paths)]


@pytest.mark.slow  # a compilation
def test_compiles_in_one_graph():
    """Of both forms."""
    block, parameters = excitation_of(6, 2, norm=False), weights(6, 2)

    def function(x):
        return functional.select_with(x, block, paths=2) * functional.select(x, **parameters, paths=2)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((2, 12, 5, 7), (3, 12, 8, 9)):
        x = random(*shape).requires_grad_()
        torch.testing.assert_close(compiled(x), function(x))
        torch.testing.assert_close(
            *(torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, function)), rtol=1e-4, atol=1e-5
        )


def test_what_needs_no_gradient_saves_nothing():
    branches = list(maps((1, 6, 4, 4), 2).values())
    assert functional.select(branches, **weights(6, 2)).grad_fn is None
    with torch.no_grad():
        assert functional.select([u.requires_grad_() for u in branches], **weights(6, 2)).grad_fn is None
        assert functional.select_with(branches, excitation_of(6, 2, norm=False)).grad_fn is None
