"""The command for networks of public packages: what it counts, compares and keeps, with networks written here."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.hosts import __main__ as command
from benchmarks.hosts import run
from benchmarks.hosts.measure import measure
from benchmarks.hosts.products import products_of
from benchmarks.hosts.table import page, summary, text_of
from fused_attn import explain, fuse
from tests.checks import random


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))).expand_as(x)


class Stored(Gate):
    """It keeps state, and so stays as it is."""

    def forward(self, x):
        self.last = x.detach()
        return super().forward(x)


class Network(nn.Module):
    def __init__(self, *gates: nn.Module):
        super().__init__()
        self.first, self.norm, self.gates = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(*gates)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x * self.scale  # comes from no map
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1)  # normalises
        return self.gates(x) * x


def build(*gates: type[nn.Module]):
    return lambda: (Network(*(gate() for gate in gates)), (random(2, 3, 8, 7),))


def test_a_network_that_is_fused():
    row = measure(build(Gate, Gate))
    expected = {"gates": 2, "fused": 2, "gates in training": 2, "fused in training": 2, "left": [], "blocks": 2}
    assert row == {**row, **expected, "operators": 2, "called fused": [], "tails": 0, "wrong": []}


def test_a_gate_that_is_left_alone():
    row = measure(build(Gate, Stored))
    assert (row["gates"], row["fused"], row["wrong"]) == (2, 1, [])
    assert row["left"] == [{"name": "gates.1", "reason": "keeps state", "count": 1}]


def test_wrong_values_and_blocks_called_fused_that_are_not(monkeypatch):
    def wrong(model, tails=False):
        model = fuse(model, tails=tails)
        with torch.no_grad():
            model.scale.mul_(1 + 1e-4)
        return model

    monkeypatch.setattr("benchmarks.hosts.measure.fuse", wrong)
    row = measure(build(Gate))
    for mode in ("evaluation", "training"):
        for kind in ("float64", "float32", "tails: float64", "tails: float32"):
            assert any(what.startswith(f"{kind}, {mode}: output 0 is off by") for what in row["wrong"]), (kind, mode)
    monkeypatch.setattr("benchmarks.hosts.measure.fuse", lambda model, tails=False: model)
    monkeypatch.setattr("benchmarks.hosts.measure.explain", lambda model: explain(fuse(copy.deepcopy(model))))
    assert measure(build(Gate), values=False)["called fused"] == ["gates.0"]


def test_shapes_of_what_is_found():
    model, inputs = build(Gate)()
    ((product,), _) = products_of(model.eval(), inputs)
    assert product == ("gates.0", (2, 8, 6, 5), (2, 8, 1, 1))


def test_rows_are_kept_and_taken_up(tmp_path, monkeypatch, capsys):
    """One fails, as its package is not there; one that was measured is not measured again."""
    kept = tmp_path / "hosts.json"
    measured = measure(build(Gate, Stored), values=False) | {"version": "1"}
    run.save(kept, {"timm: seresnet18": measured, "an old one": measured})
    only = "^timm: seresnet18$|^nowhere: network$"
    known = {name: run.networks()[name] for name in ("timm: seresnet18",)} | {"nowhere: network": None}
    monkeypatch.setattr(run, "networks", lambda: known)
    page_path = tmp_path / "hosts.md"
    assert run.main(["--only", only, "--json", str(kept), "--counts", "--page", str(page_path)]) == 0
    said = capsys.readouterr().out
    assert "nowhere: network: KeyError: 'nowhere: network'" in said and "timm" not in said.splitlines()[0]
    assert "1 of 2 products fused (50.0 %) in 1 networks" in said and "    1  keeps state" in said
    text = page_path.read_text()
    assert (
        "| timm: seresnet18 | 1 | 2 | 1 | 0 | not compared |" in text
        and "| 1 | timm: seresnet18 | keeps state |" in text
    )


def test_text_of_a_row():
    row = {"gates": 3, "fused": 2, "gates in training": 3, "fused in training": 1, "tails": 4, "wrong": ["float64: x"]}
    row |= {"left": [{"name": "a", "reason": "why", "count": 1}], "called fused": ["b"], "version": ""}
    lines = text_of("n", row).splitlines()
    assert lines[0] == "n: 2 of 3 fused (1 of 3 in training), 4 tails"
    assert lines[1:] == ["  1 left: why", "  float64: x", "  called fused and is not: b"]
    assert "1 with wrong values, 1 with blocks called fused that are not, 1 failed" in summary(
        {"n": row, "f": {"failed": ""}}
    )
    assert "float64: x; b is called fused" in page({"n": row})


@pytest.mark.parametrize("option", [["--environment", "kept"], ["--environment=kept"]])
def test_options_of_the_environments_own_command(option, monkeypatch, tmp_path):
    """It gets all but `--environment`; what it does not know is said before anything is installed."""
    folders: list[Path] = []

    def install(folder: Path) -> Path:
        folders.append(folder)
        return Path(sys.executable)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "install", install)
    assert command.main([*option, "--only", "no network of this name", "--json", str(tmp_path / "rows.json")]) == 0
    assert folders == [tmp_path / "kept"]
    with pytest.raises(SystemExit):
        command.main([*option, "--onyl", "x"])
    assert len(folders) == 1
