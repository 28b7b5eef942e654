"""The shell command as a user meets it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import fused_attn
from fused_attn import backends, cli, demo, info, verify
from fused_attn.bench import blocks, models
from fused_attn.bench.measure import Figure, Timing, copy_bandwidth, geometric_means
from fused_attn.fusion.recipes.names import host_class
from fused_attn.hosts import build_model

PNG = b"\x89PNG"


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(cli.console, "_width", 200)


@pytest.fixture(autouse=True)
def console_writes_where_click_looks(monkeypatch):
    """rich keeps the stream it was made with; click's runner swaps sys.stdout for each call."""
    monkeypatch.setattr(cli.console, "_file", None)


@pytest.mark.parametrize("command", ["demo", "verify", "bench", "fuse", "qualify", "attention", "info"])
def test_help(command):
    assert "--help" in run(command, "--help")
    assert "..." not in run("--help").partition("Commands:")[2]  # each in a line of its own, whole


def test_info(monkeypatch):
    """One screen of a terminal, if there is no GPU; whole words, no rule or name of a column without need."""
    monkeypatch.setattr(cli.console, "_width", 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = run("info")
    lines = text.splitlines()
    assert len(lines) <= 25 and all(len(line) <= 80 for line in lines), text
    assert lines[0].rstrip() == "what is here" and lines[1].startswith("versions  "), text
    assert f"torch {torch.__version__}" in text
    for family in info.FAMILIES:
        (line,) = (line for line in lines if line.startswith(family))
        assert len(line.split(family)[1].split()) >= 2, line  # what serves it, and why
    assert "served by" not in text and "on request" not in text


def test_info_on_everything():
    text = run("info", "--all")
    assert all(text.count(f"\n{op} ") >= 2 for op in backends.OPS)  # on each of two devices
    assert str(backends.LIBRARY_PATH) in text and "serves cuda tensors only" in text
    record = json.loads(run("info", "--json"))
    assert set(record) == {"versions", "devices", "built", "families", "serving", "measured"}
    assert len(record["serving"]) == 2 * len(backends.OPS)


def test_info_says_why_in_words(monkeypatch):
    """On a card that nothing is known of, and where the library is missing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_VERDICTS", {})
    why = "the native library does not load: too short"
    monkeypatch.setattr(backends, "LIBRARY_ERROR", why)
    monkeypatch.setattr(cli, "LIBRARY_ERROR", why)
    for op in backends.OPS:
        monkeypatch.setitem(backends.UNAVAILABLE, ("cpu", op, "cpu"), why)
    for op in ("squeeze", "scale", "simam"):
        monkeypatch.setitem(backends.SHIPPED, (op, "cuda"), ("triton", "2.0 to 3.0x: simam in benchmarks"))
        monkeypatch.setitem(backends.UNAVAILABLE, ("triton", op, "cuda"), None)
    found = {(device, family): (by, reason) for device, family, by, reason in info.families()}
    assert found["cpu", "CBAM"] == ("plain PyTorch", why)
    assert found["cuda", "SimAM"] == ("Triton", "2.0 to 3.0x")
    assert found["cuda", "non-local, self-attention"] == ("plain PyTorch", "on GPUs torch's own attention serves it")
    text = run("info")
    assert text.count(why) == 2, text  # of the library, and once for all families
    with fused_attn.backend("reference"):
        assert "reference serves every call" in run("info")


def test_every_op_belongs_to_a_family():
    """One."""
    assert sorted(itertools.chain(*info.FAMILIES.values())) == sorted(backends.OPS)
    assert set(info.IN_WORDS) == set(backends.NAMES)


@pytest.mark.parametrize("columns", [["", ""], ["block", "times"]])
def test_tables(columns, monkeypatch, capsys):
    """A title wider than its table, and than the terminal, stays one line; names of columns only where there are any;
    brackets are no markup."""
    monkeypatch.setattr(cli.console, "_width", 40)
    title = "a title that is longer than the table and the terminal are"
    cli.table(title, columns, [["SEModule[0]", "1.00x"], ["ECA", "12.00x"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    names = ["block         times"] if any(columns) else []
    assert lines == [title, *names, "SEModule[0]   1.00x", "ECA          12.00x", ""]


def test_a_table_that_is_too_wide(monkeypatch, capsys):
    """Cells go on in the next line between words; figures and words stay whole, though lines are longer for it."""
    monkeypatch.setattr(cli.console, "_width", 40)
    name, why = "fused_attn.reference.block_attention.CBAM", "some words that go on in the next line"
    cli.table("", ["block", "fused ms", "why", "class"], [["CBAM", "1.234 ±3%", why, name]])
    out = capsys.readouterr().out
    assert "CBAM   1.234 ±3%" in out and name in out
    assert set(why.split()) <= set(out.split()) and "some words that go on" not in out
    columns = ["block", *(f"{word} ms" for word in ("eager", "compile", "fused", "another", "last"))]
    cli.table("", columns, [["se 32x256x56x56", *["1.234 ±3%"] * 5]] * 2)
    out = capsys.readouterr().out
    assert out.count("32x256x56x56") == 2 and out.count("1.234 ±3%") == 10, out
    assert "…" not in out and all(word in out for word in " ".join(columns).split()), out


def test_a_sentence_that_starts_with_a_number_is_no_figure(monkeypatch, capsys):
    monkeypatch.setattr(cli.console, "_width", 40)
    why = "1.0 to 8.3 times as fast as plain PyTorch: se, eca"
    cli.table("", ["class", "why"], [["SEModule", why], ["ECA", why]])
    assert max(len(line.rstrip()) for line in capsys.readouterr().out.splitlines()) <= 40


def test_figures_are_never_cut_short(monkeypatch, capsys):
    monkeypatch.setattr(cli.console, "_width", 40)
    cells = ["1.234 ±3%", "12.345 ±10%", "0.520 ±9%", "1.75x", "0.3, 0.2, 0.2"]
    cli.table("", ["eager ms", "compile ms", "fused ms", "ratio", "order"], [cells, cells])
    out = capsys.readouterr().out
    assert all(out.count(cell) == 2 for cell in cells), out


def test_a_pipe_is_as_wide_as_a_terminal():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for columns, most in ((None, 80), ("60", 60)):
        if columns:
            environment["COLUMNS"] = columns
        command = [sys.executable, "-c", "from fused_attn import cli; cli.table('', ['', ''], [['x', 'word ' * 99]])"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert most - 5 <= max(map(len, done.stdout.splitlines())) <= most, done.stdout


@pytest.mark.slow  # about 5 s
def test_demo_is_quick_and_writes_a_picture(tmp_path):
    out, weights = tmp_path / "pictures" / "demo.png", tmp_path / "weights" / "demo.pt"
    done = subprocess.run(
        [sys.executable, "-m", "fused_attn", "demo", "--quick", "--out", out, "--weights", weights],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "original" in done.stdout and "fused" in done.stdout
    assert out.read_bytes().startswith(PNG)
    demo.DigitsNet().load_state_dict(torch.load(weights))


def test_demo_trains_the_same_network(tmp_path, monkeypatch):
    original, moved, fused = demo.train(steps=3, batch=8)
    for other in (moved, fused):
        torch.testing.assert_close(torch.tensor(other.losses), torch.tensor(original.losses), rtol=1e-4, atol=1e-4)
    assert moved.losses != original.losses
    assert [host_class(fused.model.stages[i]).__name__ for i in (3, 7, 11)] == ["SEBlock", "CBAM", "SEBlock"]
    original.seconds, fused.seconds = [0.03, 0.5, 0.03], [0.012, 0.012, 0.001]
    original.losses, fused.losses, moved.losses = [2.0, 1.0, 0.5], [2.0, 1.25, 0.5], [2.0, 1.0, 0.625]
    original.found = moved.found = torch.tensor([1, 2, 3, 4])
    fused.found = torch.tensor([1, 2, 0, 0])
    monkeypatch.setattr(demo, "train", lambda *args, **options: (original, moved, fused))
    gains = [demo.Gain("CBAM", (8, 32, 16, 16), 0.004, 0.001)]
    monkeypatch.setattr(demo, "measure_blocks", lambda *args, **options: gains)
    text = run("demo", "--out", str(tmp_path / "demo.png"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "a whole step - 30.00 ms 12.00 ms 2.50x" in lines
    assert "CBAM 8x32x16x16 4.00 ms 1.00 ms 4.00x" in lines
    expected = "fused: losses within 2.5e-01 of the original's in the first 10 steps, 2.5e-01 in all; 2 of 4 held-out"
    assert any(line.startswith(expected) for line in lines), text
    assert any("original, moved: losses within 1.2e-01" in line and "0 of 4" in line for line in lines), text


def test_verify_blocks():
    text = run("verify", "--dtype", "float32", "--dtype", "float16")
    assert f"{4 * len(verify.BLOCKS)} of {4 * len(verify.BLOCKS)} checks passed" in text


RIGHT = """
import torch
from torch import nn
from fused_attn.fusion import ChannelGate, register

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]

@register(Mine)
def _(block):
    return ChannelGate("down.weight", "down.bias", "up.weight", "up.bias")

def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), Mine())
"""


@pytest.mark.parametrize("wrong", [False, True])
def test_verify_a_file(tmp_path, wrong):
    """A block registered with the wrong gate is found, and ends in exit code 1."""
    source = RIGHT.replace("class Mine", f"class Mine{wrong}").replace("Mine()", f"Mine{wrong}()")
    source = source.replace("@register(Mine)", f"@register(Mine{wrong})")
    if wrong:
        source = source.replace('"up.bias")', '"up.bias", gate="hard_sigmoid")')
    path = tmp_path / f"mine_{wrong}.py"
    path.write_text(source)
    text = run("verify", "--model", f"{path}:model", "--shape", "2x3x12x12", code=int(wrong))
    assert ("MISS" in text) == wrong


@pytest.mark.slow  # about 2 s
def test_verify_everything():
    assert "checks passed" in run("verify", "--all", "--dtype", "float32", "--layout", "nchw")


@pytest.fixture
def little_is_copied(monkeypatch):
    """For the figure that all others are a share of."""
    monkeypatch.setattr(cli, "copy_bandwidth", lambda place, _: copy_bandwidth(place, 1 << 22))


@pytest.mark.slow  # Inductor compiles one small block, about 10 s
def test_bench_writes_figures_and_a_picture(tmp_path, little_is_copied):
    figures, picture = tmp_path / "out" / "b.json", tmp_path / "b.png"
    options = ["--no-models", "--ops", "ese", "--shapes", "2x16x9x9", "--budget", "0.05"]
    text = run("bench", *options, "--json", str(figures), "--plot", str(picture))
    assert "geometric means" in text
    record = json.loads(figures.read_text())
    assert record["complete"] and record["environment"]["torch"] == torch.__version__
    assert {f["case"]["pass"] for f in record["figures"]} == {"forward", "forward + backward"}
    assert all(len(t["seconds"]) >= 7 for f in record["figures"] for t in f["timings"].values())
    assert [set(f["timings"]) for f in record["figures"]] == [{"eager", "compile", "fused", "clone"}] * 2 + [
        {"eager", "fused", "clone"}  # what a call costs
    ] * 2
    assert picture.read_bytes().startswith(PNG)


def test_bench_can_have_the_allocator_keep_memory(tmp_path):
    """In a process of its own: there is no way back."""
    path = tmp_path / "b.json"
    options = ["--quick", "--no-models", "--no-compile", "--ops", "se", "--keep-memory", "--json"]
    subprocess.run([sys.executable, "-m", "fused_attn", "bench", *options, str(path)], check=True, capture_output=True)
    assert json.loads(path.read_text())["environment"]["keeps freed memory"] is True


@pytest.mark.slow  # two small networks, about 2 s
def test_bench_measures_the_attention_tax(tmp_path):
    path = tmp_path / "b.json"
    text = run("bench", "--quick", "--no-blocks", "--no-compile", "--json", str(path))
    assert "attention tax" in text
    (first, second) = json.loads(path.read_text())["figures"]
    assert set(first["facts"]["attention tax"]) == {"eager", "fused", "tails"} and second["case"]["pass"] == "training"


@pytest.mark.slow
def test_bench_takes_inputs_a_pass_and_autocast(tmp_path):
    path = tmp_path / "b.json"
    options = (
        "--no-blocks",
        "--no-compile",
        "--no-tails",
        "--pass",
        "inference",
        "--dtype",
        "bfloat16",
        "--budget",
        "0.01",
    )
    pair = ("--pair", "timm:seresnet18/timm:resnet18", "--input", "1x3x32x32,2x3x32x64")
    text = run("bench", *options, *pair, "--json", str(path))
    assert "over the original" in text and "2x3x32x64" in text
    cases = [f["case"] for f in json.loads(path.read_text())["figures"]]
    assert [case["shape"] for case in cases] == [[1, 3, 32, 32], [2, 3, 32, 64]]
    assert {(case["pass"], case["dtype"]) for case in cases} == {("inference", "bfloat16")}


@pytest.mark.parametrize(
    "options, compiled",
    [((), True), (("--quick",), False), (("--quick", "--compile"), True), (("--no-compile",), False)],
)
def test_bench_compiles_no_networks_quickly(options, compiled, monkeypatch):
    asked = []

    def measured(*args, with_compile, **kwargs):
        asked.append(with_compile)
        return []

    monkeypatch.setattr(models, "measure_pair", measured)
    monkeypatch.setattr(cli, "copy_bandwidth", lambda *args: 1.0)
    run("bench", "--no-blocks", "--pair", "timm:seresnet18/timm:resnet18", *options)
    assert asked == [compiled]


def test_bench_takes_networks_from_files(tmp_path):
    """Whose paths have slashes, as the pair has one."""
    (tmp_path / "a.folder").mkdir()
    source, path = tmp_path / "a.folder" / "nets.py", tmp_path / "b.json"
    source.write_text(ATTENTIVE)
    pair = f"{source}:model", f"{source}:plain"
    options = ["--no-blocks", "--no-models", "--memory", "--pair", "/".join(pair), "--json", str(path)]
    run("bench", "--quick", *options)
    (figure,) = json.loads(path.read_text())["figures"]
    assert (figure["case"]["model"], figure["case"]["backbone"]) == pair


@pytest.mark.slow  # four small networks once or twice, about 1 s
def test_bench_counts_memory(tmp_path):
    path = tmp_path / "b.json"
    options = ["--no-blocks", "--no-models", "--memory", "--memory-budget", "1", "--json", str(path)]
    text = run("bench", "--quick", *options)
    assert "keeps for backward" in text and "derived from 1073741824 bytes" in text and "tax" not in text
    (figure,) = json.loads(path.read_text())["figures"]
    assert figure["case"]["pass"] == "memory"
    for fact in ("kept bytes", "largest batch"):
        assert list(figure["facts"][fact]) == ["backbone", "eager", "fused", "tails", "least"]
    kept, batches = figure["facts"]["kept bytes"], figure["facts"]["largest batch"]
    assert kept["least"] < kept["tails"] < kept["eager"] and batches["least"] > batches["tails"] > batches["eager"]


def test_interrupted_bench_keeps_what_it_has(tmp_path, monkeypatch):
    def interrupted(name, shape, *args, **kwargs):
        if name == "eca":
            raise KeyboardInterrupt
        case = {"block": name, "pass": "forward", "dtype": "float32", "layout": "nchw", "shape": list(shape)}
        yield Figure(case, {"eager": Timing([3.0, 2.5, 90.0]), "fused": Timing([1.0, 1.0, 0.1])})

    monkeypatch.setattr(blocks, "measure_block", interrupted)
    path = tmp_path / "b.json"
    text = run("bench", "--quick", "--no-models", "--json", str(path), code=130)
    assert "interrupted" in text and "3.00x" in text
    record = json.loads(path.read_text())
    assert not record["complete"] and record["figures"]
    assert all(figure["medians"] == {"eager": 3.0, "fused": 1.0} for figure in record["figures"])


def test_means_are_of_ratios():
    """Of medians."""

    def figure(shape, eager):
        timings = {"eager": Timing([100 * eager, eager, eager]), "fused": Timing([1.0, 0.1, 1.0])}
        return Figure({"block": "se", "shape": shape}, timings)

    (row,) = geometric_means([figure([1], 2.0), figure([2], 8.0)])
    assert row["eager / fused"] == pytest.approx(4.0) and row["worst eager"] == 2.0


ATTENTIVE = """
import torch
from torch import nn
from fused_attn.reference import CBAM, SqueezeExcite

def model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), CBAM(16), nn.Conv2d(16, 16, 3), SqueezeExcite(16))

def plain():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
"""


def test_attention_of_a_photograph(tmp_path):
    source, weights, photograph, out = (tmp_path / n for n in ("net.py", "net.pt", "photo.png", "pictures/maps.png"))
    source.write_text(ATTENTIVE)
    text = run("attention", "--model", f"{source}:model", "--size", "32", "--out", str(out))
    assert "CBAM" in text and "SqueezeExcite" in text and str(out) in text.replace("\n", "")
    photograph.write_bytes(out.read_bytes())
    out.unlink()
    state = build_model(f"{source}:model").state_dict()
    state["3.fc2.weight"].zero_()
    state["3.fc2.bias"].zero_()
    torch.save({"state_dict": state}, weights)
    options = ("--weights", str(weights), "--image", str(photograph), "--size", "32", "--out", str(out))
    assert "0.5 to 0.5" in run("attention", "--model", f"{source}:model", *options)
    assert out.read_bytes().startswith(PNG)


MISTAKES = {
    "a model that is not there": ["verify", "--model", "timm:no_such_network"],
    "a library that is not there": ["verify", "--model", "no_such_library:factory"],
    "a file that is not there": ["verify", "--model", "no/such/file.py:factory"],
    "no factory": ["verify", "--model", "resnet50"],
    "nothing to fuse": ["verify", "--model", "torch.nn:Identity"],
    "no module": ["verify", "--model", "builtins:dict"],
    "a shape": ["bench", "--shapes", "32-256"],
    "a block": ["bench", "--ops", "attention"],
    "a pair": ["bench", "--no-blocks", "--pair", "timm:resnet50"],
    "a pair with files": ["bench", "--no-blocks", "--pair", "some/file.py:a/other/file.py"],
    "a batch of one": ["bench", "--no-blocks", "--no-models", "--memory", "--memory-budget=1", "--input=1x3x32x32"],
    "no model": ["attention"],
    "a photograph that is not there": ["attention", "--model", "torch.nn:Identity", "--image", "no/such/photo.png"],
    "a photograph that is none": ["attention", "--model", "torch.nn:Identity", "--image", __file__],
    "weights that are not there": ["attention", "--model", "torch.nn:Identity", "--weights", "no/such/weights.pt"],
    "weights that are none": ["attention", "--model", "torch.nn:Identity", "--weights", __file__],
    "no attention": ["attention", "--model", "torch.nn:Identity"],
    "a device": ["verify", "--device", "warp"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(mistake):
    result = CliRunner().invoke(cli.main, MISTAKES[mistake])
    assert result.exit_code == 2, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fused-attn: "), result.output


def test_a_missing_package_is_named_in_one_line():
    code = "import sys; sys.modules['click'] = None; import fused_attn.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "fused-attn: click is not installed; pip install '.[bench]' in a clone"
