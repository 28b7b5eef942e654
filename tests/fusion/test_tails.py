"""fuse(model, tails=True): residual blocks whose BatchNorm, attention, sum and activations run as one op."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion import FusionError
from fused_attn.fusion.hosts.registry import recognise
from fused_attn.fusion.recipes.names import host_class
from fused_attn.hosts import UnknownModel, build_model
from tests.checks import assert_same_block, in_layout, random, randomised


def timm_resnet(kind: str, channels: int, **options) -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
    block = getattr(resnet, kind)
    return block(channels, channels // block.expansion, **options)


def downsampling_bottleneck(**options) -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
    downsample = resnet.downsample_avg(24, 64, 1, stride=2)
    return resnet.Bottleneck(24, 16, stride=2, downsample=downsample, **options)


def senet(kind: str) -> nn.Module:
    module = pytest.importorskip("timm.models.senet", reason="timm is not installed")
    cls = getattr(module, kind)
    return cls(64, 64 // cls.expansion, 1, 4)


def inverted_residual(
    kind: str = "InvertedResidual", channels: int = 16, attention: bool = True, **options
) -> nn.Module:
    module = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")
    se = functools.partial(module.SqueezeExcite, rd_ratio=0.25) if attention else None
    more = {"exp_ratio": 3.0} if kind == "InvertedResidual" else {}
    return getattr(module, kind)(channels, 16, se_layer=se, **more, **options)


def regnet(channels: int, **options) -> nn.Module:
    module = pytest.importorskip("timm.models.regnet", reason="timm is not installed")
    return module.Bottleneck(channels, 32, group_size=8, **options)


def mobilenet(use_se: bool, activation: str, stride: int = 1) -> nn.Module:
    module = pytest.importorskip("torchvision.models.mobilenetv3", reason="torchvision is not installed")
    config = module.InvertedResidualConfig(16, 3, 48, 16, use_se, activation, stride, 1, 1.0)
    return module.InvertedResidual(config, functools.partial(nn.BatchNorm2d, eps=0.001, momentum=0.01))


def mbconv(expand: int, probability: float = 0.0, channels: int = 16) -> nn.Module:
    module = pytest.importorskip("torchvision.models.efficientnet", reason="torchvision is not installed")
    return module.MBConv(module.MBConvConfig(expand, 3, 1, channels, 16, 1), probability, nn.BatchNorm2d)


def torchvision_regnet(channels: int, se_ratio: float | None = 0.25) -> nn.Module:
    module = pytest.importorskip("torchvision.models.regnet", reason="torchvision is not installed")
    return module.ResBottleneckBlock(channels, 32, 1, nn.BatchNorm2d, nn.ReLU, group_width=8, se_ratio=se_ratio)


def monai(kind: str, rank: int) -> nn.Module:
    module = pytest.importorskip("monai.networks.blocks.squeeze_and_excitation", reason="monai is not installed")
    return getattr(module, kind)(spatial_dims=rank, inplanes=64, planes=16, groups=1, reduction=4)


#: name -> (block, channels of its input, spatial axes, BatchNorms that are part of an op)
BLOCKS = {
    "resnet Bottleneck, se": (lambda: timm_resnet("Bottleneck", 64, attn_layer="se"), 64, 2, 3),
    "resnet Bottleneck, eca": (lambda: timm_resnet("Bottleneck", 64, attn_layer="eca"), 64, 2, 3),
    "resnet Bottleneck, silu": (lambda: timm_resnet("Bottleneck", 64, attn_layer="ese", act_layer=nn.SiLU), 64, 2, 3),
    "resnet Bottleneck, downsampling": (lambda: downsampling_bottleneck(attn_layer="se"), 24, 2, 3),
    "resnet Bottleneck, gc": (lambda: timm_resnet("Bottleneck", 64, attn_layer="gc"), 64, 2, None),
    "resnet Bottleneck, cbam": (lambda: timm_resnet("Bottleneck", 64, attn_layer="cbam"), 64, 2, 3),
    "resnet Bottleneck, lcbam": (lambda: timm_resnet("Bottleneck", 64, attn_layer="lcbam"), 64, 2, 3),
    "resnet BasicBlock, cbam": (lambda: timm_resnet("BasicBlock", 16, attn_layer="cbam"), 16, 2, 2),
    "resnet Bottleneck, plain": (lambda: timm_resnet("Bottleneck", 64), 64, 2, 3),
    "resnet BasicBlock, se": (lambda: timm_resnet("BasicBlock", 16, attn_layer="se"), 16, 2, 2),
    "resnet Bottleneck, anti-aliased": (lambda: downsampling_bottleneck(aa_layer=nn.AvgPool2d), 24, 2, 3),
    "senet bottleneck": (lambda: senet("SEResNetBottleneck"), 64, 2, 3),
    "senet bottleneck, ResNeXt": (lambda: senet("SEResNeXtBottleneck"), 64, 2, 3),
    "senet basic block": (lambda: senet("SEResNetBlock"), 64, 2, 2),
    "inverted residual, silu": (lambda: inverted_residual(act_layer=nn.SiLU), 16, 2, 3),
    "inverted residual, hard swish": (lambda: inverted_residual(act_layer=nn.Hardswish, stride=2), 16, 2, 2),
    "inverted residual, no attention": (lambda: inverted_residual(attention=False), 16, 2, 3),
    "inverted residual, s2d": (lambda: inverted_residual(s2d=1, stride=1, noskip=True), 16, 2, 3),
    "depthwise separable": (lambda: inverted_residual("DepthwiseSeparableConv", act_layer=nn.SiLU), 16, 2, 2),
    "depthwise separable, pw_act": (lambda: inverted_residual("DepthwiseSeparableConv", pw_act=True), 16, 2, 2),
    "regnet": (lambda: regnet(32), 32, 2, 3),
    "regnet, downsampling": (lambda: regnet(16, stride=2), 16, 2, 3),
    "regnet, linear, no attention": (lambda: regnet(32, linear_out=True, se_ratio=0), 32, 2, 3),
    "torchvision mobilenet": (lambda: mobilenet(True, "HS"), 16, 2, 3),
    "torchvision mobilenet, no attention": (lambda: mobilenet(False, "RE", 2), 16, 2, 3),
    "torchvision MBConv": (lambda: mbconv(4), 16, 2, 3),
    "torchvision MBConv, not expanding": (lambda: mbconv(1, channels=16), 16, 2, 2),
    "torchvision regnet": (lambda: torchvision_regnet(32), 32, 2, 3),
    "torchvision regnet, projecting": (lambda: torchvision_regnet(16, None), 16, 2, 3),
    "monai bottleneck": (lambda: monai("SEResNetBottleneck", 2), 64, 2, 3),
    "monai bottleneck, 3-D": (lambda: monai("SEBottleneck", 3), 64, 3, 3),
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_it_was(name, training, layout):
    """Output, every gradient and the running statistics, in float64."""
    make, channels, rank, norms = BLOCKS[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original), tails=True)
    assert (host_class(fused) is type(original)) is (norms is not None)
    if norms is not None:
        (row,) = explain(fused)
        assert row.fused and row.block.count("BatchNorm") == norms
    x = in_layout(random(3, channels, *(6, 4, 5)[:rank]), layout)
    assert_same_block(fused, original, x, training=training)


def bottleneck(**options) -> nn.Module:
    return randomised(timm_resnet("Bottleneck", 64, attn_layer="se", **options))


X = random(3, 64, 5, 4, dtype=torch.float64)


#: name -> residual blocks in it, every one of which has a tail
NETWORKS = {
    "timm:resnetaa50": 16,
    "timm:seresnext50_32x4d": 16,
    "timm:legacy_seresnet18": 8,
    "timm:legacy_seresnext26_32x4d": 8,
    "timm:mobilenetv3_small_100": 11,
    "timm:regnety_002": 13,
    "torchvision:efficientnet_b0": 16,
    "torchvision:mobilenet_v3_small": 11,
    "torchvision:regnet_y_400mf": 16,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_of_a_network_has_one(name):
    try:
        model = build_model(name)  # not on the meta device: torchvision's RegNet computes its widths with tensors
    except UnknownModel as error:
        pytest.skip(str(error))
    report = explain(fuse(model, tails=True), tails=True)
    assert all(row.fused for row in report), str(report)
    assert sum("BatchNorm" in row.block for row in report) == len(report) == NETWORKS[name]


def test_off_by_default():
    block = fuse(bottleneck())
    assert host_class(block) is None and host_class(block.se) is not None


def test_attention_that_is_fused_already():
    original = bottleneck()
    block = fuse(fuse(copy.deepcopy(original)), tails=True)
    assert host_class(block) is type(original) and len(explain(block)) == 1
    assert_same_block(block, original, X, training=True)
    assert not any(host_class(module) for module in unfuse(block).modules())


def test_fusing_again_and_undoing():
    block = bottleneck()
    before = [(type(m), dict(m.__dict__)) for m in block.modules()]
    classes = [type(m) for m in fuse(block, tails=True).modules()]
    assert [type(m) for m in fuse(block, tails=True).modules()] == classes
    assert [type(m) for m in fuse(block).modules()] == classes
    unfuse(block)
    assert [(type(m), dict(m.__dict__)) for m in block.modules()] == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_run_fused_too(copied):
    block = fuse(bottleneck(), tails=True)
    other = copied(block)
    assert str(explain(other)) == str(explain(block)) and torch.equal(other(X), block(X))
    assert other.bn3.weight is not block.bn3.weight


class BranchingShortcut(nn.Identity):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_of_a_block_that_looks_like_another_one(copied):
    """By what it computes it would be left alone, for a reason; it has a tail all the same."""
    block = bottleneck(downsample=BranchingShortcut())
    assert recognise(block) == "branches on data"
    other = copied(fuse(block, tails=True))
    assert host_class(other) is host_class(block) is not None
    assert torch.equal(other(X), block(X))


def test_state_dict_and_parameter_groups_stay():
    original = bottleneck()
    block = copy.deepcopy(original)
    parameters = list(block.parameters())
    fuse(block, tails=True)
    assert list(block.state_dict()) == list(original.state_dict())
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    block.load_state_dict(original.state_dict())


@pytest.mark.parametrize("path", ["bn3", "se", "se.fc1", "act3", "drop_path"])
def test_a_hook_on_a_bypassed_layer_is_refused(path):
    block = bottleneck(drop_path=drop_path(0.5))
    block.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(FusionError, match=f"{path} carries a hook"):
        fuse(block, tails=True, strict=True)
    assert host_class(fuse(block, tails=True)) is None


def test_a_hook_added_later_is_called():
    block, calls = fuse(bottleneck(), tails=True), []
    expected = block.eval()(X)
    block.bn3.register_forward_hook(lambda *_: calls.append("bn3"))
    torch.testing.assert_close(block(X), expected)
    assert calls == ["bn3"]


def test_hooks_on_other_layers_are_called():
    """Where one is on a BatchNorm with an activation that is no tail, these two run as they are."""
    block, calls = bottleneck().train(), []
    for path in ("conv1", "bn1", "drop_block", "conv3"):
        block.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    (row,) = explain(fuse(block, tails=True))
    block(X)
    assert row.block == "BatchNorm -> gate -> relu" and calls == ["conv1", "bn1", "drop_block", "conv3"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_block_with_drop_block(training):
    """It stands between a BatchNorm and its activation, which then are no op."""
    module = pytest.importorskip("timm.layers", reason="timm is not installed")
    original = bottleneck(drop_block=functools.partial(module.DropBlock2d, drop_prob=0.3, block_size=2))
    block = fuse(copy.deepcopy(original), tails=True)
    (row,) = explain(block)
    assert row.block == "BatchNorm -> relu; BatchNorm -> gate -> relu"
    found = []
    for b in (original, block):
        torch.manual_seed(3)
        found.append(b.double().train(training)(X))
    torch.testing.assert_close(*found)


def test_eval_and_train_are_the_layers_own():
    """A BatchNorm frozen by eval() in a network that trains uses and keeps its running statistics."""
    original = bottleneck()
    block = fuse(copy.deepcopy(original), tails=True)
    for b in (original, block):
        b.train()
        b.bn3.eval()
    x = X.clone().requires_grad_()
    mine, theirs = block(x), original(x)
    torch.testing.assert_close(mine, theirs)
    mine.square().sum().backward()
    assert torch.equal(block.bn3.running_mean, original.bn3.running_mean)
    assert block.bn3.weight.grad is not None


def test_frozen_parameters():
    block = fuse(bottleneck(), tails=True)
    for parameter in (*block.bn3.parameters(), *block.se.parameters()):
        parameter.requires_grad_(False)
    block(X).sum().backward()
    assert block.bn3.weight.grad is None and block.se.fc1.weight.grad is None and block.conv1.weight.grad is not None


def test_without_statistics_of_its_own():
    original = bottleneck()
    norm = original.bn3
    norm.track_running_stats, norm.running_mean, norm.running_var, norm.num_batches_tracked = False, None, None, None
    block = fuse(copy.deepcopy(original), tails=True)
    assert_same_block(block, original, X, training=True)
    assert_same_block(block, original, X, training=False)


class _Softplus(nn.Softplus):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()


def refused(block: nn.Module) -> str:
    with pytest.raises(FusionError) as caught:
        fuse(block, tails=True, strict=True)
    fuse(block, tails=True)
    assert host_class(block) is None
    return str(caught.value)


class Halving(nn.Module):
    """Whatever its probability is."""

    p = 0.0

    def forward(self, x):
        return x / 2


def test_what_is_left_alone():
    assert "it drops paths by a Dropout" in refused(bottleneck(drop_path=nn.Dropout(0.1)))
    assert "it drops paths by a Halving" in refused(bottleneck(drop_path=Halving()))
    assert "it blurs" in refused(inverted_residual(stride=2, aa_layer=nn.AvgPool2d))
    assert "not a BatchNorm" in refused(timm_resnet("Bottleneck", 64, norm_layer=functools.partial(nn.GroupNorm, 4)))
    assert "which is not one we fuse" in refused(timm_resnet("Bottleneck", 64, act_layer=_Softplus))
    assert "which is not part of the op" in refused(timm_resnet("Bottleneck", 64, attn_layer="gc"))


def test_why_a_tail_was_left_alone_can_be_asked():
    block = bottleneck(drop_path=nn.Dropout(0.1))
    assert [row.name for row in explain(fuse(block, tails=True))] == ["se"]
    whole, gate = explain(block, tails=True)
    assert not whole.fused and "it drops paths by a Dropout" in whole.reason and gate.fused
    (row,) = explain(bottleneck(), tails=True)
    assert not row.fused and "BatchNorm" in row.block and row.reason.endswith("fused_attn.fuse(model, tails=True)")


def drop_path(probability: float) -> nn.Module:
    return pytest.importorskip("timm.layers", reason="timm is not installed").DropPath(probability)


#: (block, channels of its input)
DROPPING = {
    "resnet": (lambda: bottleneck(drop_path=drop_path(0.5)), 64),
    "resnet, cbam": (lambda: timm_resnet("BasicBlock", 16, attn_layer="cbam", drop_path=drop_path(0.5)), 16),
    "resnet, plain": (lambda: timm_resnet("BasicBlock", 16, drop_path=drop_path(0.5)), 16),
    "inverted residual": (lambda: inverted_residual(drop_path_rate=0.5), 16),
    "regnet": (lambda: regnet(32, drop_path_rate=0.5), 32),
    "torchvision MBConv": (lambda: mbconv(4, 0.5), 16),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", DROPPING)
def test_paths_that_are_dropped_run_as_they_are(name, training):
    """In training the sum is the block's own and what stands before the drop path is fused; in evaluation all is."""
    make, channels = DROPPING[name]
    original = randomised(make()).double()
    block = fuse(copy.deepcopy(original), tails=True)
    assert host_class(block) is type(original)
    found: list[list[Tensor]] = []
    for b in (original, block):
        torch.manual_seed(3)
        x = random(8, channels, 5, 5, dtype=torch.float64).requires_grad_()
        y = b.train(training)(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in b.parameters()), *b.buffers()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_several_batches_add_up():
    original = bottleneck()
    block = fuse(copy.deepcopy(original), tails=True)
    for seed in range(3):
        for b in (original, block):
            b(random(3, 64, 5, 4, seed=seed, dtype=torch.float64)).square().sum().backward()
    for mine, theirs in zip(block.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(block.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_updates_statistics_as_often(reentrant):
    """One that recomputes no further than it must stops in the op: by then its BatchNorm has been kept, as in eager."""
    plain = bottleneck().double().train()
    tails = fuse(copy.deepcopy(plain), tails=True)
    assert host_class(tails) is not None
    for model in (plain, tails):
        x = random(3, 64, 5, 4, dtype=torch.float64).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for (name, a), b in zip(tails.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training):
    """As near to float32 as eager under autocast is, within a factor."""
    original = timm_resnet("Bottleneck", 64, attn_layer="se").train(training)
    x, found, dtypes = random(4, 64, 6, 6), [], []
    for block, enabled in (
        (copy.deepcopy(original), False),
        (copy.deepcopy(original), True),
        (fuse(copy.deepcopy(original), tails=True), True),
    ):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = block(leaf)
        y.float().square().mean().backward()
        dtypes.append(y.dtype)
        gradients = [p.grad for p in block.parameters()]
        assert all(p.grad.dtype == p.dtype for p in block.parameters())
        found.append([y.float(), leaf.grad, *gradients, *(b.float() for b in block.buffers())])
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]  # the block adds in place, to the half
    for exact, eager, fused in zip(*found, strict=True):
        scale = exact.abs().max().item()
        allowed = 2 * (eager - exact).abs().max().item() + 2**-8 * scale
        assert (fused - exact).abs().max().item() <= allowed


def test_half_precision_in_eval():
    """The folded BatchNorm is float32."""
    block = timm_resnet("Bottleneck", 64, attn_layer="se").eval()
    x = random(2, 64, 6, 6)
    expected = block(x)
    block = fuse(block.bfloat16(), tails=True)
    torch.testing.assert_close(block(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


#: Inductor, which takes seconds, is behind the op alone in tests/ops.
BACKENDS = ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.long)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training, backend):
    block = fuse(timm_resnet("BasicBlock", 8, attn_layer="se"), tails=True).train(training)
    other = copy.deepcopy(block)
    found: list[list[Tensor]] = []
    for module, owner in ((torch.compile(block, fullgraph=True, backend=backend), block), (other, other)):
        x = random(2, 8, 6, 5).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in owner.parameters()), *owner.buffers()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
