"""What the attention blocks of a network let through: their gates on an image, and a picture of them.

`show` and `photograph` need matplotlib and scikit-image: pip install '.[bench]' in a clone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codes import FUNCTIONS
from .fusion.api import candidates, is_own
from .fusion.changing.plan import intact, plan_of
from .fusion.hosts.own import own_recipe
from .fusion.recipes.describe import describe
from .fusion.recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate
from .qualification.calls import modes_kept
from .reference import GatherExcite
from .reference.channel_gate import channel_logits
from .reference.channel_pool import channel_pool
from .reference.squeeze import per_channel, squeeze

#: Mean and standard deviation of ImageNet's colours, which most networks expect to be taken out.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AttentionMap:
    """The gates of one block in one call.

    name: the block's, in the model. block: what it is, as in `explain`. channel: (B, C), None where it has no channel
    gate. spatial: (B, 1, *spatial), None where it has no spatial gate.
    """

    name: str
    block: str
    channel: Tensor | None
    spatial: Tensor | None


def attention_maps(model: nn.Module, image: Tensor) -> list[AttentionMap]:
    """The gates of every attention block in one forward pass, in the order in which the blocks run.

    These are the blocks that `fuse` knows, fused or not yet, those in tails that it fused, and those of
    `fused_attn.nn`; one that `explain` says was
    left alone has none. The pass is in eval mode and without gradients, and the model is left as it was. A gate is
    computed again, in plain PyTorch, from what its block is given, because the fused block does not hand it out: a pass
    or two over each map.

    Args:
        model: any module; before `torch.compile`, which would not see the hooks that this hangs in for the call.
        image: what the model takes, such as (B, 3, H, W).

    Raises:
        TypeError: model is no `nn.Module`.
        ValueError: no block that it knows ran.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    maps: list[AttentionMap] = []

    def listen(name: str, block: nn.Module, recipe: Recipe) -> Any:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("x", next(iter(kwargs.values()), None))
            if isinstance(x, Tensor) and recipe.rank in (None, x.dim()):
                maps.append(AttentionMap(name, describe(block, recipe), *gates(block, recipe, x)))

        return block.register_forward_pre_hook(hook, with_kwargs=True)

    known = [(name, block, recipe) for name, block, found, *_ in candidates(model) if (recipe := _recipe(block, found))]
    with contextlib.ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        for name, block, recipe in known:
            stack.callback(listen(name or "(the model)", block, recipe).remove)
        stack.enter_context(torch.no_grad())
        model.eval()
        model(image)
    if not maps:
        why = "the model has none that fuse() knows" if not known else "none was called (is the model compiled?)"
        raise ValueError(f"no attention block to show: {why}")
    return maps


def _recipe(block: nn.Module, found: Recipe | str | None) -> Recipe | None:
    """What a block runs; None: it is no attention block, or runs a forward of its own."""
    if is_own(block):
        return own_recipe(block)
    plan = plan_of(block)
    if plan is not None:
        found = plan.recipe if intact(block, plan) else None
    if isinstance(found, OwnLayers) and isinstance(block, GatherExcite):  # which looks at its map before it runs one
        return own_recipe(block)
    # What is OwnLayers has no gate that is one number a channel or position, or it is not known here.
    return None if isinstance(found, (str, OwnLayers)) else found


def gates(block: nn.Module, recipe: Recipe, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The channel gate, (B, C), and the spatial gate, (B, 1, *spatial), of a block on x, in plain PyTorch."""
    if isinstance(recipe, CbamGate):
        channel = _channel(block, recipe.channel, x)
        return channel, _spatial(block, recipe.spatial, x * per_channel(channel, x))
    if isinstance(recipe, SpatialGate):
        return None, _spatial(block, recipe, x)
    assert not isinstance(recipe, OwnLayers), "`_recipe` leaves these out"
    return _channel(block, recipe, x), None


def _channel(block: nn.Module, recipe: ChannelGate | SplitGate, x: Tensor) -> Tensor:
    if isinstance(recipe, SplitGate):
        pooled = squeeze(x, recipe.pool, ties=recipe.ties)
        descriptor = pooled if isinstance(pooled, Tensor) else 0.5 * pooled[0] + 0.5 * pooled[1]
        return recipe.excite(block, descriptor).flatten(1)
    paths = (recipe.weight1, recipe.bias1, recipe.weight2, recipe.bias2)
    logits = channel_logits(
        x,
        *(None if path is None else attrgetter(path)(block) for path in paths),
        layer=recipe.layer,
        pool=recipe.pool,
        ties=recipe.ties,
        activation=recipe.activation,
    )
    return FUNCTIONS[recipe.gate](logits)


def _spatial(block: nn.Module, recipe: SpatialGate, x: Tensor) -> Tensor:
    z = channel_pool(x, order=recipe.order, ties=recipe.ties)
    if recipe.merged:
        z = z.mean(1, keepdim=True)
    for path in recipe.layers:
        z = block.get_submodule(path)(z)
    return FUNCTIONS[recipe.gate](z)


def photograph(path: str | Path | None = None, size: int = 224) -> Any:
    """An image file as an array (size, size, 3) of float32 from 0 to 1: its middle square, resized.

    Args:
        path: what scikit-image reads; None: the cat that comes with it.
        size: the side of the square.

    Raises:
        ValueError: there is no such file, or no photograph in it.
    """
    from skimage.color import gray2rgb, rgba2rgb
    from skimage.data import chelsea
    from skimage.io import imread
    from skimage.transform import resize
    from skimage.util import img_as_float32

    if path is None:
        image = chelsea()
    elif not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    else:
        try:
            image = imread(path)
        except Exception as error:  # its readers raise what they like
            raise ValueError(f"{path}: not an image that scikit-image reads ({type(error).__name__})") from None
    if image.ndim == 2:
        image = gray2rgb(image)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"{path}: expected an image in grey or colour; got an array of shape {image.shape}")
    image = img_as_float32(image)
    if image.shape[2] == 4:
        image = rgba2rgb(image)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    return resize(square, (size, size), anti_aliasing=True).clip(0, 1).astype("float32")


def network_input(photograph: Any, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """A photograph (H, W, 3) from 0 to 1 as networks take it: (1, 3, H, W), normalised by colour."""
    image = torch.as_tensor(photograph, dtype=torch.float32)
    return ((image - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None].contiguous()


def show(image: Any, maps: Sequence[AttentionMap], path: str | Path | None = None, *, sample: int = 0) -> Any:
    """Draw the photograph, every spatial gate laid over it, and every channel gate as a point a channel.

    Colours go from the least to the most of each spatial gate, which its title gives.

    Args:
        image: what matplotlib draws, such as `photograph()`: (H, W, 3) from 0 to 1, or (H, W).
        maps: of `attention_maps`.
        path: where to write the picture, if anywhere; its suffix says the format.
        sample: which image of the batch.

    Returns:
        The matplotlib `Figure`.

    Raises:
        ValueError: there is nothing to draw, or a spatial gate is not over two axes.
    """
    from matplotlib.figure import Figure

    panels = [
        (m, kind, gate) for m in maps for kind in ("channel", "spatial") if (gate := getattr(m, kind)) is not None
    ]
    if not panels:
        raise ValueError("maps: expected at least one; got none")
    for m, kind, gate in panels:
        if kind == "spatial" and gate.dim() != 4:
            raise ValueError(f"maps: expected spatial gates (B, 1, H, W); got {tuple(gate.shape)} of {m.name}")
    height, width = image.shape[:2]
    columns = min(6, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    axes[0].imshow(image, cmap="gray")
    axes[0].set_title("image", fontsize=7)
    axes[0].set_axis_off()
    for ax, (m, kind, gate) in zip(axes[1:], panels, strict=False):
        values = gate[sample].detach().float().cpu()
        ax.set_title(f"{m.name}\n{kind} gate, {values.min():.3g} to {values.max():.3g}", fontsize=7)
        if kind == "channel":
            ax.plot(values.numpy(), ".", markersize=2, color="#d62728")
            ax.tick_params(labelsize=6)
            ax.set_box_aspect(height / width)
        else:
            ax.imshow(image, cmap="gray")
            over = {"cmap": "inferno", "alpha": 0.6, "interpolation": "bilinear"}
            ax.imshow(values[0].numpy(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), **over)
            ax.set_axis_off()
    for ax in axes[len(panels) + 1 :]:
        ax.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure
