import copy
import io
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import DEVICES, ROOT
from torch import nn

from model import AlexNet, LocalResponseNorm

# Paper §3.5 and Fig. 2: weights and biases, counted by hand from the filter sizes.
PARAMETERS = {
    "conv1": 34_944,
    "conv2": 614_656,
    "conv3": 885_120,
    "conv4": 1_327_488,
    "conv5": 884_992,
    "fc6": 37_752_832,
    "fc7": 16_781_312,
    "fc8": 40_970,
}
GROUPED = {"conv2": 307_456, "conv4": 663_936, "conv5": 442_624}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return AlexNet().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 227, 227, generator=torch.Generator().manual_seed(1))


def count_by_layer(network):
    return {
        name: sum(p.numel() for p in layer.parameters())
        for name, layer in network.named_children()
        if any(True for _ in layer.parameters())
    }


def on_meta(**settings):
    with torch.device("meta"):
        return AlexNet(**settings)


@pytest.mark.parametrize(
    ("settings", "changed", "total"),
    [
        ({}, {}, 58_322_314),
        ({"groups": 2}, GROUPED, 56_909_194),
        ({"groups": 2, "num_classes": 1000}, {**GROUPED, "fc8": 4_097_000}, 60_965_224),
    ],
)
def test_parameter_counts(settings, changed, total):
    counts = count_by_layer(on_meta(**settings))
    assert counts == {**PARAMETERS, **changed}
    assert sum(counts.values()) == total


def test_layer_output_shapes(network, images):
    shapes = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape}))
        for name, layer in network.named_children()
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    sides = {"conv1": 55, "norm1": 55, "pool1": 27, "conv2": 27, "norm2": 27, "pool2": 13}
    sides |= {"conv3": 13, "conv4": 13, "conv5": 13, "pool5": 6}
    channels = {"1": 96, "2": 256, "3": 384, "4": 384, "5": 256}
    for name, side in sides.items():
        assert shapes[name] == (2, channels[name[-1]], side, side), name
    assert shapes["fc6"] == shapes["fc7"] == (2, 4096)
    assert shapes["fc8"] == (2, 10)


# --- The forward pass in NumPy, float64, from the paper's description ---------------------------


def numpy_conv(x, weight, bias, stride=1, padding=0, groups=1):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    size = weight.shape[2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    windows = windows[:, :, ::stride, ::stride]
    out = [
        np.einsum("nchwij,ocij->nohw", part, filters, optimize=True)
        for part, filters in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups), strict=True
        )
    ]
    return np.concatenate(out, axis=1) + bias[:, None, None]


def numpy_pool(x):
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    return windows[:, :, ::2, ::2].max(axis=(4, 5))


def numpy_pool_2x2(x):
    """§3.4's alternative: squares side by side; an odd last row and column are left out."""
    side = x.shape[2] // 2
    squares = x[:, :, : 2 * side, : 2 * side].reshape(*x.shape[:2], side, 2, side, 2)
    return squares.max(axis=(3, 5))


def numpy_lrn(a, size=5, alpha=1e-4, beta=0.75, k=2.0):
    channels = a.shape[1]
    out = np.empty_like(a)
    for i in range(channels):
        window = slice(max(0, i - size // 2), min(channels, i + (size - 1) // 2 + 1))
        energy = (a[:, window] ** 2).sum(axis=1)
        out[:, i] = a[:, i] / (k + alpha / size * energy) ** beta
    return out


def numpy_lrn_as_printed(a):
    """§3.3 to the letter: k + alpha times the sum, with k = 2, n = 5, alpha = 1e-4, beta = 0.75."""
    out = np.empty_like(a)
    for i in range(a.shape[1]):
        energy = sum(a[:, j] ** 2 for j in range(max(0, i - 2), min(a.shape[1] - 1, i + 2) + 1))
        out[:, i] = a[:, i] / (2 + 1e-4 * energy) ** 0.75
    return out


def relu(x):
    return np.maximum(x, 0)


def numpy_alexnet(x, p, groups=1, activation=relu, norm=numpy_lrn, pool=numpy_pool):
    def conv(x, name, **settings):
        return activation(numpy_conv(x, p[f"{name}.weight"], p[f"{name}.bias"], **settings))

    def norm_each_tower(x):
        return np.concatenate([norm(tower) for tower in np.split(x, groups, axis=1)], axis=1)

    x = pool(norm_each_tower(conv(x, "conv1", stride=4)))
    x = pool(norm_each_tower(conv(x, "conv2", padding=2, groups=groups)))
    x = conv(x, "conv3", padding=1)
    x = conv(x, "conv4", padding=1, groups=groups)
    x = pool(conv(x, "conv5", padding=1, groups=groups))
    x = x.reshape(len(x), -1)
    x = activation(x @ p["fc6.weight"].T + p["fc6.bias"])
    x = activation(x @ p["fc7.weight"].T + p["fc7.bias"])
    return x @ p["fc8.weight"].T + p["fc8.bias"]


SWITCHED = [
    ({}, {}),
    (
        {"groups": 2, "activation": "tanh", "norm": "lrn-as-printed"},
        {"groups": 2, "activation": np.tanh, "norm": numpy_lrn_as_printed},
    ),
    (
        {"norm": "none", "pooling": "non-overlapping"},
        {"norm": lambda x: x, "pool": numpy_pool_2x2},
    ),
]


@pytest.mark.parametrize(("settings", "in_numpy"), SWITCHED, ids=[str(s) for s, _ in SWITCHED])
def test_forward_equals_numpy_in_float64(settings, in_numpy, images):
    network = AlexNet(**settings).double().eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    nn.init.normal_(network.fc8.weight)
    images = images[:1].double() * 100  # large activations, so that the normalisation matters
    with torch.no_grad():
        ours = network(images).numpy()
    weights = {name: weight.numpy() for name, weight in network.state_dict().items()}
    expected = numpy_alexnet(images.numpy(), weights, **in_numpy)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"groups": 2}, {"norm1", "conv2", "norm2", "conv4", "conv5"}),
        ({"activation": "tanh"}, {"activation"}),
        ({"norm": "lrn-as-printed"}, {"norm1", "norm2"}),
        ({"norm": "none"}, {"norm1", "norm2"}),
        ({"pooling": "non-overlapping"}, {"pool1", "pool2", "pool5"}),
        ({"norm": "lrn-at-work"}, {"norm1", "norm2"}),
        ({"dropout": 0.0}, {"drop6", "drop7"}),
        ({"dropout_scaling": "test"}, {"drop6", "drop7"}),
    ],
)
def test_switch_changes_its_layers_and_no_others(settings, changed):
    plain, switched = (on_meta(**s) for s in ({}, settings))
    layers = {name: str(layer) for name, layer in plain.named_children()}
    differing = {n for n, layer in switched.named_children() if str(layer) != layers[n]}
    assert differing == changed
    assert switched.config == {**plain.config, **settings}
    assert on_meta(**switched.config).config == switched.config
    assert switched(torch.empty(1, 3, 227, 227, device="meta")).shape == (1, 10)


# --- First weights ------------------------------------------------------------------------------

# Deviations by layer, conv1 to fc8: of He's rule by hand, sqrt(2 / inputs of a unit); of 2012 from
# layers/layers-145.cfg; as printed from §5.
DEVIATIONS = {
    "he": [(2 / n) ** 0.5 for n in (363, 2400, 2304, 3456, 3456, 9216, 4096)] + [0.001],
    "2012": [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01],
    "as-printed": [0.01] * 8,
}
BIASES = {"he": [0] * 8, "2012": [0, 1, 0, 1, 1, 1, 1, 0], "as-printed": [0, 1, 0, 1, 1, 1, 1, 0]}


@pytest.mark.parametrize("init", DEVIATIONS)
def test_first_weights_and_biases(init):
    network = AlexNet()
    if init != "he":  # the default
        network.reset_parameters(init)
    for name, deviation, bias in zip(PARAMETERS, DEVIATIONS[init], BIASES[init], strict=True):
        layer = network.get_submodule(name)
        weight, n = layer.weight.double(), layer.weight.numel()
        assert abs(weight.mean()) < 5 * deviation / n**0.5, name
        assert weight.std().item() == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5), name
        within = (weight.abs() < deviation).double().mean().item()
        assert within == pytest.approx(0.6827, abs=5 * (0.6827 * 0.3173 / n) ** 0.5), name
        assert (layer.bias == bias).all(), name


def test_unknown_init_is_a_clear_error(network):
    with pytest.raises(ValueError, match="init must be he or 2012 or as-printed, got uniform"):
        network.reset_parameters("uniform")


# --- Local response normalisation ---------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_lrn_equals_the_formula_and_its_gradient(size, channels):
    norm = LocalResponseNorm(size, alpha=0.3, beta=0.75, k=1.5)
    a = torch.randn(2, channels, 1, 2, dtype=torch.float64, requires_grad=True)
    expected = numpy_lrn(a.detach().numpy(), size, 0.3, 0.75, 1.5)
    np.testing.assert_allclose(norm(a).detach().numpy(), expected, rtol=1e-13)
    assert torch.autograd.gradcheck(norm, (a,))
    assert torch.autograd.gradgradcheck(norm, (a,))


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [(2, 7), (2, 7, 5), (2, 7, 3, 4), (2, 7, 2, 3, 4), (0, 7, 3, 3)])
def test_lrn_takes_any_shape_and_exponent(shape, beta):
    a = torch.randn(shape, dtype=torch.float64)
    ours = LocalResponseNorm(3, 0.1, beta, 2.0)(a)
    np.testing.assert_allclose(ours.numpy(), numpy_lrn(a.numpy(), 3, 0.1, beta, 2.0), rtol=1e-13)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lrn_equals_torch_in_float32(memory_format, groups):
    """Large enough that the batch is worked through in parts."""
    a = (torch.randn(8, 96, 55, 55) * 50).relu().to(memory_format=memory_format)
    grad = torch.randn_like(a)
    plain = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)

    def of_each_group(a):
        return torch.cat([plain(part) for part in a.split(96 // groups, dim=1)], dim=1)

    results = []
    for norm in (LocalResponseNorm(groups=groups), of_each_group):
        leaf = a.clone().requires_grad_()
        out = norm(leaf)
        out.backward(grad)
        results.append((out, leaf.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert ours.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lrn_of_groups_is_differentiable_twice(memory_format):
    norm = LocalResponseNorm(3, alpha=0.3, groups=2)
    a = torch.randn(2, 6, 1, 2, dtype=torch.float64).to(memory_format=memory_format)
    assert torch.autograd.gradcheck(norm, (a.requires_grad_(),))
    assert torch.autograd.gradgradcheck(norm, (a,))


def numpy_lrn_gradient(a, grad, size=5, alpha=1e-4, beta=0.75, k=2.0):
    """From the quotient rule, one pair of channels at a time."""
    channels = a.shape[1]
    out = np.zeros_like(a)
    for i in range(channels):
        window = range(max(0, i - size // 2), min(channels, i + (size - 1) // 2 + 1))
        d = k + alpha / size * sum(a[:, j] ** 2 for j in window)
        out[:, i] += grad[:, i] * d**-beta
        for j in window:
            inner = 2 * alpha / size * a[:, j]
            out[:, j] -= grad[:, i] * a[:, i] * beta * d ** (-beta - 1) * inner
    return out


# float32 rounds within 2^-24 of a value and bf16 within 2^-9; a result of the first took some dozen
# roundings, one of the second an exact one and its own. Relative to the largest value, as sums that
# cancel have no relative bound.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("device", DEVICES)
def test_lrn_is_within_rounding(device, dtype, bound):
    a = (torch.randn(4, 96, 13, 13, device=device) * 50).to(dtype).requires_grad_()
    grad = torch.randn_like(a)
    with torch.autocast(device, torch.bfloat16):
        ours = LocalResponseNorm()(a)
    ours.backward(grad)
    assert ours.dtype == a.grad.dtype == dtype
    exact, grad, ours, our_grad = (
        tensor.detach().cpu().double().numpy() for tensor in (a, grad, ours, a.grad)
    )
    np.testing.assert_allclose(ours, numpy_lrn(exact), rtol=bound)
    expected = numpy_lrn_gradient(exact, grad)
    np.testing.assert_allclose(our_grad, expected, rtol=0, atol=bound * np.abs(expected).max())


def test_lrn_takes_strided_input():
    a = torch.randn(2, 7, 6, 6, dtype=torch.float64)[:, :, ::2].requires_grad_()
    out = LocalResponseNorm(alpha=0.3)(a)
    np.testing.assert_allclose(
        out.detach().numpy(), numpy_lrn(a.detach().numpy(), alpha=0.3), rtol=1e-13
    )
    assert torch.autograd.gradcheck(LocalResponseNorm(alpha=0.3), (a,))


def test_lrn_gradient_of_another_memory_format():
    a = torch.randn(4, 8, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    a.requires_grad_()
    grad = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    LocalResponseNorm(alpha=0.3)(a).backward(grad)
    expected = numpy_lrn_gradient(a.detach().numpy(), grad.numpy(), alpha=0.3)
    np.testing.assert_allclose(a.grad.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups"), [(7, 1), (6, 2)])
def test_lrn_compiled_equals_uncompiled(channels, groups, memory_format):
    norm = LocalResponseNorm(size=4, alpha=0.3, groups=groups)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    a = torch.randn(2, channels, 3, 3, dtype=torch.float64).to(memory_format=memory_format)
    a.requires_grad_()
    grad = torch.randn_like(a)
    expected = norm(a)
    torch.testing.assert_close(compiled(a), expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(out, a, grad)[0] for out in (compiled(a), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_lrn_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="size must be at least 1"):
        LocalResponseNorm(size=0)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        LocalResponseNorm(groups=0)
    with pytest.raises(ValueError, match="7 channels cannot be split into 2 groups"):
        LocalResponseNorm(groups=2)(torch.ones(1, 7))
    with pytest.raises(TypeError, match=r"floating point numbers, got torch\.int64"):
        LocalResponseNorm()(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[N, C, \.\.\.\], got \[3\]"):
        LocalResponseNorm()(torch.ones(3))


def test_lrn_keeps_only_its_input_for_the_backward_pass():
    kept = []
    a = torch.randn(4, 96, 13, 13, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LocalResponseNorm()(a)
    assert [t.data_ptr() for t in kept] == [a.data_ptr()]


# --- A well-behaved module ----------------------------------------------------------------------


def test_state_dict_copy_and_pickle_keep_the_function(network, images):
    expected = network(images)
    restored = AlexNet().eval()
    restored.load_state_dict(network.state_dict())
    stored = io.BytesIO()
    pickle.dump(network, stored)
    stored.seek(0)
    for other in (restored, copy.deepcopy(network), pickle.load(stored)):
        assert torch.equal(other(images), expected)


def test_compiles_without_graph_breaks(network, images):
    # aot_eager traces forward and backward as inductor does, but needs no C++ compiler.
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), network(images))
    compiled(images).sum().backward()
    compiled_grad = network.conv1.weight.grad.clone()
    network.zero_grad()
    network(images).sum().backward()
    torch.testing.assert_close(compiled_grad, network.conv1.weight.grad, rtol=1e-4, atol=1e-4)
    network.zero_grad()


def test_exports_with_any_batch_size(network, images):
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    three = torch.cat([images, images[:1]])
    torch.testing.assert_close(exported.module()(three), network(three))


def test_on_meta_device_and_back():
    network = on_meta(groups=2)
    assert network(torch.empty(2, 3, 227, 227, device="meta")).shape == (2, 10)
    network.to_empty(device="cpu").reset_parameters()
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("shape", [(3, 227, 227), (1, 3, 224, 224), (1, 1, 227, 227), (1, 3)])
def test_wrong_input_shape_is_a_clear_error(network, shape):
    with pytest.raises(ValueError, match=r"\[N, 3, 227, 227\], got \["):
        network(torch.zeros(shape))


WRONG = [
    {"num_classes": 0},
    {"groups": 3},
    {"dropout": 1.0},
    {"activation": "sigmoid"},
    {"norm": "batch"},
    {"pooling": "mean"},
    {"dropout_scaling": "never"},
]


@pytest.mark.parametrize("settings", WRONG)
def test_wrong_setting_is_a_clear_error(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        on_meta(**settings)


def test_dropout_follows_the_relu_of_fc6_and_fc7(images):
    """§4.2: half the outputs of fc6 and fc7 are zero in training, the others doubled."""
    network = AlexNet().train()
    seen = {}
    for name in ("drop6", "drop7"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, inputs, out, name=name: seen.update({name: (inputs[0], out)})
        )
    network(images)
    for before, after in seen.values():
        assert (before >= 0).all()
        survived = after != 0
        torch.testing.assert_close(after[survived], 2 * before[survived])
        assert 0.4 < survived.sum() / (before > 0).sum() < 0.6


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_of_the_paper_scales_at_test_time(p):
    """§4.2: what is left in training stays, and at test time all outputs are multiplied."""
    layer = AlexNet(dropout=p, dropout_scaling="test").drop6
    x = torch.randn(100, 100)
    dropped = layer.train()(x)
    left = dropped != 0
    torch.testing.assert_close(dropped[left], x[left])
    assert left.double().mean() == pytest.approx(1 - p, abs=0.02)
    torch.testing.assert_close(layer.eval()(x), x * (1 - p))


def test_both_scalings_of_dropout_are_one_network_with_other_weights(images):
    """In float64: half the weights of fc7 and fc8 make up for outputs that are not halved."""
    paper = AlexNet(dropout_scaling="test").double().eval()
    ours = AlexNet().double().eval()
    ours.load_state_dict(paper.state_dict())
    with torch.no_grad():
        for layer in (ours.fc7, ours.fc8):
            layer.weight *= 0.5
        torch.testing.assert_close(ours(images.double()), paper(images.double()))


def test_lrn_at_work_is_lrn_of_activations_as_large_as_pixels(images):
    """In float64: the network whose activations are 64 times as large up to norm2, with "lrn"."""
    working = AlexNet(norm="lrn-at-work").double().eval()
    large = AlexNet().double().eval()
    for bias in (working.conv1.bias, working.conv2.bias):
        nn.init.normal_(bias)
    nn.init.normal_(working.fc8.weight)
    large.load_state_dict(working.state_dict())
    with torch.no_grad():
        large.conv1.bias *= 64
        large.conv2.bias *= 64
        large.conv3.weight /= 64
        logits = working(images.double())
        torch.testing.assert_close(large(64 * images.double()), logits)
        idle = AlexNet(norm="none").double().eval()
        idle.load_state_dict(working.state_dict())
        scaled = 2**-0.75  # what LRN multiplies small activations by
        idle.conv2.weight *= scaled
        idle.conv3.weight *= scaled
        assert (idle(images.double()) - logits).abs().max() > 0.1  # it does more than that


def test_first_loss_is_that_of_guessing(images):
    network = AlexNet()
    loss = nn.functional.cross_entropy(network(images), torch.tensor([0, 1]))
    assert abs(loss.item() - np.log(10)) < 0.3


def test_import_needs_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import model; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before "
        # Python's own too, but with the platform in its name.
        "if not name.startswith('_sysconfigdata')}; "
        "sys.exit(', '.join(new - {'model', 'gpu_kernels', 'torch', 'triton', "
        "*sys.stdlib_module_names}) or 0)"
    )
    command = [sys.executable, "-c", code]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_file_by_itself_is_enough(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    code = "import torch, model; print(model.AlexNet()(torch.zeros(1, 3, 227, 227)).shape)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("torch.Size([1, 10])\n", "")


@pytest.mark.parametrize(
    ("settings", "parameters", "products"),
    # Counted from the layers' sizes in the paper, §3.5 and Fig. 2.
    [
        ({}, 58_322_314, 1_131_201_056),
        ({"groups": 2, "num_classes": 1000}, 60_965_224, 724_406_816),
    ],
)
def test_summary_has_the_papers_sizes(settings, parameters, products):
    with torch.device("meta"):
        lines = AlexNet(**settings).summary().splitlines()
    assert lines[-1].split() == ["total", f"{parameters:,}", f"{products:,}"]
    sizes = {line.split()[0]: line[8:24].strip() for line in lines[1:-1]}
    assert sizes["conv1"] == sizes["norm1"] == "96 x 55 x 55"
    assert (sizes["pool2"], sizes["pool5"], sizes["fc7"]) == (
        "256 x 13 x 13",
        "256 x 6 x 6",
        "4096",
    )


def test_torchvision_has_another_network():
    with torch.device("meta"):
        ours, theirs = AlexNet(num_classes=1000), torchvision.models.alexnet()
    assert filters_and_parameters(ours) == ([96, 256, 384, 384, 256], 62_378_344)
    assert filters_and_parameters(theirs) == ([64, 192, 384, 256, 256], 61_100_840)
    assert not any("Norm" in type(layer).__name__ for layer in theirs.modules())
    first = theirs.features[0]
    assert (first.kernel_size, first.stride, first.padding) == ((11, 11), (4, 4), (2, 2))
    kinds = [type(layer).__name__ for layer in theirs.classifier]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]


def filters_and_parameters(network):
    filters = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return filters, sum(parameter.numel() for parameter in network.parameters())


def test_features_are_what_the_last_layer_sees():
    network = AlexNet().eval()
    images = torch.randn(2, 3, 227, 227)
    with torch.no_grad():
        features = network.features(images)
        expected = features @ network.fc8.weight.T + network.fc8.bias
        torch.testing.assert_close(network(images), expected)
    assert features.shape == (2, 4096)
    assert features.min() == 0
