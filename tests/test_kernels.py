"""kernels/: the numbers of model.py and transforms.py from faster code.

The kernels for NVIDIA GPUs run on a GPU if there is one, else in Triton's interpreter, which
conftest.py chooses.
"""

import copy
import importlib
import importlib.util
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, read_rows
from tiny import IMAGE_SIZE, TinyAlexNet
from torch import nn

import kernels
import model
import transforms
from kernels import FastConv1, FastLocalResponseNorm, FastMaxPool2d, accelerate
from model import AlexNet, LocalResponseNorm
from transforms import Preprocessing

nvidia = kernels.nvidia
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
# Relative to the largest value. In float32 some dozen results are rounded one after the other, in
# half precision one more at the end; Triton's interpreter cuts bf16 off.
BOUNDS = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LAYOUTS = {
    "contiguous": lambda a: a,
    "channels last": lambda a: a.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda a: a.repeat_interleave(2, dim=1)[:, ::2],
}


def channels_last(*shape, dtype=torch.float32):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def assert_lrn_is_the_formula(a, bound, **settings):
    """Compare output and gradient with those of model.py in float64."""
    settings = {"alpha": 0.3, "k": 1.5, **settings}
    a.requires_grad_()
    exact = a.detach().double().requires_grad_()
    out, expected = FastLocalResponseNorm(**settings)(a), LocalResponseNorm(**settings)(exact)
    grad = torch.randn(a.shape, device=a.device).to(a.dtype)  # contiguous, whatever a is
    grads = torch.autograd.grad(out, a, grad), torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in ((out, expected), *zip(*grads, strict=True)):
        assert (ours.dtype, ours.shape) == (a.dtype, a.shape)
        largest = theirs.abs().max().item() if len(a) else 0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound * largest)


def logits_and_gradients(network, images):
    logits = network(images)
    return [logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))]


@pytest.fixture
def tiny_network(monkeypatch):
    """Make networks of 67x67 images whose activations are so large that LRN matters."""
    monkeypatch.setattr(model, "IMAGE_SIZE", IMAGE_SIZE)

    def make(groups=1):
        network = TinyAlexNet(groups=groups, dropout=0.0)
        nn.init.normal_(network.features.conv1.bias, std=100)
        nn.init.normal_(network.classifier.fc8.weight)
        return network

    return make


# --- accelerate() -------------------------------------------------------------------------------


def test_accelerate_changes_six_classes_and_nothing_else():
    with torch.device("meta"):
        network = AlexNet()
    hook = network.features.norm1.register_forward_hook(lambda *_: None)
    classes = {name: type(layer) for name, layer in network.named_modules()}
    parameters = dict(network.named_parameters())
    assert accelerate(accelerate(network)) is network
    changed = dict.fromkeys(["features.norm1", "features.norm2"], FastLocalResponseNorm)
    changed |= dict.fromkeys([f"features.pool{i}" for i in (1, 2, 5)], FastMaxPool2d)
    changed["features.conv1"] = FastConv1
    now = {name: type(layer) for name, layer in network.named_modules()}
    assert now == {**classes, **changed}
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert list(network.state_dict()) == list(parameters)
    assert hook.id in network.features.norm1._forward_hooks


def test_accelerate_leaves_other_layers_alone():
    pools = [nn.MaxPool2d(3), nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, ceil_mode=True)]
    layers = [*pools, nn.Conv2d(3, 8, 11, stride=4, padding=2), nn.LocalResponseNorm(5)]
    classes = [type(layer) for layer in layers]
    assert [type(layer) for layer in accelerate(nn.Sequential(*layers))] == classes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("groups", [1, 2])
def test_accelerated_network_equals_the_plain_one(
    tiny_network, groups, dtype, bound, memory_format
):
    plain = tiny_network(groups).to(dtype=dtype, memory_format=memory_format)
    fast = accelerate(copy.deepcopy(plain))
    images = torch.randn(3, 3, 67, 67, dtype=dtype).to(memory_format=memory_format)
    pairs = (logits_and_gradients(network, images) for network in (fast, plain))
    for ours, theirs in zip(*pairs, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


# --- LRN on a CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), *BOUNDS.items()])
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((5, 7, 3, 4), {}),
        ((3, 6, 3, 2), {"size": 4, "groups": 2}),
        ((2, 6, 1, 1), {"size": 9, "groups": 3}),
        ((4, 5), {"size": 1, "beta": 0.5}),
        ((2, 6, 2, 3, 2), {"beta": 1.0, "groups": 2}),
        ((0, 7, 3, 3), {}),
    ],
)
def test_lrn_on_a_cpu_equals_the_formula(monkeypatch, shape, settings, dtype, bound, layout):
    monkeypatch.setattr(kernels.cpu, "PART_VALUES", 50)  # several parts, the last one smaller
    a = LAYOUTS[layout](torch.randn(shape).to(dtype))
    assert_lrn_is_the_formula(a, bound, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lrn_on_a_cpu_is_differentiable_twice(layout):
    a = LAYOUTS[layout](torch.randn(2, 6, 1, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(FastLocalResponseNorm(size=3, alpha=0.3, groups=2), a)


def test_compiled_lrn_is_the_plain_formula_on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "local_response_norm", None)  # calling it is an error
    norm = FastLocalResponseNorm(size=4, alpha=0.3, groups=2)
    a = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    out = torch.compile(norm, fullgraph=True, backend="aot_eager")(a)
    expected = LocalResponseNorm(size=4, alpha=0.3, groups=2)(a)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(y.square().sum(), a)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


# --- Without the folder, without Triton ---------------------------------------------------------


def test_program_without_the_folder_trains_the_same(tiny, tmp_path):
    (tmp_path / "tests").mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "tests" / "tiny.py"):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    options = ["--dataset", "shapes", "--batch-size", "8", "--precision", "fp32", "--epochs", "1"]
    command = [sys.executable, "tests/tiny.py", *options, "--device", "cpu", "--output-dir", "a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tiny(*options, "--output-dir", "b") == 0
    [without], [with_kernels] = (read_rows(tmp_path / run / "metrics.csv") for run in "ab")
    for column in ("train_loss", "val_loss"):
        assert float(without[column]) == pytest.approx(float(with_kernels[column]), rel=1e-4)


@pytest.mark.parametrize("code", ["import no_such_module", "from model import no_such_name"])
def test_broken_folder_is_an_error(monkeypatch, tmp_path, code):
    (tmp_path / "kernels.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    spec = importlib.util.spec_from_file_location("utils_anew", ROOT / "utils.py")
    with pytest.raises(ImportError, match="no_such_"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_missing_triton_is_skipped_and_a_damaged_one_is_an_error(monkeypatch):
    for name in ("kernels", "kernels.cpu", "kernels.nvidia"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton.language", None)  # importing it is an error
    if nvidia is not None:
        with pytest.raises(ModuleNotFoundError, match=r"triton\.language"):
            importlib.import_module("kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert importlib.import_module("kernels").nvidia is None


# --- NVIDIA GPUs --------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Let the kernels take tensors on DEVICE; return the list of those that are launched."""
    if nvidia is None:
        pytest.skip("there is no Triton")
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_runs_triton", lambda x: x.dtype in BOUNDS)
    else:
        assert all(nvidia.can_run(torch.device(DEVICE), dtype) for dtype in BOUNDS)
    names, launch = [], nvidia._launch
    monkeypatch.setattr(
        nvidia, "_launch", lambda kernel, *a: names.append(kernel.__name__) or launch(kernel, *a)
    )
    return names


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 96, 5, 4), {}),
        ((2, 256, 2, 3), {"groups": 2}),
        ((2, 6, 5, 4), {"groups": 2, "size": 9}),
        ((1, 7, 3, 3), {"size": 4, "beta": 1.0}),
        ((2, 2, 3, 3), {"groups": 2, "size": 1}),
        ((0, 7, 5, 4), {}),
    ],
)
def test_lrn_kernels_equal_the_formula(launched, shape, settings, dtype):
    assert_lrn_is_the_formula(channels_last(*shape, dtype=dtype), BOUNDS[dtype], **settings)
    assert launched == ["_normalize", "_differentiate"] or 0 in shape


@pytest.mark.parametrize("shape", [(2, 96, 13, 13), (2, 5, 7, 12), (1, 3, 6, 3), (0, 5, 7, 7)])
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_kernels_equal_torch(launched, size, shape):
    """Also where values are equal, of which ReLU makes many, or NaN."""
    x = channels_last(*shape).relu()
    x[:1, 1, 2:, 1:3] = torch.nan
    x.requires_grad_()
    out, expected = FastMaxPool2d(size, 2)(x), F.max_pool2d(x, size, 2)
    grad = torch.randn_like(out)
    grads = [torch.autograd.grad(y, x, grad)[0] for y in (out, expected)]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(*grads)
    assert launched == ["_pool", "_unpool"] or 0 in shape


def test_resampling_kernel_equals_grid_sample_in_float64(launched):
    """Turned, zoomed, mirrored, and moved so far that the edges reflect more than once."""
    images = torch.randint(0, 256, (3, 3, 32, 24), dtype=torch.uint8, device=DEVICE)
    maps = [[[1, 0, 0], [0, 1, 0]], [[-0.9, 0.3, 2.5], [0.2, 1.1, -3.2]]]
    maps = torch.tensor([*maps, [[0.5, -2, -0.4], [1.7, 0.8, 5.1]]], device=DEVICE)
    grid = F.affine_grid(maps.double(), [3, 3, 55, 55], align_corners=False)
    normalized = (images.double() - 120) / 60
    expected = F.grid_sample(normalized, grid, padding_mode="reflection", align_corners=False)
    ours = transforms.resample(images, maps, Preprocessing([120.0] * 3, [60.0] * 3, size=55))
    assert torch.equal(ours, nvidia.resample(normalized.float(), maps, 55))
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_conv1_over_squares_of_pixels_is_the_convolution(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    conv = nn.Conv2d(3, 96, 11, stride=4, dtype=torch.float64)
    x = torch.randn(2, 3, 67, 75, dtype=torch.float64)
    expected = conv(x)
    sizes, convolve = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *rest: sizes.append(x.shape) or convolve(x, *rest))
    ours = accelerate(nn.Sequential(conv))(x.as_subclass(OnGPU)).as_subclass(torch.Tensor)
    assert sizes == [(2, 48, 17, 19)]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("limit", "most"), [("MAX_CHANNELS", 7), ("MAX_VALUES", 280)])
def test_activations_beyond_a_kernels_limits_are_left_to_torch(launched, monkeypatch, limit, most):
    for value, names in ((most, ["_normalize", "_pool"]), (most - 1, [])):
        monkeypatch.setattr(nvidia, limit, value)
        launched.clear()
        FastLocalResponseNorm()(channels_last(2, 7, 5, 4))
        FastMaxPool2d(3, 2)(channels_last(2, 7, 5, 4))
        assert launched == names


def test_operations_keep_torchs_rules_in_any_memory_format(launched):
    """torch.compile may promise a format that the tensor does not have."""
    for a in (channels_last(2, 7, 5, 4), torch.randn(2, 7, 5, 4, device=DEVICE)):
        a.requires_grad_()
        torch.library.opcheck(nvidia.local_response_norm, (a, 5, 1.0, 0.75, 2.0, 1))
        torch.library.opcheck(nvidia.max_pool, (a, 3))
        out = nvidia.local_response_norm(a, 5, 1.0, 0.75, 2.0, 1)
        torch.testing.assert_close(out, F.local_response_norm(a, 5, 1.0, 0.75, 2.0))
        assert torch.equal(nvidia.max_pool(a, 3)[0], F.max_pool2d(a, 3, 2))


def test_machine_that_cannot_run_triton_is_told_once(launched, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler.\nand more")

    nvidia.can_run.cache_clear()
    monkeypatch.setattr(nvidia, "_launch", no_compiler)
    with pytest.warns(UserWarning, match=r"no Triton here \(Failed to find C compiler\.\)"):
        assert not nvidia.can_run(torch.device(DEVICE), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not nvidia.can_run(torch.device(DEVICE), torch.float32)
    nvidia.can_run.cache_clear()


def test_network_takes_the_kernels_compiled_or_not(launched, tiny_network, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = tiny_network().to(DEVICE, memory_format=torch.channels_last)
    images = channels_last(2, 3, 67, 67)
    expected = logits_and_gradients(plain, images)
    fast = accelerate(copy.deepcopy(plain))
    for network in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        launched.clear()
        results = logits_and_gradients(network, images)
        counts = [launched.count(k) for k in ("_normalize", "_pool", "_differentiate", "_unpool")]
        assert counts == [2, 3, 2, 3]
        for ours, theirs in zip(results, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_exported_network_does_not_need_the_kernels(launched, tiny_network):
    network = accelerate(tiny_network()).eval().to(DEVICE, memory_format=torch.channels_last)
    images = channels_last(1, 3, 67, 67)
    exported = torch.export.export(network, (images,))
    assert "alexnet." not in exported.graph_module.code
    exported.module()(images)
    assert not launched
