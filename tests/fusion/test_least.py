"""fuse(model, tails=True, save="least"): what a BatchNorm and what stands behind it gave to a layer is not kept for the
backward of that layer, but made again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from fused_attn import explain, fuse, keep_operators, unfuse
from fused_attn.bench.memory import kept_by_model, kept_bytes
from fused_attn.fusion.changing.swap import save_of
from fused_attn.hosts import UnknownModel, build_model
from fused_attn.ops import remake
from tests.checks import assert_same_block, in_layout, random, randomised
from tests.fusion.test_tails import BLOCKS, X, bottleneck, drop_path, timm_resnet

least = functools.partial(fuse, tails=True, save="least")
FLOAT = 4


def chain(blocks: int = 3, **options) -> nn.Sequential:
    """Bottlenecks, 64 channels and 16 inside."""
    return nn.Sequential(*(bottleneck(**options) for _ in range(blocks))).double().train()


def both(model: nn.Module) -> list[nn.Module]:
    """The same network as it keeps all, and the least."""
    return [fuse(copy.deepcopy(model), tails=True), least(copy.deepcopy(model))]


def gradients(model: nn.Module, x: Tensor, forward=None) -> list[Tensor]:
    """Output, gradients and buffers of a step."""
    x = x.clone().requires_grad_()
    y = model(x) if forward is None else forward(x)
    y.backward(random(*y.shape, seed=1).to(y.dtype))
    return [y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def remakes(monkeypatch):
    """The shapes of maps that were made again."""
    made = []
    original = remake.Remake.__init__

    def init(self, y, node, make):
        def counted(*saved):
            again = make(*saved)
            made.append(tuple(again.shape))
            return again

        original(self, y, node, counted)

    monkeypatch.setattr(remake.Remake, "__init__", init)
    return made


@pytest.mark.parametrize(
    ("name", "other", "most"),
    [("timm:seresnet50", "timm:resnet50", 0.85), ("timm:efficientnet_b0", "timm:efficientnet_b0", 0.45)],
)
def test_bytes_of_a_network(name, other, most):
    """Beside its backbone or itself, as eager keeps them."""
    try:
        plain, model = build_model(other), build_model(name)
    except UnknownModel as error:
        pytest.skip(str(error))
    x = torch.randn(2, 3, 96, 96)
    assert kept_by_model(least(model), x) <= most * kept_by_model(plain, x)


def test_bytes_of_a_chain():
    """Of a bottleneck the inputs of three BatchNorms, and every second sum: of these three the second one is made again
    from its shortcut, the first, which is made of the input."""
    x = torch.randn(4, 64, 9, 9)
    plain, model = (m.float() for m in both(chain()))
    wide, narrow = FLOAT * x.numel(), FLOAT * x.numel() // 4
    kept = [kept_bytes(lambda m=m: m(x), x, *m.parameters(), *m.buffers()) for m in (plain, model)]
    small = 0.1 * 3 * wide  # bits, and numbers a channel
    # The first block's sum is made again from x; the last one's is kept by nobody.
    assert 0 <= kept[0] - (3 * (wide + 4 * narrow) + 2 * wide) <= small
    assert 0 <= kept[1] - (3 * (wide + 2 * narrow) + wide) <= small


def test_what_is_made_again_is_made_once(remakes):
    model, x = least(chain()), X
    gradients(model, x)
    assert sorted(remakes) == sorted(3 * 2 * [(3, 16, 5, 4)] + [(3, 64, 5, 4)])


def test_two_layers_share_what_is_made_again(remakes):
    """A sum goes to the next block's convolution and to its shortcut's."""
    resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
    last = resnet.Bottleneck(64, 16, stride=2, downsample=resnet.downsample_conv(64, 64, 1, stride=2), attn_layer="se")
    model = nn.Sequential(*chain(1), randomised(last)).double().train()
    plain, model = both(model)
    assert_equal(gradients(model, X), gradients(plain, X))
    assert remakes.count((3, 64, 5, 4)) == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_it_was(name):
    """To the bit what is made where all is kept, and in float64 the original; every second one in channels_last."""
    make, channels, rank, _ = BLOCKS[name]
    layout = "channels_last" if list(BLOCKS).index(name) % 2 else "nchw"
    original = randomised(make()).double().train()
    x = in_layout(random(3, channels, *(6, 4, 5)[:rank], dtype=torch.float64), layout)
    plain, model = both(original)
    assert_same_block(model, original, x, training=True)
    assert_equal(gradients(model, x), gradients(plain, x))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_a_chain_is_the_original(activation):
    model = chain(4, act_layer=activation)
    assert_same_block(least(copy.deepcopy(model)), model, X, training=True)
    assert_same_block(least(copy.deepcopy(model)), model, X, training=False)


def test_running_statistics_in_training():
    """BatchNorms that were frozen by eval() and are trained through: their results are not kept either."""
    original = chain(2)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    plain, model = both(original)
    kept = [kept_bytes(lambda m=m: m(X), *m.parameters(), *m.buffers()) for m in (plain, model)]
    assert kept[1] <= 0.9 * kept[0]
    for mine, theirs in zip(gradients(model, X), gradients(original, X), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_frozen_parameters(remakes):
    plain, model = both(chain(2))
    for m in (plain, model):
        for parameter in (*m[0].parameters(), *m[1].bn2.parameters()):
            parameter.requires_grad_(False)
    found = []
    for m in (plain, model):
        m(X).square().sum().backward()
        found.append([p.grad for p in m.parameters() if p.requires_grad])
    assert_equal(*found)
    assert remakes


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training):
    original = chain(3).float().train(training)
    plain, model = both(original)
    x, found, kept = random(4, 64, 6, 6), [], []
    for m in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(kept_bytes(lambda m=m: m(x), *m.parameters(), *m.buffers()))

        def forward(x: Tensor, m: nn.Module = m) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return m(x)

        found.append(gradients(m, x, forward))
    if training:
        assert kept[1] < kept[0]
        assert_equal(*found)
    else:
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def again(layers, x: Tensor, **options) -> Tensor:
    return checkpoint(layers, x, use_reentrant=False, **options)


def keeps_convolutions(ctx, op, *args, **kwargs):
    is_one = op == torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_one else CheckpointPolicy.PREFER_RECOMPUTE


#: (model of four blocks, x) -> y
REGIONS = {
    "blocks": lambda m, x: functools.reduce(lambda x, block: again(block, x), m, x),
    "blocks, reentrant": lambda m, x: functools.reduce(lambda x, block: checkpoint(block, x, use_reentrant=True), m, x),
    "all": lambda m, x: again(m, x),
    "all, to its end": lambda m, x: again(m, x, early_stop=False),
    "one of them": lambda m, x: m[2:](again(m[1], m[0](x))),
    "halves": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False),
    "a half, and in it blocks": lambda m, x: m[2:](again(lambda x: again(m[1], again(m[0], x)), x)),
    "beside one that is not": lambda m, x: m[3](again(m[1], y := m[0](x)) + m[2](y)),
    "selective": lambda m, x: again(
        m, x, context_fn=functools.partial(create_selective_checkpoint_contexts, keeps_convolutions)
    ),
}


@pytest.mark.parametrize("region", REGIONS)
def test_checkpoints(region):
    forward = REGIONS[region]
    plain, model = both(chain(4))
    found, expected = (gradients(m, X, lambda x, m=m: forward(m, x)) for m in (model, plain))
    assert_equal(found, expected)


def test_hooks_on_what_is_saved():
    """Of others, as they offload: they see what is kept, and no map that is made again."""
    plain, model = both(chain())
    x, seen = X, []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t.clone()

    def hooked(x):
        with saved_tensors_hooks(pack, lambda t: t):
            return model(x)

    def offloaded(x):
        with save_on_cpu():
            return model(x)

    steps = 2 + len(list(model.parameters()))  # without the statistics, which move on
    expected = gradients(plain, x)[:steps]
    assert_equal(gradients(model, x, hooked)[:steps], expected)
    convolutions = [tuple(p.shape) for name, p in model.named_parameters() if "conv" in name]
    assert all(shape in map(tuple, seen) for shape in convolutions)
    model.zero_grad()
    assert_equal(gradients(model, x, offloaded)[:steps], expected)


@pytest.mark.parametrize("around", [save_on_cpu, lambda: disable_saved_tensors_hooks("none here")])
def test_what_is_around_half_of_a_network(around):
    def halves(x, model):
        x = model[:2](x)
        with around():
            return model[2:](x)

    plain, model = both(chain(4))
    assert_equal(gradients(model, X, lambda x: halves(x, model)), gradients(plain, X))


def test_retained_graphs_and_parts_of_one():
    plain, model = both(chain(2))
    found = []
    for m in (plain, model):
        x = X.clone().requires_grad_()
        loss = m(x).square().sum()
        part = torch.autograd.grad(loss, m[1].conv2.weight, retain_graph=True)
        (other,) = torch.autograd.grad(loss, m[1].conv1.weight, retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([*part, other, x.grad, *(p.grad for p in m.parameters())])
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()
    assert_equal(*found)


def test_gradients_of_gradients():
    original = chain(2)
    found = []
    for m in (original, least(copy.deepcopy(original))):
        x = X.clone().requires_grad_()
        grads = torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()], create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        found.append([x.grad, *(p.grad for p in m.parameters())])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("path", ["bn2.weight", "bn1.bias", "conv2.weight", "conv3.weight"])
def test_a_parameter_that_is_changed_before_backward(path):
    model = least(chain(1))
    loss = model(X.clone().requires_grad_()).square().sum()
    with torch.no_grad():
        model[0].get_parameter(path).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_that_is_changed_before_backward():
    """Of a BatchNorm, which somebody got hold of."""
    model, inputs = least(chain(1)), []
    model[0].conv1.register_forward_hook(lambda _, args, y: inputs.append(y))
    loss = model(X).square().sum()
    inputs[0].detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_map_that_is_changed_behind_the_layer_that_it_went_to():
    """Where the layer keeps the map its backward raises; here its gradient is that of what it was called with."""
    plain, model = both(chain(1))
    expected = gradients(plain, X)

    def change(layer, args, y):
        args[0].detach().add_(1)

    for m in (plain, model):
        m[0].conv2.register_forward_hook(change)
    assert_equal(gradients(model, X), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(plain, X)


@pytest.mark.parametrize("change", [lambda y: y.data.mul_(2), lambda y: y.detach().mul_(2), lambda y: y.mul_(2)])
def test_a_map_that_is_changed_in_front_of_the_layer(change):
    """By a hook, seen by autograd or not: the layer keeps what it was called with."""
    original = chain(1)
    found = []

    def hook(_, args):
        change(args[0])

    for m in both(original):
        m[0].conv2.register_forward_pre_hook(hook)
        found.append(gradients(m, X))
    assert_equal(*found)


def test_a_map_that_is_changed_between_two_layers():
    """By a hook on the layer in front of it, that nothing is computed by."""
    found = []

    def hook(layer, args, y):
        y.detach().mul_(2)

    for m in both(chain(1)):
        m[0].aa.register_forward_hook(hook)
        found.append(gradients(m, X))
    assert_equal(*found)


def test_hooks_are_called():
    calls = []
    model = least(chain(1))
    block = model[0]
    block.conv2.register_forward_hook(lambda *_: calls.append("forward"))
    block.conv2.register_full_backward_hook(lambda *_: calls.append("backward"))
    block.conv3.register_forward_pre_hook(lambda *_: calls.append("before"))
    expected = gradients(fuse(chain(1), tails=True), X)
    assert_equal(gradients(model, X), expected)
    assert sorted(calls) == ["backward", "before", "forward"]


def test_dropped_paths():
    original = chain(3, drop_path=drop_path(0.5))
    found = []
    for m in both(original):
        torch.manual_seed(3)
        found.append(gradients(m, X))
    assert_equal(*found)


def test_parametrised_weights():
    """What they are computed from is kept as autograd does."""
    found = []
    for m in both(chain(2)):
        for block in m:
            torch.nn.utils.parametrizations.weight_norm(block.conv2)
        found.append(gradients(m, X))
    assert_equal(*found)


def test_threads():
    model, x = least(chain(2)).float(), X.float()
    copies = [copy.deepcopy(model) for _ in range(2)]
    expected = gradients(copy.deepcopy(model), x)
    found: list = [None, None]

    def run(i: int) -> None:
        for _ in range(5):
            copies[i].load_state_dict(model.state_dict())
            copies[i].zero_grad()
            found[i] = gradients(copies[i], x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        assert_equal(result, expected)


def test_nothing_is_left_when_the_graph_is():
    """Neither after a backward nor where there was none."""

    def maps() -> dict[int, Tensor]:
        gc.collect()
        return {id(o): o for o in gc.get_objects() if type(o) is Tensor and o.dim() == 4 and o.shape[0] == 3}

    model, x = least(chain(2)), X
    before = maps()
    for _ in range(2):
        model(x)
        model(x).sum().backward()
    assert maps().keys() == before.keys()


def test_no_cycle_keeps_a_graph():
    """Maps are freed with the graph, not when Python next looks for cycles."""
    model, inputs = least(chain(2)), []
    model[0].conv2.register_forward_hook(lambda _, args, y: inputs.append(weakref.ref(y.untyped_storage())))
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            y = model(X)
            if backward:
                y.sum().backward()
            del y
            assert inputs.pop()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_the_least_too(copied):
    model = least(chain(2))
    other = copied(model)
    assert [save_of(block) for block in other] == ["least", "least"]
    assert list(other.state_dict()) == list(chain(2).state_dict())
    assert [save_of(block) for block in copied(fuse(chain(2), tails=True))] == ["all", "all"]
    assert_equal(gradients(other, X), gradients(model, X))


def test_fusing_again():
    """Says what tails save that are there; without tails nothing is said of them."""
    model = fuse(chain(2), tails=True)
    assert [save_of(block) for block in least(model)] == ["least", "least"]
    assert [save_of(block) for block in fuse(model)] == ["least", "least"]
    model[0].bn1 = copy.deepcopy(model[0].bn1)  # planned anew
    assert [save_of(block) for block in fuse(model)] == ["least", "least"]
    assert [save_of(block) for block in fuse(model, tails=True)] == ["all", "all"]
    assert not any("_fused_attn_plan" in m.__dict__ for m in unfuse(model).modules())


def test_explain_says_so():
    model = chain(1)
    (row,) = explain(fuse(model, tails=True))
    (other,) = explain(least(model))
    assert other == dataclasses.replace(row, block=f"{row.block}; saves the least")


def test_errors():
    with pytest.raises(ValueError, match="save: expected one of all, least; got 'most'"):
        fuse(chain(1), tails=True, save="most")
    with pytest.raises(ValueError, match="save: expected 'all', which is all there is of tails=False; got 'least'"):
        fuse(chain(1), save="least")
    program = torch.export.export(nn.ReLU(), (X,))
    with pytest.raises(ValueError, match="save: expected 'all', which is all there is of a program"):
        fuse(program, tails=True, save="least")


def test_compiles_in_one_graph():
    """The compiler decides what it keeps, and asked for less by its own option makes our operators' maps again."""
    model = least(timm_resnet("BasicBlock", 8, attn_layer="se")).train()
    other, x = copy.deepcopy(model), random(2, 8, 6, 5)
    tails = fuse(copy.deepcopy(model), tails=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        for mine, theirs in zip(gradients(model, x, compiled), gradients(other, x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        kept = [kept_bytes(lambda m=m: m(x), x, *model.parameters(), *tails.parameters()) for m in (compiled, tails)]
    assert kept[0] < 0.8 * kept[1]


def test_exports():
    model = least(chain(1)).eval()
    with keep_operators():
        program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), model(X))
