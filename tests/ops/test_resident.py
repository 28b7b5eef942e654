"""Which samples the resident CUDA kernels hold, asked without a device; and that a call is refused before its forward
where its backward is not among them."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fused_attn
from fused_attn import backends, functional
from fused_attn.ops import common, resident
from fused_attn.ops.resident import Clusters, Limits
from tests.checks import in_layout

pytestmark = pytest.mark.skipif(backends.LIBRARY_ERROR is not None, reason=str(backends.LIBRARY_ERROR))

KIB = 1024
#: Shared memory of a block and blocks of a cluster, by compute capability.
DEVICES = {
    "8.0": Limits(163 * KIB, 1),
    "8.6, 8.9": Limits(99 * KIB, 1),
    "9.0": Limits(227 * KIB, 16),
    "10.0": Limits(227 * KIB, 16),
    "12.0": Limits(99 * KIB, 8),
    "a part of a 9.0": Limits(227 * KIB, 4),
}
H100 = DEVICES["9.0"]

#: Channels -> sides of the square maps that attention blocks of published networks gate.
SIDES = {
    16: (56, 224), 24: (112,), 32: (112,), 40: (112,), 48: (56,), 64: (32, 56, 112), 72: (28, 56), 96: (14, 56),
    120: (14, 28, 56), 128: (16, 28, 56, 80, 112), 144: (14, 28, 56), 168: (56,), 192: (7, 14, 28, 56), 228: (28,),
    240: (14, 28), 256: (7, 8, 14, 28, 40, 56), 288: (7, 14, 28), 366: (14,), 384: (28, 56), 448: (28,), 480: (14,),
    512: (4, 7, 14, 20, 28, 96, 97), 528: (7,), 570: (14,), 672: (7, 14), 702: (14,), 768: (7, 14, 28), 906: (7,),
    960: (7, 14), 1024: (7, 14), 1104: (7,), 1392: (7,), 1536: (7, 14), 2016: (7,), 2048: (7, 14), 2560: (7,),
}  # fmt: skip
SHAPES = [(channels, side, side) for channels, sides in SIDES.items() for side in sides]
SHAPES += [(32, 96, 96, 96), (64, 48, 48, 48), (128, 24, 24, 24), (256, 12, 12, 12), (64, 3000)]
OPS = ("channel_gate", "spatial_gate", "cbam", "select")


def arguments_of(op, shape, dtype=torch.float32, layout="nchw", *, affine=False, pool=0, post=0, pre=0, x=None):
    """Of an operator, as SE, CBAM and SK have them. x: stands for the maps, in place of tensors without values."""
    channels, rank = shape[0], len(shape) - 1
    device = "meta" if x is None else x.device
    if x is None:
        x = in_layout(torch.empty(2, *shape, dtype=dtype, device=device), layout)

    def weight(*size):
        return torch.empty(size, dtype=dtype, device=device)

    hidden = max(channels // 16, 1)
    dense = weight(hidden, channels), weight(hidden), weight(channels, hidden), weight(channels)
    if op == "select":
        ends = (weight(2, channels), weight(2, channels)) if affine else (None, None)
        return [x, x], weight(hidden, channels), None, weight(2 * channels, hidden), None, *ends, 2, 1, 1, 0, pre
    ends = *((weight(channels), weight(channels)) if affine else (None, None)), None
    kernel = weight(1, 2, *(7,) * rank), None
    if op == "channel_gate":
        return x, *dense, *ends, 0, pool, 0, 1, 6, pre, post
    if op == "spatial_gate":
        return x, *kernel, None, None, *ends, 1e-5, 0, 0, 6, pre, post
    return x, *dense, *kernel, None, None, *ends, 1e-5, 0, 3, 0, 1, 6, 0, 0, 6, pre, post


def clusters_of(op, limits, *arguments, **options):
    return resident.clusters(op, limits, *arguments_of(op, *arguments, **options))


def module_of(op):
    return importlib.import_module(f"fused_attn.ops.{op}")  # the package has functions of these names


BF16 = torch.bfloat16
# The smallest clusters of 9.0, forward and backward, of samples in bfloat16: (NCHW, channels_last).
HELD = {
    "channel_gate": {
        (256, 56): ((8, 16), (8, 16)),
        (512, 28): ((4, 8), (4, 8)),
        (1024, 14): ((2, 4), (2, 4)),
        # partial sums of 2048 channels take the room that the last KiB of the sample needs
        (2048, 7): ((1, 2), (2, 4)),
    },
    "spatial_gate": {
        (256, 56): ((16, 16), (8, 16)),
        (512, 28): ((4, 8), (4, 8)),
        (1024, 14): ((2, 4), (2, 4)),
        (2048, 7): ((1, 2), (1, 2)),
        (64, 112): ((0, 0), (16, 0)),
    },
    "cbam": {
        (256, 56): ((16, 16), (16, 16)),
        (512, 28): ((4, 8), (8, 8)),
        (1024, 14): ((4, 4), (4, 8)),
        (2048, 7): ((2, 4), (2, 4)),
        (64, 112): ((0, 0), (16, 0)),
    },
    "select": {
        (64, 56): ((4, 8), (4, 8)),
        (128, 56): ((8, 16), (8, 16)),
        (256, 28): ((4, 8), (4, 8)),
        (512, 14): ((2, 4), (2, 4)),
        (1024, 7): ((1, 2), (1, 2)),
    },
}


@pytest.mark.parametrize("op", OPS)
def test_what_a_cluster_holds(op):
    for (channels, side), expected in HELD[op].items():
        for layout, clusters in zip(("nchw", "channels_last"), expected, strict=True):
            assert clusters_of(op, H100, (channels, side, side), BF16, layout) == clusters


def test_what_a_cluster_holds_elsewhere():
    def ask(op, device, *shape, dtype=BF16, **options):
        return clusters_of(op, DEVICES[device], shape, dtype, **options)

    assert ask("channel_gate", "8.0", 480, 14, 14).forward == 0 and ask("channel_gate", "9.0", 480, 14, 14).forward == 1
    assert ask("channel_gate", "8.0", 256, 14, 14).forward == 1
    assert ask("channel_gate", "12.0", 256, 56, 56) == (0, 0)
    assert ask("spatial_gate", "8.0", 256, 14, 14) == ask("cbam", "8.0", 256, 14, 14) == (1, 0)
    assert ask("select", "8.0", 512, 7, 7) == (1, 1)
    assert ask("select", "8.0", 512, 7, 7, layout="channels_last") == (1, 0)
    assert ask("select", "9.0", 1024, 7, 7, affine=True) == (1, 2)
    assert ask("select", "9.0", 1024, 7, 7, affine=True, layout="channels_last") == (2, 2)  # tables of all channels
    assert ask("select", "8.0", 512, 14, 14) == (0, 0)
    assert ask("channel_gate", "a part of a 9.0", 512, 28, 28) == (4, 0)


@pytest.mark.parametrize("shape", [(256, 56, 56), (64, 112, 112)])
def test_forward_alone_fits_in_float32(shape):
    assert clusters_of("channel_gate", H100, shape) == (16, 0)


@pytest.mark.parametrize("op", OPS)
def test_no_shape_or_option_is_answered_by_chance(op):
    """A larger cluster or block holds no less; the backward needs no less than the forward."""
    options = [{}, {"affine": True, "pre": 1}] if op == "select" else [{}, {"affine": True}, {"post": 2}]
    held = 0
    for shape, dtype, layout, given in itertools.product(
        SHAPES, (torch.float64, torch.float32, BF16), ("nchw", "channels_last"), options
    ):
        arguments = arguments_of(op, shape, dtype, layout, **given)
        found = {name: resident.clusters(op, limits, *arguments) for name, limits in DEVICES.items()}
        for forward, backward in found.values():
            assert backward == 0 or backward >= forward > 0
            held += forward > 0
        assert found["9.0"] == found["10.0"]
        for smaller, larger in (("8.6, 8.9", "8.0"), ("8.0", "9.0"), ("12.0", "9.0"), ("a part of a 9.0", "9.0")):
            assert all(0 < b <= a for a, b in zip(found[smaller], found[larger], strict=True) if a)
    assert held > 100


def test_layouts_that_are_copied_count_as_what_they_become():
    sliced = torch.empty(2, 64, 56, 58, device="meta")[..., :56]
    arguments = arguments_of("channel_gate", (64, 56, 56), x=sliced)
    assert resident.clusters("channel_gate", H100, *arguments) == clusters_of("channel_gate", H100, (64, 56, 56))


def test_sizes_beyond_32_bits():
    for op in OPS:
        for shape in ((1 << 23, 1, 1), (1, 1 << 16, 1 << 16), (1, 1 << 29, 1), (1 << 21, 1 << 29, 1), (1, 1, 1 << 40)):
            assert clusters_of(op, H100, shape) == (0, 0)
    ask = torch.ops.fused_attn.resident_spatial_gate
    rest = 4, False, False, 0, 0, 0, 0, False, 0, 0, *H100
    assert ask(1, 1, 1, 9, 1, 1, 7, *rest) == (1, 1)
    for kernel in ((1, 1, 1 << 40), (1 << 32, 1 << 32, 1), (1, 181, 183), (1, 1, 0)):
        assert ask(1, 1, 1, 9, *kernel, *rest) == (0, 0)
    assert ask(1, 1, 900_000, 1, 1, 1, (1 << 15) - 1, *rest) == (0, 0)
    assert torch.ops.fused_attn.resident_select(64, 49, 2, False, 9, 32, False, 0, *H100) == (0, 0)


def test_statistics_of_the_batch_need_all_samples():
    for op, at in (("spatial_gate", 3), ("cbam", 7)):
        arguments = list(arguments_of(op, (64, 7, 7)))
        arguments[at] = torch.empty(1)
        assert resident.clusters(op, H100, *arguments) == (0, 0)


# ---- refusal ----


@pytest.fixture
def launches(monkeypatch):
    """The device of tensors without values is an H100: the names of the operators called on it."""
    monkeypatch.setattr(resident, "limits_at", lambda x: H100)
    for op in OPS:
        monkeypatch.setitem(backends.UNAVAILABLE, ("cuda", op, "meta"), None)
    called, below = [], common.below

    def counted(op, *arguments):
        called.append(op._name)
        return below(op, *arguments)

    for module in (common, *map(module_of, OPS)):
        monkeypatch.setattr(module, "below", counted)
    return called


REFUSED = "expected a sample that fits the shared memory of a cluster of at most 16 blocks of 227 KiB; got one of"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_what_does_not_fit_in_the_backward_is_refused_before_the_forward(op, layout, launches):
    refused = 0
    for shape, dtype in itertools.product(SHAPES, (torch.float32, BF16)):
        forward, backward = clusters_of(op, H100, shape, dtype, layout)
        if not forward:
            continue
        x = in_layout(torch.empty(2, *shape, dtype=dtype, device="meta"), layout).requires_grad_()
        arguments = arguments_of(op, shape, dtype, x=x)
        del launches[:]
        if backward:
            result = getattr(fused_attn.ops, op)("cuda", *arguments)
            y = result if isinstance(result, torch.Tensor) else result[0]
            assert torch.autograd.grad(y, x, torch.empty_like(y))[0].shape == x.shape
            assert launches == [f"fused_attn::{op}.cuda", f"fused_attn::{op}_backward.cuda"]
        else:
            refused += 1
            for call in (getattr(fused_attn.ops, op), getattr(torch.ops.fused_attn, op).cuda):
                given = arguments if call is not getattr(fused_attn.ops, op) else ("cuda", *arguments)
                with pytest.raises(RuntimeError, match=f"^{op}: {REFUSED}.* it does not fit in the backward"):
                    call(*given)
            assert launches == []
            with torch.no_grad():
                getattr(fused_attn.ops, op)("cuda", *arguments)
            assert launches == [f"fused_attn::{op}.cuda"]
    assert refused >= 2


def calls(x):
    """One of each function that has resident kernels."""
    c = x.shape[1]
    down, up = x.new_empty(c // 4, c), x.new_empty(c, c // 4)
    yield functional.channel_gate, (x, down, None, up)
    yield functional.spatial_gate, (x, x.new_empty(1, 2, 7, 7))
    yield functional.cbam, (x, down, None, up, None, x.new_empty(1, 2, 7, 7))
    yield functional.select, ([x, x], down, None, x.new_empty(2 * c, c // 4))


def test_a_backend_that_was_asked_for_is_refused(launches):
    """Of a gradient of the weights alone, too."""
    with fused_attn.backend("cuda"):
        x = torch.empty(2, 256, 56, 56, device="meta")
        for function, arguments in calls(x):
            function(*arguments)
        assert len(launches) == 4
        for function, arguments in calls(x):
            arguments[1].requires_grad_()
            with pytest.raises(RuntimeError, match="use the triton backend"):
                function(*arguments)
        assert len(launches) == 4
        for function, arguments in calls(torch.empty(2, 64, 28, 28, device="meta", requires_grad=True)):
            function(*arguments)


def test_a_sample_that_fits_nowhere_is_refused_likewise(launches):
    x = torch.empty(2, 256, 160, 160, device="meta", requires_grad=True)
    with fused_attn.backend("cuda"), pytest.raises(RuntimeError, match=r"\(256, 160, 160\).*: it does not fit; use"):
        functional.channel_gate(x)
    assert launches == []


def test_sizes_that_a_trace_leaves_open_are_not_asked(launches):
    """An answer would hold for one size only, and fix it."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC])
    x = mode.from_tensor(torch.empty(2, 256, 60, 56, device="meta"), symbolic_context=context)
    with mode:
        x, before = torch.empty_like(x, requires_grad=True), len(env.guards)
        fused_attn.ops.channel_gate("cuda", *arguments_of("channel_gate", (256, 60, 56), x=x))
    assert launches == ["fused_attn::channel_gate.cuda"]
    assert len(env.guards) == before


def test_a_batch_of_any_size_is_asked(launches):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 3])
    x = mode.from_tensor(torch.empty(2, 256, 56, 56, device="meta"), symbolic_context=context)
    with mode, pytest.raises(RuntimeError, match=REFUSED):
        x = torch.empty_like(x, requires_grad=True)
        fused_attn.ops.channel_gate("cuda", *arguments_of("channel_gate", (256, 56, 56), x=x))


def test_a_compiled_call_is_refused_when_it_is_traced(launches):
    """Once for all batches; a graph without gradients is not."""
    torch._dynamo.reset()
    compiled = torch.compile(functional.channel_gate, fullgraph=True, backend="aot_eager")
    with fused_attn.backend("cuda"):
        x = torch.empty(2, 256, 56, 56, device="meta")
        assert compiled(x).shape == x.shape
        with pytest.raises(Exception, match=REFUSED):
            compiled(x.requires_grad_())
        for batch in (2, 3, 5):
            x = torch.empty(batch, 256, 28, 28, device="meta", requires_grad=True)
            assert torch.autograd.grad(compiled(x).sum(), x)[0].shape == x.shape


def test_the_answers_say_what_a_call_needs():
    assert [Clusters(8, 16).fit(needed) for needed in (False, True)] == [True, True]
    assert [Clusters(16, 0).fit(needed) for needed in (False, True)] == [True, False]
    assert not Clusters(0, 0).fit(False)
