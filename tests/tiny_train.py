"""train.py on 40 training images of shapes, with a fault on demand: for tests of whole processes.

As a script it trains a network with narrow fc6 and fc7, whose checkpoint is written in no time.

The environment variable FAULT, such as "SIGKILL 1 0 3", names a signal that a process sends itself,
its rank, and the epoch and step (from 0) before which it does. A process that torchrun has
restarted sends none.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import dataset
import model
import train
from utils import run_script

SHAPES_PER_CLASS = {"train": 4, "val": 2, "test": 2}
UNITS = 64
step = train.train_step


def train_step(run, images, labels):
    name, *place = os.environ.get("FAULT", "").split() or [""]
    now = [run.processes.rank, run.epoch, run.step]
    if place == list(map(str, now)) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), getattr(signal, name))
    return step(run, images, labels)


def main():
    dataset.SHAPES_PER_CLASS = SHAPES_PER_CLASS
    train.train_step = train_step
    run_script(train.main)


def main_in_folder(folder, arguments):
    """main() for a process forked by a test; what it prints goes to the folder's output.txt."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    sys.argv = ["train.py", *arguments]
    main()


if __name__ == "__main__":
    model.UNITS = UNITS
    main()
