"""fused-attn fuse: somebody's own file."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from fused_attn import explain, fuse
from fused_attn.cli import main
from fused_attn.hosts import build_model

SOURCE = """
import torch
from torch import nn


class SEBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(c, 4), nn.ReLU(), nn.Linear(4, c), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Printing(SEBlock):
    def forward(self, x):
        print("here")
        return super().forward(x)


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.se = SEBlock(16)

    def forward(self, x, y):
        return self.se(x) + y


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), SEBlock(16), SEBlock(16), Printing(16))


def plain():
    return nn.Conv2d(3, 16, 3)


made = net()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pasted_model.py"
    path.write_text(SOURCE)
    return path


def test_the_table_and_the_exit_code(file):
    done = CliRunner().invoke(main, ["fuse", f"{file}:net"])
    assert done.exit_code == 0, done.output
    assert "SqueezeExcite(16" in done.output and "prints" in done.output and "2 of 3 blocks run fused" in done.output
    assert "here" not in done.output and "functional.channel_gate" not in done.output


def test_diff(file):
    done = CliRunner().invoke(main, ["fuse", f"{file}:net", "--diff"])
    assert done.exit_code == 0, done.output
    assert "-    return x * self.fc(x.mean((2, 3)))[:, :, None, None]" in done.output
    assert "+    return functional.channel_gate(" in done.output and "+        self.fc.0.weight," in done.output
    assert "1, 2" in done.output


def test_nothing_to_fuse(file):
    done = CliRunner().invoke(main, ["fuse", f"{file}:plain"])
    assert done.exit_code == 1 and "no attention block" in done.output


def test_a_mistake(file):
    done = CliRunner().invoke(main, ["fuse", f"{file}:nothing"])
    assert done.exit_code == 2 and "nothing" in done.output


def test_a_model_in_place_of_a_factory(file):
    """Each name gives one of its own: they may be fused and compared."""
    done = CliRunner().invoke(main, ["fuse", f"{file}:made"])
    assert done.exit_code == 0 and "2 of 3 blocks run fused" in done.output, done.output
    first, second = (build_model(f"{file}:made") for _ in range(2))
    fuse(first)
    assert explain(first)[0].fused and not explain(second)[0].fused


def test_what_lies_beside_a_file_can_be_imported(file, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (file.parent / "beside_it.py").write_text("from pasted_model import net\n")
    other = file.parent / "importing_model.py"
    other.write_text("from beside_it import net\n")
    done = CliRunner().invoke(main, ["fuse", f"{other}:net"])
    assert done.exit_code == 0 and "2 of 3 blocks run fused" in done.output, done.output


def test_verify_of_a_model_that_takes_more_is_one_line(file):
    done = CliRunner().invoke(main, ["verify", "--model", f"{file}:OfTwo", "--shape", "2x16x8x8"])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    assert "missing 1 required positional argument: 'y'" in done.output
