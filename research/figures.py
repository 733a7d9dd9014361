"""Pictures of the benchmark and the ablation. Each function returns a Figure."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from figures import BLUE, ORANGE

# --- Ablation ---


def ablation(ideas: list[dict], title: str) -> Figure:
    """Return what each idea adds to the validation accuracy: every seed, mean and deviation.

    Args:
        ideas: for each its name (idea), what the paper says of it (claim), the accuracy with it
            minus that without it in percentage points for each seed with which both runs finished
            (differences), how many seeds it was run with (seeds), and how many of those runs
            diverged (diverged).
        title: the setting.
    """
    figure = Figure(figsize=(9, 1.6 + 0.62 * len(ideas)), layout="constrained")
    axes, notes = figure.subplots(1, 2, width_ratios=(5, 3), sharey=True)
    labels = []
    for y, idea in enumerate(ideas):
        values = np.array(idea["differences"])
        axes.plot(values, np.full(len(values), y + 0.2), "o", color=BLUE, alpha=0.6)
        label = idea["idea"]
        if len(values):
            mean, deviation = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
            axes.errorbar(mean, y - 0.15, xerr=deviation, fmt="D", color=ORANGE, capsize=4)
            label += f"\n{mean:+.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
        if idea["diverged"]:
            label += f"\n{idea['diverged']} of {idea['seeds']} diverged"
        labels.append(label)
        notes.text(0, y, idea["claim"], va="center", fontsize=9)
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
    """Return Fig. 1 of the paper: the training error by epoch, each seed thin, their mean thick.

    Args:
        curves: for each kind of network the training errors (0..1) of each seed, epoch by epoch;
            at most two kinds, the paper's solid and dashed line.
        title: the setting.
    """
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = ((BLUE, "-"), (ORANGE, "--"))
    for (name, runs), (color, line) in zip(curves.items(), styles, strict=False):
        percent = 100 * np.array(runs)
        epochs = range(1, percent.shape[1] + 1)
        axes.plot(epochs, percent.T, color=color, linewidth=0.8, alpha=0.5)
        mean = percent.mean(axis=0)
        axes.plot(epochs, mean, line, color=color, marker="o", markersize=4, label=name)
    axes.axhline(25, color="black", linestyle=":", linewidth=1, label="25%, as in Fig. 1")
    axes.set_ylim(0, 100)
    axes.set_xlabel("epoch (error during the epoch, with dropout and augmentation)")
    axes.set_ylabel("training error (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize=9)
    return figure


# --- Benchmark ---


def speed(rows: list[dict], title: str) -> Figure:
    """Return how many times as fast as the textbook script, at the largest batch size measured.

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
    colors = {row["precision"]: BLUE if row["precision"] == "fp32" else ORANGE for row in ours}
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(ours)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(ours):
        median, low, high = row["times_the_textbook"]
        style = {"color": colors[row["precision"]], "capsize": 3, "alpha": 0.85}
        axes.barh(y, median - 1, left=1, xerr=[[median - low], [high - median]], **style)
        rates = f"{textbook[row['part']]:,.0f} → {row['images_per_second'][0]:,.0f} images/s"
        offset = {"xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(f"{median:.1f}: {rates}", (high, y), va="center", fontsize=9, **offset)
    axes.set_yticks(range(len(ours)), map(speed_name, ours))
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.5, *(first * 10**zeros for zeros in range(4) for first in (1, 2, 5))]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    left = min(0.95, 0.9 * min(row["times_the_textbook"][1] for row in ours))
    fastest = max(1, *(row["times_the_textbook"][2] for row in ours))
    axes.set_xlim(left, left * (fastest / left) ** 1.7)  # leaves room for the longest bar's text
    axes.set_xlabel("times as fast, logarithmic (whiskers: slowest and fastest round)")
    meaning = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=meaning, loc="lower right", fontsize=9)
    heading = f"Speed relative to the textbook script in float32\nBatch {batch_size}, {title}"
    figure.suptitle(heading, fontsize=10)
    return figure


def speed_name(row: dict) -> str:
    """Return what a row of the benchmark is of; the data pipeline has no precision."""
    if "pipe" in row["part"]:
        return row["name"]
    compiled = ", compiled" if row["side"] == "compiled" else ""
    return f"{row['name']}, {row['precision']}{compiled}"
