"""A run and its folder: what it writes and prints, how it stops, and how it goes on."""

import math
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny as tiny_module
import torch
from conftest import ROOT, needs_gpu, read_rows, same
from torch import nn

import run as run_module
import train
from dataset import draw_shapes
from distributed import Processes
from recipes import CHANGEABLE, FIELDS, new_config, option_name, read_record
from run import METRICS, TIMING, Run
from utils import FolderLock

needs_posix = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")


def read_folder(folder):
    """Return the content of each file of a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def error_of(tiny, capfd):
    """Run train.py, tiny, which must fail; return the only line that it prints to stderr."""

    def call(*arguments):
        assert tiny(*arguments) == 2
        [line] = capfd.readouterr().err.splitlines()
        return line

    return call


def read_until(words, descriptor, process):
    """Return what a process prints until it has printed these words."""
    printed = b""
    while words not in printed:
        assert process.is_alive(), printed
        if select.select([descriptor], [], [], 1)[0]:
            printed += os.read(descriptor, 4096)
    return printed


# --- What a run writes and prints ---


def test_folder_of_a_run_is_complete(tiny_run):
    names = {"config.json", "metrics.csv", "timing.csv", "curves.png", "last.pt", "best.pt"}
    assert set(read_folder(tiny_run)) == names
    assert (tiny_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, columns in (("metrics", METRICS), ("timing", TIMING)):
        rows = read_rows(tiny_run / f"{name}.csv")
        assert all(tuple(row) == columns for row in rows)
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    config, starts = read_record(tiny_run / "config.json")
    given = {"dataset": "shapes", "batch_size": 8, "precision": "fp32", "epochs": 2}
    assert config == new_config(given | {"device": "cpu"})
    assert [start["torch"] for start in starts] == [torch.__version__]
    assert torch.load(tiny_run / "last.pt")["training"] == asdict(config)


def test_epoch_in_metrics_csv_is_in_timing_csv_already(tiny, monkeypatch):
    """Whoever finds an epoch in metrics.csv takes it to be over, whenever the run was killed."""
    write, written = run_module.write_csv, []
    monkeypatch.setattr(
        run_module, "write_csv", lambda path, *rest: written.append(path.name) or write(path, *rest)
    )
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    assert written == ["timing.csv", "metrics.csv"]


def test_output_is_lines_when_it_is_no_terminal(tiny, capsys):
    assert tiny("--epochs", 1, "--mix", "cutmix", "--output-dir", "run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\r" not in out
    assert "% of mixed images; validation loss" in out
    assert "finished 1 epoch in " in out
    assert out.endswith("\nevaluate it with: python evaluate.py run/best.pt\n")


def test_command_to_evaluate_names_the_folder_of_the_data(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_dataset", lambda *_, **__: draw_shapes())
    cifar10 = ("--dataset", "cifar10", "--epochs", 1, "--output-dir", "run")
    assert tiny(*cifar10, "--data-dir", "my data") == 0
    command = "python evaluate.py run/best.pt"
    assert f"{command} --data-dir 'my data'\n" in capsys.readouterr().out
    assert tiny("--resume", "run", "--data-dir", "data") == 0
    assert f"{command}\n" in capsys.readouterr().out


def test_times_are_those_of_the_steps_and_the_time_left_is_revised(
    tiny, faulty, monkeypatch, after_step, capsys
):
    """A step takes a second in the first epoch of three, three seconds later; a save a hundred.

    The last epoch is stopped and resumed.
    """
    clock = SimpleNamespace(seconds=0.0)
    save = Run.save

    def step(run, *_):
        clock.seconds += 3 if run.epoch else 1

    def save_slowly(run):
        save(run)
        clock.seconds += 100

    after_step(step)
    monkeypatch.setattr(Run, "save", save_slowly)
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    faulty("SIGTERM", 2, 1)
    assert tiny("--epochs", 3, "--save-every", 0.04, "--output-dir", "run") == 128 + signal.SIGTERM
    assert tiny("--resume", "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/3: training" in line]
    left = [line.rpartition("; ")[2] for line in lines]
    assert left == ["about 10 seconds left", "about 11 seconds left", "3 images/s"]
    rows = read_rows("run/timing.csv")
    assert [float(row["seconds"]) for row in rows] == [5, 15, 15]
    assert [float(row["images_per_second"]) for row in rows] == [8, 2.7, 2.7]


# --- Stopping and going on ---


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--momentum 0",
        "--optimizer adam",
        "--optimizer muon --deterministic",
        "--recipe paper",
        "--mix cutmix --mix-probability 0.5",
        "--precision fp16 --train-images 10 --batch-size 2",
        "--train-split full --batch-size 13",
        pytest.param("--device cuda --deterministic", marks=needs_gpu),
        pytest.param("--device cuda --deterministic --compile", marks=needs_gpu),
    ],
)
def test_interrupted_run_equals_an_uninterrupted_one(tiny, faulty, options):
    """To the bit. Stopped in the first step, in the middle, and after an epoch's last step."""
    options = [*options.split(), "--epochs", 2]
    faulty("SIGTERM", 9, 9)
    assert tiny(*options, "--output-dir", "whole") == 0
    how = [*options, "--output-dir", "parts"]
    for name, *position in (("SIGTERM", 0, 0), ("SIGINT", 0, 4), ("SIGTERM", 1, 2)):
        faulty(name, *position)
        assert tiny(*how) == 128 + getattr(signal, name)
        epoch, step = position
        last = torch.load("parts/last.pt")
        assert (last["epoch"], last["progress"]["step"]) == (epoch, step + 1)
        how = ["--resume", "parts"]
    assert tiny(*how) == 0
    assert Path("parts/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        whole, parts = (torch.load(Path(folder, name)) for folder in ("whole", "parts"))
        assert same(whole, parts), name
    scaler = torch.load("parts/last.pt")["scaler"]
    if "fp16" in options:
        assert scaler["_growth_tracker"] > 2  # more steps than since the last start


@needs_posix
def test_signals_that_stop_a_run_and_those_that_do_not(tiny, faulty, capfd):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    for name in ("SIGPIPE", "SIGHUP"):
        faulty(name, 0, 2)
        assert tiny("--epochs", 1, "--output-dir", name) == 128 + getattr(signal, name)
        command = f"stopped; go on with: python train.py --resume {name}\n"
        assert capfd.readouterr().err == command
        assert torch.load(f"{name}/last.pt")["progress"]["step"] == 3
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert tiny("--epochs", 1, "--output-dir", "nohup") == 0


def test_second_ctrl_c_stops_at_once_and_saves_nothing(tiny, monkeypatch, after_step, capfd):
    def interrupt_twice(run, *_):
        if run.epoch == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    after_step(interrupt_twice)
    assert tiny("--epochs", 2, "--output-dir", "run") == 128 + signal.SIGINT
    assert torch.load("run/last.pt")["epoch"] == 0
    first, second = capfd.readouterr().err.split("\n", 1)[1].splitlines()
    assert first == "stopping after this step; Ctrl-C again: at once, unsaved"
    assert second == "train.py: interrupted"


@needs_posix
def test_closed_pipe_stops_the_run_and_saves_it(tmp_path):
    """As `python train.py | head -1` does."""
    os.mkfifo(tmp_path / "pipe")
    options = "--dataset shapes --batch-size 8 --epochs 1000 --output-dir run".split()
    ours = os.open(tmp_path / "pipe", os.O_RDWR)
    process = tiny_module.start(tmp_path, *options, stdout="pipe")
    read_until(b"AlexNet on shapes", ours, process)
    os.close(ours)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGPIPE
    command = "stopped; go on with: python train.py --resume run\n"
    assert (tmp_path / "stderr.txt").read_text() == command
    last = torch.load(tmp_path / "run" / "last.pt")
    assert (last["epoch"], last["progress"]["step"]) > (0, 0)


@needs_posix
def test_closed_terminal_stops_the_run_and_saves_it(tmp_path):
    """It takes the output with it, and whatever writes there would fail."""
    ours, theirs = os.openpty()
    terminal = os.ttyname(theirs)
    options = "--dataset shapes --batch-size 8 --epochs 1000 --output-dir run".split()
    process = tiny_module.start(tmp_path, *options, stdout=terminal, stderr=terminal)
    assert b"\r" in read_until(b"epoch 2/1000", ours, process)  # a bar
    os.close(theirs)
    os.close(ours)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    assert torch.load(tmp_path / "run" / "last.pt")["epoch"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_to_a_full_disk_is_one_line(tmp_path):
    process = tiny_module.start(tmp_path, "--help", stdout="/dev/full")
    process.join(60)
    assert process.exitcode == 2
    error = "train.py: error: [Errno 28] No space left on device; free some disk space\n"
    assert (tmp_path / "stderr.txt").read_text() == error


def test_finished_run_says_so_and_can_be_lengthened(tiny_run, tiny, capsys):
    before = read_folder(tiny_run)
    assert tiny("--resume", "run") == 0
    told = capsys.readouterr().out
    assert "run has all its 2 epochs; give more --epochs to go on" in told
    assert "finished 2 epochs in " in told
    assert read_folder(tiny_run) == before
    changed = ("--epochs", 3, "--save-every", 9, "--data-dir", "elsewhere", "--deterministic")
    assert tiny("--resume", "run", *changed) == 0
    told = capsys.readouterr().out
    assert "3 epochs instead of 2: from here the learning rate is that of the new length" in told
    assert [row["epoch"] for row in read_rows("run/metrics.csv")] == ["1", "2", "3"]
    config, starts = read_record(Path("run/config.json"))
    assert (config.epochs, config.save_every, config.data_dir) == (3, 9, "elsewhere")
    assert len(starts) == 2


def test_run_can_be_resumed_from_before_its_first_step(tiny_run, tiny):
    """As after kill -9 in the first minutes."""
    with mock.patch.object(Run, "batches", side_effect=KeyboardInterrupt):
        assert tiny("--epochs", 2, "--output-dir", "killed") == 128 + signal.SIGINT
    assert torch.load("killed/last.pt")["progress"]["step"] == 0
    assert tiny("--resume", "killed") == 0
    assert Path("killed/metrics.csv").read_bytes() == (tiny_run / "metrics.csv").read_bytes()


def test_what_a_killed_process_had_begun_to_write_is_deleted(tiny):
    Path("run").mkdir()
    for number, arguments in enumerate((["--output-dir", "run"], ["--resume", "run"])):
        Path("run/.unfinished-last.pt-x").write_text("half")
        assert tiny(*arguments, "--epochs", 1 + number) == 0
        assert not Path("run/.unfinished-last.pt-x").exists()


def test_resumed_run_keeps_its_settings(tiny_run, error_of):
    config, _ = read_record(tiny_run / "config.json")
    before = read_folder(tiny_run)
    for name in FIELDS.keys() - CHANGEABLE:
        choices = FIELDS[name].metadata["how"].get("choices", ())
        others = [value for value in choices if value not in (getattr(config, name), "auto")]
        numbers = {"batch_size": 9, "train_images": 10, "seed": 1}
        value = others[0] if others else numbers.get(name, 0.25)
        told = error_of("--resume", "run", "--epochs", 3, f"{option_name(name)}={value}")
        assert (
            f" would make it another experiment than run, which has {getattr(config, name)}" in told
        )
    assert read_folder(tiny_run) == before


def test_layer_that_was_replaced_is_trained_saved_and_resumed(tiny, faulty, monkeypatch):
    """As the docstring of AlexNet says; here by batch normalization, which has buffers too."""
    make_network = train.make_network

    def make_another(config, num_classes):
        network = make_network(config, num_classes)
        network.features.norm1 = nn.BatchNorm2d(12)
        return network

    monkeypatch.setattr(train, "make_network", make_another)
    faulty("SIGTERM", 1, 2)
    assert tiny("--epochs", 2, "--output-dir", "parts") == 128 + signal.SIGTERM
    assert tiny("--resume", "parts") == 0
    faulty("SIGTERM", 9, 9)
    assert tiny("--epochs", 2, "--output-dir", "whole") == 0
    whole, parts = (torch.load(f"{folder}/last.pt") for folder in ("whole", "parts"))
    assert same(whole, parts)
    assert parts["weights"]["features.norm1.running_mean"].any()


# --- Which folder ---


@needs_posix
def test_runs_that_start_together_get_a_folder_each(tmp_path):
    options = "--dataset shapes --batch-size 8 --epochs 1".split()
    together = [tiny_module.start(tmp_path, *options) for _ in range(3)]
    for process in together:
        process.join(60)
        assert process.exitcode == 0
    folders = list((tmp_path / "runs").iterdir())
    assert {folder.name for folder in folders} == {"shapes-sgd", "shapes-sgd-2", "shapes-sgd-3"}
    assert all((folder / "best.pt").exists() for folder in folders)


def cut(run):
    os.truncate(run / "last.pt", 1000)


def take_from_another_run(run):
    content = torch.load(run / "last.pt")
    content["training"]["lr"] = 0.5
    torch.save(content, run / "last.pt")


RESUME = "--resume run --epochs 3"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda run: (run / "last.pt").unlink(), RESUME, "cannot read run/last.pt: No such file"),
        (cut, RESUME, "run/last.pt is truncated or damaged"),
        (take_from_another_run, RESUME, "last.pt is not of this run: its 'lr' is not 0.01"),
        (FolderLock, RESUME, "another process is writing to"),
        (None, "--resume run --epochs 1", "--epochs 1 is less than the 2 that run already has"),
        (None, "--resume run/last.pt", "is a file; name its folder, run"),
        (None, "--resume nowhere", "there is no run in it (no config.json)"),
        (None, "--output-dir run", "--output-dir run is not empty; go on with a run in it by"),
        (None, "--output-dir run/last.pt", "--output-dir run/last.pt is not empty"),
        (None, "--output-dir run/last.pt/x", "run/last.pt is not a writable folder"),
    ],
)
def test_folder_that_cannot_be_used_is_one_line(
    tiny_run, tiny, error_of, change, arguments, message
):
    kept = change and change(tiny_run)
    before = read_folder(tiny_run)
    assert message in error_of(*arguments.split())
    assert read_folder(tiny_run) == before
    if isinstance(kept, FolderLock):
        kept.release()
        assert tiny(*arguments.split()) == 0


def test_folder_that_is_not_writable_is_one_line(tiny, error_of, monkeypatch):
    """The tests may run as root, who may write everywhere."""
    Path("mine").mkdir()

    def close(folder):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)

    close(Path.cwd() / "mine")
    for name in ("mine", "mine/run"):
        assert "mine is not a writable folder" in error_of("--output-dir", name)
    close(Path.cwd())
    assert "is not a writable folder" in error_of("--output-dir", "other")
    assert tiny("--epochs", 1, "--output-dir", "mine") == 0  # as a container gives it
    Path("runs").symlink_to("gone")  # as when a cluster's scratch space was cleared
    assert "cannot make the folder runs" in error_of("--epochs", 1)


def test_full_split_trains_on_the_validation_images(tiny, capsys):
    overrides = {"dataset": "shapes", "train_split": "full", "output_dir": Path("run")}
    run = train.prepare(overrides | {"epochs": 1, "device": "cpu"}, Processes())
    shapes = draw_shapes()
    for ours, *parts in zip(run.train_split, shapes.train, shapes.val, strict=True):
        assert torch.equal(ours, torch.cat(parts))
    run.close()
    assert tiny("--resume", "run", "--epochs", 2) == 0
    assert "60 training and 0 validation images" in capsys.readouterr().out
    rows = read_rows("run/metrics.csv")
    assert [(row["val_loss"], row["val_accuracy"]) for row in rows] == [("", "")] * 2
    best, last = (torch.load(f"run/{name}.pt") for name in ("best", "last"))
    assert best["epoch"] == 2
    assert same(best["weights"], last["weights"])


# --- Numbers that go wrong ---


def test_nan_stops_the_run_and_keeps_the_best(tiny, error_of, monkeypatch, capfd):
    lr_at = train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda run, step: 1e30 if step >= 6 else lr_at(run, step))
    error = error_of("--epochs", 3, "--output-dir", "run")
    assert "the loss became nan in epoch 2, step 3; start a new run with a lower --lr" in error
    assert error.endswith("Kept from before: run/last.pt and run/best.pt")
    kept = torch.load("run/best.pt")
    assert kept["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept["weights"].values())

    monkeypatch.setattr(train, "lr_at", lr_at)
    assert tiny("--resume", "run") == 0
    assert torch.load("run/last.pt")["epoch"] == 3


@pytest.mark.parametrize(
    ("options", "bad_step", "stop_step"),
    [
        ("--epochs 1", 4, None),
        ("--epochs 1 --train-split full --batch-size 12", 4, None),
        ("--epochs 2", 2, 2),
    ],
)
def test_weights_gone_wrong_are_not_saved(
    error_of, faulty, monkeypatch, options, bad_step, stop_step
):
    """The step's loss is finite and its update is not: before a validation, a save and a stop."""
    faulty("SIGTERM", 0, stop_step)
    monkeypatch.setattr(train, "lr_at", lambda run, step: math.inf if step == bad_step else 1e-3)
    error = error_of(*options.split(), "--output-dir", "run")
    assert f"a weight became NaN or infinite in epoch 1, step {bad_step + 1}" in error
    assert error.endswith("Kept from before: run/last.pt")
    [kept] = Path("run").glob("*.pt")
    assert torch.load(kept)["progress"]["step"] == 0


def test_first_of_two_errors_is_told(tiny, monkeypatch, capsys):
    """From the second, in keeping the best network, nobody could see what went wrong."""

    save_best = Run.save_best

    def save_best_in_little_room(run):
        if run.epoch:
            raise OSError("there is no room")
        save_best(run)

    monkeypatch.setattr(Run, "save_best", save_best_in_little_room)
    monkeypatch.setattr(train, "lr_at", lambda run, step: 1e30 if step >= 6 else 1e-3)
    assert tiny("--epochs", 2) == 2
    second, first = capsys.readouterr().err.splitlines()
    assert second == "best.pt was not kept: there is no room"
    assert "the loss became nan" in first


# --- The program without its fast layers ---

WITHOUT_KERNELS = """
import sys
sys.path.insert(0, "tests")
import tiny, train, evaluate, utils
assert utils.kernels is None
tiny.shrink()
options = sys.argv[1:]
for script, arguments in ((train, options), (evaluate, ["run/best.pt", "--device", "cpu"])):
    sys.argv = [script.__name__ + ".py", *arguments]
    try:
        utils.run_script(script.main)
    except SystemExit as stopped:
        assert not stopped.code
"""


def test_everything_runs_without_the_folder_kernels(tiny, tmp_path):
    options = "--epochs 2 --mix cutmix --groups 2 --output-dir run".split()
    assert tiny(*options) == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, bare)
    (bare / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "tiny.py", bare / "tests")
    small = "--dataset shapes --batch-size 8 --precision fp32 --device cpu".split()
    command = [sys.executable, "-c", WITHOUT_KERNELS, *small, *options]
    done = subprocess.run(command, cwd=bare, capture_output=True, text=True, timeout=300)
    warnings = [line for line in done.stderr.splitlines() if "atplotlib" not in line]
    assert (done.returncode, warnings) == (0, [])
    assert "top-1 accuracy" in done.stdout
    assert (bare / "run" / "best-confusion-test.png").exists()
    ours, theirs = (read_rows(run / "metrics.csv") for run in (Path("run"), bare / "run"))
    for a, b in zip(ours, theirs, strict=True):
        for name in METRICS:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4)


def test_run_that_is_still_guessing_says_so_once(tiny, monkeypatch, capsys):
    """After its first epoch, and only if the loss is within 1% of ln 10 = 2.303."""
    told = "the loss is still that of guessing, ln 10 = 2.30"
    assert tiny("--epochs", 2, "--output-dir", "a") == 0
    assert capsys.readouterr().out.count(told) == 1
    for loss, count in ((2.27, 0), (2.29, 1), (3.0, 1)):
        monkeypatch.setattr(Run, "validate", lambda run, loss=loss: (loss, 0.1))
        assert tiny("--epochs", 2, "--output-dir", str(loss)) == 0
        assert capsys.readouterr().out.count(told) == count
