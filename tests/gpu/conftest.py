"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fused_attn


@pytest.fixture
def streaming() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    with fused_attn.backend("triton"):
        yield
