"""What every op owes autograd, dispatch and special values, on one small map each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._decomp import global_decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import functional, reference
from fused_attn.backends import OPS, choose
from fused_attn.codes import COMBINES
from fused_attn.ops.common import OPERATORS
from fused_attn.reference.select import select_weights
from tests.checks import LAYOUTS, Inputs, cast, error, in_layout, largest, random, run
from tests.ops import (
    test_axis_pool,
    test_cbam,
    test_channel_gate,
    test_criss_cross,
    test_mixed_scale,
    test_norm_gate,
    test_select,
    test_spatial_gate,
    test_squeeze_scale,
)

SHAPE = (2, 8, 5, 6)
EPILOGUES = ("identity", "relu", "silu")


class Op(NamedTuple):
    """call(module, pre, post) is the op as a function of `inputs`, with these activations where it takes any."""

    call: Callable[[object, str, str], Callable[..., Tensor | tuple[Tensor, ...]]]
    inputs: Inputs  # in float64; the first is the map, or the first of the branches
    parameters: tuple[str, ...] = ()  # of the inputs, those that the op itself may read in another dtype


def activations(pre: str, post: str) -> dict[str, str]:
    return {"pre_activation": pre, "post_activation": post}


def two_phases(module, pre: str, post: str):
    """select_with around select's own excitation."""

    def function(affine_weight, affine_bias, weight1, bias1, weight2, bias2, **branches):
        parameters = weight1, bias1, weight2, bias2

        def excitation(s: Tensor) -> Tensor:
            return select_weights(s.to(weight1.dtype), *parameters, paths=2)

        return module.select_with(
            list(branches.values()), excitation, affine=(affine_weight, affine_bias), pre_activation=pre
        )

    return function


def every_op() -> dict[str, Op]:
    full, double = {"dtype": torch.float64}, torch.float64
    # With clear maxima, also after rounding, an affine and a gate: nothing here is about near-equal values.
    x, residual = {"x": test_cbam.separated(SHAPE, double)}, {"residual": random(*SHAPE, seed=5, **full)}
    affine = {"affine_weight": random(8, seed=3, **full).abs() + 0.5, "affine_bias": random(8, seed=4, **full)}
    norm, convolution = test_spatial_gate.batch_norm(double), test_spatial_gate.convolution(SHAPE, double)
    excitation, _ = test_channel_gate.excitation("se", 8, double)
    both, _ = test_cbam.weights("se", SHAPE, double)
    select = test_select.maps(SHAPE, 2, dtype=double) | test_select.weights(8, 2, dtype=double)
    select |= test_select.affine_of(8, 2, double)
    of_channels, of_space = ({"gate": random(*shape, seed=2, **full)} for shape in (SHAPE[:2], (2, 1, 5, 6)))

    def squeezed(m, pre, _):
        return test_squeeze_scale.squeeze(m, pool="avgmax", pre_activation=pre)

    def pooled(m, pre, _):
        return test_squeeze_scale.channel_pool(m, pre_activation=pre)

    def scaled(m, pre, post):
        return test_squeeze_scale.scale(m, **activations(pre, post))

    def with_options(apply, **options):
        return lambda m, pre, post: apply(m, {**options, **activations(pre, post)})

    channel_gate, spatial_gate = (with_options(of.apply) for of in (test_channel_gate, test_spatial_gate))
    cbam, names = with_options(test_cbam.apply), tuple(affine)
    pairs = {"key": random(2, 8, 3, 7, seed=8, **full), "value": random(2, 12, 3, 7, seed=9, **full)}
    context = {"weight": random(1, 8, 1, 1, seed=6, **full), "bias": random(1, seed=7, **full)}
    found = {
        "squeeze": Op(squeezed, x | affine, names),
        "channel_pool": Op(pooled, x | affine, names),
        "scale": Op(scaled, x | of_channels | affine | residual, ("gate", *names)),
        "scale/space": Op(scaled, x | of_space | affine | residual, ("gate", *names)),
        "channel_gate": Op(channel_gate, x | excitation | affine | residual, (*excitation, *names)),
        "channel_gate/both": Op(
            with_options(test_channel_gate.apply, pool="both"), x | excitation | residual, tuple(excitation)
        ),
        "spatial_gate": Op(spatial_gate, x | convolution | affine | residual, (*convolution, *names)),
        "spatial_gate/batch_norm": Op(spatial_gate, x | convolution | norm | residual, (*convolution, *norm)),
        "cbam": Op(cbam, x | both | affine | residual, (*both, *names)),
        "cbam/batch_norm": Op(cbam, x | both | norm | residual, (*both, *norm)),
        "axis_pool": Op(lambda m, *_: test_axis_pool.pools(m, maxima=True, channels=True), x),
        "context_pool": Op(lambda m, *_: m.context_pool, x | context, tuple(context)),
        "context_pool/gate": Op(
            lambda m, *_: functools.partial(m.context_gate, excitation=torch.sigmoid), x | context, tuple(context)
        ),
        "select/energy": Op(
            lambda m, *_: lambda x, bias: m.energy_gate(x, lambda e: (e.sqrt() / e.mean(1, True)).tanh(), bias),
            x | {"bias": affine["affine_bias"]},
            ("bias",),
        ),
        "norm_gate/moments": Op(
            lambda m, *_: lambda x: m.moments_gate(x, lambda mean, variance: (mean / (variance + 1).sqrt()).tanh()), x
        ),
        "position_attention": Op(
            lambda m, *_: lambda x, key, value: m.position_attention(x, key, value, scale=0.3), x | pairs
        ),
        "criss_cross_attention": Op(
            lambda m, *_: m.criss_cross_attention, test_criss_cross.inputs_of(SHAPE, 3, dtype=double)
        ),
        "simam": Op(lambda m, *_: m.simam, x),
        "select": Op(
            lambda m, pre, _: test_select.apply(m.select, pre_activation=pre),
            select,
            ("weight1", "bias1", "weight2", "bias2", *names),
        ),
        "select/with": Op(two_phases, select, names),
        "norm_gate": Op(
            lambda m, pre, post: test_norm_gate.apply(m, activation=pre, post_activation=post),
            test_norm_gate.inputs_of(x["x"], residual=True),
            ("weight", "bias"),
        ),
        "spatial_logits": Op(lambda m, *_: m.spatial_logits, {"pooled": random(2, 2, 5, 6, **full), **convolution}),
    }
    for combine in COMBINES:
        names = test_mixed_scale.GATES_OF.get(combine, ("channel", "spatial"))
        gates = test_mixed_scale.gates_of(SHAPE, names, double)
        call = functools.partial(test_mixed_scale.mixed_scale, combine=combine)
        found[f"mixed_scale/{combine}"] = Op(lambda m, *_, call=call: call(m), x | gates, tuple(gates))
    return found


ALL = every_op()
AFTER_GATE = [name for name, op in ALL.items() if "residual" in op.inputs]


def variants(name: str) -> Iterator[tuple[str, Inputs]]:
    """(post_activation, inputs): every epilogue, with and without a residual, where the op has one."""
    inputs = ALL[name].inputs
    if "residual" not in inputs:
        yield "identity", inputs
        return
    for post in EPILOGUES:
        yield post, inputs
        yield (
            post,
            inputs | {"residual": None}
            if name == "norm_gate"
            else {k: v for k, v in inputs.items() if k != "residual"},
        )


def gradients_for(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [random(*y.shape, seed=9 + i, dtype=y.dtype) for i, y in enumerate(outputs)]


def leaves_of(inputs: Inputs, wanted: tuple[str, ...] | None = None) -> Inputs:
    return {
        k: None if v is None else v.detach().requires_grad_(wanted is None or k in wanted) for k, v in inputs.items()
    }


def test_every_op_is_here():
    """select/many is an op of the reference alone."""
    bases = {name.partition("/")[0] for name in ALL}
    assert set(OPS) - set(ALL) - {"mixed_scale"} == {"select/many"}
    assert bases == set(OPERATORS)


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_with_a_graph_is_the_one_without(name):
    """`create_graph=True` runs the reference; the first gradient is the same number."""
    for post, inputs in variants(name):
        found = []
        for graph in (False, True):
            leaves = leaves_of(inputs)
            y = ALL[name].call(functional, "silu", post)(**leaves)
            given = {k: leaf for k, leaf in leaves.items() if leaf is not None}
            grads = [grad.requires_grad_() for grad in gradients_for(y)]
            found.append(torch.autograd.grad(y, list(given.values()), grads, create_graph=graph))
        assert all(grad.requires_grad for grad in found[1])
        for key, without, with_graph in zip(given, *found, strict=True):
            torch.testing.assert_close(with_graph, without, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_with_a_graph_of_inputs_made_from_the_map(name):
    """As a gate is: the way from it back to the map is taken once, not by the reference, too."""
    for post, inputs in variants(name):
        first, found = next(iter(inputs)), []
        for graph in (False, True):
            leaf = inputs[first].detach().requires_grad_()
            others = {k: None if v is None else v * leaf.mean().cos() for k, v in inputs.items() if k != first}
            y = ALL[name].call(functional, "silu", post)(**{first: leaf, **others})
            found.append(torch.autograd.grad(y, leaf, gradients_for(y), create_graph=graph)[0])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_one_input_alone_requires_a_gradient(name):
    """Whichever it is: its gradient is that among all others', and the others have none."""
    for post, inputs in variants(name):
        function = ALL[name].call(functional, "silu", post)
        grads = gradients_for(function(**inputs))
        _, expected = run(function, inputs, grads)
        for key in expected:
            leaves = leaves_of(inputs, (key,))
            torch.autograd.backward(function(**leaves), grads)
            torch.testing.assert_close(leaves[key].grad, expected[key], rtol=1e-11, atol=1e-12)
            assert all(leaf is None or leaf.grad is None for other, leaf in leaves.items() if other != key)


@pytest.mark.parametrize("post", EPILOGUES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("name", [name for name in AFTER_GATE if name != "norm_gate"])
def test_maps_that_backward_keeps(name, with_residual, post):
    """x; y where a ReLU follows, and then no residual; the residual, and then no y, for any other activation."""
    if choose(name, torch.empty(SHAPE)) == "reference":
        pytest.skip("no native library on this machine: eager keeps what it keeps")
    inputs = {k: v for k, v in ALL[name].inputs.items() if with_residual or k != "residual"}
    leaves, saved = leaves_of(inputs), set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ALL[name].call(functional, "silu", post)(**leaves)
    assert leaves["x"].data_ptr() in saved
    assert (y.data_ptr() in saved) == (post == "relu")
    assert not with_residual or (leaves["residual"].data_ptr() in saved) == (post == "silu")


#: How far those gradients may be from float64's, of the largest: what is rounded in between moves them. Elsewhere 1e-5.
ROUNDED = {
    "mixed_scale/max": 0.01,  # the products, which are then equal, or not
    **dict.fromkeys(("cbam", "cbam/batch_norm"), 0.05),  # the gated map
    **dict.fromkeys(("select/with", "context_pool/gate"), 0.02),  # the descriptor
}


@pytest.mark.parametrize("name", [name for name, op in ALL.items() if op.parameters])
def test_float32_gradients_of_parameters_of_a_bfloat16_map(name):
    """They have float32's digits, of which bfloat16 holds two or three."""
    op, pre = ALL[name], "silu"
    rounded = {k: v.to(torch.float32 if k in op.parameters else torch.bfloat16) for k, v in op.inputs.items()}
    if name.startswith("spatial_gate"):  # after a prologue it rounds the pools
        pre, rounded = "identity", {k: v for k, v in rounded.items() if not k.startswith("affine")}
    if name == "norm_gate":  # the excitation is the caller's
        rounded |= dict.fromkeys(("weight1", "weight2"))
    exact = cast(rounded, torch.float64)
    grads = [grad.bfloat16() for grad in gradients_for(op.call(reference, pre, "identity")(**exact))]
    with torch.autocast("cpu", torch.bfloat16):
        _, found = run(op.call(functional, pre, "identity"), rounded, grads)
    _, expected = run(op.call(reference, pre, "identity"), exact, [grad.double() for grad in grads])
    scale = max(largest(expected[key]) for key in op.parameters if key in expected)
    for key in (key for key in op.parameters if key in expected):
        assert found[key].dtype == torch.float32
        assert error(found[key], expected[key]) <= ROUNDED.get(name, 1e-5) * scale, key
        if largest(expected[key]) > 1e-3 * scale:  # a bias before a BatchNorm has none
            assert not torch.equal(found[key], found[key].bfloat16().float()), key


def check_special_values(name: str, layout: str) -> None:
    """In one place of the last sample, through activations that clamp: outputs and gradients are eager's."""
    op = ALL[name]
    inputs = {k: in_layout(v, layout) if v.dim() == 4 else v for k, v in cast(op.inputs, torch.float32).items()}
    first = next(iter(inputs))
    for value in (0.5, torch.nan, -torch.nan, torch.inf):
        inputs[first] = inputs[first].clone()
        inputs[first][1, 1, 2, 3] = value
        for pre, post in (("hard_swish", "hard_sigmoid"), ("leaky_relu", "relu6")):
            ours, theirs = (op.call(module, pre, post) for module in (functional, reference))
            grads = gradients_for(theirs(**inputs))
            found, found_grads = run(ours, inputs, grads)
            eager, eager_grads = run(theirs, inputs, grads)
            torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4, equal_nan=True)
            mine, expected = found_grads[first], eager_grads[first]
            torch.testing.assert_close(mine[0], expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)
            # What eager passes on at a NaN itself depends on whether its loop is at a whole vector.
            mine[1, 1, 2, 3] = expected[1, 1, 2, 3] = 0
            assert mine[1].isfinite().all() == expected[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_special_values(name, layout):
    check_special_values(name, layout)


#: Whose backward reads the result, as that of torch's scaled_dot_product_attention does.
KEEPS_RESULT = {"criss_cross_attention", "position_attention"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in ALL if name not in KEEPS_RESULT])
def test_what_it_returns_may_be_written_over(name, layout):
    """As by a shortcut that is added in place."""
    op = ALL[name]
    inputs = {k: in_layout(v, layout) if v.dim() == 4 else v for k, v in op.inputs.items()}
    found = []
    for write in (lambda y: y.mul_(2), lambda y: y * 2):
        leaves = leaves_of(inputs)
        outputs = op.call(functional, "silu", "identity")(**leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if name.startswith("axis_pool"):
            del outputs[0]  # the map itself
        outputs = [write(y) for y in outputs if y.requires_grad]
        torch.autograd.backward(outputs, gradients_for(tuple(outputs)))
        found.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


class Calls(TorchDispatchMode):
    """The library's operators that are called, with what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fused_attn":
            self.seen.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_operators_in_bfloat16(name, layout):
    """Their fake kernels give the dtypes, too, with parameters in float32."""
    op = ALL[name]
    if choose(name.partition("/")[0].replace("spatial_logits", "spatial_gate"), torch.empty(SHAPE)) == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    inputs = {k: v.to(torch.float32 if k in op.parameters else torch.bfloat16) for k, v in op.inputs.items()}
    inputs = {k: in_layout(v, layout) if v.dim() == 4 else v for k, v in inputs.items()}
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        leaves = leaves_of(inputs)
        y = op.call(functional, "silu", "relu")(**leaves)
        torch.autograd.backward(y, gradients_for(y))
    assert len(calls.seen) >= 2
    for function, arguments, options in calls.seen:
        torch.library.opcheck(function, arguments, options, test_utils=("test_schema", "test_faketensor"))


def test_inductor_calls_what_is_written_out_elsewhere(monkeypatch):
    """With CI set, Inductor takes a decomposition of an operator that nobody told it of for somebody's mistake."""
    monkeypatch.setenv("CI", "1")
    x = random(2, 6, 5, 7)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(functional.simam)(x), functional.simam(x))
    told = set(importlib.import_module("torch._inductor.lowering").lowerings)
    assert {
        op for op in global_decomposition_table["post_autograd"] if getattr(op, "namespace", "") == "fused_attn"
    } <= told
