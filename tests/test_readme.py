"""The commands and programs of README.md and docs/training.md, run in the order of the page."""

import importlib
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_train import SHAPES_PER_CLASS, UNITS

import dataset
import evaluate
import model
import recipes
import train
from model import AlexNet
from utils import run_script

README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
READING = (ROOT / "docs" / "reading.md").read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def commands(page):
    """Each command of the bash blocks, split as a shell does, without python3 -m venv and pip."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ").replace("&&", "\n")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in lines if line and "venv" not in " ".join(line) and line[0] != "pip"]


@pytest.fixture
def folder(handlers_restored, monkeypatch, tmp_path):
    """A user's folder with pictures, where CIFAR-10 is a few shapes and runs are of one epoch."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", SHAPES_PER_CLASS)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda *_: dataset.draw_shapes())
    for recipe in recipes.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "folder/other.png"):
        Image.fromarray(np.full((40, 30, 3), 99, np.uint8)).save(tmp_path / name)
    return tmp_path


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(importlib.import_module(script.removesuffix(".py")).main)
    return stopped.value.code or 0


def test_commands(folder, monkeypatch, capsys):
    monkeypatch.setattr(model, "UNITS", UNITS)
    done = []
    for launcher, *arguments in [*commands(README), *commands(TRAINING)]:
        if launcher == "python" and arguments[0] != "-m":
            assert run(monkeypatch, *arguments) == 0, (arguments, capsys.readouterr().err)
            done.append(arguments[0])
        elif launcher == "torchrun":  # tests/test_parallel.py runs it
            check_options(arguments)
        else:
            assert (launcher, *arguments[:2]) in {
                ("python", "-m", "pytest"),
                ("export", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
            }
    assert {"train.py", "evaluate.py", "predict.py", "figures.py"} <= set(done)
    assert (folder / "predictions.png").exists()


def check_options(command):
    options = command[command.index("train.py") + 1 :]
    recipes.new_config(vars(recipes.make_parser().parse_args(options)))


def test_network_of_the_page():
    [table] = blocks(README, "text")
    with torch.device("meta"):
        assert table == AlexNet().summary() + "\n"


def test_exercises(capsys):
    """54 and 55 positions; LRN halves all, roughly, and the neighbours of the strong one more.

    2^-0.75 is 0.59, and (2 + 1000^2 * 1e-4 / 5)^-0.75 is 0.098.
    """
    runs = [command for command in commands(READING) if "train.py" in command]
    for command in runs:
        check_options(command)
    assert len(runs) == 4

    for program in blocks(READING, "python"):
        exec(program, {})
    printed = capsys.readouterr().out
    assert "54, 54" in printed
    assert "55, 55" in printed
    strong, small = re.findall(r"tensor\((\[.*?\])\)", printed, re.S)
    assert json.loads(strong) == pytest.approx([0.59] * 2 + [0.098] * 5 + [0.59] * 2, abs=5e-3)
    assert json.loads(small) == pytest.approx([0.594] * 9, abs=1e-3)


def test_programs(folder):
    checkpoint = folder / "runs" / "cifar10-fast" / "best.pt"
    checkpoint.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "first-version" / "last.pt", checkpoint)
    names = {}
    for program in blocks(README, "python"):
        exec(program, names)
    assert names["logits"].shape == (8, 10)
    assert names["features"].shape == (8, 4096)
    assert names["probabilities"].shape == (1, 10)
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(1))
