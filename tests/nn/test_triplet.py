"""Triplet attention against the authors' formula, which permutes the map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.backends import choose
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)


class Gate(nn.Module):
    def __init__(self, k, ties):
        super().__init__()
        self.maximum = (lambda x: x.amax(1)) if ties == "even" else (lambda x: x.max(1)[0])
        self.conv = nn.Sequential(nn.Conv2d(2, 1, k, padding=k // 2, bias=False), nn.BatchNorm2d(1, momentum=0.01))

    def forward(self, x):
        z = torch.stack([self.maximum(x), x.mean(1)], 1)
        return x * self.conv(z).sigmoid()


class Original(nn.Module):
    """Three rotations of the map, each gated and turned back, and their mean."""

    def __init__(self, k=7, no_spatial=False, ties="first"):
        super().__init__()
        self.over_height, self.over_width = Gate(k, ties), Gate(k, ties)
        self.over_channels = None if no_spatial else Gate(k, ties)

    def forward(self, x):
        outputs = [
            self.over_height(x.transpose(1, 2).contiguous()).transpose(1, 2),
            self.over_width(x.transpose(1, 3).contiguous()).transpose(1, 3),
        ]
        if self.over_channels is not None:
            outputs.append(self.over_channels(x))
        return torch.stack(outputs).mean(0)


MODULES = {"fused": fused_nn, "reference": reference}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("values", ["distinct", "ties"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize(("k", "no_spatial"), [(7, False), (7, True), (3, False)])
def test_equals_the_original(k, no_spatial, ties, training, values, module):
    original = randomised(Original(k, no_spatial, ties))
    block = MODULES[module].TripletAttention(12, kernel_size=k, no_spatial=no_spatial, ties=ties).double()
    with_state_of(block, original)
    x = random(3, 12, 9, 7, dtype=torch.float64)
    assert_same_block(block, original, x.round() if values == "ties" else x, training=training)


@pytest.mark.parametrize("module", MODULES)
def test_the_defaults_are_the_authors(module):
    original = randomised(Original())
    block = with_state_of(MODULES[module].TripletAttention(12).double(), original)
    assert_same_block(block, original, random(3, 12, 9, 7, dtype=torch.float64).round(), training=True)


@pytest.mark.parametrize("source", ["landskape.TripletAttention", "landskape.MODELS.TripletAttention"])
def test_loads_the_authors_checkpoints(source):
    block, state = fused_nn.TripletAttention(64), checkpoint(source)
    nn.Sequential(block).load_state_dict({f"0.{k}": v for k, v in state.items()})
    order = ["cw", "hc", "hw"] if source == "landskape.TripletAttention" else ["ChannelGateH", "ChannelGateW"]
    for mine, theirs in zip(("cw", "hc"), order, strict=False):
        key = next(k for k in state if k.startswith(theirs) and k.endswith("conv.weight"))
        assert torch.equal(block.get_parameter(f"{mine}.conv.conv.weight"), state[key])
    shapes = checkpoint_shapes("landskape.TripletAttention")
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == shapes


class LargestCopy(TorchDispatchMode):
    """The kinds of operators that write something as large as the map."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.seen = elements, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not function.is_view and isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            self.seen.add(function._overloadpacket)
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_permuted_copy_of_the_map_is_made(layout):
    """Of all that is written, forward and backward, only y and grad_x are as large as the map."""
    x = in_layout(random(2, 32, 20, 24), layout)
    with torch.no_grad(), LargestCopy(x.numel()) as copies:
        reference.TripletAttention()(x)
    assert copies.seen == {torch.ops.aten.add, torch.ops.aten.mul}
    if choose("axis_pool", x) == "reference" or choose("mixed_scale", x) == "reference":
        pytest.skip("no native library on this machine: the fused block is the reference")
    block, leaf, grad = fused_nn.TripletAttention(), x.clone().requires_grad_(), torch.ones_like(x)
    with LargestCopy(x.numel()) as copies:
        block(leaf).backward(grad)
    ours = torch.ops.fused_attn
    assert copies.seen - {torch.ops.aten.detach} == {ours.mixed_scale, ours.axis_pool_backward}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    block = fused_nn.TripletAttention(16)
    original = reference.TripletAttention(16).double()
    original.load_state_dict(block.state_dict())
    x = in_layout(random(4, 16, 13, 17).mul(16).round().div(16).to(dtype), layout)  # the same maxima in every dtype
    assert_as_good_as_reference(original, block, x, training)


@pytest.mark.slow  # Inductor: about 5 s
@pytest.mark.parametrize(("training", "backend"), [(True, "aot_eager"), (False, "inductor")])
def test_compiles_in_one_graph(training, backend):
    torch._dynamo.reset()
    block = fused_nn.TripletAttention(6).double().train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=backend)
    assert_same_block(compiled, block, random(2, 6, 5, 7), training=training)


def test_one_position():
    block = fused_nn.TripletAttention(4)
    assert torch.isfinite(block(random(2, 4, 1, 1))).all()


ERRORS = {
    "channels: expected a positive integer; got True": lambda: fused_nn.TripletAttention(True),
    "kernel_size: expected an odd number; got 4": lambda: fused_nn.TripletAttention(kernel_size=4),
    "ties: expected one of first, even; got 'none'": lambda: fused_nn.TripletAttention(ties="none"),
    "x: expected 8 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.TripletAttention(8)(random(1, 4, 3, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.TripletAttention(8)
    block(random(2, 8, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
