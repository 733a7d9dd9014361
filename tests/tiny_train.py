"""train.py on 40 training images of shapes, with a fault on demand: for tests of whole processes.

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
import train
from utils import run_script

SHAPES_PER_CLASS = {"train": 4, "val": 2, "test": 2}
step = train.train_step


def train_step(run, images, labels):
    name, *place = os.environ.get("FAULT", "").split() or [""]
    now = [run.processes.rank, run.epoch, run.step]
    if place == list(map(str, now)) and not run.processes.restarts:
        os.kill(os.getpid(), getattr(signal, name))
    return step(run, images, labels)


def main():
    dataset.SHAPES_PER_CLASS = SHAPES_PER_CLASS
    train.train_step = train_step
    run_script(train.main)


if __name__ == "__main__":
    main()
