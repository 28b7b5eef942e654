"""What tests of ops share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def three_threads():
    """With one, as `make test` has it, the C++ never cuts a map. With three it cuts each sample of a batch of one or
    two of 32768 elements or more (kSerialElements in csrc/cpu/map.h) into up to 32 pieces."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
