"""The kernels for GPUs: on a GPU as they are, elsewhere interpreted by Triton (see conftest.py)."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dataset
import model
from dataset import Augmentation, Preprocessing, random_maps, resample
from model import AlexNet, LocalResponseNorm

kernels = pytest.importorskip("gpu_kernels", reason="there is no Triton")
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# float32 sums round some dozen times, the others once at the end; interpreted, bf16 is cut off.
BOUNDS = {torch.float32: 2**-20, torch.float16: 2**-10}
BOUNDS[torch.bfloat16] = 2**-8 if DEVICE != "cpu" else 2**-7


@pytest.fixture(autouse=True)
def _kernels_for_the_cpu_too(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(model, "_is_on_nvidia_gpu", lambda x: True)
    yield
    kernels.can_run.cache_clear()


def channels_last(*shape, dtype=torch.float32):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are launched, in order."""
    assert all(
        kernels.can_run(torch.device(DEVICE), dtype) for dtype in BOUNDS
    )  # launches one to find out
    names, launch = [], kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, *a, **k: names.append(kernel) or launch(kernel, *a, **k)
    )
    return names


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("size", "beta"), [(1, 0.75), (4, 0.75), (5, 0.75), (5, 1.0), (9, 0.75)])
@pytest.mark.parametrize(
    ("channels", "groups"), [(96, 1), (256, 1), (96, 2), (7, 1), (6, 2), (2, 2)]
)
def test_lrn_equals_float64(channels, groups, size, beta, dtype, launched):
    """Which test_model.py compares with the formula and its gradient."""
    norm = LocalResponseNorm(size, alpha=0.3, beta=beta, k=1.5, groups=groups)
    a = channels_last(2, channels, 5, 4, dtype=dtype)
    exact = a.detach().double().requires_grad_()
    out, expected = norm(a), norm(exact)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert len(launched) == 2
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.dtype == a.grad.dtype == dtype
    bound = BOUNDS[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=1e-6)
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=0, atol=bound * largest)


def test_lrn_of_as_many_channels_as_a_block_takes(launched):
    a = channels_last(1, kernels.MOST_CHANNELS, 1, 2)
    exact = a.detach().double()
    norm = LocalResponseNorm(alpha=0.3)
    torch.testing.assert_close(norm(a).double(), norm(exact), rtol=2**-20, atol=1e-6)
    assert len(launched) == 1
    norm(channels_last(1, kernels.MOST_CHANNELS + 1, 1, 2))
    assert len(launched) == 1


def test_lrn_takes_the_gradient_in_any_memory_format_and_an_empty_batch():
    norm = LocalResponseNorm(alpha=0.3)
    a = channels_last(2, 7, 5, 4)
    grad = torch.randn(2, 7, 5, 4, device=DEVICE)
    [ours] = torch.autograd.grad(norm(a), a, grad)
    exact = a.detach().double().requires_grad_()
    [expected] = torch.autograd.grad(norm(exact), exact, grad.double())
    torch.testing.assert_close(ours.double(), expected, rtol=2**-18, atol=1e-6)
    assert norm(channels_last(0, 7, 5, 4)).shape == (0, 7, 5, 4)


def test_operations_do_not_rely_on_a_promised_memory_format():
    a = torch.randn(2, 7, 5, 4, device=DEVICE)
    b = a.contiguous(memory_format=torch.channels_last)
    constants = 5, 1.0, 0.75, 2.0, 1
    out = kernels.local_response_norm(a, *constants)
    torch.testing.assert_close(out, F.local_response_norm(a, *constants[:4]))
    gradients = [kernels._local_response_norm_gradient(x, a, *constants) for x in (a, b)]
    assert torch.equal(*gradients)
    out, winner = kernels.max_pool(a, 3)
    assert torch.equal(out, F.max_pool2d(a, 3, 2))
    gradients = [
        kernels._max_pool_gradient(*tensors, 5, 4, 3)
        for tensors in ((out, winner), (out.contiguous(), winner.contiguous()))
    ]
    assert torch.equal(*gradients)


def test_operations_keep_torchs_rules():
    a = channels_last(2, 7, 5, 4)
    torch.library.opcheck(kernels.local_response_norm, (a, 5, 1.0, 0.75, 2.0, 1))
    torch.library.opcheck(kernels.max_pool, (a, 3))


def test_second_derivative_of_lrn_is_an_error():
    a = channels_last(1, 7, 2, 2)
    [grad] = torch.autograd.grad(LocalResponseNorm()(a).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), a)


@pytest.mark.parametrize("shape", [(2, 96, 13, 13), (2, 5, 7, 12), (1, 3, 6, 3), (0, 5, 7, 7)])
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_equals_torch(size, shape):
    """Also of equal values, which ReLU makes many of: both take the first."""
    x = channels_last(*shape).detach().relu().requires_grad_()
    grads = []
    for pool in (model._MaxPool2d(size), lambda x: F.max_pool2d(x, size, 2)):
        out = pool(x)
        torch.manual_seed(1)
        grads.append((out, *torch.autograd.grad(out, x, torch.randn_like(out))))
    (ours, our_grad), (theirs, their_grad) = grads
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(our_grad, their_grad)


def test_pooling_keeps_nan():
    x = channels_last(1, 3, 5, 5).detach()
    x[0, 1, 2, 2] = torch.nan
    out = model._MaxPool2d(3)(x)
    assert out.isnan().sum() == 4
    assert out[0, 1].isnan().all()
    x[0, 1, 2, 1] = torch.nan  # of two in a window both take the last
    x.requires_grad_()
    [ours] = torch.autograd.grad(model._MaxPool2d(3)(x), x, torch.ones_like(out))
    [theirs] = torch.autograd.grad(F.max_pool2d(x, 3, 2), x, torch.ones_like(out))
    assert torch.equal(ours, theirs)


def test_more_values_than_32_bits_count_are_left_to_torch(launched, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_VALUES", 2 * 7 * 5 * 4 - 1)
    a = channels_last(2, 7, 5, 4)
    assert torch.equal(model._MaxPool2d(3)(a), F.max_pool2d(a, 3, 2))
    LocalResponseNorm()(a)
    assert not launched


def test_image_smaller_than_its_window_is_an_error():
    with pytest.raises(RuntimeError, match="too small"):
        model._MaxPool2d(3)(channels_last(1, 3, 2, 2))


def test_machine_without_triton_is_told_once(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.")

    kernels.can_run.cache_clear()
    monkeypatch.setattr(kernels, "_launch", no_compiler)
    a = channels_last(1, 7, 3, 3)
    with pytest.warns(UserWarning, match=r"no Triton here \(Failed to find C compiler\.\)"):
        out = LocalResponseNorm()(a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(LocalResponseNorm()(a), out)
        assert torch.equal(model._MaxPool2d(3)(a), F.max_pool2d(a, 3, 2))


def test_exported_network_does_not_need_the_kernels(launched):
    network = AlexNet().eval().to(DEVICE, memory_format=torch.channels_last)
    images = channels_last(1, 3, 227, 227).detach()
    exported = torch.export.export(network, (images,))
    assert "alexnet." not in exported.graph_module.code
    exported.module()(images)
    assert not launched


def test_resampling_equals_grid_sample_in_float64():
    """Turned, zoomed, mirrored, and moved so far that the edges reflect more than once."""
    images = torch.randn(3, 3, 32, 24, device=DEVICE)
    maps = torch.tensor(
        [
            [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
            [[-0.9, 0.3, 2.5], [0.2, 1.1, -3.2]],
            [[0.5, -2.0, -0.4], [1.7, 0.8, 5.1]],
        ],
        device=DEVICE,
    )
    grid = F.affine_grid(maps.double(), [3, 3, 55, 55], align_corners=False)
    expected = F.grid_sample(images.double(), grid, padding_mode="reflection", align_corners=False)
    ours = kernels.resample(images, maps, 55)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_batches_are_made_by_the_kernel(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    maps = random_maps(2, Augmentation(rotation=15.0, zoom=1.2), generator).to(DEVICE)
    preprocessing = Preprocessing([120.0] * 3, [60.0] * 3, size=55)
    calls, kernel = [], kernels.resample
    monkeypatch.setattr(kernels, "resample", lambda *a: calls.append(a) or kernel(*a))
    ours = resample(images, maps, preprocessing)
    assert len(calls) == 1
    monkeypatch.setattr(dataset, "kernels_for", lambda x: None)
    torch.testing.assert_close(ours, resample(images, maps, preprocessing), rtol=0, atol=1e-4)


def test_conv1_over_squares_is_the_convolution():
    x = torch.randn(2, 3, 227, 227, dtype=torch.float64)
    conv = nn.Conv2d(3, 96, 11, stride=4, dtype=torch.float64)
    ours = model._convolve_squares(x, conv.weight, conv.bias)
    torch.testing.assert_close(ours, conv(x), rtol=1e-12, atol=1e-12)


def test_compiled_network_takes_the_kernels_and_learns_the_same(launched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if DEVICE == "cpu":  # fewer blocks to interpret
        monkeypatch.setattr(kernels, "BLOCK_VALUES", {"norm": 2**16, "pool": 2**16})
    network = AlexNet(dropout=0.0).to(DEVICE, memory_format=torch.channels_last)
    image, label = channels_last(1, 3, 227, 227).detach(), torch.tensor([1], device=DEVICE)

    def loss_and_gradients(network):
        loss = F.cross_entropy(network(image), label)
        return loss, *torch.autograd.grad(loss, list(network.parameters()))

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    loss, *grads = loss_and_gradients(compiled)
    assert len(launched) == 2 * (2 + 3)  # forward and backward: two normalisations, three poolings
    monkeypatch.setattr(model, "_has_kernels", lambda x, groups: False)
    expected_loss, *expected = loss_and_gradients(network)
    assert len(launched) == 10
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    # A GPU's convolutions may differ in rounding, which chooses among nearly equal values to pool.
    gradient_bound = 1e-4 if DEVICE == "cpu" else 0.01
    for ours, theirs in zip(grads, expected, strict=True):
        assert torch.linalg.norm(ours - theirs) < gradient_bound * torch.linalg.norm(theirs)
