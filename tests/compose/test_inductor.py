"""What Inductor makes of the operators: they get maps as the convolutions around them write them, and where no gradient
is asked for they are code of its own."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fused_attn import backend, fuse, keep_operators, nn, reference
from fused_attn.backends import choose
from fused_attn.ops import inlined
from tests.checks import random

C, SIDE = 16, 18
A_MAP = f"empty_strided_cpu((2, {C}, {SIDE}, {SIDE})"


@pytest.fixture(autouse=True)
def kernels():
    if choose("channel_gate", torch.empty(0)) == "reference":
        pytest.skip("no native library on this machine: the blocks are plain PyTorch")
    torch._dynamo.reset()


class Residual(torch.nn.Module):
    """A block where networks have it: behind a BatchNorm, before a sum."""

    def __init__(self, block: torch.nn.Module, *, relu: bool = False) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, C, 3)
        self.conv, self.bn, self.block, self.relu = torch.nn.Conv2d(C, C, 1), torch.nn.BatchNorm2d(C), block, relu
        self.head = torch.nn.Conv2d(C, 3, 1)
        torch.nn.init.normal_(self.bn.weight)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn(self.conv(x))
        return self.head((self.block(y.relu() if self.relu else y) + x).relu())


def code_of(call):
    with torch._inductor.config.patch(force_disable_caches=True):
        return run_and_get_code(call)


def inferred(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.slow  # a compilation
def test_no_map_is_copied_between_convolutions():
    """Convolutions on the CPU write channels last; a map copied to the strides that were traced would lie otherwise."""
    blocks = nn.SqueezeExcite(C), torch.nn.Conv2d(C, C, 1), nn.CBAM(C)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, C, 3), *blocks, torch.nn.Conv2d(C, C, 1))
    compiled, x = torch.compile(model), random(2, 3, 20, 20)
    with backend("cpu"):
        _, codes = code_of(lambda: compiled(x).square().sum().backward())
    last = f"({C * SIDE**2}, 1, {SIDE * C}, {C})"
    result = rf"\(2, {C}, {SIDE}, {SIDE}\), (\(.*?\)), 'torch.ops.fused_attn.(\w+)"
    written = [re.findall(result, code) for code in codes]
    operators = {"channel_gate", "cbam"}
    assert [{name for _, name in of_graph} for of_graph in written] == [
        operators,
        {f"{name}_backward" for name in operators},
    ]
    assert {strides for of_graph in written for strides, _ in of_graph} == {last}


BLOCKS = {
    "se": lambda m: m.SqueezeExcite(C, reduction=4),
    "eca": lambda m: m.ECA(C),
    "cbam": lambda m: m.CBAM(C, reduction=4),
}


@pytest.mark.slow  # compilations
@pytest.mark.parametrize(
    "block, how, relu",
    [("se", "fuse", False), ("se", "backend", True), ("eca", "fuse", True), ("cbam", "fuse", False)],
)
def test_in_inference_a_gate_is_part_of_inductors_passes(block, how, relu):
    model = Residual(BLOCKS[block](reference), relu=relu).double().eval()
    ours = torch.compile(fuse(copy.deepcopy(model))) if how == "fuse" else torch.compile(model, backend="fused_attn")
    x = random(2, 3, 20, 20).double()
    y, (code,) = code_of(lambda: inferred(ours, x))
    assert "torch.ops.fused_attn" not in code
    assert A_MAP not in code  # all is written over what the convolutions wrote
    torch.testing.assert_close(y, inferred(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # a compilation
def test_an_inductor_that_takes_no_formula_calls_the_operator(monkeypatch, caplog):
    def of_another_version(*_):
        raise AttributeError("no mark_reuse")

    monkeypatch.setattr(inlined, "_lowered", of_another_version)
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, C, 1), nn.SqueezeExcite(C)).eval(), random(2, 3, 8, 8)
    found, codes = code_of(lambda: inferred(torch.compile(model), x))
    assert "torch.ops.fused_attn.channel_gate.cpu(" in codes[0]
    torch.testing.assert_close(found, inferred(model, x))
    assert "Inductor calls fused_attn.channel_gate.cpu: AttributeError: no mark_reuse" in caplog.text


@pytest.mark.slow  # compilations
@pytest.mark.parametrize("block", ["se", "cbam"])
def test_a_gate_in_half_precision(block):
    """It rounds once, whatever was rounded around it."""
    model = Residual(BLOCKS[block](reference)).eval()
    compiled, x = torch.compile(fuse(copy.deepcopy(model))), random(2, 3, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y, (code,) = code_of(lambda: inferred(compiled, x))
        eager = inferred(model, x)
    assert "torch.ops.fused_attn" not in code and A_MAP not in code
    exact = inferred(copy.deepcopy(model).double(), x.double())
    assert (y - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-3


@pytest.mark.slow  # compilations
def test_a_gate_of_any_size():
    model = Residual(BLOCKS["se"](reference)).eval()
    compiled = torch.compile(fuse(copy.deepcopy(model)), dynamic=True)
    for shape in ((2, 3, 20, 20), (3, 3, 9, 14)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = random(*shape).contiguous(memory_format=layout)
            torch.testing.assert_close(inferred(compiled, x), inferred(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compilations
def test_options_and_not_a_number():
    """In one graph: every pooling and activation, and a map with what is not a number in one sample."""
    gates = [
        nn.SqueezeExcite(C, reduction=4, pool=pool, activation=activation, gate=gate)
        for pool, activation, gate in (
            ("max", "silu", "hard_sigmoid"),
            ("avgmax", "gelu", "tanh"),
            ("avg", "relu6", "sigmoid"),
        )
    ]
    gates += [nn.ChannelAttention(C, reduction=4), nn.SpatialAttention(C), nn.EffectiveSE(C)]
    model = torch.nn.ModuleList(gates).eval()

    def function(x):
        return [gate(x) for gate in model]

    x = random(3, C, 7, 5)
    x[1, 2, 3, 4] = torch.nan
    with torch.no_grad():
        found, (code,) = code_of(lambda: torch.compile(function)(x))
        assert "torch.ops.fused_attn" not in code
        for mine, theirs in zip(found, function(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


class Excite(torch.nn.Module):
    """As most write it: the layers are convolutions of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = torch.nn.Conv2d(C, 4, 1), torch.nn.Conv2d(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@pytest.mark.slow  # compilations
@pytest.mark.parametrize("how", ["fuse", "backend"])
@pytest.mark.parametrize("block", [Excite, lambda: reference.SKConv(C, groups=4)], ids=["gate", "selection"])
def test_in_training_it_is_left_to_inductor(how, block):
    model = Residual(block()).double()
    other = copy.deepcopy(model)
    owner = fuse(copy.deepcopy(model)) if how == "fuse" else copy.deepcopy(model)
    compiled = torch.compile(owner) if how == "fuse" else torch.compile(owner, backend="fused_attn")
    x = random(2, 3, 20, 20).double()
    _, codes = code_of(lambda: compiled(x).square().sum().backward())
    assert not any("torch.ops.fused_attn" in code for code in codes)
    if block is Excite:  # The convolutions of the network: an excitation is products of matrices.
        assert [len(re.findall(r"convolution(?:_backward\.default)?\(", code)) for code in codes] == [3, 3]
    other(x).square().sum().backward()
    for (name, mine), theirs in zip(owner.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    for mine, theirs in zip(owner.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # compilations
@pytest.mark.parametrize("how", ["fuse", "backend"])
def test_in_inference_a_selection_is_an_operator(how):
    """Which reads the branches' convolutions: nothing writes a map between."""
    model, x = Residual(reference.SKConv(C, groups=4)).eval(), random(2, 3, 20, 20)
    owner = fuse(copy.deepcopy(model)) if how == "fuse" else model
    compiled = torch.compile(owner) if how == "fuse" else torch.compile(owner, backend="fused_attn")
    with torch.no_grad():
        found, (code,) = code_of(lambda: compiled(x))
        assert len(set(re.findall(r"torch\.ops\.fused_attn\.(\w+)", code)) & {"select", "select_squeeze"}) == 1, code
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_programs_that_keep_the_operators_and_other_compilers_have_them():
    model, x = fuse(Residual(BLOCKS["se"](reference)).eval()), random(2, 3, 20, 20)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for strict in (False, True):
                with keep_operators():
                    program = torch.export.export(model, (x,), strict=strict)
                assert any(str(n.target) == "fused_attn.channel_gate.cpu" for n in program.graph.nodes)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    inferred(torch.compile(model, backend=keep), x)
    assert any(str(n.target) == "fused_attn.channel_gate.cpu" for n in graphs[0].graph.nodes)
