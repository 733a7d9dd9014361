"""Says what is in pictures: python predict.py runs/cifar10-sgd/best.pt photo.jpg folder

From Python, in this folder:

    import torch
    from predict import Classifier, read_picture

    classifier = Classifier.from_checkpoint("runs/cifar10-sgd/best.pt")
    images = torch.stack([read_picture("photo.jpg")])
    classifier.probabilities(images)  # uint8 [N, 3, 32, 32] to [N, 10]
"""

import argparse
import io
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import figures
from checkpoint import load_network
from dataset import Preprocessing
from evaluate import predict, top_classes
from model import AlexNet
from utils import (
    PRECISIONS,
    OneLineParser,
    UserError,
    first_line,
    is_out_of_memory,
    keep_freed_memory,
    output_file,
    positive_int,
    run_script,
    select_device,
    select_precision,
    write_json,
)

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MOST_PIXELS = 2**26  # of a picture; larger ones are refused before they are unpacked
SIZE = 32  # pixels; what the network was trained on, and enlarged from
STDIN = "-"
SHOWN = 12  # pictures in a figure


@dataclass
class Classifier:
    """A trained network with all it takes to use it.

    network: in eval mode, on its device.
    classes: the names of its outputs, in order.
    preprocessing: how pixels become its input.
    precision: "fp32" or "bf16".
    """

    network: AlexNet
    classes: list[str]
    preprocessing: Preprocessing
    precision: str

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "auto", precision: str | None = None
    ) -> "Classifier":
        """The classifier in a checkpoint of train.py; precision is by default the training's.

        Raises UserError if the file is no such checkpoint, or the device cannot be used.
        """
        place = select_device(device)
        network, preprocessing, checkpoint = load_network(path)
        precision = select_precision(precision or checkpoint["training"]["precision"], place)
        return cls(network.to(place), checkpoint["classes"], preprocessing, precision)

    def probabilities(self, images: Tensor) -> Tensor:
        """Of each class, float32 [N, classes] on the CPU, for uint8 images [N, 3, 32, 32].

        Raises ValueError for another size, which the network was not trained on: read_picture()
        reduces a picture.
        """
        is_tensor = isinstance(images, Tensor)
        if not is_tensor or images.shape[1:] != (3, SIZE, SIZE) or images.dtype != torch.uint8:
            found = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
            raise ValueError(
                f"Classifier expects uint8 images of shape [N, 3, {SIZE}, {SIZE}], got {found}; "
                "torch.stack([read_picture(file)]) makes them of a file"
            )
        device = self.network.conv1.weight.device
        logits = predict(self.network, images.to(device), self.preprocessing, self.precision)
        return logits.softmax(1).cpu()


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def read_picture(source: str | Path) -> Tensor:
    """A JPEG, PNG or WebP file, or standard input for "-", as uint8 [3, 32, 32].

    The largest square in its middle, upright, in RGB, on white where it is transparent, averaged
    down to the size of CIFAR-10's images. Raises UserError if it is no such picture.
    """
    try:
        if Path(source).exists() and not Path(source).is_file():
            raise ValueError("not a regular file")  # a pipe could be endless
        file = io.BytesIO(sys.stdin.buffer.read()) if source == STDIN else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not used
            with Image.open(file, formats=FORMATS) as picture:
                return _to_tensor(picture)
    except FileNotFoundError:
        raise UserError(f"{source} does not exist") from None
    except Exception as error:  # Pillow raises many types on a damaged file
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise UserError(f"{source} is no JPEG, PNG or WebP picture ({reason:.200})") from None


def _to_tensor(picture: Image.Image) -> Tensor:
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(f"it has more than {MOST_PIXELS:,} pixels")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, of which RGB keeps 8
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = ImageOps.fit(picture.convert("RGB"), (SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def list_pictures(names: list[str]) -> list[str]:
    """The names given, and for a folder the pictures in it, by name."""
    pictures = []
    for name in names:
        folder = Path(name)
        if name == STDIN or not folder.is_dir():
            pictures.append(name)
            continue
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"the folder {name} has no file that ends in {', '.join(SUFFIXES)}")
        pictures += map(str, found)
    return pictures


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Say what is on pictures.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a best.pt or last.pt of train.py")
    add("pictures", nargs="+", metavar="picture", help="a file, a folder, or - for a pipe")
    add("--top", type=positive_int, default=3, metavar="N", help="classes to name; default: 3")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, help="default: the one the checkpoint was trained in")
    add("--json", type=output_file, metavar="FILE", help="write all probabilities to FILE")
    add("--figure", type=output_file, metavar="FILE", help=f"draw the first {SHOWN}")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    keep_freed_memory()
    classifier = Classifier.from_checkpoint(args.checkpoint, args.device, args.precision)
    wanted = list_pictures(args.pictures)
    names, pictures = [], []
    for name in wanted:
        try:
            pictures.append(read_picture(name))
            names.append(name)
        except UserError as error:
            print(f"predict.py: skipped: {error}", file=sys.stderr)
    results = []
    if pictures:
        probabilities = classifier.probabilities(torch.stack(pictures))
        classes = classifier.classes
        results = [top_classes(row, classes, len(classes)) for row in probabilities]
    if args.json:
        content = [{"picture": n, "likeliest": r} for n, r in zip(names, results, strict=True)]
        write_json(args.json, content)
    if args.figure and pictures:
        captions = [Path(name).name for name in names[:SHOWN]]
        figure = figures.likeliest(pictures[:SHOWN], captions, results[:SHOWN])
        figures.save_figure(figure, args.figure)
    for name, result in zip(names, results, strict=True):  # last: head may stop it
        words = [f"{item['class']} {item['probability']:.1%}" for item in result[: args.top]]
        print(f"{name}: {', '.join(words)}")
    return 0 if len(names) == len(wanted) else 1


if __name__ == "__main__":
    run_script(main)
