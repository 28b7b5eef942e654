"""The networks whose attention is measured, and what serves them."""

from __future__ import annotations

import torch
from torch import nn

import fused_attn
from fused_attn import backends
from fused_attn.bench.models import in_place
from fused_attn.verdicts import Verdict, read_table

from .rows import Setting

#: (with attention, without).
PAIRS = (
    ("timm:seresnet50", "timm:resnet50"),
    ("timm:resnet50+cbam", "timm:resnet50"),
    ("timm:ecaresnet50d", "timm:resnet50d"),
    ("timm:regnety_016", "timm:regnetx_016"),
    ("timm:skresnet50", "timm:resnet50"),
)
DRY = ((f"{__name__}:attentive", f"{__name__}:plain"),)
#: Beside the JSONs, the folder of the table that ships.
TABLES = "tables"


def pairs(setting: Setting) -> tuple[tuple[str, str], ...]:
    return DRY if setting.dry else PAIRS


def images(setting: Setting) -> tuple[int, ...]:
    return (2, 3, 16, 16) if setting.dry else (32, 3, 224, 224)


def amp(setting: Setting) -> torch.autocast:
    return torch.autocast(setting.device.type, torch.bfloat16)


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def attentive() -> nn.Module:
    found = plain()
    found.insert(3, fused_attn.reference.SqueezeExcite(16))
    return found


def chosen(setting: Setting) -> tuple[str, str | None]:
    """What serves fused blocks here, in words, and the backend to ask for: none where the part `table` found verdicts,
    which hold from now on in this process, else the streaming kernels."""
    verdicts = found_before(setting)
    if not verdicts:
        return f"{setting.backends[0]}: there is no table", setting.backends[0]
    backends.install(here(setting), verdicts)
    names = [verdict.backend for verdict in verdicts]
    return ", ".join(f"{name} in {names.count(name)} classes" for name in dict.fromkeys(names)), None


def here(setting: Setting) -> torch.device:
    return torch.device("cpu") if setting.dry else torch.device("cuda", torch.cuda.current_device())


def found_before(setting: Setting) -> tuple[Verdict, ...]:
    """What `table` wrote."""
    return tuple(v for path in sorted((setting.folder / TABLES).glob("*.json")) for v in read_table(path).verdicts)


def placed(model: nn.Module, setting: Setting) -> nn.Module:
    return in_place(model, "channels_last", setting.device)
