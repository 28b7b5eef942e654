"""What the workers of one run make once, for all of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder that all workers have."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """One worker makes `path`, while those that want it, too, wait."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
