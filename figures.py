"""Every picture. Each function returns a matplotlib Figure, which a notebook shows as it is."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import atomic_write

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
SERIES = ((BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#000000", "D"))  # colours and markers


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG that is whole or not there. Raises UserError if it cannot."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def learning_curves(history: list[dict], title: str) -> Figure:
    """Loss and accuracy by epoch, training and validation.

    Args:
        history: a row per epoch with epoch, train_loss, val_loss, train_accuracy, val_accuracy
            (0..1), as in metrics.csv.
        title: what the run is.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, metric, scale in ((loss_axes, "loss", 1), (accuracy_axes, "accuracy", 100)):
        for split, colour, marker in (("train", ORANGE, "s"), ("val", BLUE, "o")):
            values = [row[f"{split}_{metric}"] * scale for row in history]
            name = {"train": "training (with dropout)", "val": "validation"}[split]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    loss_axes.set_ylabel("cross-entropy")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    accuracy_axes.set_ylabel("top-1 accuracy (%)")
    accuracy_axes.set_ylim(0, 100)
    best = max(history, key=lambda row: row["val_accuracy"])
    figure.suptitle(f"{title}: best validation accuracy {best['val_accuracy']:.1%}")
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
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    return figure


def ablation(ideas: list[dict], title: str) -> Figure:
    """What each idea adds to the validation accuracy: every seed, mean and standard deviation.

    Args:
        ideas: for each its name (idea), what the paper says of it (claim), the accuracy with it
            minus that without it in percentage points for each seed (differences), and the number
            of seeds without a difference, because a run diverged (diverged).
        title: the setting.
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
            label += f"\n{idea['diverged']} of {len(values) + idea['diverged']} diverged"
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
    notes.set_title("the paper says", loc="left", fontsize=10)
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
    axes.axhline(25, color="black", linestyle=":", linewidth=1, label="25 %, as in Fig. 1")
    axes.set_ylim(0, 100)
    axes.set_xlabel("epoch (errors are those met in it, with dropout and augmentation)")
    axes.set_ylabel("training error (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=9)
    return figure


def speed(rows: list[dict], title: str) -> Figure:
    """How many times as fast as the textbook script, at the largest batch size measured.

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
    ours = [row for row in rows if row["side"] == "here"]
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(ours)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(ours):
        median, low, high = row["times_the_textbook"]
        colour = BLUE if row["precision"] == "fp32" else ORANGE
        error = [[median - low], [high - median]]
        axes.barh(place, median, color=colour, xerr=error, capsize=3, alpha=0.85)
        rates = f"{row['images_per_second'][0]:,.4g}, not {textbook[row['part']]:,.4g} images/s"
        axes.annotate(
            f"{median:.1f} times: {rates}",
            (high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    names = [
        row["name"] if "pipe" in row["part"] else f"{row['name']}, {row['precision']}"
        for row in ours
    ]
    axes.set_yticks(range(len(ours)), names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.7 * max(row["times_the_textbook"][2] for row in ours))
    axes.set_xlabel(
        "times as fast as the textbook script; whiskers: the slowest and the fastest round"
    )
    axes.set_title(f"Batch {batch_size}, {title}", fontsize=10)
    return figure


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
        style = {"color": colour, "marker": marker, "markersize": 4}
        rate_axes.plot(sizes, rate, label=f"{count} process{'es' * (count > 1)}", **style)
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
    rate_axes.legend(loc="lower right")
    figure.suptitle(title, fontsize=10)
    return figure


def likeliest(pictures: list, captions: list[str], results: list[list[dict]]) -> Figure:
    """Fig. 4 left of the paper: pictures, and below each its likeliest classes as bars.

    Args:
        pictures: uint8 [3, H, W] each.
        captions: a line for each, such as its true class.
        results: for each the likeliest classes, with class and probability (0..1), the likeliest
            first, and right (whether it is the true class) where that is known. Five are drawn.
    """
    columns = min(4, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(2.25 * columns, 3.1 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(2, 1.25) * rows)
    for axes in grid.flat:
        axes.axis("off")
    for place, (picture, caption, result) in enumerate(
        zip(pictures, captions, results, strict=True)
    ):
        row, column = 2 * (place // columns), place % columns
        image_axes, bar_axes = grid[row, column], grid[row + 1, column]
        image_axes.imshow(np.asarray(picture).transpose(1, 2, 0), interpolation="nearest")
        image_axes.set_title(f"{caption:.24}", fontsize=10)
        for height, item in enumerate(result[:5]):
            colour = ORANGE if item.get("right") else BLUE
            bar_axes.barh(height, item["probability"], color=colour, alpha=0.45)
            label = f"{item['class']} {item['probability']:.0%}"
            bar_axes.text(0.01, height, label, va="center", fontsize=9)
        bar_axes.set_xlim(0, 1)
        bar_axes.set_ylim(4.5, -0.5)
    return figure
