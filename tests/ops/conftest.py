"""What tests of ops share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def number_of_threads_is_put_back():
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def three_threads(number_of_threads_is_put_back):
    """With one, as `make test` has it, the C++ never cuts a map. With three it cuts each sample of a batch of one or
    two of 32768 elements or more (kSerialElements in csrc/cpu/map.h) into up to 32 pieces."""
    torch.set_num_threads(3)
