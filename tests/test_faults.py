"""Faults by the hundred: killed processes, mutated checkpoints, bad command lines.

A few by default. All that docs/reliability.md speaks of:

    python -m pytest tests/test_faults.py --long -rP
"""

import contextlib
import copy
import importlib
import io
import os
import pickle
import random
import shutil
import signal
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import tiny as tiny_module
import torch
from conftest import same

import evaluate
import run as run_module
import train
from checkpoint import load_checkpoint
from utils import OneLineParser, output_file, run_script

resource = pytest.importorskip("resource")  # not on Windows


@pytest.fixture
def is_long(request):
    return request.config.getoption("--long")


# --- Killed processes ---


def test_killed_run_loses_nothing_that_it_had_saved(tiny, monkeypatch, is_long):
    """kill -9 at random moments, again and again until a run ends; each last.pt is as it must be.

    The runs save after every step, files that take long to write, so that many kills meet one.
    """
    monkeypatch.setenv("UNITS", "2048")
    wanted = 50 if is_long else 2
    options = "--epochs 2 --save-every 1e-9 --output-dir".split()
    saved, save = {}, run_module.save_checkpoint

    def save_and_note(path, content):
        save(path, content)
        if path.name == "last.pt":
            saved[content["epoch"], content["progress"]["step"]] = load_checkpoint(path)

    monkeypatch.setattr(run_module, "save_checkpoint", save_and_note)
    begun = time.monotonic()
    assert tiny(*options, "whole") == 0
    longest = time.monotonic() - begun
    assert len(saved) == 13  # at the start, after each of 10 steps, and of 2 validations
    draw = random.Random(0)
    kills = while_writing = runs = 0
    small = "--dataset shapes --batch-size 8 --precision fp32 --device cpu".split()
    while kills < wanted:
        runs += 1
        run, child = Path(f"run{runs}"), None
        while child is None or child.exitcode == -signal.SIGKILL:
            known = (run / "config.json").exists()
            if not known:  # killed before it was a run
                shutil.rmtree(run, ignore_errors=True)
            arguments = ["--resume", run] if known else [*small, *options, run]
            child = tiny_module.start(Path.cwd(), *arguments, UNITS=2048)
            child.join(draw.uniform(0, longest) if kills < wanted else 240)
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            while_writing += any(run.glob(".unfinished-*"))
            if (run / "last.pt").exists():
                last = load_checkpoint(run / "last.pt")
                assert same(last, saved[last["epoch"], last["progress"]["step"]])
            if (run / "best.pt").exists():
                load_checkpoint(run / "best.pt")
        assert child.exitcode == 0, Path("stderr.txt").read_text()
        assert (run / "metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
        assert last["epoch"] == 2
        assert same(load_checkpoint(run / "best.pt"), load_checkpoint("whole/best.pt"))
        assert not list(run.glob(".unfinished-*"))
    print(f"{kills} kills in {runs} runs, {while_writing} while a file was being written")


# --- Scripts that must end in one line ---


class HangError(BaseException):
    """No script catches it."""


def attempt(main, arguments):
    """Run a script in this process. Return its exit code, and what is wrong or "".

    It must end with success, or with code 2 and one line, and within a minute.
    """

    def give_up(*_):
        raise HangError

    out, err = io.StringIO(), io.StringIO()
    old_argv, sys.argv = (
        sys.argv,
        [f"{main.__module__.rpartition('.')[2]}.py", *map(str, arguments)],
    )
    old_handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(main)
    except SystemExit as stopped:
        lines = err.getvalue().splitlines()
        code = stopped.code or 0
        good = len(lines) == 1 and ".py: error: " in lines[0] if code == 2 else not lines
        if code not in (0, 2) or not good or "out of memory" in str(lines):
            return code, f"code {code} and {lines}"
        return code, ""
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        sys.argv = old_argv
    raise AssertionError("run_script() returned")


def files(folder):
    """Return what is in a folder: names and contents."""
    paths = sorted(folder.rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


# --- Mutated checkpoints ---

LAUGHS = []
for _ in range(50):
    LAUGHS = [LAUGHS, LAUGHS]  # short in a file, endless when printed
ODD_VALUES = [
    *(None, True, -1, 0, 2**70, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x" * 100_000, "\x1b[31m", "../../x", b"bytes", (1, 2), [], {}, [1, "a"], LAUGHS),
    *(torch.ones(2), torch.ones((), dtype=torch.int8), torch.empty(2, device="meta")),
    *(torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), torch.full((10,), float("nan"))),
    *(torch.zeros(1, dtype=torch.complex64), torch.zeros(0), {"format": torch.float16}),
]


def mutate_bytes(data, draw):
    """Return a file cut short, with bits flipped, or with bytes lost, gained or overwritten."""
    where = draw.choice([draw.randrange(len(data)), draw.randrange(2000), len(data) - 2000])
    kind = draw.randrange(5)
    if kind == 0:
        return data[:where]
    if kind == 1:
        flipped = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    length = draw.choice([1, 4, 64, 4096])
    new = [b"", draw.randbytes(length), bytes(length)][kind - 2]
    return data[:where] + new + data[where + (0 if kind == 3 else length) :]


def mutate_content(content, draw):
    """Return a checkpoint with one part replaced by an odd value, renamed or taken out."""
    content = copy.deepcopy(content)
    part = content
    while True:
        name = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
        inner = part[name]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.2:
            break
        part = inner
    kind = draw.randrange(10)
    if kind == 0:
        del part[name]
    elif kind == 1 and isinstance(part, dict):
        part[draw.choice(["", "x", 3, "features.conv1.weight"])] = part.pop(name)
    elif isinstance(inner, torch.Tensor) and kind < 7:
        part[name] = draw.choice(TENSOR_CHANGES)(inner)
    else:
        part[name] = draw.choice(ODD_VALUES)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


TENSOR_CHANGES = [
    lambda t: t.to("meta"),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.to(torch.complex64),
    lambda t: t * float("nan"),
    lambda t: t[None],
    lambda t: t.flatten()[:1],
    lambda t: t.flatten()[:1].expand(10**12),
    lambda t: t[:4].to_sparse() if t.dim() else t.to(torch.bool),
]


class Call:
    """Pickled, a call that is made when it is loaded by a careless program."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects(marker):
    command = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w')"
    return [
        Call(os.system, command),
        Call(os.mkdir, str(marker)),
        Call(exec, write),
        Call(eval, write),
        Call(open, str(marker), "w"),
        Call(io.FileIO, str(marker), "w"),
        Call(getattr, "x", "upper"),
        Call(__import__, "antigravity"),
        Call(torch.load, "/dev/zero"),
        Call(torch.save, {}, str(marker)),
        Call(torch.hub.load, "x/x", "x"),
        Call(torch.from_file, str(marker), True, 10**9),
        Call(torch.empty, 10**13),
        Call(torch.zeros, (10**13,)),
        Call(bytearray, 10**13),
        [Call(bytearray, 10**8) for _ in range(100)],
        Call(bytes, 10**13),
        Call(list, range(10**12)),
        Call(Path.touch, marker),
        Call(shutil.rmtree, "run"),
        Call(time.sleep, 1000),
        Call(sys.exit, 0),
    ]


def with_entries(data, changed, compression=zipfile.ZIP_STORED):
    """Return the archive with some entries replaced or added."""
    new = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old_archive,
        zipfile.ZipFile(new, "w", compression) as new_archive,
    ):
        root = old_archive.namelist()[0].split("/")[0]
        entries = {name: old_archive.read(name) for name in old_archive.namelist()}
        entries |= {f"{root}/{name}": value for name, value in changed.items()}
        for name, value in entries.items():
            new_archive.writestr(name, value)
    return new.getvalue()


def hostile_archives(data, marker):
    """Yield what makes files that try to run something, to take memory, or to write elsewhere."""
    for item in hostile_objects(marker):
        for protocol in (2, 4):
            content = pickle.dumps({"format": "alexnet-cifar10", "weights": item}, protocol)
            yield partial(with_entries, data, {"data.pkl": content})
            yield partial(bytes, content)  # a bare pickle
    deep = b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"."
    claims = b"\x80\x02X\xff\xff\xff\x7fabc."  # a string of 2 GiB that is not there
    yield partial(with_entries, data, {"data.pkl": deep})
    yield partial(with_entries, data, {"data.pkl": claims})
    yield partial(with_entries, data, {"data.pkl": b""})
    yield partial(with_entries, data, {"data/0": bytes(10**9)}, zipfile.ZIP_DEFLATED)
    yield partial(with_entries, data, {"data/zeros": bytes(10**9)}, zipfile.ZIP_DEFLATED)
    yield partial(with_entries, data, {}, zipfile.ZIP_DEFLATED)
    yield partial(with_entries, data, {"../../outside": b"x", "/outside": b"x"})
    yield partial(with_entries, data, {"version": b"999999\n", "byteorder": b"middle"})
    torch.save(
        Call(os.system, f"touch {marker}"),
        old := io.BytesIO(),
        _use_new_zipfile_serialization=False,
    )
    yield old.getvalue


def mutated_checkpoints(data, marker, is_long):
    """Yield name and bytes of each, always the same ones."""
    draw = random.Random(0)
    content = torch.load(io.BytesIO(data), weights_only=True)
    hostile = hostile_archives(data, marker)
    for i in range(250 if is_long else 12):
        yield f"bytes {i}", mutate_bytes(data, draw)
    for i in range(250 if is_long else 12):
        yield f"content {i}", mutate_content(content, draw)
    for i, make in enumerate(hostile):
        if is_long or i % 10 == 0:
            yield f"hostile {i}", make()


def limit_memory(extra_bytes):
    """Let this process take so much more and no more. Return the limit that was there."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    if not Path("/proc/self/statm").exists():  # not Linux
        return old
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, old[1]))
    return old


def test_mutated_checkpoint_ends_in_one_line(tiny_run, tmp_path, is_long):
    """Evaluated, and resumed from: success or one line, no file changed, nothing executed."""
    data, record = ((tiny_run / name).read_bytes() for name in ("last.pt", "config.json"))
    outside, marker = tmp_path.parent, tmp_path / "marker"
    shutil.rmtree(tiny_run)
    tiny_run.mkdir()
    wrong, count, loaded = {}, 0, 0
    old_limit = limit_memory(4 * 2**30)
    try:
        for name, file in mutated_checkpoints(data, marker, is_long):
            count += 1
            for main, arguments in (
                (evaluate.main, ["run/last.pt", "--device", "cpu", "--json", "run/last.json"]),
                (train.main, ["--resume", "run", "--device", "cpu"]),
            ):
                (tiny_run / "config.json").write_bytes(record)
                (tiny_run / "last.pt").write_bytes(file)
                before, beside = files(tmp_path), set(outside.iterdir())
                _, fault = attempt(main, arguments)
                picture = tiny_run / "last-confusion-test.png"
                loaded += picture.exists()
                for result in (picture, tiny_run / "last.json"):
                    result.unlink(missing_ok=True)
                if not fault and (files(tmp_path), set(outside.iterdir())) != (before, beside):
                    fault = "a file has changed"
                if fault:
                    wrong[f"{main.__module__}, {name}"] = fault[:300]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limit)
    print(f"{count} mutated checkpoints, each evaluated and resumed; {loaded} were good enough")
    assert not wrong, "\n".join(f"{name}: {fault}" for name, fault in wrong.items())


# --- Bad command lines ---

SCRIPTS = {  # and the arguments that an option follows
    "train": [],
    "evaluate": ["file"],
    "predict": ["file", "file"],
    "compact": ["file", "x.pt"],
    "research.ablate": [],
    "research.benchmark": [],
    "research.tables": [],
}
NO_NUMBERS = ["", " ", "x", "-1", "1e", "nan", "inf", "½", "0x10", "1,5", "1 2", "--", "\n", "-"]
NO_CHOICES = ["", "x", "SGD", "-1", "None", "--", "\x1b[31m", "é" * 1000, "cifar10 "]
NO_DEVICES = ["", "tpu", "cuda:99", "cuda:-1", "meta", "cpu:1:2", "gpu", "x" * 5000, "--"]
NO_FOLDERS = ["nowhere", "file", "taken/nothing", "x" * 5000, "file/x", "--", "\n"]
TAKEN_FOLDERS = ["taken", "file", "file/x", "x" * 5000, "--"]
NO_FILES = ["nowhere/x", "taken", "file/x", "x" * 5000, "--"]
VALUES = {
    "--device": NO_DEVICES,
    "--resume": NO_FOLDERS,
    "--data-dir": NO_FOLDERS,
    "--output-dir": TAKEN_FOLDERS,
    "--weights": ["nowhere", "file", "taken", "x" * 5000, "--"],
    "--classes": ["--"],
}
OTHERS = [
    ("train", "--resume taken --output-dir x"),
    ("train", "--resume taken --lr 1"),
    ("train", "--optimizer adam --momentum 0.5"),
    ("train", "--recipe paper --optimizer adam"),
    ("train", "--recipe paper --train-split full"),
    ("train", "--dataset shapes --train-images 11"),
    ("train", "--dataset shapes --classes disc"),
    ("train", "--dataset shapes --classes disc dog"),
    ("train", "--dataset folder"),
    ("train", "--dataset folder --data-dir taken"),
    ("evaluate", ""),
    *(("evaluate", name) for name in ("nowhere.pt", "file", "taken", "x" * 5000, "\n", "é")),
    *(("predict", f"{name} file") for name in ("nowhere.pt", "file", "taken", "x" * 5000)),
    ("predict", "file"),
    *(("compact", f"{name} x.pt") for name in ("nowhere.pt", "file", "taken", "x" * 5000)),
]


def read_options(main, monkeypatch):
    """Return a script's options as argparse knows them."""
    parsers = []

    def stop_at_parser(parser, *_):
        parsers.append(parser)
        sys.exit()

    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(OneLineParser, "parse_args", stop_at_parser)
        patch.setattr(sys, "argv", ["x"])
        main()
    return [action for action in parsers[0]._actions if len(action.option_strings) == 1]


def bad_arguments(option):
    """Yield what cannot follow a script's name, for an option of it."""
    [name] = option.option_strings
    if option.nargs == 0:
        yield [f"{name}=yes"]
        return
    values = VALUES.get(name, NO_NUMBERS)
    if option.choices:
        values = NO_CHOICES
    elif option.type is output_file:
        values = NO_FILES
    yield from ([name, value] for value in values)
    yield [name]
    yield [name[:-1], "1"]


def test_bad_command_line_ends_in_one_line(tmp_path, monkeypatch):
    """Code 2, one line, and no file changed."""
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/mine").write_text("mine")
    Path("file").write_text("mine")
    mains = {name: importlib.import_module(name).main for name in SCRIPTS}
    lines = [(name, words.split(" ") if words else []) for name, words in OTHERS]
    for name, first in SCRIPTS.items():
        for option in read_options(mains[name], monkeypatch):
            lines += [(name, [*first, *arguments]) for arguments in bad_arguments(option)]
        lines += [(name, words.split()) for words in ("a b c", "-x", "--help=x", "--no-such 1")]
    before = files(tmp_path)
    wrong = {}
    for name, arguments in lines:
        code, fault = attempt(mains[name], arguments)
        if code == 0:
            fault = "success"
        elif files(tmp_path) != before:
            fault, before = "a file has changed", files(tmp_path)
        if fault:
            wrong[f"{name} {arguments}"[:200]] = fault[:300]
    print(f"{len(lines)} bad command lines")
    assert not wrong, "\n".join(f"{name}: {fault}" for name, fault in wrong.items())
    assert len(lines) >= 400
