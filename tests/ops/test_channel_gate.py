"""channel_gate against its reference: forward and every gradient, on the backend that serves this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.codes import ACTIVATIONS
from fused_attn.reference.channel_gate import gate_alone
from tests.checks import LAYOUTS, assert_equivalent, gradcheck, in_layout, random, run

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = (
    (2, 16, 7, 7),
    (3, 8, 1, 1),
    (1, 40, 13, 17),
    (2, 1, 9, 5),
    (4, 24, 33),
    (1, 12, 3, 4, 5),
    (1, 72, 40, 41),
)


def excitation(kind: str, channels: int, dtype: torch.dtype, bias: bool = True) -> tuple[dict, dict]:
    """(tensors, options) of one kind of excitation."""
    hidden = max(1, channels // 4)
    tensors = {
        "se": {
            "weight1": random(hidden, channels, dtype=dtype, scale=channels**-0.5),
            "bias1": random(hidden, seed=1, dtype=dtype),
            "weight2": random(channels, hidden, 1, 1, dtype=dtype, scale=hidden**-0.5),
            "bias2": random(channels, seed=2, dtype=dtype),
        },
        "ese": {
            "weight1": random(channels, channels, dtype=dtype, scale=channels**-0.5),
            "bias1": random(channels, seed=1, dtype=dtype),
        },
        "eca": {"weight1": random(1, 1, 3, dtype=dtype), "bias1": random(1, seed=1, dtype=dtype)},
        "ceca": {"weight1": random(1, 1, 5, dtype=dtype)},
        "none": {},
    }[kind]
    if not bias:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("bias")}
    return tensors, {"layer": {"eca": "conv", "ceca": "circular"}.get(kind, "dense")}


def apply(module, options):
    """module.channel_gate with the affine's two tensors as inputs of their own."""

    def function(x, affine_weight=None, affine_bias=None, **tensors):
        affine = None if affine_weight is None else (affine_weight, affine_bias)
        return module.channel_gate(x, affine=affine, **tensors, **options)

    return function


def check(x: Tensor, tensors: dict, options: dict, grad: Tensor | None = None) -> None:
    grad = random(*x.shape, seed=9, dtype=x.dtype) if grad is None else grad
    inputs = {"x": x, **tensors}
    assert_equivalent(apply(functional, options), apply(reference, options), inputs, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_dtypes_layouts(shape, kind, dtype, layout):
    tensors, options = excitation(kind, shape[1], dtype)
    check(in_layout(random(*shape, dtype=dtype), layout), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", ["max", "avgmax", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 7, 7), (1, 12, 40, 41), (3, 9, 1, 1)], ids=str)
def test_maximum_with_ties(shape, dtype, pool, ties, layout):
    x = in_layout(random(*shape, dtype=dtype).mul(2).round().clamp(-2, 2), layout)  # a few values: many ties
    tensors, options = excitation("se", shape[1], dtype)
    check(x, tensors, {**options, "pool": pool, "ties": ties})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (9, 300, 3, 4)], ids=str)
def test_both_pools(shape, bias, ties, kind, layout):
    """The second shape's weights are too large for the cache: a thread takes a few samples at a time."""
    tensors, options = excitation(kind, shape[1], torch.float32, bias)
    check(in_layout(random(*shape), layout), tensors, {**options, "pool": "both", "ties": ties, "activation": "silu"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
@pytest.mark.parametrize("pre", ACTIVATIONS)
def test_prologue(pre, pool, layout):
    """float32: in half precision eager and float64 disagree on which of two near-equal values is the maximum."""
    shape, dtype = (3, 20, 13, 17), torch.float32
    tensors, options = excitation("se", 20, dtype)
    tensors |= {
        "affine_weight": random(20, seed=3, dtype=dtype),
        "affine_bias": random(20, seed=4, dtype=dtype),
    }
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(x, tensors, {**options, "pool": pool, "pre_activation": pre})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("post", ACTIVATIONS)
def test_epilogue(post, layout, residual_layout, dtype):
    shape = (2, 20, 9, 11)
    tensors, options = excitation("se", 20, dtype)
    tensors["residual"] = in_layout(random(*shape, seed=5, dtype=dtype), residual_layout)
    check(in_layout(random(*shape, dtype=dtype), layout), tensors, {**options, "post_activation": post})


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("shape", [(2, 20, 9, 11), (1, 64, 40, 40)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prologue_and_epilogue_together(layout, shape, post):
    """The tail of an SE-ResNet block in eval mode; the larger shape is cut into pieces among threads."""
    channels, dtype = shape[1], torch.float32
    tensors, options = excitation("se", channels, dtype)
    tensors |= {
        "affine_weight": random(channels, seed=3, dtype=dtype),
        "affine_bias": random(channels, seed=4, dtype=dtype),
        "residual": random(*shape, seed=5, dtype=dtype),
    }
    x = in_layout(random(*shape, dtype=dtype), layout)
    check(x, tensors, {**options, "pre_activation": "relu", "post_activation": post})


@pytest.mark.parametrize("gate", ACTIVATIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_excitation(activation, gate):
    tensors, options = excitation("se", 24, torch.float32)
    check(random(2, 24, 5, 6), tensors, {**options, "activation": activation, "gate": gate})


@pytest.mark.parametrize("kind", ["se", "ese", "eca"])
def test_without_bias(kind):
    tensors, options = excitation(kind, 24, torch.float32, bias=False)
    check(random(2, 24, 5, 6), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3, 7, 9, 13])
@pytest.mark.parametrize("layer", ["conv", "circular"])
def test_convolution_longer_than_the_channels(layer, kernel_size, layout):
    x = in_layout(random(2, 5, 4, 4), layout)
    check(x, {"weight1": random(1, 1, kernel_size)}, {"layer": layer})


#: Of `strided`, all that tell elements apart.
STRIDES = (
    *("channels_last", "sliced", "transposed", "batch last"),
    *("expanded over space", "expanded over the batch", "every other sample"),
)
#: Of `strided`, what an operator tells apart: channels next to each other, and what it copies. `torch.library.opcheck`
#: takes tenths of a second for each.
CHECKED = ("channels_last", "transposed")


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values, or values of the same shape, with strides that autograd really hands over."""
    batch, channels, height, width = x.shape
    wide = torch.empty(batch, channels, height, 2 * width, dtype=x.dtype)
    wide[..., ::2] = x
    return {
        "channels_last": in_layout(x, "channels_last"),
        "sliced": wide[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded over space": x[..., :1, :1].expand_as(x),
        "expanded over the batch": x[:1].expand_as(x),
        "every other sample": x.repeat_interleave(2, 0)[::2],
        "expanded scalar": torch.ones((), dtype=x.dtype).expand_as(x),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad", "residual"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    tensors, options = excitation("se", 12, torch.float32)
    x, grad, residual = (in_layout(random(*shape, seed=s), layout) for s in (0, 1, 2))
    other = strided(random(*shape, seed=3))[strides]
    x, grad, residual = (other if of == name else t for name, t in (("x", x), ("grad", grad), ("residual", residual)))
    check(x, {**tensors, "residual": residual}, {**options, "post_activation": "relu"}, grad)


def test_gradient_of_a_sum():
    x = random(2, 12, 6, 7)
    tensors, options = excitation("se", 12, torch.float32)
    check(x, tensors, options, strided(x)["expanded scalar"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (2, 6, 5), (2, 6, 3, 2, 4), (2, 6, 1, 1), (1, 1, 4, 4)], ids=str)
def test_output_and_gradient_keep_the_layout(shape, layout):
    x = in_layout(random(*shape), layout).requires_grad_()
    y = functional.channel_gate(x)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 5), (0, 8, 0, 0)], ids=str)
@pytest.mark.parametrize("kind", ["se", "eca"])
def test_empty(kind, shape):
    tensors, options = excitation(kind, 8, torch.float32)
    check(random(*shape), tensors, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(value, pool, layout):
    """One bad value in one sample: it and only it is spoilt, exactly where eager is."""
    x = random(2, 12, 6, 7)
    x[1, 3, 2, 5] = value
    tensors, options = excitation("se", 12, torch.float32)
    options = {**options, "pool": pool, "ties": "even"}
    inputs = {"x": in_layout(x, layout), **tensors}
    grad = [random(2, 12, 6, 7, seed=1)]
    (actual,), grads = run(apply(functional, options), inputs, grad)
    (eager,), eager_grads = run(apply(reference, options), inputs, grad)
    assert torch.equal(actual.isfinite(), eager.isfinite())
    assert torch.equal(grads["x"][0].isfinite(), eager_grads["x"][0].isfinite())
    assert torch.equal(grads["x"][1].isnan().any(), eager_grads["x"][1].isnan().any())
    torch.testing.assert_close(actual, eager, equal_nan=True)


def test_float16_mean_does_not_overflow():
    x = torch.full((1, 4, 64, 64), 60.0, dtype=torch.float16)
    assert functional.squeeze(x).tolist() == [[60.0] * 4]
    assert functional.channel_gate(x, gate="identity").eq(3600).all()


def test_large_mean_does_not_cancel():
    x = random(2, 8, 56, 56) + 1000
    torch.testing.assert_close(functional.squeeze(x).double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (1, 64, 56, 56)], ids=str)
def test_two_runs_agree_to_the_bit(shape, layout):
    tensors, options = excitation("se", 64, torch.float32)
    inputs = {"x": in_layout(random(*shape), layout), **tensors}
    grad = [random(*shape, seed=1)]
    first, second = (run(apply(functional, {**options, "pool": "avgmax"}), inputs, grad) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout):
    tensors, options = excitation("se", 64, torch.float32)
    inputs = {"x": in_layout(random(1, 64, 56, 56), layout), **tensors}
    grad, results = [random(1, 64, 56, 56, seed=1)], []
    for count in (3, 4):
        torch.set_num_threads(count)
        results.append(run(apply(functional, options), inputs, grad))
    assert torch.equal(results[0][0][0], results[1][0][0])
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in inputs)


@pytest.mark.parametrize("kind", ["se", "ese", "eca", "ceca", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
def test_gradcheck(pool, layout, kind):
    tensors, options = excitation(kind, 6, torch.float64)
    tensors |= {"affine_weight": random(6, seed=3).double() + 2, "affine_bias": random(6, seed=4).double()}
    tensors["residual"] = random(2, 6, 3, 4, seed=5).double()
    options |= {"pool": pool, "pre_activation": "silu", "post_activation": "gelu", "activation": "silu"}
    inputs = {"x": in_layout(random(2, 6, 3, 4, dtype=torch.float64), layout), **tensors}
    gradcheck(apply(functional, options), inputs)


@pytest.mark.parametrize("post", ["identity", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_double_backward(post, with_residual):
    tensors, options = excitation("se", 4, torch.float64)
    if with_residual:
        tensors["residual"] = random(2, 4, 3, 3, seed=5, dtype=torch.float64) + 3
    inputs = {"x": random(2, 4, 3, 3, dtype=torch.float64), **tensors}
    gradcheck(apply(functional, {**options, "post_activation": post, "activation": "silu"}), inputs, twice=True)


def test_torch_func_runs_the_reference():
    tensors, options = excitation("se", 6, torch.float64)
    function = apply(functional, options)
    x = random(3, 2, 6, 4, 4, dtype=torch.float64)
    batched = torch.func.vmap(lambda x: function(x, **tensors))(x)
    torch.testing.assert_close(batched, torch.stack([function(s, **tensors) for s in x]))
    grad = torch.func.grad(lambda x: function(x, **tensors).sum())(x[0])
    torch.testing.assert_close(grad, run(function, {"x": x[0], **tensors}, [torch.ones_like(x[0])])[1]["x"])


@pytest.mark.parametrize(
    "options", [{}, {"pool": "avgmax", "ties": "even"}, {"pool": "both"}, {"post_activation": "relu"}], ids=str
)
def test_saved_bytes(options):
    """Backward keeps x, y where a ReLU follows, and O(B * C): never a second map."""
    tensors, layer = excitation("se", 64, torch.float32)
    x = random(2, 64, 56, 56).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.channel_gate(x, **tensors, **layer, **options)
    maps = 2 if options.get("post_activation") == "relu" else 1
    assert sum(saved.values()) <= 1.05 * maps * x.untyped_storage().nbytes()


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_needs_no_gradient(frozen):
    tensors, options = excitation("se", 8, torch.float32)
    x = random(2, 8, 5, 5).requires_grad_(frozen != "x")
    tensors = {k: v.requires_grad_(frozen == "x") for k, v in tensors.items()}
    y = functional.channel_gate(x, **tensors, **options)
    y.sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert all((t.grad is None) == (frozen == "weights") for t in tensors.values())


def test_autocast_keeps_the_dtype_of_x():
    tensors, options = excitation("se", 8, torch.float32)
    x = random(2, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = functional.channel_gate(x.bfloat16(), **tensors, **options)
        full = functional.channel_gate(x, **tensors, **options)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    expected = reference.channel_gate(x, **tensors, **options)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=2e-2)


def test_mixed_dtypes_under_autocast_have_gradients_of_their_own_dtype():
    tensors, options = excitation("se", 8, torch.float32)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    x = random(2, 8, 5, 5, dtype=torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        functional.channel_gate(x, **leaves, **options).float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(t.grad.dtype == torch.float32 for t in leaves.values())


shapes = st.tuples(st.integers(0, 3), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=3))


@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    kind=st.sampled_from(["se", "ese", "eca", "ceca", "none"]),
    pool=st.sampled_from(["avg", "max", "avgmax", "both"]),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    affine=st.booleans(),
    residual=st.booleans(),
    pre=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    post=st.sampled_from(["identity", "relu", "silu", "gelu", "hard_swish"]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_option(shape, kind, pool, layout, grad_layout, affine, residual, pre, post, seed):
    batch, channels, spatial = shape
    full = (batch, channels, *spatial)
    tensors, options = excitation(kind, channels, torch.float64)
    if affine:
        tensors |= {
            "affine_weight": random(channels, seed=3, dtype=torch.float64),
            "affine_bias": random(channels, seed=4, dtype=torch.float64),
        }
    if residual:
        tensors["residual"] = random(*full, seed=5, dtype=torch.float64)
    x = in_layout(random(*full, seed=seed, dtype=torch.float64), layout)
    grad = in_layout(random(*full, seed=seed + 1, dtype=torch.float64), grad_layout)
    check(x, tensors, {**options, "pool": pool, "pre_activation": pre, "post_activation": post}, grad)


@pytest.mark.slow
@pytest.mark.long
def test_more_than_2_31_elements():
    """8.6 GB for x and y, about 10 s: offsets past 2**31, checked at both ends."""
    x = torch.zeros(2, 1, (1 << 30) + 64, dtype=torch.bfloat16)
    assert x.numel() - 5 > 2**31
    x[1, 0, -5:] = 1024.0
    y = functional.channel_gate(x, gate="identity", pool="max")
    assert y[1, 0, -6:].tolist() == [0.0] + [1024.0**2] * 5
    assert not y[0].any()


@pytest.mark.parametrize(
    "kind, options",
    [("eca", {}), ("eca", {"pool": "avgmax", "ties": "even", "post_activation": "relu"}), ("se", {"pool": "both"})],
)
def test_opcheck(kind, options):
    """Schema, fake kernel (strides too) and autograd registration as torch checks them, permuted layouts included."""
    from fused_attn.backends import choose
    from fused_attn.codes import LAYERS, POOLS, TIES

    x = random(2, 8, 5, 6)
    backend = choose("channel_gate", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    tensors, layer = excitation(kind, 8, torch.float32)
    parameters = [tensors.get(k) for k in ("weight1", "bias1", "weight2", "bias2")]
    codes = [
        LAYERS[layer["layer"]],
        POOLS[options.get("pool", "avg")],
        TIES[options.get("ties", "first")],
        1,
        6,
        0,
        ACTIVATIONS[options.get("post_activation", "identity")],
    ]
    from fused_attn.ops.channel_gate import BACKWARD, FORWARD

    for values in (x, *map(strided(x).get, CHECKED)):
        arguments = (values, *parameters, None, None, None, *codes)
        torch.library.opcheck(FORWARD[backend], arguments)
        y, state, index = FORWARD[backend](*arguments)
        torch.library.opcheck(
            BACKWARD[backend],
            (x, values, y if codes[-1] else None, state, index, *parameters, None, None, None, *codes),
        )


def test_both_pools_have_one_product_a_layer():
    """Small products cost their calls, in a network's compiled code as much as a pass over a map in cache."""
    x, weight = random(2, 6, 5, 4, dtype=torch.float64), random(6, 6, dtype=torch.float64)
    rows: list[int] = []

    def logits_of(descriptor: Tensor) -> Tensor:
        rows.append(descriptor.shape[0])
        return descriptor @ weight

    gate = gate_alone(x, functional.squeeze, logits_of, pool="both", ties="first", gate="sigmoid")
    assert rows == [4]
    torch.testing.assert_close(gate, torch.sigmoid(x.mean((2, 3)) @ weight + x.amax((2, 3)) @ weight))
