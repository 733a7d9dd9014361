"""Take the paper's ideas away one by one: python -m research.ablate --epochs 20 --seeds 3

Trains a base, and for each idea the same network or training without it, with several seeds. The
same command goes on where it was stopped: finished runs are kept, and the run that was under way
starts anew. The folder then has ablation.csv (a row per run), epochs.csv (a row per epoch of each
run), ablation.png, relu-and-tanh.png (the paper's Fig. 1), and the metrics of each run in a folder.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

import recipes
import train
from dataset import DATASETS, DEFAULT_DATA_DIR, Dataset
from distributed import Processes
from figures import save_figure
from model import AlexNet, LocalResponseNorm, PaperDropout
from optimizers import make_optimizer
from research import figures
from run import DivergedError, Run, check_output_dir
from utils import (
    FolderLock,
    OneLineParser,
    StopRequest,
    UserError,
    atomic_write,
    command_line,
    environment,
    finished_names,
    keep_freed_memory,
    log,
    positive_int,
    read_csv,
    run_script,
    select_device,
    select_precision,
    to_device,
    user_file,
    write_csv,
    write_json,
)

# --- The ideas ---


def replace_layers(network: AlexNet, kind: type, new: Callable[[nn.Module], nn.Module]) -> None:
    """Put new(layer) in the place of each layer of this kind."""
    for part in (network.features, network.classifier):
        for name, layer in list(part.named_children()):
            if type(layer) is kind:
                setattr(part, name, new(layer))


def use_tanh(network: AlexNet) -> None:
    replace_layers(network, nn.ReLU, lambda layer: nn.Tanh())


def remove_norm(network: AlexNet) -> None:
    replace_layers(network, LocalResponseNorm, lambda layer: nn.Identity())


def print_norm(network: AlexNet) -> None:
    """Use the printed formula: LRN divides alpha by its size, so multiply by that before."""
    for layer in network.modules():
        if isinstance(layer, LocalResponseNorm):
            layer.alpha *= layer.size


def pool_2x2(network: AlexNet) -> None:
    """Pool without overlap: maps stay 27, 13 and 6 wide, as odd last rows are left out."""
    replace_layers(network, nn.MaxPool2d, lambda layer: nn.MaxPool2d(kernel_size=2, stride=2))


def invert_dropout(network: AlexNet) -> None:
    replace_layers(network, PaperDropout, lambda layer: nn.Dropout(layer.p))


class Idea(NamedTuple):
    """An idea of the paper, and how to take it away: change a new network in place, or settings."""

    change: Callable[[AlexNet], None] | None
    settings: dict
    name: str
    claim: str  # what the paper says


BASE = "base"
IDEAS = {  # by the name of the variant without it
    "tanh": Idea(use_tanh, {}, "ReLU, not tanh", "§3.1: 25% error in 1/6 of the epochs"),
    "no-norm": Idea(remove_norm, {}, "LRN", "§3.3: 11% error instead of 13% (CIFAR-10)"),
    "printed-norm": Idea(print_norm, {}, "LRN: alpha / n, not alpha", "§3.3 prints alpha"),
    "pooling-2x2": Idea(pool_2x2, {}, "overlapping pooling", "§3.4: 0.4 points (ImageNet)"),
    "no-dropout": Idea(None, {"dropout": 0.0}, "dropout", "§4.2: against overfitting"),
    "inverted-dropout": Idea(invert_dropout, {}, "dropout scaled at test time", "§4.2"),
    "no-augmentation": Idea(
        None, {"augmentation": "none"}, "augmentation", "§4.1: against overfitting"
    ),
    "two-groups": Idea(None, {"groups": 2}, "one tower, not two", "§3.2: two, to fit two GPUs"),
}

# --- Runs ---

RESULTS = ("variant", "seed", "outcome", "val_accuracy", "val_loss", "train_error", "seconds")
EPOCHS = ("variant", "seed", "epoch", "train_error", "val_accuracy", "val_loss")
DIVERGED = "diverged.txt"  # in a run's folder: why it was given up


def base_config(args: argparse.Namespace) -> recipes.Config:
    """Return the settings that the runs have in common."""
    settings = {
        "recipe": args.recipe,
        "dataset": args.dataset,
        "data_dir": args.data_dir,
        "epochs": args.epochs,
        "compile": args.compile,
        "precision": select_precision("auto", select_device("auto")),
        "save_every": 1e9,  # a checkpoint is 700 MB, and nothing resumes from it
    }
    if args.train_images:
        settings["train_images"] = args.train_images
    return recipes.new_config(settings)


def make_run(run_dir: Path, variant: str, config: recipes.Config, dataset: Dataset) -> Run:
    """Return a new run of the base, or of the variant without an idea."""
    change = None
    if variant != BASE:
        change = IDEAS[variant].change
        config = replace(config, **IDEAS[variant].settings)
    network = train.make_network(config, len(dataset.classes))
    if change:
        change(network)
    device = select_device(config.device)
    network = to_device(network, device)
    optimizer = make_optimizer(network, config)
    return Run(run_dir, config, dataset, network, optimizer, device, Processes())


def train_run(run: Run, stop: StopRequest) -> None:
    """Train a run to its end or to a stop. A divergence is noted in its folder, not raised."""
    run.dir.mkdir(exist_ok=True)
    try:
        train.train(run, stop)
    except DivergedError as error:
        reason = str(error).partition("; ")[0]  # the rest is advice on a run of train.py
        log(f"diverged: {reason}")
        with atomic_write(run.dir / DIVERGED) as temporary:
            temporary.write_text(f"{reason}\n")


def outcome(run_dir: Path, epochs: int) -> str:
    """Return "finished" or "diverged", or "" for a run that is not over."""
    if (run_dir / DIVERGED).exists():
        return "diverged"
    return "finished" if len(read_csv(run_dir / "metrics.csv")) == epochs else ""


def earlier_starts(folder: Path, config: recipes.Config) -> list[dict]:
    """Return the starts that a folder records. Raises UserError if it has other runs."""
    path = folder / "ablation.json"
    if not folder.exists() or not finished_names(folder):
        check_output_dir(folder)
        return []
    names = finished_names(folder)
    if path.name not in names:
        raise UserError(f"--output-dir {folder} is not empty; name another folder")
    found, starts = recipes.read_record(path)
    compared = recipes.FIELDS.keys() - recipes.CHANGEABLE | {"epochs"}
    if any(getattr(found, name) != getattr(config, name) for name in compared):
        raise UserError(f"{path} has other settings; repeat those or name another --output-dir")
    return starts


# --- Results ---


def read_run(run_dir: Path, variant: str, seed: int, epochs: int) -> dict:
    """Return a row of ablation.csv, and as "history" the rows of epochs.csv, of a run."""
    run = {"variant": variant, "seed": seed}
    history = [
        {
            **run,
            "epoch": int(row["epoch"]),
            "train_error": round(1 - float(row["train_accuracy"]), 6),
            "val_accuracy": float(row["val_accuracy"]),
            "val_loss": float(row["val_loss"]),
        }
        for row in read_csv(run_dir / "metrics.csv")
    ]
    seconds = sum(float(row["seconds"]) for row in read_csv(run_dir / "timing.csv"))
    run |= {"outcome": outcome(run_dir, epochs), "seconds": round(seconds, 1), "history": history}
    return {**history[-1], **run} if run["outcome"] == "finished" else run


def compare(runs: list[dict]) -> list[dict]:
    """Return what figures.ablation() draws: for each idea with it minus without it, by seed."""
    accuracy = {
        (run["variant"], run["seed"]): 100 * run["val_accuracy"]
        for run in runs
        if run["outcome"] == "finished"
    }
    compared = []
    for variant, idea in IDEAS.items():
        without = [run for run in runs if run["variant"] == variant]
        pairs = [[accuracy.get((name, run["seed"])) for name in (BASE, variant)] for run in without]
        row = {"idea": idea.name, "claim": idea.claim, "seeds": len(without)}
        row["differences"] = [base - other for base, other in pairs if None not in (base, other)]
        row["diverged"] = sum(run["outcome"] == "diverged" for run in without)
        compared += [row] if without else []
    return compared


def training_errors(runs: list[dict], variant: str) -> list[list[float]]:
    """Return for each finished run of a variant the training error (0..1) of each epoch."""
    return [
        [row["train_error"] for row in run["history"]]
        for run in runs
        if (run["variant"], run["outcome"]) == (variant, "finished")
    ]


def report(folder: Path, config: recipes.Config, seeds: int) -> None:
    """Write the tables and pictures of all runs that are over."""
    runs = [
        read_run(folder / f"{variant}-{seed}", variant, seed, config.epochs)
        for variant in (BASE, *IDEAS)
        for seed in range(seeds)
    ]
    runs = [run for run in runs if run["outcome"]]
    write_csv(folder / "ablation.csv", RESULTS, runs)
    write_csv(folder / "epochs.csv", EPOCHS, [row for run in runs for row in run["history"]])
    images = f"{config.train_images:,}" if config.train_images else "all"
    name = recipes.run_name(replace(config, train_images=None))
    title = f"{name}, {images} training images, epochs: {config.epochs}, seeds: {seeds}"
    if ideas := compare(runs):
        save_figure(figures.ablation(ideas, title), folder / "ablation.png")
    errors = {"ReLU": training_errors(runs, BASE), "tanh": training_errors(runs, "tanh")}
    if all(errors.values()):
        save_figure(figures.training_errors(errors, title), folder / "relu-and-tanh.png")


# --- The script ---


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m research.ablate",
        description="Train a base, and the base without each of the paper's ideas; compare. The "
        "same command goes on after a stop; the run that was under way starts anew.",
    )
    add = parser.add_argument
    add("--seeds", type=positive_int, default=3, metavar="N", help="runs of each; default: 3")
    add("--epochs", type=positive_int, default=20, help="of each run; default: 20")
    add("--train-images", type=positive_int, metavar="N", help="train on so many; default: all")
    what = f"of {', '.join(IDEAS)}; default: all"
    add("--only", nargs="+", choices=IDEAS, default=list(IDEAS), metavar="IDEA", help=what)
    add("--recipe", choices=recipes.RECIPES, default="paper", help="of the base; default: paper")
    add("--dataset", choices=DATASETS, default="cifar10", help="default: cifar10")
    add("--data-dir", default=DEFAULT_DATA_DIR, help=f"default: {DEFAULT_DATA_DIR}")
    add("--compile", action="store_true", help="let torch.compile fuse the networks; for GPUs")
    add("--output-dir", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    return parser.parse_args()


def train_all(args: argparse.Namespace, config: recipes.Config, dataset: Dataset) -> int:
    """Train what is not over yet, with a report after each run. Returns the exit code."""
    stop = StopRequest()
    # Seed by seed, so that a comparison of everything comes early.
    runs = [(variant, seed) for seed in range(args.seeds) for variant in [BASE, *args.only]]
    for number, (variant, seed) in enumerate(runs, 1):
        run_dir = args.output_dir / f"{variant}-{seed}"
        log(f"run {number} of {len(runs)}: {variant}, seed {seed}")
        if not outcome(run_dir, args.epochs):
            train_run(make_run(run_dir, variant, replace(config, seed=seed), dataset), stop)
        if stop.signal:
            log("stopped; the same command goes on from here")
            return 128 + stop.signal
        report(args.output_dir, config, args.seeds)
    log(f"the tables and pictures are in {args.output_dir}")
    return 0


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    config = base_config(args)
    with user_file("use the folder", args.output_dir):
        starts = earlier_starts(args.output_dir, config)
    dataset = train.load_data(config, Processes())
    start = environment(select_device(config.device))
    start["command"] = command_line("-m", "research.ablate", *sys.argv[1:])
    with user_file("make the folder", args.output_dir):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(args.output_dir)
    try:
        write_json(args.output_dir / "ablation.json", recipes.record(config, [*starts, start]))
        return train_all(args, config, dataset)
    finally:
        lock.release()


if __name__ == "__main__":
    run_script(main)
