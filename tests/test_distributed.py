"""Runs of one and of two processes on the CPU, which must come to the same."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import tiny as tiny_module
import torch
import torch.nn.functional as F
from conftest import ROOT, read_rows

import distributed
import train
from dataset import draw_shapes
from distributed import Processes
from transforms import Augmentation, Preprocessing, training_batches
from utils import UserError, run_script

pytest.importorskip("resource")  # not on Windows, which cannot fork
OPTIONS = "--dataset shapes --device cpu --precision fp32 --dropout 0 --batch-size 13 --epochs 2"
OPTIONS = [*OPTIONS.split(), "--output-dir", "run"]


def variables(rank, world_size, **others):
    """Return what torchrun tells a process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    return {name: str(value) for name, value in (names | others).items()}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_with(world_size, folder, *arguments, fault="SIGTERM 9 9 9"):
    """Run so many processes of train.py, tiny. Return their exit codes, and what they printed."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "FAULT": fault}
    folder.mkdir(exist_ok=True)
    for name in ("stdout.txt", "stderr.txt"):
        (folder / name).unlink(missing_ok=True)
    started = [
        tiny_module.start(folder, *arguments, **variables(rank, world_size, **address))
        for rank in range(world_size)
    ]
    for process in started:
        process.join(120)
    printed = [(folder / name).read_text() for name in ("stdout.txt", "stderr.txt")]
    return [process.exitcode for process in started], *printed


def metrics(folder):
    """Return all numbers of the run's metrics.csv, row by row."""
    rows = read_rows(folder / "run" / "metrics.csv")
    return [float(value) for row in rows for value in row.values()]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process. No dropout, of which each process draws its own."""
    folder = tmp_path_factory.mktemp("one")
    assert train_with(1, folder, *OPTIONS)[0] == [0]
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run of two processes, of which one got a SIGTERM in the first step.

    The first, which then still writes when the other could end already.
    """
    folder = tmp_path_factory.mktemp("stopped")
    codes, _, error = train_with(2, folder, *OPTIONS, fault="SIGTERM 0 0 0")
    assert codes == [128 + signal.SIGTERM] * 2
    assert error == "stopped; go on with: python train.py --resume run\n"
    return folder


def test_two_processes_train_as_one_does(one, tmp_path):
    """Each epoch has batches of 13, 13, 13 and 1 image: the last leaves one process without."""
    codes, output, error = train_with(2, tmp_path, *OPTIONS)
    assert (codes, error) == ([0, 0], "")
    assert metrics(tmp_path) == pytest.approx(metrics(one), rel=1e-3)
    assert output.count("epoch 1/2: ") == 1  # the first process alone prints
    assert "2 processes, the first on " in output


def test_two_processes_train_as_one_does_with_muon(tmp_path):
    """Whose bf16 makes more of a gradient's last bits."""
    options = [*OPTIONS, "--optimizer", "muon"]
    assert [train_with(n, tmp_path / str(n), *options)[0] for n in (1, 2)] == [[0], [0, 0]]
    assert metrics(tmp_path / "1") == pytest.approx(metrics(tmp_path / "2"), rel=1e-2)


def test_gradient_of_two_processes_is_that_of_the_whole_batch(stopped, monkeypatch):
    """After one step the momentum is the gradient plus the weight decay of the initial weights."""
    last = torch.load(stopped / "run" / "last.pt")
    assert (last["epoch"], last["progress"]["step"]) == (0, 1)
    momenta = [state["momentum_buffer"] for state in last["optimizer"]["state"].values()]
    tiny_module.shrink(monkeypatch.setattr)
    split = draw_shapes().train
    preprocessing = Preprocessing.fit(split.images)
    images, labels = next(training_batches(split, preprocessing, Augmentation(), 13, 0, 0))
    torch.manual_seed(0)
    network = tiny_module.TinyAlexNet(dropout=0).double()
    F.cross_entropy(network(images.double()), labels).backward()
    for momentum, weight in zip(momenta, network.parameters(), strict=True):
        expected = weight.grad + 5e-4 * weight.detach()
        assert torch.linalg.vector_norm(momentum - expected) < 1e-5 * expected.norm()


def test_run_goes_on_with_another_number_of_processes(one, stopped, tmp_path):
    """Two processes, then one, then two, of which one dies, then one."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    resume = "--resume", "run", "--save-every", 1e-6
    codes, output, _ = train_with(1, tmp_path, *resume, fault="SIGTERM 0 0 2")
    assert codes == [128 + signal.SIGTERM]
    assert "resumed after epoch 0, step 1" in output
    codes, output, error = train_with(2, tmp_path, *resume, fault="SIGKILL 1 1 2")
    assert "resumed after epoch 0, step 3" in output
    assert codes == [2, -signal.SIGKILL]
    assert error.count("\n") == 1
    assert "another process of this run has ended or is out of reach" in error
    codes, output, _ = train_with(1, tmp_path, *resume)
    assert codes == [0]
    assert "resumed after epoch 1, step 2" in output
    assert metrics(tmp_path) == pytest.approx(metrics(one), rel=1e-3)


def test_shards_too_small_to_mix(tmp_path):
    """Batches of 19, 19, 19 and 3: the last has no pair for any of three processes."""
    options = [*OPTIONS, "--batch-size", 19, "--mix", "cutmix", "--train-split", "full"]
    codes, _, error = train_with(3, tmp_path, *options, "--optimizer", "adam")
    assert (codes, error) == ([0] * 3, "")


def test_torchrun_starts_a_run(one, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "tiny.py"), *OPTIONS]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "evaluate it with: python evaluate.py run/best.pt" in done.stdout
    assert metrics(tmp_path) == pytest.approx(metrics(one), rel=1e-3)


def wait_for_download(rank, port, folder):
    os.environ.update(variables(rank, 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    processes = Processes()
    processes.connect()
    with processes.main_process_first():
        if rank == 0:
            time.sleep(1)
            (folder / "data").touch()
        assert (folder / "data").exists()
    processes.disconnect()


def test_one_process_downloads_and_the_others_wait(tmp_path):
    """For an hour if need be; torch's own timeouts are 10 and 30 minutes."""
    assert timedelta(hours=1) < distributed.TIMEOUT
    port = free_port()
    both = [tiny_module.start_function(wait_for_download, rank, port, tmp_path) for rank in (0, 1)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0


# --- What each process knows ---


def make(monkeypatch, **names):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    return Processes()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shards_have_each_image_once(monkeypatch, world_size):
    shards = [make(monkeypatch, **variables(i, world_size)).shard for i in range(world_size)]
    for images in (0, 1, 2, 7, 64):
        together = [image for shard in shards for image in range(images)[shard]]
        assert sorted(together) == list(range(images))
    monkeypatch.delenv("WORLD_SIZE")  # a rank that something else left behind does not count
    assert Processes().shard == slice(0, None, 1)


@pytest.mark.parametrize(
    ("device", "gpus", "result"),
    [
        ("auto", 4, "cuda:3"),
        ("cuda", 4, "cuda:3"),
        ("auto", 0, "cpu"),
        ("cpu", 4, "cpu"),
        ("cuda", 1, "torchrun started more processes than this machine has GPUs (1)"),
        ("cuda:1", 4, "--device cuda:1 is one device"),
        ("mps", 0, "--device mps is one device"),
    ],
)
def test_each_process_has_its_own_device(monkeypatch, device, gpus, result):
    """The fourth process of the second machine."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        distributed, "select_device", lambda name: "cpu" if name == "auto" else name
    )
    try:
        found = make(monkeypatch, **variables(7, 8, LOCAL_RANK=3)).select_device(device)
    except UserError as error:
        found = str(error)
    assert found.startswith(result)


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        ("--batch-size 1", {"WORLD_SIZE": "2"}, "--batch-size 1 is too small for 2 processes"),
        ("--batch-size 3 --mix cutmix", {"WORLD_SIZE": "2"}, "with --mix cutmix; give at least 4"),
        ("", {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number; unset it"),
    ],
)
def test_bad_command_with_torchrun_is_one_line(monkeypatch, capsys, options, names, message):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Processes, "connect", lambda self: None)
    monkeypatch.setattr(Processes, "broadcast_from_main", lambda self, function: function())
    monkeypatch.setattr(sys, "argv", ["train.py", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        run_script(train.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_processes_that_cannot_connect_say_what_to_set(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start with torchrun, or unset WORLD_SIZE"):
        make(monkeypatch, **variables(0, 2)).connect()
