import json
import os
import pickle
import sys
import warnings
import zipfile

import pytest
import torch
from conftest import CLASSES, ROOT
from torch import nn

import checkpoint
import evaluate
from checkpoint import FORMAT, FORMAT_VERSION, load_checkpoint, load_network, save_checkpoint
from evaluate import predict
from model import AlexNet
from utils import UserError, run_script


def test_disk_that_fills_up_is_one_line(tmp_path):
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


def test_checkpoint_returns_as_it_was(tmp_path):
    content = {"tensor": torch.randn(3), "list": [1, 2.5, "three", None], "nested": {"a": True}}
    save_checkpoint(tmp_path / "c.pt", content)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["tensor"], content["tensor"])
    assert loaded["list"] == content["list"]
    assert loaded["nested"] == content["nested"]


# --- Bad checkpoints: one line, exit code 2, nothing executed -----------------------------------


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


def write_missing(path, content):
    pass


def write_empty(path, content):
    path.write_bytes(b"")


def write_text(path, content):
    path.write_text("not a checkpoint")


def write_folder(path, content):
    path.mkdir()


def write_truncated(path, content):
    save_checkpoint(path, content)
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size // 2)


def write_weights_alone(path, content):
    torch.save(content["weights"], path)


def write_list(path, content):
    torch.save([1, 2, 3], path)


def write_whole_module(path, content):
    torch.save(nn.Linear(1, 1), path)


def write_attack(path, content):
    torch.save({**content, "format": FORMAT, "extra": Attack()}, path)


def write_memory_bomb(path, content):
    torch.save({**content, "format": FORMAT, "extra": bytearray(10)}, path)


def write_two_parts_of_one_name(path, content):
    torch.save({}, path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0].upper(), b"")


def write_bare_pickle_attack(path, content):
    path.write_bytes(pickle.dumps(Attack()))


def write_zip_bomb(path, content):
    save_checkpoint(path, content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10**7))


def write_newer_format(path, content):
    torch.save({**content, "format": FORMAT, "format_version": FORMAT_VERSION + 1}, path)


BAD_FILES = [
    (write_missing, "does not exist"),
    (write_empty, "is not a checkpoint"),
    (write_text, "is not a checkpoint"),
    (write_folder, "is a folder"),
    (write_truncated, "truncated or damaged"),
    (write_weights_alone, "not a checkpoint of this program"),
    (write_list, "not a checkpoint of this program"),
    (write_whole_module, "could execute code"),
    (write_attack, "could execute code"),
    (write_memory_bomb, "more than tensors"),
    (write_two_parts_of_one_name, "two parts of one name"),
    (write_bare_pickle_attack, "is not a checkpoint"),
    (write_zip_bomb, "would unpack to"),
    (write_newer_format, "format version 2"),
]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")],
)
def test_too_little_memory_is_not_told_as_damage(tmp_path, monkeypatch, capsys, content, error):
    """Or a user would delete a good file."""

    def no_memory(*_, **__):
        raise error

    save_checkpoint(tmp_path / "good.pt", content)
    monkeypatch.setattr(torch, "load", no_memory)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "good.pt")])
    with pytest.raises(SystemExit) as stopped:
        run_script(evaluate.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("evaluate.py: error: out of memory")


@pytest.mark.parametrize(("write", "named"), BAD_FILES, ids=[w.__name__ for w, _ in BAD_FILES])
def test_bad_checkpoint_is_one_line(tmp_path, monkeypatch, capsys, content, write, named):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    write(path, content)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(path)])
    with pytest.raises(SystemExit) as stopped:
        run_script(evaluate.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("evaluate.py: error: ")
    assert error.count("\n") == 1
    assert str(path) in error
    assert named in error
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.pt"}


BAD_PARTS = {
    "model": [
        None,
        {"num_classes": 0},
        {"num_classes": 2**60},
        {"dropout": "half"},
        {"norm": torch.ones(2)},
    ],
    "weights": [None, {}, {"conv1.weight": torch.zeros(1)}],
    "classes": [None, ["a"], dict.fromkeys(CLASSES), [1, 2, 3], ["a", "b", "\x1b[31m"]],
    "preprocessing": [
        None,
        {"mean": [0.0], "std": [1.0]},
        {"mean": [0.0] * 3, "std": [0.0] * 3},
        {"mean": [float("nan")] * 3, "std": [1.0] * 3},
        {"mean": [0.0] * 3, "std": [1.0] * 3, "size": 10**9},
        {"mean": [0.0] * 3, "std": [1.0] * 3, "enlarged_size": 200},
    ],
    "training": [None, {}, {"dataset": "../x", "precision": "fp32", "epochs": 1}],
    "epoch": [None, "one"],
}


@pytest.mark.parametrize(
    ("part", "value"), [(part, value) for part, values in BAD_PARTS.items() for value in values]
)
def test_checkpoint_whose_parts_do_not_fit(monkeypatch, content, part, value):
    broken = {**content, part: value}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: broken)
    with pytest.raises(UserError, match=r"bad\.pt is not a complete checkpoint"):
        load_network("bad.pt")


@pytest.mark.parametrize("part", BAD_PARTS)
def test_checkpoint_with_a_part_missing(monkeypatch, content, part):
    broken = {name: value for name, value in content.items() if name != part}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: broken)
    with pytest.raises(UserError, match=r"bad\.pt is not a complete checkpoint"):
        load_network("bad.pt")


@pytest.mark.parametrize(
    ("switch", "value"),
    [("layers", 3), ("groups", "2"), ("norm", "batch")],
)
def test_network_that_this_version_does_not_know(monkeypatch, content, switch, value):
    newer = {**content, "model": {**content["model"], switch: value}}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: newer)
    with pytest.raises(UserError, match=rf"new\.pt holds a network with '{switch}' = .*not know"):
        load_network("new.pt")


def test_checkpoint_from_before_the_switches(monkeypatch, content):
    old = {**content, "model": {"num_classes": 3, "groups": 1, "dropout": 0.5}}
    old["preprocessing"] = {"mean": [120.0] * 3, "std": [60.0] * 3, "size": 227}
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: old)
    network, preprocessing, _ = load_network("old.pt")
    assert network.config == AlexNet(num_classes=3).config
    assert preprocessing.enlarged_size == 227


def test_checkpoint_of_the_first_version():
    """Gives the logits that its own program gave for the same pictures."""
    folder = ROOT / "tests" / "first-version"
    network, preprocessing, _ = load_network(folder / "last.pt")
    images = torch.arange(9 * 32 * 32).mul(37).remainder(251).to(torch.uint8).view(3, 3, 32, 32)
    logits = predict(network, images, preprocessing, "fp32")
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-7)


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match=r"pipe\.pt is not a regular file"):
        load_network(tmp_path / "pipe.pt")


def test_saved_network_comes_back(tmp_path, content):
    save_checkpoint(tmp_path / "good.pt", content)
    network, preprocessing, _ = load_network(tmp_path / "good.pt")
    assert not network.training
    assert preprocessing.mean == [120.0] * 3
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, content["weights"][name])
