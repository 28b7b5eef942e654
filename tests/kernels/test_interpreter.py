"""The Triton kernels in Triton's interpreter, by the tests of the operators: forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_attn
from fused_attn import functional, reference
from fused_attn.backends import unavailable
from fused_attn.codes import ACTIVATIONS
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random, run
from tests.ops import test_squeeze_scale as of_squeeze_scale
from tests.ops.test_autograd import backwards, calls_of_a_step, channels_last_or_first, check_layouts
from tests.ops.test_channel_gate import CHECKED, DTYPES, apply, check, excitation, strided
from tests.ops.test_every_op import ALL
from tests.ops.test_squeeze_scale import affine, check_scale, check_squeeze

SHAPES = ((2, 16, 7, 7), (3, 8, 1, 1), (1, 40, 13, 17), (2, 1, 9, 5), (4, 24, 33), (1, 12, 3, 4, 5))
KINDS = ("se", "ese", "eca", "ceca", "none")
POOLS = ("avg", "max", "avgmax")


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "channel_gate", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(shape, kind, layout):
    tensors, options = excitation(kind, shape[1], torch.float32)
    check(in_layout(random(*shape), layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["se", "eca"])
def test_dtypes(kind, dtype, layout):
    for shape in SHAPES[:2]:
        tensors, options = excitation(kind, shape[1], dtype)
        check(in_layout(random(*shape, dtype=dtype), layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", ["max", "avgmax"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 4, 40, 41)], ids=str)
def test_maximum_with_ties(shape, kind, pool, ties, layout):
    """The larger shape is split among programs, so its maximum is put together from parts."""
    x = in_layout(random(*shape).mul(2).round().clamp(-2, 2), layout)
    tensors, options = excitation(kind, shape[1], torch.float32)
    check(x, tensors, {**options, "pool": pool, "ties": ties})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze(dtype, ties, layout):
    for shape in ((2, 16, 7, 7), (3, 8, 1, 1), (2, 1, 9, 5), (1, 6, 13, 17)):
        x = in_layout(random(*shape, dtype=dtype).mul(4).round().div(4), layout)
        for pool in POOLS:
            check_squeeze(x, {}, pool=pool, ties=ties)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("special", ["nan", "-nan", "inf", "-inf", "all -inf", "negative zero"])
def test_special_values(special, pool, ties, layout):
    x = random(2, 5, 30, 31)
    if special == "all -inf":
        x[:, 2] = -torch.inf
    elif special == "negative zero":
        x[:, 2] = 0.0
        x[:, 2, ::2] = -0.0
    else:
        x[0, 2, 20, 5] = x[1, 4, 0, 0] = x[1, 4, 29, 30] = float(special)
    check_squeeze(in_layout(x, layout), {}, pool=pool, ties=ties)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_every_place(activation, layout):
    x = in_layout(random(2, 12, 5, 7, scale=3.0), layout)
    tensors, options = excitation("se", 12, x.dtype)
    tensors |= affine(12, x.dtype)
    tensors["residual"] = random(*x.shape, seed=5)
    names = ("activation", "gate", "pre_activation", "post_activation")
    check(x, tensors, {**options, **dict.fromkeys(names[:2], activation)})
    check(x, tensors, {**options, **dict.fromkeys(names[2:], activation), "pool": "avgmax"})
    check_scale(x, {k: tensors[k] for k in ("affine_weight", "affine_bias", "residual")}, post_activation=activation)
    check_squeeze(x, affine(12, x.dtype), pool="avgmax", ties="even", pre_activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (1, 16, 40, 40)], ids=str)
def test_prologue_and_epilogue_together(shape, layout, dtype):
    """float32 and float64 with a prologue; in half precision eager and float64 disagree about what it rounds."""
    tensors, options = excitation("se", shape[1], dtype)
    tensors["residual"] = random(*shape, seed=5, dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        tensors |= affine(shape[1], dtype)
        options["pre_activation"] = "relu"
    check(in_layout(random(*shape, dtype=dtype), layout), tensors, {**options, "post_activation": "relu"})


@pytest.mark.parametrize("layer", ["conv", "circular"])
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 13])
def test_convolution_longer_than_the_channels(kernel_size, layer):
    check(random(2, 5, 4, 4), {"weight1": random(1, 1, kernel_size)}, {"layer": layer})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", strided(torch.zeros(1, 1, 2, 2)))
@pytest.mark.parametrize("of", ["x", "grad", "residual"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    tensors, options = excitation("se", 12, torch.float32)
    given = {name: in_layout(random(*shape, seed=s), layout) for s, name in enumerate(("x", "grad", "residual"))}
    given[of] = strided(random(*shape, seed=3))[strides]
    x, grad, residual = given.values()
    check(x, {**tensors, "residual": residual}, {**options, "post_activation": "relu"}, grad)
    if of == "grad":  # without an activation every pass reads it where it lies
        check(x, tensors, options, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", strided(torch.zeros(1, 1, 2, 2)))
@pytest.mark.parametrize("op", ["scale", "scale by position", "scale and relu", "channel_pool", "squeeze"])
def test_gradients_of_other_strides(op, strides, layout):
    x, shape = in_layout(random(2, 6, 5, 7), layout), (2, 6, 5, 7)
    inputs, options = {"x": x}, {}
    if op.startswith("scale"):
        inputs |= {"gate": random(*((2, 1, 5, 7) if op == "scale by position" else (2, 6)), seed=2)}
        options = {"post_activation": "relu"} if op == "scale and relu" else {}
    elif op == "channel_pool":
        shape = (2, 2, 5, 7)
    grad = strided(random(*shape, seed=3))[strides]
    grad = grad[:, :, 1, 2] if op == "squeeze" else grad
    function = getattr(of_squeeze_scale, op.split()[0])
    assert_equivalent(function(functional, **options), function(reference, **options), inputs, [grad])


@pytest.mark.parametrize(("kind", "pool", "batch"), [("se", "both", 19), ("se", "avg", 35), ("ese", "avg", 35)])
def test_more_samples_than_are_summed_at_once(kind, pool, batch):
    """Parameters' gradients are sums over 32 descriptors at a time. No ReLU: it may make them 0."""
    tensors, options = excitation(kind, 5, torch.float32)
    tensors |= affine(5, torch.float32)
    check(random(batch, 5, 2, 3), tensors, {**options, "pool": pool, "activation": "silu"})


@pytest.mark.parametrize(("kind", "pool"), [("se", "avg"), ("se", "both"), ("ese", "avgmax")])
def test_layers_apart(kind, pool):
    """On a map so small the layers have launches of their own: of more samples, channels and parts than a program."""
    tensors, options = excitation(kind, 270, torch.float32)
    check(random(17, 270, 2, 2), tensors, {**options, "pool": pool, "activation": "silu"})


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 5), (0, 8, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty(kind, shape):
    tensors, options = excitation(kind, 8, torch.float32)
    check(random(*shape), tensors, options)


def test_mixed_dtypes_under_autocast():
    tensors, options = excitation("se", 8, torch.float32)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    x = random(2, 8, 5, 5, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        functional.channel_gate(x, **leaves, **options).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


@pytest.mark.parametrize("kind", ["se", "eca"])
def test_two_runs_agree_to_the_bit(kind):
    tensors, options = excitation(kind, 16, torch.float32)
    inputs = {"x": random(1, 16, 40, 41), **tensors}
    grad = [random(1, 16, 40, 41, seed=1)]
    first, second = (run(apply(functional, {**options, "pool": "avgmax"}), inputs, grad) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in inputs)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 24), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    kind=st.sampled_from(KINDS),
    pool=st.sampled_from(POOLS),
    ties=st.sampled_from(["first", "even"]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    prologue=st.booleans(),
    residual=st.booleans(),
    pre=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    post=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
)
def test_any_shape_and_option(shape, kind, pool, ties, layouts, prologue, residual, pre, post):
    batch, channels, spatial = shape
    full = (batch, channels, *spatial)
    tensors, options = excitation(kind, channels, torch.float64)
    if prologue:
        tensors |= affine(channels, torch.float64)
    if residual:
        tensors["residual"] = random(*full, seed=5, dtype=torch.float64)
    x, grad = (in_layout(random(*full, seed=i, dtype=torch.float64), layouts[i]) for i in range(2))
    options |= {"pool": pool, "ties": ties, "pre_activation": pre, "post_activation": post}
    check(x, tensors, options, grad)


def test_opcheck():
    from fused_attn.ops.channel_gate import BACKWARD, FORWARD

    tensors, _ = excitation("se", 8, torch.float32)
    for values in map(strided(random(2, 8, 5, 6)).get, CHECKED):
        shared = (*tensors.values(), None, None, None, 0, 2, 1, 1, 6, 0, 1)
        torch.library.opcheck(FORWARD["triton"], (values, *shared))
        y, state, index = FORWARD["triton"](values, *shared)
        torch.library.opcheck(BACKWARD["triton"], (values, values, y, state, index, *shared))


@pytest.mark.parametrize("relaid", [channels_last_or_first, backwards])
def test_tensors_of_any_layout(relaid):
    """Each tensor of every operator, what a forward kept for the backward too."""
    names = [name for name in ALL if unavailable("triton", name.split("/")[0], "cpu") is None]
    for function, arguments in calls_of_a_step(names).values():
        if torch.Tag.flexible_layout in function.tags:
            check_layouts(function, arguments, relaid)
