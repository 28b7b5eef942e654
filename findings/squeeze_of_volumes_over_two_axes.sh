#!/usr/bin/env bash
# The squeeze-and-excitation of nnU-Net's networks averages a volume over two of its three axes.
#
# Versions: dynamic-network-architectures 0.4.4, torch 2.13.0 (CPU build), Python 3.11.
# Source: building_blocks/regularization.py, SqueezeExcite, which ResidualEncoder has with squeeze_excitation=True. Its
# convolutions may be 3-D, its mean is over axes 2 and 3 as in the 2-D class that it comes from.
# Expected: one number a channel, the mean over all positions, as in squeeze-and-excitation of volumes elsewhere.
# Seen: one number a channel and position along the last axis; a volume that is turned gets another gate.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.1
"$folder/venv/bin/pip" install -q --no-deps dynamic-network-architectures==0.4.4
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from dynamic_network_architectures.building_blocks.regularization import SqueezeExcite
from torch import nn

torch.manual_seed(0)
block = SqueezeExcite(8, nn.Conv3d, rd_channels=4)
seen = []
block.gate.register_forward_hook(lambda module, args, gate: seen.append(tuple(gate.shape)))
x = torch.randn(1, 8, 4, 5, 6)
turned = block(x.transpose(2, 4)).transpose(2, 4)
y = block(x)
print("gates:", seen, "changed by turning the volume by up to", (y - turned).abs().max().item())
assert seen == [(1, 8, 1, 1, 4), (1, 8, 1, 1, 6)]
assert not torch.allclose(y, turned, atol=1e-4)
PYTHON
