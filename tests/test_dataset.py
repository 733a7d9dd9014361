import functools
import hashlib
import pickle
import shutil
import socket
import tarfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import identity_maps
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import v2

import dataset
from dataset import (
    Augmentation,
    Preprocessing,
    Split,
    crop_maps,
    data_dir_of,
    draw_shapes,
    inside_squares,
    jittered,
    load_cifar10,
    load_dataset,
    plain_batches,
    principal_components,
    random_colours,
    random_jitter,
    random_maps,
    random_squares,
    resample,
    stratified_split,
    stratified_subset,
    training_batches,
    turning_maps,
    view_maps,
)
from utils import UserError

PLAIN = Preprocessing([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


def numbered_split(n):
    """Each image is one colour that tells its number; its label is the number."""
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    images[:] = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return Split(images, torch.arange(n))


@pytest.fixture(scope="module")
def shapes():
    return draw_shapes()


# --- Splits -------------------------------------------------------------------------------------


def test_stratified_split_is_fixed_disjoint_and_stratified():
    labels = torch.tensor([0, 1, 2] * 40)
    whole = Split(torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    train, val = stratified_split(whole, 10)
    assert val.labels.bincount().tolist() == [10, 10, 10]
    assert train.labels.bincount().tolist() == [30, 30, 30]
    together = torch.cat([train.images, val.images]).flatten()
    assert together.sort().values.tolist() == list(range(120))
    for part in (train, val):  # each image has kept its label
        assert torch.equal(part.images.flatten() % 3, part.labels)
    again, _ = stratified_split(whole, 10)
    assert torch.equal(again.images, train.images)


def test_subset_is_fixed_stratified_and_of_the_split(shapes):
    small, large = (stratified_subset(shapes.train, size) for size in (100, 500))
    assert small.labels.bincount().tolist() == [10] * 10
    assert large.labels.bincount().tolist() == [50] * 10
    assert torch.equal(stratified_subset(shapes.train, 100).images, small.images)
    known = {(bytes(i.numpy()), int(c)) for i, c in zip(*shapes.train, strict=True)}
    chosen = {(bytes(i.numpy()), int(c)) for i, c in zip(*large, strict=True)}
    assert len(chosen) == 500
    assert chosen <= known


@pytest.mark.parametrize("size", [0, 5, 101, 1510])
def test_subset_that_cannot_be_had(shapes, size):
    with pytest.raises(UserError, match=f"--train-images {size} is not a multiple of 10 from 10 "):
        stratified_subset(shapes.train, size)


def test_real_cifar10(cifar10_dir):
    data = load_cifar10(cifar10_dir)
    assert data.classes[:3] == ["airplane", "automobile", "bird"]
    for split, per_class in ((data.train, 4500), (data.val, 500), (data.test, 1000)):
        assert split.images.shape == (10 * per_class, 3, 32, 32)
        assert split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == [per_class] * 10
    official = CIFAR10(cifar10_dir, train=True).data.transpose(0, 3, 1, 2)

    def rows(images):
        return sorted(map(bytes, np.asarray(images).reshape(len(images), -1)))

    assert rows(torch.cat([data.train.images, data.val.images])) == rows(official)
    # Published numbers were chosen on these images: another split would make them another's.
    digest = hashlib.sha256(data.val.images.numpy().tobytes() + data.val.labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "fe1ecdd9ff329230"
    # Too much for a noise of eigenvalues (docs/faithful.md, note 5).
    pixels = data.train.images.movedim(1, 0).flatten(1).numpy()
    assert np.linalg.eigvalsh(np.cov(pixels)).max() == pytest.approx(11163, abs=0.5)


def test_channel_statistics(shapes):
    images = shapes.train.images
    ours = Preprocessing.of(images)
    pixels = images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(ours.mean, pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ours.std, pixels.std(axis=1), rtol=1e-10)


def test_centred_input_is_the_image_minus_the_mean(shapes):
    images = shapes.train.images
    plain, centred = Preprocessing.of(images), Preprocessing.of(images, "centred")
    assert centred.mean == plain.mean
    assert centred.std == [1.0] * 3
    first = images[:3].numpy().astype(np.float64)
    mean = images.numpy().astype(np.float64).mean(axis=(0, 2, 3))
    small = Preprocessing(centred.mean, centred.std, size=32)
    ours = resample(images[:3], identity_maps(3), small)
    np.testing.assert_allclose(ours.numpy(), first - mean[:, None, None], rtol=0, atol=1e-2)


# --- Shapes -------------------------------------------------------------------------------------


def test_shapes_are_the_same_every_time_and_balanced(shapes):
    again = draw_shapes()
    for name in ("train", "val", "test"):
        split = getattr(shapes, name)
        assert torch.equal(split.images, getattr(again, name).images)
        assert len(set(split.labels.bincount().tolist())) == 1
        assert split.labels.unique().tolist() == list(range(10))


def test_no_shape_is_in_two_splits(shapes):
    pictures = [s.images.flatten(1).numpy() for s in (shapes.train, shapes.val, shapes.test)]
    distinct = {row.tobytes() for split in pictures for row in split}
    assert len(distinct) == sum(map(len, pictures))


# --- Resampling ---------------------------------------------------------------------------------


def test_identity_resampling_is_interpolation(shapes):
    images = shapes.train.images[:16]
    ours = resample(images, identity_maps(16), PLAIN)
    expected = F.interpolate(images.float(), 227, mode="bilinear", antialias=False)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_resampling_normalises(shapes):
    images = shapes.train.images
    out = resample(images[:500], identity_maps(500), Preprocessing.of(images))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=0.1)
    assert ((out.std((0, 2, 3)) > 0.85) & (out.std((0, 2, 3)) < 1.1)).all()


def test_mirror_map_is_flip(shapes):
    images = shapes.train.images[:4]
    mirror = identity_maps(4).clone()
    mirror[:, 0, 0] = -1
    expected = resample(images, identity_maps(4), PLAIN).flip(3)
    torch.testing.assert_close(resample(images, mirror, PLAIN), expected, rtol=0, atol=1e-2)


def test_shift_map_moves_whole_pixels(shapes):
    """A shift by 3 pixels shows what the image cut off on the left and reflected shows."""
    images = shapes.train.images[:4]
    maps = identity_maps(4).clone()
    maps[:, 0, 2] = 3 / 16
    small = Preprocessing([0.0] * 3, [1.0] * 3, size=32)
    moved = resample(images, maps, small)
    expected = torch.cat([images[..., 3:], images[..., -3:].flip(3)], dim=3).float()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-2)


def test_random_maps_stay_in_range_and_mirror_half():
    maps = random_maps(4000, Augmentation(shift=4), torch.Generator().manual_seed(0))
    shift = maps[:, :, 2] * 16
    assert shift.abs().max() <= 4
    for each in shift.T:
        assert each.min() < -3.9
        assert each.max() > 3.9
    assert abs(np.corrcoef(shift.numpy().T)[0, 1]) < 0.05
    mirrored = maps[:, 0, 0] == -1
    assert 0.45 < mirrored.float().mean() < 0.55
    assert torch.equal(maps[:, :, :2].abs(), torch.eye(2).expand(4000, 2, 2))
    still = random_maps(5, Augmentation(flip=False, shift=0), torch.Generator())
    assert torch.equal(still, identity_maps(5))


def test_quarter_turn_is_rot90(shapes):
    images = shapes.train.images[:4]
    maps = identity_maps(4).clone()
    maps[:, :, :2] = turning_maps(torch.full((4,), 90.0), torch.ones(4))
    expected = resample(images, identity_maps(4), PLAIN).rot90(1, (2, 3))
    torch.testing.assert_close(resample(images, maps, PLAIN), expected, rtol=0, atol=0.05)


def test_zoom_by_two_shows_the_middle_quarter(shapes):
    images = shapes.train.images[:4]
    maps = identity_maps(4).clone()
    maps[:, :, :2] = turning_maps(torch.zeros(4), torch.full((4,), 2.0))
    small = Preprocessing([0.0] * 3, [1.0] * 3, size=32)
    whole = F.interpolate(images.float(), 64, mode="bilinear", antialias=False)
    torch.testing.assert_close(
        resample(images, maps, small), whole[..., 16:48, 16:48], rtol=0, atol=1e-2
    )


def test_random_turns_and_zooms_stay_in_range():
    augmentation = Augmentation(flip=False, rotation=15, zoom=1.2)
    maps = random_maps(4000, augmentation, torch.Generator().manual_seed(0))
    turned = maps[:, :, :2].double()
    zoom = turned.det() ** -0.5
    angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    for values, low, high in ((zoom, 1 / 1.2, 1.2), (angle, -15, 15)):
        assert low - 1e-5 <= values.min() < 0.99 * low + 0.01 * high
        assert 0.99 * high + 0.01 * low < values.max() <= high + 1e-5
    assert zoom.log().mean().abs() < 0.01  # as often larger as smaller
    plain = random_maps(4000, Augmentation(flip=False), torch.Generator().manual_seed(0))
    assert torch.equal(maps[:, :, 2], plain[:, :, 2])


@pytest.mark.parametrize("side", [1, 12, 15])
def test_squares_lie_where_they_are_put(side):
    corners = random_squares(3000, side, 32, torch.Generator().manual_seed(0))
    centres = corners + side // 2
    assert (centres.min(), centres.max()) == (0, 31)
    inside = inside_squares(corners[:40], side, 32)
    expected = np.zeros((40, 1, 32, 32), dtype=bool)
    for picture, (row, column) in zip(expected, corners[:40].tolist(), strict=True):
        rows = slice(max(row, 0), max(row + side, 0))
        picture[0, rows, max(column, 0) : max(column + side, 0)] = True
    assert np.array_equal(inside.numpy(), expected)


def test_cut_out_pixels_have_the_mean_colour(shapes):
    images, preprocessing = shapes.train.images[:4], Preprocessing.of(shapes.train.images)
    hidden = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
    hidden[:, :, 8:24, 8:24] = True
    plain = resample(images, identity_maps(4), preprocessing)
    cut = resample(images, identity_maps(4), preprocessing, hidden=hidden)
    assert cut[:, :, 64:163, 64:163].abs().max() < 1e-6  # a pixel is 7.1 wide
    assert plain[:, :, 64:163, 64:163].abs().min(1).values.max() > 0.1
    assert torch.equal(cut[:, :, :50], plain[:, :, :50])


def test_squares_are_an_images_own(shapes):
    still = Preprocessing([128.0] * 3, [1.0] * 3, size=32)
    white = Split(torch.full((64, 3, 32, 32), 255, dtype=torch.uint8), torch.arange(64))
    augmentation = Augmentation(flip=False, shift=0, cutout=12)
    [(images, _)] = training_batches(white, still, augmentation, 64, 0, 0)
    black = images[:, 0].abs() < 1e-3
    assert torch.equal(images[:, 0] == 127, ~black)
    assert black.sum((1, 2)).max() == 12 * 12
    assert len({picture.numpy().tobytes() for picture in black}) > 55  # of 64; some meet


def test_jitter_is_torchvisions_with_factors_for_each_image():
    """Of colours that no factor takes beyond 0..255, where torchvision's would be cut off."""
    images = torch.randint(90, 160, (40, 3, 8, 8), dtype=torch.uint8)
    factors = random_jitter(40, 0.4, torch.Generator().manual_seed(0))
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    assert (factors.amax(0) - factors.amin(0)).min() > 0.7
    for image, ours, three in zip(images, jittered(images, factors), factors.tolist(), strict=True):
        expected = image.double() / 255
        expected = v2.functional.adjust_saturation(expected, three[2])
        expected = v2.functional.adjust_contrast(expected, three[1])
        expected = v2.functional.adjust_brightness(expected, three[0])
        torch.testing.assert_close(ours.double(), 255 * expected, rtol=0, atol=0.05)


def test_jitter_is_an_images_own():
    still = Preprocessing([0.0] * 3, [1.0] * 3, size=32)
    grey = Split(torch.full((64, 3, 32, 32), 100, dtype=torch.uint8), torch.arange(64))
    augmentation = Augmentation(jitter=0.4)
    [(images, _)] = training_batches(grey, still, augmentation, 64, 0, 0)
    levels = images.mean((1, 2, 3))
    torch.testing.assert_close(images, levels[:, None, None, None].expand_as(images))
    assert 60 <= levels.min() < 65  # brightness alone changes a plain grey
    assert 135 < levels.max() <= 140


def test_jitter_leaves_the_other_random_numbers_of_an_epoch(shapes, monkeypatch):
    monkeypatch.setattr(dataset, "jittered", lambda images, factors: images)
    split = shapes.train.select(torch.arange(40))
    [with_jitter], [plain] = (
        training_batches(split, PLAIN, Augmentation(jitter=jitter), 40, 0, 0) for jitter in (0.4, 0)
    )
    assert torch.equal(with_jitter[0], plain[0])
    assert torch.equal(with_jitter[1], plain[1])


# --- The paper's crops, views and PCA colour augmentation (§4.1) --------------------------------


@pytest.fixture(scope="module")
def enlarged(shapes):
    """Six images, whole, enlarged to 256x256 by PyTorch's own bilinear interpolation."""
    return F.interpolate(shapes.train.images[:6].float(), 256, mode="bilinear", antialias=False)


def test_crops_are_cut_from_the_enlarged_image(shapes, enlarged):
    corners = [(0, 0), (29, 0), (0, 29), (29, 29), (7, 22), (15, 14)]
    ours = resample(shapes.train.images[:6], crop_maps(torch.tensor(corners)), PLAIN)
    for image, whole, (left, top) in zip(ours, enlarged, corners, strict=True):
        expected = whole[:, top : top + 227, left : left + 227]
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-3)


def test_ten_views_are_cut_from_the_enlarged_image(shapes, enlarged):
    """2012 source, convdata.py, start_positions; the centre of 29 spare pixels begins at 14."""
    cuts = [slice(0, 227), slice(14, 241), slice(29, 256)]
    places = [(1, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    expected = [enlarged[:, :, cuts[top], cuts[left]] for top, left in places]
    expected += [view.flip(3) for view in expected]
    views = [resample(shapes.train.images[:6], view.expand(6, 2, 3), PLAIN) for view in view_maps()]
    assert len(views) == 10
    found = set()
    for view in views:
        errors = [(view - other).abs().max().item() for other in expected]
        assert min(errors) < 2e-3
        found.add(errors.index(min(errors)))
    assert found == set(range(10))


def test_plain_view_after_training_on_crops_is_the_centre_crop(shapes, enlarged):
    preprocessing = Preprocessing.of(shapes.train.images, "centred", "paper")
    [ours] = plain_batches(shapes.train.images[:6], preprocessing, 6)
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    expected = enlarged[:, :, 14:241, 14:241] - mean
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)


def test_random_crops_take_every_whole_pixel_and_mirror_half():
    maps = random_maps(20000, Augmentation(crop=True), torch.Generator().manual_seed(0))
    scale, shift = maps[:, [0, 1], [0, 1]], maps[:, :, 2]
    torch.testing.assert_close(scale.abs(), torch.full((20000, 2), 227 / 256))
    assert (maps[:, 0, 1] == 0).all()
    assert (maps[:, 1, 0] == 0).all()
    assert (scale[:, 1] > 0).all()
    assert 0.48 < (scale[:, 0] < 0).double().mean() < 0.52
    # The image is 2 units wide: a crop's centre is (corner - 14.5) of 128 half widths from its own.
    corners = shift * 128 + 14.5
    torch.testing.assert_close(corners, corners.round(), rtol=0, atol=1e-4)
    counts = torch.stack([c.round().long().bincount(minlength=30) for c in corners.unbind(1)])
    assert counts.shape == (2, 30)
    assert (counts > 500).all()  # 667 expected, with a deviation of 25
    pairs = (corners.round() @ torch.tensor([30.0, 1.0])).unique()
    assert len(pairs) == 900


def covariance(images):
    """Of the RGB values of all pixels, by NumPy in float64."""
    return np.cov(images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1))


def test_principal_components_are_eigenvectors_times_deviations(shapes):
    ours = principal_components(shapes.train.images).double().numpy()
    eigenvalues, eigenvectors = np.linalg.eigh(covariance(shapes.train.images))
    order = np.argsort(np.linalg.norm(ours, axis=0))
    for column, value, vector in zip(ours.T[order], eigenvalues, eigenvectors.T, strict=True):
        assert np.linalg.norm(column) == pytest.approx(value**0.5, rel=1e-5)
        assert abs(column @ vector) == pytest.approx(value**0.5, rel=1e-5)


def test_colour_noise_has_a_hundredth_of_the_covariance(shapes):
    """alpha has deviation 0.1; one draw of three numbers for an image."""
    colours = principal_components(shapes.train.images)
    noise = random_colours(colours, 200_000, torch.Generator().manual_seed(0)).double().numpy()
    assert noise.shape == (200_000, 3)
    expected = 0.01 * covariance(shapes.train.images)
    size = expected.diagonal().max()
    np.testing.assert_allclose(np.cov(noise.T), expected, rtol=0, atol=0.02 * size)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.02 * size**0.5)


def test_colour_noise_is_added_and_the_sum_divided(shapes):
    """2012 source, convdata.py: (image - mean + noise) / (1 + 0.1)."""
    images, noise = shapes.train.images[:2], torch.tensor([[10.0, -5.0, 0.0], [0.0, 2.0, 40.0]])
    preprocessing = Preprocessing([120.0, 110.0, 100.0], [1.0, 2.0, 4.0], size=32)
    divisor = Augmentation.of("paper", shapes.train.images).divisor
    ours = resample(images, identity_maps(2), preprocessing, noise, divisor=divisor)
    pixel = images[1, :, 20, 11].double()
    expected = (pixel - torch.tensor([120, 110, 100]) + noise[1]) / 1.1 / torch.tensor([1, 2, 4])
    torch.testing.assert_close(ours[1, :, 20, 11].double(), expected, rtol=0, atol=1e-3)


def test_augmentation_by_name(shapes):
    images = shapes.train.images
    assert Augmentation.of("shift", images) == Augmentation(flip=True, shift=4.0)
    assert Augmentation.of("none", images) == Augmentation(flip=False, shift=0)
    paper = Augmentation.of("paper", images)
    assert (paper.flip, paper.crop) == (True, True)
    assert torch.equal(paper.colours, principal_components(images))
    strong = Augmentation.of("strong", images)
    assert (strong.flip, strong.crop, strong.shift) == (True, False, 4)
    assert (strong.rotation, strong.zoom, strong.cutout) == (15, 1.2, 12)
    assert torch.equal(strong.colours, principal_components(images))
    assert Augmentation.of("affine", images) == Augmentation(rotation=15, zoom=1.2)
    assert Augmentation.of("cutout", images) == Augmentation(cutout=12)
    assert Augmentation.of("jitter", images) == Augmentation(jitter=0.4)


def test_augmentation_grows(shapes):
    strong = Augmentation.of("strong", shapes.train.images)
    half = strong.at(0.5)
    assert (half.flip, half.shift, half.rotation, half.cutout) == (True, 4, 7.5, 6)
    assert half.zoom**2 == pytest.approx(1.2)  # twice half the zoom is all of it
    torch.testing.assert_close(half.colours + half.colours, strong.colours)
    for weakest, plain in zip(
        batches(augmentation=strong.at(0)), batches(augmentation=Augmentation()), strict=True
    ):
        torch.testing.assert_close(weakest, plain)
    affine, paper = (Augmentation.of(name, shapes.train.images) for name in ("affine", "paper"))
    assert affine.at(1) == Augmentation(rotation=15, zoom=1.2)
    assert [paper.at(strength).divisor for strength in (0, 0.5, 1)] == pytest.approx([1, 1.05, 1.1])


# --- Batches ------------------------------------------------------------------------------------


def batches(seed=0, epoch=0, first_step=0, n=100, augmentation=None):
    augmentation = augmentation or Augmentation()
    return list(
        training_batches(numbered_split(n), PLAIN, augmentation, 32, seed, epoch, first_step)
    )


def test_an_epoch_covers_each_image_once():
    parts = batches()
    assert [len(labels) for _, labels in parts] == [32, 32, 32, 4]
    assert torch.cat([labels for _, labels in parts]).sort().values.tolist() == list(range(100))
    for images, labels in parts:  # each picture goes with its own label
        torch.testing.assert_close(images.mean((1, 2, 3)), labels.float(), rtol=1e-4, atol=1e-3)


def test_batches_depend_on_seed_and_epoch_alone():
    first = batches(seed=1, epoch=2)
    torch.manual_seed(99)
    torch.rand(5)
    for (images, labels), (same_images, same_labels) in zip(
        first, batches(seed=1, epoch=2), strict=True
    ):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    for other in (batches(seed=2, epoch=1), batches(seed=1, epoch=3), batches(seed=2, epoch=2)):
        assert not torch.equal(first[0][1], other[0][1])


def test_colour_noise_is_an_images_own_and_new_in_each_epoch():
    augmentation = Augmentation(crop=True, colours=torch.eye(3) * 50)
    tints = {}
    for epoch in (0, 1):
        for images, labels in batches(epoch=epoch, augmentation=augmentation):
            noise = images - labels.view(-1, 1, 1, 1)
            tint = noise.mean((2, 3))  # the same at every pixel, another for each channel and image
            same = tint[:, :, None, None].expand_as(noise)
            torch.testing.assert_close(noise, same, rtol=0, atol=1e-2)
            tints |= {(epoch, int(n)): tuple(t.tolist()) for n, t in zip(labels, tint, strict=True)}
    assert len(set(tints.values())) == 200
    assert np.std(list(tints.values())) == pytest.approx(5, rel=0.15)


def places(epoch, size, **how):
    """Where in the small image, in pixels, the middle of each training image is; and if mirrored.

    The images are red by the column and green by the row.
    """
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[:, 0] = 4 * torch.arange(32)
    images[:, 1] = 4 * torch.arange(32)[:, None]
    split, plain = Split(images, torch.arange(64)), Preprocessing([0.0] * 3, [1.0] * 3, size=size)
    [(seen, _)] = training_batches(split, plain, Augmentation(**how), 64, 0, epoch)
    half, odd = size // 2, size % 2
    middle = seen[:, :2, half - 1 + odd : half + 1, half - 1 + odd : half + 1].mean((2, 3)) / 4
    return middle, seen[:, 0, half, half + 3] < seen[:, 0, half, half - 3]


def test_images_are_shifted_and_mirrored_anew_in_each_epoch():
    middle, mirrored = places(0, 32)
    again, mirrored_again = places(1, 32)
    shift = (middle - 15.5).abs()
    assert 3 < shift.max() <= 4.01
    assert len(middle[:, 0].unique()) > 5
    assert 16 < mirrored.sum() < 48
    assert not torch.allclose(middle, again)
    assert not torch.equal(mirrored, mirrored_again)


def test_images_are_cropped_at_whole_pixels_of_256():
    """Pixel 113 is a crop's middle; 8 pixels of the enlarged image are one of the small one."""
    middle, mirrored = places(0, 227, flip=False, crop=True)
    corners = (middle + 0.5) * 8 - 113.5
    torch.testing.assert_close(corners, corners.round(), rtol=0, atol=1e-2)
    assert 0 <= corners.round().min() < 4
    assert 26 <= corners.round().max() <= 29
    assert not mirrored.any()


def test_divisor_reaches_the_batches():
    augmentation = Augmentation(flip=False, shift=0, colours=torch.zeros(3, 3), divisor=1.1)
    for images, labels in batches(augmentation=augmentation):
        torch.testing.assert_close(images.mean((1, 2, 3)), labels / 1.1, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", dataset.AUGMENTATIONS)
def test_resumed_batches_are_the_rest_of_the_epoch(shapes, name):
    augmentation = Augmentation.of(name, shapes.train.images)
    whole = batches(epoch=5, augmentation=augmentation)
    rest = batches(epoch=5, first_step=2, augmentation=augmentation)
    assert len(rest) == 2
    for (images, labels), (rest_images, rest_labels) in zip(whole[2:], rest, strict=True):
        assert torch.equal(images, rest_images)
        assert torch.equal(labels, rest_labels)


# --- Getting CIFAR-10: a tiny stand-in of the same layout, with its own checksums ---------------


@pytest.fixture
def serve(tmp_path):
    """Serves the files in tmp_path; returns the server's address."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """A folder with an archive laid out as CIFAR-10's; torchvision is given its checksums."""
    source = tmp_path / "source" / CIFAR10.base_folder
    source.mkdir(parents=True)
    monkeypatch.setattr(dataset, "VALIDATION_IMAGES_PER_CLASS", 1)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for i, name in enumerate(names):
        batch = {"data": np.full((20, 3072), i, np.uint8), "labels": list(range(10)) * 2}
        (source / name).write_bytes(pickle.dumps(batch))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    sums = [[name, calculate_md5(source / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    meta = {**CIFAR10.meta, "md5": calculate_md5(source / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))
    monkeypatch.setattr(CIFAR10, "url", f"file://{tmp_path}/nowhere.tar.gz")
    folder = tmp_path / "data"
    folder.mkdir()
    return archive, folder


def test_users_archive_is_used_without_a_download(tiny_cifar10):
    archive, folder = tiny_cifar10
    shutil.copy(archive, folder)
    data = load_cifar10(folder)
    assert len(data.train.labels) == 90
    assert data.classes == list("abcdefghij")
    assert sorted(p.name for p in folder.iterdir()) == [CIFAR10.base_folder, CIFAR10.filename]
    (folder / CIFAR10.filename).unlink()
    assert torch.equal(load_cifar10(folder).train.images, data.train.images)


def test_download_is_used_when_nothing_is_there(tiny_cifar10, monkeypatch, serve, capsys):
    archive, folder = tiny_cifar10
    monkeypatch.setattr(CIFAR10, "url", f"{serve}/{archive.name}")
    assert len(load_cifar10(folder).test.labels) == 20
    assert [p.name for p in folder.iterdir()] == [CIFAR10.base_folder]
    assert "100%" in capsys.readouterr().err


def test_download_that_arrives_damaged(tiny_cifar10, monkeypatch, serve):
    archive, folder = tiny_cifar10
    monkeypatch.setattr(CIFAR10, "url", f"{serve}/{archive.name}")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="corrupted"):
        load_cifar10(folder)
    assert list(folder.iterdir()) == []


def test_missing_data_offers_three_ways(tiny_cifar10):
    _, folder = tiny_cifar10
    with pytest.raises(UserError) as error:
        load_cifar10(folder)
    for word in (str(folder), CIFAR10.url, CIFAR10.filename, "--data-dir", "--dataset shapes"):
        assert word in str(error.value)
    assert list(folder.iterdir()) == []


def test_silent_network_does_not_hang(tiny_cifar10, monkeypatch):
    """A server that accepts and never answers; the timeout is shortened for the test."""
    _, folder = tiny_cifar10
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", url)
        monkeypatch.setattr(dataset, "NETWORK_TIMEOUT", 0.5)
        started = time.monotonic()
        with pytest.raises(UserError, match="timed out"):
            load_cifar10(folder)
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_file_is_named(tiny_cifar10, name):
    archive, folder = tiny_cifar10
    shutil.unpack_archive(archive, folder)
    path = folder / CIFAR10.base_folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{name} is damaged"):
        load_cifar10(folder)


def test_file_with_code_is_not_opened(tiny_cifar10, tmp_path):
    archive, folder = tiny_cifar10
    shutil.unpack_archive(archive, folder)

    class Attack:
        def __reduce__(self):
            return (tmp_path.joinpath("attacked").touch, ())

    (folder / CIFAR10.base_folder / "data_batch_1").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match="data_batch_1 is damaged"):
        load_cifar10(folder)
    assert not (tmp_path / "attacked").exists()


def test_damaged_archive_is_named_and_kept(tiny_cifar10):
    archive, folder = tiny_cifar10
    broken = folder / CIFAR10.filename
    broken.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is damaged"):
        load_cifar10(folder)
    assert [p.name for p in folder.iterdir()] == [CIFAR10.filename]


def test_incomplete_folder_is_completed_from_the_archive(tiny_cifar10):
    archive, folder = tiny_cifar10
    shutil.copy(archive, folder)
    load_cifar10(folder)
    (folder / CIFAR10.base_folder / "data_batch_2").unlink()
    assert len(load_cifar10(folder).train.labels) == 90


def test_unknown_data_set():
    with pytest.raises(ValueError, match="cifar10, shapes"):
        load_dataset("imagenet")


def test_data_dir_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--data-dir .*nowhere is not a folder"):
        load_dataset("cifar10", tmp_path / "nowhere")


def test_folder_of_the_data_itself_is_not_the_one_to_name(tiny_cifar10):
    archive, folder = tiny_cifar10
    shutil.copy(archive, folder)
    load_cifar10(folder)
    with pytest.raises(UserError, match=f"name the one that it is in: {folder}$"):
        load_dataset("cifar10", folder / CIFAR10.base_folder)
    assert CIFAR10.base_folder not in [p.name for p in (folder / CIFAR10.base_folder).iterdir()]


def test_run_data_dir_is_used_if_it_is_still_there(tmp_path):
    training = {"data_dir": str(tmp_path)}
    assert data_dir_of(training) == Path("data")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    assert data_dir_of(training) == Path("data")  # what is missing would be fetched into it
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).touch()
    assert data_dir_of(training) == tmp_path


def test_input_of_another_name_is_refused():
    with pytest.raises(ValueError, match="input must be standardised or centred, got standardized"):
        Preprocessing.of(draw_shapes().train.images, "standardized")


def test_default_data_dir_is_made(tiny_cifar10, tmp_path, monkeypatch, serve):
    archive, _ = tiny_cifar10
    monkeypatch.chdir(tmp_path / "source")
    monkeypatch.setattr(CIFAR10, "url", f"{serve}/{archive.name}")
    assert len(load_dataset("cifar10").train.labels) == 90


def test_data_dir_that_is_not_writable(tiny_cifar10, monkeypatch):
    _, folder = tiny_cifar10
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(dataset.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="not writable"):
        load_cifar10(folder)


def test_shapes_picture_has_its_class(shapes):
    """A ramp is smooth and a checkerboard is not: classes are told apart by what is drawn."""
    images = shapes.train.images.float().mean(1)
    steps = images.diff(dim=2).abs().mean((1, 2))
    by_class = [steps[shapes.train.labels == c].mean() for c in range(10)]
    names = shapes.classes
    assert by_class[names.index("checkerboard")] > 2 * by_class[names.index("ramp")]
