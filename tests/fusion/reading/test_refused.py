"""What looks like a known block and is not, or does more than compute: left alone, with the reason."""

from __future__ import annotations

import random as python_random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import explain, fuse
from fused_attn.fusion import FusionError
from fused_attn.fusion.changing.plan import PLAN
from tests.checks import random
from tests.fusion.reading.pasted import CBAM, SEBlock, SpatialAttention

CASES: dict[str, tuple] = {}
SEEN: list = []
LAST: dict[str, int] = {}


def because(reason, *args):
    def add(cls):
        CASES[cls.__name__] = (lambda: cls(*args), reason)
        return cls

    return add


class Base(SEBlock):
    def __init__(self, c=32):
        super().__init__(c)

    def gate(self, x):
        return self.fc(self.avg_pool(x).flatten(1))[:, :, None, None]


@because("prints")
class Prints(Base):
    def forward(self, x):
        print(x.shape)
        return x * self.gate(x)


@because("keeps state")
class Counts(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.gate(x)


@because("keeps")
class Appends(Base):
    def forward(self, x):
        gate = self.gate(x)
        SEEN.append(gate)
        return x * gate


@because("keeps state")
class SetsAnItem(Base):
    def forward(self, x):
        LAST["rank"] = x.dim()
        return x * self.gate(x)


@because("branches on data")
class Branches(Base):
    def forward(self, x):
        gate = self.gate(x)
        return x * gate if gate.mean() > 0.5 else x


@because("branches on data")
class BranchesBeforeItsGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        s = x.mean((2, 3))
        if s.sum() > 0:
            s = s * 2
        return x * self.fc(s).sigmoid()[:, :, None, None]


@because("branches on data")
class ReadsItsMean(BranchesBeforeItsGate):
    def forward(self, x):
        s = x.mean((2, 3))
        return x * self.fc(s * s.max().item()).sigmoid()[:, :, None, None]


@because("branches on data")
class ThroughNumpy(BranchesBeforeItsGate):
    def forward(self, x):
        s = torch.from_numpy(x.mean((2, 3)).detach().numpy())
        return x * self.fc(s).sigmoid()[:, :, None, None]


@because("branches on the size of the map")
class BySize(Base):
    def forward(self, x):
        return x * self.gate(x) if x.shape[2] < 40 else x * self.gate(x).sigmoid()


@because("random")
class Random(Base):
    def forward(self, x):
        return x * self.gate(x) if python_random.random() < 2 else x


@because("detaches a branch")
class Detached(Base):
    def forward(self, x):
        return x * self.gate(x.detach())


@because("gradients")
class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            gate = self.gate(x)
        return x * gate


@because("asks for gradients")
class GradientOfItsOwn(Base):
    """Computes what a known block does; its gradients are others."""

    def forward(self, x):
        gate = self.gate(x)
        if gate.requires_grad:
            gate.register_hook(lambda grad: 2 * grad)
        return x * gate


@because("differs from the known block in evaluation: another result")
class AnotherEpsilon(SpatialAttention):
    """Its BatchNorm is run with another epsilon than the layer has, which changes the fifth digit."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.bn.num_batches_tracked = None

    def forward(self, x):
        z = self.conv1(torch.cat([x.mean(1, True), x.max(1, True)[0]], 1))
        bn = self.bn
        z = F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, bn.momentum, 2e-5)
        return x * z.sigmoid()


@because("spatial pool is to 2×2, not global")
class TwoByTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Conv2d(16, 16, 2)

    def forward(self, x):
        return x * self.fc(self.pool(x)).sigmoid()


@because("writes into its input")
class WritesInput(Base):
    def forward(self, x):
        return x.mul_(self.gate(x))


@because("square")
class SquareOnly(Base):
    """As the authors' BAM: the window takes its width from the height."""

    def forward(self, x):
        pooled = F.avg_pool2d(x, x.size(2), stride=x.size(2))
        return x * self.fc(pooled.view(x.size(0), -1))[:, :, None, None]


@because("another dtype")
class UpCasts(Base):
    def forward(self, x):
        return x.float() * self.gate(x)


class PrintingCBAM(CBAM):
    def forward(self, x):
        print("gates")
        return super().forward(x)


def reason_of(block) -> str:
    rows = [row for row in explain(block) if not row.fused and row.name == "(the model)"]
    assert rows and "\n" not in rows[0].reason
    return rows[0].reason


@pytest.mark.parametrize("name", CASES)
def test_left_alone_with_the_reason(name, capsys):
    build, reason = CASES[name]
    block = build().double()
    x = random(2, 16 if "fc.0.weight" not in block.state_dict() else 32, 8, 8, dtype=torch.float64)
    before = dict(block.__dict__)
    torch.manual_seed(1)
    expected = block(x.clone()) if name != "Counts" else None
    capsys.readouterr()
    SEEN.clear()
    assert fuse(block) is block
    assert PLAN not in block.__dict__ and type(block).__name__ == name
    assert capsys.readouterr().out == "" and not [t for t in SEEN if not t.is_meta]
    assert {k: v for k, v in block.__dict__.items() if k != "calls"} == {
        k: v for k, v in before.items() if k != "calls"
    }
    assert reason in reason_of(block), reason_of(block)
    with pytest.raises(FusionError, match="blocks left alone"):
        fuse(block, strict=True)
    torch.manual_seed(1)
    if expected is not None:
        assert torch.equal(block(x.clone()), expected)


class Raises(Base):
    """Ends the program, by this error, for some maps."""

    def forward(self, x):
        if x.dim() != 4:
            raise ERROR
        return x * self.gate(x)


ERROR = SystemExit(3)


def test_a_block_that_ends_the_program_does_not_end_fuse():
    fuse(Raises())


def test_hooks_are_not_called_and_keep_a_block_from_being_fused():
    block, calls = SEBlock(32), []
    block.fc[0].register_forward_hook(lambda *_: calls.append(1))
    assert "carries a hook" in reason_of(fuse(block)) and not calls
    outer = SEBlock(32)
    outer.register_forward_hook(lambda *_: calls.append(1))
    fuse(outer)
    assert PLAN in outer.__dict__ and not calls
    outer(random(1, 32, 3, 3))
    assert calls == [1]


def test_no_attention_is_not_mentioned():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.silu(self.bn(self.conv(x))) + x

    assert not explain(Plain())
    assert not explain(nn.Sequential(Plain(), nn.ReLU(), Plain()))


def test_parts_are_fused_where_the_whole_cannot_be():
    block = fuse(PrintingCBAM(32))
    assert reason_of(block) == "prints"
    assert sum(row.fused for row in explain(block)) == 2


class MaskedTrunk(nn.Module):
    """Residual attention."""

    def __init__(self, c):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), SEBlock(c))
        self.mask = nn.Sequential(
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(c, c, 1), nn.UpsamplingBilinear2d((6, 7)), nn.Sigmoid()
        )

    def forward(self, x):
        return (1 + self.mask(x)) * self.trunk(x)


class Transformed(nn.Module):
    """A spatial transformer."""

    def __init__(self, c):
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(c, c, 3), SEBlock(c), nn.AdaptiveAvgPool2d(1))
        self.fc_loc = nn.Linear(c, 6)

    def forward(self, x):
        theta = self.fc_loc(self.localization(x).flatten(1)).view(-1, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, x.size(), align_corners=False), align_corners=False)


@pytest.mark.parametrize(("cls", "path"), [(MaskedTrunk, "trunk.1"), (Transformed, "localization.1")])
def test_blocks_in_what_is_not_looked_for(cls, path):
    block = cls(32).double()
    x = random(2, 32, 6, 7, dtype=torch.float64)
    expected = block(x)
    assert [(row.name, row.fused) for row in explain(fuse(block, strict=True))] == [(path, True)]
    torch.testing.assert_close(block(x), expected)
