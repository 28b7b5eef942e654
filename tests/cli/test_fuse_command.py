"""fused-attn fuse: somebody's own file."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fused_attn.cli import main

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


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), SEBlock(16), SEBlock(16), Printing(16))


def plain():
    return nn.Conv2d(3, 16, 3)
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
