"""A small AlexNet and few images, for tests of what a run does.

As a script it is train.py with both: python tests/tiny.py --dataset shapes. The environment
variable FAULT, such as "SIGKILL 1 0 3", names a signal that a process sends itself, its rank, and
the epoch and step (from 0) before which it does.
UNITS is how many units fc6 and fc7 have.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
import dataset
import evaluate
import model
import run
import train
import transforms
from model import AlexNet, init_weights
from utils import run_script

IMAGE_SIZE = 67  # has maps of 15, 7, 3 and 1
SHAPES_PER_CLASS = {"train": 4, "val": 2, "test": 2}


class TinyAlexNet(AlexNet):
    """AlexNet for 67x67 images with an eighth of the channels and by default 64 units."""

    def __init__(self, num_classes: int = 10, groups: int = 1, dropout: float = 0.5):
        with torch.device("meta"):
            super().__init__(num_classes, groups, dropout)
        for name, layer in self.features.named_children():
            if isinstance(layer, nn.Conv2d):
                small = nn.Conv2d(
                    max(3, layer.in_channels // 8),
                    layer.out_channels // 8,
                    layer.kernel_size,
                    layer.stride,
                    layer.padding,
                    groups=layer.groups,
                )
                setattr(self.features, name, small)
        units = int(os.environ.get("UNITS", 64))
        self.classifier.fc6 = nn.Linear(32, units)
        self.classifier.fc7 = nn.Linear(units, units)
        self.classifier.fc8 = nn.Linear(units, num_classes)
        init_weights(self)


def shrink(set_attribute=setattr) -> None:
    """Let the scripts train a TinyAlexNet on 40 images of shapes."""
    for module in (model, transforms, checkpoint):
        set_attribute(module, "IMAGE_SIZE", IMAGE_SIZE)
    for module in (train, checkpoint):
        set_attribute(module, "AlexNet", TinyAlexNet)
    set_attribute(dataset, "SHAPES_PER_CLASS", SHAPES_PER_CLASS)


def inject_fault(set_attribute=setattr) -> None:
    """Let a run send itself the signal that FAULT names."""
    batches = run.Run.batches

    def faulty_batches(self):
        name, *position = os.environ["FAULT"].split()
        for batch in batches(self):
            here = [self.processes.rank, self.epoch, self.step]
            if position == list(map(str, here)):
                signal.raise_signal(getattr(signal, name))
            yield batch

    set_attribute(run.Run, "batches", faulty_batches)


def main() -> None:
    """Run the script that the environment variable SCRIPT names, by default train.py."""
    shrink()
    if "FAULT" in os.environ:
        inject_fault()
    script = {"train": train, "evaluate": evaluate}[os.environ.get("SCRIPT", "train")]
    sys.argv[0] = f"{script.__name__}.py"
    run_script(script.main)


def start(
    folder: Path, *arguments, stdout="stdout.txt", stderr="stderr.txt", **variables
) -> multiprocessing.Process:
    """Start train.py, tiny, in a process of its own, which need not import torch again.

    It runs in the folder with these environment variables. What it prints is added to stdout and
    stderr there, which may be devices. Not for Windows.
    """
    variables = {name: str(value) for name, value in variables.items()}
    return start_function(_main_in, folder, arguments, stdout, stderr, variables)


def start_function(function, *arguments) -> multiprocessing.Process:
    """Start function(*arguments) in such a process."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tiny"])
    process = forks.Process(target=function, args=arguments)
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the preload
        os.environ.pop("UNITS", None)  # all later processes would inherit it
        process.start()
    return process


def _main_in(folder: Path, arguments: tuple, stdout, stderr, variables: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    os.setsid()  # a terminal that it opens to read and write is its own
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    for number, name in ((1, stdout), (2, stderr)):
        mode = os.O_RDWR if str(name).startswith("/dev/") else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(name, mode | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["train.py", *map(str, arguments)]
    main()


if __name__ == "__main__":
    main()
