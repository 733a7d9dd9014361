"""Classify images: python predict.py runs/cifar10-sgd/best.pt photo.jpg folder

From Python, in this folder:

    import torch
    from predict import Classifier, read_image

    classifier = Classifier.from_checkpoint("runs/cifar10-sgd/best.pt")
    images = torch.stack([read_image("photo.jpg")])
    classifier.probabilities(images)  # uint8 [N, 3, 32, 32] to [N, 10]
"""

import argparse
import io
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import figures
from checkpoint import load_network
from model import AlexNet
from transforms import Preprocessing, eval_batches, ten_crop_maps
from utils import (
    OneLineParser,
    UserError,
    add_device_options,
    autocast,
    is_out_of_memory,
    keep_freed_memory,
    output_file,
    positive_int,
    run_script,
    select_device,
    select_precision,
    summarize_error,
    to_device,
    user_file,
    write_json,
)

MAX_BATCH_SIZE = 256
FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 2**26  # of an image; larger ones are refused before they are unpacked
SIZE = 32  # pixels; what the network was trained on, and enlarged from
STDIN = "-"
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

    def probabilities(self, images: Tensor) -> Tensor:
        """Return each class's probability, float32 [N, classes] on the CPU.

        Takes uint8 images [N, 3, 32, 32], as read_image() makes them. Raises ValueError for
        others: the network was trained on that size.
        """
        is_tensor = isinstance(images, Tensor)
        if not is_tensor or images.shape[1:] != (3, SIZE, SIZE) or images.dtype != torch.uint8:
            found = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
            raise ValueError(
                f"Classifier expects uint8 images of shape [N, 3, {SIZE}, {SIZE}], got {found}; "
                "torch.stack([read_image(file)]) makes them of a file"
            )
        device = next(self.network.parameters()).device
        return self.logits(images.to(device)).softmax(1).cpu()

    def logits(self, images: Tensor, view: Tensor | None = None) -> Tensor:
        """Return logits, float32 [N, classes], of uint8 images [N, 3, H, W] on the device.

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
        batches = eval_batches(images, self.preprocessing, self.batch_size, view)
        total = math.ceil(len(images) / self.batch_size)
        disable = True if self.quiet else None  # None: shown on a terminal
        results = []
        for batch in tqdm(batches, "evaluating", total, leave=False, unit="batch", disable=disable):
            with autocast(images.device, self.precision):
                results.append(function(batch).float())
        return torch.cat(results)


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


# --- Images ---


def read_image(source: str | Path) -> Tensor:
    """Read a JPEG, PNG or WebP file, or standard input for "-", as uint8 [3, 32, 32].

    The largest square in its middle, upright, in RGB, on white where it is transparent, averaged
    down to the size of CIFAR-10's images. Raises UserError if it is no such image.
    """
    try:
        with user_file("read", source), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not used
            if source != STDIN and Path(source).exists() and not Path(source).is_file():
                raise ValueError("not a regular file")  # a pipe could be endless
            file = io.BytesIO(sys.stdin.buffer.read()) if source == STDIN else source
            try:
                with Image.open(file, formats=FORMATS) as image:
                    return _to_tensor(image)
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:  # Pillow's for a damaged file
                raise ValueError(summarize_error(error)) from error
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types on a damaged file
        if is_out_of_memory(error):
            raise
        reason = summarize_error(error)
        raise UserError(f"{source} is no JPEG, PNG or WebP image ({reason:.200})") from error


def _to_tensor(image: Image.Image) -> Tensor:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has more than {MAX_PIXELS:,} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of gray, of which RGB keeps 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def list_images(name: str) -> list[str]:
    """Return the name of a file, or for a folder the images in it and its subfolders, by name.

    Raises UserError if there are none.
    """
    folder = Path(name)
    with user_file("read", folder):
        if name == STDIN or not folder.is_dir():
            return [name]
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"the folder {name} has no file that ends in {', '.join(SUFFIXES)}")
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
    names, images, exit_code = [], [], 0
    for argument in args.images:
        try:
            found = list_images(argument)
        except UserError as error:
            found, exit_code = [], _skip(error)
        for name in found:
            try:
                images.append(read_image(name))
                names.append(name)
            except UserError as error:
                exit_code = _skip(error)
    results = []
    if images:
        probabilities = classifier.probabilities(torch.stack(images))
        classes = classifier.classes
        results = [top_predictions(row, classes, len(classes)) for row in probabilities]
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
