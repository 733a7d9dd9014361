import itertools
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

import recipes
from dataset import DATASETS
from recipes import (
    Config,
    new_config,
    parse_command_line,
    read_record,
    record,
    resumed_config,
    run_name,
)
from utils import UserError


def test_paper_recipe_is_the_papers():
    """§2, §4.1, §4.2, §5 and the 2012 source."""
    expected = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 90, "lr": 0.01}
    expected |= {"bias_lr_factor": 2, "bias_decay_factor": 0, "dropout": 0.5, "init": "2012"}
    expected |= {"input": "centered", "augmentation": "paper", "schedule": "plateau"}
    assert expected.items() <= asdict(new_config({"recipe": "paper"})).items()
    assert new_config({"recipe": "paper", "lr": 0.5}).lr == 0.5


def as_options(settings):
    """Return the options of train.py that give these settings."""
    options = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            options.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, list):
            options += [option, *value]
        elif value is not None:
            options.append(f"{option}={value}")
    return options


COMMANDS = ["", "--recipe paper", "--optimizer adam", "--dataset shapes --recipe=adam"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_the_defaults_that_the_command_trains_with(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "10000")
    config = new_config(parse_command_line(command.split()))
    with pytest.raises(SystemExit):
        parse_command_line([*command.split(), "--help"])
    options = capsys.readouterr().out.split("\n  --")[1:]
    texts = {option.split()[0].rstrip(","): option for option in options}
    for name, value in asdict(config).items():
        [text] = re.findall(r"\(default: (.*?)\)", texts.pop(name.replace("_", "-")))
        found = {"on": True, "off": False, "not set": None}.get(text, text)
        assert (type(value)(found) if isinstance(found, str) else found) == value, name
    assert texts.keys() == {"output-dir", "resume"}


def test_every_recipe_has_valid_settings_for_every_data_set():
    """The command line takes them as it takes a user's."""
    for recipe, dataset in itertools.product(recipes.RECIPES, DATASETS):
        config = new_config({"recipe": recipe, "dataset": dataset, "data_dir": "data"})
        assert (config.recipe, config.dataset) == (recipe, dataset)
        assert Config(**parse_command_line(as_options(asdict(config)))) == config
    assert new_config({"optimizer": "adam"}) == new_config({"recipe": "adam"})
    assert new_config({}) == Config()


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": True, "deterministic": False, "lr": 1e-30, "groups": 2},
        {"recipe": "paper", "data_dir": "a folder/-x", "train_images": 450, "seed": 2**63 - 1},
        {"optimizer": "adam", "dropout": 0.0, "save_every": 0.1},
        {"classes": ["cat", "dog"], "weights": "best.pt"},
    ],
)
def test_settings_and_options_are_each_others_inverse(settings):
    assert parse_command_line(as_options(settings)) == settings


BAD_COMMANDS = """
--dataset imagenet: imagenet
--recipe paper --train-split full: --schedule plateau watches the validation images
--recipe paper --optimizer adam: --recipe paper is for --optimizer sgd
--recipe adam --optimizer sgd: --recipe adam is for --optimizer adam
--recipe paper --warm-up 0.3: --warm-up is for --schedule cosine
--momentum 0.9 --optimizer adam: --momentum is for --optimizer sgd
--mix none --mix-probability 0.5: --mix-probability is for --mix cutmix
--resume a --output-dir b: not allowed with
--resume nowhere: nowhere: there is no run in it
--resume taken/file: taken/file is a file; name its folder, taken
--output-dir taken: taken is not empty
--output-dir taken/file: taken/file
--output-dir taken/file/run: taken/file
--dataset cifar10 --data-dir nowhere: nowhere is not a folder
--device cuda:99: --device cuda:99
--train-images 15: --train-images 15 is not a multiple of 10
--train-images 50: --train-images 50 is not a multiple of 10 from 10 to 40
--train-split test: test
--mix-probability 2: 2 is not a number from 0 to 1
--groups 3: 3
--precision fp8: fp8
--warm-up 1: 1 is not a number of at least 0 and below 1
--momentum -0.1: -0.1 is not a number
--bias-decay-factor nan: nan is not a number
--epochs 0: 0 is not a whole number above 0
--epochs 1.5: 1.5 is not a whole number
--batch-size many: many is not a whole number
--lr inf: inf is not a number above 0
--save-every 0: 0 is not a number above 0
--seed 9223372036854775808: --seed
--epoch 3: --epoch
--ema 0.999: --ema
extra: extra
"""


@pytest.mark.parametrize(
    ("command", "message"), [line.split(": ", 1) for line in BAD_COMMANDS.strip().splitlines()]
)
def test_bad_command_is_one_line_and_leaves_nothing_behind(tiny, capsys, command, message):
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    assert tiny(*shlex.split(command)) == 2
    error = capsys.readouterr().err
    assert (error[:17], error.count("\n")) == ("train.py: error: ", 1)
    assert message in error
    assert list(map(str, Path().rglob("*"))) == ["taken", "taken/file"]
    assert Path("taken/file").read_text() == "mine"


@pytest.mark.parametrize(
    "overrides",
    [
        {"recipe": "paper", "groups": 2},
        {"optimizer": "adam", "lr": 3e-4, "train_images": 450, "compile": True},
        {"dataset": "shapes", "train_split": "full", "data_dir": "Bücher"},
        {"dataset": "folder", "data_dir": "pets", "classes": ["-x", "猫"], "weights": "best.pt"},
    ],
)
def test_record_returns_the_settings(tmp_path, overrides):
    config, starts = new_config(overrides), [{"command": "python train.py"}]
    (tmp_path / "config.json").write_text(json.dumps(record(config, starts)))
    assert read_record(tmp_path / "config.json") == (config, starts)


def changed(**changes):
    """Return the text of a record with these settings; ... leaves one out."""
    settings = asdict(new_config({"dataset": "shapes"})) | changes
    settings = {name: value for name, value in settings.items() if value is not ...}
    return json.dumps({"settings": settings, "starts": []})


BAD_RECORDS = {
    "empty": "",
    "list": "[]",
    "no settings": '{"starts": []}',
    "no starts": json.dumps({"settings": asdict(new_config({}))}),
    "deep": "[" * 200_000,
    "old": changed(ema=0.0, label_smoothing=0.0, norm="lrn"),
    "unknown": changed(output_dir="x"),
    "missing": changed(lr=...),
    "text for a number": changed(lr="fast"),
    "list for a number": changed(epochs=[1]),
    "number for a name": changed(optimizer=1),
    "name for names": changed(classes="cat"),
    "number for names": changed(classes=[1, 2]),
    "text for a switch": changed(compile="yes"),
    "nothing": changed(epochs=None),
    "out of range": changed(epochs=-1),
    "infinite": changed(lr=float("inf")),
    "conflict": changed(schedule="plateau", train_split="full"),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_record_is_one_line(tiny, capsys, kind):
    Path("run").mkdir()
    Path("run/config.json").write_text(BAD_RECORDS[kind])
    assert tiny("--resume", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run/config.json is not the record of a run (" in error
    assert ("those of another version of this program" in error) == (
        kind in ("old", "unknown", "missing")
    )


def test_resuming_changes_nothing_that_would_be_another_experiment(tmp_path):
    config = new_config({"dataset": "shapes", "precision": "fp32"})
    (tmp_path / "config.json").write_text(json.dumps(record(config, [])))
    free = {"epochs": 9, "data_dir": "x", "device": "cpu", "compile": True}
    free |= {"deterministic": True, "save_every": 1.0}
    fixed = {"recipe": "adam", "optimizer": "adam", "batch_size": 8, "lr": 0.5}
    fixed |= {"muon_lr": 0.5, "momentum": 0.5, "weight_decay": 0.0}
    fixed |= {"bias_lr_factor": 2.0, "bias_decay_factor": 0.0, "warm_up": 0.2}
    fixed |= {"schedule": "plateau", "dataset": "cifar10", "train_split": "full", "seed": 1}
    fixed |= {"train_images": 10, "input": "centered", "augmentation": "none", "mix": "cutmix"}
    fixed |= {"mix_probability": 0.5, "init": "2012", "groups": 2, "dropout": 0.1}
    fixed |= {"precision": "bf16", "classes": ["disc", "ring"], "weights": "best.pt"}
    assert free.keys() | fixed.keys() == asdict(config).keys()
    resumed, _ = resumed_config(tmp_path, free)
    assert asdict(resumed) == asdict(config) | free
    for name, value in fixed.items():
        option = "--" + name.replace("_", "-")
        with pytest.raises(
            UserError, match=re.escape(f"{option} {value} would make it another experiment")
        ):
            resumed_config(tmp_path, {name: value})
    same = asdict(config) | {"precision": "auto"}  # "auto" is what was chosen then
    assert resumed_config(tmp_path, same)[0] == config


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("--seed 3", "AlexNet on CIFAR-10, recipe sgd"),
        ("--recipe paper --groups 2", "AlexNet on CIFAR-10, recipe paper, groups 2"),
        ("--optimizer adam --epochs 16 --lr 1e-3", "AlexNet on CIFAR-10, recipe adam, lr 0.001"),
        ("--dataset shapes --mix cutmix", "AlexNet on shapes, recipe sgd, mix cutmix"),
    ],
)
def test_name_of_a_run_says_what_is_not_its_recipes(command, name):
    assert run_name(new_config(parse_command_line(command.split()))) == name
