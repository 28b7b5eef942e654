"""Every host block against itself: fused and original, with the same weights, forward and every gradient."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from fused_attn import explain, fuse, reference, unfuse
from fused_attn.fusion import ChannelGate, SplitGate
from fused_attn.fusion.registry import recognise
from tests.checks import LAYOUTS, assert_equivalent, in_layout, random

timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
efficientnet = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")
senet = pytest.importorskip("timm.models.senet", reason="timm is not installed")
hgnet = pytest.importorskip("timm.models.hgnet", reason="timm is not installed")
tv_misc = pytest.importorskip("torchvision.ops.misc", reason="torchvision is not installed")
monai_blocks = pytest.importorskip("monai.networks.blocks", reason="monai is not installed")

C = 32

#: name -> (block, spatial rank, whether it is one fused op or split around its own layers)
BLOCKS = {
    "timm SEModule": (lambda: timm_layers.SEModule(C), 2, ChannelGate),
    "timm SEModule, max": (lambda: timm_layers.SEModule(C, add_maxpool=True), 2, ChannelGate),
    "timm SEModule, no bias": (lambda: timm_layers.SEModule(C, bias=False, gate_layer="hard_sigmoid"), 2, ChannelGate),
    "timm SEModule, silu": (lambda: timm_layers.SEModule(C, act_layer=nn.SiLU, rd_ratio=0.25), 2, ChannelGate),
    "timm SEModule, norm": (lambda: timm_layers.SEModule(C, norm_layer=nn.BatchNorm2d), 2, SplitGate),
    "timm SEModule, mish": (lambda: timm_layers.SEModule(C, act_layer=nn.Mish), 2, SplitGate),
    "timm SqueezeExcite": (lambda: efficientnet.SqueezeExcite(C), 2, ChannelGate),
    "timm SqueezeExcite, silu": (lambda: efficientnet.SqueezeExcite(C, act_layer=nn.SiLU), 2, ChannelGate),
    "timm SqueezeExcite, hard": (
        lambda: efficientnet.SqueezeExcite(C, gate_layer=nn.Hardsigmoid, force_act_layer=nn.ReLU),
        2,
        ChannelGate,
    ),
    "timm SqueezeExcite, prelu": (lambda: efficientnet.SqueezeExcite(C, act_layer=nn.PReLU), 2, SplitGate),
    "timm EffectiveSEModule": (lambda: timm_layers.EffectiveSEModule(C), 2, ChannelGate),
    "timm EffectiveSEModule, max": (lambda: timm_layers.EffectiveSEModule(C, add_maxpool=True), 2, ChannelGate),
    "timm EcaModule": (lambda: timm_layers.EcaModule(C), 2, ChannelGate),
    "timm EcaModule, k 5": (lambda: timm_layers.EcaModule(kernel_size=5), 2, ChannelGate),
    "timm EcaModule, mlp": (lambda: timm_layers.EcaModule(C, use_mlp=True), 2, SplitGate),
    "timm CecaModule": (lambda: timm_layers.CecaModule(C), 2, ChannelGate),
    "timm CecaModule, bias": (lambda: timm_layers.CecaModule(C, act_layer=nn.ReLU), 2, ChannelGate),
    "timm senet SEModule": (lambda: senet.SEModule(C, 4), 2, ChannelGate),
    "timm hgnet EseModule": (lambda: hgnet.EseModule(C), 2, ChannelGate),
    "torchvision": (lambda: tv_misc.SqueezeExcitation(C, 8), 2, ChannelGate),
    "torchvision, EfficientNet": (
        lambda: tv_misc.SqueezeExcitation(C, 8, activation=functools.partial(nn.SiLU, inplace=True)),
        2,
        ChannelGate,
    ),
    "torchvision, MobileNetV3": (
        lambda: tv_misc.SqueezeExcitation(C, 8, scale_activation=nn.Hardsigmoid),
        2,
        ChannelGate,
    ),
    "torchvision, softplus": (lambda: tv_misc.SqueezeExcitation(C, 8, activation=nn.Softplus), 2, SplitGate),
    "monai, 1-D": (lambda: monai_blocks.ChannelSELayer(1, C), 1, ChannelGate),
    "monai, 2-D": (lambda: monai_blocks.ChannelSELayer(2, C, r=4), 2, ChannelGate),
    "monai, 3-D": (lambda: monai_blocks.ChannelSELayer(3, C), 3, ChannelGate),
    "monai, residual": (lambda: monai_blocks.ResidualSELayer(2, C), 2, ChannelGate),
    "monai, residual 3-D": (lambda: monai_blocks.ResidualSELayer(3, C), 3, ChannelGate),
    "monai, prelu": (lambda: monai_blocks.ChannelSELayer(2, C, acti_type_1="prelu"), 2, SplitGate),
    "reference SE": (lambda: reference.SqueezeExcite(C, pool="avgmax"), 2, ChannelGate),
    "reference ESE": (lambda: reference.EffectiveSE(C), 2, ChannelGate),
    "reference ECA": (lambda: reference.ECA(C, padding="circular"), 1, ChannelGate),
}


def randomised(name: str) -> nn.Module:
    """The block with every parameter random: hosts start some at zero."""
    block = BLOCKS[name][0]()
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i, scale=parameter[0].numel() ** -0.5))
    return block


def functional_call(block: nn.Module):
    def function(x, **parameters):
        tensors = {k: b.clone().to(x.dtype if b.is_floating_point() else b.dtype) for k, b in block.named_buffers()}
        tensors |= {k.replace("/", "."): v for k, v in parameters.items()}
        return torch.func.functional_call(block, tensors, (x,))

    return function


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_same_function(name, dtype, layout, training):
    block = randomised(name).to(dtype).train(training)
    fused = fuse(copy.deepcopy(block))
    assert type(fused) is not type(block) and isinstance(fused, type(block))
    shape = (3, C, *(7, 9, 5)[: BLOCKS[name][1]])
    inputs = {"x": in_layout(random(*shape, dtype=dtype), layout)}
    inputs |= {k.replace(".", "/"): v.detach() for k, v in block.named_parameters()}
    grad = [random(*shape, seed=1, dtype=dtype)]
    assert_equivalent(functional_call(fused), functional_call(block), inputs, grad)


@pytest.mark.parametrize("name", BLOCKS)
def test_recognised_as_expected(name):
    block = BLOCKS[name][0]()
    assert isinstance(recognise(block), BLOCKS[name][2])
    (row,) = explain(fuse(block))
    assert row.fused and row.served_by in ("cpu", "reference") and row.block and "\n" not in str(row.block)


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_it_owns_changes(name):
    block = BLOCKS[name][0]()
    block.register_forward_hook(lambda *_: None)
    before = {key: id(value) for key, value in block.__dict__.items()}
    tensors = {key: value.data_ptr() for key, value in block.state_dict().items()}
    cls = type(block)
    fuse(block)
    assert list(block.state_dict()) == list(tensors)
    assert {key: value.data_ptr() for key, value in block.state_dict().items()} == tensors
    unfuse(block)
    assert type(block) is cls
    assert {key: id(value) for key, value in block.__dict__.items()} == before


@pytest.mark.parametrize("name", ["timm SEModule, norm"])
def test_running_statistics_of_a_split_block_move_as_they_did(name):
    block = randomised(name)
    fused = fuse(copy.deepcopy(block))
    x = random(4, C, 7, 7)
    block(x), fused(x)
    torch.testing.assert_close(fused.bn.running_mean, block.bn.running_mean)
    assert fused.bn.num_batches_tracked == block.bn.num_batches_tracked == 1


def test_another_rank_goes_to_the_original():
    block = randomised("timm SEModule")
    fused = fuse(copy.deepcopy(block))
    x = random(2, C, 3, 4, 5)
    with pytest.raises(RuntimeError) as original:
        block(x)
    with pytest.raises(RuntimeError) as ours:
        fused(x)
    assert str(ours.value) == str(original.value)


def test_channels_last_excitation_is_left_alone():
    block = timm_layers.squeeze_excite.SqueezeExciteCl(C)
    (row,) = explain(fuse(block))
    assert not row.fused and "(B, H, W, C)" in row.reason


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "pool"), [("torchvision, softplus", "avgpool"), ("monai, prelu", "avg_pool")])
def test_a_hook_on_the_pool_of_a_split_block_runs(name, pool, when):
    block = randomised(name)
    if when == "after":
        fuse(block)
    block.get_submodule(pool).register_forward_hook(lambda module, inputs, output: 5 * output)
    cls = type(block).__mro__[1] if when == "after" else type(block)
    fuse(block)
    x = random(2, C, 5, 5)
    assert torch.equal(block(x), cls.forward(block, x))
    assert not explain(block)[0].fused


def test_a_bias_set_after_fusing_counts():
    block = fuse(timm_layers.SEModule(C, bias=False))
    x = random(2, C, 5, 5)
    block.fc2.bias = nn.Parameter(torch.full((C,), 2.0))
    torch.testing.assert_close(block(x), timm_layers.SEModule.forward(block, x))


def test_a_map_given_by_keyword():
    block = tv_misc.SqueezeExcitation(C, 8)
    x = random(2, C, 5, 5)
    assert torch.equal(fuse(block)(input=x), tv_misc.SqueezeExcitation.forward(block, x))
