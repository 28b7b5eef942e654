"""The packages and their networks, each small and with random weights, and how they are fed."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.hosts import build_model, import_host

#: What is installed, each without what it asks for: that would bring another torch, or far more than networks need.
PACKAGES = (
    "torchvision==0.28.0",
    "timm==1.0.31",
    "monai==1.6.1",
    "pytorchcv==0.0.74",
    "segmentation-models-pytorch==0.6.0",
    "efficientnet-pytorch==0.7.1",
    "geffnet==1.0.2",
    "pretrainedmodels==0.7.4",
    "speechbrain==1.1.2",
    "mmengine==0.10.7",
    "mmcv-lite==2.2.0",
    "mmpretrain==1.2.0",
    "fastai==2.8.12",
    "tsai==1.0.1",
    "ultralytics==8.4.190",
    "dynamic-network-architectures==0.4.4",
    "vit-pytorch==1.26.14",
    "spandrel==0.4.2",
    "super-image==0.2.0",
    "pytorch-toolbelt==0.8.0",
    "timm-3d==1.0.1",
    "segmentation-models-pytorch-3d==1.0.2",
)
#: What these import.
HELPERS = (
    "addict",
    "cloudpickle",
    "einops",
    "fastcore",
    "fastdownload",
    "fastprogress<1.1",
    "fasttransform",
    "h5py",
    "huggingface_hub",
    "hyperpyyaml",
    "imbalanced-learn",
    "importlib_metadata<9",
    "joblib",
    "mat4py",
    "matplotlib",
    "modelindex",
    "munch",
    "numpy",
    "opencv-python-headless",
    "packaging",
    "pandas",
    "pillow",
    "plum-dispatch",
    "polars",
    "psutil",
    "pyyaml",
    "requests",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentencepiece",
    "six",
    "tabulate",
    "termcolor",
    "tqdm",
    "yapf",
)

Built = tuple[nn.Module, tuple[Any, ...]]
Network = Callable[[], Built]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


IMAGE, LARGE, SMALL, FEATURES = (2, 3, 64, 64), (2, 3, 96, 96), (2, 3, 24, 24), (2, 32, 20, 20)
VOLUME, SERIES = (2, 1, 32, 32, 32), (2, 4, 100)


def _of(package: str, name: str, shape: tuple[int, ...], build: Callable[[], nn.Module]) -> tuple[str, Network]:
    return f"{package}: {name}", lambda: (build(), (_random(*shape),))


def _called(package: str, path: str, shape: tuple[int, ...], shown: str = "", /, **options: Any) -> tuple[str, Network]:
    """What a class or function of a module gives. shown: its options, in the network's name."""
    module, _, function = path.rpartition(".")

    def build() -> nn.Module:
        return getattr(import_host(package) and importlib.import_module(module), function)(**options)

    return _of(package, " ".join(filter(None, (function, shown))), shape, build)


def _words(text: str) -> list[str]:
    return text.split()


_TIMM = _words(
    """
    seresnet18 legacy_seresnet18 seresnext26d_32x4d ecaresnet26t skresnet18 resnest14d gcresnext26ts efficientnet_b0
    tf_efficientnetv2_b0 mobilenetv3_small_100 semnasnet_075 fbnetv3_b hardcorenas_a lcnet_050 tinynet_e mixnet_s
    rexnet_100 ghostnet_050 ghostnetv2_100 repghostnet_050 regnety_002 regnetz_b16 ese_vovnet19b_slim hgnetv2_b0
    tresnet_m repvit_m0_9 mobileone_s4 nf_seresnet26 nf_ecaresnet26 eca_nfnet_l0 rdnet_tiny convnextv2_atto
    focalnet_tiny_srf edgenext_xx_small coatnet_pico_rw_224 fastvit_t8 seresnextaa101d_32x8d gcresnet33ts
    seresnet33ts eca_resnext26ts cs3se_edgenet_x res2net50_26w_4s skresnext50_32x4d
    """
)
_ATTENTION = _words("se ese eca ecam ceca gc gca cbam lcbam coord scoord ela strip sk splat")
_TORCHVISION = _words("mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_y_400mf")
_PYTORCHCV = _words(
    """
    seresnet10 sepreresnet10 seresnet20_cifar10 senet16 sknet50 cbam_resnet18 bam_resnet18 efficientnet_b0
    efficientnet_edge_small_b mobilenetv3_small_w7d20 ghostnet mixnet_s resnesta18 airnet50_1x64d_r2 diaresnet18
    dicenet_wd5 fbnet_cb tresnet_m regnetx002 scnet50 menet108_8x1_g3
    """
)
_GEFFNET = _words("efficientnet_b0 mobilenetv3_large_075 mixnet_s semnasnet_075 tf_efficientnet_b0 fbnetc_100")
_PRETRAINED = _words("se_resnet50 se_resnext50_32x4d")


def package_of(name: str) -> str:
    """The package that a network is of, as it is installed."""
    return name.partition(":")[0].replace("_", "-")


def networks() -> dict[str, Network]:
    """By "package: network"."""
    return dict(_networks())


def _networks() -> Iterator[tuple[str, Network]]:
    for name in _TORCHVISION:
        yield _of("torchvision", name, IMAGE, lambda name=name: build_model(f"torchvision:{name}"))
    yield _called(
        "torchvision",
        "torchvision.models.segmentation.lraspp_mobilenet_v3_large",
        IMAGE,
        weights=None,
        weights_backbone=None,
        num_classes=4,
    )
    yield _called("torchvision", "torchvision.models.maxvit_t", (1, 3, 224, 224), weights=None)
    for name in _TIMM:
        shape = (1, 3, 224, 224) if name.endswith("224") else LARGE if "vit" in name else IMAGE
        yield _of("timm", name, shape, lambda name=name: build_model(f"timm:{name}"))
    for name in _ATTENTION:
        yield _of("timm", f"resnet26+{name}", IMAGE, lambda name=name: build_model(f"timm:resnet26+{name}"))
    for name in _PYTORCHCV:
        shape = (2, 3, 32, 32) if "cifar" in name else (2, 3, 224, 224)
        yield _called("pytorchcv", f"pytorchcv.model_provider.{name}", shape)
    for name in _GEFFNET:
        yield _called("geffnet", f"geffnet.{name}", IMAGE)
    for name in _PRETRAINED:
        yield _called("pretrainedmodels", f"pretrainedmodels.{name}", (2, 3, 224, 224), pretrained=None)
    for version in ("b0", "b1"):
        yield _of("efficientnet_pytorch", version, IMAGE, lambda v=version: _efficientnet_pytorch(v))
    yield from _medical()
    yield from _segmentation()
    yield from _openmmlab()
    yield from _sound_and_series()
    yield from _others()


def _efficientnet_pytorch(version: str) -> nn.Module:
    return import_host("efficientnet_pytorch").EfficientNet.from_name(f"efficientnet-{version}")


def _medical() -> Iterator[tuple[str, Network]]:
    nets = "monai.networks.nets"
    flat = {"spatial_dims": 2, "in_channels": 3, "num_classes": 4}
    solid = {"spatial_dims": 3, "in_channels": 1, "num_classes": 4}
    yield _called("monai", f"{nets}.SEResNet50", IMAGE, "2-D", **flat)
    yield _called("monai", f"{nets}.SEResNet50", VOLUME, "3-D", **solid)
    yield _called("monai", f"{nets}.SEResNext50", IMAGE, "2-D", **flat)
    for shape, dims, channels in ((IMAGE, 2, 3), (VOLUME, 3, 1)):
        yield _called(
            "monai",
            f"{nets}.EfficientNetBN",
            shape,
            f"b0 {dims}-D",
            model_name="efficientnet-b0",
            pretrained=False,
            spatial_dims=dims,
            in_channels=channels,
            num_classes=4,
        )
        yield _called(
            "monai",
            f"{nets}.AttentionUnet",
            shape,
            f"{dims}-D",
            spatial_dims=dims,
            in_channels=channels,
            out_channels=2,
            channels=(8, 16, 32),
            strides=(2, 2),
        )
    yield _called(
        "monai", f"{nets}.FlexibleUNet", IMAGE, "b0", in_channels=3, out_channels=2, backbone="efficientnet-b0"
    )
    yield _called("timm_3d", "timm_3d.create_model", (1, 3, 64, 64, 64), "seresnet18", model_name="seresnet18")
    yield _called(
        "timm_3d", "timm_3d.create_model", (1, 3, 64, 64, 64), "efficientnet_b0", model_name="efficientnet_b0"
    )
    yield _called(
        "dynamic_network_architectures",
        "dynamic_network_architectures.building_blocks.residual_encoders.ResidualEncoder",
        VOLUME,
        "squeeze_excitation",
        input_channels=1,
        n_stages=3,
        features_per_stage=[16, 32, 64],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2],
        n_blocks_per_stage=2,
        norm_op=nn.InstanceNorm3d,
        nonlin=nn.ReLU,
        return_skips=True,
        squeeze_excitation=True,
    )


def _segmentation() -> Iterator[tuple[str, Network]]:
    package = "segmentation_models_pytorch"
    plain = {"encoder_weights": None}
    for decoder in ("Unet", "UnetPlusPlus"):
        yield _called(
            package,
            f"{package}.{decoder}",
            IMAGE,
            "scse",
            encoder_name="resnet18",
            decoder_attention_type="scse",
            **plain,
        )
    for decoder in ("MAnet", "PAN", "FPN", "Linknet", "DeepLabV3Plus"):
        encoder = "se_resnet50" if decoder in ("FPN", "Linknet") else "resnet18"
        yield _called(package, f"{package}.{decoder}", (2, 3, 128, 128), encoder, encoder_name=encoder, **plain)
    for encoder in (
        "efficientnet-b0",
        "timm-efficientnet-b0",
        "timm-mobilenetv3_small_100",
        "mobileone_s4",
        "timm-skresnet18",
        "timm-resnest14d",
        "timm-regnety_002",
        "tu-seresnet18",
    ):
        yield _called(package, f"{package}.Unet", IMAGE, encoder, encoder_name=encoder, **plain)
    other = "segmentation_models_pytorch_3d"
    for encoder, attention in (("efficientnet-b0", None), ("resnet18", "scse")):
        yield _called(
            other,
            f"{other}.Unet",
            (1, 3, 64, 64, 64),
            f"{encoder} {attention or ''}".strip(),
            encoder_name=encoder,
            decoder_attention_type=attention,
            **plain,
        )


def _openmmlab() -> Iterator[tuple[str, Network]]:
    backbones = "mmpretrain.models.backbones"
    for name, options in {
        "SEResNet": {"depth": 50},
        "SEResNeXt": {"depth": 50},
        "MobileNetV3": {"arch": "small"},
        "EfficientNet": {"arch": "b0"},
        "EfficientNetV2": {"arch": "b0"},
        "MobileOne": {"arch": "s4"},
        "ResNeSt": {"depth": 50},
        "RepVGG": {"arch": "D2se"},
        "MobileViT": {"arch": "xx_small"},
        "EdgeNeXt": {"arch": "xxsmall"},
        "ConvNeXt": {"arch": "atto", "use_grn": True, "layer_scale_init_value": 0.0},
        "VAN": {"arch": "tiny"},
        "DaViT": {"arch": "tiny"},
    }.items():
        shape = (2, 3, 64, 64) if name != "MobileViT" else LARGE
        yield _called("mmpretrain", f"{backbones}.{name}", shape, str(next(iter(options.values()))), **options)


def _sound_and_series() -> Iterator[tuple[str, Network]]:
    stands_in_for("torchaudio")
    sound = (2, 100, 40)
    lobes = "speechbrain.lobes.models"
    yield _called(
        "speechbrain",
        f"{lobes}.ECAPA_TDNN.ECAPA_TDNN",
        sound,
        input_size=40,
        channels=[64] * 4 + [192],
        attention_channels=32,
        lin_neurons=32,
    )
    yield _called(
        "speechbrain", f"{lobes}.ResNet.ResNet", sound, input_size=40, channels=[16, 16, 32, 32], lin_neurons=32
    )
    yield _called("speechbrain", f"{lobes}.ContextNet.ContextNet", sound, input_shape=sound, out_channels=[32] * 8)
    for name in ("xse_resnet18", "xse_resnext18", "xresnet18"):
        yield _called(
            "fastai", f"fastai.vision.models.xresnet.{name}", IMAGE, **({"sa": True} if name == "xresnet18" else {})
        )
    for path, options in {
        "InceptionTimePlus.InceptionTimePlus": {"se": 16},
        "FCNPlus.FCNPlus": {"se": 16},
        "FCN.FCN": {"se": 16},
        "ResNetPlus.ResNetPlus": {"se": 16},
        "XceptionTimePlus.XceptionTimePlus": {},
        "XResNet1dPlus.xse_resnet1d18plus": {},
        "RNN_FCN.LSTM_FCN": {"seq_len": 100, "se": 16},
    }.items():
        shown = "se" if "se" in options else ""
        yield _called("tsai", f"tsai.models.{path}", SERIES, shown, c_in=4, c_out=3, **options)


def _others() -> Iterator[tuple[str, Network]]:
    yield _called("ultralytics", "ultralytics.nn.modules.CBAM", FEATURES, c1=32)
    yield _of("ultralytics", "a detector with CBAM", IMAGE, _yolo)
    yield _called(
        "vit_pytorch", "vit_pytorch.max_vit.MaxViT", (1, 3, 224, 224), num_classes=4, dim=16, depth=(1, 1), dim_head=8
    )
    gates = "ChannelGate2d SpatialGate2d SpatialGate2dV2 ChannelSpatialGate2d ChannelSpatialGate2dV2"
    for name in gates.split():
        yield _called("pytorch_toolbelt", f"pytorch_toolbelt.modules.scse.{name}", FEATURES, channels=32)
    yield _called("pytorch_toolbelt", "pytorch_toolbelt.modules.srm.SRMLayer", FEATURES, channels=32)
    sharp = "spandrel.architectures"
    yield _called("spandrel", f"{sharp}.RCAN.__arch.rcan_arch.RCAN", SMALL, n_resgroups=2, n_resblocks=3, n_feats=32)
    yield _called(
        "spandrel",
        f"{sharp}.NAFNet.__arch.NAFNet_arch.NAFNet",
        SMALL,
        width=8,
        enc_blk_nums=[1, 1],
        dec_blk_nums=[1, 1],
    )
    yield _called("spandrel", f"{sharp}.SAFMN.__arch.safmn.SAFMN", SMALL, dim=32, n_blocks=2)
    for name, options in {
        "Rcan": {"n_resgroups": 2, "n_resblocks": 3, "n_feats": 32},
        "Han": {"n_resgroups": 2, "n_resblocks": 3},
        "Pan": {},
        "A2n": {},
        "Drn": {},
        "Awsrn": {},
        "Msrn": {},
        "Carn": {},
        "Drln": {},
    }.items():
        yield _of("super_image", name, SMALL, lambda name=name, options=options: _sharper(name, options))


def _sharper(name: str, options: dict[str, Any]) -> nn.Module:
    package = import_host("super_image")
    return getattr(package, f"{name}Model")(getattr(package, f"{name}Config")(scale=2, **options))


def _yolo() -> nn.Module:
    backbone = [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "CBAM", [32]],
        [-1, 1, "C2f", [32, True]],
    ]
    head = [[[2, 3], 1, "Detect", [4]]]
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return tasks.DetectionModel({"nc": 4, "backbone": backbone, "head": head, "ch": 3}, verbose=False)


def stands_in_for(name: str) -> None:
    """Something empty to import where a package's own library does not load: none of the networks call it."""
    if name not in sys.modules:
        sys.modules[name] = module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
