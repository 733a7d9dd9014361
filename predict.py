"""Classify images: python predict.py runs/cifar10-sgd/best.pt photo.jpg folder

From Python, in this folder:

    from predict import Classifier

    classifier = Classifier.from_checkpoint("runs/cifar10-sgd/best.pt")
    classifier("photo.jpg")  # [{"class": "cat", "probability": 0.93}, ...]
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import figures
from checkpoint import load_network
from model import AlexNet
from pictures import STDIN, list_pictures, read_image, to_tensor
from transforms import Preprocessing, eval_batches, ten_crop_maps
from utils import (
    OneLineParser,
    UserError,
    add_device_options,
    autocast,
    keep_freed_memory,
    output_file,
    positive_int,
    run_script,
    select_device,
    select_precision,
    to_device,
    user_file,
    write_json,
)

MAX_BATCH_SIZE = 256
FIGURE_IMAGES = 12


@dataclass
class Classifier:
    """A trained network with all it takes to use it.

    network: on its device; in eval mode once it was used.
    classes: the names of its outputs, in order.
    preprocessing: how pixels become its input.
    precision: "fp32", "fp16" or "bf16".
    batch_size: how many images it sees at a time.
    quiet: no progress bar, which a terminal shows otherwise.
    """

    network: AlexNet
    classes: list[str]
    preprocessing: Preprocessing
    precision: str
    batch_size: int = MAX_BATCH_SIZE
    quiet: bool = False

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "auto", precision: str = "auto"
    ) -> "Classifier":
        """Return the classifier in a checkpoint of train.py.

        Raises UserError if the file is no such checkpoint, or the device cannot be used.
        """
        target = select_device(device)
        network, preprocessing, checkpoint = load_network(path)
        precision = select_precision(precision, target)
        return cls(to_device(network, target), checkpoint["classes"], preprocessing, precision)

    def __call__(self, images, top: int = 3) -> list:
        """Return the most probable classes of a picture, or of each picture in a list.

        A picture is a file's name, a PIL image, or uint8 as an array [H, W, 3] or [H, W] or as a
        tensor [3, H, W]. Its largest square in the middle is seen. The answer has for each class
        a dictionary with class and probability (0..1), the highest first.

        Raises UserError for a file that is no picture, TypeError or ValueError for other objects.
        """
        is_list = isinstance(images, list | tuple)
        pictures = list(images) if is_list else [images]
        size = self.preprocessing.image_size
        tensors = [as_tensor(picture, size) for picture in pictures]
        if not tensors:
            return []
        probabilities = self.probabilities(torch.stack(tensors))
        results = [top_predictions(row, self.classes, top) for row in probabilities]
        return results if is_list else results[0]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return each class's probability, float32 [N, classes] on the CPU.

        Takes uint8 images [N, 3, S, S] of the size that the network was trained on, 32 for CIFAR.
        Raises ValueError for others.
        """
        size, is_tensor = self.preprocessing.image_size, isinstance(images, Tensor)
        if not is_tensor or images.shape[1:] != (3, size, size) or images.dtype != torch.uint8:
            found = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
            raise ValueError(
                f"expected uint8 images of shape [N, 3, {size}, {size}], got {found}; for files, "
                'call classifier("photo.jpg")'
            )
        return self.logits(images).softmax(1).cpu()

    def logits(self, images: Tensor, view: Tensor | None = None) -> Tensor:
        """Return logits, float32 [N, classes] on the network's device, of uint8 [N, 3, H, W].

        view is the map [2, 3] through which all are seen, by default the preprocessing's.
        """
        return self._in_batches(self.network, images, view)

    def ten_view_logits(self, images: Tensor) -> Tensor:
        """Return the logarithm of the mean softmax over the paper's ten views (§4.1), [N, classes].

        Takes what logits() takes.
        """
        logits = torch.stack([self.logits(images, view) for view in ten_crop_maps()])
        return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))

    def embed(self, images: Tensor) -> Tensor:
        """Return the activations of fc7, float32 [N, 4096]; takes what logits() takes."""
        return self._in_batches(self.network.embed, images)

    @torch.no_grad()
    def _in_batches(
        self, function: Callable[[Tensor], Tensor], images: Tensor, view: Tensor | None = None
    ) -> Tensor:
        self.network.eval()
        device = next(self.network.parameters()).device
        batches = eval_batches(images, self.preprocessing, self.batch_size, view, device)
        total = math.ceil(len(images) / self.batch_size)
        disable = True if self.quiet else None  # None: shown on a terminal
        results = []
        for batch in tqdm(batches, "evaluating", total, leave=False, unit="batch", disable=disable):
            with autocast(device, self.precision):
                results.append(function(batch).float())
        return torch.cat(results)


def as_tensor(picture, size: int) -> Tensor:
    """Return what Classifier takes for a picture as uint8 [3, size, size]."""
    if isinstance(picture, str | Path):
        return read_image(picture, size)
    if isinstance(picture, Tensor):
        if picture.shape == (3, size, size) and picture.dtype == torch.uint8:
            return picture.cpu()
        picture = picture.movedim(0, -1).cpu().numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise TypeError(f"a picture has uint8 values from 0 to 255, got {picture.dtype}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"a picture is a file, PIL image, array or tensor, got {type(picture)}")
    return to_tensor(picture, size)


def eval_batch_size(batch_size: int) -> int:
    """Return the batch size to evaluate with after a training with this one.

    What fitted into memory with gradients fits without.
    """
    return min(batch_size, MAX_BATCH_SIZE)


def top_predictions(probabilities: Tensor, classes: list[str], count: int) -> list[dict]:
    """Return the most probable classes with their probabilities (0..1), the highest first."""
    values, indices = probabilities.topk(min(count, len(classes)))
    return [
        {"class": classes[index], "probability": value}
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]


# --- Files ---


def list_images(name: str) -> list[str]:
    """Return the name of a file, or for a folder the pictures in it and its subfolders.

    Raises UserError if there are none.
    """
    folder = Path(name)
    with user_file("read", folder):
        if name == STDIN or not folder.is_dir():
            return [name]
        found = list_pictures(folder)
    if not found:
        raise UserError(f"the folder {name} has no pictures")
    return list(map(str, found))


# --- The script ---


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Classify images.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a best.pt or last.pt of train.py")
    add("images", nargs="+", metavar="image", help="a file, a folder, or - for standard input")
    add("--top", type=positive_int, default=3, metavar="N", help="classes to name; default: 3")
    add_device_options(parser)
    add("--json", type=output_file, metavar="FILE", help="write all probabilities to FILE")
    what = f"draw the first {FIGURE_IMAGES} to FILE"
    add("--figure", type=output_file, metavar="FILE", help=what)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    classifier = Classifier.from_checkpoint(args.checkpoint, args.device, args.precision)
    size = classifier.preprocessing.image_size
    names, images, exit_code = [], [], 0
    for argument in args.images:
        try:
            found = list_images(argument)
        except UserError as error:
            found, exit_code = [], _skip(error)
        for name in found:
            try:
                images.append(read_image(name, size))
                names.append(name)
            except UserError as error:
                exit_code = _skip(error)
    results = classifier(images, top=len(classifier.classes))
    if args.json:
        content = [{"image": n, "predictions": r} for n, r in zip(names, results, strict=True)]
        write_json(args.json, content)
    if args.figure and images:
        captions = [Path(name).name for name in names[:FIGURE_IMAGES]]
        first = slice(FIGURE_IMAGES)
        figures.save_figure(
            figures.predictions(images[first], captions, results[first]), args.figure
        )
    for name, result in zip(names, results, strict=True):  # last: head may stop it
        words = [f"{item['class']} {item['probability']:.1%}" for item in result[: args.top]]
        print(f"{name}: {', '.join(words)}")
    return exit_code


def _skip(error: UserError) -> int:
    print(f"predict.py: skipped: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run_script(main)
