"""Pictures of runs and networks. Each function returns a Figure, which a notebook shows as it is.

As a script it lays learning curves over each other: python figures.py runs/a runs/b
"""

import argparse
import math
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor
from torchvision.utils import make_grid

from utils import OneLineParser, UserError, atomic_write, output_file, read_csv, run_script

NO_TICKS = {"xticks": [], "yticks": []}
# Okabe and Ito's colors, which color-blind people can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
SERIES = ((BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#000000", "D"))  # colors and markers


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, or by the path's suffix another type such as PDF or SVG, atomically.

    Raises UserError if it cannot.
    """
    suffix = path.suffix.lower().removeprefix(".")
    kind = suffix if suffix in figure.canvas.get_supported_filetypes() else "png"
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name's letters that the font lacks
        figure.savefig(temporary, format=kind, dpi=120)


def as_text(name: str) -> str:
    """Return the name of a file or class as matplotlib draws it: two $ would make a formula."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def show_image(axes, image: Tensor) -> None:
    """Draw uint8 [3, H, W] into axes."""
    axes.imshow(np.asarray(image).transpose(1, 2, 0), interpolation="nearest")


# --- Runs ---


def curve_style(color: str, marker: str, history: list[dict]) -> dict:
    """Return the style of a curve with at most some dozen markers: more would hide the line."""
    distance = max(1, len(history) // 12)
    return {"color": color, "marker": marker, "markersize": 4, "markevery": distance}


def learning_curves(history: list[dict], title: str, is_mixed: bool = False) -> Figure:
    """Return loss and accuracy by epoch, training and validation.

    Args:
        history: a row per epoch with epoch, train_loss, val_loss, train_accuracy, val_accuracy
            (0..1), as in metrics.csv; val_* are None if nothing was held out.
        title: what the run is.
        is_mixed: whether training numbers are of images mixed by CutMix.
    """
    how = "mixed images" if is_mixed else "augmented"
    splits = {"train": (f"training (during the epoch, {how})", ORANGE, "s")}
    if history[0]["val_loss"] is not None:
        splits["val"] = ("validation", BLUE, "o")
        title += f": best validation accuracy {max(row['val_accuracy'] for row in history):.1%}"
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, metric, scale in ((loss_axes, "loss", 1), (accuracy_axes, "accuracy", 100)):
        for split, (name, color, marker) in splits.items():
            values = [row[f"{split}_{metric}"] * scale for row in history]
            axes.plot(epochs, values, label=name, **curve_style(color, marker, history))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    loss_axes.set_ylabel("cross-entropy")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    accuracy_axes.set_ylabel("top-1 accuracy (%)")
    accuracy_axes.set_ylim(0, 100)
    figure.suptitle(title, fontsize=11, wrap=True)
    return figure


def compared_curves(histories: dict[str, list[dict]], against: str = "epoch") -> Figure:
    """Return validation loss and accuracy of several runs.

    Args:
        histories: for each run its name and the rows of read_history(); at most four runs.
        against: "epoch" or "minutes" of training.
    """
    unit = {"epoch": "epoch", "minutes": "minutes of training"}[against]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, history), (color, marker) in zip(histories.items(), SERIES, strict=False):
        x = [row[against] for row in history]
        style = curve_style(color, marker, history)
        loss_axes.plot(x, [row["val_loss"] for row in history], label=name, **style)
        accuracy = [100 * row["val_accuracy"] for row in history]
        accuracy_axes.plot(x, accuracy, label=f"{name}: best {max(accuracy):.1f}%", **style)
    loss_axes.set_ylabel("validation cross-entropy, logarithmic")
    accuracy_axes.set_ylabel("validation top-1 accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel(unit)
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


def read_history(run_dir: Path) -> list[dict]:
    """Return a row for each epoch of a run: epoch, val_loss, val_accuracy, minutes of training.

    Raises UserError if it has no validated epochs.
    """
    try:
        history, seconds = [], 0.0
        metrics, timing = (read_csv(run_dir / name) for name in ("metrics.csv", "timing.csv"))
        for row, time in zip(metrics, timing, strict=False):  # the run may be between the two
            seconds += float(time["seconds"])
            numbers = {name: float(row[name]) for name in ("epoch", "val_loss", "val_accuracy")}
            history.append({**numbers, "minutes": seconds / 60})
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"{run_dir} has no validated epochs; name a run of train.py") from error
    if not history:
        raise UserError(f"{run_dir} has no validated epochs; name a run of train.py")
    return history


# --- Evaluations ---


def confusion_matrix(matrix: np.ndarray, classes: list[str], title: str) -> Figure:
    """Return which class is predicted as which.

    Args:
        matrix: int [C, C], number of images of each true class (row) by predicted class (column).
        classes: the C names.
        title: what was evaluated.
    """
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (true, predicted), value in np.ndenumerate(percent):
        if value > 0.5:  # less would be printed as 0
            color = "white" if value > 55 else "black"
            axes.text(predicted, true, f"{value:.0f}", ha="center", va="center", color=color)
    names = list(map(as_text, classes))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    figure.colorbar(image, label="% of the true class (blank: 0.5 or less)", shrink=0.8)
    return figure


def reliability(bins: list[dict], title: str) -> Figure:
    """Return accuracy by confidence (above), and the number of images by confidence (below).

    Args:
        bins: low and high (0..1), images, confidence and accuracy (0..1, or None without images)
            of each range of confidence, as evaluate.py has them.
        title: what was evaluated.
    """
    figure = Figure(figsize=(5.4, 5.4), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in bins if row["images"]]
    left = [100 * row["low"] for row in filled]
    accuracy = [100 * row["accuracy"] for row in filled]
    confidence = [100 * row["confidence"] for row in filled]
    style = {"width": [100 * (row["high"] - row["low"]) for row in filled], "align": "edge"}
    style |= {"color": BLUE, "alpha": 0.6}
    axes.bar(left, accuracy, edgecolor="white", **style)
    label = "bin: mean confidence, accuracy"
    axes.plot(confidence, accuracy, "D", color=ORANGE, markersize=4, label=label)
    axes.plot([0, 100], [0, 100], color="black", linewidth=1, label="perfect calibration")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 104)  # a marker at 100 is complete
    counts.bar(left, [row["images"] for row in filled], **style)
    counts.set_xlabel("confidence: probability of the top prediction (%)")
    counts.set_ylabel("images (log)")
    counts.set_yscale("log")  # a bar above may be that of one image
    counts.set_ylim(bottom=0.5)
    counts.set_xlim(0, 100)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for each in (axes, counts):
        each.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    return figure


def predictions(images: list, captions: list[str], results: list[list[dict]]) -> Figure:
    """Return Fig. 4 left of the paper: images, and below each its top predictions as bars.

    Args:
        images: uint8 [3, H, W] each.
        captions: a text for each, such as its file's name.
        results: for each the top predictions, with class and probability (0..1), the highest
            first, and correct (whether it is the true class) where that is known. Up to five are
            drawn, and none that would read 0%.
    """
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.25 * columns, 3.3 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(2, 1.25) * rows)
    for axes in grid.flat:
        axes.axis("off")
    for i, (image, caption, result) in enumerate(zip(images, captions, results, strict=True)):
        row, column = 2 * (i // columns), i % columns
        image_axes, bar_axes = grid[row, column], grid[row + 1, column]
        show_image(image_axes, image)
        image_axes.set_title(as_text(textwrap.fill(caption, 26)), fontsize=10)
        for y, item in enumerate(r for r in result[:5] if r["probability"] >= 0.005):
            color = ORANGE if item.get("correct") else BLUE
            bar_axes.barh(y, item["probability"], color=color, alpha=0.45)
            label = f"{as_text(item['class'])} {item['probability']:.0%}"
            bar_axes.text(0.01, y, label, va="center", fontsize=9)
        bar_axes.set_xlim(0, 1)
        bar_axes.set_ylim(4.5, -0.5)
    if any("correct" in item for result in results for item in result):
        legend = [Patch(color=ORANGE, alpha=0.45, label="the labeled class")]
        legend.append(Patch(color=BLUE, alpha=0.45, label="another class"))
        figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    return figure


# --- Networks ---


def filters(weights: Tensor, title: str) -> Figure:
    """Return Fig. 3 of the paper: the filters of conv1, each stretched to its own range.

    Args:
        weights: float [N, 3, h, w], drawn in rows of 16.
        title: what they are.
    """
    stretch = {"normalize": True, "scale_each": True}
    image = make_grid(torch.as_tensor(weights), 16, padding=1, pad_value=1, **stretch)
    _, height, width = image.shape
    figure = Figure(figsize=(9, 9 * height / width + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image.movedim(0, 2).numpy(), interpolation="nearest")
    axes.axis("off")
    axes.set_title(f"{title}, each stretched to its own range", fontsize=10)
    return figure


def neighbors(
    queries: list, nearest: list[list], captions: list[str], nearest_captions: list[list[str]]
) -> Figure:
    """Return Fig. 4 right of the paper: in each row an image and those with the nearest embedding.

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
    for row, query, others, caption, other_captions in every_row:
        for axes, image in zip(row, (query, *others), strict=True):
            show_image(axes, image)
        for axes, other_caption in zip(row[1:], other_captions, strict=True):
            color = "black" if other_caption == caption else ORANGE
            axes.set_xlabel(as_text(other_caption), fontsize=9, color=color)
        row[0].set_ylabel(as_text(caption), rotation=0, ha="right", va="center")
        for side in row[0].spines.values():
            side.set(color=ORANGE, linewidth=2.5)
    grid[0, 0].set_title("image", fontsize=10)
    grid[0, 1].set_title("nearest in the training split", fontsize=10, loc="left")
    return figure


def feature_maps(image: Tensor, maps: dict[str, np.ndarray]) -> Figure:
    """Return an image, and the strongest channels of each layer.

    Args:
        image: uint8 [3, H, W].
        maps: for each layer its outputs, float [C, h, w]; the eight with the largest sums are
            drawn.
    """
    count = 8
    figure = Figure(figsize=(9, 1.05 * len(maps) + 1.2), layout="constrained")
    grid = figure.subplots(len(maps) + 1, count, squeeze=False, subplot_kw=NO_TICKS)
    for axes in grid[0, 1:]:
        axes.axis("off")
    show_image(grid[0, 0], image)
    grid[0, 0].set_ylabel("image", rotation=0, ha="right", va="center")
    for row, (name, channels) in zip(grid[1:], maps.items(), strict=True):
        strongest = channels[np.argsort(-channels.sum((1, 2)))[:count]]
        for axes, channel in zip(row, strongest, strict=False):
            axes.imshow(channel, cmap="magma", interpolation="nearest")
        size = " x ".join(map(str, channels.shape))
        row[0].set_ylabel(f"{name}\n{size}", rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("The eight channels with the largest sums, each on its own scale", fontsize=10)
    return figure


def normalization(factors: dict[str, np.ndarray], title: str) -> Figure:
    """Return histograms of the factors by which LRN multiplies activations.

    Args:
        factors: for each LRN layer output / input of each activation that is not 0.
        title: what was measured.
    """
    at_rest = 2**-0.75  # without any activity in the window: k ** -beta
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, factors.items(), strict=True):
        counts, edges = np.histogram(values, bins=60, range=(0, 1.01 * at_rest))
        axes.stairs(100 * counts / max(1, len(values)), edges, fill=True, color=BLUE, alpha=0.6)
        label = f"no neighboring activity: {at_rest:.3f}"
        axes.axvline(at_rest, color=ORANGE, linestyle="--", label=label)
        quantiles = np.quantile(values, (0.01, 0.5, 0.99)) if len(values) else [np.nan] * 3
        low, median, high = (f"{value:.3f}" for value in quantiles)
        axes.set_title(f"{name}: median {median}, 98% from {low} to {high}", fontsize=9)
        axes.set_xlabel("factor")
        axes.legend(loc="upper left", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("activations (%)")
    figure.suptitle(title, fontsize=10)
    return figure


# --- The script: several runs in one picture ---


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Draw the learning curves of several runs in one picture.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="at most four")
    units = ("epoch", "minutes")
    add("--against", choices=units, default="epoch", help="default: epoch")
    what = "default: curves.png"
    add("--output", type=output_file, default="curves.png", metavar="FILE", help=what)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if len(args.runs) > len(SERIES):
        raise UserError(f"{len(args.runs)} runs are too many for one picture; name at most four")
    histories = {}
    for run in args.runs:
        # matplotlib leaves labels that begin with _ out of a legend.
        label = f"./{run}" if str(run).startswith("_") else str(run)
        histories[as_text(label)] = read_history(run)
    save_figure(compared_curves(histories, args.against), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
