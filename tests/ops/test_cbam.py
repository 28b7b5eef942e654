"""cbam against its reference: forward and every gradient, on the backend that serves this machine's CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.codes import ACTIVATIONS
from tests.checks import LAYOUTS, assert_equivalent, gradcheck, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, excitation, strided
from tests.ops.test_spatial_gate import ORDERS, SHAPES, affine, batch_norm, convolution

FULL = (torch.float64, torch.float32)
HALF = (torch.float16, torch.bfloat16)


def weights(kind: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool = True, kernel=(3, 5, 7)):
    """(tensors, options) of one kind of excitation and a spatial convolution."""
    tensors, options = excitation(kind, shape[1], dtype, bias)
    spatial = convolution(shape, dtype, kernel, bias)
    return tensors | {f"spatial_{name}": tensor for name, tensor in spatial.items()}, options


def apply(module, options):
    """module.cbam with the affine's two tensors as inputs of their own."""

    def function(x, affine_weight=None, affine_bias=None, norm_weight=None, norm_bias=None, **tensors):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        if norm_weight is None:
            return module.cbam(x, affine=affine, **tensors, **options)
        return module.cbam(x, affine=affine, batch_norm=(norm_weight, norm_bias, 1e-5), **tensors, **options)[0]

    return function


def check(x: Tensor, tensors: dict, options: dict, grad: Tensor | None = None) -> None:
    grad = random(*x.shape, seed=9, dtype=x.dtype) if grad is None else grad
    assert_equivalent(apply(functional, options), apply(reference, options), {"x": x, **tensors}, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FULL, ids=str)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, kind, dtype, layout):
    tensors, options = weights(kind, shape, dtype)
    check(in_layout(random(*shape, dtype=dtype), layout), tensors, options)


def separated(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values whose largest, over space and over channels, stays the largest when it is rounded or gated."""
    x = random(*shape, dtype=torch.float64).clamp(-2, 2)
    where = random(*shape, seed=7, dtype=torch.float64)
    x += 8 * (where == where.amax(1, keepdim=True))
    x += 16 * (where == where.flatten(2).amax(2).reshape(*shape[:2], *(1 for _ in shape[2:])))
    return x.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_precision(shape, pool, dtype, layout):
    """On maps whose maxima are clear: between near-equal ones eager and float64 choose differently."""
    tensors, options = weights("se", shape, dtype)
    tensors = {name: tensor * 0.25 for name, tensor in tensors.items()}
    check(in_layout(separated(shape, dtype), layout), tensors, {**options, "pool": pool})


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_index_is_that_of_the_rounded_map(layout, dtype):
    """All gates 1: the second map is x, ties and all, and the gradients of its maxima go where eager sends them."""
    x = in_layout(random(2, 9, 6, 35, dtype=dtype).mul(2).round(), layout)
    spatial = torch.tensor([1.0, 0.0], dtype=dtype).reshape(1, 2, 1, 1)
    zero = torch.zeros(9, 9, dtype=dtype)
    one = torch.ones(9, dtype=dtype)
    for ties in ("first", "even"):
        tensors = {"weight1": zero, "bias1": one, "spatial_weight": spatial}
        options = {"pool": "avg", "channel_gate": "identity", "spatial_gate": "hard_sigmoid", "spatial_ties": ties}
        check(x, tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
@pytest.mark.parametrize("channel_ties, spatial_ties", list(itertools.product(["first", "even"], repeat=2)))
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 12, 40, 41), (3, 9, 1, 1)], ids=str)
def test_ties(shape, channel_ties, spatial_ties, pool, layout):
    """In space, of the map; over channels, of the gated map: channels in pairs are the same, and so are their gates."""
    x = random(*shape).mul(2).round().clamp(-2, 2)
    x[:, 1::2] = x[:, : shape[1] // 2 * 2 : 2]
    tensors, options = weights("none", shape, torch.float32)
    options |= {"pool": pool, "channel_ties": channel_ties, "spatial_ties": spatial_ties}
    check(in_layout(x, layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pre", ACTIVATIONS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_prologue(ties, pre, layout):
    shape = (3, 20, 13, 17)
    tensors, options = weights("se", shape, torch.float32)
    tensors |= affine(20, torch.float32)
    options |= {"pre_activation": pre, "channel_ties": ties, "spatial_ties": ties}
    check(in_layout(random(*shape), layout), tensors, options)


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ACTIVATIONS)
def test_epilogue(post, layout, residual_layout):
    shape = (2, 20, 9, 11)
    tensors, options = weights("se", shape, torch.float32)
    tensors["residual"] = in_layout(random(*shape, seed=5), residual_layout)
    check(in_layout(random(*shape), layout), tensors, {**options, "post_activation": post})


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (1, 64, 40, 40), (1, 32, 1100), (1, 20, 6, 10, 31)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prologue_and_epilogue_together(layout, shape, post):
    """The larger shapes are cut into pieces among threads."""
    tensors, options = weights("se", shape, torch.float32)
    tensors |= affine(shape[1], torch.float32) | {"residual": random(*shape, seed=5)}
    check(in_layout(random(*shape), layout), tensors, {**options, "pre_activation": "silu", "post_activation": post})


@pytest.mark.parametrize("channel_gate", ["sigmoid", "hard_sigmoid", "tanh", "relu", "silu"])
@pytest.mark.parametrize("spatial_gate", ["sigmoid", "hard_sigmoid", "tanh", "relu", "gelu"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations(activation, channel_gate, spatial_gate):
    shape = (2, 24, 5, 6)
    tensors, options = weights("se", shape, torch.float64)
    options |= {"activation": activation, "channel_gate": channel_gate, "spatial_gate": spatial_gate}
    check(random(*shape, dtype=torch.float64), tensors, options)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("kind", ["se", "ese", "eca"])
def test_order_and_no_bias(kind, order):
    shape = (2, 24, 5, 6)
    tensors, options = weights(kind, shape, torch.float32, bias=False)
    check(random(*shape), tensors, {**options, "order": order})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese"])
def test_weights_that_samples_share(kind, layout):
    """Weights too large for the cache: a thread takes a few samples at a time."""
    shape = (9, 300, 5, 5)
    tensors, options = weights(kind, shape, torch.float32)
    check(in_layout(random(*shape), layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad", "residual"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    tensors, options = weights("se", shape, torch.float32)
    x, grad, residual = (in_layout(random(*shape, seed=s), layout) for s in (0, 1, 2))
    other = strided(random(*shape, seed=3))[strides]
    x, grad, residual = (other if of == name else t for name, t in (("x", x), ("grad", grad), ("residual", residual)))
    check(x, {**tensors, "residual": residual}, {**options, "post_activation": "relu"}, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradient_keep_the_layout(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y = functional.cbam(x, spatial_weight=convolution(shape, x.dtype)["weight"])
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 1, 3), (0, 2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("pool", ["avg", "both"])
def test_empty(pool, shape):
    tensors, options = weights("se", shape, torch.float32)
    check(random(*shape), tensors, {**options, "pool": pool})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_nan(ties, layout):
    """A NaN makes its sample NaN, as in eager, and no other."""
    shape = (2, 11, 9, 19)
    x = random(*shape)
    x[0, 3, 4, 5] = float("nan")
    tensors, options = weights("se", shape, x.dtype)
    options |= {"channel_ties": ties, "spatial_ties": ties}
    inputs, grad = {"x": in_layout(x, layout), **tensors}, [random(*shape, seed=1)]
    (actual,), grads = run(apply(functional, options), inputs, grad)
    (eager,), eager_grads = run(apply(reference, options), inputs, grad)
    assert actual[0].isnan().any() and actual[1].isfinite().all()
    torch.testing.assert_close(actual, eager, equal_nan=True)
    torch.testing.assert_close(grads["x"][1], eager_grads["x"][1])
    assert grads["x"][0].isnan().all() and eager_grads["x"][0].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (1, 64, 56, 56)], ids=str)
def test_two_runs_agree_to_the_bit(shape, layout):
    tensors, options = weights("se", shape, torch.float32)
    inputs = {"x": in_layout(random(*shape), layout), **tensors, **affine(64, torch.float32)}
    grad = [random(*shape, seed=1)]
    first, second = (run(apply(functional, options), inputs, grad) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (5, 64, 14, 14)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, layout):
    tensors, options = weights("se", shape, torch.float32)
    inputs = {"x": in_layout(random(*shape), layout), **tensors}
    grad, results = [random(*shape, seed=1)], []
    for count in (3, 4):
        torch.set_num_threads(count)
        results.append(run(apply(functional, options), inputs, grad))
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in inputs)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 41, 43), (3, 24, 41, 43), (7, 24, 9, 40), (1, 1, 210, 200)], ids=str)
def test_threads(shape, layout, threads):
    """Whole samples a thread, and pieces."""
    tensors, options = weights("se", shape, torch.float32)
    tensors |= affine(shape[1], torch.float32)
    torch.set_num_threads(threads)
    check(in_layout(random(*shape), layout), tensors, {**options, "post_activation": "relu"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
def test_gradcheck(pool, kind, layout):
    shape = (2, 6, 3, 4)
    tensors, options = weights(kind, shape, torch.float64)
    tensors |= affine(6, torch.float64) | {"residual": random(*shape, seed=5, dtype=torch.float64)}
    options |= {"pool": pool, "pre_activation": "silu", "post_activation": "gelu", "activation": "silu"}
    inputs = {"x": in_layout(random(*shape, dtype=torch.float64), layout), **tensors}
    gradcheck(apply(functional, options), inputs)


@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_double_backward(post, with_residual):
    shape = (2, 4, 3, 3)
    tensors, options = weights("se", shape, torch.float64)
    if with_residual:
        tensors["residual"] = random(*shape, seed=5, dtype=torch.float64) + 3
    inputs = {"x": random(*shape, dtype=torch.float64), **tensors}
    gradcheck(apply(functional, {**options, "post_activation": post, "activation": "silu"}), inputs, twice=True)


@pytest.mark.parametrize(
    "options", [{}, {"spatial_ties": "even"}, {"pool": "avgmax"}, {"post_activation": "relu"}], ids=str
)
def test_saved_bytes(options):
    """Backward keeps x, y where a ReLU follows, and numbers a channel and a position: never a second map."""
    shape = (2, 128, 28, 28)
    tensors, layer = weights("se", shape, torch.float32)
    x = random(*shape).requires_grad_()
    parameters = sum(t.untyped_storage().nbytes() for t in tensors.values())
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.cbam(x, **tensors, **layer, **options)
    maps = 2 if options.get("post_activation") == "relu" else 1
    numbers = 4 * 2 * (4 * 28 * 28 + 4 * 128 + 2 * 32)
    assert sum(saved.values()) - parameters <= maps * x.untyped_storage().nbytes() + numbers


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_needs_no_gradient(frozen):
    shape = (2, 8, 5, 5)
    tensors, options = weights("se", shape, torch.float32)
    x = random(*shape).requires_grad_(frozen != "x")
    tensors = {k: v.requires_grad_(frozen == "x") for k, v in tensors.items()}
    functional.cbam(x, **tensors, **options).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert all((t.grad is None) == (frozen == "weights") for t in tensors.values())


def test_autocast_keeps_the_dtype_of_x():
    x = random(2, 8, 5, 5)
    tensors, options = weights("se", x.shape, x.dtype)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        half = functional.cbam(x.bfloat16(), **leaves, **options)
        full = functional.cbam(x, **tensors, **options)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    expected = reference.cbam(x, **tensors, **options)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)
    half.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


def test_bfloat16_gradients_are_finite_and_right():
    """Compiled timm CBAMs gave NaN here: a recomputed float32 value compared with a maximum rounded to bfloat16."""
    shape = (2, 64, 8, 8)
    tensors, options = weights("se", shape, torch.float32)
    options |= {"channel_ties": "even", "spatial_ties": "even"}
    x, grad = random(*shape), random(*shape, seed=1)
    _, exact = run(apply(reference, options), {"x": x, **tensors}, [grad])
    rounded = {name: tensor.bfloat16() for name, tensor in {"x": x, **tensors}.items()}
    _, grads = run(apply(functional, options), rounded, [grad.bfloat16()])
    for name, found in grads.items():
        assert found.isfinite().all(), name
        assert torch.nn.functional.cosine_similarity(found.float().flatten(), exact[name].flatten(), 0) > 0.98, name


@pytest.mark.slow  # about 10 s of compiling
@pytest.mark.parametrize("layout", [pytest.param("nchw", marks=pytest.mark.long), "channels_last"])
def test_compile_in_one_graph_for_every_batch_size(layout):
    """cbam, and what a spatial gate in training falls apart into."""
    tensors, options = weights("se", (2, 16, 9, 11), torch.float32)

    def function(x, **tensors):
        y = functional.cbam(x, **tensors, **options)
        y = functional.spatial_gate(y, tensors["spatial_weight"], tensors["spatial_bias"], order=("mean", "max"))
        pooled = functional.channel_pool(y, ties="even")
        gate = torch.nn.functional.conv2d(pooled, tensors["spatial_weight"], padding=(1, 2))
        return functional.channel_gate(functional.scale(y, gate.sigmoid()), pool="both")

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for batch in (6, 3, 5):  # not 2 first: torch takes equal sizes, as that of the weight, for the same size
        x = in_layout(random(batch, 16, 9, 11), layout)
        grad = [random(*x.shape, seed=1)]
        with torch.compiler.set_stance("default" if batch == 6 else "fail_on_recompile"):
            found, grads = run(compiled, {"x": x, **tensors}, grad)
        expected, expected_grads = run(function, {"x": x, **tensors}, grad)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    kind=st.sampled_from(["se", "ese", "eca", "ceca", "none"]),
    kernel=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=3, max_size=3),
    pool=st.sampled_from(["avg", "max", "avgmax", "both"]),
    order=st.sampled_from(ORDERS),
    ties=st.tuples(st.sampled_from(["first", "even"]), st.sampled_from(["first", "even"])),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    with_affine=st.booleans(),
    residual=st.booleans(),
    pre=st.sampled_from(["identity", "silu", "gelu_tanh", "tanh"]),
    post=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_option(
    shape, kind, kernel, pool, order, ties, layout, grad_layout, with_affine, residual, pre, post, seed
):
    """Pre-activations without flat parts: equal values would be gated apart, in eager another way than here."""
    batch, channels, spatial = shape
    full = (batch, channels, *spatial)
    tensors, options = weights(kind, full, torch.float64, kernel=kernel)
    if with_affine:
        tensors |= affine(channels, torch.float64)
    if residual:
        tensors["residual"] = random(*full, seed=5, dtype=torch.float64)
    x = in_layout(random(*full, seed=seed, dtype=torch.float64), layout)
    grad = in_layout(random(*full, seed=seed + 1, dtype=torch.float64), grad_layout)
    options |= {"pool": pool, "order": order, "channel_ties": ties[0], "spatial_ties": ties[1]}
    check(x, tensors, {**options, "pre_activation": pre, "post_activation": post}, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (*FULL, *HALF), ids=str)
@pytest.mark.parametrize("kind", ["se", "eca"])
def test_batch_norm(kind, dtype, layout):
    shape = (3, 16, 13, 17)
    tensors, options = weights(kind, shape, dtype)
    x = in_layout(separated(shape, dtype), layout)
    check(x, {name: tensor * 0.25 for name, tensor in tensors.items()} | batch_norm(dtype), options)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("se", {}),
        ("eca", {"channel_ties": "even", "post_activation": "relu", "pool": "avg"}),
        ("eca", {"batch_norm": True}),
    ],
)
def test_opcheck(kind, options):
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    from fused_attn.backends import choose
    from fused_attn.codes import LAYERS, POOLS, TIES
    from fused_attn.ops.cbam import BACKWARD, FORWARD

    x = random(2, 8, 5, 6)
    backend = choose("cbam", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    tensors, layer = weights(kind, x.shape, x.dtype)
    names = ("weight1", "bias1", "weight2", "bias2", "spatial_weight", "spatial_bias")
    parameters = [tensors.get(name) for name in names]
    post = ACTIVATIONS[options.get("post_activation", "identity")]
    parameters += [torch.ones(1), torch.zeros(1)] if options.get("batch_norm") else [None, None]
    codes = [
        1e-5,
        LAYERS[layer["layer"]],
        POOLS[options.get("pool", "both")],
        TIES[options.get("channel_ties", "first")],
        ACTIVATIONS["relu"],
        ACTIVATIONS["sigmoid"],
        0,
        TIES["first"],
        ACTIVATIONS["sigmoid"],
        0,
        post,
    ]
    for values in (x, *map(strided(x).get, CHECKED)):
        arguments = (values, *parameters, None, None, None, *codes)
        torch.library.opcheck(FORWARD[backend], arguments)
        y, *states = FORWARD[backend](*arguments)
        torch.library.opcheck(
            BACKWARD[backend], (x, values, y if post else None, *states, *parameters, None, None, None, *codes)
        )
