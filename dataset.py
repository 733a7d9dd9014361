"""From files to a batch on the device: CIFAR-10, the built-in shapes, splits, augmentation, resize.

Images stay small and whole until the last moment: uint8 [N, 3, 32, 32] on the device. A batch is
an index into them, normalised, and resampled once to 227x227; that one resampling is the resize and
the augmentation.
"""

import functools
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from model import IMAGE_SIZE, kernels_for
from utils import UserError

DATASETS = {"cifar10": "CIFAR-10", "shapes": "shapes"}  # names for options and for people
DEFAULT_DATA_DIR = "data"
VALIDATION_IMAGES_PER_CLASS = 500
INPUTS = ("standardised", "centred")
ENLARGED_SIZE = 256  # of the picture that the paper's crops are cut from (§2, §4.1)
NETWORK_TIMEOUT = 30.0  # seconds; without it a silent network would hang
# Not a run's seed: every run has the same validation images and the same shapes.
DATA_SEED = 2012


class Split(NamedTuple):
    """Images uint8 [N, 3, 32, 32] and their classes int64 [N], on one device."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        """The split on that device."""
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, index: Tensor) -> "Split":
        """The images at these places, int64 [n], or where a mask, bool [N], is true."""
        return Split(self.images[index], self.labels[index])

    def joined_with(self, other: "Split") -> "Split":
        """All images of this split, then all of the other."""
        return Split(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass
class Dataset:
    """The three splits of a data set and the names of its classes."""

    classes: list[str]
    train: Split
    val: Split
    test: Split


@dataclass
class Preprocessing:
    """What turns uint8 images into the network's input.

    mean, std: per channel, in 0..255; the one is subtracted, the result divided by the other.
    size: side of the input in pixels.
    enlarged_size: side that the whole image is enlarged to, of which the input is the middle part.
    """

    mean: list[float]
    std: list[float]
    size: int = IMAGE_SIZE
    enlarged_size: int = IMAGE_SIZE

    @classmethod
    def of(
        cls, images: Tensor, input: str = "standardised", augmentation: str = "shift"
    ) -> "Preprocessing":
        """The preprocessing that fits uint8 images [N, 3, H, W] and a run's settings.

        Args:
            input: "standardised" subtracts the mean over all pixels and divides by the standard
                deviation; "centred" subtracts the mean and leaves the scale of 0..255 (paper §2).
            augmentation: one of AUGMENTATIONS. With "paper" a plain image is the middle crop, as
                the network has seen nothing but crops (2012 source, convdata.py, __trim_borders).

        Raises ValueError for another input.
        """
        if input not in INPUTS:
            raise ValueError(f"input must be {' or '.join(INPUTS)}, got {input}")
        mean, covariance = colour_statistics(images)
        std = covariance.diagonal().sqrt()
        return cls(
            mean.tolist(),
            std.tolist() if input == "standardised" else [1.0] * 3,
            enlarged_size=ENLARGED_SIZE if augmentation == "paper" else IMAGE_SIZE,
        )


def load_dataset(name: str, data_dir: str | Path = DEFAULT_DATA_DIR) -> Dataset:
    """Loads "cifar10" (downloaded if need be) or draws "shapes", on the CPU.

    Raises UserError if CIFAR-10 cannot be had or a file of it is damaged, ValueError for another
    name.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set is called {name!r}; there are {', '.join(DATASETS)}")
    return draw_shapes() if name == "shapes" else load_cifar10(Path(data_dir))


# ---------------------------------------------------------------------------------------------
# CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)
# ---------------------------------------------------------------------------------------------


def load_cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10 in data_dir: 45,000 training, 5,000 validation and 10,000 test images.

    Looks for the folder cifar-10-batches-py, then for the archive cifar-10-python.tar.gz, then
    downloads. Every file's MD5 is checked before it is opened.

    Raises UserError, naming the file, if one is damaged, or if there is no way to the data.
    """
    _make_data_dir(data_dir)
    if not _has_cifar10(data_dir):
        _fetch_cifar10(data_dir)
    train = CIFAR10(data_dir, train=True)
    rest, val = stratified_split(_to_split(train), VALIDATION_IMAGES_PER_CLASS)
    test = _to_split(CIFAR10(data_dir, train=False))
    return Dataset(list(train.classes), rest, val, test)


def stratified_split(split: Split, held_out_per_class: int) -> tuple[Split, Split]:
    """Cuts off held_out_per_class images of each class, the same ones at every call.

    Returns what is left and what was cut off, each in the split's order.
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
    """size images of a split, the same number of each class, the same ones at every call.

    Raises UserError if the split does not have that many, or size is no multiple of its classes.
    """
    counts = split.labels.bincount()
    per_class, left = divmod(size, len(counts))
    if left or not 0 < per_class <= counts.min():
        raise UserError(
            f"--train-images {size} is not a multiple of {len(counts)} from {len(counts)} to "
            f"{counts.min() * len(counts)}: the same number of images of each class"
        )
    return stratified_split(split, per_class)[1]


def _to_split(cifar: CIFAR10) -> Split:
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(cifar.targets))


def data_dir_of(training: dict) -> Path:
    """Where the run had CIFAR-10, if it is still there, else the default folder."""
    folder = Path(str(training.get("data_dir", DEFAULT_DATA_DIR)))
    # Unlike Path.is_file(), which may raise an error for a folder that is closed to this user.
    there = (os.path.isfile(folder / CIFAR10.base_folder / name) for name in _checksums())
    return folder if all(there) else Path(DEFAULT_DATA_DIR)


def _make_data_dir(data_dir: Path) -> None:
    if data_dir == Path(DEFAULT_DATA_DIR) and not data_dir.exists():
        try:
            data_dir.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {data_dir}: {error.strerror}") from None
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a folder; make it or name another")
    place = data_dir.resolve()
    if place.name == CIFAR10.base_folder and not (place / CIFAR10.base_folder).exists():
        raise UserError(
            f"--data-dir {data_dir} is the data's own folder; name the one that it is in: "
            f"{place.parent}"
        )


def _checksums() -> dict[str, str]:
    """The MD5 of each file of CIFAR-10, by name."""
    meta = {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}
    return {**dict(CIFAR10.train_list + CIFAR10.test_list), **meta}


def _has_cifar10(data_dir: Path) -> bool:
    """Whether every file is there and whole. Raises UserError for a damaged one."""
    complete = True
    for name, md5 in _checksums().items():
        path = data_dir / CIFAR10.base_folder / name
        if path.exists():
            _check_whole(path, md5)
        else:
            complete = False
    return complete


def _check_whole(path: Path, md5: str) -> None:
    """Raises UserError for a file that is damaged or cannot be read."""
    try:
        whole = check_integrity(path, md5)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not whole:
        raise UserError(f"{path} is damaged (its MD5 is not {md5}); delete it and run again")


def _fetch_cifar10(data_dir: Path) -> None:
    """Unpacks the archive in data_dir, or else a downloaded one, and puts the files in place."""
    archive = data_dir / CIFAR10.filename
    if archive.exists():
        _check_whole(archive, CIFAR10.tgz_md5)
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
            raise UserError(_no_cifar10(data_dir, error)) from None
        folder = data_dir / CIFAR10.base_folder
        folder.mkdir(exist_ok=True)
        for file in (Path(aside) / CIFAR10.base_folder).iterdir():
            file.replace(folder / file.name)


def _download_cifar10(folder: str) -> None:
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        CIFAR10(folder, download=True)
    finally:
        socket.setdefaulttimeout(None)


def _no_cifar10(data_dir: Path, error: Exception) -> str:
    return (
        f"CIFAR-10 is not in {data_dir}, and fetching and unpacking it failed ({error}; it comes "
        f"from {CIFAR10.url}). "
        f"Copy {CIFAR10.filename} into {data_dir}, or name the folder that holds it with "
        "--data-dir, or try --dataset shapes, which needs no download"
    )


# ---------------------------------------------------------------------------------------------
# Shapes: ten classes drawn by this program
# ---------------------------------------------------------------------------------------------

# How deep inside the shape the point x, y lies (outside: below 0), which is r from the centre. The
# unit is the shape's radius.
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
    """Ten classes of 32x32 pictures: 1,500 training, 500 validation and 1,000 test images."""
    splits = {
        name: _draw_split(count, np.random.RandomState(DATA_SEED + number))
        for number, (name, count) in enumerate(SHAPES_PER_CLASS.items())
    }
    return Dataset(list(SHAPES), **splits)


def _draw_split(per_class: int, random: np.random.RandomState) -> Split:
    labels = np.arange(per_class * len(SHAPES), dtype=np.int64) % len(SHAPES)
    n = len(labels)
    foreground, background = _colours(n, random)
    coverage = np.empty((n, 32, 32))
    x, y = _random_coordinates(n, random)
    for label, name in enumerate(SHAPES):
        chosen = labels == label
        coverage[chosen] = _coverage(name, x[chosen], y[chosen])
    picture = background + coverage[:, None] * (foreground - background)
    noise = random.normal(0, random.uniform(0, 0.08, (n, 1, 1, 1)), picture.shape)
    images = np.clip((picture + noise) * 255, 0, 255).astype(np.uint8)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _colours(n: int, random: np.random.RandomState):
    """A light and a dark random RGB colour for each of n pictures, [n, 3, 1, 1] in 0..1."""
    return random.uniform(0.6, 1, (n, 3, 1, 1)), random.uniform(0, 0.4, (n, 3, 1, 1))


def _random_coordinates(n: int, random: np.random.RandomState):
    """The pixels' places in each picture's own frame: moved, turned, in units of its radius."""
    radius = random.uniform(9, 14, (n, 1, 1))  # pixels
    centre_x, centre_y = 15.5 + random.uniform(-1, 1, (2, n, 1, 1)) * (15 - radius)
    angle = random.uniform(0, 2 * np.pi, (n, 1, 1))
    row, column = np.mgrid[:32, :32]
    dx, dy = (column - centre_x) / radius, (row - centre_y) / radius
    return dx * np.cos(angle) - dy * np.sin(angle), dx * np.sin(angle) + dy * np.cos(angle)


def _coverage(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1, with soft edges."""
    return np.clip(0.5 + 8 * SHAPES[name](x, y, np.hypot(x, y)), 0, 1)


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


GREY = (0.2989, 0.587, 0.114)  # shares of red, green and blue, as torchvision has them
COLOUR_NOISE = 0.1  # standard deviation of alpha (paper §4.1; 2012 source: color_noise_coeff)
AUGMENTATIONS = {  # what they change of the defaults of Augmentation
    "shift": {},
    "affine": {"rotation": 15.0, "zoom": 1.2},
    "cutout": {"cutout": 12},
    "jitter": {"jitter": 0.4},
    "strong": {"rotation": 15.0, "zoom": 1.2, "cutout": 12},
    "paper": {"crop": True, "divisor": 1 + COLOUR_NOISE},
    "none": {"flip": False, "shift": 0.0},
}


@dataclass
class Augmentation:
    """Random changes of a training image.

    flip: flip it horizontally with probability 1/2.
    shift: move it by up to this many of its own 32x32 pixels, in each direction.
    rotation: rotate it by up to this many degrees, either way.
    zoom: enlarge or reduce it by up to this factor, at least 1.
    cutout: hide a square of so many of its pixels a side, centred anywhere, by the mean colour
        (DeVries and Taylor 2017, arXiv 1708.04552, who hide 16x16 pixels of CIFAR-10's).
    jitter: multiply brightness, contrast and saturation by up to 1 + jitter, at least 1 - jitter.
    crop: cut a 227x227 window out of the image enlarged to 256x256, instead of a shift.
    colours: [3, 3], the principal components of PCA colour augmentation (§4.1), or None for none.
    divisor: of the image without its mean and with its noise, which the 2012 source divides by
        1 + COLOUR_NOISE (convdata.py, get_next_batch).
    """

    flip: bool = True
    shift: float = 4.0
    rotation: float = 0.0
    zoom: float = 1.0
    cutout: int = 0
    jitter: float = 0.0
    crop: bool = False
    colours: Tensor | None = None
    divisor: float = 1.0

    @classmethod
    def of(cls, name: str, images: Tensor) -> "Augmentation":
        """One of AUGMENTATIONS for uint8 training images [N, 3, H, W].

        "strong" and "paper" (§4.1) have PCA colour augmentation as well, by these images' colours.
        """
        colours = principal_components(images) if name in ("strong", "paper") else None
        return cls(**AUGMENTATIONS[name], colours=colours)

    def at(self, strength: float) -> "Augmentation":
        """This one with all but flips, shifts and crops at a share of its strength, 0..1."""
        return replace(
            self,
            rotation=self.rotation * strength,
            zoom=self.zoom**strength,
            cutout=round(self.cutout * strength),
            jitter=self.jitter * strength,
            colours=None if self.colours is None else self.colours * strength,
            divisor=1 + (self.divisor - 1) * strength,
        )


def principal_components(images: Tensor) -> Tensor:
    """The directions in which the colours of uint8 images [N, 3, H, W] vary, in 0..255.

    Returns float32 [3, 3]: each column is an eigenvector of the covariance of the pixels' RGB
    values, as long as the standard deviation along it. The paper prints eigenvalues, the squares of
    those deviations (§4.1); the 2012 source has deviations (convdata.py, ColorNoiseMakerThread).
    """
    _, covariance = colour_statistics(images)
    variances, directions = torch.linalg.eigh(covariance)
    return (directions * variances.clamp(min=0).sqrt()).float()


def colour_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [3] and covariance [3, 3] of the RGB values of uint8 images [N, 3, H, W], in float64.

    From sums of whole numbers, which are exact.
    """
    total = torch.zeros(3, dtype=torch.float64)
    products = torch.zeros(3, 3, dtype=torch.float64)
    for part in images.split(5000):  # not a float copy of all images
        pixels = part.movedim(1, 0).flatten(1).double().cpu()
        total += pixels.sum(1)
        products += pixels @ pixels.T
    count = images.numel() // 3
    mean = total / count
    return mean, products / count - mean.outer(mean)


def resample(
    images: Tensor,
    maps: Tensor,
    preprocessing: Preprocessing,
    noise: Tensor | None = None,
    hidden: Tensor | None = None,
    divisor: float = 1.0,
) -> Tensor:
    """Normalises images and resamples each through its own affine map.

    Args:
        images: uint8 or float [N, 3, H, W], on the scale of 0..255.
        maps: float [N, 2, 3], from the output's coordinates (-1..1 from edge to edge) to the
            image's, as torch.nn.functional.affine_grid takes them. Beyond its edges an image is
            continued by reflection.
        preprocessing: mean, std and output size S.
        noise: float [N, 3], added to every pixel of an image, in 0..255.
        hidden: bool [N, 1, H, W], the pixels to be replaced by the mean colour.
        divisor: of the image without its mean and with its noise; 1 without noise.

    Returns float32 [N, 3, S, S], on a CPU channels last. The identity map gives what
    torch.nn.functional.interpolate(mode="bilinear") gives.
    """
    size = preprocessing.size
    if not len(images):  # a process's share of a small batch, which grid_sample would refuse
        return torch.empty(0, 3, size, size, device=images.device)
    mean = _per_channel(tuple(preprocessing.mean), images.device)
    std = _per_channel(tuple(preprocessing.std), images.device)
    centred = images - mean
    if noise is not None:
        centred = (centred + noise[:, :, None, None]) / divisor
    normalised = centred / std
    if hidden is not None:
        normalised = normalised.masked_fill(hidden, 0)
    if kernels := kernels_for(normalised):
        return kernels.resample(normalised, maps, size)
    # As F.affine_grid, in half the time on a CPU.
    x, y, one = maps[:, None, None].unbind(-1)  # each [N, 1, 1, 2]
    places = _places(size, images.device)
    grid = torch.addcmul(torch.addcmul(one, y, places[:, None]), x, places)
    resampled = F.grid_sample(normalised, grid, padding_mode="reflection", align_corners=False)
    return in_fast_layout(resampled)


def in_fast_layout(images: Tensor) -> Tensor:
    """Images [N, 3, S, S] in the memory format that AlexNet is fast with: channels last on a CPU.

    On a GPU conv1 rearranges them in any case.
    """
    return images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)


@functools.lru_cache
def _places(size: int, device: torch.device) -> Tensor:
    """[S, 1], the centres of S pixels between -1 and 1."""
    return ((2 * torch.arange(size, device=device) + 1) / size - 1)[:, None]


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1] on the device; kept, because each copy to a GPU waits for it."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def crop_maps(corners: Tensor) -> Tensor:
    """[n, 2, 3] maps to 227x227 crops of the image enlarged to 256x256.

    Args:
        corners: [n, 2], the left and upper edge of each crop in whole pixels, 0..29.
    """
    maps = torch.eye(2, 3).repeat(len(corners), 1, 1) * (IMAGE_SIZE / ENLARGED_SIZE)
    # The crop's centre is this far from the image's; the image is 2 units wide.
    maps[:, :, 2] = (2 * corners + IMAGE_SIZE - ENLARGED_SIZE) / ENLARGED_SIZE
    return maps


def view_maps() -> Tensor:
    """[10, 2, 3] maps to the paper's ten views (§4.1): centre, four corners, their flips.

    The order is ours; the places are those of the 2012 source (convdata.py, start_positions). The
    centre of 29 spare pixels is not a whole one: it begins at 14.
    """
    last = ENLARGED_SIZE - IMAGE_SIZE
    corners = [(last // 2, last // 2), (0, 0), (last, 0), (0, last), (last, last)]
    maps = crop_maps(torch.tensor(corners))
    return torch.cat([maps, maps * torch.tensor([-1.0, 1.0, 1.0])])


def plain_map(preprocessing: Preprocessing) -> Tensor:
    """[2, 3], the map of an image that is not augmented: all of it, or the crop at its centre."""
    if preprocessing.enlarged_size == IMAGE_SIZE:
        return torch.eye(2, 3)
    return view_maps()[0]


def random_maps(n: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """[n, 2, 3] maps with a random flip, shift or crop, rotation and scaling, on the CPU."""
    if augmentation.crop:
        corners = torch.randint(0, ENLARGED_SIZE - IMAGE_SIZE + 1, (n, 2), generator=generator)
        maps = crop_maps(corners)
    else:
        maps = torch.eye(2, 3).repeat(n, 1, 1)
        # The output is 2 units wide and the image 32 pixels.
        maps[:, :, 2] = (torch.rand(n, 2, generator=generator) * 2 - 1) * augmentation.shift / 16
    if augmentation.flip:
        maps[:, 0] *= torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    if augmentation.rotation or augmentation.zoom > 1:
        turn, zoom = torch.rand(2, n, generator=generator) * 2 - 1
        # A power, so that it is as often smaller as larger.
        maps[:, :, :2] = maps[:, :, :2] @ turning_maps(
            turn * augmentation.rotation, augmentation.zoom**zoom
        )
    return maps


def turning_maps(degrees: Tensor, zoom: Tensor) -> Tensor:
    """[n, 2, 2] maps about the centre: turned by degrees [n] and enlarged zoom [n] times."""
    angle = degrees.deg2rad()
    cosine, sine = angle.cos() / zoom, angle.sin() / zoom
    return torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2)


def random_squares(n: int, side: int, size: int, generator: torch.Generator) -> Tensor:
    """[n, 2], the first row and column of a square centred on any pixel of an image, on the CPU.

    Near an edge a part of it lies outside; size is that of the image.
    """
    return torch.randint(0, size, (n, 2), generator=generator) - side // 2


def inside_squares(corners: Tensor, side: int, size: int) -> Tensor:
    """bool [n, 1, size, size]: which pixels lie in the squares at these corners, [n, 2]."""
    place = torch.arange(size, device=corners.device)
    first = corners[:, :, None]
    rows, columns = ((place >= first) & (place < first + side)).unbind(1)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def random_colours(colours: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[n, 3], an RGB offset for each image in 0..255: sum_i alpha_i * colours[:, i], on the CPU.

    Each alpha_i is normal with standard deviation COLOUR_NOISE, one draw an image (paper §4.1).
    """
    return torch.randn(n, 3, generator=generator) @ colours.T * COLOUR_NOISE


def random_jitter(n: int, jitter: float, generator: torch.Generator) -> Tensor:
    """[n, 3], factors of an image's brightness, contrast and saturation, on the CPU."""
    return 1 + jitter * (2 * torch.rand(n, 3, generator=generator) - 1)


def jittered(images: Tensor, factors: Tensor) -> Tensor:
    """Images, uint8 [N, 3, H, W], with saturation, contrast and brightness times factors, [N, 3].

    As torchvision's v2.ColorJitter, which has the same factors for a whole batch. Returns float,
    not cut off at 0 and 255.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    grey = (images * _per_channel(GREY, images.device)).sum(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    saturated = grey + saturation * (images - grey)
    return brightness * (mean + contrast * (saturated - mean))


def training_batches(
    split: Split,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields an epoch's batches (float images [B, 3, S, S], labels [B]), each image once.

    Order and augmentation depend on seed and epoch alone, so that a run resumed at first_step sees
    what it would have seen. The last batch holds what is left. share is the part of every batch
    that one of several processes takes; it may be empty in the last one.
    """
    generator = torch.Generator().manual_seed(combine_seeds(seed, epoch))
    n, size, side = len(split.labels), split.images.shape[-1], augmentation.cutout
    drawn = {  # for each image, in this order
        "index": torch.randperm(n, generator=generator),
        "map": random_maps(n, augmentation, generator),
    }
    if augmentation.colours is not None:
        drawn["noise"] = random_colours(augmentation.colours, n, generator)
    if side:
        drawn["corner"] = random_squares(n, side, size, generator)
    if augmentation.jitter:
        drawn["factors"] = random_jitter(n, augmentation.jitter, generator)
    drawn = {name: values.to(split.images.device) for name, values in drawn.items()}
    for start in range(first_step * batch_size, n, batch_size):
        batch = slice(start, start + batch_size)
        mine = {name: values[batch][share] for name, values in drawn.items()}
        images, labels = split.select(mine["index"])
        if augmentation.jitter:
            images = jittered(images, mine["factors"])
        hidden = inside_squares(mine["corner"], side, size) if side else None
        noise, divisor = mine.get("noise"), augmentation.divisor
        yield resample(images, mine["map"], preprocessing, noise, hidden, divisor), labels


def plain_batches(
    images: Tensor, preprocessing: Preprocessing, batch_size: int, view: Tensor | None = None
) -> Iterator[Tensor]:
    """Yields the images in order, resized but not augmented, as float [B, 3, S, S].

    view is the map [2, 3] of all images, by default plain_map(preprocessing).
    """
    view = plain_map(preprocessing) if view is None else view
    view = view.to(images.device)
    for part in images.split(batch_size):
        yield resample(part, view.expand(len(part), 2, 3), preprocessing)


def combine_seeds(*numbers: int) -> int:
    """One well-mixed seed from several numbers: (1, 2) and (2, 1) share nothing.

    A last number of 0 does not count: (1, 2, 0) gives what (1, 2) does.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
