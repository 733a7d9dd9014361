import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


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
    """Runs a script of the project as a user does and returns the finished process."""
    script, *rest = map(str, arguments)
    command = [sys.executable, str(ROOT / script), *rest]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False, **settings
    )


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The folder and the output of one epoch of `python train.py --dataset shapes`."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_python("train.py", "--dataset", "shapes", "--epochs", "1", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def same(a, b):
    """Whether two checkpoints' contents are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
