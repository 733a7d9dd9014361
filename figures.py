"""Every picture. Each function returns a matplotlib Figure, which a notebook shows as it is."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import atomic_write

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"


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
