"""Runs of one and of two processes on the CPU, which must come to the same."""

import csv
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_train
import torch
import torch.nn.functional as F
from conftest import ROOT, same

import dataset
import model
import parallel
import train
from dataset import Augmentation, Preprocessing
from model import AlexNet
from parallel import Processes
from utils import UserError, run_script

OPTIONS = ["--dataset", "shapes", "--device", "cpu", "--precision", "fp32", "--dropout", "0"]
OPTIONS += ["--ema", "0.9"]
OPTIONS += ["--batch-size", "13", "--epochs", "2"]
LAUNCHERS = {
    1: [sys.executable],
    2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


def train_tiny(folder, processes, *options, fault="", restarts=0):
    """Runs tiny_train.py in the folder and returns the finished process."""
    launcher = LAUNCHERS[processes] + ([f"--max-restarts={restarts}"] if restarts else [])
    command = [*launcher, str(ROOT / "tests" / "tiny_train.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
    if restarts:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


def metrics(run_dir):
    """All numbers of metrics.csv, row by row."""
    with open(run_dir / "metrics.csv") as file:
        return [float(value) for row in csv.DictReader(file) for value in row.values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of uninterrupted runs, "1" and "2", and what the second printed.

    Without dropout, of which each process draws its own.
    """
    folder = tmp_path_factory.mktemp("whole")
    for processes in (1, 2):
        done = train_tiny(folder, processes, *OPTIONS, "--output-dir", processes)
        assert done.returncode == 0, done.stderr
    return folder, done.stdout


# --- The same training --------------------------------------------------------------------------


def test_two_processes_train_as_one_does(whole):
    """Each epoch has batches of 13, 13, 13 and 1 image: the last leaves one process without."""
    folder, _ = whole
    assert metrics(folder / "2") == pytest.approx(metrics(folder / "1"), rel=1e-3)


def test_first_process_alone_prints(whole):
    _, output = whole
    assert output.count("epoch 1/2: ") == 1
    assert "2 processes" in output


# --- Interruptions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a "run" of two processes, of which one got a SIGTERM in the first step.

    The first, which then still writes when the other could end already.
    """
    folder = tmp_path_factory.mktemp("stopped")
    done = train_tiny(folder, 2, *OPTIONS, "--output-dir", "run", fault="SIGTERM 0 0 0")
    assert "stopped; go on with: torchrun --nproc_per_node=2 train.py --resume run" in done.stderr
    return folder


def test_gradient_of_two_processes_is_that_of_the_whole_batch(stopped, monkeypatch):
    """After one step the momentum is the gradient plus the weight decay of the initial weights."""
    last = torch.load(stopped / "run" / "last.pt")
    assert (last["epoch"], last["progress"]["step"]) == (0, 1)
    momenta = [state["momentum_buffer"] for state in last["optimizer"]["state"].values()]

    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", tiny_train.SHAPES_PER_CLASS)
    split = dataset.draw_shapes().train
    preprocessing, augmentation = Preprocessing.of(split.images), Augmentation()
    batches = dataset.training_batches(split, preprocessing, augmentation, 13, 0, 0)
    images, labels = next(batches)
    monkeypatch.setattr(model, "UNITS", tiny_train.UNITS)
    torch.manual_seed(0)
    network = AlexNet(dropout=0)
    F.cross_entropy(network(images), labels).backward()
    assert len(momenta) == len(list(network.parameters())) == 16
    for momentum, weight in zip(momenta, network.parameters(), strict=True):
        expected = weight.grad + 5e-4 * weight.detach()
        difference = torch.linalg.vector_norm(momentum - expected)
        assert difference < 1e-5 * torch.linalg.vector_norm(expected)


def test_run_goes_on_with_another_number_of_processes(whole, stopped, tmp_path):
    """Two processes, then one, then two again."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    done = train_tiny(tmp_path, 1, "--resume", "run", fault="SIGTERM 0 1 1")
    assert done.returncode == 128 + signal.SIGTERM
    assert "resumed after epoch 0, step 1" in done.stdout
    done = train_tiny(tmp_path, 2, "--resume", "run")
    assert "resumed after epoch 1, step 2" in done.stdout
    assert metrics(tmp_path / "run") == pytest.approx(metrics(whole[0] / "1"), rel=1e-3)


def test_run_goes_on_when_a_process_is_killed(whole, tmp_path):
    """Rank 1 dies by kill -9; torchrun starts both anew, and the result is the same to the bit."""
    options = (*OPTIONS, "--save-every", 0.001, "--output-dir", "run")
    done = train_tiny(tmp_path, 2, *options, fault="SIGKILL 1 1 2", restarts=1)
    assert done.returncode == 0, done.stderr
    assert "resumed after epoch 1, step " in done.stdout
    assert metrics(tmp_path / "run") == metrics(whole[0] / "2")
    last, expected = (torch.load(run / "last.pt") for run in (tmp_path / "run", whole[0] / "2"))
    for part in ("weights", "optimizer"):
        assert same(last[part], expected[part])


def test_those_left_are_told_in_one_line():
    """What gloo and NCCL raise in them, in torch's words."""
    lost = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    for error in (RuntimeError(lost), torch.distributed.DistBackendError("NCCL error")):
        told = train.explained(error)
        assert isinstance(told, UserError)
        assert "another process of this run has ended or is out of reach" in str(told)
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert train.explained(other) is other


# --- What each process knows --------------------------------------------------------------------


def process(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return Processes()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_have_each_image_once(monkeypatch, count):
    shares = [process(monkeypatch, RANK=rank, WORLD_SIZE=count).share for rank in range(count)]
    for images in (0, 1, 2, 7, 64):
        together = [image for share in shares for image in range(images)[share]]
        assert sorted(together) == list(range(images))


@pytest.mark.parametrize(
    ("device", "gpus", "named"),
    [("cuda:1", 4, "is one device"), ("mps", 0, "is one device"), ("cuda", 1, "(1)")],
)
def test_device_that_does_not_suit_several_processes(monkeypatch, device, gpus, named):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError) as raised:
        process(monkeypatch, WORLD_SIZE=4, RANK=3, LOCAL_RANK=3).select_device(device)
    assert named in str(raised.value)


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(parallel.torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(parallel, "select_device", str)
    for device in ("auto", "cuda"):
        assert process(monkeypatch, WORLD_SIZE=8, RANK=6, LOCAL_RANK=2).select_device(device) == (
            "cuda:2"
        )


def test_rank_of_a_process_that_is_alone_does_not_count(monkeypatch):
    """A variable that something else left behind would keep an image of each batch from it."""
    alone = process(monkeypatch, RANK=1, LOCAL_RANK=1)
    assert (alone.rank, alone.local_rank, alone.count) == (0, 0, 1)


def test_variables_that_torchrun_did_not_set(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start with torchrun, or unset WORLD_SIZE"):
        process(monkeypatch, WORLD_SIZE=2, RANK=0).connect()
    with pytest.raises(UserError, match="WORLD_SIZE=two is not a number; unset it"):
        process(monkeypatch, WORLD_SIZE="two")


@pytest.mark.parametrize(
    ("options", "variables", "named"),
    [
        ("--batch-size 1", {"WORLD_SIZE": 2}, "--batch-size 1 is less than"),
        ("", {"TORCHELASTIC_MAX_RESTARTS": 1}, "--max-restarts needs --output-dir"),
        (
            "--output-dir run",
            {"WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 1, "TORCHELASTIC_USE_AGENT_STORE": True},
            "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)
def test_bad_command_with_torchrun_is_one_line(monkeypatch, capsys, options, variables, named):
    process(monkeypatch, **variables)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(train.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
