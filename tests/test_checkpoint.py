import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import same
from torch import nn

import checkpoint
import evaluate
from checkpoint import FORMAT, load_checkpoint, load_network, save_checkpoint
from utils import UserError


def test_checkpoint_comes_back_to_the_bit(content, tmp_path):
    content["optimizer"] = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4)}}}
    content["progress"] = {"history": [{"epoch": 1, "val_loss": None}], "seconds": 0.1, "on": True}
    save_checkpoint(tmp_path / "c.pt", content)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert (loaded.pop("format"), loaded.pop("format_version")) == ("alexnet-cifar10", 3)
    assert same(loaded, content)
    network, preprocessing, _ = load_network(tmp_path / "c.pt")
    assert same(dict(network.state_dict()), dict(content["weights"]))
    assert vars(preprocessing) == content["preprocessing"]
    assert not network.training


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


def save_part(path, **parts):
    """Write what passes for a checkpoint of this program, with these parts."""
    torch.save({"format": FORMAT, "format_version": 3, **parts}, path)


def write_truncated(path):
    save_part(path, weights=torch.zeros(1000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_compressed(path):
    save_part(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**7))


def write_two_parts_of_one_name(path):
    save_part(path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0].upper(), b"")


BAD_FILES = {
    "missing": (lambda path: None, "cannot read bad.pt: No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is not a checkpoint"),
    "text": (lambda path: path.write_text("not a checkpoint"), "is not a checkpoint"),
    "folder": (Path.mkdir, "is a folder"),
    "pipe": (os.mkfifo, "is not a regular file"),
    "truncated": (write_truncated, "is truncated or damaged"),
    "compressed": (write_compressed, "would unpack to"),
    "two parts of one name": (write_two_parts_of_one_name, "has two parts of one name"),
    "weights alone": (lambda p: torch.save(nn.Linear(1, 1).state_dict(), p), "of this program"),
    "list": (lambda path: torch.save([1, 2, 3], path), "not a checkpoint of this program"),
    "version 1": (lambda p: save_part(p, format_version=1), "has format version 1; this program"),
    "version x": (lambda path: save_part(path, format_version="x"), "has no format version"),
    "module": (lambda path: torch.save(nn.Linear(1, 1), path), "it could run code"),
    "attack": (lambda path: save_part(path, extra=Attack()), "it could run code"),
    "bare attack": (lambda path: path.write_bytes(pickle.dumps(Attack())), "not a checkpoint"),
    "much memory": (lambda path: save_part(path, extra=bytearray(10)), "more than tensors"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_file_that_is_no_checkpoint_is_one_line_and_executes_nothing(tiny, capsys, kind):
    write, message = BAD_FILES[kind]
    write(Path("bad.pt"))
    assert tiny("bad.pt", script=evaluate) == 2
    error = capsys.readouterr().err
    assert (error[:20], error.count("\n")) == ("evaluate.py: error: ", 1)
    assert "bad.pt" in error
    assert message in error
    assert {path.name for path in Path().iterdir()} <= {"bad.pt"}


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")]
)
def test_too_little_memory_is_not_told_as_damage(tiny, content, monkeypatch, capsys, error):
    """Or a user would delete a good file."""

    def fail(*_, **__):
        raise error

    save_checkpoint(Path("good.pt"), content)
    monkeypatch.setattr(torch, "load", fail)
    assert tiny("good.pt", script=evaluate) == 2
    assert capsys.readouterr().err.startswith("evaluate.py: error: out of memory")


NAN, FIRST = float("nan"), "features.conv1.weight"
WEIGHT = torch.zeros(12, 3, 11, 11)
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "size": 67, "enlarged_size": 67, "image_size": 32}
TRAINING = {"dataset": "shapes", "precision": "fp32", "epochs": 1, "batch_size": 1}
BAD_PARTS = {
    "model": [
        {"num_classes": 0},
        {"num_classes": 2**60},
        {"num_classes": 10, "dropout": "half"},
        {"num_classes": 10, "groups": torch.ones(2)},
        {"num_classes": 10, "norm": "lrn"},
    ],
    "layers": [[]],
    "weights": [
        {"more": WEIGHT},
        {FIRST: WEIGHT[:1]},
        {FIRST: WEIGHT.double()},
        {FIRST: WEIGHT.to("meta")},
        {FIRST: [0.0]},
    ],
    "classes": [["a"], dict.fromkeys("abcdefghij"), [*range(10)], [*"abcdefghi", "\x1b[31m"]],
    "preprocessing": [
        PLAIN | change
        for change in (
            {"mean": [0.0]},
            {"mean": [NAN] * 3},
            {"std": [0.0] * 3},
            {"std": "abc"},
            {"size": 10**9},
            {"image_size": 10**9},
            {"image_size": "x"},
            {"enlarged_size": 200},
            {"resize": 67},
        )
    ],
    "training": [
        {},
        TRAINING | {"dataset": "../x"},
        TRAINING | {"precision": "fp8"},
        TRAINING | {"epochs": 0},
        TRAINING | {"lr": {}},
    ],
    "epoch": ["one", -1],
}


@pytest.mark.parametrize("part", BAD_PARTS)
def test_parts_that_do_not_fit_are_one_line(content, monkeypatch, part):
    values = BAD_PARTS[part]
    if part == "weights":
        values = [content["weights"] | value for value in values]
    without = {name: value for name, value in content.items() if name != part}
    for broken in (without, *({**content, part: value} for value in (None, *values))):
        monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path, broken=broken: broken)
        with pytest.raises(UserError, match=r"^bad\.pt (is not a comp|holds a netw)") as caught:
            load_network("bad.pt")
        assert "\n" not in str(caught.value)


def test_run_that_cannot_be_resumed_is_one_line(tiny, tiny_run, capsys):
    """Each case replaces one part of last.pt."""
    good = load_checkpoint(tiny_run / "last.pt")
    progress, state = good["progress"], good["optimizer"]["state"]
    buffer, row = state[0]["momentum_buffer"], progress["history"][0]
    cases = [
        *({name: None} for name in ("progress", "optimizer", "scaler")),
        {"scaler": {"scale": 1.0}},
        {"optimizer": {"state": {}}},
        {"optimizer": {"state": state | {0: {"exp_avg": buffer}}}},
        {"optimizer": {"state": state | {0: {"momentum_buffer": buffer[:1]}}}},
        {"optimizer": {"state": state | {0: {"momentum_buffer": buffer.long()}}}},
        {"progress": progress | {"step": 6}},
        {"progress": progress | {"step": 1.0}},
        {"progress": progress | {"seconds": NAN}},
        {"progress": progress | {"history": progress["history"][:1]}},
        {"progress": progress | {"history": [row | {"val_loss": None}, row]}},
        {"progress": progress | {"losses": torch.zeros(99)}},
        {"training": good["training"] | {"lr": 0.5}},
    ]
    for case in cases:
        save_checkpoint(tiny_run / "last.pt", {**good, **case})
        capsys.readouterr()
        assert tiny("--resume", tiny_run, "--epochs", 3) == 2, case.keys()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "last.pt " + ("is not of" if "training" in case else "cannot be resumed") in error
    save_checkpoint(tiny_run / "last.pt", good)
    assert tiny("--resume", tiny_run, "--epochs", 3) == 0


def test_disk_that_fills_up_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files fails a write half-way, as a full disk does."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*last\.pt"):
            save_checkpoint(path, {"step": 2, "weights": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]
