import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Before the first import of gpu_kernels.py: without a GPU Triton is to interpret its kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from filelock import FileLock
from tiny_train import SHAPES_PER_CLASS, UNITS

import dataset
import model
import train
from dataset import Preprocessing
from model import AlexNet
from utils import run_script

ROOT = Path(__file__).parent.parent
CLASSES = list("abc")
# cuBLAS reads it once, at a process's first product; train.py --deterministic needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
FAST_PATHS = [*DEVICES, pytest.param("cuda --compile", marks=needs_gpu)]


SLOW = ("test_notebook", "test_train", "test_faults")  # the files that take minutes


def pytest_collection_modifyitems(items):
    """Slow files first, so that none is left at the end to one of several processes (-n)."""
    items.sort(key=lambda item: item.path.stem not in SLOW)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="more of what tests/test_faults.py tries")


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar10_dir():
    """Where the real CIFAR-10 is: the environment variable CIFAR10_DIR, or data/."""
    folder = Path(os.environ.get("CIFAR10_DIR", ROOT / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        assert "CIFAR10_DIR" not in os.environ, f"CIFAR10_DIR is {folder}, which has no CIFAR-10"
        pytest.skip("CIFAR-10 is not in data/, and CIFAR10_DIR is not set")
    return folder


def identity_maps(n):
    """[n, 2, 3] maps of a plain resize."""
    return torch.eye(2, 3).expand(n, 2, 3)


def run_python(*arguments, cwd, **settings):
    """Runs a script of the project as a user does and returns the finished process."""
    script, *rest = map(str, arguments)
    command = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=3600, check=False, **settings
    )


@pytest.fixture(scope="session")
def content():
    """A complete checkpoint of a network that was never trained."""
    torch.manual_seed(0)
    network = AlexNet(num_classes=3)
    return {
        "model": network.config,
        "weights": network.state_dict(),
        "classes": CLASSES,
        "preprocessing": vars(Preprocessing([120.0] * 3, [60.0] * 3)),
        "training": {"dataset": "shapes", "precision": "fp32", "epochs": 1},
        "epoch": 1,
    }


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder and the output of one epoch of shapes with Adam: SGD learns less in it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: one for all processes
        folder = folder.parent
    folder, output = folder / "trained", folder / "trained.json"
    with FileLock(f"{folder}.lock"):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            options = ("--dataset", "shapes", "--optimizer", "adam", "--epochs", "1")
            done = run_python("train.py", *options, cwd=folder)
            assert done.returncode == 0, done.stderr
            output.write_text(json.dumps({"stdout": done.stdout, "stderr": done.stderr}))
    return folder, SimpleNamespace(**json.loads(output.read_text()))


def rows(run_dir):
    """What a run's metrics.csv says of each epoch."""
    with open(Path(run_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Whether two checkpoints' contents are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def handlers_restored():
    """What a script does on signals ends with the test that ran it."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def tiny(handlers_restored, monkeypatch, tmp_path):
    """Runs train.py in this process on 40 training images and 64 units; returns the exit code."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", SHAPES_PER_CLASS)
    monkeypatch.setattr(model, "UNITS", UNITS)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        arguments = list(map(str, arguments))
        if "--resume" not in arguments:  # on a GPU, steps need not be equal to the bit
            small = ["--dataset", "shapes", "--batch-size", "8", "--device", "cpu"]
            arguments = [*small, *arguments]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run_script(train.main)
        return stopped.value.code

    yield run
    torch.use_deterministic_algorithms(False)  # which --deterministic switched on
