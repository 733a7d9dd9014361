"""Evaluates a checkpoint: python evaluate.py runs/cifar10-sgd/best.pt [--views 10]

Network and preprocessing are rebuilt from the checkpoint alone, which also names the data set.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import figures
from checkpoint import load_network
from dataset import (
    DATASETS,
    DEFAULT_DATA_DIR,
    Dataset,
    Preprocessing,
    Split,
    data_dir_of,
    load_dataset,
    plain_batches,
    view_maps,
)
from model import IMAGE_SIZE, INITS, AlexNet
from parallel import Processes
from utils import (
    PRECISIONS,
    OneLineParser,
    UserError,
    autocast,
    device_name,
    environment,
    keep_freed_memory,
    output_file,
    run_script,
    select_device,
    select_precision,
    write_json,
)

# The same in training and evaluation, so that both compute the same validation accuracy.
BATCH_SIZE = 250
CALIBRATION_BINS = 15
FIGURE_IMAGES = 8  # in a figure
NEIGHBOURS = 6  # of an image, as in the paper's Fig. 4


def predict(
    network: AlexNet,
    images: Tensor,
    preprocessing: Preprocessing,
    precision: str,
    view: Tensor | None = None,
) -> Tensor:
    """Logits, float32 [N, classes], of uint8 images [N, 3, H, W] on the network's device.

    view is the map [2, 3] through which all of them are seen, by default the preprocessing's. The
    network is in eval mode from then on.
    """
    network.eval()
    return in_batches(network, images, preprocessing, precision, view)


def predict_features(
    network: AlexNet, images: Tensor, preprocessing: Preprocessing, precision: str
) -> Tensor:
    """The network's features [N, 4096]; takes what predict() takes."""
    network.eval()
    return in_batches(network.features, images, preprocessing, precision)


@torch.no_grad()
def in_batches(
    function: Callable[[Tensor], Tensor],
    images: Tensor,
    preprocessing: Preprocessing,
    precision: str,
    view: Tensor | None = None,
) -> Tensor:
    """What function makes of each image, float32 [N, ...], seen as in predict()."""
    batches = plain_batches(images, preprocessing, BATCH_SIZE, view)
    total = math.ceil(len(images) / BATCH_SIZE)
    results = []
    no_bar = True if Processes().rank > 0 else None  # None: shown on a terminal
    for batch in tqdm(batches, "evaluating", total, leave=False, unit="batch", disable=no_bar):
        with autocast(images.device, precision):
            results.append(function(batch).float())
    return torch.cat(results)


def predict_ten_views(
    network: AlexNet, images: Tensor, preprocessing: Preprocessing, precision: str
) -> Tensor:
    """Logarithm of the mean of the softmax over the paper's ten views (§4.1), [N, classes].

    Takes and returns what predict() does; as logits these give the mean's own probabilities.
    """
    views = view_maps()
    logits = [predict(network, images, preprocessing, precision, view) for view in views]
    return torch.stack(logits).log_softmax(2).logsumexp(0) - math.log(len(views))


def top_classes(probabilities: Tensor, classes: list[str], count: int) -> list[dict]:
    """The likeliest classes with their probabilities (0..1), most likely first."""
    values, indices = probabilities.topk(min(count, len(classes)))
    return [
        {"class": classes[index], "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and top-1 accuracy (0..1)."""
    loss = F.cross_entropy(logits, labels)
    correct = (logits.argmax(1) == labels).sum()
    return loss.item(), correct.item() / len(labels)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% confidence interval (0..1) of a share correct / total (Wilson 1927)."""
    z = 1.96  # deviations of a normal distribution that 95% lie within
    share = correct / total
    centre = share + z**2 / (2 * total)
    half_width = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def calibration(logits: Tensor, labels: Tensor) -> tuple[float, list[dict]]:
    """The expected calibration error (0..1), and the bins of confidence it is made of.

    The mean distance between confidence, the likeliest class's probability, and accuracy over 15
    bins of equal width, weighted by their images (Guo et al., ICML 2017, §2, eq. 3).
    """
    confidence, predicted = logits.cpu().double().softmax(1).max(1)  # not every GPU has float64
    correct = (predicted == labels.cpu()).double()
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    index = torch.bucketize(confidence, edges[1:-1])
    count = index.bincount(minlength=CALIBRATION_BINS).tolist()
    sure = index.bincount(confidence, CALIBRATION_BINS).tolist()  # sums of confidence
    right = index.bincount(correct, CALIBRATION_BINS).tolist()  # numbers of correct predictions
    bins = [
        {
            "low": edges[i].item(),
            "high": edges[i + 1].item(),
            "images": n,
            "confidence": sure[i] / n if n else None,
            "accuracy": right[i] / n if n else None,
        }
        for i, n in enumerate(count)
    ]
    error = sum(abs(s - r) for s, r in zip(sure, right, strict=True)) / len(labels)
    return error, bins


def summarise(logits: Tensor, split: Split, classes: list[str]) -> dict:
    """All that evaluate.py reports, as plain values: accuracies and intervals in 0..1."""
    predicted = logits.argmax(1)
    count = len(classes)
    pairs = split.labels * count + predicted
    matrix = pairs.bincount(minlength=count**2).view(count, count).cpu()
    loss, accuracy = loss_and_accuracy(logits, split.labels)
    calibration_error, bins = calibration(logits, split.labels)
    per_class = []
    for name, row, correct in zip(classes, matrix, matrix.diag(), strict=True):
        correct, total = correct.item(), row.sum().item()
        interval = wilson_interval(correct, total)
        per_class.append(
            {"class": name, "images": total, "accuracy": correct / total, "interval_95": interval}
        )
    mistakes = [
        {"class": classes[true], "taken_for": classes[other], "images": matrix[true, other].item()}
        for true in range(count)
        for other in range(count)
        if other != true and matrix[true, other] > 0
    ]
    return {
        "images": len(split.labels),
        "accuracy": accuracy,
        "interval_95": wilson_interval(matrix.trace().item(), len(split.labels)),
        "loss": loss,
        "calibration_error": calibration_error,
        "calibration_bins": bins,
        "per_class": per_class,
        "most_confused": sorted(mistakes, key=lambda pair: -pair["images"])[:5],
        "confusion_matrix": matrix.tolist(),
    }


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def draw_figures(
    network: AlexNet,
    preprocessing: Preprocessing,
    precision: str,
    dataset: Dataset,
    split: Split,
    logits: Tensor,
    summary: dict,
    first: AlexNet | None = None,
) -> dict[str, figures.Figure]:
    """All figures of a trained network but the confusion matrix, by name.

    split is the one that logits are of; first is the network before training, if it is known.
    """
    what = f"{len(split.labels):,} images, {summary['accuracy']:.1%} right"
    classes = dataset.classes
    probabilities = logits.softmax(1)
    some = one_of_each_class(split.labels, FIGURE_IMAGES)
    mistakes = most_confident_mistakes(probabilities, split.labels, FIGURE_IMAGES)
    drawn = {
        "filters": figures.filters(
            network.conv1.weight.detach().cpu().numpy(), "The filters of conv1"
        ),
        "predictions": draw_predictions(split, probabilities, classes, some),
        "neighbours": draw_neighbours(
            network, preprocessing, precision, dataset, split.select(some[:5])
        ),
        "classes": figures.class_accuracies(summary["per_class"], f"Accuracy by class: {what}"),
        "reliability": figures.reliability(
            summary["calibration_bins"],
            f"Confidence and accuracy: {what},\n"
            f"calibration error {100 * summary['calibration_error']:.1f} points",
        ),
        "feature-maps": draw_feature_maps(network, preprocessing, split.images[some[0]]),
    }
    if network.config["norm"] != "none":
        drawn["normalisation"] = draw_normalisation(network, preprocessing, split.images[some])
    if first:
        learned = network.conv1.weight.detach().cpu() - first.conv1.weight.detach()
        drawn["learned-filters"] = figures.filters(
            learned.numpy(), "The filters of conv1 minus those before training"
        )
    if len(mistakes):
        drawn["mistakes"] = draw_predictions(split, probabilities, classes, mistakes)
    return drawn


def first_network(checkpoint: dict) -> AlexNet | None:
    """The network that the checkpoint's training began with, drawn anew; None if it is not told."""
    seed, init = checkpoint["training"].get("seed"), checkpoint["training"].get("init", "he")
    if type(seed) is not int or not 0 <= seed < 2**63 or init not in INITS:
        return None
    return AlexNet.from_seed(seed, init, **checkpoint["model"])


def one_of_each_class(labels: Tensor, count: int) -> Tensor:
    """The places of the first image of class 0, of class 1 and so on, count at most."""
    places = [(labels == label).nonzero()[0] for label in labels.unique()[:count]]
    return torch.cat(places)


def most_confident_mistakes(probabilities: Tensor, labels: Tensor, count: int) -> Tensor:
    """The places of the wrong answers with the highest probabilities, the highest first."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    return wrong[confidence[wrong].argsort(descending=True)][:count]


def draw_predictions(
    split: Split, probabilities: Tensor, classes: list[str], places: Tensor
) -> figures.Figure:
    """The paper's Fig. 4 left: these images, their classes, and the five likeliest as bars."""
    captions, results = [], []
    for place in places.tolist():
        label = split.labels[place].item()
        captions.append(f"labelled {classes[label]}")
        result = top_classes(probabilities[place], classes, 5)
        results.append([item | {"right": item["class"] == classes[label]} for item in result])
    return figures.likeliest(list(split.images[places].cpu()), captions, results)


def draw_neighbours(
    network: AlexNet, preprocessing: Preprocessing, precision: str, dataset: Dataset, queries: Split
) -> figures.Figure:
    """The paper's Fig. 4 right: the images of the training split with features nearest to theirs.

    With --train-images or --train-split full the network was trained on fewer or more.
    """
    train = dataset.train.images.to(queries.images.device)
    train_features = predict_features(network, train, preprocessing, precision)
    query_features = predict_features(network, queries.images, preprocessing, precision)
    nearest = torch.cdist(query_features, train_features).topk(NEIGHBOURS, largest=False).indices
    names = [dataset.classes[label] for label in dataset.train.labels.tolist()]
    return figures.neighbours(
        list(queries.images.cpu()),
        [list(train[row].cpu()) for row in nearest],
        [dataset.classes[label] for label in queries.labels.tolist()],
        [[names[place] for place in row] for row in nearest.tolist()],
    )


def draw_feature_maps(
    network: AlexNet, preprocessing: Preprocessing, image: Tensor
) -> figures.Figure:
    """What the five convolutions make of one image, uint8 [3, H, W]."""
    names = ("conv1", "conv2", "conv3", "conv4", "conv5")
    outputs = layer_outputs(network, preprocessing, image[None], names)
    maps = {name: network.activation(each)[0].numpy() for name, each in outputs.items()}
    return figures.feature_maps(image.cpu(), maps)


def draw_normalisation(
    network: AlexNet, preprocessing: Preprocessing, images: Tensor
) -> figures.Figure:
    """By how much LRN multiplies the activations that these images, uint8 [N, 3, H, W], cause."""
    factors = normalisation_factors(network, preprocessing, images)
    at_rest = network.norm1.k**-network.norm1.beta
    title = f"By how much LRN multiplies activations, {len(images)} images"
    return figures.normalisation({n: f.numpy() for n, f in factors.items()}, at_rest, title)


def normalisation_factors(
    network: AlexNet, preprocessing: Preprocessing, images: Tensor
) -> dict[str, Tensor]:
    """Output divided by input of norm1 and norm2, [number of inputs that are not 0] each."""
    names = ("conv1", "norm1", "conv2", "norm2")
    outputs = layer_outputs(network, preprocessing, images, names)
    factors = {}
    for before, after in (names[:2], names[2:]):
        activations = network.activation(outputs[before])
        active = activations != 0
        factors[after] = outputs[after][active] / activations[active]
    return factors


def layer_outputs(
    network: AlexNet, preprocessing: Preprocessing, images: Tensor, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """What these layers make of at most a batch of uint8 images [N, 3, H, W], on the CPU."""
    outputs = {}
    hooks = [
        getattr(network, name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output.cpu()})
        )
        for name in names
    ]
    predict(network, images, preprocessing, "fp32")
    for hook in hooks:
        hook.remove()
    return outputs


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def print_views(one: dict, ten: dict) -> None:
    """The two summaries side by side."""
    print(f"{'':<16}{'one view':<28}ten views")
    texts = [f"{s['accuracy']:.2%} ({interval_text(s)})" for s in (one, ten)]
    print(f"{'top-1 accuracy':<16}{texts[0]:<28}{texts[1]}")
    print(f"{'cross-entropy':<16}{one['loss']:<28.4f}{ten['loss']:.4f}")
    errors = [f"{100 * s['calibration_error']:.2f} points" for s in (one, ten)]
    print(f"{'calibration':<16}{errors[0]:<28}{errors[1]}")
    print("in brackets: 95% interval; below: one view")


def interval_text(summary: dict) -> str:
    """The 95% interval of what summarise() returned, for people."""
    low, high = summary["interval_95"]
    return f"{low:.2%} to {high:.2%}"


def print_summary(summary: dict) -> None:
    """Accuracy, loss and calibration error of what summarise() returned."""
    print(
        f"top-1 accuracy  {summary['accuracy']:.2%} (95% interval {interval_text(summary)})\n"
        f"cross-entropy   {summary['loss']:.4f}\n"
        f"calibration     {100 * summary['calibration_error']:.2f} points of expected error"
    )


def print_classes(summary: dict) -> None:
    """Accuracy by class and the most confused pairs of what summarise() returned."""
    print(f"\n{'class':<14}{'images':>7}{'accuracy':>10}   95% interval")
    for row in summary["per_class"]:
        low, high = row["interval_95"]
        print(
            f"{row['class']:<14}{row['images']:>7}{row['accuracy']:>10.1%}   "
            f"{low:.1%} to {high:.1%}"
        )
    if summary["most_confused"]:
        print("\nmost confused")
    for pair in summary["most_confused"]:
        print(f"{pair['class']} taken for {pair['taken_for']}: {pair['images']}")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Evaluate a checkpoint of train.py.")
    parser.add_argument("checkpoint", type=Path, help="a best.pt or last.pt")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="default: test")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"default: where the training found CIFAR-10, else {DEFAULT_DATA_DIR}",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="default: the one the checkpoint was trained in",
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=(1, 10),
        default=1,
        help="10: also the mean over four corners, centre, and their horizontal flips; default: 1",
    )
    parser.add_argument(
        "--figures", action="store_true", help="draw more than the confusion matrix"
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all results to FILE"
    )
    return parser.parse_args()


def save_beside(args: argparse.Namespace, drawn: dict[str, figures.Figure]) -> None:
    """Writes pictures beside the checkpoint: best-confusion-test.png beside best.pt."""
    for name, figure in drawn.items():
        path = args.checkpoint.with_name(f"{args.checkpoint.stem}-{name}-{args.split}.png")
        figures.save_figure(figure, path)
        print(f"wrote {path}")


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    device = select_device(args.device)
    network, preprocessing, checkpoint = load_network(args.checkpoint)
    if not os.access(args.checkpoint.parent, os.W_OK):
        raise UserError(
            f"{args.checkpoint.parent} is not writable, and the pictures go there; copy the "
            "checkpoint to a folder of your own"
        )
    training = checkpoint["training"]
    precision = select_precision(args.precision or training["precision"], device)
    if args.split == "val" and training.get("train_split") == "full":
        raise UserError(f"{args.checkpoint} was trained on the validation images; use --split test")
    dataset = load_dataset(training["dataset"], args.data_dir or data_dir_of(training))
    if dataset.classes != checkpoint["classes"]:
        raise UserError(
            f"{args.checkpoint} has other classes than {training['dataset']}; use another"
        )
    split = getattr(dataset, args.split).to(device)

    network.to(device)
    logits = predict(network, split.images, preprocessing, precision)
    summary = summarise(logits, split, checkpoint["classes"])
    ten = None
    if args.views == 10:
        ten_logits = predict_ten_views(network, split.images, preprocessing, precision)
        ten = summarise(ten_logits, split, checkpoint["classes"])

    if args.json:
        record = {
            "checkpoint": str(args.checkpoint),
            "dataset": training["dataset"],
            "split": args.split,
            "epoch": checkpoint["epoch"],
            "precision": precision,
            **summary,
            **({"ten_views": ten} if ten else {}),
            "training": training,
            "environment": environment(device),
        }
        write_json(args.json, record)

    name = f"{DATASETS[training['dataset']]}, {args.split} split"
    print(f"{args.checkpoint}: AlexNet, {checkpoint['epoch']} of {training['epochs']} epochs")
    view = "the whole image" if preprocessing.enlarged_size == IMAGE_SIZE else "the centre crop"
    print(
        f"{name}, {summary['images']:,} images, one view is {view}, "
        f"{precision} on {device_name(device)}\n"
    )
    if ten:
        print_views(summary, ten)
    else:
        print_summary(summary)
    print_classes(summary)

    matrix = np.array(summary["confusion_matrix"])
    title = f"{name}: {summary['accuracy']:.1%} top-1"
    confusion = figures.confusion_matrix(matrix, checkpoint["classes"], title)
    print()
    save_beside(args, {"confusion": confusion})
    if args.figures:
        first = first_network(checkpoint)
        drawn = draw_figures(
            network, preprocessing, precision, dataset, split, logits, summary, first
        )
        save_beside(args, drawn)


if __name__ == "__main__":
    run_script(main)
