"""What every test gets: NaN in fresh memory, a fixed seed, and a printed reason where it is skipped."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before fused_attn is imported: backend("triton") then runs on the CPU

from fused_attn.backends import small_as_large
from fused_attn.hosts import define_torchvision_operators
from fused_attn.ops.common import fresh_memory_by_torch
from tests.covering import mark_long

too_slow = [HealthCheck.too_slow]  # a busy machine is not an error
settings.register_profile("project", deadline=None, derandomize=True, suppress_health_check=too_slow)
settings.register_profile("long", settings.get_profile("project"), derandomize=False, print_blob=True)
settings.load_profile("project")
LONGER = 10  # times the examples of a test, in the profile "long"


define_torchvision_operators()  # before any test imports timm or torchvision


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "long":
        settings.load_profile("long")  # before the tests are imported, whose decorators start from it


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_long(items)
    if config.option.markexpr == "long":
        search_longer(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


def search_longer(items: list[pytest.Item]) -> None:
    """Tests of generated examples are among the long ones, with more examples than their decorators say."""
    generated = [item for item in items if getattr(item.obj, "is_hypothesis_test", False)]
    for function in {item.obj for item in generated}:
        given = getattr(function, "_hypothesis_internal_use_settings", settings.default)
        longer = settings(given, max_examples=LONGER * given.max_examples)
        function._hypothesis_internal_use_settings = longer
    for item in generated:
        item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Every `empty` tensor, in Python and in the native library, starts as NaN (integers: the largest value).

    An element that a kernel forgets to write then shows. The flag that does it is the one for deterministic
    algorithms, so each test also shows that nothing here warns or raises under it.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    by_torch = fresh_memory_by_torch(True)
    yield
    fresh_memory_by_torch(by_torch)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True, scope="session")
def small_maps_run_fused():
    """Tests are on small maps, and of what large ones run; `tests/test_calls.py` is of small ones."""
    with small_as_large():
        yield


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
