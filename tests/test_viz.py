"""The gates that `fused_attn.viz` collects are the reference's, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import reference, viz
from fused_attn.fusion.changing.plan import plan_of
from fused_attn.hosts import UnknownModel, build_model

CHANNELS = 16

#: name -> (class name, options)
BLOCKS = {
    "se": ("SqueezeExcite", {"reduction": 4}),
    "se, both pools at once": ("SqueezeExcite", {"reduction": 4, "pool": "avgmax"}),
    "effective se": ("EffectiveSE", {}),
    "eca": ("ECA", {}),
    "eca, circular": ("ECA", {"padding": "circular"}),
    "channel attention": ("ChannelAttention", {"reduction": 4}),
    "spatial attention": ("SpatialAttention", {}),
    "spatial attention, no norm": ("SpatialAttention", {"batch_norm": False, "bias": True, "order": ("mean", "max")}),
    "gather-excite": ("GatherExcite", {}),
    "cbam": ("CBAM", {"reduction": 4}),
    "cbam, channels only": ("CBAM", {"reduction": 4, "no_spatial": True}),
}


def make(name: str, library=reference) -> nn.Module:
    """One of the blocks; its BatchNorm has seen something."""
    torch.manual_seed(0)
    kind, options = BLOCKS[name]
    block = getattr(library, kind)(CHANNELS, **options)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.3
            module.running_var *= 2.0
    return block.eval()


def network(block: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, CHANNELS, 3), block, nn.Conv2d(CHANNELS, 4, 1))


def ratio(block: nn.Module, x: Tensor) -> Tensor:
    """y / x: the gate of a block, as the block itself applies it, at every position."""
    with torch.no_grad():
        return block(x) / x


@pytest.mark.parametrize("how", ["original", "fused", "nn"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gates_are_what_the_reference_multiplies_by(name, how):
    expected = network(make(name)).double().eval()
    model = network(make(name, fused_attn.nn if how == "nn" else reference)).double().eval()
    if how == "fused":
        fused_attn.fuse(model)
        assert plan_of(model[1]) is not None
    image = torch.randn(2, 3, 12, 10, dtype=torch.float64)
    (found,) = viz.attention_maps(model, image)
    assert found.name == "1" and found.block
    x = expected[0](image).detach()
    gate = torch.ones_like(x)
    if found.channel is not None:
        assert found.channel.shape == (2, CHANNELS)
        gate = gate * found.channel[:, :, None, None]
    if found.spatial is not None:
        assert found.spatial.shape == (2, 1, 10, 8)
        gate = gate * found.spatial
    torch.testing.assert_close(gate, ratio(expected[1], x))
    kind = BLOCKS[name][0]
    assert (found.channel is None) == (kind == "SpatialAttention")
    assert (found.spatial is None) == (kind not in ("SpatialAttention", "CBAM") or name == "cbam, channels only")


@pytest.mark.parametrize("name", ["se", "eca", "channel attention", "spatial attention"])
def test_gates_are_those_that_blocks_return_alone(name):
    kind, options = BLOCKS[name]
    alone = getattr(reference, kind)(CHANNELS, **options, return_gate=True).eval()
    block = make(name)
    alone.load_state_dict(block.state_dict())
    model = fused_attn.fuse(network(block))
    image = torch.randn(2, 3, 12, 10)
    (found,) = viz.attention_maps(model, image)
    gate = found.spatial if found.channel is None else found.channel[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(gate, alone(model[0](image)))


def test_the_parts_of_cbam_are_those_of_its_parts():
    model = fused_attn.fuse(network(make("cbam")))
    (found,) = viz.attention_maps(model, image := torch.randn(2, 3, 12, 10))
    cbam = make("cbam")
    x = model[0](image).detach()
    between = cbam.channel(x)
    torch.testing.assert_close(found.channel[:, :, None, None].expand_as(x), (between / x).detach())
    torch.testing.assert_close(found.spatial.expand_as(x), (cbam.spatial(between) / between).detach())


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:resnet10t+se"])
def test_gates_in_tails(name):
    """Those of the network that was not fused; the tails run fused again when it is done."""
    torch.manual_seed(0)
    try:
        model = build_model(name).eval()
    except UnknownModel as error:
        pytest.skip(str(error))
    image = torch.randn(1, 3, 32, 32)
    expected = viz.attention_maps(model, image)
    for first in (True, False):  # attention that was fused by itself before
        fused_attn.fuse(model, tails=not first)
        found = viz.attention_maps(model, image)
        assert [m.name for m in found] == [m.name for m in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.block == theirs.block and mine.spatial is None
            torch.testing.assert_close(mine.channel, theirs.channel, rtol=1e-3, atol=1e-4)
    report = fused_attn.explain(model)
    assert all(row.fused for row in report) and any("BatchNorm" in row.block for row in report)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["timm:resnet26+cbam", "timm:resnet26+lcbam"])
def test_a_network(name, fused):
    """Every block's gates are what it multiplied its own input by in the same pass."""
    torch.manual_seed(0)
    try:
        model = build_model(name)
    except UnknownModel as error:
        pytest.skip(str(error))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = model.double().eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    blocks = {f"layer{i}.{j}.se" for i in range(1, 5) for j in range(2)}
    if fused:
        fused_attn.fuse(model)
    for block in blocks:
        model.get_submodule(block).register_forward_hook(
            lambda module, args, output, block=block: seen.update(
                {block: (args[0], output.clone())}
            )  # the residual is added in place
        )
    maps = viz.attention_maps(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert [m.name for m in maps] == sorted(blocks)
    for m in maps:
        x, y = seen[m.name]
        torch.testing.assert_close(x * m.channel[:, :, None, None] * m.spatial, y)


def test_the_model_is_left_as_it_was():
    model = fused_attn.fuse(network(make("cbam"))).train()
    model[1].spatial.eval()  # frozen, as some trainings have it
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    (found,) = viz.attention_maps(model, torch.randn(2, 3, 12, 10))
    assert not found.channel.requires_grad and not found.spatial.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_when_it_fails():
    model = fused_attn.fuse(network(make("se"))).train()
    with pytest.raises(RuntimeError):
        viz.attention_maps(model, torch.randn(2, 5, 12, 10))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_hook_is_left_when_one_cannot_be_hung_in(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no hooks here")

    model = nn.Sequential(make("eca"), make("eca")).train()
    monkeypatch.setattr(model[1], "register_forward_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        viz.attention_maps(model, torch.randn(1, CHANNELS, 6, 6))
    assert not model[0]._forward_pre_hooks and model.training


def test_a_block_that_runs_twice_is_there_twice():
    block = make("eca")
    maps = viz.attention_maps(nn.Sequential(block, block), torch.randn(1, CHANNELS, 6, 6))
    assert [m.name for m in maps] == ["0", "0"]
    assert not torch.equal(maps[0].channel, maps[1].channel)


def test_nothing_to_show():
    with pytest.raises(ValueError, match="none that fuse"):
        viz.attention_maps(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(TypeError, match="expected an nn.Module"):
        viz.attention_maps("resnet50", torch.randn(1, 3, 4, 4))


def test_show(tmp_path):
    pytest.importorskip("matplotlib")
    np = pytest.importorskip("numpy")
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2), make("cbam"), make("se"), make("spatial attention"))
    photograph = np.random.default_rng(0).random((20, 30, 3), dtype="float32")
    maps = viz.attention_maps(model, viz.network_input(photograph))
    path = tmp_path / "maps.png"
    figure = viz.show(photograph, maps, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    image, *panels = [ax for ax in figure.axes if ax.get_title()]
    assert image.get_title() == "image"
    assert [ax.get_title().split(" gate")[0] for ax in panels] == [
        "1\nchannel",
        "1\nspatial",
        "2\nchannel",
        "3\nspatial",
    ]
    np.testing.assert_array_equal(panels[0].lines[0].get_ydata(), maps[0].channel[0].numpy())
    under, over = panels[1].images
    np.testing.assert_array_equal(over.get_array(), maps[0].spatial[0, 0].numpy())
    assert list(over.get_extent()) == list(under.get_extent())
    with pytest.raises(ValueError, match="at least one"):
        viz.show(photograph, [])


def test_show_another_sample():
    pytest.importorskip("matplotlib")
    np = pytest.importorskip("numpy")
    maps = viz.attention_maps(network(make("cbam")), torch.rand(3, 3, 12, 10))
    panels = [ax for ax in viz.show(np.zeros((12, 10, 3)), maps, sample=1).axes if ax.get_title()][1:]
    channel, spatial = maps[0].channel[1], maps[0].spatial[1, 0]
    np.testing.assert_array_equal(panels[0].lines[0].get_ydata(), channel.numpy())
    np.testing.assert_array_equal(panels[1].images[1].get_array(), spatial.numpy())
    assert f"{channel.min():.3g} to {channel.max():.3g}" in panels[0].get_title()


def test_photographs(tmp_path):
    io = pytest.importorskip("skimage.io")
    np = pytest.importorskip("numpy")
    cat = viz.photograph(size=40)
    assert cat.shape == (40, 40, 3) and cat.dtype == np.float32 and 0 <= cat.min() < cat.max() <= 1
    colours = np.zeros((8, 12, 4), dtype="uint8")
    colours[:, 2:10], colours[..., 3] = (255, 51, 0, 255), 255  # the middle square has one colour
    io.imsave(tmp_path / "colours.png", colours, check_contrast=False)
    io.imsave(tmp_path / "grey.png", np.full((9, 9), 51, dtype="uint8"), check_contrast=False)
    np.testing.assert_allclose(viz.photograph(tmp_path / "colours.png", 4), np.tile([1, 0.2, 0], (4, 4, 1)), atol=1e-5)
    np.testing.assert_allclose(viz.photograph(tmp_path / "grey.png", 4), np.full((4, 4, 3), 0.2), atol=1e-5)
    expected = (torch.tensor([1, 0.2, 0]) - torch.tensor(viz.MEAN)) / torch.tensor(viz.STD)
    image = viz.network_input(viz.photograph(tmp_path / "colours.png", 4))
    torch.testing.assert_close(image, expected.reshape(1, 3, 1, 1).expand(1, 3, 4, 4))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="not an image"):
        viz.photograph(tmp_path / "text.png")
    with pytest.raises(ValueError, match="no such file"):
        viz.photograph(tmp_path / "none.png")


@pytest.mark.parametrize("how", ["original", "fused", "nn"])
def test_blocks_with_other_gates_are_passed_over(how):
    library = fused_attn.nn if how == "nn" else reference
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), library.SimAM(), make("cbam", library))
    if how == "fused":
        fused_attn.fuse(model)
    assert [m.name for m in viz.attention_maps(model, torch.rand(1, 3, 12, 12))] == ["2"]
