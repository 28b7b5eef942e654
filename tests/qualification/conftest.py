"""No verdict outlives its test, and none comes from this machine's own cache."""

from __future__ import annotations

import pytest

from fused_attn import backends, verdicts


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_VERDICTS", {})
    monkeypatch.setattr(backends, "_SERVED", {})
    monkeypatch.setattr(backends._Known, "anything", False)
    monkeypatch.setattr(backends._Known, "told", False)
    monkeypatch.setattr(verdicts, "_said", set())
