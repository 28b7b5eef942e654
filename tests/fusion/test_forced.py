"""FUSED_ATTN_BACKEND=triton where the CPU checks what is to run on a GPU: every kind of block is recognised as ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_attn import explain, fuse
from fused_attn.fusion.changing.graphs import rewrite
from fused_attn.hosts import define_torchvision_operators
from tests.checks import random
from tests.fusion.counting import said_to_run_fused


def kinds() -> dict[str, int]:
    """Blocks that run fused, by how they are found."""
    define_torchvision_operators()
    from tests.fusion.changing.test_graphs import Blocks
    from tests.fusion.reading import pasted, pasted_selections
    from tests.fusion.reading.pasted_attention_forms import ContextBlock, CrissCrossAttention, _NonLocalBlockND
    from tests.fusion.test_moment import parent_class
    from tests.fusion.test_tails import timm_resnet

    modules = {
        "pasted": nn.Sequential(pasted.SEBlock(32), pasted.CBAM(32), pasted.eca_layer()),
        "of a parent": parent_class()(),
        "selection": pasted_selections.SKAttention(16),
        "criss-cross": CrissCrossAttention(32),
        "non-local": _NonLocalBlockND(24, "embedded", 2),
        "context": ContextBlock(16, 1 / 4),
    }
    found = {name: said_to_run_fused(fuse(module)) for name, module in modules.items()}
    found["known to explain"] = sum("not fused yet" in row.reason for row in explain(pasted.CBAM(32)))
    residual = fuse(timm_resnet("Bottleneck", 64, attn_layer="se"), tails=True)
    found["tail"] = sum("BatchNorm" in row.block for row in explain(residual, tails=True))
    program = torch.export.export(Blocks().eval(), (random(2, 3, 8, 9),))
    found["program"] = sum("fused_attn" in str(node.target) for node in fuse(program).graph.nodes)
    graph = program.module(check_guards=False)
    found["graph"] = rewrite(graph, [n.meta.get("val") for n in graph.graph.find_nodes(op="placeholder")])
    return found


@pytest.mark.slow  # 12 s
def test_every_kind_is_found():
    command = "import json; from tests.fusion.test_forced import kinds; print(json.dumps(kinds()))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"FUSED_ATTN_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {name: 3 if name in ("pasted", "program", "graph") else 1 for name in found}, found
