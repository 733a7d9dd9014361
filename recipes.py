"""What a run is to do: its settings, the recipes, the command line, and the record in config.json.

config = new_config({"recipe": "paper", "epochs": 10})
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from dataset import DATASETS, DEFAULT_DATA_DIR, data_dir_of
from transforms import AUGMENTATIONS, INPUTS, MIXES
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
    user_file,
)

# --- Settings and recipes ---


def _setting(group: str, default, help: str, type: type = str, **how):
    """Return a dataclass field that holds its option: group, help, type and choices."""
    metadata = {"group": group, "help": help, "how": {"type": type, **how}}
    return field(default=default, metadata=metadata)


_data, _learning, _network, _run = (
    partial(_setting, group) for group in ("data", "learning", "network", "run")
)


@dataclass
class Config:
    """Settings of a run, each an option of train.py. The defaults are the recipe sgd's.

    They train the best network we know: 200 epochs of SGD with CutMix.
    """

    recipe: str = _learning(
        "sgd", "sets the other defaults", choices=("sgd", "muon", "adam", "paper")
    )
    optimizer: str = _learning(
        "sgd",
        "also chooses the recipe of that name if --recipe does not; muon: for the filters of conv2 "
        "to conv5, Adam for the rest",
        choices=("sgd", "muon", "adam"),
    )
    epochs: int = _learning(200, "passes over the training images", positive_int)
    batch_size: int = _learning(256, "images per step, over all processes", positive_int)
    lr: float = _learning(0.08, "peak learning rate", positive_float)
    muon_lr: float = _learning(0.02, "peak learning rate of Muon", positive_float)
    momentum: float = _learning(0.9, "of SGD (paper §5)", fraction)
    weight_decay: float = _learning(5e-4, "L2 penalty (paper §5)", non_negative_float)
    bias_lr_factor: float = _learning(1.0, "biases' multiple of --lr", non_negative_float)
    bias_decay_factor: float = _learning(
        1.0, "biases' multiple of --weight-decay", non_negative_float
    )
    schedule: str = _learning(
        "cosine",
        "cosine: warm-up, then half a cosine to 0; plateau: divided by 10, up to three times, "
        "after 5 epochs without a new best validation accuracy (paper §5)",
        choices=("cosine", "plateau"),
    )
    warm_up: float = _learning(0.1, "part of the steps in which the rate rises", fraction)

    dataset: str = _data(
        "cifar10",
        "folder: your own pictures; shapes: drawn by the program",
        choices=tuple(DATASETS),
    )
    data_dir: str = _data(
        DEFAULT_DATA_DIR,
        "folder of CIFAR, or to download it to; or of pictures: DIR/train/CLASS, DIR/val/CLASS, "
        "DIR/test/CLASS, or just DIR/CLASS",
    )
    classes: Sequence[str] | None = _data(None, "train on these classes only", nargs="+")
    train_split: str = _data(
        "train", "full: train on the validation images too", choices=("train", "full")
    )
    train_images: int | None = _data(None, "train on so many images only", positive_int)
    input: str = _data(
        "standardized",
        "centered: minus the mean (paper §2); standardized: also divided by the standard deviation",
        choices=INPUTS,
    )
    augmentation: str = _data(
        "shift",
        "shift: flip, shift by up to 4 pixels; paper: flip, crop, PCA color augmentation (§4.1)",
        choices=AUGMENTATIONS,
    )
    mix: str = _data("cutmix", "cutmix: paste a rectangle of one image into another", choices=MIXES)
    mix_probability: float = _data(1.0, "probability that a batch is mixed", probability)

    init: str = _network(
        "he", "initial weights: He-normal, or those of 2012", choices=("he", "2012")
    )
    groups: int = _network(1, "2: the two towers of 2012 (paper §3.2)", int, choices=(1, 2))
    dropout: float = _network(0.5, "after fc6 and fc7 (paper §4.2)", fraction)

    weights: str | None = _network(None, "checkpoint to start from; a new last layer if need be")

    seed: int = _run(0, "of weights, order, augmentation and dropout", seed_number)
    device: str = _run("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: str = _run(
        "auto", "auto: 16 bits where the hardware is made for it", choices=("auto", *PRECISIONS)
    )
    compile: bool = _run(False, "let torch.compile fuse the network; for GPUs", bool)
    deterministic: bool = _run(False, "bit-identical runs on an NVIDIA GPU too; slower", bool)
    save_every: float = _run(3.0, "minutes between two saves", positive_float)


# What a recipe changes of the defaults.
RECIPES = {
    "sgd": {},
    "adam": {  # an hour on two CPU cores
        "optimizer": "adam",
        "epochs": 8,
        "batch_size": 128,
        "lr": 4e-4,
        "weight_decay": 0.0,
        "warm_up": 0.05,
        "mix": "none",
    },
    "muon": {  # half of adam's time
        "optimizer": "muon",
        "epochs": 4,
        "batch_size": 128,
        "lr": 4e-4,
        "weight_decay": 0.0,
        "warm_up": 0.05,
        "mix": "none",
    },
    "paper": {  # 2012
        "epochs": 90,  # §5
        "batch_size": 128,  # §5
        "lr": 0.01,  # §5
        "schedule": "plateau",  # §5
        "bias_lr_factor": 2.0,  # 2012 source: layers/layer-params-145.cfg
        "bias_decay_factor": 0.0,  # the same
        "init": "2012",  # 2012 source: layers/layers-145.cfg
        "input": "centered",  # §2
        "augmentation": "paper",  # §4.1
        "mix": "none",
    },
}
# What the data set changes of a recipe: shapes are learnt in minutes.
ON_DATASET = {
    "shapes": {
        "sgd": {"epochs": 4, "batch_size": 32, "lr": 0.01, "warm_up": 0.05, "mix": "none"},
        "adam": {"epochs": 4, "batch_size": 32, "lr": 1e-4},
        "muon": {"epochs": 4, "batch_size": 32, "lr": 1e-4, "muon_lr": 0.005},
        "paper": {"epochs": 4, "batch_size": 32, "lr": 1e-3},
    },
}
# Settings that --resume may change; any other would make it another experiment.
CHANGEABLE = {"epochs", "data_dir", "device", "compile", "deterministic", "save_every"}
FIELDS = {each.name: each for each in fields(Config)}


def recipe_config(overrides: dict) -> Config:
    """Return the defaults for these settings: of the recipe, the optimizer's own if none is named.

    Raises UserError for an optimizer that the recipe does not have.
    """
    recipe = overrides.get("recipe", overrides.get("optimizer", "sgd"))
    dataset = overrides.get("dataset", "cifar10")
    changes = {**RECIPES[recipe], **ON_DATASET.get(dataset, {}).get(recipe, {})}
    config = replace(Config(), recipe=recipe, dataset=dataset, **changes)
    if overrides.get("optimizer", config.optimizer) != config.optimizer:
        raise UserError(
            f"--recipe {recipe} is for --optimizer {config.optimizer}; leave one of the two out"
        )
    return config


def new_config(overrides: dict) -> Config:
    """Return every setting of a new run: the overrides, else the recipe's.

    Raises UserError for settings that do not go together.
    """
    config = replace(recipe_config(overrides), **overrides)
    for name, is_used, needed in (
        ("momentum", config.optimizer == "sgd", "--optimizer sgd"),
        ("muon_lr", config.optimizer == "muon", "--optimizer muon"),
        ("warm_up", config.schedule == "cosine", "--schedule cosine"),
        ("mix_probability", config.mix == "cutmix", "--mix cutmix"),
    ):
        if name in overrides and not is_used:
            raise UserError(f"{option_name(name)} is for {needed}; leave it out")
    if config.dataset == "folder" and "data_dir" not in overrides:
        raise UserError("--dataset folder needs --data-dir, the folder of your pictures")
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise UserError for settings that do not go together."""
    if config.train_split == "full" and config.schedule == "plateau":
        raise UserError("--schedule plateau watches the validation images; use --train-split train")


def run_name(config: Config) -> str:
    """Return a title: data set, recipe, and every setting but the epochs that is not the recipe's.

    Settings of the group run are left out.
    """
    usual = recipe_config({"recipe": config.recipe, "dataset": config.dataset})
    names = [name for name, each in FIELDS.items() if each.metadata["group"] != "run"]
    others = [
        f"{name.replace('_', ' ')} {getattr(config, name)}"
        for name in names
        if name not in ("epochs", "data_dir") and getattr(config, name) != getattr(usual, name)
    ]
    data = config.data_dir if config.dataset == "folder" else DATASETS[config.dataset]
    title = f"AlexNet on {data}, recipe {config.recipe}"
    return ", ".join([title, *others])


# --- Command line ---


def parse_command_line(arguments: list[str] | None = None) -> dict:
    """Return the settings that a command line of train.py gives, and output_dir or resume.

    What is not given is not in the result. --help shows the defaults of the recipe that is given.
    """
    first = OneLineParser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("recipe", "optimizer", "dataset"):
        add_option(first, FIELDS[name], "")
    known, _ = first.parse_known_args(arguments)
    return vars(make_parser(recipe_config(vars(known))).parse_args(arguments))


def make_parser(defaults: Config) -> argparse.ArgumentParser:
    """Return the parser of train.py with an option for each setting, showing these defaults."""
    parser = OneLineParser(
        description="Train AlexNet. The defaults below are those of "
        f"--recipe {defaults.recipe} --dataset {defaults.dataset}.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for name, each in FIELDS.items():
        title = each.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_option(groups[title], each, f" (default: {as_text(getattr(defaults, name))})")
    where = groups["run"].add_mutually_exclusive_group()
    where.add_argument(
        "--output-dir", type=Path, help="the run's folder (default: a new one in runs)"
    )
    where.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a stopped run")
    return parser


def add_option(parser, setting: Field, default: str) -> None:
    """Add the option of a setting to a parser or a group of one."""
    how = dict(setting.metadata["how"])
    if how["type"] is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif "choices" not in how:
        how["metavar"] = {positive_int: "N", seed_number: "N", str: "NAME"}.get(how["type"], "X")
    parser.add_argument(option_name(setting.name), help=setting.metadata["help"] + default, **how)


def option_name(name: str) -> str:
    """Return the option of a setting: bias_lr_factor is --bias-lr-factor."""
    return "--" + name.replace("_", "-")


def as_text(value) -> str:
    """Return a default for --help."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# --- The record of a run ---


def record(config: Config, starts: list[dict]) -> dict:
    """Return the content of config.json: the settings, and the environment of each start."""
    return {"settings": asdict(config), "starts": starts}


def read_record(path: Path) -> tuple[Config, list[dict]]:
    """Return the settings in a config.json, and the environments of the run's starts.

    Raises UserError if it is not the record of a run.
    """
    try:
        with user_file("read", path):
            if path.exists() and not path.is_file():
                raise ValueError("not a regular file")  # a pipe could be endless
            content = json.loads(path.read_text())
        settings, starts = content["settings"], list(content["starts"])
        if settings.keys() != FIELDS.keys():
            name = min(settings.keys() ^ FIELDS.keys())
            raise ValueError(f"its settings are those of another version of this program: {name}")
        for name, value in settings.items():
            check_value(FIELDS[name], value)
        config = Config(**settings)
        check_config(config)
    except (UserError, argparse.ArgumentTypeError, *DAMAGE_ERRORS) as error:
        raise UserError(
            f"{path} is not the record of a run ({error}); restore it, or start a new run"
        ) from error
    return config, starts


def check_value(setting: Field, value) -> None:
    """Raise ValueError or TypeError for a value that the command line would not take."""
    how = setting.metadata["how"]
    if value is None and setting.default is None:
        return
    if isinstance(value, list) != ("nargs" in how):
        raise TypeError(f"{setting.name} cannot be {value!a:.40}")
    for each in value if isinstance(value, list) else [value]:
        parsed = how["type"](each if how["type"] is bool else str(each))
        is_same = type(parsed) is type(each) and parsed == each
        if not is_same or each not in how.get("choices", [each]):
            raise ValueError(f"{setting.name} cannot be {each!a:.40}")


def resumed_config(run_dir: Path, overrides: dict) -> tuple[Config, list[dict]]:
    """Return the settings of the run in run_dir with the given changes, and its earlier starts.

    Raises UserError if there is no run, or for changes that would make it another experiment.
    """
    path = run_dir / "config.json"
    with user_file("read", path):
        if run_dir.is_file():
            raise UserError(f"--resume {run_dir} is a file; name its folder, {run_dir.parent}")
        if not path.exists():
            raise UserError(f"--resume {run_dir}: there is no run in it (no config.json)")
    config, starts = read_record(path)
    if overrides.get("precision") == "auto":  # what was chosen is recorded
        overrides = {name: value for name, value in overrides.items() if name != "precision"}
    for name, value in overrides.items():
        if name not in CHANGEABLE and value != getattr(config, name):
            raise UserError(
                f"{option_name(name)} {value} would make it another experiment than {run_dir}, "
                f"which has {getattr(config, name)}: leave it out, or start a new run"
            )
    # Where a run of someone else had its data, nothing is to be downloaded to.
    config = replace(config, data_dir=str(data_dir_of(asdict(config))))
    return replace(config, **overrides), starts
