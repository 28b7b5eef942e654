"""What every test gets: NaN in fresh memory, a fixed seed, and a printed reason where it is skipped."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before fused_attn is imported: backend("triton") then runs on the CPU

from fused_attn.hosts import define_torchvision_operators
from tests.covering import mark_long

too_slow = [HealthCheck.too_slow]  # a busy machine is not an error
settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.load_profile("project")


define_torchvision_operators()  # before any test imports timm or torchvision


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_long(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Every `empty` tensor, in Python and in the native library, starts as NaN (integers: the largest value).

    An element that a kernel forgets to write then shows. The flag that does it is the one for deterministic
    algorithms, so each test also shows that nothing here warns or raises under it.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
