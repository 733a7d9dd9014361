"""Evaluate a checkpoint: python evaluate.py runs/cifar10-sgd/best.pt [--views 10]

Network and preprocessing are rebuilt from the checkpoint alone, which also names the data set.
"""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import figures
from checkpoint import load_network
from dataset import (
    DATASETS,
    DEFAULT_DATA_DIR,
    Dataset,
    Split,
    data_dir_of,
    fingerprints,
    load_dataset,
    load_folder,
)
from model import LocalResponseNorm
from predict import Classifier, eval_batch_size, top_predictions
from utils import (
    OneLineParser,
    UserError,
    add_device_options,
    count_of,
    device_name,
    environment,
    keep_freed_memory,
    output_file,
    run_script,
    select_device,
    select_precision,
    to_device,
    write_csv,
    write_json,
)

CALIBRATION_BINS = 15
FIGURE_IMAGES = 8  # in a figure
NEIGHBORS = 6  # of an image, as in the paper's Fig. 4


# --- Numbers ---


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean cross-entropy (nats) and top-1 accuracy (0..1)."""
    loss = F.cross_entropy(logits, labels)
    correct = (logits.argmax(1) == labels).sum()
    return loss.item(), correct.item() / len(labels)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95% confidence interval (0..1) of a proportion correct / total (Wilson 1927)."""
    z = 1.96  # standard deviations of a normal distribution that 95% lie within
    proportion = correct / total
    center = proportion + z**2 / (2 * total)
    half_width = z * math.sqrt(proportion * (1 - proportion) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale)


def calibration(logits: Tensor, labels: Tensor) -> tuple[float, list[dict]]:
    """Return the expected calibration error (0..1), and the bins of confidence it is made of.

    The mean distance between confidence, the top prediction's probability, and accuracy over 15
    bins of equal width, weighted by their images (Guo et al., ICML 2017, §2, eq. 3).
    """
    confidence, predicted = logits.cpu().double().softmax(1).max(1)  # not every GPU has float64
    correct = (predicted == labels.cpu()).double()
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    index = torch.bucketize(confidence, edges[1:-1])
    counts = index.bincount(minlength=CALIBRATION_BINS).tolist()
    confidences = index.bincount(confidence, CALIBRATION_BINS).tolist()  # sums
    corrects = index.bincount(correct, CALIBRATION_BINS).tolist()  # sums
    bins = [
        {
            "low": edges[i].item(),
            "high": edges[i + 1].item(),
            "images": n,
            "confidence": confidences[i] / n if n else None,
            "accuracy": corrects[i] / n if n else None,
        }
        for i, n in enumerate(counts)
    ]
    distances = (abs(a - b) for a, b in zip(confidences, corrects, strict=True))
    return sum(distances) / len(labels), bins


def summarize(logits: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """Return all that evaluate.py reports, as plain values: accuracies and intervals in 0..1."""
    count = len(classes)
    pairs = labels * count + logits.argmax(1)
    matrix = pairs.bincount(minlength=count**2).view(count, count).tolist()
    loss, accuracy = loss_and_accuracy(logits, labels)
    calibration_error, bins = calibration(logits, labels)
    per_class = [
        {
            "class": name,
            "images": sum(row),
            "accuracy": row[i] / sum(row),
            "interval_95": wilson_interval(row[i], sum(row)),
        }
        for i, (name, row) in enumerate(zip(classes, matrix, strict=True))
        if sum(row)
    ]
    errors = [
        {"class": classes[true], "predicted": classes[other], "images": matrix[true][other]}
        for true in range(count)
        for other in range(count)
        if other != true and matrix[true][other]
    ]
    correct = sum(matrix[i][i] for i in range(count))
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "interval_95": wilson_interval(correct, len(labels)),
        "loss": loss,
        "calibration_error": calibration_error,
        "calibration_bins": bins,
        "per_class": per_class,
        "most_confused": sorted(errors, key=lambda pair: -pair["images"])[:5],
        "confusion_matrix": matrix,
    }


def write_predictions(
    path: Path, names: list[str] | None, labels: Tensor, logits: Tensor, classes: list[str]
) -> None:
    """Write a CSV file with a row for each image: its class, prediction and probabilities.

    Images without names are numbered.
    """
    names = names or range(len(labels))
    rows = [
        {"image": name, "label": classes[label], "prediction": classes[row.index(max(row))]}
        | {f"p({one})": f"{value:.6f}" for one, value in zip(classes, row, strict=True)}
        for name, label, row in zip(names, labels.tolist(), logits.softmax(1).tolist(), strict=True)
    ]
    write_csv(path, rows[0], rows)
    print(f"wrote {path}")


def print_summary(one_view: dict, ten_views: dict | None = None) -> None:
    """Print accuracy, loss and calibration error of what summarize() returned, side by side."""
    summaries = [one_view] if ten_views is None else [one_view, ten_views]
    if ten_views is not None:
        print(f"{'':<20}{'one view':<28}ten views")
    accuracies = [
        "{:.2%} ({:.2%} to {:.2%})".format(s["accuracy"], *s["interval_95"]) for s in summaries
    ]
    losses = [f"{s['loss']:.4f}" for s in summaries]
    errors = [f"{100 * s['calibration_error']:.2f} points" for s in summaries]
    for name, values in (
        ("top-1 accuracy", accuracies),
        ("cross-entropy", losses),
        ("calibration error", errors),
    ):
        print(f"{name:<20}" + "".join(f"{value:<28}" for value in values).rstrip())
    print("brackets: 95% confidence interval")


def print_classes(summary: dict) -> None:
    """Print accuracy by class and the most confused pairs of what summarize() returned."""
    width = max(12, *(len(row["class"]) for row in summary["per_class"])) + 2
    print(f"\n{'class':<{width}}{'images':>7}{'accuracy':>10}   95% interval")
    for row in summary["per_class"]:
        low, high = row["interval_95"]
        print(
            f"{row['class']:<{width}}{row['images']:>7}{row['accuracy']:>10.1%}   "
            f"{low:.1%} to {high:.1%}"
        )
    if summary["most_confused"]:
        print("\nmost confused")
    for pair in summary["most_confused"]:
        print(f"{pair['class']} predicted as {pair['predicted']}: {pair['images']}")


# --- Figures ---


def draw_figures(
    classifier: Classifier, dataset: Dataset, split: Split, logits: Tensor, summary: dict
) -> dict[str, figures.Figure]:
    """Return all figures of a trained network but the confusion matrix, by name.

    split is the one that logits and summary are of. Layers that were replaced by others have no
    figure.
    """
    probabilities = logits.softmax(1)
    examples = first_of_each_class(split.labels, FIGURE_IMAGES)
    errors = most_confident_errors(probabilities, split.labels, FIGURE_IMAGES)
    title = f"Confidence and accuracy: {len(split.labels):,} images, {summary['accuracy']:.1%} "
    title += f"correct,\ncalibration error {100 * summary['calibration_error']:.1f} points"
    drawn = {
        "predictions": draw_predictions(split, probabilities, dataset.classes, examples),
        "neighbors": draw_neighbors(classifier, dataset, split.select(examples[:5])),
        "reliability": figures.reliability(summary["calibration_bins"], title),
    }
    if len(errors):
        drawn["errors"] = draw_predictions(split, probabilities, dataset.classes, errors)
    conv1 = getattr(classifier.network.features, "conv1", None)
    if isinstance(conv1, nn.Conv2d):
        drawn["filters"] = figures.filters(conv1.weight.detach().cpu(), "The filters of conv1")
    values = layer_values(classifier, split.images[examples])
    maps = {name: y[0].numpy() for name, (_, _, y) in values.items() if "relu" in name}
    drawn["feature-maps"] = figures.feature_maps(split.images[examples[0]].cpu(), maps)
    factors = {
        name: (y[x != 0] / x[x != 0]).numpy()
        for name, (layer, x, y) in values.items()
        if isinstance(layer, LocalResponseNorm)
    }
    if factors:
        title = f"Factor by which LRN multiplies activations, {len(examples)} images"
        drawn["normalization"] = figures.normalization(factors, title)
    return drawn


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Return the indices of the first image of class 0, of class 1 and so on, count at most."""
    return torch.cat([(labels == label).nonzero()[0] for label in labels.unique()[:count]])


def most_confident_errors(probabilities: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the indices of the wrong predictions with the highest probabilities."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True)][:count]


def draw_predictions(
    split: Split, probabilities: Tensor, classes: list[str], indices: Tensor
) -> figures.Figure:
    """Return the paper's Fig. 4 left: images, their classes, and the top five predictions."""
    captions, results = [], []
    for i in indices.tolist():
        name = classes[split.labels[i]]
        captions.append(f"labeled {name}")
        top = top_predictions(probabilities[i], classes, 5)
        results.append([item | {"correct": item["class"] == name} for item in top])
    return figures.predictions(list(split.images[indices].cpu()), captions, results)


def draw_neighbors(classifier: Classifier, dataset: Dataset, queries: Split) -> figures.Figure:
    """Return the paper's Fig. 4 right: the training images with the nearest activations of fc7."""
    train = dataset.train.to(queries.images.device)
    distances = torch.cdist(classifier.embed(queries.images), classifier.embed(train.images))
    nearest = [train.select(row) for row in distances.topk(NEIGHBORS, largest=False).indices]
    return figures.neighbors(
        list(queries.images.cpu()),
        [list(chosen.images.cpu()) for chosen in nearest],
        [dataset.classes[label] for label in queries.labels.tolist()],
        [[dataset.classes[label] for label in chosen.labels.tolist()] for chosen in nearest],
    )


def layer_values(
    classifier: Classifier, images: Tensor
) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Return each layer of `features`, its input and its output for uint8 images, by name."""
    values = {}

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        values[name] = layer, inputs[0].float().cpu(), output.float().cpu()

    hooks = [
        layer.register_forward_hook(partial(keep, name))
        for name, layer in classifier.network.features.named_children()
    ]
    replace(classifier, precision="fp32", quiet=True).logits(images)
    for hook in hooks:
        hook.remove()
    return values


def save_beside(checkpoint: Path, split: str, drawn: dict[str, figures.Figure]) -> None:
    """Write figures beside the checkpoint: best-confusion-test.png beside best.pt."""
    for name, figure in drawn.items():
        path = checkpoint.with_name(f"{checkpoint.stem}-{name}-{split}.png")
        try:
            figures.save_figure(figure, path)
            print(f"wrote {path}")
        except UserError as error:
            print(f"no picture: {error}")


# --- The script ---


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Evaluate a checkpoint of train.py.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a best.pt or last.pt")
    add("--split", choices=("test", "val"), default="test", help="default: test")
    add("--dataset", choices=DATASETS, help="with its classes; default: that of the training")
    where = f"where the training found its data, else {DEFAULT_DATA_DIR}"
    add("--data-dir", type=Path, help=f"default: {where}")
    add_device_options(parser)
    views = "10: also the mean over four corners, center, and their horizontal flips; default: 1"
    add("--views", type=int, choices=(1, 10), default=1, help=views)
    what = "also save predictions, filters, feature maps, calibration and more"
    add("--figures", action="store_true", help=what)
    add("--json", type=output_file, metavar="FILE", help="write all results to FILE")
    what = "write a row for each image to FILE: label, prediction, each class's probability"
    add("--predictions", type=output_file, metavar="FILE", help=what)
    return parser.parse_args()


def load_data(args: argparse.Namespace, training: dict, classes: list[str], size: int) -> Dataset:
    """Return the data set to evaluate on: that of the training, or another with its classes."""
    name = args.dataset or training["dataset"]
    is_other = name != training["dataset"]
    trained_on = data_dir_of(training)
    folder = args.data_dir or (Path(DEFAULT_DATA_DIR) if is_other else trained_on)
    if name != "folder":
        return load_dataset(name, folder, classes)
    is_other = is_other or folder.resolve() != trained_on.resolve()
    wanted = ("train", args.split) if args.figures else (args.split,)
    return load_folder(folder, classes, size, wanted, all_for_test=is_other)


def leave_out(seen: Tensor, split: Split, names: list[str] | None) -> tuple[Split, list]:
    """Return the pictures that were not in the training, wherever they lie now, and their names.

    Those without names are numbered.
    """
    names = names or list(range(len(split.labels)))
    is_new = ~torch.isin(fingerprints(split.images), seen)
    if not is_new.all():
        copies = count_of((~is_new).sum().item(), "picture")
        print(f"left out: {copies} that the training has seen")
        names = [name for name, chosen in zip(names, is_new.tolist(), strict=True) if chosen]
        split = split.select(is_new)
    return split, names


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    device = select_device(args.device)
    precision = select_precision(args.precision, device)
    network, preprocessing, checkpoint = load_network(args.checkpoint)
    training, classes = checkpoint["training"], checkpoint["classes"]
    data_name = args.dataset or training["dataset"]
    if args.split == "val" and training.get("train_split") == "full":
        raise UserError(f"{args.checkpoint} was trained on the validation images; use --split test")
    dataset = load_data(args, training, classes, preprocessing.image_size)
    split, names = getattr(dataset, args.split), dataset.names.get(args.split)
    if args.split == "test" and "seen" in checkpoint:
        split, names = leave_out(checkpoint["seen"], split, names)
    if not len(split.labels):
        raise UserError(f"there are no {args.split} images of these classes")
    split = split.to(device)

    network = to_device(network, device)
    batch_size = eval_batch_size(training["batch_size"])
    classifier = Classifier(network, classes, preprocessing, precision, batch_size)
    logits = classifier.logits(split.images)
    summary, ten_views = summarize(logits, split.labels, classes), None
    if args.views == 10:
        ten_views = summarize(classifier.ten_view_logits(split.images), split.labels, classes)

    if args.predictions:
        write_predictions(args.predictions, names, split.labels, logits, classes)
    if args.json:
        record = {
            "checkpoint": str(args.checkpoint),
            "dataset": data_name,
            "split": args.split,
            "epoch": checkpoint["epoch"],
            "precision": precision,
            **summary,
            **({"ten_views": ten_views} if ten_views else {}),
            "training": training,
            "environment": environment(device),
        }
        write_json(args.json, record)

    source = DATASETS[data_name]
    if data_name == "folder":
        source = args.data_dir or data_dir_of(training)
    name = f"{source}, {args.split} split"
    print(f"{args.checkpoint}: AlexNet after epoch {checkpoint['epoch']} of {training['epochs']}")
    view = "center crop" if preprocessing.enlarged_size > preprocessing.size else "whole image"
    print(f"{name}, {summary['images']:,} images, {view}, {precision} on {device_name(device)}\n")
    print_summary(summary, ten_views)
    print_classes(summary)
    print()
    title = f"{name}: {summary['accuracy']:.1%} top-1"
    matrix = figures.confusion_matrix(np.array(summary["confusion_matrix"]), classes, title)
    save_beside(args.checkpoint, args.split, {"confusion": matrix})
    if args.figures:
        drawn = draw_figures(classifier, dataset, split, logits, summary)
        save_beside(args.checkpoint, args.split, drawn)


if __name__ == "__main__":
    run_script(main)
