import csv
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

# Before the first import of kernels/: without a GPU Triton is to interpret its kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# cuBLAS reads it once, at a process's first product; train.py --deterministic needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import tiny as tiny_module

import compact
import figures
import train
from checkpoint import layer_types
from dataset import SHAPES
from recipes import new_config
from run import Run
from utils import run_script

ROOT = Path(__file__).parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
TIMES = {"seconds", "images_per_second", "peak_memory_mib"}  # which no two runs share
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also fault runs and whole trainings")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; only with --long")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


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


def run_python(*arguments, cwd, **settings):
    """Run a script of the project as a user does and return the finished process."""
    script, *rest = map(str, arguments)
    command = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False, **settings
    )


def read_rows(path):
    """Return the rows of a CSV file."""
    with open(path) as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Return whether two checkpoints' contents are equal to the bit, but for times and memory."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - TIMES)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def signal_handlers():
    """Restore what a script does on signals after the test that ran it."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def tiny(signal_handlers, monkeypatch, tmp_path):
    """Run train.py or evaluate.py in this process, tiny, in tmp_path; return the exit code.

    tiny("--epochs", 2), tiny("runs/a/best.pt", script=evaluate): 40 training images of shapes, a
    network of 67x67 pixels (tests/tiny.py), curves that are empty, as drawing them takes longest.
    """
    tiny_module.shrink(monkeypatch.setattr)
    monkeypatch.setattr(figures, "learning_curves", lambda *_: figures.Figure())
    monkeypatch.chdir(tmp_path)

    def call(*arguments, script=train):
        arguments = list(map(str, arguments))
        if script is train and "--resume" not in arguments:
            small = ["--dataset", "shapes", "--batch-size", "8", "--precision", "fp32"]
            arguments = [*small, *arguments]
        if script is not compact and "--device" not in arguments:
            arguments += ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run_script(script.main)
        return stopped.value.code or 0

    yield call
    torch.use_deterministic_algorithms(False)  # which --deterministic switched on


@pytest.fixture
def faulty(monkeypatch):
    """Let a run send itself signals: faulty("SIGTERM", 1, 2) before step 2 of epoch 1, from 0."""
    with monkeypatch.context() as patch:
        tiny_module.inject_fault(patch.setattr)
        yield lambda name, epoch, step: patch.setenv("FAULT", f"{name} 0 {epoch} {step}")


@pytest.fixture
def after_step(monkeypatch):
    """Have a function called after each step of a run, as Run.record_step() is."""

    def register(function):
        record_step = Run.record_step

        def record_and_call(self, loss, logits, targets):
            record_step(self, loss, logits, targets)
            function(self, loss, logits, targets)

        monkeypatch.setattr(Run, "record_step", record_and_call)

    return register


@pytest.fixture
def tiny_run(tiny, tmp_path):
    """The folder of a finished tiny run of two epochs with a checkpoint that evaluate.py takes."""
    assert tiny("--epochs", 2, "--output-dir", "run") == 0
    return tmp_path / "run"


@pytest.fixture
def content(tiny):
    """The content of a checkpoint that evaluate.py takes: a tiny network that was never trained."""
    network = tiny_module.TinyAlexNet()
    torch.nn.init.normal_(network.classifier.fc8.weight, std=0.5)  # or all classes are alike
    size = tiny_module.IMAGE_SIZE
    return {
        "model": {"num_classes": 10, "groups": 1, "dropout": 0.5},
        "layers": layer_types(network),
        "weights": network.state_dict(),
        "classes": list(SHAPES),
        "preprocessing": {
            "mean": [120.0, 110.0, 100.0],
            "std": [60.0, 50.0, 40.0],
            "size": size,
            "enlarged_size": size,
            "image_size": 32,
        },
        "training": asdict(new_config({"dataset": "shapes", "precision": "fp32"})),
        "epoch": 1,
    }
