"""Passes over the map, counted: every load and store that the interpreter makes, by the tensor it goes to."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, in_layout, random
from tests.ops.test_cbam import weights
from tests.ops.test_channel_gate import excitation, strided
from tests.ops.test_criss_cross import inputs_of
from tests.ops.test_mixed_scale import KINDS, gates_of
from tests.ops.test_select import affine_of, apply, excitation_of, maps
from tests.ops.test_select import weights as branch_weights
from tests.ops.test_spatial_gate import convolution

pytestmark = pytest.mark.slow  # 36 s in all

SHAPE = (2, 6, 20, 21)


class Traffic:
    """Launches with what they read and write of the arguments that are as large as the map, and of bits an element."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.launches: list[tuple[str, Counter]] = []
        self.arguments: list[dict] = []  # of each launch
        self.ranges: list[tuple[str, int, int, float]] = []

    def start(self, kernel: str, arguments: dict) -> None:
        ranges = set()
        for name, given in arguments.items():  # parts of one tensor have one storage
            for v in given if isinstance(given, tuple) else (given,):
                if isinstance(v, torch.Tensor) and (v.numel() == self.elements or v.dtype == torch.uint8):
                    storage, of_a_map = v.untyped_storage(), 1 / 4 if v.dtype == torch.uint8 else 1  # maps are float32
                    ranges.add((name, storage.data_ptr(), storage.data_ptr() + storage.nbytes(), of_a_map))
        self.ranges = sorted(ranges)
        self.launches.append((kernel, Counter()))
        self.arguments.append(arguments)

    def count(self, what: str, addresses, mask) -> None:
        for name, begin, end, of_a_map in self.ranges:
            inside = (addresses >= begin) & (addresses < end) & mask
            if inside.any():
                self.launches[-1][1][f"{what} {name}"] += int(inside.sum()) * of_a_map

    def passes(self) -> list[tuple[str, dict[str, float]]]:
        return [(kernel, {k: n / self.elements for k, n in c.items()}) for kernel, c in self.launches]

    def total(self) -> float:
        return sum(sum(p.values()) for _, p in self.passes())


@pytest.fixture
def traffic(monkeypatch):
    reason = unavailable("triton", "channel_gate", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    from triton.runtime.interpreter import InterpreterBuilder

    from fused_attn.kernels import maps

    counted = Traffic(torch.Size(SHAPE).numel())
    launch, load, store = maps.launch, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_launch(kernel, on, programs, /, **arguments):
        counted.start(kernel.fn.__name__, arguments)
        launch(kernel, on, programs, **arguments)

    def counting_load(self, ptrs, mask, *rest):
        counted.count("read", ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        counted.count("write", ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(maps, "launch", counting_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    with fused_attn.backend("triton"):
        yield counted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["se", "ese", "eca", "none"])
@pytest.mark.parametrize("pool", ["avg", "max"])
def test_channel_gate(traffic, pool, kind, layout):
    """3 + 4 passes; 2 + 3 launches (two more each where the layers are apart from the map's programs)."""
    tensors, options = excitation(kind, SHAPE[1], torch.float32)
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    y = functional.channel_gate(x, **tensors, **options, pool=pool)
    forward = [("_pool", {"read x": 1}), ("_gate", {"read x": 1, "write y": 1})]
    is_apart = kind in ("se", "ese") and pool == "max"
    forward[1:1] = [("_first_layer", {}), ("_second_layer", {})] * is_apart
    assert traffic.passes() == forward
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    backward = [("_dot", {"read grad": 1, "read x": 1}), ("_spread", {"read grad": 1, "write grad_x": 1})]
    backward[1:1] = [("_second_layer_backward", {}), ("_first_layer_backward", {})] * is_apart
    if kind != "none":
        backward.append(("_parameters", {}))
    assert traffic.passes() == backward


def test_small_maps(traffic):
    """Their rows begin at any address; what is read and written is each element once, and by whole vectors."""
    shape = (2, 24, 7, 7)
    traffic.elements = torch.Size(shape).numel()
    tensors, options = excitation("eca", shape[1], torch.float32)
    x = random(*shape).requires_grad_()
    y = functional.channel_gate(x, **tensors, **options, pool="avgmax")
    assert traffic.arguments[0]["BLOCK_C"] * 49 <= traffic.arguments[0]["BLOCK_S"]
    assert traffic.passes() == [("_pool", {"read x": 1}), ("_gate", {"read x": 1, "write y": 1})]
    traffic.launches.clear()
    y.backward(random(*shape, seed=1))
    assert traffic.total() == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gate_with_residual_and_relu(traffic, layout):
    """The tail of an SE-ResNet: 4 passes forward and 6 backward, each with one bit an element."""
    x, residual = (in_layout(random(*SHAPE, seed=i), layout).requires_grad_() for i in range(2))
    options = {"excitation": torch.sigmoid, "residual": residual, "post_activation": "relu"}
    y = functional.norm_gate(x, training=True, **options)
    forward = [kernel for kernel, _ in traffic.passes()]
    assert forward == ["_moments", "_finish_moments", "_norm_coefficients", "_norm_scale"]
    bits = 53 / 420 / 4 if layout == "nchw" else 1 / 6 / 4  # 420 positions, or 6 channels, in whole bytes
    scale = {"read x": 1, "read residual": 1, "write y": 1, "write bits": bits}
    assert traffic.passes()[2:] == [("_norm_coefficients", {}), ("_norm_scale", pytest.approx(scale))]
    assert 4 <= traffic.total() - bits < 4.02  # each channel's first element is read by itself, too
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=2), layout))
    (dots, counted), factors, gradients = traffic.passes()
    assert dots == "_norm_dots"
    assert counted == pytest.approx({"read grad": 1, "read x": 1, "read bits": bits, "write grad_residual": 1})
    assert factors == ("_norm_factors", {})
    assert gradients == ("_norm_gradients", {"read grad": 1, "read x": 1, "write grad_x": 1})
    traffic.launches.clear()
    with torch.no_grad():
        functional.norm_gate(x, training=True, **options)
    assert traffic.passes()[3] == ("_norm_scale", {"read x": 1, "read residual": 1, "write y": 1})


def test_norm_gate_of_small_maps(traffic):
    """As of larger ones, in half precision; and one launch less."""
    shape = (2, 24, 7, 7)
    traffic.elements = torch.Size(shape).numel()
    x, residual = (random(*shape, seed=i, dtype=torch.bfloat16).requires_grad_() for i in range(2))
    y = functional.norm_gate(x, training=True, excitation=torch.sigmoid, residual=residual, post_activation="relu")
    (moments, counted), coefficients, (scale, of_scale) = traffic.passes()
    assert (moments, coefficients, scale) == ("_moments", ("_norm_coefficients", {}), "_norm_scale")
    assert counted == pytest.approx({"read x": 1 + 1 / 49})
    bits = 7 / 49 / 4  # seven bytes a channel
    whole = {"read x": 1, "read residual": 1, "write y": 1, "write bits": bits}
    assert of_scale == pytest.approx(whole)
    traffic.launches.clear()
    y.backward(random(*shape, seed=2, dtype=torch.bfloat16))
    (dots, counted), factors, gradients = traffic.passes()
    assert dots == "_norm_dots" and factors == ("_norm_factors", {})
    assert counted == pytest.approx({"read grad": 1, "read x": 1, "read bits": bits, "write grad_residual": 1})
    assert gradients == ("_norm_gradients", {"read grad": 1, "read x": 1, "write grad_x": 1})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gate_with_an_activation_before(traffic, layout):
    """The middle of an EfficientNet: 4 passes forward, 5 backward."""
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    y = functional.norm_gate(x, training=True, activation="silu", excitation=torch.sigmoid)
    assert 4 <= traffic.total() < 4.02
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=2), layout))
    assert traffic.total() == 5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_residual_and_relu(traffic, layout):
    """4 + 6 passes."""
    tensors, options = excitation("se", SHAPE[1], torch.float32)
    x, residual = (in_layout(random(*SHAPE, seed=i), layout).requires_grad_() for i in range(2))
    y = functional.channel_gate(x, **tensors, **options, residual=residual, post_activation="relu")
    assert traffic.passes()[1] == ("_gate", {"read x": 1, "read residual": 1, "write y": 1})
    assert traffic.total() == 4
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=2), layout))
    dot = {"read grad": 1, "read x": 1, "read y": 1, "write grad_residual": 1}
    assert traffic.passes()[:2] == [("_dot", dot), ("_spread", {"read grad": 1, "write grad_x": 1})]
    assert traffic.total() == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_prologue(traffic, layout):
    """The prologue is recomputed, never written: 3 + 5 passes."""
    tensors, options = excitation("se", SHAPE[1], torch.float32)
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    affine = random(SHAPE[1], seed=3).requires_grad_(), random(SHAPE[1], seed=4).requires_grad_()
    y = functional.channel_gate(x, **tensors, **options, affine=affine, pre_activation="silu")
    assert traffic.total() == 3
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=2), layout))
    assert traffic.total() == 5
    assert len(traffic.launches) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_squeeze_and_scale(traffic, layout):
    """squeeze 1 + 1 passes, also for both pools at once; scale 2 + 3."""
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    gate = random(*SHAPE[:2], seed=1).requires_grad_()
    avg, peak = functional.squeeze(x, "avgmax")
    assert traffic.total() == 1
    traffic.launches.clear()
    (avg + peak).backward(random(*SHAPE[:2]))
    assert traffic.passes() == [("_squeeze_backward", {"write grad_x": 1})]
    traffic.launches.clear()
    y = functional.scale(x, gate)
    assert traffic.passes() == [("_scale", {"read x": 1, "write y": 1})]
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=2), layout))
    assert traffic.passes() == [("_scale_backward", {"read grad": 1, "read x": 1, "write grad_x": 1})]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_simam(traffic, layout):
    """3 + 5 passes in 2 + 2 launches; eager makes some 55. Forward also reads the first element of each channel."""
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    y = functional.simam(x)
    names, counts = zip(*traffic.passes(), strict=True)
    assert names == ("_moments", "_simam")
    assert counts[0] == pytest.approx({"read x": 1}, abs=0.02)
    assert counts[1] == pytest.approx({"read x": 1, "write y": 1}, abs=0.02)
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    reads = {"read grad": 1, "read x": 1}
    assert traffic.passes() == [("_simam_dots", reads), ("_simam_spread", {**reads, "write grad_x": 1})]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_pool(traffic, layout):
    """1 + 3 passes in 2 + 1 launches, the read of the map's own gradient among them."""
    x, weight = in_layout(random(*SHAPE), layout).requires_grad_(), random(1, SHAPE[1]).requires_grad_()
    y, context = functional.context_pool_with_map(x, weight)
    assert traffic.passes() == [("_context", {"read x": 1}), ("_join", {})]
    traffic.launches.clear()
    torch.autograd.backward([y, context], [in_layout(random(*SHAPE, seed=1), layout), random(*SHAPE[:2], seed=2)])
    assert traffic.passes() == [("_context_spread", {"read grad": 1, "read x": 1, "write grad_x": 1})]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_gate(traffic, layout):
    """3 + 5 passes; eager makes 20."""
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    y = functional.context_gate(x, random(1, SHAPE[1]), None, torch.sigmoid)
    assert traffic.passes() == [("_context", {"read x": 1}), ("_join", {}), ("_scale", {"read x": 1, "write y": 1})]
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    (dot, reads), spread = (p for p in traffic.passes() if p[0] != "_finish")
    assert dot == "_dot_branches" and sum(reads.values()) == 2
    assert spread == ("_context_spread", {"read grad": 1, "read x": 1, "write grad_x": 1})


def context_added(x):
    y, context = functional.context_pool_with_map(x, random(1, SHAPE[1]))
    return y + context[:, :, None, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_criss_cross_attention(traffic, layout):
    """8 passes forward, and what query, key and value of NCHW are copied in before: lines are one block here. Backward
    each of the three gradients has programs that read for themselves what they need. Nothing is as large as weights."""

    def passes():
        """What is summed by columns has a name more where it lies in the result itself."""
        return [(kernel, {k.replace("sums", "out"): n for k, n in c.items()}) for kernel, c in traffic.passes()]

    inputs = {k: v.requires_grad_() for k, v in inputs_of(SHAPE, SHAPE[1], layout).items()}
    y = functional.criss_cross_attention(**inputs)
    reads = dict.fromkeys(("read query", "read key", "read value"), 1)
    assert passes() == [("_cross", {**reads, "write out": 1}), ("_cross", {**reads, "read out": 1, "write out": 1})]
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    dots, *lines = traffic.passes()
    assert dots == ("_cross_dots", {"read grad": 1, "read out": 1})
    for kernel, counted in lines:
        assert kernel == "_cross_backward"
        counts = [counted[k] for k in ("read query", "read key", "read grad", "read value")]
        assert counts == [3, 3, 3, 2]
        assert all(counted[f"write grad_{name}"] == 1 for name in inputs)
    tensors = [t for given in traffic.arguments for t in given.values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in tensors) == torch.Size(SHAPE).numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("combine", "names"), KINDS, ids=str)
def test_mixed_scale(traffic, combine, names, layout):
    """2 + 3 passes in 1 + 1 launches, all gates' gradients among them."""
    gates = {name: gate.requires_grad_() for name, gate in gates_of(SHAPE, names).items()}
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    y = functional.mixed_scale(x, **gates, combine=combine)
    assert traffic.passes() == [("_mixed_scale", {"read x": 1, "write y": 1})]
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    assert traffic.passes() == [("_mixed_scale_backward", {"read grad": 1, "read x": 1, "write grad_x": 1})]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [False, True])
def test_spatial_gate(traffic, norm, layout):
    """3 + 4 passes in 3 + 4 launches; a BatchNorm adds launches on one number a position, no pass."""
    tensors = {k: v.requires_grad_() for k, v in convolution(SHAPE, torch.float32).items()}
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    batch_norm = (torch.ones(1), torch.zeros(1), 1e-5) if norm else None
    y = functional.spatial_gate(x, **tensors, batch_norm=batch_norm)
    y = y[0] if norm else y
    pool, scale = ("_channel_pool", {"read x": 1}), ("_scale_space", {"read x": 1, "write y": 1})
    assert traffic.passes() == [pool, ("convolve", {}), scale]
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    dot = ("_dot_channels", {"read grad": 1, "read x": 1})
    spread = ("_spread_space", {"read grad": 1, "write grad_x": 1})
    middle = [("logit_gradients", {})] * norm + [("convolve_backward", {})]
    assert traffic.passes() == [dot, *middle, spread, ("convolution_parameters", {})]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("pool", "norm"), [("avg", False), ("both", False), ("both", True)])
def test_cbam(traffic, pool, norm, layout):
    """4 + 6 passes in 4 + 6 launches (two more each where the layers are apart from the map's programs)."""
    tensors, options = weights("se", SHAPE, torch.float32)
    tensors = {k: v.requires_grad_() for k, v in tensors.items()}
    x = in_layout(random(*SHAPE), layout).requires_grad_()
    batch_norm = (torch.ones(1), torch.zeros(1), 1e-5) if norm else None
    y = functional.cbam(x, **tensors, **options, pool=pool, batch_norm=batch_norm)
    y = y[0] if norm else y
    is_apart = pool == "both"
    kernels = ["_pool", *["_first_layer", "_second_layer"] * is_apart, "_excite_and_pool", "convolve", "_scale_both"]
    assert [kernel for kernel, _ in traffic.passes()] == kernels
    assert traffic.total() == 4
    traffic.launches.clear()
    y.backward(in_layout(random(*SHAPE, seed=1), layout))
    middle = [("logit_gradients", 0)] * norm + [("convolve_backward", 0)]
    dots = [("_dot_channels_gated", 2), *middle, ("_dot_space", 2)]
    rest = [("_spread_both", 2), ("_parameters", 0), ("convolution_parameters", 0)]
    dots += [("_second_layer_backward", 0), ("_first_layer_backward", 0)] * is_apart
    assert [(kernel, sum(p.values())) for kernel, p in traffic.passes()] == dots + rest


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("form", "paths", "affine"),
    [("separate", 2, False), ("separate", 3, True), ("stacked", 2, True), ("joined", 2, False)],
)
def test_select(traffic, form, paths, affine, layout):
    """2 M + 1 passes and 2 M + 2 (3 M + 2 after a prologue, which is never written) in 2 + 3 launches, whatever way the
    branches lie; in two phases a launch more each where space is split among programs."""
    inputs = maps(SHAPE, paths, form, layout) | branch_weights(SHAPE[1], paths)
    inputs |= affine_of(SHAPE[1], paths) if affine else {}
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    options = {"paths": paths if form == "joined" else None, "pre_activation": "relu" if affine else "identity"}
    y = apply(functional.select, **options)(**leaves)
    read, written = {"read branches": paths}, {"write y": 1}
    assert traffic.passes() == [("_pool_branches", read), ("_select", read | written)]
    traffic.launches.clear()
    grad = in_layout(random(*SHAPE, seed=1), layout)
    y.backward(grad)
    dot = ("_dot_branches", {"read grad": 1, **read})
    spread = {"read grad": 1, **(read if affine else {}), "write grads": paths}
    assert traffic.passes() == [dot, ("_select_spread", spread), ("_select_parameters", {})]
    traffic.launches.clear()
    phases = {k: v for k, v in leaves.items() if not k.startswith(("weight", "bias"))}
    block = excitation_of(SHAPE[1], paths)
    y = apply(functional.select_with, **options, excitation=block)(**phases)
    forward = [("_pool_branches", read), ("_sum_branches", read | written)]
    assert [p for p in traffic.passes() if p[0] != "_finish"] == forward
    traffic.launches.clear()
    y.backward(grad)
    assert traffic.passes() == [dot, ("_spread_branches", spread)]


def test_select_of_small_maps(traffic):
    """As many passes; the excitation's layers have launches of their own."""
    shape = (2, 24, 7, 7)
    traffic.elements = torch.Size(shape).numel()
    inputs = maps(shape, 2, "separate", "nchw") | branch_weights(shape[1], 2)
    y = apply(functional.select)(**{k: v.requires_grad_() for k, v in inputs.items()})
    assert traffic.arguments[0]["BLOCK_C"] * 49 <= traffic.arguments[0]["BLOCK_S"]
    read = {"read branches": 2}
    layers = [("_first_layer", {}), ("_branch_weights", {})]
    assert traffic.passes() == [("_pool_branches", read), *layers, ("_sum_branches", read | {"write y": 1})]
    traffic.launches.clear()
    y.backward(random(*shape, seed=1))
    dots = ("_dot_branches", {"read grad": 1, **read})
    layers = [("_branch_weights_backward", {}), ("_mean_backward", {})]
    spread = ("_spread_branches", {"read grad": 1, "write grads": 2})
    assert traffic.passes() == [dots, *layers, spread, ("_select_parameters", {})]


#: Ops, with the passes that read the gradient; axis_pool's kernel takes no strides.
READERS = {
    "channel_gate": (functional.channel_gate, 2),
    "scale": (lambda x: functional.scale(x, random(*SHAPE[:2])), 1),
    "scale by position": (lambda x: functional.scale(x, random(SHAPE[0], 1, *SHAPE[2:])), 2),
    "simam": (functional.simam, 2),
    "context_pool": (context_added, 1),
    "norm_gate": (lambda x: functional.norm_gate(x, training=True, excitation=torch.sigmoid), 2),
    "mixed_scale": (lambda x: functional.mixed_scale(x, **gates_of(SHAPE, ("rows", "columns"))), 1),
    "spatial_gate": (lambda x: functional.spatial_gate(x, **convolution(SHAPE, torch.float32)), 2),
    "cbam": (lambda x: functional.cbam(x, **weights("se", SHAPE, torch.float32)[0]), 3),
    "select": (lambda x: functional.select([x, x], **branch_weights(SHAPE[1], 2)), 2),
}


@pytest.mark.parametrize("strides", ["channels_last", "sliced", "expanded over the batch"])
@pytest.mark.parametrize("op", READERS)
def test_a_gradient_of_other_strides_is_read_where_it_lies(traffic, op, strides):
    """Neither a kernel nor PyTorch copies it, also not before the launch."""
    function, times = READERS[op]
    y = function(random(*SHAPE).requires_grad_())
    traffic.arguments.clear()
    grad = strided(random(*SHAPE, seed=1))[strides]
    y.backward(grad)
    reads = [given for given in traffic.arguments if given.get("grad") is not None]
    assert len(reads) == times
    for given in reads:
        assert given["grad"].data_ptr() == grad.data_ptr() and given["grad"].stride() == grad.stride()
        assert [given[f"stride_{axis}"] for axis in "bcs"] == [grad.stride(i) for i in (0, 1, 3)]
