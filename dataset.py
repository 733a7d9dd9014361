"""Where images come from: CIFAR-10 and the built-in shapes, as uint8 images in three splits.

    dataset = load_dataset("cifar10")
    dataset.train.images  # uint8 [45000, 3, 32, 32]
    dataset.train.labels  # int64 [45000]

transforms.py turns them into the network's input.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from utils import UserError, user_file

DATASETS = {"cifar10": "CIFAR-10", "shapes": "shapes"}  # names for options and for people
DEFAULT_DATA_DIR = "data"
VALIDATION_IMAGES_PER_CLASS = 500
NETWORK_TIMEOUT = 30.0  # seconds; without it a silent network would hang
# Not a run's seed: every run has the same validation images and the same shapes.
DATA_SEED = 2012


class Split(NamedTuple):
    """Images uint8 [N, 3, H, W] and their classes int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        """Return the split on that device."""
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, index: Tensor) -> "Split":
        """Return the images at these indices, int64 [n], or where a mask, bool [N], is true."""
        return Split(self.images[index], self.labels[index])

    def joined_with(self, other: "Split") -> "Split":
        """Return all images of this split, then all of the other."""
        return Split(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass
class Dataset:
    """The three splits of a data set and the names of its classes."""

    classes: list[str]
    train: Split
    val: Split
    test: Split


def load_dataset(name: str, data_dir: str | Path = DEFAULT_DATA_DIR) -> Dataset:
    """Load "cifar10" (downloaded if need be) or draw "shapes", on the CPU.

    Raises UserError if CIFAR-10 cannot be had or a file of it is damaged, ValueError for another
    name.
    """
    if name == "cifar10":
        return load_cifar10(Path(data_dir))
    if name == "shapes":
        return draw_shapes()
    raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")


def stratified_split(split: Split, held_out_per_class: int) -> tuple[Split, Split]:
    """Hold out images of each class, the same ones at every call.

    Returns what is left and what was held out, each in the split's order.
    """
    # RandomState's stream is frozen: the split is the same under every NumPy.
    random = np.random.RandomState(DATA_SEED)
    labels = split.labels.numpy()
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[random.permutation(members)[:held_out_per_class]] = True
    return split.select(torch.from_numpy(~held_out)), split.select(torch.from_numpy(held_out))


def stratified_subset(split: Split, size: int) -> Split:
    """Return size images of a split, as many of each class, the same ones at every call.

    Raises UserError if the split does not have that many, or size is no multiple of its classes.
    """
    counts = split.labels.bincount()
    per_class, rest = divmod(size, len(counts))
    if rest or not 0 < per_class <= counts.min():
        raise UserError(
            f"--train-images {size} is not a multiple of {len(counts)} from {len(counts)} to "
            f"{counts.min() * len(counts)}: the same number of images of each class"
        )
    return stratified_split(split, per_class)[1]


# --- CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) ---


class _CheckedCIFAR10(CIFAR10):
    """CIFAR10 without torchvision's own check, which would hash all files for each split."""

    def _check_integrity(self) -> bool:
        return True


def load_cifar10(data_dir: Path) -> Dataset:
    """Return CIFAR-10 in data_dir: 45,000 training, 5,000 validation and 10,000 test images.

    Looks for the folder cifar-10-batches-py, then for the archive cifar-10-python.tar.gz, then
    downloads. Every file's MD5 is checked before it is opened.

    Raises UserError, naming the file, if one is damaged, or if there is no way to the data.
    """
    _check_data_dir(data_dir)
    if not _has_cifar10(data_dir):
        _fetch_cifar10(data_dir)
    train = _CheckedCIFAR10(data_dir, train=True)
    rest, val = stratified_split(_to_split(train), VALIDATION_IMAGES_PER_CLASS)
    test = _to_split(_CheckedCIFAR10(data_dir, train=False))
    return Dataset(list(train.classes), rest, val, test)


def find_data_dir(settings: dict) -> Path:
    """Return the folder where a run had CIFAR-10, if it is still there, else the default one."""
    folder = Path(str(settings.get("data_dir", DEFAULT_DATA_DIR)))
    files = [folder / CIFAR10.base_folder / name for name in _checksums()]
    # Unlike Path.is_file(), this raises nothing for a folder that is closed to this user.
    return folder if all(map(os.path.isfile, files)) else Path(DEFAULT_DATA_DIR)


def _to_split(cifar: CIFAR10) -> Split:
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(cifar.targets))


def _check_data_dir(data_dir: Path) -> None:
    if data_dir == Path(DEFAULT_DATA_DIR):
        with user_file("make the folder", data_dir):
            data_dir.mkdir(exist_ok=True)
    with user_file("read", data_dir):
        if not data_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} is not a folder; make it or name another")
        folder = data_dir.resolve()
        is_inner = not (folder / CIFAR10.base_folder).exists()
    if folder.name == CIFAR10.base_folder and is_inner:
        raise UserError(
            f"--data-dir {data_dir} is the data's own folder; name the one that it is in: "
            f"{folder.parent}"
        )


def _checksums() -> dict[str, str]:
    """Return the MD5 of each file of CIFAR-10, by name."""
    meta = {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    return {**dict(CIFAR10.train_list + CIFAR10.test_list), **meta}


def _has_cifar10(data_dir: Path) -> bool:
    """Return whether every file is there and intact. Raises UserError for a damaged one."""
    complete = True
    for name, md5 in _checksums().items():
        path = data_dir / CIFAR10.base_folder / name
        with user_file("read", path):
            exists = path.exists()
        if exists:
            _check_md5(path, md5)
        else:
            complete = False
    return complete


def _check_md5(path: Path, md5: str) -> None:
    with user_file("read", path):
        if not check_integrity(path, md5):
            raise UserError(f"{path} is damaged (its MD5 is not {md5}); delete it and run again")


def _fetch_cifar10(data_dir: Path) -> None:
    """Unpack the archive in data_dir, or else a downloaded one, and put the files in place."""
    archive = data_dir / CIFAR10.filename
    if archive.exists():
        _check_md5(archive, CIFAR10.tgz_md5)
    if not os.access(data_dir, os.W_OK):
        raise UserError(
            f"{data_dir} is not writable, and not all of {CIFAR10.base_folder} is in it; unpack "
            f"{CIFAR10.filename} elsewhere, and name that folder with --data-dir"
        )
    # Unpacked aside, so that an interruption leaves nothing that looks like the data.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpacking-") as aside:
        try:
            if archive.exists():
                extract_archive(str(archive), aside)
            else:
                _download_cifar10(aside)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"CIFAR-10 is not in {data_dir}, and fetching it from {CIFAR10.url} failed "
                f"({error}). Copy {CIFAR10.filename} into {data_dir}, or name the folder that "
                "holds it with --data-dir, or try --dataset shapes, which needs no download"
            ) from error
        folder = data_dir / CIFAR10.base_folder
        with user_file("write to", folder):
            folder.mkdir(exist_ok=True)
            for file in (Path(aside) / CIFAR10.base_folder).iterdir():
                file.replace(folder / file.name)


def _download_cifar10(folder: str) -> None:
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        CIFAR10(folder, download=True)
    finally:
        socket.setdefaulttimeout(None)


# --- Shapes: ten classes drawn by this program ---

# How deep inside the shape the point x, y lies (outside: below 0), at the distance r from the
# center. The unit is the shape's radius.
SHAPES = {
    "disc": lambda x, y, r: 0.75 - r,
    "ring": lambda x, y, r: 0.2 - abs(r - 0.75),
    "triangle": lambda x, y, r: 0.5 - np.maximum(y, abs(x) * 3**0.5 / 2 - y / 2),
    "cross": lambda x, y, r: np.minimum(
        0.25 - np.minimum(abs(x), abs(y)), 1 - np.maximum(abs(x), abs(y))
    ),
    "stripes": lambda x, y, r: np.sin(9 * x) / 9,
    "checkerboard": lambda x, y, r: np.sin(4 * x) * np.sin(4 * y) / 4,
    "dots": lambda x, y, r: (np.cos(8 * x) + np.cos(8 * y) - 0.8) / 8,
    "target": lambda x, y, r: np.sin(10 * r) / 10,
    "rays": lambda x, y, r: np.sin(8 * np.arctan2(y, x)) * r / 8,
    "ramp": lambda x, y, r: x / 16,
}
SHAPES_PER_CLASS = {"train": 150, "val": 50, "test": 100}


def draw_shapes() -> Dataset:
    """Draw ten classes of 32x32 images: 1,500 for training, 500 for validation, 1,000 for test."""
    splits = {
        name: _draw_split(count, np.random.RandomState(DATA_SEED + number))
        for number, (name, count) in enumerate(SHAPES_PER_CLASS.items())
    }
    return Dataset(list(SHAPES), **splits)


def _draw_split(per_class: int, random: np.random.RandomState) -> Split:
    labels = np.arange(per_class * len(SHAPES), dtype=np.int64) % len(SHAPES)
    n = len(labels)
    foreground = random.uniform(0.6, 1, (n, 3, 1, 1))  # a light and a dark color for each image
    background = random.uniform(0, 0.4, (n, 3, 1, 1))
    coverage = np.empty((n, 32, 32))
    x, y = _random_coordinates(n, random)
    for label, depth in enumerate(SHAPES.values()):
        chosen = labels == label
        inside = depth(x[chosen], y[chosen], np.hypot(x[chosen], y[chosen]))
        coverage[chosen] = np.clip(0.5 + 8 * inside, 0, 1)  # soft edges
    image = background + coverage[:, None] * (foreground - background)
    noise = random.normal(0, random.uniform(0, 0.08, (n, 1, 1, 1)), image.shape)
    images = np.clip((image + noise) * 255, 0, 255).astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _random_coordinates(n: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each pixel, [n, 32, 32], in the frame of a shape that is moved and turned.

    The unit is the shape's radius.
    """
    radius = random.uniform(9, 14, (n, 1, 1))  # pixels
    center_x, center_y = 15.5 + random.uniform(-1, 1, (2, n, 1, 1)) * (15 - radius)
    angle = random.uniform(0, 2 * np.pi, (n, 1, 1))
    row, column = np.mgrid[:32, :32]
    dx, dy = (column - center_x) / radius, (row - center_y) / radius
    return dx * np.cos(angle) - dy * np.sin(angle), dx * np.sin(angle) + dy * np.cos(angle)
