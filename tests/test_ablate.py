import csv
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ablate
import dataset
import figures
import model
import recipes
import train
from utils import FolderLock, run_script


@pytest.fixture
def ablation(handlers_restored, monkeypatch, tmp_path):
    """Runs ablate.py in this process on 10 images, tanh alone unless told; returns the code."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(model, "UNITS", 64)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        command = ["ablate.py", "--dataset", "shapes", "--output-dir", "out", "--train-images", 10]
        if "--ideas" not in arguments:
            command += ["--only", "tanh"]
        monkeypatch.setattr(sys, "argv", [*map(str, command), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(ablate.main)
        return stopped.value.code

    return run


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_ablation_from_the_runs_to_the_tables(ablation, monkeypatch, capsys):
    """Stopped in the second run; the same command goes on, and a third time trains nothing."""
    step = train.train_step

    def terminate_in_second_run(run, images, labels):
        if run.config["activation"] == "tanh":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, images, labels)

    drawn, draw = {}, figures.training_errors
    monkeypatch.setattr(
        figures, "training_errors", lambda errors, *a: drawn.update(errors) or draw(errors, *a)
    )
    options = ("--seeds", 1, "--epochs", 2)
    monkeypatch.setattr(train, "train_step", terminate_in_second_run)
    assert ablation(*options) == 128 + signal.SIGTERM
    assert [row["switch"] for row in rows("out/ablation.csv")] == ["base"]
    before = Path("out/base-0/metrics.csv").stat().st_mtime_ns
    monkeypatch.setattr(train, "train_step", step)
    assert ablation(*options) == 0
    assert Path("out/base-0/metrics.csv").stat().st_mtime_ns == before

    results = rows("out/ablation.csv")
    assert [row["switch"] for row in results] == ["base", "tanh"]
    for row in results:
        metrics = rows(f"out/{row['switch']}-0/metrics.csv")
        assert [len(metrics), row["outcome"], row["train_images"]] == [2, "finished", "10"]
        assert float(row["val_accuracy"]) == float(metrics[-1]["val_accuracy"])
        assert float(row["val_loss"]) == float(metrics[-1]["val_loss"])
        error = 1 - float(metrics[-1]["train_accuracy"])
        assert float(row["train_error"]) == pytest.approx(error, abs=1e-6)
        epochs = [r for r in rows("out/epochs.csv") if r["switch"] == row["switch"]]
        assert [float(r["val_accuracy"]) for r in epochs] == [
            float(r["val_accuracy"]) for r in metrics
        ]
    for label, name in (("ReLU", "base"), ("tanh", "tanh")):
        errors = [1 - float(r["train_accuracy"]) for r in rows(f"out/{name}-0/metrics.csv")]
        assert drawn[label] == [pytest.approx(errors, abs=1e-6)]
    for name in ("ablation.png", "relu-and-tanh.png"):
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").rglob("*.pt"))

    # An earlier version's record has what may change, and not what was no option yet.
    record = json.loads(Path("out/ablation.json").read_text())
    assert record["base"].pop("augmentation_ramp") == 0
    record["base"] |= {"compile": True, "save_every": 9}
    Path("out/ablation.json").write_text(json.dumps(record))

    monkeypatch.setattr(train, "train", None)  # a run now would fail
    assert ablation(*options) == 0
    assert rows("out/ablation.csv") == results
    assert ablation("--seeds", 1, "--epochs", 3) == 2
    assert "holds an ablation with other settings" in capsys.readouterr().err


def test_ablation_from_before_there_were_later_ideas_goes_on(ablation):
    assert ablation("--seeds", 1, "--epochs", 1) == 0
    path = Path("out/ablation.json")
    settings = json.loads(path.read_text())
    del settings["ideas"], settings["base"]
    path.write_text(json.dumps(settings))
    assert ablation("--seeds", 1, "--epochs", 1) == 0
    path.write_text(json.dumps({**settings, "base": {"lr": 0.5}}))  # when the recipe was another
    assert ablation("--seeds", 1, "--epochs", 1) == 2
    path.write_text("{")
    assert ablation("--seeds", 1, "--epochs", 1) == 2


def test_diverged_run_is_a_result(ablation, monkeypatch):
    step = train.train_step

    def diverge_with_tanh(run, images, labels):
        loss, correct = step(run, images, labels)
        return (loss * float("nan") if run.config["activation"] == "tanh" else loss), correct

    monkeypatch.setattr(train, "train_step", diverge_with_tanh)
    assert ablation("--seeds", 1, "--epochs", 1) == 0
    base, diverged = rows("out/ablation.csv")
    assert (base["outcome"], diverged["outcome"]) == ("finished", "diverged")
    assert diverged["val_accuracy"] == ""
    told = Path("out/tanh-0/diverged.txt").read_text()
    assert "the loss became nan" in told
    assert "Kept" not in told  # nothing is
    assert "--lr" not in told  # which ablate.py does not have


def test_diverged_run_does_not_shorten_the_papers_figure(monkeypatch, tmp_path):
    results, epochs = [], []
    for switch, seed, outcome, last in (
        ("base", 0, "finished", 3),
        ("tanh", 0, "finished", 3),
        ("tanh", 1, "diverged", 1),
    ):
        results.append({"switch": switch, "seed": seed, "outcome": outcome, "val_accuracy": 0.5})
        rows = [
            {"switch": switch, "seed": seed, "epoch": i, "train_error": 0.5} for i in range(last)
        ]
        epochs += rows
    drawn, draw = {}, figures.training_errors
    monkeypatch.setattr(
        figures,
        "training_errors",
        lambda errors, title: drawn.update(errors) or draw(errors, title),
    )
    monkeypatch.setattr(ablate, "collect", lambda args: (results, epochs))
    common = {"ideas": "paper", "recipe": "paper", "dataset": "cifar10"}
    args = SimpleNamespace(**common, train_images=None, epochs=3, seeds=2, output_dir=tmp_path)
    ablate.report(args)
    assert drawn == {"ReLU": [[0.5] * 3], "tanh": [[0.5] * 3]}


def test_later_ideas_are_added_to_the_base_and_to_the_folder(ablation):
    for idea in ("smoothing", "nesterov"):
        options = ("--ideas", "modern", "--seeds", 1, "--epochs", 1, "--only", idea)
        assert ablation(*options) == 0
    assert [row["switch"] for row in rows("out/ablation.csv")] == ["base", "nesterov", "smoothing"]
    assert {row["recipe"] for row in rows("out/ablation.csv")} == {"modern"}
    settings = [
        json.loads(Path(f"out/{name}-0/config.json").read_text())["settings"]
        for name in ("base", "nesterov", "smoothing")
    ]
    assert [setting["nesterov"] for setting in settings] == [False, True, False]
    assert [setting["label_smoothing"] for setting in settings] == [0, 0, 0.1]
    assert Path("out/ablation.png").exists()
    assert not Path("out/relu-and-tanh.png").exists()


@pytest.mark.parametrize(("ideas", "name", "sign"), [("paper", "tanh", 1), ("modern", "ema", -1)])
def test_differences_are_paired_by_seed(ideas, name, sign):
    """By hand; positive where the idea helps, and only where both runs finished."""
    accuracies = {
        ("base", 0): 0.5,
        ("base", 1): 0.6,
        ("base", 2): 0.7,
        (name, 0): 0.4,
        (name, 1): 0.65,
    }
    results = [
        {"switch": switch, "seed": seed, "outcome": "finished", "val_accuracy": accuracy}
        for (switch, seed), accuracy in accuracies.items()
    ]
    results.append({"switch": name, "seed": 2, "outcome": "diverged"})
    [idea] = ablate.compare(results, ideas)
    assert idea["idea"] == ablate.IDEAS[ideas][name].idea
    assert idea["differences"] == pytest.approx([sign * 10, sign * -5])
    assert (idea["diverged"], idea["seeds"]) == (1, 3)


def test_diverged_base_is_not_held_against_an_idea():
    results = [{"switch": "base", "seed": 0, "outcome": "diverged"}]
    results += [{"switch": "half-rate", "seed": 0, "outcome": "finished", "val_accuracy": 0.5}]
    [idea] = ablate.compare(results, "modern")
    assert idea["differences"] == []
    assert (idea["diverged"], idea["seeds"]) == (0, 1)


def test_folder_belongs_to_one_process(ablation, capsys):
    """Even before its first run has begun, and one that was refused leaves it to others."""
    Path("out").mkdir()
    lock = FolderLock(Path("out"))
    options = ("--seeds", 1, "--epochs", 1, "--only", "tanh")
    assert ablation(*options) == 2
    assert "another process is writing to out" in capsys.readouterr().err
    assert not list(Path("out").iterdir())
    lock.release()
    Path("out/mine").touch()
    assert ablation(*options) == 2
    Path("out/mine").unlink()
    assert ablation(*options) == 0


def test_run_whose_idea_has_changed_is_not_taken_for_it(ablation, monkeypatch, capsys):
    options = ("--ideas", "modern", "--seeds", 1, "--epochs", 1, "--only", "smoothing")
    assert ablation(*options) == 0
    assert ablation(*options) == 0
    changed = ablate.Switch({"label_smoothing": 0.3}, "more", "")
    monkeypatch.setitem(ablate.WITH, "smoothing", changed)
    assert ablation(*options) == 2
    assert "out/smoothing-0 was trained with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "switch"),
    [(recipe, switch) for recipe in ("modern", "paper") for switch in ablate.WITHOUT.values()]
    + [("modern", switch) for switch in ablate.WITH.values()],
    ids=lambda each: each if isinstance(each, str) else each.idea,
)
def test_each_switch_changes_a_setting_of_the_base(recipe, switch):
    base = recipes.new_config({"recipe": recipe})
    settings = {name: value for name, value in switch.settings.items() if "_times" not in name}
    if settings.keys() & {"mix_off", "mix_probability"}:
        del settings["mix"]  # named for bases that mix nothing, which could not do less of it
    assert all(base[option] != value for option, value in settings.items())
    options = recipes.make_parser().parse_args(recipes.as_command_line(settings))
    recipes.new_config(vars(options))


def test_idea_that_the_base_has_is_not_tried(ablation, monkeypatch, capsys):
    """The recipe of shapes has no CutMix that could be left out."""
    assert ablation("--ideas", "modern", "--only", "unmixed") == 2
    assert "unmixed is what the base has" in capsys.readouterr().err
    assert ablation("--ideas", "modern", "--only", "half-rate", "inverted-dropout") == 2
    assert "inverted-dropout is what half-rate is" in capsys.readouterr().err
    assert not Path("out").exists()
    monkeypatch.setattr(ablate, "train_run", lambda *_: None)
    assert ablation("--ideas", "modern", "--seeds", 1) == 0
    told = capsys.readouterr().out
    assert f"run 1 of {len(ablate.WITH) - 1}: base" in told  # two ideas less, and the base
    assert "mixup, seed 0" in told
    assert "unmixed" not in told


def test_rates_are_multiples_of_the_recipes():
    args = SimpleNamespace(ideas="modern", recipe="modern", dataset="cifar10", data_dir="data")
    args.epochs, args.train_images, args.compile = 1, None, True
    assert ablate.run_settings(args, "base", 0)["compile"]
    rates = {name: ablate.run_settings(args, name, 0).get("lr") for name in ablate.WITH}
    assert rates["half-rate"] == rates["half-batch"] == recipes.new_config({})["lr"] / 2
    assert rates["double-rate"] == recipes.new_config({})["lr"] * 2
    assert rates["mixup"] is None
    half = ablate.run_settings(args, "half-batch", 0)["batch_size"]
    assert half == recipes.new_config({})["batch_size"] / 2
    assert [ablate.run_settings(args, "base", seed)["seed"] for seed in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--seeds 0", "--seeds"),
        ("--recipe both", "--recipe"),
        ("--ideas all", "--ideas"),
        ("--ideas modern --recipe paper", "--warm-up is for --schedule cosine"),
        ("--ideas modern --recipe fast", "--recipe fast is for --dataset cifar10"),
        ("--only magic", "--only magic is none of the ideas: tanh, no-norm"),
        ("--train-images 25", "--train-images 25"),
        ("--output-dir taken", "taken is not empty"),
    ],
)
def test_bad_command_is_one_line(ablation, capsys, options, named):
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    assert ablation("--epochs", 1, *options.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("ablate.py: error: ")
    assert error.count("\n") == 1
    assert named in error
