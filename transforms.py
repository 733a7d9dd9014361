"""From uint8 images to the network's input: normalization, augmentation and one resampling.

Images stay small until the last moment: uint8 [N, 3, 32, 32] on the device. A batch is an index
into them, normalized, and resampled once to 227x227. That one resampling is the resize, the flip
and the shift or crop.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from dataset import Split
from model import IMAGE_SIZE
from utils import kernels

INPUTS = ("standardized", "centered")
AUGMENTATIONS = ("shift", "paper", "none")
MIXES = ("cutmix", "none")
STREAMS = ("data", "step", "mix")
ENLARGED_SIZE = 256  # of the image that the paper's crops are cut from (§2, §4.1)
MAX_VALUES = 2**30  # of the images that mean and covariance are of
COLOR_NOISE = 0.1  # standard deviation of alpha (paper §4.1; 2012 source: color_noise_coeff)


@dataclass
class Preprocessing:
    """What turns uint8 images into the network's input.

    mean, std: per channel, in 0..255; the one is subtracted, the result divided by the other.
    size: side of the input in pixels.
    enlarged_size: side that the whole image is enlarged to, of which the input is the center crop.
    image_size: side of the images that the network was trained on, before they are resampled.
    """

    mean: list[float]
    std: list[float]
    size: int = IMAGE_SIZE
    enlarged_size: int = IMAGE_SIZE
    image_size: int = 32

    @classmethod
    def fit(
        cls, images: Tensor, input: str = "standardized", augmentation: str = "shift"
    ) -> "Preprocessing":
        """Return the preprocessing for uint8 training images [N, 3, H, W].

        Args:
            input: "standardized" subtracts the mean over all pixels and divides by the standard
                deviation; "centered" subtracts the mean and leaves the scale of 0..255 (§2).
            augmentation: one of AUGMENTATIONS. With "paper" an evaluated image is a center crop,
                as the network has seen nothing but crops (2012 source, convdata.py).
        """
        mean, covariance = color_statistics(images)
        std = covariance.diagonal().sqrt().tolist() if input == "standardized" else [1.0] * 3
        enlarged_size = ENLARGED_SIZE if augmentation == "paper" else IMAGE_SIZE
        return cls(mean.tolist(), std, IMAGE_SIZE, enlarged_size, images.shape[-1])


@dataclass
class Augmentation:
    """Random changes of a training image.

    flip: flip it horizontally with probability 1/2.
    shift: move it by up to this many of 32 parts of its side, in each direction.
    crop: cut the input out of the image enlarged to 256x256, instead of a shift.
    colors: [3, 3], the principal components of PCA color augmentation (§4.1), or None for none.
    """

    flip: bool = True
    shift: float = 4.0
    crop: bool = False
    colors: Tensor | None = None

    @classmethod
    def fit(cls, name: str, images: Tensor) -> "Augmentation":
        """Return one of AUGMENTATIONS for uint8 training images [N, 3, H, W]."""
        if name == "paper":
            return cls(crop=True, colors=principal_components(images))
        return cls() if name == "shift" else cls(flip=False, shift=0.0)


def color_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [3] and covariance [3, 3] of the RGB values of uint8 images [N, 3, H, W].

    In float64, from sums of whole numbers, which are exact. Of very many pixels a part is enough.
    """
    total = torch.zeros(3, dtype=torch.float64)
    products = torch.zeros(3, 3, dtype=torch.float64)
    images = images[:: math.ceil(images.numel() / MAX_VALUES)]
    for part in images.split(math.ceil(2**24 / images[0].numel())):  # not a copy of all images
        pixels = part.movedim(1, 0).flatten(1).double().cpu()
        total += pixels.sum(1)
        products += pixels @ pixels.T
    count = images.numel() // 3
    mean = total / count
    return mean, products / count - mean.outer(mean)


def principal_components(images: Tensor) -> Tensor:
    """Return the directions in which the colors of uint8 images [N, 3, H, W] vary, in 0..255.

    float32 [3, 3]: each column is an eigenvector of the covariance of the pixels' RGB values, as
    long as the standard deviation along it. The paper prints eigenvalues, the squares of those
    deviations (§4.1); the 2012 source has deviations (convdata.py, ColorNoiseMakerThread).
    """
    _, covariance = color_statistics(images)
    variances, directions = torch.linalg.eigh(covariance)
    return (directions * variances.clamp(min=0).sqrt()).float()


# --- Maps ---
# Which pixels of an image the network sees, as affine maps [N, 2, 3] from the input's coordinates
# (-1..1 from edge to edge) to the image's.


def crop_maps(corners: Tensor) -> Tensor:
    """Return [n, 2, 3] maps to 227x227 crops of the image enlarged to 256x256.

    Args:
        corners: [n, 2], the left and upper edge of each crop in whole pixels, 0..29.
    """
    maps = torch.eye(2, 3).repeat(len(corners), 1, 1) * (IMAGE_SIZE / ENLARGED_SIZE)
    # The crop's center is this far from the image's; the image is 2 units wide.
    maps[:, :, 2] = (2 * corners + IMAGE_SIZE - ENLARGED_SIZE) / ENLARGED_SIZE
    return maps


def ten_crop_maps() -> Tensor:
    """Return [10, 2, 3] maps to the paper's ten views (§4.1): center, four corners, their flips.

    The positions are those of the 2012 source (convdata.py, start_positions). The center of 29
    spare pixels is not a whole one: its crop begins at 14.
    """
    last = ENLARGED_SIZE - IMAGE_SIZE
    corners = [(last // 2, last // 2), (0, 0), (last, 0), (0, last), (last, last)]
    maps = crop_maps(torch.tensor(corners))
    return torch.cat([maps, maps * torch.tensor([-1.0, 1.0, 1.0])])


def eval_map(preprocessing: Preprocessing) -> Tensor:
    """Return [2, 3], the map of an image that is evaluated: all of it, or the center crop."""
    if preprocessing.enlarged_size == preprocessing.size:
        return torch.eye(2, 3)
    return ten_crop_maps()[0]


def random_maps(n: int, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Return [n, 2, 3] maps with a random flip and shift or crop, on the CPU."""
    if augmentation.crop:
        corners = torch.randint(0, ENLARGED_SIZE - IMAGE_SIZE + 1, (n, 2), generator=generator)
        maps = crop_maps(corners)
    else:
        maps = torch.eye(2, 3).repeat(n, 1, 1)
        # The output is 2 units wide, and shift counts parts of 1/32.
        maps[:, :, 2] = (torch.rand(n, 2, generator=generator) * 2 - 1) * augmentation.shift / 16
    if augmentation.flip:
        maps[:, 0] *= torch.randint(0, 2, (n, 1), generator=generator) * 2 - 1
    return maps


def random_colors(colors: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return [n, 3], an RGB offset for each image in 0..255: sum_i alpha_i * colors[:, i].

    Each alpha_i is normal with standard deviation COLOR_NOISE, one draw an image (§4.1).
    """
    return torch.randn(n, 3, generator=generator) @ colors.T * COLOR_NOISE


# --- Batches ---


def resample(
    images: Tensor, maps: Tensor, preprocessing: Preprocessing, noise: Tensor | None = None
) -> Tensor:
    """Normalize images and resample each through its own map.

    Args:
        images: uint8 or float [N, 3, H, W], on the scale of 0..255.
        maps: float [N, 2, 3], as torch.nn.functional.affine_grid takes them. Beyond its edges an
            image is continued by reflection.
        preprocessing: mean, std and output size S.
        noise: float [N, 3], added to every pixel of an image, in 0..255. The sum is divided by
            1 + COLOR_NOISE, as in the 2012 source (convdata.py, get_next_batch).

    Returns float32 [N, 3, S, S], on a CPU channels last. The identity map gives what
    torch.nn.functional.interpolate(mode="bilinear") gives.
    """
    size = preprocessing.size
    if not len(images):  # a process's shard of a small batch, which grid_sample would refuse
        return torch.empty(0, 3, size, size, device=images.device)
    centered = images - _per_channel(tuple(preprocessing.mean), images.device)
    if noise is not None:
        centered = (centered + noise[:, :, None, None]) / (1 + COLOR_NOISE)
    normalized = centered / _per_channel(tuple(preprocessing.std), images.device)
    if kernels and kernels.can_resample(normalized):
        return kernels.resample(normalized, maps, size)
    # As F.affine_grid, in half the time on a CPU.
    x, y, one = maps[:, None, None].unbind(-1)  # each [N, 1, 1, 2]
    positions = _pixel_centers(size, images.device)
    grid = torch.addcmul(torch.addcmul(one, y, positions[:, None]), x, positions)
    resampled = F.grid_sample(normalized, grid, padding_mode="reflection", align_corners=False)
    return to_channels_last(resampled)


def to_channels_last(images: Tensor) -> Tensor:
    """Return images [N, 3, S, S] channels last on a CPU; on a GPU conv1 rearranges them anyway."""
    return images if images.is_cuda else images.contiguous(memory_format=torch.channels_last)


@functools.lru_cache
def _pixel_centers(size: int, device: torch.device) -> Tensor:
    """Return [S, 1], the centers of S pixels between -1 and 1."""
    return ((2 * torch.arange(size, device=device) + 1) / size - 1)[:, None]


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return [3, 1, 1] on the device; kept, because each copy to a GPU waits for it."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def training_batches(
    split: Split,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    shard: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch's batches (float images [B, 3, S, S], labels [B]), each image once.

    Order and augmentation depend on seed and epoch alone, so that a run resumed at first_step sees
    what it would have seen. The last batch holds what is left. shard is the part of every batch
    that one of several processes takes; it may be empty in the last one.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "data", epoch))
    n, device = len(split.labels), split.labels.device
    index = torch.randperm(n, generator=generator).to(device)
    maps = random_maps(n, augmentation, generator).to(device)
    noise = None
    if augmentation.colors is not None:
        noise = random_colors(augmentation.colors, n, generator).to(device)
    for start in range(first_step * batch_size, n, batch_size):
        batch = slice(start, start + batch_size)
        images, labels = split.select(index[batch][shard])
        batch_noise = None if noise is None else noise[batch][shard]
        images = images.to(device)  # if they are too many for a GPU, only these go there
        yield resample(images, maps[batch][shard], preprocessing, batch_noise), labels


def eval_batches(
    images: Tensor,
    preprocessing: Preprocessing,
    batch_size: int,
    view: Tensor | None = None,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Yield the images in order, resized but not augmented, as float [B, 3, S, S] on the device.

    view is the map [2, 3] of all images, by default eval_map(preprocessing); device is by default
    the images' own.
    """
    device = device or images.device
    view = (eval_map(preprocessing) if view is None else view).to(device)
    for part in images.split(batch_size):
        yield resample(part.to(device), view.expand(len(part), 2, 3), preprocessing)


class Mix:
    """CutMix (Yun et al. 2019, arXiv 1905.04899) of a part of the batches.

    All pairs of a batch have the same rectangle. Whether a batch is mixed depends on seed and step
    alone, and is the same for all processes. The rectangle is drawn from torch's generator.
    """

    def __init__(self, kind: str, probability: float, num_classes: int, seed: int):
        self.probability = probability if kind == "cutmix" else 0.0
        self.seed = seed
        self.cutmix = v2.CutMix(num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, S, S] and targets: labels [B], or if mixed [B, classes]."""
        if len(labels) < 2:  # an image alone has no partner
            return images, labels
        draw = np.random.default_rng(stream_seed(self.seed, "mix", step)).random()
        if draw >= self.probability:
            return images, labels
        images, targets = self.cutmix(images, labels)
        return to_channels_last(images), targets


def stream_seed(seed: int, consumer: str, *position: int) -> int:
    """Return a run's seed for one consumer of random numbers, one of STREAMS, at a position.

    The position is an epoch or a step, and possibly more: any two differ in what they draw.
    """
    key = (STREAMS.index(consumer), *position)
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1
