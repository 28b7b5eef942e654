"""Gates that are modules, products that are not: found in a parent's forward."""

from __future__ import annotations

import copy
import gc
import pickle
import random as python_random
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion.changing import parents
from fused_attn.fusion.changing.parents import composite_of
from fused_attn.fusion.changing.plan import PLAN
from tests.checks import random
from tests.fusion.counting import FusedOperators
from tests.fusion.reading.pasted import ChannelAttention, SpatialAttention, SpatialGate
from tests.fusion.reading.pasted import ChannelGate as GatingChannel


class Block(nn.Module):
    def __init__(self, c=16):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.ca, self.sa = ChannelAttention(c), SpatialAttention()

    def forward(self, x):
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.ca(out) * out
        out = self.sa(out) * out
        out += residual
        return self.relu(out)


class OnlyMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid())

    def forward(self, x):
        return self.fc(x.mean((2, 3), keepdim=True))


class InPlace(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out *= self.ca(out)
        out = out.mul_(self.sa(out).expand_as(out))
        return self.relu(out + x)


class Gating(Block):
    def __init__(self):
        super().__init__()
        self.ca, self.sa = GatingChannel(16), SpatialGate()

    def forward(self, x):
        return self.sa(self.ca(self.conv1(x))) + x


class OnlyChannel(Block):
    def forward(self, x):
        out = self.conv1(x)
        return self.relu(out * self.ca(out)) + x


class InSequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU())
        self.gates = nn.ModuleList([ChannelAttention(16), SpatialAttention()])

    def forward(self, x):
        x = self.body(x)
        for gate in self.gates:
            x = x * gate(x)
        return x


class OnAnAlias(Block):
    def forward(self, x):
        out = self.conv1(x)
        kept = out
        out += self.conv2(x)
        return out * self.ca(out) + kept


class InPlaceWithGradients(Block):
    def __init__(self):
        super().__init__()
        self.ca = OnlyMean()

    def forward(self, x):
        out = self.bn1(self.conv1(x))
        out *= self.ca(out)
        return self.relu(out + x)


class MapWrittenLater(Block):
    def forward(self, x):
        x = self.conv1(x)
        out = self.ca(x) * x
        out = self.sa(out) * out
        return out + x.add_(1)


class WrittenBefore(Block):
    def forward(self, x):
        out = self.conv1(x)
        kept = out.flatten(2)
        out -= 1
        out = self.ca(out) * out
        out = self.sa(out).mul(out)
        return out + kept.view_as(out)


class Twice(Block):
    def forward(self, x):
        x = self.conv1(x)
        x = self.ca(x) * x
        x = self.conv2(x)
        return self.ca(x) * x


class InALoop(InSequential):
    def forward(self, x):
        for gate in self.gates:
            x = gate(x).expand_as(x) * x
        return self.body(x)


class SideBySide(Block):
    def forward(self, x):
        x = self.conv1(x)
        ca, sa = self.ca(x), self.sa(x)
        return x * ca + torch.mul(sa, x)


class GatesInASequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sequential(GatingChannel(16), SpatialGate()))

    def forward(self, x):
        return self.body(x) + x


class Several(Block):
    """Several results, in a structure, and sizes in the computation."""

    def forward(self, x):
        b, c, h, w = x.shape
        out = self.conv1(x)
        out = self.ca(out) * out
        rows = out.view(b, c, h * w).permute(0, 2, 1)
        return {"map": self.sa(out) * out, "parts": [rows, (out.mean(), h)]}


class WithDefaults(Block):
    def forward(self, x, drop=None, *, scale=0.5):
        x = self.conv1(x)
        x = self.ca(x) * x * scale
        return x if drop is None else drop(x)


class ByOptions(Block):
    """What was chosen when it was made."""

    def __init__(self):
        super().__init__()
        self._downsample, self.options = None, {"alpha": 2.0, "act": F.relu}

    def shortcut(self, x):
        return x if self._downsample is None else self._downsample(x)

    def forward(self, x):
        out = self.conv1(x)
        out = self.sa(out) * out * self.options["alpha"]
        return self.options["act"](out + self.shortcut(x))


class Inherited(ByOptions):
    def forward(self, x):
        return super().forward(x) - self.ca(x) * x


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(16))
        self.beta = nn.Parameter(torch.ones(1, 16, 1, 1))

    def forward(self, x):
        self.calls.add_(1)
        x = self.conv1(x)
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.ca(x) * x * self.beta + self.mean.view(1, -1, 1, 1)


class ShortcutWrittenInto(Block):
    def forward(self, x):
        x = self.conv1(x)
        out = self.bn2(self.conv2(x))
        out = self.ca(out) * out
        x += self.sa(out) * out
        return F.relu(x, inplace=True)


class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype).round() if self.training else x


class Drops(Block):
    def __init__(self):
        super().__init__()
        self.dropout, self.path = nn.Dropout2d(0.5), DropPath()

    def forward(self, x):
        out = self.dropout(self.conv1(x))
        out = self.ca(out) * out
        return x + self.path(self.sa(out) * out)


FUSED = {
    **dict.fromkeys(("Block", "InPlace", "Gating", "InSequential", "InALoop", "WrittenBefore"), "CBAM"),
    **dict.fromkeys(("GatesInASequential", "Drops", "ShortcutWrittenInto", "MapWrittenLater"), "CBAM"),
    **dict.fromkeys(("OnlyChannel", "OnAnAlias", "Twice", "SideBySide", "WithDefaults", "Counts"), "SqueezeExcite"),
    **dict.fromkeys(("ByOptions", "Inherited"), "SpatialAttention"),
    **dict.fromkeys(("Several", "ByMode", "ByRank", "DropsByFunction", "AlwaysDrops", "ByDepth"), "SqueezeExcite"),
    "InPlaceWithGradients": "SqueezeExcite",
}
#: Which write over what their gradients need.
NO_GRADIENTS = ("InPlace", "MapWrittenLater", "ShortcutWrittenInto")


def run(net: nn.Module, x: torch.Tensor, gradients: bool) -> list:
    """All results, what was written into the map, and the gradients, or the name of what computing them raises."""
    leaf = x.clone().requires_grad_(gradients)
    given = leaf * 1
    torch.manual_seed(3)
    with torch.set_grad_enabled(gradients):
        found = tree_flatten(net(given))[0]
    found.append(given.detach())
    if not gradients:
        return found
    loss = sum(t.square().sum() for t in found if isinstance(t, torch.Tensor))
    try:
        return [*found, *torch.autograd.grad(loss, [leaf, *net.parameters()], allow_unused=True)]
    except RuntimeError as error:
        return [*found, "modified by an inplace operation" in str(error)]


def same(net: nn.Module, plain: nn.Module) -> None:
    for training, gradients in ((True, True), (False, True), (False, False)):
        net.train(training), plain.train(training)
        x = random(2, 16, 7, 9, dtype=torch.float64)
        for p, q in zip(run(net, x, gradients), run(plain, x, gradients), strict=True):
            if isinstance(q, torch.Tensor):
                torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
            else:
                assert p == q
    for p, q in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", FUSED)
def test_the_products_in_a_forward_become_one_block(name):
    plain = globals()[name]().double()
    net = fuse(copy.deepcopy(plain))
    row = explain(net)[0]
    assert row.fused and row.block.startswith(FUSED[name]) and "in its forward" in row.block
    assert ("where no gradients" in row.block) == (name in NO_GRADIENTS)
    assert net.__dict__[PLAN].recipe.covers
    same(copy.deepcopy(net), copy.deepcopy(plain))
    same(pickle.loads(pickle.dumps(net)), copy.deepcopy(plain))
    same(net, plain)
    assert explain(copy.deepcopy(net))[0].fused
    assert type(unfuse(net)) is type(plain)
    same(net, plain)


def test_how_many_blocks_a_forward_has():
    assert len(composite_of(SideBySide()).covers) == 2
    assert composite_of(Twice()).covers == ("ca",) and composite_of(Twice()).name.count("SqueezeExcite") == 2
    assert composite_of(SideBySide()).functions == ("channel_gate", "spatial_gate")
    assert composite_of(Block()).functions == ("cbam",)


def test_a_forward_that_asks_for_the_rank():
    """It runs as it is written for maps of another, here one map without a batch."""
    plain = ByRank().double().eval()
    net = fuse(copy.deepcopy(plain))
    x = random(16, 7, 9, dtype=torch.float64)
    with FusedOperators() as mode:
        torch.testing.assert_close(net(x), plain(x))
    assert mode.count == 0


def test_inside_a_model():
    plain = nn.Sequential(nn.Conv2d(16, 16, 1), Block(), nn.Sequential(Block(), Block())).double()
    net = fuse(copy.deepcopy(plain))
    assert sum(row.fused for row in explain(net)) == 3
    same(net, plain)
    assert [type(m) for m in fuse(net).modules()] == [type(m) for m in net.modules()]


class SecondUse(Block):
    def forward(self, x):
        out = self.conv1(x)
        gate = self.ca(out)
        return out * gate + gate


class InPlaceSeenElsewhere(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        kept = out.flatten(1)
        out *= self.ca(out)
        return out + kept.view_as(out)


class Prints(Block):
    def forward(self, x):
        print(x.shape)
        return x * self.ca(x) + self.conv1(x)


class Keeps(Block):
    def forward(self, x):
        self.last = self.conv1(x)
        return x * self.ca(x)


class ByMode(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) if self.training else x


class WithoutGradient(Block):
    def forward(self, x):
        x = self.conv1(x)
        with torch.no_grad():
            y = x * self.ca(x)
        return x + y


class InPlaceOnItsInput(Block):
    def forward(self, x):
        x *= self.ca(x)
        return self.conv1(x)


class InPlaceOnAView(Block):
    def forward(self, x):
        out = self.conv1(x)
        half = out[:, :]
        half *= self.ca(half)
        return out


class WrittenBetween(Block):
    def forward(self, x):
        x = self.conv1(x)
        gate = self.ca(x)
        x.add_(1)
        return gate * x


class WrittenBetweenByAView(Block):
    def forward(self, x):
        x = self.conv1(x)
        flat = x.flatten(2)
        gate = self.ca(x)
        flat.mul_(2)
        return gate * x


class WrittenBetweenByALayer(Block):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        gate = self.ca(x)
        kept = self.relu(x)
        return gate * x + kept


class WrittenBetweenByAFunction(Block):
    def forward(self, x):
        x = self.bn1(self.conv1(x))
        gate = self.ca(x)
        F.relu(x, True)
        return gate * x


class GateChanged(Block):
    def forward(self, x):
        x = self.conv1(x)
        gate = self.ca(x)
        gate += 1
        return gate * x


class GateReturned(Block):
    def forward(self, x):
        x = self.conv1(x)
        gate = self.ca(x)
        return x * gate, gate


class Logs(Block):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        x = self.conv1(x)
        gate = self.ca(x)
        self.log.append(gate.mean())
        return x * gate


class Notes(Block):
    def __init__(self):
        super().__init__()
        self.shapes = {"seen": set()}

    def forward(self, x):
        self.shapes["seen"].add("x")
        x = self.conv1(x)
        return x * self.ca(x)


class DropsByFunction(Block):
    def forward(self, x):
        x = F.dropout(self.conv1(x), 0.3, self.training)
        return x * self.ca(x)


class AlwaysDrops(Block):
    def forward(self, x):
        x = F.dropout(self.conv1(x), 0.3)
        return x * self.ca(x)


class ByDepth(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) + torch.rand(1, dtype=x.dtype)


class BySize(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) if x.shape[2] > 3 else x


class ByContents(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) if x.mean() > 0 else x * self.sa(x)


class ByRank(Block):
    def forward(self, x):
        x = self.conv1(x)
        return {4: x * self.ca(x)}.get(x.dim(), x)


class Decorated(Block):
    @torch.no_grad()
    def gated(self, x):
        return x * self.ca(x)

    def forward(self, x):
        return self.conv1(x) + self.gated(x)


class InFullPrecision(Block):
    @torch.autocast("cuda", enabled=False)
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x)


class Tries(Block):
    def forward(self, x):
        x = self.conv1(x)
        try:
            return x * self.ca(x)
        except RuntimeError:
            return x


class OptionOfAPart(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) * self.conv1.stride[0]


class OptionOfAPartIfAny(Block):
    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x) * getattr(self.bn1, "momentum", 2)


class Scaled(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 0.5


class CallOfAPart(Block):
    def __init__(self):
        super().__init__()
        self.conv1 = Scaled(16, 16, 1)

    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class GradientOfItsOwn(Block):
    def forward(self, x):
        x = Straight.apply(self.conv1(x))
        return x * self.ca(x)


LEFT = [
    *("SecondUse", "InPlaceSeenElsewhere", "Prints", "Keeps", "WithoutGradient"),
    *("InPlaceOnItsInput", "InPlaceOnAView", "WrittenBetween", "WrittenBetweenByAView", "WrittenBetweenByALayer"),
    *("WrittenBetweenByAFunction", "GateChanged", "GateReturned", "Logs", "Notes"),
    *("BySize", "ByContents", "Decorated", "InFullPrecision", "Tries", "OptionOfAPart"),
    *("OptionOfAPartIfAny", "CallOfAPart", "GradientOfItsOwn"),
]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_that_keeps_its_forward(name, capsys):
    plain = globals()[name]().double()
    net = fuse(copy.deepcopy(plain))
    assert PLAN not in net.__dict__
    assert capsys.readouterr().out == ""
    assert vars(net).keys() == vars(plain).keys()
    assert [vars(net).get(n) for n in ("log", "shapes")] == [vars(plain).get(n) for n in ("log", "shapes")]
    same(net, plain)


class Meter:
    def __init__(self):
        self.n = 0

    def update(self, k):
        self.n += k


class Tells(Block):
    def __init__(self, meter):
        super().__init__()
        self.meter = meter

    def forward(self, x):
        self.meter.update(1)
        x = self.conv1(x)
        return x * self.ca(x)


class TellsInAPart(Block):
    def __init__(self, meter):
        super().__init__()
        self.conv1 = Tells(meter)

    def forward(self, x):
        x = self.conv1(x)
        return x * self.ca(x)


class CountsInPlace(Block):
    """In a tensor that is no buffer."""

    def __init__(self, meter):
        super().__init__()
        self.meter, self.calls = meter, torch.zeros(())

    def forward(self, x):
        self.calls.add_(1)
        x = self.conv1(x)
        return x * self.ca(x)


class CountsInPlaceInAPart(TellsInAPart):
    def __init__(self, meter):
        super().__init__(meter)
        self.conv1 = CountsInPlace(meter)


@pytest.mark.parametrize("cls", [Tells, TellsInAPart, CountsInPlace, CountsInPlaceInAPart])
def test_nothing_is_told_or_counted_by_fusing(cls):
    net = fuse(cls(Meter()).eval())
    counted = [m.calls for m in net.modules() if hasattr(m, "calls")]
    assert net.meter.n == 0 if hasattr(net, "meter") else net.conv1.meter.n == 0
    assert all(t == 0 for t in counted)
    for _ in range(3):
        net(random(1, 16, 5, 5))
    if cls in (Tells, TellsInAPart):
        assert (net.meter if cls is Tells else net.conv1.meter).n == 3
    assert all(t == 3 for t in counted) and bool(counted) == ("InPlace" in cls.__name__)


def test_buffers_and_random_numbers_stay():
    net = nn.Sequential(Counts(), Drops())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(5)
    before, python = torch.get_rng_state(), python_random.getstate()
    fuse(net)
    assert all(PLAN in block.__dict__ for block in net)
    assert torch.equal(torch.get_rng_state(), before) and python_random.getstate() == python
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "context",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.profiler.profile,
    ],
    ids=["inference mode", "no_grad", "default device", "autocast", "profiler"],
)
def test_the_moment_has_no_part_in_it(context):
    cls = type("Fresh", (Block,), {})
    net = cls()
    with context():
        fuse(net)
    assert explain(net)[0].fused and explain(fuse(cls()))[0].fused


def test_threads_fuse_while_others_infer():
    plain, call = Block().eval(), nn.Module.__call__
    x = random(1, 16, 5, 6)
    with torch.no_grad():
        expected = plain(x)
    wrong: list[object] = []
    done = threading.Event()

    def infer() -> None:
        while not done.is_set() and not wrong:
            with torch.inference_mode():
                if not torch.equal(plain(x), expected):
                    wrong.append("another result")
            if nn.Module.__call__ is not call:
                wrong.append("patched")

    def make() -> None:
        for _ in range(3):
            net = fuse(copy.deepcopy(type("Fresh", (Block,), {"plain": plain})().eval()))
            if not explain(net)[0].fused:
                wrong.append("not fused")

    def guarded(function):
        try:
            function()
        except Exception as error:
            wrong.append(error)

    inferring = threading.Thread(target=guarded, args=(infer,))
    making = [threading.Thread(target=guarded, args=(make,)) for _ in range(3)]
    inferring.start()
    for thread in making:
        thread.start()
    for thread in making:
        thread.join()
    done.set()
    inferring.join()
    assert not wrong


Conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Channel(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.fc = nn.Sequential(Conv[rank](8, 4, 1), nn.ReLU(), Conv[rank](4, 8, 1))
        self.axes = tuple(range(2, rank + 2))

    def forward(self, x):
        return torch.sigmoid(self.fc(x.mean(self.axes, keepdim=True)))


class Spatial(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.conv = Conv[rank](2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.conv(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class AnyRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        y = torch.sigmoid(self.b(torch.relu(self.a(x.flatten(2).mean(-1)))))
        return y.view(*y.shape, *[1] * (x.dim() - 2))


class OfRank(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.conv, self.ca, self.sa = Conv[rank](8, 8, 3, padding=1), Channel(rank), Spatial(rank)

    def forward(self, x):
        y = self.conv(x)
        y = self.ca(y) * y
        return self.sa(y) * y + x


class OfAnyRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.ca, self.scale = AnyRank(), nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x * self.scale
        return x * self.ca(x)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("make", [OfRank, lambda rank: OfAnyRank()], ids=["of this rank", "of any"])
def test_every_rank_runs_fused(make, rank):
    plain = make(rank).double()
    net = fuse(copy.deepcopy(plain))
    x = random(2, 8, *(6, 5, 4)[:rank], dtype=torch.float64)
    assert explain(net)[0].fused
    with torch.no_grad(), FusedOperators() as mode:
        actual = net(x)
    assert mode.count > 0
    torch.testing.assert_close(actual, plain(x), rtol=1e-9, atol=1e-10)


def halved(region):
    function = original_function_of(region)
    return lambda block, x: function(block, x) * 0.5


def detached(region):
    function = original_function_of(region)
    return lambda block, x: function(block, x.detach())


def counted(region):
    function = original_function_of(region)

    def run(block, x):
        block.bn1.num_batches_tracked.add_(1)
        return function(block, x)

    return run


original_function_of = parents._function_of


@pytest.mark.parametrize("wrong", [halved, detached, counted])
def test_a_rewritten_forward_is_compared(wrong, monkeypatch):
    cls = type("Fresh", (Block,), {})  # what is known of equal ones is kept by class
    monkeypatch.setattr(parents, "_function_of", wrong)
    assert composite_of(cls()) is None
    monkeypatch.undo()
    assert composite_of(type("Fresh", (Block,), {})()) is not None


def test_equal_parents_share_the_code_and_keep_their_gates():
    first, second = Block().double(), Block().double()
    assert composite_of(first) is composite_of(second)
    plain = copy.deepcopy((first, second))
    fuse(first), fuse(second)
    copied = copy.deepcopy(first)
    with torch.no_grad():
        copied.ca.fc1.weight.mul_(-2)
    x = random(2, 16, 7, 9, dtype=torch.float64)
    for net, original in zip((first, second), plain, strict=True):
        torch.testing.assert_close(net(x), original(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(copied(x), Block.forward(copied, x), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(copied(x), first(x))


def test_what_is_known_of_a_parent_holds_none():
    cls = type("Fresh", (Block,), {})
    net = fuse(cls())
    held = [weakref.ref(m) for m in net.modules()]
    assert composite_of(cls()) is not None
    del net
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


class Deep(Block):
    """With more parts than are looked at in one go; what its helpers read is watched like what it reads."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(40)))
        self._alpha, self._last = 1.0, 0.5

    def tail(self, x):
        return self.last(x) * self._alpha

    def last(self, x):
        return x + self._last

    def forward(self, x):
        x = self.body(x)
        return self.tail(self.ca(x) * x)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "_alpha", 3.0),
        lambda net: setattr(net, "_last", 3.0),
        lambda net: setattr(net, "last", lambda x: x * 5),
        lambda net: setattr(net.body[7], "padding_mode", "reflect"),
        lambda net: setattr(net.ca.fc1, "stride", (1, 1)),
        lambda net: net.ca.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda net: net.body.register_forward_hook(lambda module, inputs, output: output * 2),
    ],
)
def test_a_change_of_what_a_helper_reads_counts(change):
    net = fuse(Deep().double())
    assert explain(net)[0].fused
    change(net)
    x = random(2, 16, 7, 9, dtype=torch.float64)
    assert torch.allclose(net(x), Deep.forward(net, x), rtol=1e-9, atol=1e-9)


def test_a_hook_sees_what_is_written_into_its_result():
    plain = InPlace().double().eval()
    net = fuse(copy.deepcopy(plain))
    assert explain(net)[0].fused
    seen = []
    for each in (net, plain):
        each.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            each(random(1, 16, 5, 5, dtype=torch.float64))
    torch.testing.assert_close(*seen)


def test_a_hook_on_a_container_that_is_entered_is_called():
    net = fuse(GatesInASequential())
    calls = []
    net.body[1].register_forward_hook(lambda module, inputs, output: calls.append(1))
    net(random(1, 16, 5, 5))
    assert calls == [1]


class Network(nn.Module):
    """Reads more than is watched of any block, most of which its layers see themselves."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.ca, self.sa = ChannelAttention(16), SpatialAttention()
        self.body = nn.Sequential(*(Block() for _ in range(12)))
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.ca(x) * x
        x = self.body(self.sa(x) * x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(self.drop(x.view(x.size(0), -1)))


def test_a_network_with_gates_of_its_own():
    plain = Network().double().eval()
    net = fuse(copy.deepcopy(plain))
    assert [row.fused for row in explain(net)] == [True] * 13
    x = random(2, 3, 33, 30, dtype=torch.float64)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-9, atol=1e-10)


def test_a_change_after_fusing_counts():
    net = fuse(Block().double())
    x = random(2, 16, 7, 9, dtype=torch.float64)
    before = net(x)
    net.ca.fc1.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not torch.allclose(net(x), before)
    assert torch.equal(net(x), Block.forward(net, x))
