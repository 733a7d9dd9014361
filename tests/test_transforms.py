"""transforms.py: what reaches the network, against torch's own resampling, NumPy and the paper."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset import Split
from transforms import (
    AUGMENTATIONS,
    STREAMS,
    Augmentation,
    Mix,
    Preprocessing,
    color_statistics,
    crop_maps,
    eval_batches,
    principal_components,
    random_colors,
    random_maps,
    resample,
    stream_seed,
    ten_crop_maps,
    training_batches,
)

PLAIN = Preprocessing([0.0] * 3, [1.0] * 3)
SMALL = Preprocessing([0.0] * 3, [1.0] * 3, size=32)
IDENTITY = torch.eye(2, 3)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def correlated():
    """More images than color_statistics() takes at once; green depends on red."""
    images = torch.randint(0, 256, (5100, 3, 4, 4), dtype=torch.uint8)
    images[:, 1] = images[:, 1] // 4 + images[:, 0] // 2
    return images


def mean_and_covariance(images):
    """Of the RGB values of all pixels, by NumPy in float64."""
    pixels = images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    return pixels.mean(1), np.cov(pixels, bias=True)


def per_channel(values):
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 3, 1, 1)


def enlarge(images, size):
    return F.interpolate(images.double(), size, mode="bilinear", antialias=False)


# --- Resampling ---------------------------------------------------------------------------------


def test_identity_map_is_torchs_bilinear_enlargement(images):
    ours = resample(images, IDENTITY.expand(6, 2, 3), PLAIN)
    torch.testing.assert_close(ours.double(), enlarge(images, 227), rtol=0, atol=1e-3)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert resample(images[:0], IDENTITY.expand(0, 2, 3), PLAIN).shape == (0, 3, 227, 227)


@pytest.mark.parametrize("noise", [None, [[10.0, -5.0, 0.0], [0.0, 2.0, 40.0]]])
def test_resampling_equals_grid_sample_of_normalized_images_in_float64(images, noise):
    """Turned, zoomed, and moved so far that the edges reflect more than once.

    Noise: (image - mean + noise) / (1 + 0.1), 2012 source, convdata.py.
    """
    mean, std = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
    maps = torch.tensor([[-0.9, 0.3, 2.5, 0.2, 1.1, -3.2], [0.5, -2, -0.4, 1.7, 0.8, 5.1]])
    maps = maps.view(2, 2, 3)
    pixels = images[:2].double() - per_channel(mean)
    if noise:
        pixels = (pixels + per_channel(noise)) / 1.1
    pixels /= per_channel(std)
    grid = F.affine_grid(maps.double(), [2, 3, 227, 227], align_corners=False)
    expected = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    ours = resample(images[:2], maps, Preprocessing(mean, std), noise and torch.tensor(noise))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-3)


def test_flips_and_shifts_land_on_the_pixel(images):
    flip, shift = IDENTITY.clone(), IDENTITY.clone()
    flip[0, 0] = -1
    shift[:, 2] = torch.tensor([3, -5]) / 16  # 32 pixels are 2 units wide
    moved = torch.cat([images[..., 3:], images[..., -3:].flip(3)], dim=3)  # to the left
    moved = torch.cat([moved[:, :, :5].flip(2), moved[:, :, :-5]], dim=2)  # and down
    for view, expected in ((flip, images.flip(3)), (shift, moved)):
        assert torch.equal(resample(images, view.expand(6, 2, 3), SMALL).round(), expected.float())


def test_crops_and_ten_views_are_cut_from_the_enlarged_image(images):
    """The ten positions are those of the 2012 source, convdata.py: left and upper edges."""
    crops = [(7, 22), (15, 14), (29, 0)]
    views = [(14, 14), (0, 0), (29, 0), (0, 29), (29, 29)]
    maps = [*crop_maps(torch.tensor(crops)), *ten_crop_maps()]
    large = enlarge(images[:1], 256)
    cuts = [large[:, :, top : top + 227, left : left + 227] for left, top in crops + views]
    cuts += [cut.flip(3) for cut in cuts[3:]]
    for view, expected in zip(maps, cuts, strict=True):
        ours = resample(images[:1], view[None], PLAIN)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("input", "augmentation", "size", "crop"),
    [("standardized", "shift", 227, slice(0, 227)), ("centered", "paper", 256, slice(14, 241))],
)
def test_evaluated_images_are_normalized_and_whole_or_center_crops(
    images, input, augmentation, size, crop
):
    preprocessing = Preprocessing.fit(images, input, augmentation)
    batches = list(eval_batches(images, preprocessing, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 2]
    mean, covariance = mean_and_covariance(images)
    std = covariance.diagonal() ** 0.5 if input == "standardized" else [1.0] * 3
    cut = enlarge(images, size)[:, :, crop, crop]
    expected = (cut - per_channel(mean)) / per_channel(std)
    torch.testing.assert_close(torch.cat(batches).double(), expected, rtol=0, atol=2e-3)


# --- Colors and random maps ---------------------------------------------------------------------


def test_color_statistics_equal_numpys_and_components_are_its_eigenvectors(correlated):
    mean, covariance = mean_and_covariance(correlated)
    ours = color_statistics(correlated)
    np.testing.assert_allclose(ours[0].numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(ours[1].numpy(), covariance, rtol=1e-9, atol=1e-6)
    columns = principal_components(correlated).double().numpy()
    variances = np.diag(np.linalg.eigvalsh(covariance))  # the squares of the columns' lengths
    np.testing.assert_allclose(columns.T @ columns, variances, rtol=1e-5, atol=0.01)
    np.testing.assert_allclose(columns @ columns.T, covariance, rtol=1e-5, atol=0.01)


def test_random_colors_have_a_hundredth_of_the_covariance(correlated):
    """§4.1: alpha has standard deviation 0.1."""
    generator = torch.Generator().manual_seed(0)
    noise = random_colors(principal_components(correlated), 200_000, generator).double().numpy()
    expected = 0.01 * mean_and_covariance(correlated)[1]
    np.testing.assert_allclose(np.cov(noise.T), expected, rtol=0, atol=0.02 * expected.max())
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.02 * expected.max() ** 0.5)


def test_random_shifts_are_uniform_and_half_the_images_are_flipped():
    maps = random_maps(4000, Augmentation(shift=4), torch.Generator().manual_seed(0))
    pixels = (maps[:, :, 2] * 16).double().numpy()
    assert np.abs(pixels).max() <= 4
    np.testing.assert_allclose(np.cov(pixels.T), np.eye(2) * 8**2 / 12, atol=0.3)
    assert (maps[:, 0, 0] == -1).double().mean() == pytest.approx(0.5, abs=0.04)
    maps[:, 0, 0] = maps[:, 0, 0].abs()
    assert torch.equal(maps[:, :, :2], torch.eye(2).expand(4000, 2, 2))


def test_random_crops_take_all_900_positions_and_half_the_images_are_flipped():
    maps = random_maps(20_000, Augmentation(crop=True), torch.Generator().manual_seed(0))
    assert (maps[:, 0, 0] < 0).double().mean() == pytest.approx(0.5, abs=0.02)
    maps[:, 0, 0] = maps[:, 0, 0].abs()
    torch.testing.assert_close(maps[:, :, :2], (torch.eye(2) * 227 / 256).expand(20_000, 2, 2))
    corners = maps[:, :, 2] * 128 + 14.5  # 256 pixels are 2 units wide, and 29 are spare
    torch.testing.assert_close(corners, corners.round(), rtol=0, atol=1e-4)
    counts = (corners.round() @ torch.tensor([30.0, 1.0])).long().bincount(minlength=900)
    assert len(counts) == 900
    assert 0 < counts.min() <= counts.max() < 50  # 22 expected, with a standard deviation of 5


# --- Batches ------------------------------------------------------------------------------------


MANY = torch.randint(0, 256, (100, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()


def batches(augmentation=None, images=MANY, seed=0, epoch=0, **settings):
    """Return an epoch's batches of 100 images, of which the labels are the numbers."""
    split, augmentation = Split(images, torch.arange(100)), augmentation or Augmentation()
    return list(training_batches(split, SMALL, augmentation, 32, seed, epoch, **settings))


def order(batches):
    return [label for _, labels in batches for label in labels.tolist()]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_epoch_has_each_image_once_with_its_label():
    parts = batches(Augmentation(flip=False, shift=0))
    assert [len(labels) for _, labels in parts] == [32, 32, 32, 4]
    assert sorted(order(parts)) == list(range(100))
    for seen, labels in parts:
        assert torch.equal(seen.round(), MANY[labels].float())


def test_batches_depend_on_seed_and_epoch_alone():
    first = batches(seed=1, epoch=2)
    torch.manual_seed(99)
    assert_same(batches(seed=1, epoch=2), first)
    for seed, epoch in ((2, 1), (1, 3), (2, 2)):
        assert order(batches(seed=seed, epoch=epoch)) != order(first)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_resumed_batches_are_the_rest_of_the_epoch(images, name):
    augmentation = Augmentation.fit(name, images)
    whole = batches(augmentation, epoch=5)
    assert_same(batches(augmentation, epoch=5, first_step=2), whole[2:])


def test_shards_partition_each_batch():
    """Among five processes, of which one has no part of the last batch of four images."""
    shards = [batches(shard=slice(rank, None, 5)) for rank in range(5)]
    for whole, *parts in zip(batches(), *shards, strict=True):
        assert_same(parts, [[tensor[rank::5] for tensor in whole] for rank in range(5)])
    assert len(shards[4][-1][1]) == 0


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_is_augmented_in_its_own_way_in_each_epoch(images, name):
    augmentation, same = Augmentation.fit(name, images), images[:1].expand(100, 3, 32, 32)
    parts = batches(augmentation, same) + batches(augmentation, same, epoch=1)
    distinct = torch.cat([seen for seen, _ in parts]).flatten(1).unique(dim=0)
    assert len(distinct) == (1 if name == "none" else 200)


def test_color_noise_is_the_same_in_all_pixels_of_an_image():
    augmentation = Augmentation(crop=True, colors=torch.eye(3) * 50)
    gray = torch.full((100, 3, 32, 32), 100, dtype=torch.uint8)
    noise = 1.1 * torch.cat([images for images, _ in batches(augmentation, gray)]) - 100
    draws = noise.mean((2, 3), keepdim=True)
    torch.testing.assert_close(noise, draws.expand_as(noise), rtol=0, atol=0.01)
    assert draws.std(0).flatten().tolist() == pytest.approx([5.0] * 3, rel=0.25)  # 0.1 times 50


def test_random_numbers_of_a_run_are_all_different():
    positions = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    draws = list(itertools.product((0, 1, 2**63 - 1), STREAMS, positions))
    assert len({stream_seed(seed, stream, *position) for seed, stream, position in draws}) == len(
        draws
    )


# --- CutMix -------------------------------------------------------------------------------------

LABELS = torch.tensor([3, 0, 2, 1])
IMAGES = LABELS.view(4, 1, 1, 1).expand(4, 3, 20, 20).float()  # each pixel tells its label


def mixed_steps(probability, seed=0, steps=2000):
    mix = Mix("cutmix", probability, num_classes=5, seed=seed)
    return [step for step in range(steps) if mix(IMAGES, LABELS, step)[1].dim() == 2]


def test_mixed_images_hold_as_much_of_each_as_their_labels():
    mix = Mix("cutmix", 1.0, num_classes=5, seed=0)
    for step in range(50):
        mixed, targets = mix(IMAGES, LABELS, step)
        shares = F.one_hot(mixed.long(), 5).double().mean((1, 2, 3))
        torch.testing.assert_close(targets.double(), shares)
        assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))  # the same in all channels


def test_batches_are_mixed_with_their_probability_by_seed_and_step_alone():
    steps = mixed_steps(0.3)
    assert len(steps) / 2000 == pytest.approx(0.3, abs=0.04)
    torch.manual_seed(99)
    assert mixed_steps(0.3) == steps
    assert mixed_steps(0.3, seed=1) != steps


@pytest.mark.parametrize(
    ("kind", "probability", "n"), [("none", 1, 4), ("cutmix", 0, 4), ("cutmix", 1, 1)]
)
def test_unmixed_batch_or_image_alone_stays_as_it_is(kind, probability, n):
    mix = Mix(kind, probability, num_classes=5, seed=0)
    assert_same(
        [mix(IMAGES[:n], LABELS[:n], step) for step in range(9)], [(IMAGES[:n], LABELS[:n])] * 9
    )
