"""Gates that are computed in a parent's forward, and excitations of any kind: found as hosts write them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion.changing.plan import PLAN
from tests.checks import random
from tests.fusion.changing.test_parents import run
from tests.fusion.counting import FusedOperators

CASES: dict[str, tuple] = {}
OWN = "squeeze, its own layers, scale"
C = 16


def expect(block, *args, name=None, **kwargs):
    def add(cls):
        CASES[name or cls.__name__] = (lambda: cls(*args, **kwargs), block)
        return cls

    return add


def excitation(*, first=nn.ReLU, gate=nn.Sigmoid, c=C):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), first(), nn.Conv2d(4, c, 1), gate())


class Residual(nn.Module):
    """A residual block whose excitation is a Sequential."""

    def __init__(self, **options):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.relu, self.se = nn.ReLU(inplace=True), excitation(**options)

    def body(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        out = self.body(x)
        out = out * self.se(out)
        out += x
        return self.relu(out)


expect("SqueezeExcite(16 -> 4, relu, sigmoid) in its forward", name="Sequential")(Residual)
expect("SqueezeExcite(16 -> 4, silu, hard_sigmoid)", first=nn.SiLU, gate=nn.Hardsigmoid, name="silu and hard")(Residual)
expect(OWN, first=lambda: nn.BatchNorm2d(4), name="BatchNorm in it")(Residual)
expect(OWN, first=nn.PReLU, name="PReLU in it")(Residual)
expect(OWN, gate=nn.Softsign, name="another gate")(Residual)
expect(OWN, gate=nn.Dropout, name="no gate but a dropout")(Residual)


class Widened(nn.Module):
    """A gate of two axes, brought to the map's in one of the ways that do not say how many those are."""

    def __init__(self, widen):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(C, C, 3, padding=1), nn.Linear(C, 4), nn.Linear(4, C)
        self.widen = widen

    def forward(self, x):
        y = self.conv(x)
        w = torch.sigmoid(self.b(torch.relu(self.a(y.mean((2, 3))))))
        return x + y * self.widen(y, w)


def unsqueezed(y, w):
    while w.dim() < y.dim():
        w = w.unsqueeze(-1)
    return w


WAYS = {
    "its sizes spread": lambda y, w: w.view(*w.shape, 1, 1),
    "its sizes in a list": lambda y, w: w.view([*w.size(), 1, 1]),
    "its sizes and more": lambda y, w: w.view(w.shape + (1, 1)),
    "a tuple of its sizes": lambda y, w: w.reshape(tuple(w.shape) + (1, 1)),
    "as many as the map": lambda y, w: w.view(*w.shape, *[1] * (y.ndim - 2)),
    "new axes": lambda y, w: w[(..., *[None] * (y.dim() - w.dim()))],
    "a loop": unsqueezed,
}
for way, widen in WAYS.items():
    expect("SqueezeExcite(16 -> 4, relu, sigmoid)", widen, name=f"widened: {way}")(Widened)


@expect("SqueezeExcite(16 -> 4, relu, sigmoid) in its forward")
class WrittenIntoItself(Residual):
    def forward(self, x):
        out = self.body(x)
        out = self.se(out).expand_as(out).mul(out)
        return F.relu(out + x)


@expect("SimAM in its forward")
class SimAMByMethod(Residual):
    @staticmethod
    def simam(x, lam=1e-4):
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = d / (4 * (d.sum(dim=[2, 3], keepdim=True) / n + lam)) + 0.5
        return x * torch.sigmoid(y)

    def forward(self, x):
        return self.relu(self.simam(self.body(x)) + x)


@expect("ECA(kernel 3, conv, sigmoid) in its forward")
class ECAByMethod(Residual):
    def __init__(self):
        super().__init__()
        self.pool, self.eca = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def attend(self, x):
        y = self.eca(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)

    def forward(self, x):
        return self.relu(self.attend(self.body(x)) + x)


# EfficientNet's block, as ports write it


class SwishImplementation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, i):
        ctx.save_for_backward(i)
        return i * torch.sigmoid(i)

    @staticmethod
    def backward(ctx, grad_output):
        (i,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(i)
        return grad_output * (sigmoid * (1 + i * (1 - sigmoid)))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x):
        return SwishImplementation.apply(x)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def drop_connect(inputs, p, training):
    if not 0 <= p <= 1:  # an assert of a test is another thing
        raise AssertionError("p must be in range of [0,1]")
    if not training:
        return inputs
    keep = 1 - p
    mask = keep
    mask += torch.rand([inputs.shape[0], 1, 1, 1], dtype=inputs.dtype, device=inputs.device)
    return inputs / keep * torch.floor(mask)


class MBConv(nn.Module):
    def __init__(self, swish=MemoryEfficientSwish, width=24):
        super().__init__()
        self.expand, self.bn0 = nn.Conv2d(C, width, 1, bias=False), nn.BatchNorm2d(width)
        self.depthwise, self.bn1 = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.has_se, self.id_skip, self._swish = True, True, swish()
        self.se_reduce, self.se_expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.project, self.bn2 = nn.Conv2d(width, C, 1, bias=False), nn.BatchNorm2d(C)

    def forward(self, inputs, drop_connect_rate=None):
        x = self._swish(self.bn0(self.expand(inputs)))
        x = self._swish(self.bn1(self.depthwise(x)))
        if self.has_se:
            s = F.adaptive_avg_pool2d(x, 1)
            s = self.se_expand(self._swish(self.se_reduce(s)))
            x = torch.sigmoid(s) * x
        x = self.bn2(self.project(x))
        if self.id_skip:
            if drop_connect_rate:
                x = drop_connect(x, p=drop_connect_rate, training=self.training)
            x = x + inputs
        return x


expect(f"{OWN} in its forward", name="swish of its own gradient")(MBConv)
expect("SqueezeExcite(24 -> 4, silu, sigmoid) in its forward", Swish, name="swish")(MBConv)


@pytest.mark.parametrize("swish", [MemoryEfficientSwish, Swish])
def test_a_number_beside_the_map(swish):
    plain = MBConv(swish).double()
    net = fuse(copy.deepcopy(plain))
    given = [{}, {"drop_connect_rate": 0.3}, {"drop_connect_rate": 0.0}, {"drop_connect_rate": None}]
    for training in (True, False):
        net.train(training), plain.train(training)
        for options in given:
            x = random(3, C, 5, 6, dtype=torch.float64)
            results = []
            for model in (net, plain):
                leaf = x.clone().requires_grad_()
                torch.manual_seed(5)
                with FusedOperators() as mode:
                    y = model(leaf, **options)
                drawn = torch.rand(1)
                results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()]), drawn))
                assert (mode.count > 0) == (model is net)
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    for p, q in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(net(x, 0.1), plain(x, 0.1))
    for wrong in ({"drop_connect_rate": 2}, {"other": 1}):
        errors = []
        for model in (net, plain):
            with pytest.raises((AssertionError, TypeError)) as error:
                model(x, **wrong)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_a_number_that_goes_another_way_runs_as_written():
    class Halves(MBConv):
        def forward(self, x, rate=None):
            return super().forward(x) * (0.5 if rate is not None and rate > 0.6 else 1.0)

    plain = Halves(Swish).double().eval()
    net = fuse(copy.deepcopy(plain))
    x = random(2, C, 5, 6, dtype=torch.float64)
    for rate in (None, 0.0, 0.3, 0.7):
        torch.testing.assert_close(net(x, rate=rate), plain(x, rate=rate))


@expect(f"{OWN} in its forward, in evaluation")
class DropsByRank(MBConv):
    """As MONAI's, which asks for the rank."""

    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            return y
        return y * torch.rand([len(x), *[1] * (len(x.shape) - 1)], dtype=x.dtype).round()


# Any excitation


class Excited(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.fc = nn.Sequential(*layers)

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.view(b, c, -1).mean(2)).view(b, c, 1, 1)


expect(OWN, nn.Linear(C, 4), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4, C), nn.Sigmoid(), name="dropout")(Excited)
expect(OWN, nn.Linear(C, 4), nn.LayerNorm(4), nn.ELU(), nn.Linear(4, C), nn.Sigmoid(), name="LayerNorm, ELU")(Excited)
expect(OWN, nn.Linear(C, 4), nn.LeakyReLU(0.2), nn.Linear(4, C), nn.Sigmoid(), name="another slope")(Excited)
expect(OWN, nn.Linear(C, C), name="no activation")(Excited)
expect(OWN, nn.Linear(C, 4), nn.RReLU(), nn.Linear(4, C), nn.Sigmoid(), name="random slopes")(Excited)


@expect(OWN)
class ByFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(C, 4), nn.BatchNorm1d(4), nn.Linear(4, C)

    def forward(self, x):
        s = F.elu(self.bn(self.fc1(F.avg_pool2d(x, x.size()[2:]).flatten(1))))
        return x * torch.sigmoid(self.fc2(s))[:, :, None, None]


@expect(OWN)
class LinearContext(nn.Module):
    def __init__(self, groups=4):
        super().__init__()
        self.groups, self.weight, self.bias = groups, nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        b, c = x.shape[:2]
        y = x.mean((2, 3)).view(b, self.groups, -1)
        y = y - y.mean(2, keepdim=True)
        y = (y / (y.pow(2).mean(2, keepdim=True) + 1e-5).sqrt()).view(b, c)
        return x * torch.sigmoid(y * self.weight + self.bias)[:, :, None, None]


@expect(OWN)
class NAFBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1))
        self.conv1, self.conv2 = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(C, C, 1)
        self.beta = nn.Parameter(torch.ones(1, C, 1, 1))

    def forward(self, x):
        first, second = self.conv1(x).chunk(2, dim=1)
        y = first * second
        y = y * self.sca(y)
        return x + self.conv2(y) * self.beta


class NormedMask(nn.Module):
    """A gate alone, of no kind that is known."""

    def __init__(self):
        super().__init__()
        self.pool, self.bn = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
        self.a, self.b, self.drop = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1), nn.Dropout(0.2)

    def forward(self, x):
        return torch.sigmoid(self.b(self.drop(F.relu(self.bn(self.a(self.pool(x)))))))


@expect(OWN)
class GateOfAModule(Residual):
    def __init__(self):
        super().__init__()
        self.se = NormedMask()


@expect(f"{OWN} (avg and max pool)")
class BothPools(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2 * C, C)

    def forward(self, x):
        s = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        return x * F.softplus(self.fc(s))[..., None, None]


class ChannelsLast(nn.Module):
    """Of a map (B, H, W, C)."""

    def __init__(self, between=nn.Identity):
        super().__init__()
        self.fc1, self.between, self.fc2 = nn.Linear(9, 4), between(), nn.Linear(4, 9)

    def forward(self, x):
        s = self.fc2(self.between(F.relu(self.fc1(x.mean(dim=(1, 2), keepdim=True)))))
        return x * s.sigmoid()


expect("SqueezeExcite(9 -> 4, relu, sigmoid) in its forward", name="channels last")(ChannelsLast)
expect(OWN, nn.Dropout, name="channels last, dropout")(ChannelsLast)


@expect(OWN)
class ChannelsLastOfAParent(ChannelsLast):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(9, 9), nn.LayerNorm(9)

    def forward(self, x):
        y = self.norm(self.inner(x))
        s = torch.tanh(self.fc2(F.elu(self.fc1(y.amax((1, 2))))))
        return x + y * s[:, None, None, :]


@expect("its own layers, scale in its forward")
class SpatialSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(C, 1, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.conv(x))


class Spatial(nn.Module):
    def __init__(self, *args, inputs=2, **options):
        super().__init__()
        self.conv, self.inputs = nn.Conv2d(inputs, 1, *args, **options), inputs

    def forward(self, x):
        pools = [x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]]
        return x * torch.sigmoid(self.conv(torch.cat(pools[: self.inputs], 1)))


expect("channel_pool, its own layers, scale", (1, 7), padding=(0, 3), name="1 x 7 and a bias")(Spatial)
expect("channel_pool, its own layers, scale", 3, padding=2, dilation=2, name="dilated")(Spatial)
expect("channel_pool, its own layers, scale", 7, padding=3, inputs=1, name="the mean alone")(Spatial)


@expect("channel_pool, its own layers, scale in its forward")
class OfTheOtherAxis(Spatial):
    def __init__(self):
        super().__init__((1, 7), padding=(0, 3))

    def forward(self, x):
        pools = torch.cat([x.mean(1, True), x.amax(1, True)], 1)
        return x * self.conv(pools.transpose(2, 3)).transpose(2, 3).sigmoid()


class HardGate(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gate, self.a, self.b = gate, nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)

    def forward(self, x):
        return x * self.gate(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


expect(OWN, lambda z: torch.clamp((z + 3) / 6, 0, 1), name="clamp of a sixth")(HardGate)
expect(OWN, lambda z: z.clamp(0, 1), name="clamp")(HardGate)
expect(OWN, lambda z: torch.clamp(0.2 * z + 0.5, min=0, max=1), name="clamp of a fifth")(HardGate)
expect(OWN, lambda z: F.relu6(z + 3) * 0.1667, name="about a sixth")(HardGate)
expect("SqueezeExcite(16 -> 4, relu, hard_sigmoid)", lambda z: F.relu6(z + 3) * (1 / 6), name="a sixth")(HardGate)


@expect(OWN)
class WrittenBetween(Residual):
    """Into what the gate is computed from, seen by the product."""

    def forward(self, x):
        out = self.body(x)
        gate = self.se(out)
        kept = out.relu_()
        return gate * out + kept + out.mean()


# OpenMMLab's layer: a store in a branch that is not taken


class ConvModule(nn.Module):
    def __init__(self, c, out, act):
        super().__init__()
        self.conv, self.activate, self.norm_name = nn.Conv2d(c, out, 1), act, None
        self.with_norm, self.with_activation, self.order = False, True, ("conv", "norm", "act")
        self.efficient_conv_bn_eval_forward = None

    @property
    def norm(self):
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x, activate=True, norm=True):
        index = 0
        while index < len(self.order):
            layer = self.order[index]
            if layer == "conv":
                if self.with_norm and not self.norm.training and self.efficient_conv_bn_eval_forward is not None:
                    self.conv.forward = self.efficient_conv_bn_eval_forward
                    index += 1
                    x = self.conv(x)
                    del self.conv.forward
                else:
                    x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
            index += 1
        return x


class HSigmoid(nn.Module):
    def forward(self, x):
        return ((x + 3.0) / 6.0).clamp_(0.0, 1.0)


class SELayer(nn.Module):
    def __init__(self, gate=nn.Sigmoid):
        super().__init__()
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv1, self.conv2 = ConvModule(C, 4, nn.ReLU(inplace=True)), ConvModule(4, C, gate())

    def forward(self, x):
        out = self.conv2(self.conv1(self.global_avgpool(x)))
        return x * out


expect("SqueezeExcite(16 -> 4, relu, sigmoid)", name="OpenMMLab's")(SELayer)
expect(OWN, HSigmoid, name="OpenMMLab's with its hard gate")(SELayer)


# fastai's: layers that find the map in an attribute of what they are given


class SequentialEx(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        res = x
        for layer in self.layers:
            res.orig = x
            nres = layer(res)
            res.orig, nres.orig = None, None
            res = nres
        return res


class ProdLayer(nn.Module):
    def forward(self, x):
        return x * x.orig


def fastai(*inner):
    layers = nn.Sequential(nn.Conv2d(C, 4, 1), *inner), nn.Sequential(nn.Conv2d(4, C, 1), nn.Sigmoid())
    return SequentialEx(nn.AdaptiveAvgPool2d(1), *layers, ProdLayer())


CASES["fastai's"] = lambda: fastai(nn.ReLU()), "SqueezeExcite(16 -> 4, relu, sigmoid)"
CASES["fastai's with a norm"] = lambda: fastai(nn.BatchNorm2d(4), nn.ReLU()), OWN


class LeavesTheMap(SequentialEx):
    def forward(self, x):
        kept = x
        y = super().forward(x)
        kept.orig = y
        return y


def test_a_tensor_left_on_the_map():
    block = LeavesTheMap(*fastai(nn.ReLU()).layers)
    (row,) = explain(fuse(block))
    assert not row.fused and row.reason == "keeps state"


class Stores(SELayer):
    """The branch is taken."""

    def __init__(self):
        super().__init__()
        self.conv1.with_norm, self.conv1.norm_name, self.conv1.bn = True, "bn", nn.BatchNorm2d(4)
        self.conv1.efficient_conv_bn_eval_forward = self.conv1.conv.forward


def test_a_store_in_a_branch_that_is_taken():
    block = Stores()
    before = dict(block.conv1.conv.__dict__)
    (row,) = explain(fuse(block))
    assert not row.fused and row.reason == "keeps state" and block.conv1.conv.__dict__ == before


def test_a_branch_that_is_taken_later():
    plain = SELayer().double().eval()
    net = fuse(copy.deepcopy(plain))
    x = random(2, C, 5, 6, dtype=torch.float64)
    for block in (net, plain):
        block.conv1.with_norm, block.conv1.norm_name = True, "bn"
        block.conv1.bn = nn.BatchNorm2d(4).double().eval()
        block.conv1.efficient_conv_bn_eval_forward = lambda x: x[:, :4] * 2
    assert torch.equal(net(x), plain(x)) and not explain(net)[0].fused


@pytest.mark.parametrize("name", CASES)
def test_fused(name):
    build, block = CASES[name]
    torch.manual_seed(0)
    plain = build().double()
    net = fuse(copy.deepcopy(plain), strict=True)
    (row,) = explain(net)
    assert row.fused and row.block.startswith(block), (row.block, row.reason)
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))) if "lambda" not in repr(build) else (net,):
        same(other, copy.deepcopy(plain))
    assert type(unfuse(net)) is type(plain)


def same(net, plain):
    for training, gradients in ((True, True), (False, True), (False, False)):
        net.train(training), plain.train(training)
        x = random(2, C, 7, 9, dtype=torch.float64)
        for p, q in zip(run(net, x, gradients), run(plain, x, gradients), strict=True):
            tolerance = 1e-6 if "hard" in explain(net)[0].block.lower() else 1e-9
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        with FusedOperators() as mode:
            net(x)
        assert mode.count or (training and explain(net)[0].block.endswith("in evaluation"))
        plain(x)
    for p, q in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


# What is not that


class OfAPartOfTheMap(Residual):
    def forward(self, x):
        out = self.body(x)
        return out * self.se(out[:, :, 1:])


class OfTheMapElsewhere(Residual):
    """The pool is of another function of the map."""

    def forward(self, x):
        out = self.body(x)
        return out * torch.sigmoid(F.relu(out).mean((2, 3), keepdim=True) * 0.3 + out * 0.1)


class PoolOfDetached(Residual):
    def forward(self, x):
        out = self.body(x)
        return out * torch.sigmoid(out.detach().mean((2, 3), keepdim=True) * 3).exp()


class PoolInAnotherDtype(Residual):
    def forward(self, x):
        out = self.body(x)
        return out * F.softsign(out.float().mean((2, 3), keepdim=True))


@pytest.mark.parametrize("cls", [OfAPartOfTheMap, OfTheMapElsewhere, PoolOfDetached, PoolInAnotherDtype])
def test_left_alone(cls):
    plain = cls().double()
    net = fuse(copy.deepcopy(plain))
    assert PLAN not in net.__dict__ and not any(row.fused for row in explain(net))
    x = random(2, C, 7, 9, dtype=torch.float64)
    for p, q in zip(run(net, x, True), run(plain, x, True), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
