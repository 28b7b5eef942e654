"""The files that keep verdicts: whose they are, who may write them, and what stands in them that should not."""

from __future__ import annotations

import json
import os
import threading
import time
import types
import warnings
from pathlib import Path
from statistics import fmean

import pytest
import torch

from fused_attn import backends, verdicts
from fused_attn.bench import blocks
from fused_attn.verdicts import Question, Shape, Verdict, cache_file, cached, class_of, keep, read_table, write_table

HERE = {
    "device": "a card",
    "multiprocessors": 132,
    "driver": "570.1",
    "torch": "2.13",
    "triton": "3.7",
    "kernels": "ab",
    "sources": "cd",
}
SHAPE = Shape("nchw", 8, 12, 22, True)
ROOT = Path(__file__).resolve().parents[2]


def question(op: str = "simam", **fields) -> Question:
    return Question(op, (1, "a", True), torch.bfloat16, (torch.float32, None), False)._replace(**fields)


def verdict(op: str = "simam", backend: str = "triton", **fields) -> Verdict:
    seconds = {"reference": {"device": 2e-5, "wall": 3e-5}, backend: {"device": 1e-5, "wall": 2e-5}}
    return Verdict(question(op), SHAPE, (800, 80), backend, backend, "2.00 times as fast", seconds)._replace(**fields)


def test_what_was_kept_is_found_again():
    found = [verdict(), verdict("cbam", "reference", why="wrong", seconds={}), verdict(shape=SHAPE._replace(bytes=23))]
    keep(HERE, found[:2])
    keep(HERE, found[2:])
    assert sorted(cached(HERE), key=str) == sorted(found, key=str)
    assert [path.suffix for path in cache_file(HERE).parent.iterdir()] == [".json"]  # nothing half written


def test_what_was_measured_first_stays():
    keep(HERE, [verdict()])
    keep(HERE, [verdict(backend="reference")])
    assert cached(HERE) == (verdict(),)


@pytest.mark.parametrize("field", HERE)
def test_another_environment_is_another_file(field):
    """Its verdicts are not read, and not written over."""
    elsewhere = HERE | {field: "another"}
    keep(elsewhere, [verdict(backend="cuda")])
    before = cache_file(elsewhere).read_text()
    assert cached(HERE) == ()
    keep(HERE, [verdict()])
    assert cached(HERE) == (verdict(),) and cache_file(elsewhere).read_text() == before


BROKEN = {
    "cut short": '{"environment": {"device": "a ca',
    "not JSON": "\0\0\0",
    "another kind": "[1, 2]",
    "no verdicts": json.dumps({"environment": HERE}),
    "a verdict without a dtype": json.dumps({"environment": HERE, "verdicts": [{"op": "simam"}]}),
    "a dtype that is none": json.dumps(
        {"environment": HERE, "verdicts": [verdicts.verdict_as_json(verdict()) | {"dtype": "Tensor"}]}
    ),
    "lists in lists": "[" * 100_000,
    "a backend of another version": json.dumps(
        {"environment": HERE, "verdicts": [verdicts.verdict_as_json(verdict()) | {"backend": "hip"}]}
    ),
    "options that are no codes": json.dumps(
        {"environment": HERE, "verdicts": [verdicts.verdict_as_json(verdict()) | {"options": [[1]]}]}
    ),
    "a number beyond all": json.dumps(
        {"environment": HERE, "verdicts": [verdicts.verdict_as_json(verdict()) | {"room": [float("inf"), 1]}]}
    ),
    "of another card": json.dumps({"environment": HERE | {"device": "another"}, "verdicts": []}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_none_of_ours(name):
    """It is said once, and what stands there is kept under another name."""
    path = cache_file(HERE)
    path.parent.mkdir(parents=True)
    path.write_text(BROKEN[name])
    with pytest.warns(UserWarning, match="verdicts are measured again, because") as said:
        assert cached(HERE) == () and cached(HERE) == ()
    assert len(said) == 1 and str(path) in str(said[0].message)
    assert path.read_text() == BROKEN[name]
    keep(HERE, [verdict()])
    assert cached(HERE) == (verdict(),) and path.with_suffix(".unread").read_text() == BROKEN[name]


@pytest.mark.parametrize("folder", ["/proc/fused_attn", "a file"])
def test_where_nothing_can_be_written(folder, tmp_path, monkeypatch):
    """As in a home that is read-only: said once, and everything goes on."""
    if folder == "a file":
        (tmp_path / "file").write_text("")
        folder = str(tmp_path / "file" / "folder")
    monkeypatch.setenv("FUSED_ATTN_CACHE", folder)
    with verdicts.one_at_a_time(HERE), pytest.warns(UserWarning, match="every process measures again") as said:
        assert cached(HERE) == ()
        keep(HERE, [verdict()])
        keep(HERE, [verdict()])
    assert len(said) == 1


def test_without_a_home(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSED_ATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verdicts.Path, "home", home)
    with verdicts.one_at_a_time(HERE), pytest.warns(UserWarning, match="Could not determine home directory"):
        assert cached(HERE) == ()
        keep(HERE, [verdict()])


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_ATTN_CACHE", "/somewhere")
    assert cache_file(HERE).parent == Path("/somewhere") and cache_file(HERE).name.startswith("a-card-")
    monkeypatch.delenv("FUSED_ATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.cache_folder() == tmp_path / "fused_attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verdicts.cache_folder() == Path.home() / ".cache" / "fused_attn"


def test_a_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    write_table(path, HERE, [verdict()])

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(verdicts.os, "replace", fails)
    with pytest.raises(OSError):
        write_table(path, HERE, [])
    assert read_table(path).verdicts == (verdict(),) and os.listdir(tmp_path) == ["table.json"]


def test_one_at_a_time():
    """Locks are of open files, so that threads stand for processes here."""
    inside, most = [], []

    def measure():
        with verdicts.one_at_a_time(HERE):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1, 1, 1, 1]


def test_waiting_has_an_end(monkeypatch):
    monkeypatch.setattr(verdicts, "WAIT", 0.2)
    with verdicts.one_at_a_time(HERE):
        start = time.monotonic()
        with verdicts.one_at_a_time(HERE):
            assert 0.2 <= time.monotonic() - start < 5


def test_what_ships(tmp_path, monkeypatch):
    """A table serves the cards that it names, with any driver and compiler, and no other torch, triton or kernels."""
    monkeypatch.setattr(verdicts, "FOLDER", tmp_path)
    (tmp_path / "tables").mkdir()
    path = verdicts.write_shipped(tmp_path / "tables", HERE, [verdict()])
    assert path.name == "a-card.json"
    elsewhere = {"driver": "1", "kernels": "built there"}
    assert verdicts.shipped(HERE) == verdicts.shipped(HERE | elsewhere) == (verdict(),)
    for field in set(HERE) - set(elsewhere):
        assert verdicts.shipped(HERE | {field: "another"}) == ()


def test_every_table_that_ships_can_be_read():
    tables = {path.name: read_table(path) for path in (verdicts.FOLDER / "tables").glob("*.json")}
    assert tables["cpu.json"].environment == {"device type": "cpu"}
    for table in tables.values():
        assert "device" in table.environment or "device type" in table.environment
        for op, (name, _) in table.ops.items():
            assert op in backends.OPS and name in backends.NAMES


#: The ops of blocks that were measured on a processor.
MEASURED = {
    "channel_gate": ("se", "eca"),
    "channel_gate/both": ("channel-attention",),
    "spatial_gate": ("spatial-attention",),
    "cbam": ("cbam",),
    "cbam/batch_norm": ("cbam-batch-norm",),
    "axis_pool": ("triplet",),
    "mixed_scale": ("triplet",),
    "select": ("select",),
    "norm_gate": ("norm-gate", "norm-silu-gate"),
}


def test_the_table_of_processors_is_what_was_measured():
    ratios: dict[str, list[float]] = {}
    for path in (ROOT / "benchmarks/results/cpu").glob("*.json"):
        for figure in json.loads(path.read_text())["figures"]:
            medians = figure.get("medians", {})
            if "eager" in medians and "block" in figure["case"]:
                ratios.setdefault(figure["case"]["block"], []).append(medians["eager"] / medians["fused"])
    for op in backends.OPS:
        if op == "select/many":
            continue
        name, why = backends.SHIPPED[op, "cpu"]
        assert name == "cpu"
        of_op = MEASURED.get(op, ())
        assert set(of_op) <= set(blocks.BLOCKS) & set(ratios)
        found = [ratio for block in of_op for ratio in ratios[block]]
        if not found:
            assert why == "the processor's own kernel; no figure of it by itself is stored"
            continue
        expected = f"{min(found):.1f} to {max(found):.1f} times as fast as plain PyTorch: {', '.join(of_op)} in "
        assert why.startswith(expected) and fmean(found) > 1.05


@pytest.mark.parametrize(
    ("sizes", "layout", "expected"),
    [
        ((32, 256, 56, 56), "nchw", Shape("nchw", 8, 12, 26, True)),
        ((32, 256, 56, 56), "channels_last", Shape("channels_last", 8, 12, 26, True)),
        ((16, 128, 64, 64), "nchw", Shape("nchw", 7, 12, 24, True)),
        ((1, 2048, 7, 7), "nchw", Shape("nchw", 11, 6, 18, False)),
        ((1, 2048, 7, 7), "channels_last", Shape("channels_last", 11, 6, 18, True)),
        ((1, 20, 7, 7), "channels_last", Shape("channels_last", 5, 6, 11, False)),
        ((4, 64, 1, 1), "channels_last", Shape("nchw", 6, 0, 9, False)),  # both at once
        ((2, 1, 3, 3), "channels_last", Shape("nchw", 0, 4, 6, False)),
        ((0, 8, 4, 4), "nchw", Shape("nchw", 3, 4, 0, True)),
        ((2, 8, 5), "nchw", Shape("nchw", 3, 3, 8, False)),
    ],
)
def test_classes_of_shape(sizes, layout, expected):
    x = torch.empty(sizes, dtype=torch.bfloat16)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x
    assert class_of(x.shape, x.stride(), x.itemsize) == expected


def test_environment_of_a_card(monkeypatch):
    """What is read of a card, on a stand-in."""
    card = types.SimpleNamespace(name="NVIDIA X", multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = verdicts.environment_of(torch.device("cuda", 3))
    assert set(found) == set(HERE) and found["device"] == "NVIDIA X" and found["multiprocessors"] == 132
    assert json.loads(json.dumps(found)) == found
    assert set(verdicts.environment_of(torch.device("cpu"))) == {"device", "threads", "torch", "kernels", "sources"}


def test_the_hash_is_of_the_kernels(tmp_path, monkeypatch):
    before = verdicts.hash_of_kernels()
    monkeypatch.setattr(verdicts, "FOLDER", tmp_path)
    (tmp_path / "kernels").mkdir()
    found = [before]
    for path, text in (("kernels/a.py", "1"), ("kernels/a.py", "2"), ("_native.so", "1"), ("_native.so", "2")):
        (tmp_path / path).write_text(text)
        found.append(verdicts.hash_of_kernels.__wrapped__())
    assert len(set(found)) == len(found)


def test_the_hash_of_sources_is_no_compilers(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "FOLDER", tmp_path)
    (tmp_path / "kernels").mkdir()
    of = verdicts.hash_of_sources.__wrapped__
    found = [of()]
    (tmp_path / "_native.so").write_text("1")
    assert [of()] == found
    for path, text in (("kernels/a.py", "1"), ("_build_info.json", '{"sources": "1"}'), ("_build_info.json", "{")):
        (tmp_path / path).write_text(text)
        found.append(of())
    assert len(set(found[:3])) == 3 and found[3] == found[1]


def test_nothing_is_said_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached(HERE) == ()
        keep(HERE, [verdict()])
        assert cached(HERE) == (verdict(),)
