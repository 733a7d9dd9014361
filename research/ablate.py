"""Puts ideas to the test, one by one: python ablate.py [--ideas modern --recipe modern]

Trains the base and, for each of the paper's ideas, the same network or training without it, with
several seeds; or, for each idea that came later, the base with it. The same command goes on where
it was stopped. The folder then has ablation.csv (a row per run), epochs.csv (a row per epoch of
each run), ablation.png, relu-and-tanh.png (the paper's Fig. 1) and a folder for each run, without
its checkpoints, which would be 700 MB each.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import figures
import recipes
import train
from dataset import DATASETS, DEFAULT_DATA_DIR
from parallel import Processes
from utils import (
    DAMAGE_ERRORS,
    FolderLock,
    OneLineParser,
    StopRequest,
    UserError,
    atomic_write,
    finished_names,
    keep_freed_memory,
    positive_int,
    read_csv,
    run_script,
    say,
    write_csv,
    write_json,
)


class Switch(NamedTuple):
    """What differs from the base, the name of the idea behind it, and what its source says.

    The settings are those of train.py; lr_times, batch_times and decay_times multiply the recipe's
    learning rate, batch and weight decay. They take away an idea of the paper, or add one that came
    later.
    """

    settings: dict
    idea: str
    claim: str


BASE = "base"
WITHOUT = {
    "tanh": Switch(
        {"activation": "tanh"},
        "ReLU, not tanh",
        "§3.1, Fig. 1: six times fewer epochs to\n25% training error (CIFAR-10)",
    ),
    "no-norm": Switch(
        {"norm": "none"},
        "LRN, not none",
        "§3.3: test error 11% instead of 13%\n(CIFAR-10, four layers)",
    ),
    "norm-as-printed": Switch(
        {"norm": "lrn-as-printed"},
        "LRN: alpha / n, not alpha",
        "§3.3 prints alpha;\nthe 2012 source divides by n",
    ),
    "non-overlapping-pooling": Switch(
        {"pooling": "non-overlapping"},
        "overlapping pooling, not 2x2",
        "§3.4: 0.4 points less error (ImageNet)",
    ),
    "no-dropout": Switch(
        {"dropout": 0.0},
        "dropout, not none",
        "§4.2: against substantial overfitting;\ntwice the steps to converge",
    ),
    "no-augmentation": Switch(
        {"augmentation": "none"},
        "augmentation, not none",
        "§4.1: against substantial overfitting",
    ),
    "two-groups": Switch(
        {"groups": 2},
        "one tower, not two",
        "§3.2: two, for two GPUs of 3 GB;\nthis comparison was not made",
    ),
}
WITH = {
    "one-cycle": Switch({"warm_up": 0.3}, "one cycle", "Smith 2018, arXiv 1803.09820"),
    "half-rate": Switch({"lr_times": 0.5}, "half the learning rate", ""),
    "double-rate": Switch({"lr_times": 2}, "twice the learning rate", ""),
    "nesterov": Switch({"nesterov": True}, "Nesterov momentum", "Sutskever et al. 2013, ICML"),
    "adamw": Switch(
        {"optimizer": "adamw"},
        "AdamW, with its own defaults",
        "Loshchilov and Hutter 2019,\n1711.05101",
    ),
    "half-decay": Switch({"decay_times": 0.5}, "half the weight decay", ""),
    "half-batch": Switch(
        {"batch_times": 0.5, "lr_times": 0.5}, "half the batch,\nhalf the rate", ""
    ),
    "smoothing": Switch(
        {"label_smoothing": 0.1}, "label smoothing 0.1", "Szegedy et al. 2016, 1512.00567, §7"
    ),
    "mixup": Switch({"mix": "mixup"}, "MixUp, and no CutMix", "Zhang et al. 2018, 1710.09412"),
    "unmixed": Switch({"mix": "none"}, "no CutMix", "Yun et al. 2019, 1905.04899"),
    "affine": Switch({"augmentation": "affine"}, "rotation and scaling", ""),
    "cutout": Switch({"augmentation": "cutout"}, "cutout", "DeVries and Taylor 2017, 1708.04552"),
    "jitter": Switch({"augmentation": "jitter"}, "brightness, contrast,\nsaturation", ""),
    "strong": Switch(
        {"augmentation": "strong"}, "rotation, scaling, cutout,\ncolour augmentation", ""
    ),
    "growing": Switch(
        {"augmentation": "strong", "augmentation_ramp": 0.5},
        "rotation, scaling, cutout, colours,\ngrowing over half the epochs",
        "",
    ),
    "lrn-at-work": Switch(
        {"norm": "lrn-at-work"}, "LRN as strong as on\npixels from 0 to 255", "docs/accuracy.md"
    ),
    "inverted-dropout": Switch(  # 0.04 is the highest rate that was run with it
        {"dropout_scaling": "training", "lr_times": 0.5},
        "PyTorch's dropout, half the rate",
        "docs/faithful.md, note 4",
    ),
    "half-mixed": Switch(
        {"mix": "cutmix", "mix_probability": 0.5},
        "CutMix in half of\nthe batches",
        "clovaai/CutMix-PyTorch,\nits command for CIFAR-100",
    ),
    "mix-off": Switch(
        {"mix": "cutmix", "mix_off": 0.15}, "CutMix, but not in the\nlast 15% of the steps", ""
    ),
    "ema": Switch({"ema": 0.999}, "moving average\nof the weights, 0.999", ""),
    "dropout-0.3": Switch({"dropout": 0.3}, "dropout 0.3", ""),
}
IDEAS = {"paper": WITHOUT, "modern": WITH}
RESULTS = (
    "switch",
    "seed",
    "recipe",
    "dataset",
    "train_images",
    "epochs",
    "outcome",
    "val_accuracy",
    "val_loss",
    "train_error",
    "seconds",
)
EPOCHS = ("switch", "seed", "epoch", "train_error", "val_accuracy")
COMMON = ("ideas", "recipe", "dataset", "epochs", "train_images")  # to all runs in a folder
DIVERGED = "diverged.txt"  # in a run's folder: why it was given up


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def run_settings(args: argparse.Namespace, name: str, seed: int) -> dict:
    """The options of train.py for one run."""
    settings = {
        "recipe": args.recipe,
        "dataset": args.dataset,
        "data_dir": args.data_dir,
        "epochs": args.epochs,
        "seed": seed,
    }
    if args.train_images:
        settings["train_images"] = args.train_images
    if args.compile:
        settings["compile"] = True
    if name == BASE:
        return settings
    changed = dict(IDEAS[args.ideas][name].settings)
    base = recipes.new_config(settings)
    if "lr_times" in changed:
        changed["lr"] = base["lr"] * changed.pop("lr_times")
    if "batch_times" in changed:
        changed["batch_size"] = int(base["batch_size"] * changed.pop("batch_times"))
    if "decay_times" in changed:
        changed["weight_decay"] = base["weight_decay"] * changed.pop("decay_times")
    return {**settings, **changed}


def train_run(run_dir: Path, settings: dict, stop: StopRequest) -> None:
    """Trains one run, or goes on with it, unless it is over; a divergence is noted, not raised.

    Raises UserError if the folder has a run with other settings.
    """
    known = (run_dir / "config.json").exists()
    if known:
        check_settings(run_dir, recipes.new_config(settings))
    if not outcome(run_dir, settings["epochs"]):
        where = "resume" if known else "output_dir"
        with train.prepare({**settings, where: run_dir}, Processes()) as run:
            try:
                train.train(run, stop)
            except train.DivergedError as error:
                reason = str(error).partition("; ")[0]  # the rest is advice on a run of train.py
                say(f"diverged: {reason}")
                with atomic_write(run_dir / DIVERGED) as temporary:
                    temporary.write_text(f"{reason}\n")
            except RuntimeError as error:
                raise train.explained(error) from None
    if outcome(run_dir, settings["epochs"]):
        for checkpoint in ("last.pt", "best.pt"):
            (run_dir / checkpoint).unlink(missing_ok=True)


def check_settings(run_dir: Path, today: dict) -> None:
    """Raises UserError if the run would have other settings today; ideas and recipes may change."""
    found, _ = recipes.resumed_config(run_dir, {})
    names = today.keys() - recipes.CHANGEABLE - {"precision"}  # chosen by the hardware
    if {name: found.get(name) for name in names} != {name: today[name] for name in names}:
        raise UserError(
            f"{run_dir} was trained with other settings than its idea has now; "
            "name another --output-dir"
        )


def outcome(run_dir: Path, epochs: int) -> str:
    """How the run ended: "finished" or "diverged"; "" if it is not over."""
    if (run_dir / DIVERGED).exists():
        return "diverged"
    return "finished" if len(read_csv(run_dir / "metrics.csv")) == epochs else ""


def lock_folder(folder: Path) -> FolderLock:
    """Makes the folder and keeps other processes out of it.

    Raises UserError if it cannot be made or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    return FolderLock(folder)


def claim_folder(folder: Path, settings: dict) -> None:
    """Notes what the folder's runs have in common. Raises UserError if it holds something else."""
    path = folder / "ablation.json"
    found = finished_names(folder)
    if found and path.name not in found:
        raise UserError(f"--output-dir {folder} is not empty; name another folder")
    # Before its first run the settings may still change.
    if len(found) > 1 and settings != read_settings(path, settings):
        raise UserError(
            f"--output-dir {folder} holds an ablation with other settings ({path}); "
            "repeat those or name another folder"
        )
    write_json(path, settings)


def read_settings(path: Path, settings: dict) -> dict:
    """The settings that ablation.json records, those of its base only as far as today's has them.

    {} if they cannot be read.
    """
    try:
        # Once these were not noted, and the base had fewer settings and some that may change.
        found = {"ideas": "paper", "base": settings["base"], **json.loads(path.read_text())}
        base = {**recipes.BEFORE, **found["base"]}
        return {**found, "base": {name: base.get(name) for name in settings["base"]}}
    except (OSError, *DAMAGE_ERRORS):
        return {}


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------


def collect(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """A row for each run that is over, and one for each of their epochs."""
    results, epochs = [], []
    for name in (BASE, *IDEAS[args.ideas]):  # whatever --only says now
        for seed in range(args.seeds):
            run_dir = args.output_dir / f"{name}-{seed}"
            state = outcome(run_dir, args.epochs)
            if not state:
                continue
            history = [
                {
                    "switch": name,
                    "seed": seed,
                    "epoch": int(row["epoch"]),
                    "train_error": round(1 - float(row["train_accuracy"]), 6),
                    "val_accuracy": float(row["val_accuracy"]),
                    "val_loss": float(row["val_loss"]),
                }
                for row in read_csv(run_dir / "metrics.csv")
            ]
            epochs += history
            last = history[-1] if state == "finished" else {}
            seconds = sum(float(row["seconds"]) for row in read_csv(run_dir / "timing.csv"))
            about = {
                "switch": name,
                "seed": seed,
                "recipe": args.recipe,
                "dataset": args.dataset,
                "train_images": args.train_images or "all",
                "epochs": args.epochs,
                "outcome": state,
                "seconds": round(seconds, 1),
            }
            results.append({**last, **about})
    return results, epochs


def report(args: argparse.Namespace) -> None:
    """Writes the tables and pictures of all runs that are over."""
    results, epochs = collect(args)
    write_csv(args.output_dir / "ablation.csv", RESULTS, results)
    write_csv(args.output_dir / "epochs.csv", EPOCHS, epochs)
    ideas = compare(results, args.ideas)
    if ideas:
        source = {"paper": "the paper says", "modern": "source"}[args.ideas]
        lost = sum((row["switch"], row["outcome"]) == (BASE, "diverged") for row in results)
        title = setting(args) + (f"; the base diverged in {lost} of them" if lost else "")
        figure = figures.ablation(ideas, title, source)
        figures.save_figure(figure, args.output_dir / "ablation.png")
    finished = {(row["switch"], row["seed"]) for row in results if row["outcome"] == "finished"}
    epochs = [row for row in epochs if (row["switch"], row["seed"]) in finished]
    errors = {"ReLU": error_curves(epochs, BASE), "tanh": error_curves(epochs, "tanh")}
    if all(errors.values()):
        figure = figures.training_errors(errors, setting(args))
        figures.save_figure(figure, args.output_dir / "relu-and-tanh.png")


def compare(results: list[dict], ideas: str) -> list[dict]:
    """For each idea what figures.ablation() draws: with the idea minus without it, by seed."""
    sign = -1 if ideas == "paper" else 1  # the paper's switches take the idea away
    accuracy = {
        (row["switch"], row["seed"]): row["val_accuracy"]
        for row in results
        if row["outcome"] == "finished"
    }
    compared = []
    for name, switch in IDEAS[ideas].items():
        ours = [row for row in results if row["switch"] == name]
        pairs = [
            (accuracy.get((BASE, row["seed"])), accuracy.get((name, row["seed"]))) for row in ours
        ]
        differences = [
            sign * 100 * (other - base) for base, other in pairs if None not in (base, other)
        ]
        if ours:
            compared.append(
                {
                    "idea": switch.idea,
                    "claim": switch.claim,
                    "differences": differences,
                    "seeds": len(ours),
                    "diverged": sum(row["outcome"] == "diverged" for row in ours),
                }
            )
    return compared


def error_curves(epochs: list[dict], name: str) -> list[list[float]]:
    """For each seed of a switch the training error (0..1) of each epoch."""
    seeds = sorted({row["seed"] for row in epochs if row["switch"] == name})
    return [
        [row["train_error"] for row in epochs if (row["switch"], row["seed"]) == (name, seed)]
        for seed in seeds
    ]


def setting(args: argparse.Namespace) -> str:
    """For titles: what the runs have in common, and whether that is less than a full training."""
    config = recipes.new_config({"recipe": args.recipe, "dataset": args.dataset})
    images = f"{args.train_images:,}" if args.train_images else "all"
    reduced = args.train_images or args.epochs < config["epochs"]
    name = recipes.run_name(config)
    return (
        f"{name}, {'reduced setting: ' if reduced else ''}{images} training images, "
        f"epochs: {args.epochs}, seeds: {args.seeds}"
    )


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        description="Train a base, and the base with ideas added or taken away; compare."
    )
    add = parser.add_argument
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each; default: 3")
    add("--epochs", type=positive_int, default=20, help="of each run; default: 20")
    add(
        "--train-images", type=positive_int, metavar="N", help="train on so many only; default: all"
    )
    add("--ideas", choices=IDEAS, default="paper", help="the paper's or later ones; default: paper")
    add("--only", nargs="+", metavar="IDEA", help="names of ideas; default: all")
    add("--recipe", choices=recipes.RECIPE_NAMES, help="default: that of the ideas")
    add("--dataset", choices=DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", default=DEFAULT_DATA_DIR, help=f"default: {DEFAULT_DATA_DIR}")
    add("--compile", action="store_true", help="let torch.compile fuse the networks; for GPUs")
    add("--output-dir", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    args = parser.parse_args()
    args.recipe = args.recipe or args.ideas
    args.names = chosen_names(args)
    return args


def chosen_names(args: argparse.Namespace) -> list[str]:
    """The base and the ideas of --only, by default all that differ from the base and others.

    Raises UserError for one of --only that is unknown, does not fit, or does not differ.
    """
    ideas = IDEAS[args.ideas]
    asked = args.only or ideas
    unknown = set(asked) - ideas.keys()
    if unknown:
        raise UserError(f"--only {unknown.pop()} is none of the ideas: {', '.join(ideas)}")
    configs = {}
    for name in [BASE, *(name for name in ideas if name in asked)]:
        try:
            config = recipes.new_config(run_settings(args, name, 0))
        except UserError as error:
            raise UserError(f"{name} does not fit: {error}; choose others with --only") from None
        twin = next((other for other in configs if configs[other] == config), None)
        if twin and args.only:
            has = "the base has" if twin == BASE else f"{twin} is"
            raise UserError(f"{name} is what {has}; choose others with --only")
        if not twin:
            configs[name] = config
    return list(configs)


def train_all(args: argparse.Namespace) -> int:
    """Trains what is not over yet, with a report after each run. Returns the exit code."""
    stop = StopRequest()
    # Seed by seed, so that a comparison of everything comes early.
    runs = [(name, seed) for seed in range(args.seeds) for name in args.names]
    for number, (name, seed) in enumerate(runs, 1):
        say(f"run {number} of {len(runs)}: {name}, seed {seed}")
        train_run(args.output_dir / f"{name}-{seed}", run_settings(args, name, seed), stop)
        if stop.signal:
            say("stopped; the same command goes on from here")
            return 128 + stop.signal
        report(args)
    say(f"the tables and pictures are in {args.output_dir}")
    return 0


def main() -> int:
    args = parse_arguments()
    if Processes().count > 1:
        raise UserError("ablate.py trains with one process; start it with python, not torchrun")
    keep_freed_memory()
    common = {name: getattr(args, name) for name in COMMON}
    base = recipes.new_config(run_settings(args, BASE, 0))  # a recipe may change
    common["base"] = {name: base[name] for name in base.keys() - {"seed"} - recipes.CHANGEABLE}
    lock = lock_folder(args.output_dir)
    try:
        claim_folder(args.output_dir, common)
        return train_all(args)
    finally:
        lock.release()


if __name__ == "__main__":
    run_script(main)
