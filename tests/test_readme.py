"""The README's commands and programs, run in the order in which they stand."""

import importlib
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_train import SHAPES_PER_CLASS

import dataset
import evaluate
import train
from utils import run_script

README = (ROOT / "README.md").read_text()
CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands():
    """Each command of the bash blocks, split as a shell does, without python3 -m venv and pip."""
    text = "".join(blocks("bash")).replace("\\\n", " ").replace("&&", "\n")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line for line in lines if line and "venv" not in " ".join(line) and line[0] != "pip"]


@pytest.fixture
def folder(handlers_restored, monkeypatch, tmp_path):
    """A user's folder with pictures, where CIFAR-10 is small and runs are of one epoch."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", SHAPES_PER_CLASS)
    for module in (train, evaluate):
        monkeypatch.setattr(module, "load_dataset", small_dataset)
    for recipe in train.RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("photo.jpg", "folder/other.png"):
        Image.fromarray(np.full((40, 30, 3), 99, np.uint8)).save(tmp_path / name)
    return tmp_path


def small_dataset(name, data_dir=None):
    shapes = dataset.draw_shapes()
    classes = CIFAR10_CLASSES if name == "cifar10" else shapes.classes
    return dataset.Dataset(classes, shapes.train, shapes.val, shapes.test)


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_script(importlib.import_module(script.removesuffix(".py")).main)
    return stopped.value.code


def test_readme_commands(folder, monkeypatch, capsys):
    done = []
    for launcher, *arguments in commands():
        if launcher == "python" and arguments[0] != "-m":
            assert run(monkeypatch, *arguments) == 0, (arguments, capsys.readouterr().err)
            done.append(arguments[0])
        elif launcher == "torchrun":  # tests/test_parallel.py runs it
            options = arguments[arguments.index("train.py") + 1 :]
            train.new_config(vars(train.make_parser().parse_args(options)))
        else:
            assert (launcher, *arguments[:2]) in {
                ("python", "-m", "pytest"),
                ("export", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
            }
    assert {"train.py", "evaluate.py", "predict.py", "figures.py"} <= set(done)
    assert (folder / "predictions.png").exists()


def test_readme_programs(folder, monkeypatch):
    assert run(monkeypatch, "train.py", "--output-dir", "runs/cifar10-sgd") == 0
    images = torch.zeros(2, 3, 50, 40, dtype=torch.uint8)
    names = {"images": images}
    for program in blocks("python"):
        exec(program, names)
    assert names["logits"].shape == (8, 10)
    assert names["probabilities"].shape == (2, 10)
    torch.testing.assert_close(names["probabilities"].sum(1), torch.ones(2))
