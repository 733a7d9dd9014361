"""What a run is to do: the recipes, the options of train.py, and the record of a run's settings."""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torchvision.transforms import v2

from dataset import AUGMENTATIONS, DATASETS, DEFAULT_DATA_DIR, INPUTS, data_dir_of
from model import CHOICES, INITS
from utils import (
    DAMAGE_ERRORS,
    PRECISIONS,
    OneLineParser,
    UserError,
    fraction,
    non_negative_float,
    positive_float,
    positive_int,
    probability,
    seed_number,
)

# ---------------------------------------------------------------------------------------------
# Recipes: what the options are unless the command line says otherwise
# ---------------------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SGD = {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}  # paper §5
ADAM = {"weight_decay": 0.0}
ADAMW = {"weight_decay": 0.05}
SMALL = {"batch_size": 32}
# Never change a value: a run from before an option existed is read as having had this one.
ORIGINAL = {
    "batch_size": 128,
    "init": "he",
    "input": "standardised",
    "augmentation": "shift",
    "augmentation_ramp": 0.0,
    "mix": "none",
    "mix_probability": 1.0,
    "mix_off": 0.0,
    "label_smoothing": 0.0,
    "schedule": "cosine",
    "warm_up": 0.05,
    "bias_lr_factor": 1.0,
    "bias_decay_factor": 1.0,
    "ema": 0.0,
    "activation": "relu",
    "norm": "lrn",
    "pooling": "overlapping",
    "dropout": 0.5,
    "dropout_scaling": "training",
    "groups": 1,
}
MODERN = {**ORIGINAL}  # today's habits
# What a search finds to be better goes in here, or in a row of RECIPES.
ON_CIFAR10 = {**MODERN, "epochs": 200, "batch_size": 256, "mix": "cutmix", "warm_up": 0.1}
PAPER = {  # 2012
    **ORIGINAL,
    "init": "2012",  # 2012 source: layers/layers-145.cfg, layers-166.cfg
    "input": "centred",  # §2
    "augmentation": "paper",  # §4.1
    "schedule": "plateau",  # §5
    "bias_lr_factor": 2.0,  # 2012 source: layers/layer-params-166.cfg
    "bias_decay_factor": 0.0,  # the same
    "activation": "relu",  # §3.1
    "norm": "lrn",  # §3.3; 2012 source: layer.py
    "pooling": "overlapping",  # §3.4
    "dropout": 0.5,  # §4.2
    "dropout_scaling": "test",  # §4.2
    "groups": 1,  # one GPU is enough today; the paper had 2 (§3.2)
}
RECIPES = {  # the first row of a recipe and data set has the default optimizer
    # Rate, warm-up and dropout were chosen together: docs/accuracy.md, "The learning rate".
    ("modern", "cifar10", "sgd"): {"lr": 0.08, **SGD, **ON_CIFAR10, "dropout_scaling": "test"},
    ("modern", "cifar10", "adam"): {"lr": 2e-4, **ADAM, **ON_CIFAR10},
    # The better of the two AdamW runs in docs/accuracy.md.
    ("modern", "cifar10", "adamw"): {"lr": 5e-4, "weight_decay": 0.2, **ON_CIFAR10},
    ("modern", "shapes", "sgd"): {"epochs": 4, "lr": 0.01, **SGD, **MODERN, **SMALL},
    ("modern", "shapes", "adam"): {"epochs": 4, "lr": 1e-4, **ADAM, **MODERN, **SMALL},
    ("modern", "shapes", "adamw"): {"epochs": 4, "lr": 1e-4, **ADAMW, **MODERN, **SMALL},
    # One to 2 1/4 hours on two CPU cores with bf16.
    ("fast", "cifar10", "adam"): {"epochs": 8, "lr": 4e-4, **ADAM, **MODERN},
    ("paper", "cifar10", "sgd"): {"epochs": 90, "lr": 0.01, **SGD, **PAPER},  # §5
    # In 4 epochs §5's 0.01 never falls, and ends lower (results/shapes-paper).
    ("paper", "shapes", "sgd"): {"epochs": 4, "lr": 1e-3, **SGD, **PAPER, **SMALL},
}
RECIPE_NAMES = ("modern", "fast", "paper")
# As in ORIGINAL: never change a value, only add those of new options; old runs are read by these.
DEFAULTS = {
    "recipe": "modern",
    "dataset": "cifar10",
    "data_dir": DEFAULT_DATA_DIR,
    "train_split": "train",
    "seed": 0,
    "device": "auto",
    "precision": "auto",
    "compile": False,
    "deterministic": False,
    "save_every": 3.0,
    "tensorboard": False,
}
# What runs did before an option existed, whatever the recipes have now.
BEFORE = {**DEFAULTS, **ORIGINAL, "nesterov": False}
# Mixes pairs of images and their labels, all pairs of a batch in one ratio (CutMix: one rectangle);
# alpha is torchvision's 1, as in both papers for CIFAR.
MIXES = {
    "none": None,
    "mixup": v2.MixUp,  # Zhang et al. 2018, arXiv 1710.09412
    "cutmix": v2.CutMix,  # Yun et al. 2019, arXiv 1905.04899
}
# Settings that --resume may change; any other would make it another experiment.
CHANGEABLE = {
    "epochs",
    "data_dir",
    "device",
    "compile",
    "deterministic",
    "save_every",
    "tensorboard",
}


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


OTHERS = "another with some recipes, data sets or optimizers"
FLAG = argparse.BooleanOptionalAction  # --no-x takes back what the recipe or the run has


def make_parser() -> argparse.ArgumentParser:
    """The command line; what is not given is not in the result."""
    parser = OneLineParser(
        description="Train AlexNet. docs/training.md has the settings of all recipes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--recipe", choices=RECIPE_NAMES, help="sets other defaults; default: modern"
    )
    add_data_options(parser.add_argument_group("data"))
    add_learning_options(parser.add_argument_group("learning"))
    add_network_options(parser.add_argument_group("network"))
    add_run_options(parser.add_argument_group("run"))
    return parser


def add_data_options(group) -> None:
    add, of_recipe = group.add_argument, partial(add_setting, group)
    add("--dataset", choices=DATASETS, help="shapes draws its own images; default: cifar10")
    add("--data-dir", help=f"where CIFAR-10 is or goes; default: {DEFAULT_DATA_DIR}")
    add(
        "--train-split",
        choices=("train", "full"),
        help="full: train on the validation images too, once all choices are made; default: train",
    )
    add(
        "--train-images", type=positive_int, metavar="N", help="train on so many only; default: all"
    )
    scale = "minus the mean; standardised: also divided by the standard deviation"
    of_recipe("input", scale, choices=INPUTS)
    of_recipe("augmentation", "of training images, see docs/training.md", choices=AUGMENTATIONS)
    ramp = "share of the epochs in which the augmentation grows"
    of_recipe("augmentation_ramp", ramp, type=fraction)
    of_recipe("mix", "pairs of images and their labels", choices=MIXES)
    of_recipe("mix_probability", "probability that a batch is mixed", type=probability)
    of_recipe("mix_off", "share of the steps, at the end, without mixing", type=fraction)
    of_recipe("label_smoothing", "share of a label that all classes get", type=fraction)


def add_learning_options(group) -> None:
    add, of_recipe = group.add_argument, partial(add_setting, group)
    add("--optimizer", choices=OPTIMIZERS, help="default: sgd, adam for fast")
    of_recipe("epochs", "passes over the images", type=positive_int)
    of_recipe("batch_size", "images per step", type=positive_int)
    of_recipe("lr", "the highest learning rate", type=positive_float)
    of_recipe("momentum", "for sgd", type=fraction)
    of_recipe("nesterov", "Nesterov momentum, for sgd", action=FLAG)
    of_recipe("weight_decay", "L2 penalty; with adamw decoupled", type=non_negative_float)
    factor = {"type": non_negative_float, "metavar": "FACTOR"}
    of_recipe("bias_lr_factor", "biases' learning rate as a multiple of --lr", **factor)
    of_recipe("bias_decay_factor", "biases' decay as a multiple of --weight-decay", **factor)
    of_recipe("schedule", "how the learning rate falls", choices=("cosine", "plateau"))
    rise = "share of the steps in which the learning rate rises; for cosine"
    of_recipe("warm_up", rise, type=fraction)
    average = "evaluate a moving average of the weights"
    of_recipe("ema", average, type=fraction, metavar="DECAY")


def add_network_options(group) -> None:
    of_recipe = partial(add_setting, group)
    of_recipe("init", "initial weights and biases", choices=INITS)
    switches = {
        "groups": "2: the paper's two towers",
        "activation": "after conv1 to fc7",
        "norm": "after conv1 and conv2",
        "pooling": "3x3 or 2x2 at stride 2",
        "dropout_scaling": "when dropout's factor is applied",
    }
    for name, what in switches.items():
        of_recipe(name, what, type=type(CHOICES[name][0]), choices=CHOICES[name])
    of_recipe("dropout", "after fc6 and fc7", type=fraction)


def add_run_options(group) -> None:
    add = group.add_argument
    add("--seed", type=seed_number, help="of weights, order, augmentation, dropout; default: 0")
    add("--device", help="auto, cpu, cuda, cuda:1, mps; default: auto")
    add("--precision", choices=PRECISIONS, help="auto: bf16 where it is fast; default: auto")
    add("--compile", action=FLAG, help="let torch.compile fuse the network; for GPUs")
    add("--deterministic", action=FLAG, help="bit-identical runs on an NVIDIA GPU too; slower")
    add("--save-every", type=positive_float, metavar="MINUTES", help="save that often; default: 3")
    add("--tensorboard", action=FLAG, help="log to the run's folder for TensorBoard as well")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--output-dir", type=Path, help="default: a new one in runs")
    where.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a stopped run")


def add_setting(group, name: str, what: str, **how) -> None:
    """Adds the option of a setting whose default is the recipe's."""
    group.add_argument(as_option(name), help=f"{what}; {recipe_defaults(name)}", **how)


def recipe_defaults(name: str) -> str:
    """For --help: the setting's default, and whether there are others in RECIPES."""
    default, *others = dict.fromkeys(recipe[name] for recipe in RECIPES.values() if name in recipe)
    return f"default: {default}" + (f"; {OTHERS}" if others else "")


# ---------------------------------------------------------------------------------------------
# Settings of a run: new ones, and those of an earlier start
# ---------------------------------------------------------------------------------------------


def new_config(given: dict) -> dict:
    """Every setting of a new run: what was given, else the recipe's."""
    config = {**DEFAULTS, **given}
    key = config["recipe"], config["dataset"]
    optimizers = [optimizer for recipe, data, optimizer in RECIPES if (recipe, data) == key]
    config["optimizer"] = given.get("optimizer", optimizers[0] if optimizers else None)
    if config["optimizer"] not in optimizers:
        where = f"--optimizer {' or '.join(optimizers)}" if optimizers else "--dataset cifar10"
        raise UserError(f"--recipe {config['recipe']} is for {where}; leave one of the two out")
    recipe = RECIPES[*key, config["optimizer"]]
    for name in ("momentum", "nesterov"):
        if name in config and name not in recipe:
            raise UserError(f"{as_option(name)} is for --optimizer sgd; leave it out")
    config = {**recipe, **config}
    if config["schedule"] == "plateau" and config["warm_up"] != recipe["warm_up"]:
        raise UserError("--warm-up is for --schedule cosine; leave it out")
    check_config(config)
    return config


def check_config(config: dict) -> None:
    """Raises UserError for settings that do not go together."""
    if config["train_split"] == "full" and config["schedule"] == "plateau":
        raise UserError("--schedule plateau watches the validation images; use --train-split train")
    if config.get("nesterov") and not config["momentum"]:
        raise UserError("--nesterov needs a --momentum above 0")
    if config["augmentation_ramp"] and config["augmentation"] in ("shift", "none"):
        raise UserError("--augmentation-ramp is not for --augmentation shift or none")
    for name, usual in (("mix_probability", 1), ("mix_off", 0)):
        if config[name] != usual and config["mix"] == "none":
            raise UserError(f"{as_option(name)} needs --mix mixup or cutmix")


def run_name(config: dict) -> str:
    """A title: data set, optimizer, recipe, and every setting but the epochs that is not its."""
    how = {"modern": "", "fast": ", fast recipe", "paper": ", the paper's recipe"}
    optimizer = OPTIMIZERS[config["optimizer"]].__name__
    name = f"AlexNet on {DATASETS[config['dataset']]}, {optimizer}{how[config['recipe']]}"
    # A run may be older than its recipe's row.
    row = RECIPES.get((config["recipe"], config["dataset"], config["optimizer"]), {})
    usual = {**row, "train_split": "train", "train_images": None, "epochs": config["epochs"]}
    others = {key: config.get(key) for key in usual if config.get(key) != usual[key]}
    words = [
        key.replace("_", " ") + ("" if value is True else f" {value}")
        for key, value in others.items()
    ]
    return ", ".join([name, *words])


def resumed_config(run_dir: Path, given: dict) -> tuple[dict, list]:
    """The settings of the run in run_dir with the given changes, and its earlier starts.

    Raises UserError if there is no run, or for changes that would make it another experiment.
    """
    if run_dir.is_file():
        raise UserError(f"--resume {run_dir} is a file; name its folder, {run_dir.parent}")
    path = run_dir / "config.json"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # a pipe could be endless
        record = json.loads(path.read_text())
        if record["settings"].keys() & {"resume", "output_dir", "help"}:
            raise ValueError("it has more than settings")
        settings = vars(make_parser().parse_args(as_command_line(record["settings"])))
        config = recorded_config(settings)
        # The first version of this program noted one start only.
        starts = list(record["starts"]) if "starts" in record else [record["environment"]]
    except FileNotFoundError:
        raise UserError(f"--resume {run_dir}: there is no run in it (no config.json)") from None
    except (OSError, *DAMAGE_ERRORS, UserError) as error:  # RecursionError is a RuntimeError
        raise UserError(
            f"{path} is not the record of a run ({error}); restore it, or start a new run"
        ) from None
    if given.get("precision") == "auto":  # what was chosen is recorded
        del given["precision"]
    for name, value in given.items():
        if name not in CHANGEABLE and value != config.get(name):
            raise UserError(
                f"{as_option(name)} {value} would make it another experiment than {run_dir}, "
                f"which has {config.get(name)}: leave it out, or start a new run"
            )
    # Where a run of someone else had its data, nothing is to be downloaded to.
    config["data_dir"] = str(data_dir_of(config))
    return {**config, **given}, starts


def recorded_config(settings: dict) -> dict:
    """All settings of a run from those it recorded; BEFORE has those that were no option then.

    Recipes are not asked: they may have changed since. Raises KeyError if one is missing that every
    run recorded, UserError for settings that do not go together.
    """
    # In the record's order, so that a resumed run's files are the same to the byte.
    config = settings | {name: BEFORE[name] for name in BEFORE if name not in settings}
    always = {"epochs", "lr", "weight_decay"}
    if config["optimizer"] == "sgd":
        always.add("momentum")
    else:
        del config["nesterov"]
    if missing := always - config.keys():
        raise KeyError(min(missing))
    check_config(config)
    return config


def as_option(name: str) -> str:
    """The option that sets a setting: bias_lr_factor is --bias-lr-factor."""
    return "--" + name.replace("_", "-")


def as_command_line(settings: dict) -> list[str]:
    """The options of train.py that give these settings."""
    options = []
    for name, value in settings.items():
        option = as_option(name)
        if value is True:
            options.append(option)
        elif value is False:
            options.append(option.replace("--", "--no-", 1))
        else:
            options.append(f"{option}={value}")
    return options
