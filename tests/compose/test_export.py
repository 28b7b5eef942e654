"""What leaves PyTorch or the process: PyTorch's own operators, unless somebody keeps ours."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import fused_attn.nn
from fused_attn import explain, fuse, keep_operators, reference
from fused_attn.backends import choose
from tests.checks import random, randomised
from tests.nn.test_every_block import BLOCKS

needs_operators = pytest.mark.skipif(
    choose("channel_gate", torch.empty(1, 2, 3, 4)) == "reference",
    reason="no native library on this machine, or the reference was asked for: nothing here is an operator",
)

OPEN = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


class Pasted(nn.Module):
    """As tutorials write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels))

    def forward(self, x):
        b, c, _, _ = x.shape
        return x * torch.sigmoid(self.fc(self.pool(x).view(b, c))).view(b, c, 1, 1)


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """ONNX's exporters take a tenth of a second for each operator."""
    layers = nn.Conv2d(3, 8, 3, padding=1), Pasted(8), reference.SplitAttention(8)
    return randomised(nn.Sequential(*layers)).eval().to(dtype)


def original(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Pasted(8),
        reference.CBAM(8, reduction=2, kernel_size=3),
        reference.SKConv(8, groups=4),
        reference.TripletAttention(kernel_size=3),
        reference.PositionAttention(8, reduction=2),
    )
    return randomised(nn.Sequential(*layers)).eval().to(dtype)


def run_onnx(model: bytes, x: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def to_onnx(model: object, x: Tensor, *, dynamo: bool = True) -> bytes:
    """Of open batch and size."""
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, torch.export.ExportedProgram):
            torch.onnx.export(model, dynamo=True, verbose=False).save(file)
        elif dynamo:
            torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(OPEN,), verbose=False).save(file)
        else:
            axes = {"x": {0: "batch", 2: "height", 3: "width"}}
            torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    found = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in found.graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo, dtype):
    """At other sizes than it was exported at, too, as good as PyTorch in that dtype."""
    plain = small(dtype)
    found = to_onnx(fuse(copy.deepcopy(plain)), random(2, 3, 10, 9, dtype=dtype), dynamo=dynamo)
    for shape in ((2, 3, 10, 9), (3, 3, 13, 14)):
        x = random(*shape, dtype=dtype)
        exact = copy.deepcopy(plain).double()(x.double())
        bound = 2 * (plain(x) - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
        assert (run_onnx(found, x).double() - exact).abs().max() <= bound


@pytest.mark.slow
def test_onnx_of_a_fused_program():
    """The operators in it are written out."""
    plain, x = small(), random(2, 3, 10, 9)
    program = fuse(torch.export.export(plain, (x,), dynamic_shapes=(OPEN,)))
    assert "fused_attn" in str(program.graph)
    found = to_onnx(program, x)
    for shape in ((2, 3, 10, 9), (3, 3, 13, 14)):
        x = random(*shape)
        torch.testing.assert_close(run_onnx(found, x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_windows_of_open_sizes_in_onnx():
    """Second-order pooling over positions looks at 8x8 windows, which ONNX has for fixed sizes only."""
    block = randomised(reference.GSoP(8, mode="position")).eval().float()
    found = to_onnx(fuse(block), random(2, 8, 10, 9))
    x = random(3, 8, 13, 14)
    torch.testing.assert_close(run_onnx(found, x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_traced(grad):
    """A trace has PyTorch's operators alone, and the original's gradients."""
    plain = original(torch.float64)
    model, file = fuse(copy.deepcopy(plain)), io.BytesIO()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (random(2, 3, 10, 9, dtype=torch.float64),))
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "fused_attn::" not in str(loaded.inlined_graph) and "PythonOp" not in str(loaded.inlined_graph)
    x = random(3, 3, 13, 14, dtype=torch.float64)
    found = []
    for network in (loaded, plain):
        leaf = x.clone().requires_grad_()
        y = network(leaf)
        found.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *network.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


class Scripted(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        s = self.pool(x).flatten(1)
        return x * torch.sigmoid(self.fc(s))[:, :, None, None]


def test_scripted():
    """A block is scripted as its own class is."""
    plain = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), Scripted(8))).eval()
    model = fuse(copy.deepcopy(plain), strict=True)
    x = random(2, 3, 9, 8, dtype=torch.float64)
    scripted = torch.jit.script(model)
    assert "fused_attn::" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), torch.jit.script(plain)(x), rtol=0, atol=0)


class Residual(nn.Module):
    """A residual block whose attention is in its forward: fused with its tail, and without that as the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        s = torch.nn.functional.adaptive_avg_pool2d(out, 1)
        s = self.fc2(torch.relu(self.fc1(s)))
        out = out * torch.sigmoid(s)
        return self.relu(out + x)


@pytest.mark.parametrize("options", [{}, {"tails": True}, {"tails": True, "save": "least"}], ids=str)
def test_a_scripted_parent(options):
    """What stands around a block is scripted as it was written, too; the model that was scripted stays fused."""
    plain = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), Residual()))
    model = fuse(copy.deepcopy(plain), **options)
    fused = [(row.name, row.fused, row.block) for row in explain(model, tails="tails" in options)]
    assert any(fused for _, fused, _ in fused)
    x = random(2, 3, 9, 7, dtype=torch.float64)
    scripted, theirs = torch.jit.script(model), torch.jit.script(plain)
    assert "fused_attn::" not in str(scripted.inlined_graph)
    for training in (True, False):
        for network in (scripted, theirs):
            network.train(training).zero_grad()
        ours, expected = scripted(x), theirs(x)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        ours.square().sum().backward()
        expected.square().sum().backward()
        for (name, mine), other in zip(scripted.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, msg=name)
        for mine, other in zip(scripted.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert [(row.name, row.fused, row.block) for row in explain(model, tails="tails" in options)] == fused


@pytest.mark.parametrize("name", sorted({case.split()[0] for case in BLOCKS}))
def test_what_cannot_be_scripted_says_what_to_do(name):
    """TorchScript's own words of these blocks are about lines of this library."""
    case = next(case for case in BLOCKS if case.split()[0] == name)
    words = rf"torch\.jit\.script takes no {name} of fused_attn.*torch\.jit\.trace.*torch\.export"
    for block in (BLOCKS[case](fused_attn.nn), BLOCKS[case](reference), fuse(BLOCKS[case](reference))):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), block)
        with pytest.raises(NotImplementedError, match=words):
            torch.jit.script(model)
        assert model[1] is block


def nodes(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_an_exported_program_is_the_originals():
    """Node by node, where the block is somebody's own."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), Pasted(8)).eval()
    model, x = fuse(copy.deepcopy(plain), strict=True), random(2, 3, 9, 8)
    for strict in (False, True):
        programs = [torch.export.export(m, (x,), strict=strict, dynamic_shapes=(OPEN,)) for m in (model, plain)]
        assert nodes(programs[0]) == nodes(programs[1])


def test_what_runs_as_it_was_written_is_read_by_dynamo():
    """Exported, and compiled where a layer is no longer what it was."""
    plain, x = randomised(reference.SKConv(8, groups=4)).eval(), random(2, 8, 10, 9, dtype=torch.float64)
    block = fuse(copy.deepcopy(plain))
    program = torch.export.export(block, (x,), strict=True)
    assert not any("fused_attn" in name for name in nodes(program))
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-9, atol=1e-10)
    for one in (plain, block):
        prune.l1_unstructured(one.conv[0][0], "weight", 0.5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-10)


@needs_operators
def test_operators_are_kept_where_somebody_says_so():
    model, x = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), Pasted(8)).eval()), random(2, 3, 9, 8)
    with keep_operators(), keep_operators():
        pass
    assert not any("fused_attn" in name for name in nodes(torch.export.export(model, (x,))))
    for strict in (False, True):
        with keep_operators():
            program = torch.export.export(model, (x,), strict=strict)
        assert "fused_attn.channel_gate.cpu" in nodes(program)
        torch.testing.assert_close(program.module()(x), model(x))


def flops(model: nn.Module, x: Tensor, *, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
def test_operations_are_counted_as_the_originals(backward):
    plain, x = original(), random(2, 3, 10, 9)
    model = fuse(copy.deepcopy(plain))
    assert flops(model, x, backward=backward) == flops(plain, x, backward=backward)
    for name in ("SqueezeExcite", "ECA", "CBAM", "SKConv", "PositionAttention"):
        block, same = (getattr(module, name)(32) for module in (fused_attn.nn, reference))
        y = random(2, 32, 8, 7)
        assert flops(block, y, backward=backward) == flops(same, y, backward=backward) > 0


@needs_operators
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", ["SqueezeExcite", "ECA", "CBAM", "SKConv", "CrissCrossAttention"])
def test_operations_of_a_program_are_counted(name, learns):
    """Where the operators themselves are called, forward and backward."""
    block, same = (getattr(m, name)(32).requires_grad_(learns).eval() for m in (fused_attn.nn, reference))
    x = random(2, 32, 8, 7).requires_grad_()
    with keep_operators():
        program = torch.export.export(block, (x,))
    assert any("fused_attn" in name for name in nodes(program))
    assert flops(program.module(), x, backward=True) == flops(same, x, backward=True)


@needs_operators
def test_hooks_on_all_modules_see_the_layers():
    """Those of a block that is one operator else: as the original's."""
    plain = original()
    model, x, found = fuse(copy.deepcopy(plain)), random(2, 3, 10, 9), []
    for network in (model, plain):
        names = {module: name for name, module in network.named_modules()}
        called: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, given, y, called=called, names=names: called.append(names[module])
        )
        try:
            y = network(x)
        finally:
            handle.remove()
        found.append((called, y))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
