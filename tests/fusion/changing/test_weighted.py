"""Squeeze-and-excitation over sequences, whose mean is weighted by lengths or a mask."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fused_attn import explain, fuse, unfuse
from fused_attn.backends import _Small
from fused_attn.fusion.changing import weighted
from tests.checks import LAYOUTS, in_layout, random, randomised, results
from tests.fusion.changing.pasted_sequences import C, Counts, Masked, NoGate, Prints, Shares
from tests.fusion.counting import FusedOperators

SHARES, COUNTS = torch.tensor([1.0, 0.43, 0.7]), torch.tensor([19, 4, 11])
MASK = torch.arange(35).remainder(3).view(1, 1, 7, 5).ne(0).expand(3, 1, 7, 5)
#: What makes a block, the shape of its map, what it is given beside it, whether it may be left out, and its name.
FOUND = {
    "shares": (Shares, (3, C, 19), SHARES, True, "SqueezeExcite(12 -> 4, relu, sigmoid)"),
    "counts": (Counts, (3, C, 19), COUNTS, False, "squeeze with weights as it is written, scale"),
    "mask": (Masked, (3, C, 7, 5), MASK, False, "squeeze with weights as it is written, scale"),
}


def both(name, dtype=torch.float64):
    make, shape, weights, *_ = FOUND[name]
    original = randomised(make()).to(dtype)
    weights = weights.to(dtype) if weights.is_floating_point() else weights
    return original, fuse(copy.deepcopy(original), strict=True), random(*shape, dtype=dtype), weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name, layout):
    original, fused, x, weights = both(name)
    (row,) = explain(fused)
    assert row.fused and row.block == FOUND[name][-1]
    x = in_layout(x, layout)
    for training in (True, False):
        for given in ((weights,), (None,), ()) if FOUND[name][3] else ((weights,),):
            with FusedOperators() as ran:
                mine = results(fused, x, *given, training=training)
            assert ran.count
            theirs = results(original, x, *given, training=training)
            assert mine[0].stride() == theirs[0].stride()
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert [*fused.state_dict()] == [*original.state_dict()]
    assert type(unfuse(fused)) is type(original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_other_dtypes_and_autocast(name, dtype):
    original, fused, x, weights = both(name, dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mine, theirs = fused(x, weights), original(x, weights)
        assert mine.dtype == theirs.dtype
        tolerance = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_it_is_told_what_is_fused():
    _, fused, x, _ = both("shares")
    (row,) = explain(fused)
    assert row.reason.endswith("; squeezed as it is written where lengths is not the default")
    _, fused, x, _ = both("counts")
    (row,) = explain(fused)
    assert row.reason.endswith("; as it is written without length")
    with pytest.raises(AttributeError):
        fused(x)


def test_by_keyword_copies_pickles_and_compiles():
    torch._dynamo.reset()
    for name in ("shares", "counts"):
        original, fused, x, weights = both(name)
        original.eval(), fused.eval()
        expected = original(x, weights)
        key = "lengths" if name == "shares" else "length"
        compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
        for block in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), compiled):
            torch.testing.assert_close(block(x, weights), expected)
            torch.testing.assert_close(block(x, **{key: weights}), expected)
        with pytest.raises(TypeError):
            fused(x, weights, weights)


def test_what_is_changed_since_counts():
    for name in ("shares", "counts"):
        original, fused, x, weights = both(name)
        for block in (original, fused):
            layer = block.up if name == "shares" else block.se[3]
            layer.register_forward_hook(lambda layer, given, y: 2 * y)
            block.eval()
        torch.testing.assert_close(fused(x, weights), original(x, weights))


def test_small_maps_run_as_they_are_written(monkeypatch):
    monkeypatch.setattr(_Small, "most", 1 << 14)
    fused = fuse(randomised(Shares()).float())
    for length, runs in ((40, False), (70_000, True)):
        with FusedOperators() as ran:
            fused(random(3, C, length), SHARES)
        assert (ran.count > 0) is runs


@pytest.mark.parametrize("cls", [NoGate, Prints])
def test_is_left_alone(cls, capsys):
    block = fuse(cls())
    assert type(block) is cls and not any(row.fused for row in explain(block))
    if cls is Prints:
        assert [row.reason for row in explain(block)] == ["prints"]
    assert capsys.readouterr().out == ""


def test_a_source_that_is_not_what_runs(tmp_path):
    """As of a file that was edited since it was imported, and of what has none."""
    file, space = tmp_path / "edited.py", {}
    source = "def f(x, y):\n    return x * y - 1\n"
    exec(compile(source, str(file), "exec"), space)
    assert weighted.with_products(space["f"], max) is None
    file.write_text(source.replace("1", "2"))
    assert weighted.with_products(space["f"], max) is None
    file.write_text(f"z = 2\n{source}")
    assert weighted.with_products(space["f"], max) is None
    file.write_text(source)
    assert weighted.with_products(space["f"], max)(3, 5) == 4


def test_closures_defaults_and_super():
    class Base:
        def run(self, x):
            return x + 1

    two = 2

    class Derived(Base):
        def run(self, x, y=3, *, z=4):
            return super().run(x) * two + sum(i * y for i in (1, z))

    found = weighted.with_products(Derived.run, lambda a, b: 100 * a * b)
    assert found(Derived(), 1) == 100 * 2 * 2 + 100 * (3 + 12) and Derived().run(1) == 4 + 15
