import csv
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

import dataset
import train
from dataset import Augmentation, Dataset, Split, training_batches
from evaluate import loss_and_accuracy, predict
from utils import run_script, select_precision


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs train.py in this process on 40 training images; returns exit code and output."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", {"train": 4, "val": 2, "test": 2})
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows(run_dir):
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


# --- Schedule and learning ----------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1 / 50)
    assert rates[49] == pytest.approx(0.1)
    assert rates[525] == pytest.approx(0.05, rel=1e-3)  # half-way down the cosine
    assert rates[999] < 1e-6
    assert rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_learning_rate_of_a_very_short_run(total):
    rates = [train.learning_rate(step, total, 0.1) for step in range(total)]
    assert all(0 < rate <= 0.1 for rate in rates)


def test_training_overfits_32_images(tmp_path):
    split = Split(*(tensor[:32] for tensor in dataset.draw_shapes().train))
    config = train.new_config({"dataset": "shapes", "optimizer": "adam", "batch_size": 32})
    config["precision"] = select_precision("auto", torch.device("cpu"))
    data = Dataset(dataset.SHAPES, split, split, split)
    run = train.Run(tmp_path, {**config, "epochs": 60}, data, torch.device("cpu"))
    plain = Augmentation(flip=False, shift=0)
    [batch] = training_batches(split, run.preprocessing, plain, 32, 0, 0)
    for _ in range(60):
        train.train_step(run, *batch)
        run.epoch += 1
    logits = predict(run.network, split.images, run.preprocessing, config["precision"])
    loss, accuracy = loss_and_accuracy(logits, split.labels)
    assert accuracy == 1
    assert loss < 0.2


# --- A run and its folder -----------------------------------------------------------------------


def test_run_folder_is_complete(trained_run):
    folder, _ = trained_run
    run_dir = folder / "runs" / "shapes-sgd"
    names = {"config.json", "metrics.csv", "timing.csv", "curves.png", "last.pt", "best.pt"}
    assert names <= {path.name for path in run_dir.iterdir()}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["lr"] == 0.01
    assert config["settings"]["precision"] in ("fp32", "bf16")
    assert [start["torch"] for start in config["starts"]] == [torch.__version__]
    [row] = rows(run_dir)
    assert row["epoch"] == "1"
    assert row["step"] == "47"
    assert all(math.isfinite(float(value)) for value in row.values())


def test_output_is_lines_when_it_is_no_terminal(trained_run):
    _, done = trained_run
    assert "\r" not in done.stdout + done.stderr
    assert done.stderr == ""
    assert "this run will take about" in done.stdout
    assert "python evaluate.py runs/shapes-sgd/best.pt" in done.stdout


def test_one_epoch_leaves_chance(trained_run):
    """Chance is 10 %; the whole run of the README reaches over 90 %."""
    folder, _ = trained_run
    assert float(rows(folder / "runs" / "shapes-sgd")[0]["val_accuracy"]) > 0.2


def test_run_checkpoint_and_evaluation_agree(trained_run):
    folder, _ = trained_run
    best = "runs/shapes-sgd/best.pt"
    done = run_python("evaluate.py", best, "--split", "val", "--json", "val.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((folder / "val.json").read_text())
    [row] = rows(folder / "runs" / "shapes-sgd")
    assert evaluated["accuracy"] == float(row["val_accuracy"])
    assert evaluated["loss"] == float(row["val_loss"])
    picture = folder / "runs" / "shapes-sgd" / "best-confusion-val.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(tiny, optimizer, monkeypatch):
    options = ("--epochs", 2, "--optimizer", optimizer, "--seed", 3)
    assert tiny(*options, "--output-dir", "whole") == 0
    step = train.train_step

    def terminate_in_second_epoch(run, images, labels):
        if run.epoch == 1 and run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, images, labels)

    monkeypatch.setattr(train, "train_step", terminate_in_second_epoch)
    assert tiny(*options, "--output-dir", "parts") == 128 + signal.SIGTERM
    monkeypatch.setattr(train, "train_step", step)
    assert len(rows("parts")) == 1
    assert tiny("--resume", "parts") == 0

    assert Path("parts/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        whole, parts = (torch.load(Path(folder, name)) for folder in ("whole", "parts"))
        for checkpoint in (whole, parts):
            for row in checkpoint.pop("progress", {}).get("history", []):
                for column in ("seconds", "images_per_second", "peak_memory_mib"):
                    del row[column]
        assert same(whole, parts), name


def test_seed_changes_the_run(tiny):
    for seed in (0, 1):
        assert tiny("--epochs", 1, "--seed", seed, "--output-dir", f"seed{seed}") == 0
    assert rows("seed0") != rows("seed1")


def test_finished_run_can_be_lengthened(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    before = Path("run/last.pt").read_bytes()
    assert tiny("--resume", "run") == 0
    assert "finished" in capsys.readouterr().out
    assert Path("run/last.pt").read_bytes() == before
    assert tiny("--resume", "run", "--epochs", 2) == 0
    assert [row["epoch"] for row in rows("run")] == ["1", "2"]
    assert json.loads(Path("run/config.json").read_text())["settings"]["epochs"] == 2


def test_run_killed_before_its_first_save_starts_over(tiny):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    expected = rows("run")
    for path in Path("run").iterdir():
        if path.name != "config.json":
            path.unlink()
    assert tiny("--resume", "run") == 0
    assert rows("run") == expected


def test_default_folder_is_a_new_one_each_time(tiny):
    for _ in range(2):
        assert tiny("--epochs", 1) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["shapes-sgd", "shapes-sgd-2"]


# --- Numbers that go wrong ----------------------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_best(tiny, monkeypatch, capsys):
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: 1e30 if step >= 6 else rate(step, *rest)
    )
    assert tiny("--epochs", 3, "--output-dir", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the loss became nan in epoch 2, step 3" in error
    assert "--lr" in error
    assert "run/best.pt" in error
    kept = torch.load("run/best.pt")
    assert kept["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept["weights"].values())


def test_weights_gone_wrong_are_not_saved(tiny, monkeypatch, capsys):
    """The last step's loss is finite but its update is not."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: math.inf if step == 4 else 1e-3)
    assert tiny("--epochs", 1, "--output-dir", "run") == 2
    assert "became" in capsys.readouterr().err
    assert not Path("run/last.pt").exists()


# --- Bad input: one line, exit code 2, nothing left behind --------------------------------------

BAD_COMMANDS = [
    ("--dataset imagenet", "imagenet"),
    ("--optimizer lion", "lion"),
    ("--precision fp8", "fp8"),
    ("--epochs 0", "0 is not a"),
    ("--epochs -1", "-1 is not a"),
    ("--epochs 1.5", "1.5 is not a whole number"),
    ("--batch-size 0", "0 is not a"),
    ("--batch-size -8", "-8 is not a"),
    ("--batch-size many", "many is not a whole number"),
    ("--lr 0", "0 is not a"),
    ("--lr -0.1", "-0.1 is not a"),
    ("--lr nan", "nan is not a"),
    ("--lr inf", "inf is not a"),
    ("--momentum 1", "--momentum"),
    ("--momentum -0.1", "--momentum"),
    ("--weight-decay -1", "--weight-decay"),
    ("--seed -1", "--seed"),
    ("--momentum 0.9 --optimizer adam", "--momentum is for --optimizer sgd"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device tpu9", "--device tpu9"),
    ("--device meta", "--device meta"),
    ("--dataset cifar10 --data-dir nowhere", "nowhere is not a folder"),
    ("--resume nowhere", "nowhere"),
    ("--resume a --output-dir b", "not allowed with"),
    ("--output-dir taken", "taken is not empty"),
    ("--output-dir taken/file", "taken/file"),
    ("--output-dir taken/file/run", "taken/file"),
    ("--epoch 3", "--epoch"),
    ("extra", "extra"),
]


@pytest.mark.parametrize(("options", "named"), BAD_COMMANDS, ids=[c for c, _ in BAD_COMMANDS])
def test_bad_command_is_one_line(tiny, capsys, options, named):
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    assert tiny(*options.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: error: ")
    assert err.count("\n") == 1
    assert named in err
    assert [path.name for path in Path().iterdir()] == ["taken"]
    assert Path("taken/file").read_text() == "mine"


def test_resume_refuses_another_experiment(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    assert tiny("--resume", "run", "--lr", "0.5") == 2
    assert "--lr 0.5 would make it another experiment" in capsys.readouterr().err


def test_resume_refuses_fewer_epochs_than_done(tiny, capsys):
    assert tiny("--epochs", 2, "--output-dir", "run") == 0
    assert tiny("--resume", "run", "--epochs", "1") == 2
    assert "--epochs 1" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["", "{}", "[]", '{"settings": {"epochs": -1}}', "\x00"])
def test_resume_from_a_broken_record(tiny, capsys, config):
    Path("run").mkdir()
    Path("run/config.json").write_text(config)
    assert tiny("--resume", "run") == 2
    assert "config.json is not the record of a run" in capsys.readouterr().err


def test_user_sees_one_line_from_the_real_script(tmp_path):
    done = run_python("train.py", "--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_dir_that_cannot_be_made(tiny, capsys, monkeypatch):
    """The tests may run as root, who may write everywhere."""

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert tiny("--output-dir", "locked/run") == 2
    assert "cannot make the folder locked/run: Permission denied" in capsys.readouterr().err


def test_two_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    """The second takes the name between the first's look and its mkdir."""
    monkeypatch.chdir(tmp_path)
    config = train.new_config({"dataset": "shapes"})
    look = train.free_run_dir

    def look_then_lose_the_race(*arguments):
        found = look(*arguments)
        if not Path("runs").exists():
            Path("runs/shapes-sgd").mkdir(parents=True)
        return found

    monkeypatch.setattr(train, "free_run_dir", look_then_lose_the_race)
    assert train.make_run_dir(config, None) == Path("runs/shapes-sgd-2")


def test_resume_refuses_the_checkpoint_of_another_run(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "sgd") == 0
    assert tiny("--epochs", 1, "--optimizer", "adam", "--output-dir", "adam") == 0
    Path("adam/last.pt").replace("sgd/last.pt")
    assert tiny("--resume", "sgd", "--epochs", 2) == 2
    assert "last.pt is not of this run" in capsys.readouterr().err


def test_resume_from_a_damaged_checkpoint(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    with open("run/last.pt", "rb+") as file:
        file.truncate(1000)
    assert tiny("--resume", "run", "--epochs", 2) == 2
    error = capsys.readouterr().err
    assert "last.pt is truncated or damaged" in error
    assert error.count("\n") == 1


def test_readme_has_every_option_with_its_default():
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    table = {name: re.findall(r"\d[\d.]*(?:e-\d+)?", default) for name, default in rows}
    options = {text for action in train.make_parser()._actions for text in action.option_strings}
    assert set(table) == options - {"-h", "--help"}
    for dataset_name, optimizer in train.RECIPES:
        config = train.new_config({"dataset": dataset_name, "optimizer": optimizer})
        for name, value in config.items():
            if isinstance(value, int | float):
                assert value in map(float, table[train.as_option(name)]), name
