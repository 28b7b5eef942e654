"""`energy_gate` against its formula: values, gradients, layouts, special values; and how often it reads the map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.export import export
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import backends, functional, reference
from tests.checks import LAYOUTS, assert_equivalent, gradcheck, in_layout, random

needs_native = pytest.mark.skipif(
    backends.unavailable("cpu", "select/energy", "cpu") is not None, reason="no native library on this machine"
)


def excitation(energy: Tensor) -> Tensor:
    return 1 + (energy.sqrt() / (energy.sqrt().mean(1, keepdim=True) + 1e-6)).tanh()


def gated(module, x, bias):
    return module.energy_gate(x, excitation, bias)


def original(x, bias=None):
    axes = tuple(range(2, x.dim()))
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    y = x * (1 + (norm / (norm.mean(1, keepdim=True) + 1e-6)).tanh())
    return y if bias is None else y + bias.view(1, -1, *(1 for _ in axes))


SHAPES = [(3, 8, 7), (2, 5, 6, 9), (2, 3, 3, 4, 5), (1, 16, 1, 1), (1, 33, 19, 5)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, bias):
    inputs = {"x": random(*shape, dtype=torch.float64)}
    inputs |= {"bias": random(shape[1], seed=1, dtype=torch.float64)} if bias else {}
    grad = random(*shape, seed=2, dtype=torch.float64)
    found = []
    for function in (lambda x, bias=None: gated(functional, x, bias), original):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y = function(**leaves)
        found.append([y, *torch.autograd.grad(y, [*leaves.values()], grad)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_eager(dtype, layout):
    """In the map's layout, the gradient in another or one number for all."""
    inputs = {"x": random(2, 9, 13, 6, dtype=dtype), "bias": random(9, seed=1, dtype=dtype)}
    inputs["x"] = in_layout(inputs["x"], layout)
    for grad in (
        random(2, 13, 6, 9, seed=2, dtype=dtype).movedim(-1, 1),
        random(2, 9, 13, 6, seed=3, dtype=dtype),
        torch.ones((), dtype=dtype).expand(2, 9, 13, 6),
    ):
        assert_equivalent(
            lambda x, bias: gated(functional, x, bias), lambda x, bias: gated(reference, x, bias), inputs, [grad]
        )
    assert gated(functional, **inputs).stride() == inputs["x"].stride()


def test_gradients_and_those_of_gradients():
    inputs = {"x": random(2, 3, 2, 3, dtype=torch.float64), "bias": random(3, seed=1, dtype=torch.float64)}
    for twice in (False, True):
        gradcheck(lambda x, bias: gated(functional, x, bias), inputs, twice=twice)


def test_an_excitation_that_reads_nothing_of_it_and_one_with_parameters():
    weight = random(4, dtype=torch.float64).requires_grad_()
    x = random(2, 4, 3, 5, dtype=torch.float64)
    for needs in (False, True):
        leaf = x.clone().requires_grad_(needs)
        y = functional.energy_gate(leaf, lambda e: weight.expand(e.shape))
        grads = torch.autograd.grad(y.sum(), [weight, *([leaf] if needs else [])])
        torch.testing.assert_close(grads[0], x.sum((0, 2, 3)), rtol=1e-10, atol=1e-12)
        if needs:
            torch.testing.assert_close(grads[1], weight.view(1, 4, 1, 1).expand_as(x).detach())


@pytest.mark.parametrize("module", [functional, reference], ids=["fused", "reference"])
def test_special_values(module):
    assert gated(module, random(0, 4, 3, 3), None).shape == (0, 4, 3, 3)
    assert module.energy_gate(random(2, 4, 0, 3), torch.sigmoid).shape == (2, 4, 0, 3)
    large = torch.full((1, 2, 64, 64), 200.0, dtype=torch.float16)  # whose squares float16 has not
    assert module.energy_gate(large, lambda e: e / e.mean(1, True)).equal(large)
    x = random(2, 4, 3, 3)
    x[0, 1, 0, 0] = torch.nan
    y = module.energy_gate(x, torch.sigmoid)
    assert y[0, 1].isnan().all() and y.isnan().sum() == 9


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, Tensor)]
        if function.namespace == "fused_attn" or any(t.dim() == 4 and t.shape[2:] == (24, 25) for t in tensors):
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@needs_native
def test_reads_the_map_in_four_operators():
    """Two forward, two backward: no other touches a map, but for views."""
    x = random(2, 8, 24, 25).requires_grad_()
    with Operators() as operators:
        y = functional.energy_gate(x, excitation)
        torch.autograd.grad(y, x, torch.ones_like(x))
    views = {"new_zeros", "ones_like", "expand", "detach", "view", "alias"}
    assert [n for n in operators.seen if n not in views] == ["select_dots", "scale", "select_dots", "select_sum"]


def test_compiles_and_exports():
    torch._dynamo.reset()
    x, bias = random(2, 4, 5, 6, dtype=torch.float64), random(4, seed=1, dtype=torch.float64)

    class Block(torch.nn.Module):
        def forward(self, x):
            return gated(functional, x, bias)

    program = export(Block(), (x,)).module()
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    for function in (program, compiled):
        leaf = x.clone().requires_grad_()
        expected = x.clone().requires_grad_()
        y, theirs = function(leaf), original(expected, bias)
        torch.testing.assert_close(y, theirs, rtol=1e-9, atol=1e-11)
        mine, other = (torch.autograd.grad(t.square().sum(), i)[0] for t, i in ((y, leaf), (theirs, expected)))
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10)


ERRORS = {
    "bias: expected shape (4,); got (3,)": lambda x: functional.energy_gate(x, torch.sigmoid, torch.ones(3)),
    "excitation: expected it to return (2, 4); got (2, 3)": lambda x: functional.energy_gate(x, lambda e: e[:, :3]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message](random(2, 4, 3, 3))
    assert str(caught.value) == message


def test_no_tensor_as_a_gate():
    with pytest.raises(TypeError, match="excitation: expected a tensor; got float"):
        functional.energy_gate(random(2, 4, 3, 3), lambda e: 0.5)  # type: ignore[arg-type,return-value]
