"""Where images come from: CIFAR, a folder of pictures or the built-in shapes, in three splits.

    dataset = load_dataset("cifar10")
    dataset.train.images  # uint8 [45000, 3, 32, 32]
    dataset.train.labels  # int64 [45000]

transforms.py turns them into the network's input.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar import DEFAULT_DATA_DIR, KINDS, find_data_dir, load_cifar
from pictures import SPLITS, choose_classes, common_size, decode, find_pictures
from utils import UserError, log

# Names for options and for people.
DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "folder": "a folder of pictures",
    "shapes": "shapes",
}
HELD_OUT = 0.1  # part of each class that is held out for a split which a data set lacks
# Not a run's seed: every run has the same validation images and the same shapes.
DATA_SEED = 2012


class Split(NamedTuple):
    """Images uint8 [N, 3, H, W] and their classes int64 [N].

    Both on one device, but for images that are too many for a GPU: they remain on the CPU.
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        """Return the split on that device, without images that would take half of a GPU's rest."""
        images = self.images
        if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
        return Split(images, self.labels.to(device))

    def select(self, index: Tensor) -> "Split":
        """Return the images at these indices, int64 [n], or where a mask, bool [N], is true."""
        return Split(self.images[index.to(self.images.device)], self.labels[index])

    def joined_with(self, other: "Split") -> "Split":
        """Return all images of this split, then all of the other."""
        return Split(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass
class Dataset:
    """The three splits of a data set and the names of its classes.

    names: for each split that comes from files those of its images, in order.
    """

    classes: list[str]
    train: Split
    val: Split
    test: Split
    names: dict[str, list[str]] = field(default_factory=dict)

    def only(self, classes: list[str] | None) -> "Dataset":
        """Return the data set with these classes alone, numbered in this order."""
        classes = choose_classes(classes, self.classes, "the data set")
        if classes == self.classes:
            return self
        numbers = torch.full((len(self.classes),), -1)
        numbers[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))
        splits = []
        for split in (self.train, self.val, self.test):
            labels = numbers[split.labels]
            splits.append(Split(split.images, labels).select(labels >= 0))
        return Dataset(classes, *splits)


def load_dataset(
    name: str,
    data_dir: str | Path = DEFAULT_DATA_DIR,
    classes: list[str] | None = None,
    quiet: bool = False,
) -> Dataset:
    """Load "cifar10" or "cifar100" (downloaded if need be), "folder", or draw "shapes", on the CPU.

    classes: only these, by default all. quiet: a folder of pictures is read without a word.

    Raises UserError if the data cannot be had or is damaged, ValueError for another name.
    """
    if name == "folder":
        return load_folder(Path(data_dir), classes, quiet=quiet)
    if name == "shapes":
        return draw_shapes().only(classes)
    if name not in KINDS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    all_classes, train, test = load_cifar(name, Path(data_dir))
    train, held_out = Split(*train), held_out_mask(train[1])
    dataset = Dataset(all_classes, train.select(~held_out), train.select(held_out), Split(*test))
    return dataset.only(classes)


def load_folder(
    folder: Path,
    classes: list[str] | None = None,
    size: int | None = None,
    wanted: tuple[str, ...] = SPLITS,
    all_for_test: bool = False,
    quiet: bool = False,
) -> Dataset:
    """Load pictures from FOLDER/train/CLASS, FOLDER/val/CLASS, FOLDER/test/CLASS or FOLDER/CLASS.

    A split that is missing is held out from the training pictures, the same ones as long as the
    folder has the same files.

    Args:
        classes: only these, in this order; by default all.
        size: side of the images in pixels; by default common_size().
        wanted: the splits to read; the others are empty.
        all_for_test: if the folder has no splits, all its pictures are test images.
        quiet: nothing is printed.
    """
    all_classes, files = find_pictures(folder)
    classes = choose_classes(classes, all_classes, str(folder))
    if "all" in files:
        files = {"test" if all_for_test else "train": files["all"]}
    size = size or common_size([path for pairs in files.values() for path, _ in pairs])
    held_out = [name for name in ("test", "val") if name not in files and "train" in files]
    if held_out:
        labels = torch.tensor([label for _, label in files["train"]])
        counts = labels.bincount()
    for name in held_out:
        mask = held_out_mask(torch.tensor([label for _, label in files["train"]]), counts)
        pairs = list(zip(files["train"], mask.tolist(), strict=True))
        files[name] = [pair for pair, is_chosen in pairs if is_chosen]
        files["train"] = [pair for pair, is_chosen in pairs if not is_chosen]
    splits, names, told = {}, {}, []
    for name, purpose in (("train", "training"), ("val", "validation"), ("test", "test")):
        chosen = [
            (path, classes.index(all_classes[label]))
            for path, label in (files.get(name, []) if name in wanted else [])
            if all_classes[label] in classes
        ]
        images, labels, names[name] = decode(chosen, size, quiet)
        splits[name] = Split(images, labels)
        if name in wanted and name in files:
            for label, count in enumerate(labels.bincount(minlength=len(classes)).tolist()):
                if not count:
                    raise UserError(
                        f"{folder}: too few pictures of the class {classes[label]} for "
                        f"{purpose}; there should be {1 + len(held_out)} at least"
                    )
            note = " (held out)" if name in held_out else ""
            told.append(f"{len(labels):,} for {purpose}{note}")
    if not quiet:
        log(f"{folder}: {len(classes)} classes, {size}x{size} pixels: {', '.join(told)}")
    return Dataset(classes, **splits, names=names)


def fingerprints(images: Tensor) -> Tensor:
    """Return a number for each uint8 image [N, 3, H, W], int64 [N]: others have another number."""
    hashes = [hashlib.blake2b(bytes(image.numpy()), digest_size=8).digest() for image in images]
    return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64)


def held_out_mask(labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return bool [N], true for a tenth of each class, the same images at every call.

    counts: how many images each class has, if labels are not all of them.
    """
    counts = labels.bincount() if counts is None else counts
    return _stratified_mask(labels, [max(1, round(HELD_OUT * count)) for count in counts.tolist()])


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
    return split.select(_stratified_mask(split.labels, [per_class] * len(counts)))


def _stratified_mask(labels: Tensor, chosen: list[int]) -> Tensor:
    """Return bool [N], true for so many images of each class."""
    # RandomState's stream is frozen: the choice is the same under every NumPy.
    random = np.random.RandomState(DATA_SEED)
    mask = np.zeros(len(labels), dtype=bool)
    for label, count in enumerate(chosen):
        members = np.flatnonzero(labels.numpy() == label)
        mask[random.permutation(members)[:count]] = True
    return torch.from_numpy(mask)


def data_dir_of(settings: dict) -> Path:
    """Return the folder of a run's data; for CIFAR, if it is gone, the one to download to."""
    name, data_dir = settings["dataset"], str(settings.get("data_dir", DEFAULT_DATA_DIR))
    return find_data_dir(name, data_dir) if name in KINDS else Path(data_dir)


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
