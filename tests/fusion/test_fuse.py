"""fuse, unfuse, explain and register: what changes, what does not, what is refused and why."""

from __future__ import annotations

import abc
import copy
import gc
import importlib
import io
import os
import pickle
import subprocess
import sys
import weakref
from typing import ClassVar, Generic, TypeVar

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn import explain, fuse, reference, unfuse
from fused_attn.fusion import ChannelGate, FusionError, SplitGate, api, register
from fused_attn.fusion.recipes.names import host_class
from tests.checks import random

Kind = TypeVar("Kind")


class SEBlock(nn.Module):
    """As pasted from a tutorial."""

    def __init__(self, channels=16, reduction=4):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        gate = self.fc(x.mean((2, 3)))
        return x * gate[:, :, None, None]


@register(SEBlock)
def _(block):
    if len(block.fc) != 4:
        return "its excitation has another depth"
    return ChannelGate("fc.0.weight", weight2="fc.2.weight")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.a = SEBlock()
        self.b = SEBlock()
        self.shared = self.a
        self.plain = reference.ECA(16)

    def forward(self, x):
        return self.plain(self.shared(self.b(self.a(self.conv(x)))))


X = random(2, 3, 9, 9)


def test_a_registered_block_is_fused():
    net = Net()
    expected = net(X)
    assert fuse(net) is net
    assert isinstance(net.a, SEBlock) and type(net.a) is not SEBlock and type(net.a).__name__ == "SEBlock"
    assert net.shared is net.a
    torch.testing.assert_close(net(X), expected)
    assert [row.name for row in explain(net)] == ["a", "b", "plain"]
    assert "3 of 3 blocks run fused" in str(explain(net))


def test_fusing_again_changes_nothing(monkeypatch):
    net = fuse(Net())
    classes, asked, decide = [type(m) for m in net.modules()], [], api.decide
    monkeypatch.setattr(api, "decide", lambda module, tails: (asked.append(module), decide(module, tails))[1])
    assert [type(m) for m in fuse(net).modules()] == classes
    assert net in asked and not [module for module in asked if host_class(module) is not None]


def test_unfuse_gives_back_the_original():
    net = nn.Sequential(nn.Sequential(Net()), reference.ECA(16))
    before = [(type(m), dict(m.__dict__)) for m in net.modules()]
    unfuse(fuse(net))
    assert [(type(m), dict(m.__dict__)) for m in net.modules()] == before
    assert unfuse(net) is net


def test_the_root_may_be_a_block():
    block = fuse(SEBlock())
    assert host_class(block) is SEBlock
    assert explain(block)[0].name == "(the model)"


def test_hooks_and_modes_stay():
    net = Net().eval()
    calls = []
    net.a.register_forward_hook(lambda *_: calls.append("a"))
    fuse(net)
    net(X)
    assert calls == ["a", "a"] and not net.a.training
    assert net.train().a.training


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_run_fused_too(how):
    net = fuse(Net())
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert str(explain(other)) == str(explain(net))
    assert other.a is other.shared and other.a.fc[0].weight is not net.a.fc[0].weight
    assert torch.equal(other(X), net(X))
    assert type(unfuse(other).a) is SEBlock


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    model = fuse(nn.Sequential(nn.Conv2d(3, 16, 3), reference.SqueezeExcite(16, reduction=4)))
    torch.save(model, tmp_path / "model.pt")
    torch.save(X, tmp_path / "x.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x = torch.load({str(tmp_path / "x.pt")!r})
import fused_attn
assert fused_attn.explain(model)[0].fused
torch.save(model(x), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(X), rtol=0, atol=0)


def test_beside_operators_that_the_caller_defined():
    """A torchvision whose library does not load beside this torch is given its schemas by one of us, not by both."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    if importlib.import_module("torchvision.extension")._has_ops():
        pytest.skip("this torchvision's library loads beside this torch, and defines its operators itself")
    code = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from fused_attn import fuse
from fused_attn.hosts import build_model
assert isinstance(fuse(build_model("torchvision:mobilenet_v3_small"), tails=True), torch.nn.Module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_of_the_original_loads_and_back():
    plain, net = Net(), fuse(Net())
    net.load_state_dict(plain.state_dict())
    assert list(net.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(net(X), plain(X))


def test_meta_models_fuse():
    with torch.device("meta"):
        net = fuse(Net())
    assert all(row.fused for row in explain(net))
    assert net(X.to("meta")).shape == (2, 16, 7, 7)


def refusal(block: nn.Module) -> str:
    (row,) = [row for row in explain(fuse(block)) if not row.fused]
    assert "\n" not in row.reason
    with pytest.raises(FusionError, match="blocks left alone"):
        fuse(block, strict=True)
    return row.reason


class OwnForward(SEBlock):
    def forward(self, x):
        return super().forward(x) + x


class OwnInit(SEBlock):
    def __init__(self):
        super().__init__(16, 2)


class OwnLayers(reference.SpatialAttention):
    def _layers(self):
        return super()._layers()


def test_subclasses():
    assert explain(fuse(OwnForward()))[0].block.endswith("in its forward")
    assert refusal(OwnLayers()) == "OwnLayers overrides _layers of SpatialAttention"  # what is private, too
    assert explain(fuse(OwnInit()))[0].fused


class AbstractFirst(abc.ABC, SEBlock):
    pass


class GenericFirst(Generic[Kind], SEBlock):
    pass


class WithSlots(SEBlock):
    __slots__ = ("extra",)


class WithSlotsThatKnowsItsOwn(SEBlock):
    __slots__ = ("extra",)
    derived: ClassVar[list] = []

    def __init_subclass__(cls):
        cls.derived.append(cls)


@pytest.mark.parametrize("cls", [AbstractFirst, GenericFirst, WithSlots])
def test_classes_whose_base_cannot_be_set_afterwards(cls):
    plain, x = cls(), random(2, 16, 5, 3)
    block = fuse(copy.deepcopy(plain))
    assert explain(block)[0].fused and isinstance(block, cls)
    for found in (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert explain(found)[0].fused
        torch.testing.assert_close(found(x), plain(x))
    assert type(unfuse(block)) is cls


def test_a_class_that_none_can_be_derived_from_says_why():
    block = fuse(WithSlotsThatKnowsItsOwn())
    (row,) = explain(block)
    assert not row.fused and row.reason.startswith("no class can be derived from its own: ")
    assert not block.derived


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooked_layers_are_refused(hook):
    block = SEBlock()
    getattr(block.fc[2], f"register_{hook}")(lambda *_: None)
    assert refusal(block).startswith("fc.2 carries a hook")


def test_a_replaced_forward_is_refused():
    block = SEBlock()
    block.forward = lambda x: x
    assert "replaced" in refusal(block)


def test_what_an_adapter_refuses_runs_its_own_excitation():
    block = SEBlock()
    block.fc.append(nn.Dropout())
    (row,) = explain(fuse(block, strict=True))
    assert row.block.startswith("squeeze, its own layers, scale")


def test_strict_changes_nothing_when_it_raises():
    net = Net()
    net.b.fc[0].register_forward_hook(lambda *_: None)
    with pytest.raises(FusionError, match="b: fc.0 carries a hook"):
        fuse(net, strict=True)
    assert type(net.a) is SEBlock


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(16, 1), nn.Linear(1, 4)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    @property
    def weight(self):
        return self.base.weight


#: And the layer that is then said to have changed.
CHANGES = {"lora": "fc.0", "hook": "fc.1", "activation": "fc.1", "forward": "fc.1", "parametrization": "fc.0"}
CHANGES |= {"added layer": "fc", "class in place": "fc.0"}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_made_after_fusing_count(change):
    block = fuse(SEBlock())
    x = random(2, 16, 5, 5)
    before = block(x)
    if change == "lora":
        block.fc[0] = LoRA(block.fc[0])
    elif change == "hook":
        block.fc[1].register_forward_hook(lambda module, inputs, output: output + 1)
    elif change == "activation":
        block.fc[1] = nn.Tanh()
    elif change == "forward":
        block.fc[1].forward = lambda x: x + 1
    elif change == "added layer":
        block.fc.append(nn.Tanh())
    elif change == "class in place":
        block.fc[0].__class__ = Rounding
    else:
        nn.utils.parametrizations.weight_norm(block.fc[0])
        block.fc[0].parametrizations.weight.original0.data.mul_(2)
    after = block(x)
    assert not torch.allclose(after, before)
    assert torch.equal(after, SEBlock.forward(block, x))
    row = explain(block)[0]
    assert not row.fused and row.reason == f"changed since fuse: {CHANGES[change]}"


class Rounding(nn.Linear):
    """As fake quantisation: a Linear whose weight is not what multiplies."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


@pytest.mark.parametrize("layer", [LoRA, lambda base: Rounding(16, 4, bias=False)], ids=["lora", "fake quantised"])
def test_a_swapped_layer_with_a_weight_is_run(layer):
    block = SEBlock()
    block.fc[0] = layer(block.fc[0])
    x = random(2, 16, 5, 5)
    expected = block(x)
    (row,) = explain(fuse(block, strict=True))
    assert row.block.startswith("squeeze, its own layers, scale")
    torch.testing.assert_close(block(x), expected)


def test_a_copy_of_a_changed_block_is_not_fused_again():
    block = fuse(SEBlock())
    block.fc[0] = LoRA(block.fc[0])
    x = random(2, 16, 5, 5)
    assert torch.equal(copy.deepcopy(block)(x), SEBlock.forward(block, x))


def test_options_changed_after_fusing_count():
    block = fuse(reference.SqueezeExcite(16, reduction=4))
    block.gate = "tanh"
    x = random(2, 16, 5, 5)
    assert torch.equal(block(x), reference.SqueezeExcite.forward(block, x))
    assert explain(block)[0].reason == "changed since fuse: gate"


class FunctionGate(nn.Module):
    """Known by what it computes; its gate is a function, not a layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.gate = torch.sigmoid

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3))))[:, :, None, None]


def test_a_function_set_after_fusing_counts():
    block = fuse(FunctionGate())
    assert host_class(block) is FunctionGate
    block.gate = torch.tanh
    x = random(2, 16, 5, 5)
    assert torch.equal(block(x), FunctionGate.forward(block, x))
    assert explain(block)[0].reason == "changed since fuse: gate"


def test_a_class_of_the_same_name_is_another_class():
    def make(factor):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(16, 16)

            def forward(self, x):
                return factor * x * self.fc(x.mean((2, 3))).sigmoid()[:, :, None, None]

        return Block

    known, other = make(1), make(7)
    register(known)(lambda block: ChannelGate("fc.weight", "fc.bias"))
    assert host_class(fuse(known())) is known
    assert [row.block for row in explain(fuse(other()))] == ["its own gate, scale in its forward"]


def test_a_dropped_block_frees_its_memory_at_once():
    block = fuse(SEBlock())
    weight = weakref.ref(block.fc[0].weight)
    gc.disable()
    try:
        del block
        assert weight() is None
    finally:
        gc.enable()


def test_a_fused_block_in_a_model_is_traced_by_fx_as_the_original():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), fuse(SEBlock()))
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(X), net(X))


def test_unfuse_of_a_class_that_others_have_derived():
    """As fully_shard and parametrisations do: that class stays, and runs what was written."""
    net = fuse(nn.Sequential(SEBlock(), SEBlock()))
    derived = type("FSDPBlock", (type(net[1]),), {})
    net[1].__class__ = derived
    unfuse(net)
    assert type(net[0]) is SEBlock and type(net[1]) is derived
    x = random(2, 16, 5, 5)
    assert torch.equal(net[1](x), SEBlock.forward(net[1], x)) and not explain(net)[1].fused


def test_weights_are_read_at_every_call():
    block = fuse(SEBlock())
    x = random(2, 16, 5, 5)
    before = block(x)
    block.fc[0].weight = nn.Parameter(torch.zeros_like(block.fc[0].weight))
    assert not torch.equal(block(x), before)
    torch.testing.assert_close(block(x), x / 2)


def test_a_block_without_a_known_class_is_not_mentioned():
    assert not explain(fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())))
    assert "no attention block" in str(explain(nn.ReLU()))


def test_split_blocks_register_too():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            return x * self.norm(x.mean((2, 3)))[:, :, None, None].sigmoid()

    @register(Odd)
    def _(block):
        return SplitGate(lambda block, descriptor: block.norm(descriptor).sigmoid())

    block, x = Odd(), random(2, 16, 5, 5)
    expected = block(x)
    torch.testing.assert_close(fuse(block)(x), expected)


@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match="model: expected an nn.Module; got str"):
        function("resnet50")


def test_register_checks_what_it_is_given():
    with pytest.raises(TypeError, match="register: expected nn.Module classes"):
        register(int)


def test_fused_modules_of_this_library_explain_themselves():
    (row,) = explain(fused_attn.nn.ECA(8))
    assert row.fused and row.block == "ECA"
    with fused_attn.backend("reference"):
        (row,) = explain(fused_attn.nn.ECA(8))
        assert (row.served_by, row.reason) == ("reference", "asked for")


def test_host_libraries_are_not_imported():
    code = """
import sys
from torch import nn
import fused_attn
fused_attn.fuse(nn.Sequential(nn.Conv2d(3, 3, 1)))
print(sorted({"timm", "torchvision", "monai"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_warmup_leaves_everything_as_it_is():
    net = fuse(nn.Sequential(Net(), nn.BatchNorm2d(16), nn.Dropout()))
    before = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()
    assert fused_attn.warmup(net, X) == 3
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not net[0].a._forward_pre_hooks
