"""Blocks in graphs: behind torch.compile and in exported programs."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import functional, fuse
from fused_attn.fusion import FusionError
from fused_attn.fusion.structure import calls, compiled
from fused_attn.fusion.structure.compiled import backend, rewrite
from fused_attn.fusion.structure.trial import Trial
from tests.checks import random
from tests.fusion.structure import pasted
from tests.fusion.structure.pasted import CBAM, SEBlock, SpatialGate, eca_layer

OWN = (functional.__name__, calls.__name__)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Net(nn.Module):
    """No block has a module of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x):
        x = self.conv(x)
        out = self.bn(x).relu()
        out = out * self.b(self.a(out.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        out += x
        return F.relu(out).mean((2, 3))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.se, self.cbam, self.eca = SEBlock(32), CBAM(32), eca_layer()

    def forward(self, x):
        return self.eca(self.cbam(self.se(self.conv(x)))).flatten(1)


class Around(nn.Module):
    """A block with something before it and something after it."""

    def __init__(self, block, before=None, after=None, channels=32):
        super().__init__()
        self.conv, self.block, self.bn = nn.Conv2d(3, channels, 3, padding=1), block, nn.BatchNorm2d(channels)
        self.before, self.after = before or (lambda bn, y: y), after or (lambda y, x: y)

    def forward(self, x):
        x = self.conv(x)
        return self.after(self.block(self.before(self.bn, x)), x).mean((2, 3))


def is_fused(node) -> bool:
    block = isinstance(node.target, calls.Block) or getattr(node.target, "__module__", "") in OWN
    return node.op == "call_function" and block


def counting(found: list):
    """A backend that rewrites and runs the graph."""

    def compiler(graph, inputs):
        rewrite(graph, inputs)
        found.append([n for n in graph.graph.nodes if is_fused(n)])
        return graph

    return compiler


def randomised(net: nn.Module) -> nn.Module:
    for part in net.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for t in (part.weight, part.bias, part.running_mean, part.running_var):
                t.data.uniform_(0.5, 1.5)
    return net


def both(net: nn.Module, compiled: nn.Module, x: torch.Tensor, tolerance: float = 1e-9) -> None:
    """Results, gradients and buffers of a network as it is and compiled."""
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = [t.clone() for t in net.buffers()]
    actual = compiled(a)
    buffers = [t.clone() for t in net.buffers()]
    for t, was in zip(net.buffers(), before, strict=True):
        t.data.copy_(was)
    expected = net(b)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(buffers, list(net.buffers()), rtol=tolerance, atol=tolerance)
    parameters = list(net.parameters())
    found = torch.autograd.grad(actual.square().sum(), [a, *parameters], allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected.square().sum(), [b, *parameters], allow_unused=True, materialize_grads=True)
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=10 * tolerance, atol=10 * tolerance)


def blocks_of(net: nn.Module, x: torch.Tensor, tolerance: float = 1e-9, **options) -> list:
    """The calls in the one graph of a network, which computes what the network does."""
    found: list = []
    both(net, torch.compile(net, backend=counting(found), **options), x, tolerance)
    (nodes,) = found
    return nodes


# Around a block


def test_with_what_stands_around_it():
    (node,) = blocks_of(Net().double().eval(), random(2, 3, 8, 9, dtype=torch.float64))
    assert node.target is functional.channel_gate
    assert node.kwargs["post_activation"] == "relu" and node.kwargs["residual"] is not None
    assert node.kwargs["pre_activation"] == "relu" and node.kwargs["affine"] is not None


def test_in_training_the_batch_norm_stays_outside():
    (node,) = blocks_of(Net().double().train(), random(2, 3, 8, 9, dtype=torch.float64))
    assert "affine" not in node.kwargs and node.kwargs["post_activation"] == "relu"


def _iadd(y, x):
    y += x
    return F.relu(y, inplace=True)


def _iadd_to_the_residual(y, x):
    x = x + 1
    x += y
    return x.relu_()


def _discarding(y, x):
    y.add_(x)
    torch.relu_(y)
    return y


AFTER = {
    "sum": (lambda y, x: y + x, {"residual"}),
    "other order": (lambda y, x: torch.relu(x + y), {"residual", "post_activation"}),
    "in place": (_iadd, {"residual", "post_activation"}),
    "into the residual": (_iadd_to_the_residual, {"residual", "post_activation"}),
    "activation alone": (lambda y, x: F.silu(y), {"post_activation"}),
    "discarding results": (_discarding, set()),
    "two users": (lambda y, x: (y + x) * y, set()),
    "broadcast": (lambda y, x: y + x[:, :1], set()),
    "scaled": (lambda y, x: torch.add(y, x, alpha=2), set()),
}
BEFORE = {
    "batch norm": lambda bn, y: bn(y),
    "relu": lambda bn, y: F.relu(bn(y), inplace=True),
    "silu": lambda bn, y: F.silu(bn(y)),
    "hard swish": lambda bn, y: F.hardswish(bn(y)),
}
KINDS = {
    "channel_gate": lambda: SEBlock(32),
    "spatial_gate_with_batch_norm": SpatialGate,
    "cbam": lambda: pasted.cbam(32),
}


#: How it is written makes no difference between blocks: all ways with one of them, a few with the others.
FEW = [("spatial_gate_with_batch_norm", "other order"), ("spatial_gate_with_batch_norm", "activation alone")]
FEW += [("cbam", "in place"), ("cbam", "activation alone")]


@pytest.mark.parametrize(("kind", "after"), [("channel_gate", after) for after in AFTER] + FEW)
def test_sums_and_activations_after(kind, after):
    function, expected = AFTER[after]
    net = randomised(Around(KINDS[kind](), after=function).double().eval())
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))
    assert node.target.__name__ == kind
    assert {"residual", "post_activation"} & set(node.kwargs) == expected


@pytest.mark.parametrize(
    ("kind", "before"),
    [("channel_gate", before) for before in BEFORE] + [("spatial_gate_with_batch_norm", "silu"), ("cbam", "relu")],
)
def test_batch_norm_before(kind, before):
    net = randomised(Around(KINDS[kind](), BEFORE[before]).double().eval())
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64), 1e-6 if before == "hard swish" else 1e-9)
    expected = {"batch norm": "identity", "hard swish": "hard_swish"}.get(before, before)
    assert node.target.__name__ == kind and node.kwargs["pre_activation"] == expected


def test_a_batch_norm_that_others_read_stays():
    net = randomised(Around(SEBlock(32), None, None).double().eval())
    net.forward = lambda x: (y := net.bn(net.conv(x))) + net.block(y)  # type: ignore[method-assign]
    (node,) = blocks_of(net, random(2, 3, 6, 7, dtype=torch.float64))
    assert "affine" not in node.kwargs and "residual" in node.kwargs


# Blocks

GRAPHS = {
    "SEBlock": "channel_gate",
    "SEMax": "channel_gate",
    "HardSE": "channel_gate",
    "ESE": "channel_gate",
    "eca_layer": "channel_gate",
    "ChannelGate": "channel_gate",
    "StackedPools": "spatial_gate",
    "SpatialGate": "spatial_gate_with_batch_norm",
    "CBAM": "cbam_with_batch_norm",
    "cbam": "cbam",
    "SCSE": "SCSE",
    "SCSEMax": "SCSE",
    "BAM": "BAM",
    "BAMByConvolutions": "BAM",
    "TripletAttention": "TripletAttention",
    "CoordAtt": "CoordinateAttention",
    "simam_module": "SimAM",
}
WITHOUT_CHANNELS = {"eca_layer", "StackedPools", "SpatialGate", "TripletAttention", "simam_module"}


@pytest.mark.parametrize("how", ["eval", "dynamic training", "one image"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kind(name, how):
    arguments = () if name in WITHOUT_CHANNELS else (32,)
    net = randomised(Around(getattr(pasted, name)(*arguments)).double().train(how == "dynamic training"))
    tolerance = 1e-6 if name in ("HardSE", "CoordAtt") else 1e-9
    shape = (1 if how == "one image" else 2, 3, 6, 7)
    dynamic = how == "dynamic training"
    (node,) = blocks_of(net, random(*shape, dtype=torch.float64), tolerance, dynamic=dynamic)
    assert node.target.__name__ == GRAPHS[name]


@pytest.mark.parametrize("dynamic", [False, True])
def test_several(dynamic):
    net, found = Blocks().double().eval(), []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=dynamic)
    both(net, net_compiled, random(2, 3, 8, 9, dtype=torch.float64))
    if dynamic:
        both(net, net_compiled, random(3, 3, 11, 7, dtype=torch.float64))
    for nodes in found:
        assert [n.target.__name__ for n in nodes] == ["channel_gate", "cbam_with_batch_norm", "channel_gate"]


def test_a_graph_break_between():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = SEBlock(32), eca_layer()

        def forward(self, x):
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    net, found = Broken().double(), []
    both(net, torch.compile(net, backend=counting(found)), random(2, 32, 5, 4, dtype=torch.float64))
    assert [[n.target for n in nodes] for nodes in found] == [[functional.channel_gate]] * 2


# What is left alone


class Near(nn.Module):
    def forward(self, x):
        return x * F.adaptive_avg_pool2d(x, 2).mean((2, 3), True).sigmoid() + x * (x.mean((2, 3), True).exp())


class Fixed(nn.Module):
    """Global on maps of 7 x 7 only."""

    def forward(self, x):
        return x * F.avg_pool2d(x, 7).sigmoid()


@pytest.mark.parametrize("net", [Near(), Fixed()], ids=["near", "fixed"])
def test_near_misses(net):
    found: list = []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=True)
    both(net, net_compiled, random(2, 3, 7, 7, dtype=torch.float64))
    assert not isinstance(net, Near) or found == [[]]


def _gate(x):
    return x.mean((2, 3), keepdim=True).sigmoid()


class WrittenMap(nn.Module):
    """The map is read again after the gate was written into it."""

    def forward(self, x):
        x = x + 1
        y = x.mul_(_gate(x))
        return y.exp() + x


class WrittenInput(nn.Module):
    def forward(self, x):
        x = x * 1.0
        view = x[:, :1]
        y = x.mul_(_gate(x))
        return y.exp() + view


class WithoutGradients(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            gate = _gate(x)
        return x * gate


class Detached(nn.Module):
    def forward(self, x):
        return x * _gate(x.detach())


class ChangedBetween(nn.Module):
    """The map changes between the pool and the product."""

    def forward(self, x):
        x = x + 1
        gate = _gate(x)
        x.mul_(2)
        return x * gate


def _write_the_input(x):
    return x.mul_(_gate(x))


def _write_a_view(x):
    view = x[1:]
    return view.mul_(_gate(view))


@pytest.mark.parametrize("net", [WrittenMap, WrittenInput, WithoutGradients, Detached, ChangedBetween])
def test_what_must_not_be_replaced(net):
    assert blocks_of(net(), random(2, 8, 4, 5, dtype=torch.float64)) == []


@pytest.mark.parametrize("function", [_write_the_input, _write_a_view], ids=["input", "view"])
def test_what_is_written_into_an_argument_is_written(function):
    found, x = [], random(2, 8, 4, 5, dtype=torch.float64)
    expected, given = x.clone(), x.clone()
    with torch.no_grad():
        result = function(expected)
        torch.testing.assert_close(torch.compile(function, backend=counting(found))(given), result)
    torch.testing.assert_close(given, expected)
    assert found == [[]] and not torch.equal(expected, x)


class SimAMOf(nn.Module):
    """Given its epsilon."""

    def forward(self, x, e_lambda):
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean((2, 3), keepdim=True)).pow(2)
        return x * (d / (4 * (d.sum((2, 3), keepdim=True) / n + e_lambda)) + 0.5).sigmoid()


def test_an_option_that_is_open_is_guarded():
    """A number that the graph has as a symbol is written into the call: another one compiles anew."""
    net, found = SimAMOf(), []
    net_compiled = torch.compile(net, backend=counting(found), dynamic=True)
    x = random(2, 8, 6, 7, dtype=torch.float64)
    for e_lambda in (1e-4, 0.5, 2.0):
        torch.testing.assert_close(net_compiled(x, e_lambda), net(x, e_lambda), rtol=1e-9, atol=1e-9)
    assert [n.target.__name__ for n in found[0]] == ["SimAM"] and len(found) > 1


def test_what_does_not_compute_the_same_is_left_alone_and_logged(monkeypatch, caplog):
    right = compiled._channel
    monkeypatch.setattr(compiled, "_channel", lambda *args: (right(*args)[0], {**right(*args)[1], "gate": "tanh"}))
    with caplog.at_level(logging.WARNING):
        assert blocks_of(Net().double().eval(), random(2, 3, 8, 9, dtype=torch.float64)) == []
    assert "another result" in caplog.text and len(caplog.records) <= 2


def test_equal_blocks_are_checked_once(monkeypatch):
    checked = []
    compare = Trial._compare
    monkeypatch.setattr(Trial, "_compare", lambda self, *args: checked.append(1) or compare(self, *args))
    net = nn.Sequential(nn.Conv2d(3, 32, 1), *(nn.Sequential(nn.Conv2d(32, 32, 1), SEBlock(32)) for _ in range(5)))
    assert len(blocks_of(net.double().eval(), random(2, 3, 6, 7, dtype=torch.float64))) == 5
    assert len(checked) == 1


def test_sizes_that_are_written_down_in_a_large_static_graph():
    """The authors' pools have the map's size as their window; the check must not need a map of that size."""
    graphs: list = []

    def keep(graph, inputs):
        graphs.append((rewrite(graph, inputs), graph))
        return graph

    net = Around(pasted.ChannelGate(32)).eval()
    with torch.no_grad():
        torch.compile(net, backend=keep, dynamic=False)(torch.empty(16, 3, 160, 160))
    assert graphs[0][0] == 1


def test_autocast_and_half_precision():
    net, found = Around(SEBlock(32), BEFORE["relu"]).eval(), []
    net_compiled = torch.compile(net, backend=counting(found))
    x = random(2, 3, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net_compiled(x), net(x), rtol=2e-2, atol=2e-2)
    net.bfloat16()
    torch.testing.assert_close(net_compiled(x.bfloat16()), net(x.bfloat16()), rtol=2e-2, atol=2e-2)
    assert [len(nodes) for nodes in found] == [1, 1]


def test_parameters_of_another_dtype_are_left_alone():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return x * self.fc(x.mean((2, 3)).float()).sigmoid().to(x.dtype)[:, :, None, None]

    net, found = Mixed(), []
    x = random(2, 8, 5, 4).bfloat16()
    torch.testing.assert_close(torch.compile(net, backend=counting(found))(x), net(x))
    assert found == [[]]


# Exported programs


@pytest.mark.parametrize("least", [1, 4])
def test_an_exported_program(tmp_path, least):
    net = Net().double().eval()
    x = random(6, 3, 8, 9, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=least, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    fused = fuse(program)
    assert any("fused_attn.channel_gate" in str(n.target) for n in fused.graph.nodes)
    assert list(fused.state_dict) == list(program.state_dict)
    torch.export.save(fused, tmp_path / "fused.pt2")
    for found in (fused, torch.export.load(tmp_path / "fused.pt2")):
        for size in (least, 7, 64):
            other = random(size, 3, 8, 9, dtype=torch.float64)
            torch.testing.assert_close(found.module()(other), net(other), rtol=1e-9, atol=1e-10)
        for size in (65, 3)[: least - 1 or 1]:
            with pytest.raises(Exception, match=str(64 if size > 64 else least)):
                found.module()(random(size, 3, 8, 9, dtype=torch.float64))


def test_an_exported_program_without_blocks():
    program = torch.export.export(nn.Conv2d(3, 4, 1), (random(2, 3, 8, 9),))
    assert fuse(program, strict=True) is program


def test_strict_names_what_a_program_keeps(monkeypatch):
    program = torch.export.export(Net().eval(), (random(2, 3, 8, 9),))
    assert fuse(program, strict=True) is not program
    right = compiled._channel
    monkeypatch.setattr(compiled, "_channel", lambda *args: (right(*args)[0], {**right(*args)[1], "gate": "tanh"}))
    assert fuse(program) is program
    with pytest.raises(FusionError, match="blocks left alone: .* looks like one: channel_gate: another result"):
        fuse(program, strict=True)
    monkeypatch.setattr(compiled, "follow", lambda *args: 1 / 0)
    with pytest.raises(FusionError, match="a graph is left as it is: ZeroDivisionError"):
        fuse(program, strict=True)
    program.example_inputs = None
    with pytest.raises(FusionError, match="no example inputs"):
        fuse(program, strict=True)


# Behind AOTAutograd and Inductor


def partitioned(graph, inputs):
    """What Inductor gets, run as it is: decomposed, and split into a graph forward and one backward."""
    rewrite(graph, inputs)
    return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)


#: Inductor takes seconds for each loop; what it is given does not depend on it.
@pytest.mark.parametrize(
    ("compiler", "kinds"),
    [
        (partitioned, "SEBlock CBAM BAM SCSE CoordAtt TripletAttention simam_module"),
        pytest.param(backend, "SEBlock", marks=pytest.mark.slow),
        pytest.param(backend, "CBAM BAM", marks=pytest.mark.long),
    ],
    ids=["partitioned", "Inductor, one block", "Inductor"],
)
def test_trains_a_network(compiler, kinds):
    """Open batch; a part without any block."""
    blocks = [getattr(pasted, kind)(*(() if kind in WITHOUT_CHANNELS else (16,))) for kind in kinds.split()]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *blocks, nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).double()
    compiled_net = torch.compile(net, backend=compiler)
    x = random(4, 3, 8, 9, dtype=torch.float64)
    torch._dynamo.mark_dynamic(x, 0)
    both(net, compiled_net, x, 1e-6)
    if compiler is partitioned:
        with torch.no_grad():
            torch.testing.assert_close(compiled_net.eval()(x), net.eval()(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["seresnet18", "resnet10t"])
def test_networks_of_timm(name):
    """As it is, and with pasted blocks."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    net = timm.create_model(name, num_classes=5)
    if name == "resnet10t":
        for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
            block.bn2 = nn.Sequential(block.bn2, SEBlock(block.bn2.num_features))
    net = randomised(net).double().eval()
    x = random(2, 3, 64, 64, dtype=torch.float64)
    counted: list = []
    with torch.no_grad():
        expected = net(x)
        scale = expected.abs().max()
        found = torch.compile(net, backend=counting(counted))(x)
        torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-9)
    assert len(counted[0]) == (8 if name == "seresnet18" else 4)
    assert all("residual" in n.kwargs and "affine" in n.kwargs for n in counted[0])


def test_the_entry_point():
    text = Path("pyproject.toml").read_text()
    assert f'[project.entry-points.torch_dynamo_backends]\nfused_attn = "{backend.__module__}:backend"' in text
    if not entry_points(group="torch_dynamo_backends", name="fused_attn"):
        pytest.skip("the installed metadata of fused_attn has no entry point torch_dynamo_backends: install it again")
    assert "fused_attn" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("fused_attn").__name__ == "backend"
