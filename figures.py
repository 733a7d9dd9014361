"""Every picture. Each function returns a matplotlib Figure, which a notebook shows as it is.

As a script it lays learning curves over each other: python figures.py runs/a runs/b
"""

import argparse
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import make_grid

from utils import OneLineParser, UserError, atomic_write, output_file, read_history, run_script

# Its import logs two lines if the home folder cannot be written to.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator  # noqa: E402

NO_TICKS = {"xticks": [], "yticks": []}
# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
SERIES = ((BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#000000", "D"))  # colours and markers


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a file that is whole or not there, by its name a PDF, an SVG or another; else a PNG.

    Raises UserError if it cannot.
    """
    suffix = path.suffix.lower().removeprefix(".")
    kind = suffix if suffix in figure.canvas.get_supported_filetypes() else "png"
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name's letters that the font lacks
        figure.savefig(temporary, format=kind, dpi=120)


def as_text(name: str) -> str:
    """The name of a file or class as matplotlib draws it: between two $ it reads a formula."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def marker_distance(history: list[dict]) -> int:
    """Every how many epochs a curve has a marker: more would hide the line."""
    return max(1, len(history) // 12)


def learning_curves(history: list[dict], title: str) -> Figure:
    """Loss and accuracy by epoch, training and validation.

    Args:
        history: a row per epoch with epoch, train_loss, val_loss, train_accuracy, val_accuracy
            (0..1), as in metrics.csv; val_* are None if nothing was held out.
        title: what the run is.
    """
    splits = {
        "train": ("training (during the epoch, augmented)", ORANGE, "s"),
        "val": ("validation", BLUE, "o"),
    }
    if history[0]["val_loss"] is None:
        del splits["val"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, metric, scale in ((loss_axes, "loss", 1), (accuracy_axes, "accuracy", 100)):
        for split, (name, colour, marker) in splits.items():
            values = [row[f"{split}_{metric}"] * scale for row in history]
            style = {"color": colour, "marker": marker, "markersize": 4}
            axes.plot(epochs, values, label=name, markevery=marker_distance(history), **style)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    loss_axes.set_ylabel("cross-entropy")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    accuracy_axes.set_ylabel("top-1 accuracy (%)")
    accuracy_axes.set_ylim(0, 100)
    if "val" in splits:
        title += f": best validation accuracy {max(row['val_accuracy'] for row in history):.1%}"
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def confusion_matrix(matrix: np.ndarray, classes: list[str], title: str) -> Figure:
    """Which class was taken for which.

    Args:
        matrix: int [C, C], number of images of each true class (row) by predicted class (column).
        classes: the C names.
        title: what was evaluated.
    """
    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for true, row in enumerate(share):
        for predicted, value in enumerate(row):
            if value > 0.5:  # smaller shares would be printed as 0
                colour = "white" if value > 55 else "black"
                axes.text(predicted, true, f"{value:.0f}", ha="center", va="center", color=colour)
    names = list(map(as_text, classes))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    figure.colorbar(image, label="% of the true class (blank: 0.5 or less)", shrink=0.8)
    return figure


def ablation(ideas: list[dict], title: str, source: str = "the paper says") -> Figure:
    """What each idea adds to the validation accuracy: every seed, mean and standard deviation.

    Args:
        ideas: for each its name (idea), what its source says of it (claim), the accuracy with it
            minus that without it in percentage points for each seed with which it and the base
            finished (differences), the number of its seeds (seeds), and how many of them diverged
            (diverged).
        title: the setting.
        source: the heading of the claims.
    """
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(ideas)), layout="constrained")
    axes, notes = figure.subplots(1, 2, width_ratios=(5, 3), sharey=True)
    labels = []
    for place, idea in enumerate(ideas):
        values = np.array(idea["differences"])
        axes.plot(values, np.full(len(values), place + 0.2), "o", color=BLUE, alpha=0.6)
        label = idea["idea"]
        if len(values):
            mean, deviation = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
            axes.errorbar(mean, place - 0.15, xerr=deviation, fmt="D", color=ORANGE, capsize=4)
            label += f"\n{mean:+.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
        if idea["diverged"]:
            label += f"\n{idea['diverged']} of {idea['seeds']} diverged"
        labels.append(label)
        notes.text(0, place, idea["claim"], va="center", fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ideas)), labels)
    axes.set_ylim(len(ideas) - 0.5, -0.5)
    axes.set_xlabel("validation accuracy with the idea minus without it (points)")
    axes.grid(axis="x", alpha=0.3)
    axes.plot([], [], "o", color=BLUE, alpha=0.6, label="one seed")
    axes.errorbar([], [], xerr=[], fmt="D", color=ORANGE, label="mean ± standard deviation")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    notes.set_title(source, loc="left", fontsize=10)
    notes.axis("off")
    figure.suptitle(title, fontsize=10)
    return figure


def training_errors(curves: dict[str, list[list[float]]], title: str) -> Figure:
    """Fig. 1 of the paper: the training error by epoch, each seed thin, their mean thick.

    Args:
        curves: for each kind of network the training errors (0..1) of each seed, epoch by epoch;
            at most two kinds, the paper's solid and dashed line.
        title: the setting.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = ((BLUE, "-"), (ORANGE, "--"))
    for (name, runs), (colour, line) in zip(curves.items(), styles, strict=False):
        for run in runs:
            axes.plot(
                range(1, len(run) + 1), 100 * np.array(run), color=colour, linewidth=0.8, alpha=0.5
            )
        shortest = min(map(len, runs))
        mean = 100 * np.mean([run[:shortest] for run in runs], axis=0)
        epochs = range(1, shortest + 1)
        axes.plot(epochs, mean, line, color=colour, marker="o", markersize=4, label=name)
    axes.axhline(25, color="black", linestyle=":", linewidth=1, label="25%, as in Fig. 1")
    axes.set_ylim(0, 100)
    axes.set_xlabel("epoch (error during the epoch, with dropout and augmentation)")
    axes.set_ylabel("training error (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=9)
    return figure


def speed(rows: list[dict], title: str) -> Figure:
    """How many times as fast as the textbook script, at the largest batch size measured.

    Bars begin at 1, on a logarithmic axis; the compiled network has bars of its own.

    Args:
        rows: what benchmark.py measured: part, name, side, precision, batch_size,
            images_per_second and times_the_textbook, the last two as [median, lowest, highest].
        title: the hardware.
    """
    batch_size = max(row["batch_size"] for row in rows)
    rows = [row for row in rows if row["batch_size"] == batch_size]
    textbook = {
        row["part"]: row["images_per_second"][0] for row in rows if row["side"] == "textbook"
    }
    ours = [row for row in rows if row["side"] != "textbook"]
    colours = {row["precision"]: BLUE if row["precision"] == "fp32" else ORANGE for row in ours}
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(ours)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(ours):
        median, low, high = row["times_the_textbook"]
        colour = colours[row["precision"]]
        error = [[median - low], [high - median]]
        axes.barh(place, median - 1, left=1, color=colour, xerr=error, capsize=3, alpha=0.85)
        rates = f"{textbook[row['part']]:,.0f} → {row['images_per_second'][0]:,.0f} images/s"
        axes.annotate(
            f"{median:.1f}: {rates}",
            (high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(ours)), map(speed_name, ours))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, *(first * 10**zeros for zeros in range(4) for first in (1, 2, 5))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    left = min(0.95, 0.9 * min(row["times_the_textbook"][1] for row in ours))
    fastest = max(1, *(row["times_the_textbook"][2] for row in ours))
    axes.set_xlim(left, left * (fastest / left) ** 1.7)  # which leaves 40% for the longest's text
    axes.set_xlabel("times as fast, logarithmic (whiskers: slowest and fastest turn)")
    meaning = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=meaning, loc="lower right", fontsize=9)
    heading = f"Speed relative to the textbook script in float32\nBatch {batch_size}, {title}"
    figure.suptitle(heading, fontsize=10)
    return figure


def speed_name(row: dict) -> str:
    """What a bar of speed() is of; the data pipeline has no precision."""
    if "pipe" in row["part"]:
        return row["name"]
    compiled = ", compiled" if row["side"] == "compiled" else ""
    return f"{row['name']}, {row['precision']}{compiled}"


def growth(rows: list[dict], title: str) -> Figure:
    """Images per second and peak memory of a training step by batch size, a line for each count.

    Args:
        rows: processes, batch_size, seconds per step and peak_memory_mib of all processes
            together, or None, as benchmark.py measured them.
        title: the hardware.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rate_axes, memory_axes = figure.subplots(1, 2)
    counts = sorted({row["processes"] for row in rows})
    for count, (colour, marker) in zip(counts, SERIES, strict=False):
        ours = [row for row in rows if row["processes"] == count]
        sizes = [row["batch_size"] for row in ours]
        rate = [row["batch_size"] / row["seconds"] for row in ours]
        memory = [(row["peak_memory_mib"] or math.nan) / 1024 for row in ours]
        label = f"{count} process{'es' * (count > 1)}"
        style = {"color": colour, "marker": marker, "markersize": 4, "label": label}
        rate_axes.plot(sizes, rate, **style)
        memory_axes.plot(sizes, memory, **style)
    sizes = sorted({row["batch_size"] for row in rows})
    for axes, label in (
        (rate_axes, "training step (images/s)"),
        (memory_axes, "peak memory, all processes (GiB)"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(f"Training step by batch size, {title}", fontsize=10)
    return figure


def likeliest(pictures: list, captions: list[str], results: list[list[dict]]) -> Figure:
    """Fig. 4 left of the paper: pictures, and below each its likeliest classes as bars.

    Args:
        pictures: uint8 [3, H, W] each.
        captions: a line for each, such as its true class.
        results: for each the likeliest classes, with class and probability (0..1), the likeliest
            first, and right (whether it is the true class) where that is known. Up to five are
            drawn, and none that would read 0%.
    """
    columns = min(4, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(2.25 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(2, 1.25) * rows)
    for axes in grid.flat:
        axes.axis("off")
    for place, (picture, caption, result) in enumerate(
        zip(pictures, captions, results, strict=True)
    ):
        row, column = 2 * (place // columns), place % columns
        image_axes, bar_axes = grid[row, column], grid[row + 1, column]
        image_axes.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
        image_axes.set_title(as_text(f"{caption:.24}"), fontsize=10)
        for height, item in enumerate(r for r in result[:5] if r["probability"] >= 0.005):
            colour = ORANGE if item.get("right") else BLUE
            bar_axes.barh(height, item["probability"], color=colour, alpha=0.45)
            label = f"{as_text(item['class'])} {item['probability']:.0%}"
            bar_axes.text(0.01, height, label, va="center", fontsize=9)
        bar_axes.set_xlim(0, 1)
        bar_axes.set_ylim(4.5, -0.5)
    if any("right" in item for result in results for item in result):
        meaning = [Patch(color=ORANGE, alpha=0.45, label="the labelled class")]
        meaning.append(Patch(color=BLUE, alpha=0.45, label="another class"))
        figure.legend(handles=meaning, loc="outside lower center", ncols=2, frameon=False)
    return figure


def filters(weights: np.ndarray, title: str) -> Figure:
    """Fig. 3 of the paper: the filters of conv1, each stretched to its own full range.

    Args:
        weights: float [N, 3, h, w], drawn in rows of 16.
        title: what they are.
    """
    stretched = {"normalize": True, "scale_each": True}
    picture = make_grid(torch.from_numpy(weights), 16, padding=1, pad_value=1, **stretched)
    _, height, width = picture.shape
    figure = Figure(figsize=(9, 9 * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture.movedim(0, 2).numpy(), interpolation="nearest")
    axes.axis("off")
    axes.set_title(f"{title}, each stretched to its own range", fontsize=10)
    return figure


def neighbours(
    queries: list, nearest: list[list], captions: list[str], nearest_captions: list[list[str]]
) -> Figure:
    """Fig. 4 right of the paper: in each row an image and those whose features are nearest to it.

    Args:
        queries: uint8 [3, H, W] each.
        nearest: for each the same number of images, the nearest first.
        captions: for each query its class.
        nearest_captions: the classes of the nearest; orange where they are not the query's.
    """
    rows, columns = len(queries), 1 + len(nearest[0])
    figure = Figure(figsize=(1.15 * columns + 1.2, 1.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw=NO_TICKS)
    every_row = zip(grid, queries, nearest, captions, nearest_captions, strict=True)
    for axes, query, others, caption, other_captions in every_row:
        for place, picture in zip(axes, (query, *others), strict=True):
            place.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
        for place, other_caption in zip(axes[1:], other_captions, strict=True):
            colour = "black" if other_caption == caption else ORANGE
            place.set_xlabel(as_text(other_caption), fontsize=9, color=colour)
        axes[0].set_ylabel(as_text(caption), rotation=0, ha="right", va="center")
        for side in axes[0].spines.values():
            side.set(color=ORANGE, linewidth=2.5)
    grid[0, 0].set_title("image", fontsize=10)
    grid[0, 1].set_title("nearest in the training split", fontsize=10, loc="left")
    return figure


def class_accuracies(per_class: list[dict], title: str) -> Figure:
    """Accuracy of each class with its 95% interval, the best first.

    Args:
        per_class: class, accuracy and interval_95 (0..1) of each, as evaluate.py has them.
        title: what was evaluated.
    """
    ranked = sorted(per_class, key=lambda row: row["accuracy"])
    figure = Figure(figsize=(7.2, 1.4 + 0.34 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(ranked):
        accuracy, (low, high) = 100 * row["accuracy"], (100 * x for x in row["interval_95"])
        # Rounding can put the end of an interval inside.
        error = [[max(0, accuracy - low)], [max(0, high - accuracy)]]
        axes.errorbar(accuracy, place, xerr=error, fmt="o", color=BLUE, capsize=3)
    axes.set_yticks(range(len(ranked)), [as_text(row["class"]) for row in ranked])
    axes.set_xlabel("accuracy (%), with 95% interval")
    axes.grid(alpha=0.3)
    axes.set_title(title)
    return figure


def reliability(bins: list[dict], title: str) -> Figure:
    """How often the network is right when it is so sure (above), and how often it is so sure.

    Args:
        bins: low and high (0..1), images, confidence and accuracy (0..1, or None without images)
            of each range of confidence, as evaluate.py has them.
        title: what was evaluated.
    """
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in bins if row["images"]]
    edges = {"width": [100 * (row["high"] - row["low"]) for row in filled], "align": "edge"}
    left = [100 * row["low"] for row in filled]
    accuracy = [100 * row["accuracy"] for row in filled]
    axes.bar(left, accuracy, color=BLUE, alpha=0.6, edgecolor="white", **edges)
    axes.plot(
        [100 * row["confidence"] for row in filled],
        accuracy,
        "D",
        color=ORANGE,
        markersize=4,
        label="bin: mean confidence, accuracy",
    )
    axes.plot([0, 100], [0, 100], color="black", linewidth=1, label="perfect calibration")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 104)  # a marker at 100 is whole
    counts.bar(left, [row["images"] for row in filled], color=BLUE, alpha=0.6, **edges)
    counts.set_xlabel("confidence: probability of the likeliest class (%)")
    counts.set_ylabel("images (log)")
    counts.set_yscale("log")  # a bar above may be that of one image
    counts.set_ylim(bottom=0.5)
    counts.set_xlim(0, 100)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for each in (axes, counts):
        each.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    return figure


def feature_maps(picture, maps: dict[str, np.ndarray]) -> Figure:
    """What each layer sees in one image: the image, and the strongest channels of each layer.

    Args:
        picture: uint8 [3, H, W].
        maps: for each layer its outputs, float [C, h, w]; eight with the largest sums are drawn.
    """
    count = 8
    figure = Figure(figsize=(9, 1.05 * len(maps) + 1.2), layout="constrained")
    grid = figure.subplots(len(maps) + 1, count, squeeze=False, subplot_kw=NO_TICKS)
    for axes in grid[0, 1:]:
        axes.axis("off")
    grid[0, 0].imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
    grid[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    for row, (name, channels) in zip(grid[1:], maps.items(), strict=True):
        strongest = channels[np.argsort(-channels.sum((1, 2)))[:count]]
        for axes, channel in zip(row, strongest, strict=True):
            axes.imshow(channel, cmap="magma", interpolation="nearest")
        size = " x ".join(map(str, channels.shape))
        row[0].set_ylabel(f"{name}\n{size}", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("The eight channels with the largest sums, each on its own scale", fontsize=10)
    return figure


def normalisation(factors: dict[str, np.ndarray], at_rest: float, title: str) -> Figure:
    """By how much LRN multiplies activations: all alike, or strong neighbourhoods less.

    Args:
        factors: for each LRN layer by how much it multiplied each activation that is not 0.
        at_rest: the factor without any neighbouring activity, k ** -beta.
        title: what was measured.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, factors.items(), strict=True):
        counts, edges = np.histogram(values, bins=60, range=(0, 1.01 * at_rest))
        axes.stairs(100 * counts / max(1, len(values)), edges, fill=True, color=BLUE, alpha=0.6)
        axes.axvline(
            at_rest, color=ORANGE, linestyle="--", label=f"no neighbouring activity: {at_rest:.3f}"
        )
        middle = np.quantile(values, (0.01, 0.5, 0.99)) if len(values) else [np.nan] * 3
        low, median, high = (f"{value:.3f}" for value in middle)
        axes.set_title(f"{name}: median {median}, 98% from {low} to {high}", fontsize=9)
        axes.set_xlabel("factor")
        axes.legend(loc="upper left", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("activations (%)")
    figure.suptitle(title, fontsize=10)
    return figure


def compared_curves(histories: dict[str, list[dict]], against: str = "epoch") -> Figure:
    """Validation loss and accuracy of several runs, by epoch or by the time that training took.

    Args:
        histories: for each run its name and a row per epoch with epoch, val_loss, val_accuracy
            (0..1) and minutes (from the start of training, without validation); at most four.
        against: "epoch" or "minutes".
    """
    unit = {"epoch": "epoch", "minutes": "minutes of training"}[against]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, history), (colour, marker) in zip(histories.items(), SERIES, strict=False):
        places = [row[against] for row in history]
        style = {"color": colour, "marker": marker, "markersize": 4}
        style["markevery"] = marker_distance(history)
        loss_axes.plot(places, [row["val_loss"] for row in history], label=name, **style)
        accuracy = [100 * row["val_accuracy"] for row in history]
        accuracy_axes.plot(places, accuracy, label=f"{name}: best {max(accuracy):.1f}%", **style)
    for axes, label in (
        (loss_axes, "cross-entropy, logarithmic"),
        (accuracy_axes, "top-1 accuracy (%)"),
    ):
        axes.set_xlabel(unit)
        axes.set_ylabel(f"validation {label}")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    loss_axes.set_yscale("log")  # or the first epochs would press all others together
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.yaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"Validation by {unit}")
    figure.legend(*accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ---------------------------------------------------------------------------------------------
# The script: several runs in one picture
# ---------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Draw the learning curves of several runs in one picture.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="at most four")
    parser.add_argument(
        "--against", choices=("epoch", "minutes"), default="epoch", help="default: epoch"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        default="curves.png",
        metavar="FILE",
        help="default: curves.png",
    )
    return parser.parse_args()


def run_label(run: Path) -> str:
    """The run's folder; matplotlib leaves labels that begin with _ out of a legend."""
    return f"./{run}" if str(run).startswith("_") else str(run)


def main() -> None:
    args = parse_arguments()
    if len(args.runs) > len(SERIES):
        raise UserError(f"{len(args.runs)} runs are too many for one picture; name at most four")
    histories = {as_text(run_label(run)): read_history(run) for run in args.runs}
    save_figure(compared_curves(histories, args.against), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
