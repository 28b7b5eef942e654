"""Models by name: "timm:seresnet50", "torchvision:mobilenet_v3_small", "package.module:factory", "file.py:factory".

"timm:resnet50+cbam" is timm's resnet50 with that attention layer in every block.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn


class UnknownModel(ValueError):
    """The model cannot be had; the message says why in one line."""


def import_host(name: str) -> Any:
    """timm, torchvision or another library, which must be installed.

    Raises:
        UnknownModel: it is not installed or does not import.
    """
    if importlib.util.find_spec(name) is None:
        raise UnknownModel(f"{name} is not installed (pip install {name})")
    if name in ("timm", "torchvision"):
        define_torchvision_operators()
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnknownModel(f"{name} does not import: {error}") from error


_kept: list[torch.library.Library] = []


def define_torchvision_operators() -> None:
    """Give torchvision its operators' schemas where its own library does not load.

    `import torchvision` registers fake kernels for them. A torchvision built for a torch with CUDA cannot load its
    library beside a CPU-only torch, and then stops at that line; its classifiers need none of the operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if _kept or spec is None or spec.origin is None or "torchvision" in sys.modules:
        return
    names = ("nms", "qnms")
    missing = [name for name in names if not hasattr(torch.ops.torchvision, name)]  # others may have met that line, too
    for path in Path(spec.origin).parent.glob("_C*.so") if missing == list(names) else ():
        try:
            torch.ops.load_library(str(path))
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in missing:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def build_model(name: str) -> nn.Module:
    """The model of that name, with random weights; a copy where a file or package has a model in place of a factory.

    Raises:
        UnknownModel: no such library, file, factory or model, or what the factory gives is no `nn.Module`.
    """
    source, separator, factory = name.rpartition(":")
    if not separator or not source or not factory:
        raise UnknownModel(f"{name!r}: expected timm:NAME, torchvision:NAME, package.module:factory or file.py:factory")
    try:
        if source == "timm":
            backbone, _, attention = factory.partition("+")
            options = {"block_args": {"attn_layer": attention}} if attention else {}
            model = import_host("timm").create_model(backbone, pretrained=False, **options)
        elif source == "torchvision":
            import_host("torchvision")
            model = importlib.import_module("torchvision.models").get_model(factory, weights=None)
        else:
            found = getattr(_load(source), factory)
            model = copy.deepcopy(found) if isinstance(found, nn.Module) else found()
    except UnknownModel:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UnknownModel(f"{name}: {lines[0]}") from error
    if not isinstance(model, nn.Module):
        raise UnknownModel(f"{name}: expected the factory to return an nn.Module; got {type(model).__name__}")
    return model


def _load(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source)
    if not path.is_file():
        raise UnknownModel(f"{source}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # as for a script: what lies beside it can be imported
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
