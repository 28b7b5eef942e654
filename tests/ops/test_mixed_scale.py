"""mixed_scale against its reference, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fused_attn import functional, reference
from fused_attn.backends import choose
from fused_attn.codes import COMBINES
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random, run
from tests.ops.test_channel_gate import CHECKED, STRIDES, strided

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((2, 16, 7, 7), (3, 8, 1, 1), (1, 40, 13, 17), (2, 1, 9, 5), (1, 300, 3, 40), (1, 24, 150, 41), (2, 3, 1, 9))
OTHER_RANKS = ((4, 24, 33), (1, 12, 3, 4, 5), (1, 5, 9000))
GATES = ("channel", "spatial", "rows", "columns")
#: Of those that take no others.
GATES_OF = {"strips": ("rows", "columns"), "gate": ("spatial",)}
#: (combine, gates)
KINDS = (
    *(("sum", names) for names in (GATES, ("channel", "spatial"), ("spatial", "columns"), ("rows",))),
    *(("product", names) for names in (GATES, ("rows", "columns"), ("channel", "rows"), ("columns",), ("spatial",))),
    *((name, ("channel", "spatial")) for name in ("max", "sigmoid")),
    *GATES_OF.items(),
)
#: Those that are of no rows and columns alone.
OF_ANY_RANK = [combine for combine in COMBINES if combine != "strips"]


def mixed_scale(module, combine):
    def function(x, **gates):
        return module.mixed_scale(x, **gates, combine=combine)

    return function


def gates_of(shape, names, dtype=torch.float32):
    batch, channels, *space = shape
    shapes = {"channel": (batch, channels), "spatial": (batch, 1, *space)}
    if len(space) == 2:
        shapes |= {"rows": (*shape[:3], 1), "columns": (batch, channels, 1, space[1])}
    # Nowhere near 0 in sum: what cancels there says nothing of a kernel.
    return {n: random(*shapes[n], seed=i + 2, dtype=dtype).abs() + 0.1 for i, n in enumerate(names)}


def check(x, combine, gates, grad=None):
    grads = [random(*x.shape, seed=1, dtype=x.dtype) if grad is None else grad]
    assert_equivalent(mixed_scale(functional, combine), mixed_scale(reference, combine), {"x": x, **gates}, grads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
def test_mixed_scale(combine, names, dtype, layout):
    for shape in SHAPES:
        x = in_layout(random(*shape, dtype=dtype), layout)
        check(x, combine, gates_of(shape, names, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", OF_ANY_RANK)
def test_other_ranks(combine, layout):
    for shape in OTHER_RANKS:
        names = GATES_OF.get(combine, ("channel", "spatial"))
        check(in_layout(random(*shape), layout), combine, gates_of(shape, names))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
def test_one_sample_among_several_threads(combine, names, layout):
    """Channels of it (NCHW) or rows (channels_last); sums over all of those are put together."""
    shape = (1, 24, 61, 40)
    check(in_layout(random(*shape), layout), combine, gates_of(shape, names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("of", ["x", "grad"])
def test_strides(of, strides, layout):
    shape = (2, 12, 6, 7)
    x, grad = (in_layout(random(*shape, seed=s), layout) for s in (0, 1))
    other = strided(random(*shape, seed=3))[strides]
    x, grad = (other if of == name else t for name, t in (("x", x), ("grad", grad)))
    check(x, "product", gates_of(shape, GATES), grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["product", "sum"])
def test_gates_of_any_strides_and_dtype(combine, layout):
    """As convolutions leave them, as slices of one strip, transposed; in float32 on a bfloat16 map."""
    shape = (2, 12, 6, 7)
    x = in_layout(random(*shape), layout)
    strip = random(2, 12, 13, 1, seed=2)
    for lay in LAYOUTS:
        rows, columns = in_layout(strip, lay).split([6, 7], 2)
        channel, spatial = random(2, 24, 1, 1, seed=3)[:, ::2], random(2, 1, 7, 6, seed=4)
        gates = {"channel": channel, "spatial": spatial.mT, "rows": rows, "columns": columns.mT}
        check(x, combine, gates)
    gates = {name: gate.detach().requires_grad_() for name, gate in gates.items()}
    y = functional.mixed_scale(x.bfloat16(), **gates, combine=combine)
    exact = reference.mixed_scale(x.bfloat16().double(), **gates, combine=combine)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=0)  # the interpreter cuts off what it rounds
    found = torch.autograd.grad(y, list(gates.values()), torch.ones_like(y))
    expected = torch.autograd.grad(exact, list(gates.values()), torch.ones_like(exact))
    for gate, mine, theirs in zip(gates.values(), found, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == gate.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("equal", ["before rounding", "after it"])
def test_equal_products_share_the_gradient(equal, dtype, layout):
    """Of "max": half to each, as torch.maximum, also where only rounding makes them equal."""
    shape = (2, 12, 6, 7)
    x, gates = random(*shape, dtype=dtype), gates_of(shape, ("channel", "spatial"), dtype)
    if equal == "before rounding":
        x = x.mul(2).round()  # with zeros
        gates = {name: gate.mul(2).ceil().div(2) for name, gate in gates.items()}
    else:  # next to each other below 2: where a product is in the next binade, they are nearer than its last digit
        eps = torch.finfo(dtype).eps
        gates = {name: torch.full_like(gate, 2 - n * eps) for n, (name, gate) in enumerate(gates.items(), 1)}
        exact = [x.double() * gate.flatten()[0].double() for gate in gates.values()]
        assert dtype == torch.float64 or (exact[0] != exact[1]).all()
    x = in_layout(x, layout)
    inputs, grad = {"x": x, **gates}, [random(*shape, seed=1, dtype=dtype).mul(4).round()]
    assert (x * gates["channel"][..., None, None] == x * gates["spatial"]).double().mean() > 0.2
    (found,), grads = run(mixed_scale(functional, "max"), inputs, grad)
    (eager,), eager_grads = run(mixed_scale(reference, "max"), inputs, grad)
    assert torch.equal(found, eager)
    half = equal == "after it" and dtype.itemsize == 2  # eager rounds each term of its sums
    for name, value in eager_grads.items():
        torch.testing.assert_close(grads[name], value, **({"rtol": 0.05, "atol": 0.05} if half else {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
def test_nan_and_infinity(combine, names, layout):
    shape = (2, 5, 6, 40)
    x = random(*shape)
    x[0, 3, 2, 2] = x[1, 0, 5, 39] = float("nan")
    x[1, 4, 0, 1] = float("inf")
    inputs = {"x": in_layout(x, layout), **gates_of(shape, names)}
    for gate in list(inputs.values())[1:]:
        gate.view(-1)[7] = float("nan")
    grad = [random(*shape, seed=1)]
    (found,), grads = run(mixed_scale(functional, combine), inputs, grad)
    (eager,), eager_grads = run(mixed_scale(reference, combine), inputs, grad)
    torch.testing.assert_close(found, eager, equal_nan=True)
    for name, value in eager_grads.items():
        torch.testing.assert_close(grads[name], value, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (2, 0, 3, 3)], ids=str)
def test_empty(shape, layout):
    for combine, names in KINDS:
        check(in_layout(random(*shape), layout), combine, gates_of(shape, names))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
def test_gradcheck(combine, names, layout):
    x = in_layout(random(2, 3, 2, 3, dtype=torch.float64), layout).requires_grad_()
    gates = [g.requires_grad_() for g in gates_of(x.shape, names, torch.float64).values()]

    def function(x, *gates):
        return functional.mixed_scale(x, **dict(zip(names, gates, strict=True)), combine=combine)

    assert gradcheck(function, (x, *gates))
    assert gradgradcheck(function, (x, *gates))


def test_only_some_gradients_are_wanted():
    x, gates = random(2, 4, 5, 6), gates_of((2, 4, 5, 6), GATES)
    for wanted in ("x", *GATES):
        tensors = {n: t.detach().requires_grad_(n == wanted) for n, t in {"x": x, **gates}.items()}
        grads = [
            torch.autograd.grad(module.mixed_scale(**tensors).sum(), tensors[wanted])[0]
            for module in (functional, reference)
        ]
        torch.testing.assert_close(*grads)


def test_deterministic():
    assert torch.are_deterministic_algorithms_enabled()
    shape = (2, 20, 33, 31)
    inputs = {"x": random(*shape), **gates_of(shape, GATES)}
    grad = [random(*shape, seed=1)]
    first, again = (run(mixed_scale(functional, "product"), inputs, grad)[1] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in inputs)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(shape, kind, layout, dtype):
    combine, names = kind
    check(in_layout(random(*shape, dtype=dtype), layout), combine, gates_of(shape, names, dtype))


@pytest.mark.parametrize(("combine", "names"), [KINDS[0], *KINDS[6:8], *KINDS[-4:]], ids=str)
def test_opcheck(combine, names):
    from fused_attn.ops.mixed_scale import BACKWARD, FORWARD

    x = random(2, 8, 5, 6)
    backend = choose("mixed_scale", x)
    if backend == "reference":
        pytest.skip("no native library on this machine: the reference is not an operator")
    given = gates_of(x.shape, names)
    gates = [given.get(name) for name in GATES]
    for values in (x, *map(strided(x).get, CHECKED)):
        torch.library.opcheck(FORWARD[backend], (values, *gates, COMBINES[combine]))
        torch.library.opcheck(BACKWARD[backend], (x, values, *gates, COMBINES[combine]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), [KINDS[0], KINDS[5], *KINDS[-4:]], ids=str)
def test_compiles_to_one_graph(combine, names, layout):
    torch._dynamo.reset()  # one function may be compiled eight times
    x = in_layout(random(2, 8, 5, 6), layout)
    compiled = torch.compile(mixed_scale(functional, combine), fullgraph=True, backend="aot_eager")
    inputs, grad = {"x": x, **gates_of(x.shape, names)}, [random(*x.shape, seed=1)]
    (found,), grads = run(compiled, inputs, grad)
    (expected,), expected_grads = run(mixed_scale(functional, combine), inputs, grad)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert all(torch.equal(grads[name], expected_grads[name]) for name in inputs)


@pytest.mark.parametrize("combine", ["sum", "sigmoid"])
def test_autocast(combine):
    """x keeps its dtype, gates are read as they are."""
    x = random(2, 8, 5, 6)
    gates = gates_of(x.shape, ("channel", "spatial"), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.mixed_scale(x, **gates, combine=combine)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y, reference.mixed_scale(x, **gates, combine=combine))


def test_transforms_see_through_it():
    x, gates = random(2, 8, 5, 6), gates_of((2, 8, 5, 6), ("rows", "columns"))
    found = torch.func.grad(lambda x: functional.mixed_scale(x, **gates).square().sum())(x)
    torch.testing.assert_close(found, 2 * x * (gates["rows"] * gates["columns"]) ** 2)


x_good = random(2, 4, 5, 6)
good = gates_of(x_good.shape, GATES)
BAD_CALLS = {
    "combine: expected one of product, sum, max, sigmoid, strips, gate; got 'mean'": {
        "channel": good["channel"],
        "combine": "mean",
    },
    "channel: expected at least one gate; got None for all": {},
    "channel: expected shape (2, 4); got (2, 5)": {"channel": random(2, 5)},
    "spatial: expected shape (2, 1, 5, 6); got (2, 1, 5, 5)": {"spatial": random(2, 1, 5, 5)},
    "rows: expected shape (2, 4, 5, 1); got (2, 4, 6, 1)": {"rows": random(2, 4, 6, 1)},
    "columns: expected shape (2, 4, 1, 6); got (2, 4, 6, 1)": {"columns": random(2, 4, 6, 1)},
    "combine: expected channel and spatial for 'max'; got channel": {"channel": good["channel"], "combine": "max"},
    "combine: expected channel and spatial for 'sigmoid'; got channel, spatial, rows": {
        **{n: good[n] for n in GATES[:3]},
        "combine": "sigmoid",
    },
    "combine: expected channel and spatial for 'max'; got no gate": {"combine": "max"},
    "combine: expected rows and columns for 'strips'; got rows": {"rows": good["rows"], "combine": "strips"},
    "combine: expected spatial for 'gate'; got channel, spatial": {
        **{n: good[n] for n in GATES[:2]},
        "combine": "gate",
    },
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        functional.mixed_scale(x_good, **BAD_CALLS[message])
    assert str(caught.value) == message


def test_other_errors():
    with pytest.raises(ValueError, match=r"^x: expected \(B, C, H, W\) for gates of rows and columns; got shape"):
        functional.mixed_scale(random(2, 4, 5), rows=random(2, 4, 5, 1))
    with pytest.raises(TypeError, match="^channel: expected a tensor; got float$"):
        functional.mixed_scale(x_good, channel=0.5)
    with pytest.raises(TypeError, match="^rows: expected float64, float32, float16 or bfloat16; got torch.int64$"):
        functional.mixed_scale(x_good, rows=good["rows"].long())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixel_gate(dtype, layout):
    """The function against the formula, forward and both gradients; logits in the other layout too."""
    for shape in ((2, 6, 7, 9), (1, 3, 40, 33), (2, 1, 5, 5), (2, 5, 33), (1, 4, 3, 4, 5), (0, 4, 3, 3), (2, 4, 0, 3)):
        x = in_layout(random(*shape, dtype=dtype), layout)
        for of_logits in LAYOUTS:
            logits = in_layout(random(*shape, seed=2, dtype=dtype, scale=3.0), of_logits)
            grads = [random(*shape, seed=1, dtype=dtype)]
            assert_equivalent(functional.pixel_gate, reference.pixel_gate, {"x": x, "logits": logits}, grads)


def test_pixel_gate_again():
    """Second derivatives, strides, and what it does not take."""
    x, z = (random(2, 3, 4, 5, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    assert torch.autograd.gradgradcheck(functional.pixel_gate, (x, z))
    torch.testing.assert_close(
        functional.pixel_gate(x[..., ::2], z[..., 1::2][..., :1].expand(2, 3, 4, 3)),
        reference.pixel_gate(x[..., ::2], z[..., 1::2][..., :1].expand(2, 3, 4, 3)),
    )
    with pytest.raises(ValueError, match=r"^logits: expected shape \(2, 3, 4, 5\); got \(2, 3, 4, 4\)$"):
        functional.pixel_gate(x, z[..., :4])
