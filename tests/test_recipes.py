import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rows

import dataset
import recipes
from utils import UserError


def test_paper_recipe_is_the_papers():
    config = recipes.new_config({"recipe": "paper"})
    expected = {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 90}
    expected |= {"bias_lr_factor": 2, "bias_decay_factor": 0, "dropout": 0.5, "init": "2012"}
    expected |= {"input": "centred", "augmentation": "paper", "schedule": "plateau"}
    assert expected.items() <= config.items()
    assert recipes.new_config({"recipe": "paper", "init": "he", "lr": 0.5})["init"] == "he"
    assert recipes.RECIPES.keys() >= {("paper", name, "sgd") for name in dataset.DATASETS}


def test_every_option_is_documented_with_its_default():
    page = (ROOT / "docs" / "training.md").read_text()
    defaults = dict(re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \|", page, re.M))
    options = {action.option_strings[0] for action in recipes.make_parser()._actions}
    assert set(defaults) == options - {"-h"}
    for recipe, dataset_name, optimizer in recipes.RECIPES:
        given = {"recipe": recipe, "dataset": dataset_name, "optimizer": optimizer}
        config = recipes.new_config(given)
        for name in config.keys() - given.keys():
            value, default = config[name], defaults[recipes.as_option(name)]
            if isinstance(value, bool):
                assert default == ("on" if value else "off"), name
            elif isinstance(value, int | float):
                assert value in map(float, re.findall(r"\d[\d.]*(?:e-\d+)?", default)), name
            else:
                assert f"`{value}`" in default, name


def test_settings_and_command_line_are_each_others_inverse():
    for given in ({}, {"nesterov": True, "compile": True, "lr": 0.5}, {"recipe": "paper"}):
        config = recipes.new_config(given)
        options = vars(recipes.make_parser().parse_args(recipes.as_command_line(config)))
        assert recipes.new_config(options) == config


# --- The record of a run --------------------------------------------------------------------------


def test_record_is_what_was_run_whatever_the_recipes_are_now(monkeypatch):
    """As for a run from when the fast recipe was one of SGD, or with a setting now refused."""
    for given in ({"optimizer": "sgd"}, {"warm_up": 0.3}):
        modern = recipes.new_config({"dataset": "cifar10", **given})
        record = {**modern, "recipe": "fast" if "optimizer" in given else "paper"}
        assert recipes.recorded_config(record) == record
    adam = recipes.new_config({"optimizer": "adam"})
    assert recipes.recorded_config(adam) == adam
    for name in ("optimizer", "epochs", "lr", "weight_decay", "momentum"):
        with pytest.raises(KeyError):
            recipes.recorded_config({n: v for n, v in modern.items() if n != name})


def test_run_from_before_the_recipes_is_resumed(tiny, monkeypatch):
    """By what runs did then, whatever the recipes have now."""
    assert tiny("--epochs", 1, "--output-dir", "whole") == 0
    shutil.copytree("whole", "old")
    old = ("dataset", "optimizer", "data_dir", "seed", "device", "precision", "save_every")
    old += ("epochs", "batch_size", "lr", "momentum", "weight_decay")
    record = json.loads(Path("old/config.json").read_text())
    record["settings"] = {name: record["settings"][name] for name in old}
    Path("old/config.json").write_text(json.dumps(record))
    last = torch.load("old/last.pt")
    last["training"] = record["settings"]
    last["model"] = {name: last["model"][name] for name in ("num_classes", "groups", "dropout")}
    del last["preprocessing"]["enlarged_size"]
    torch.save(last, "old/last.pt")
    monkeypatch.setitem(recipes.RECIPES["modern", "shapes", "sgd"], "label_smoothing", 0.5)
    for folder in ("whole", "old"):
        assert tiny("--resume", folder, "--epochs", 2) == 0
    assert rows("old") == rows("whole")
    assert len(rows("old")) == 2


def test_old_run_is_read_as_what_it_was():
    """What the first version did, which had no options for this."""
    record = json.loads((ROOT / "tests" / "first-version" / "config.json").read_text())
    config = recipes.recorded_config(record["settings"])
    did = {"init": "he", "input": "standardised", "augmentation": "shift", "mix": "none"}
    did |= {"augmentation_ramp": 0, "label_smoothing": 0, "ema": 0, "nesterov": False}
    did |= {"schedule": "cosine", "warm_up": 0.05, "bias_lr_factor": 1, "bias_decay_factor": 1}
    did |= {"activation": "relu", "norm": "lrn", "pooling": "overlapping", "dropout": 0.5}
    did |= {"dropout_scaling": "training", "mix_off": 0, "mix_probability": 1}
    did |= {"groups": 1, "recipe": "modern", "train_split": "train", "compile": False}
    assert {name: config[name] for name in did} == did


def test_flag_of_a_run_can_be_taken_back(tiny):
    assert tiny("--epochs", 1, "--output-dir", "run", "--deterministic") == 0
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert tiny("--resume", "run", "--epochs", 2, "--no-deterministic") == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert json.loads(Path("run/config.json").read_text())["settings"]["deterministic"] is False


def test_automatic_precision_is_that_of_the_run():
    run = ROOT / "tests" / "first-version"
    config, _ = recipes.resumed_config(run, {"precision": "auto"})
    assert config["precision"] == "fp32"
    with pytest.raises(UserError, match="--precision bf16 would make it another experiment"):
        recipes.resumed_config(run, {"precision": "bf16"})


BROKEN_RECORDS = ["", "{}", "[]", '{"settings": {"epochs": -1}}', "\x00", "[" * 200_000]
BROKEN_RECORDS += [
    '{"settings": {"output_dir": "x"}, "starts": []}',
    '{"settings": {"help": true}}',
]


@pytest.mark.parametrize("config", BROKEN_RECORDS, ids=range(len(BROKEN_RECORDS)))
def test_resume_from_a_broken_record(tiny, capsys, config):
    Path("run").mkdir()
    Path("run/config.json").write_text(config)
    assert tiny("--resume", "run") == 2
    assert "config.json is not the record of a run" in capsys.readouterr().err


# --- Bad options: one line, exit code 2, nothing left behind --------------------------------------

BAD_COMMANDS = [
    ("--dataset imagenet", "imagenet"),
    ("--recipe future", "future"),
    ("--recipe fast", "--recipe fast is for --dataset cifar10"),
    ("--recipe paper --train-split full", "--schedule plateau watches the validation images"),
    ("--nesterov --momentum 0", "--nesterov needs a --momentum"),
    ("--nesterov --optimizer adamw", "--nesterov is for --optimizer sgd"),
    ("--augmentation-ramp 0.5", "--augmentation-ramp is not for --augmentation shift or none"),
    ("--mix all", "all"),
    ("--mix cutmix --batch-size 1", "--mix cutmix needs at least two images"),
    ("--recipe paper --warm-up 0.3", "--warm-up is for --schedule cosine"),
    ("--ema 1", "--ema"),
    ("--label-smoothing 1", "--label-smoothing"),
    ("--warm-up 2", "--warm-up"),
    ("--train-split test", "test"),
    ("--recipe paper --optimizer adam", "--recipe paper is for --optimizer sgd"),
    ("--init 2013", "2013"),
    ("--input raw", "raw"),
    ("--augmentation all", "all"),
    ("--schedule step", "step"),
    ("--groups 3", "3"),
    ("--norm batch", "batch"),
    ("--dropout 1", "--dropout"),
    ("--bias-lr-factor -1", "--bias-lr-factor"),
    ("--bias-decay-factor nan", "--bias-decay-factor"),
    ("--train-images 15", "--train-images 15 is not a multiple of 10"),
    ("--train-images 50", "--train-images 50 is not a multiple of 10 from 10 to 40"),
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


# --- For people ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("dropout", "0.5"),
        ("weight_decay", "0.0005; another with some recipes, data sets or optimizers"),
    ],
)
def test_help_says_whether_there_are_other_defaults(option, text):
    assert recipes.recipe_defaults(option) == f"default: {text}"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "AlexNet on CIFAR-10, SGD"),
        (
            {"recipe": "paper", "groups": 2},
            "AlexNet on CIFAR-10, SGD, the paper's recipe, groups 2",
        ),
        (
            {"recipe": "fast", "epochs": 16, "augmentation": "strong", "train_images": 4500},
            "AlexNet on CIFAR-10, Adam, fast recipe, augmentation strong, train images 4500",
        ),
        ({"dataset": "shapes", "nesterov": True}, "AlexNet on shapes, SGD, nesterov"),
    ],
)
def test_name_of_a_run_says_what_is_not_as_in_its_recipe(given, name):
    assert recipes.run_name(recipes.new_config(given)) == name


def test_run_whose_recipe_is_no_more_has_a_name(monkeypatch):
    config = recipes.new_config({"recipe": "fast"})
    monkeypatch.delitem(recipes.RECIPES, ("fast", "cifar10", "adam"))
    assert recipes.run_name(config) == "AlexNet on CIFAR-10, Adam, fast recipe"
