"""Verdicts: which backend serves a call on one card or processor, why, and the files that keep what was found.

A file is a table: the environment that it holds for, and verdicts. Tables for known cards and processors ship in
`fused_attn/tables`; what is measured on a user's machine lies in its cache, one file an environment, so that nothing
found elsewhere, or with another driver, torch, triton or other kernels, is read or written over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
#: What may serve a call (see `backends`).
BACKENDS = ("reference", "cpu", "triton", "cuda")
#: How long a process waits for another one that measures the same, in seconds.
WAIT = 600.0

Environment = dict[str, Any]


class Question(NamedTuple):
    """What `backends.choose` asks. op: as in `backends.OPS`; options: the codes of what is chosen by name; dtype: of
    the map; others: the dtypes of the other tensors, None for those that are absent; training: gradients are on."""

    op: str
    options: tuple[Any, ...]
    dtype: torch.dtype
    others: tuple[torch.dtype | None, ...]
    training: bool


class Shape(NamedTuple):
    """A class of shapes: the map's layout, powers of two of its channels, its positions and its bytes, and whether its
    rows (a channel's positions, or with channels last a position's channels) start at multiples of 16 bytes."""

    layout: str
    channels: int
    positions: int
    bytes: int
    aligned: bool


class Verdict(NamedTuple):
    """backend: serves calls of this class, a resident one those that need no more than this `room` (`room_for`).
    anywhere: the best of those that serve maps of any size, for calls whose size is not known. seconds: of a call, by
    backend and by clock, "device" and "wall"; empty where nothing was timed."""

    question: Question
    shape: Shape
    room: tuple[int, int]
    backend: str
    anywhere: str
    why: str
    seconds: dict[str, dict[str, float]] = {}

    @property
    def asked(self) -> tuple[Question, Shape]:
        """What there is one verdict about."""
        return self.question, self.shape


class Table(NamedTuple):
    """ops: (backend, why) for all of an op that no verdict is about."""

    environment: Environment
    verdicts: tuple[Verdict, ...]
    ops: dict[str, tuple[str, str]]


def _power(n: int) -> int:
    """The exponent of the smallest power of two that is not below n."""
    return max(n - 1, 0).bit_length()


def class_of(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Shape:
    """The class of a map (B, C, *spatial)."""
    batch, channels, *space = sizes
    positions = math.prod(space)
    last = strides[1] == 1 and channels > 1 and positions > 1
    row = itemsize * (channels if last else positions)
    bytes_ = batch * channels * positions * itemsize
    layout = "channels_last" if last else "nchw"
    return Shape(layout, _power(channels), _power(positions), _power(bytes_), row % 16 == 0)


def room_for(x: Tensor, others: Iterable[Tensor | None]) -> tuple[int, int]:
    """What a call needs on chip, in elements: a sample of the map, and its other tensors that are no such maps."""
    whole = x.numel()
    sizes = [0 if t is None else t.numel() for t in others]
    return math.prod(x.shape[1:]), sum([n for n in sizes if n != whole])


# ---- as JSON ----


def dtype_named(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def asked_as_json(question: Question, shape: Shape) -> dict[str, Any]:
    dtypes = {"dtype": name_of(question.dtype), "others": [name_of(d) for d in question.others]}
    return question._asdict() | dtypes | shape._asdict()


def asked_from_json(record: dict[str, Any]) -> tuple[Question, Shape]:
    """Raises KeyError, TypeError or ValueError for what is none."""
    dtype = dtype_named(record["dtype"])
    if dtype is None:
        raise ValueError("no dtype")
    others = tuple(dtype_named(name) for name in record["others"])
    question = Question(str(record["op"]), tuple(record["options"]), dtype, others, bool(record["training"]))
    asked = question, Shape(*(record[field] for field in Shape._fields))
    hash(asked)
    return asked


def verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    rest = {field: getattr(verdict, field) for field in Verdict._fields[2:]}
    return asked_as_json(*verdict.asked) | rest


def verdict_from_json(record: dict[str, Any]) -> Verdict:
    """Raises KeyError, TypeError or ValueError for what is none."""
    names = record["backend"], record["anywhere"], str(record["why"])
    if not {*names[:2]} <= {*BACKENDS}:
        raise ValueError(f"{names[:2]} are no backends")
    sample, weights = record["room"]
    return Verdict(*asked_from_json(record), (int(sample), int(weights)), *names, dict(record["seconds"]))


def read_table(path: Path) -> Table:
    """Raises OSError where it cannot be read, ValueError where it is no table."""
    try:
        record = json.loads(path.read_text())
        environment, ops = dict(record["environment"]), dict(record.get("ops", {}))
        verdicts = tuple(verdict_from_json(v) for v in record["verdicts"])
        return Table(environment, verdicts, {op: (str(name), str(why)) for op, (name, why) in ops.items()})
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no table of verdicts: {error!r}") from error


def write_table(path: Path, environment: Environment, verdicts: Iterable[Verdict]) -> None:
    """Raises OSError."""
    records = sorted(map(verdict_as_json, verdicts), key=lambda record: json.dumps(record))
    lines = ",\n".join(json.dumps(record) for record in records)
    write_whole(path, f'{{"environment": {json.dumps(environment)},\n"verdicts": [\n{lines}\n]}}\n')


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all: under another name first. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---- where it holds ----


def environment_of(device: torch.device) -> Environment:
    """What a verdict depends on besides its question."""
    found: Environment = {"torch": str(torch.__version__), "kernels": hash_of_kernels(), "sources": hash_of_sources()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        try:
            triton = importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            triton = "not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            triton += ", interpreted"
        multiprocessors = card.multi_processor_count
        return {"device": card.name, "multiprocessors": multiprocessors, "driver": _driver(), "triton": triton} | found
    return {"device": cpu_name(), "threads": torch.get_num_threads()} | found


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match[0] if match else "unknown"


def cpu_name() -> str:
    """The processor's name and its widest vectors that torch uses."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def hash_of_kernels() -> str:
    """Of the Triton kernels' source and of the native library, as it was built here."""
    found = _hash_of_triton_kernels()
    library = FOLDER / "_native.so"
    found.update(library.read_bytes() if library.exists() else b"")
    return found.hexdigest()[:16]


@functools.cache
def hash_of_sources() -> str:
    """Of the Triton kernels' source and of what the native library is made of, which is the same wherever it is
    built."""
    found = _hash_of_triton_kernels()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.update(str(json.loads((FOLDER / "_build_info.json").read_text()).get("sources")).encode())
    return found.hexdigest()[:16]


def _hash_of_triton_kernels() -> Any:
    found = hashlib.sha256()
    for path in sorted((FOLDER / "kernels").glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found


def write_shipped(folder: Path, environment: Environment, verdicts: Iterable[Verdict]) -> Path:
    """A table of what was measured, for `fused_attn/tables`. It serves any driver, and kernels of the same source that
    were built elsewhere. Raises OSError."""
    path = folder / f"{_slug(environment)}.json"
    here = ("driver", "kernels")
    write_table(path, {key: value for key, value in environment.items() if key not in here}, verdicts)
    return path


def _slug(environment: Environment) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", str(environment["device"])).strip("-")[:60]


def _shipped_tables() -> Iterator[Table]:
    return map(read_table, sorted((FOLDER / "tables").glob("*.json")))


def shipped(environment: Environment) -> tuple[Verdict, ...]:
    """What the package's tables say of this environment: each names as much of it as it depends on."""
    return tuple(v for table in _shipped_tables() if _holds(table.environment, environment) for v in table.verdicts)


def shipped_of_type(device: str) -> dict[str, tuple[str, str]]:
    """By op, what the package's tables say of all devices of a type."""
    return {
        op: found for t in _shipped_tables() if t.environment == {"device type": device} for op, found in t.ops.items()
    }


def _holds(table: Environment, here: Environment) -> bool:
    return "device" in table and all(here.get(key) == value for key, value in table.items())


# ---- the user's cache ----


def cache_folder() -> Path:
    """FUSED_ATTN_CACHE, or a folder in the user's cache. Raises RuntimeError where there is no home."""
    if folder := os.environ.get("FUSED_ATTN_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fused_attn"


def cache_file(environment: Environment) -> Path:
    mark = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{_slug(environment)}-{mark}.json"


_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(f"fused_attn: {message}", stacklevel=2)


def cached(environment: Environment) -> tuple[Verdict, ...]:
    """What was measured on this machine before; nothing, said once, where its file cannot be read or is another's."""
    try:
        path = cache_file(environment)
        table = read_table(path)
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # the last where there is no home
        return ()
    except (OSError, ValueError) as error:
        say_once(f"verdicts are measured again, because {error}")
        return ()
    if table.environment != environment:
        say_once(f"verdicts are measured again, because {path} holds for {table.environment}")
        return ()
    return table.verdicts


@contextlib.contextmanager
def one_at_a_time(environment: Environment) -> Iterator[None]:
    """While a process measures, others that want the same wait, and then find it in the cache. Where no lock can be
    had (a home that is read-only, a file system without locks) each measures for itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, RuntimeError):
            path = cache_file(environment).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path, "a"))
            limit = time.monotonic() + WAIT
            while time.monotonic() < limit:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        break
                    time.sleep(0.1)
        yield


def keep(environment: Environment, verdicts: Iterable[Verdict]) -> None:
    """Add to the cache, within `one_at_a_time`. A file in its place that is no table, or another environment's, is kept
    under another name. Says once where nothing can be written."""
    try:
        path = cache_file(environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        before: tuple[Verdict, ...] = ()
        if path.exists():
            try:
                table = read_table(path)
            except ValueError:
                table = Table({}, (), {})
            if table.environment == environment:
                before = table.verdicts
            else:
                path.rename(path.with_suffix(".unread"))
        known = {v.asked: v for v in (*verdicts, *before)}  # what was measured first stays
        write_table(path, environment, known.values())
    except (OSError, RuntimeError) as error:
        say_once(f"verdicts are not kept, and every process measures again: {error}")
