"""What the resident CUDA kernels are said to hold, on a real device."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from fused_attn.ops import resident

pytestmark = pytest.mark.gpu

SHAPES = [(256, 56, 56), (64, 112, 112), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (256, 14, 14), (64, 7, 7)]


@pytest.fixture(autouse=True)
def resident_kernels():
    reason = unavailable("cuda", "channel_gate", "cuda")
    if reason is not None:
        pytest.skip(reason)
    with fused_attn.backend("cuda"):
        yield


def test_limits():
    limits, card = resident.limits_of(0), torch.cuda.get_device_properties(0)
    assert limits.shared == card.shared_memory_per_block_optin
    assert limits.cluster == 1 if card.major < 9 else limits.cluster in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_said_to_fit_runs_and_the_rest_is_refused(shape, dtype):
    x, none = torch.ones(2, *shape, device="cuda", dtype=dtype), (None,) * 7
    clusters = resident.clusters("channel_gate", resident.limits_of(0), x, *none, 0, 0, 0, 0, 6, 0, 0)
    for needs_grad in (False, True):
        x = x.detach().requires_grad_(needs_grad)
        if clusters.fit(needs_grad):
            y = functional.channel_gate(x)
            torch.testing.assert_close(y, x.sigmoid())
            if needs_grad:
                y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="shared memory of a cluster"):
                functional.channel_gate(x)
