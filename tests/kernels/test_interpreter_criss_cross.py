"""The Triton kernels of criss-cross attention in Triton's interpreter, by the tests of the operator."""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, gradcheck, in_layout, random
from tests.ops import test_criss_cross as of_cross
from tests.ops.test_channel_gate import strided


@pytest.fixture(autouse=True, scope="module")
def triton():
    reason = unavailable("triton", "criss_cross_attention", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    with fused_attn.backend("triton"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", of_cross.DTYPES, ids=str)
def test_dtypes(dtype, layout):
    of_cross.check(of_cross.inputs_of((2, 24, 7, 9), 3, layout, dtype))
