"""The interpreter, in less time, on tiles so small that a small map has several."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def language_is_patched_once_a_launch_and_module():
    """Triton's interpreter replaces all of triton.language at every call of a device function: a third of its time."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "GridExecutor"):  # another triton's
        yield
        return
    patched, patch, launch = set(), interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            return patch(function)

    def launch_afresh(self, *given, **more):
        patched.clear()  # what a launch replaces it puts back
        return launch(self, *given, **more)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
        yield


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if importlib.util.find_spec("triton") is None or not request.module.__name__.rpartition(".")[2].startswith(
        "test_interpreter"
    ):
        yield
        return
    from fused_attn.kernels import maps, mixed_scale, spatial_gate

    plans = maps.plan, maps.flat_plan, maps._plan_over_channels, mixed_scale._plan
    monkeypatch.setattr(maps, "THREADS", 64)
    monkeypatch.setattr(spatial_gate, "WHOLE_SAMPLE", 40)
    monkeypatch.setattr(spatial_gate, "CONVOLUTION_BLOCK", 16)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()
