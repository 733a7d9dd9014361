"""model.py: its numbers against the paper's, its arithmetic against a network written here."""

import copy
import math
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from model import AlexNet, LocalResponseNorm, init_weights

FEATURES = "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 "
FEATURES += "pool5"
CLASSIFIER = "fc6 relu6 drop6 fc7 relu7 drop7 fc8"
# Weights and biases, counted by hand from the sizes of the filters (paper §3.5, Fig. 2).
PARAMETERS = {"conv1": 34_944, "conv2": 614_656, "conv3": 885_120, "conv4": 1_327_488}
PARAMETERS |= {"conv5": 884_992, "fc6": 37_752_832, "fc7": 16_781_312, "fc8": 40_970}
IN_TOWERS = {"conv2": 307_456, "conv4": 663_936, "conv5": 442_624}
SIZES = {"conv1": "96 x 55 x 55", "norm1": "96 x 55 x 55", "pool1": "96 x 27 x 27"}
SIZES |= {"conv2": "256 x 27 x 27", "norm2": "256 x 27 x 27", "pool2": "256 x 13 x 13"}
SIZES |= {"conv3": "384 x 13 x 13", "conv4": "384 x 13 x 13", "conv5": "256 x 13 x 13"}
SIZES |= {"pool5": "256 x 6 x 6", "fc6": "4096", "fc7": "4096", "fc8": "10"}
# Standard deviations and biases of conv1 to fc8. "he": sqrt(2 / inputs of a unit), by hand.
# "2012": layers/layers-145.cfg of the 2012 source.
INIT = {
    "he": ([(2 / n) ** 0.5 for n in (363, 2400, 2304, 3456, 3456, 9216, 4096)] + [0.001], [0] * 8),
    "2012": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return AlexNet().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 227, 227, generator=torch.Generator().manual_seed(1))


def on_meta(**settings):
    with torch.device("meta"):
        return AlexNet(**settings)


def layers(network):
    return dict([*network.features.named_children(), *network.classifier.named_children()])


@pytest.mark.parametrize(
    ("settings", "changed", "total"),
    [
        ({}, {}, 58_322_314),
        ({"groups": 2}, IN_TOWERS, 56_909_194),
        ({"groups": 2, "num_classes": 1000}, {**IN_TOWERS, "fc8": 4_097_000}, 60_965_224),
    ],
)
def test_parameter_counts_are_the_papers(settings, changed, total):
    network = on_meta(**settings)
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in layers(network).items()}
    assert {name: count for name, count in counts.items() if count} == {**PARAMETERS, **changed}
    assert sum(p.numel() for p in network.parameters()) == total


def test_layers_have_the_literatures_names_in_order():
    network = on_meta()
    assert [name for name, _ in network.named_children()] == ["features", "classifier"]
    for part, names in ((network.features, FEATURES), (network.classifier, CLASSIFIER)):
        assert type(part) is nn.Sequential
        assert [name for name, _ in part.named_children()] == names.split()
    assert network.features[0] is network.features.conv1
    assert not any(layer.inplace for layer in network.modules() if isinstance(layer, nn.ReLU))


def paper_lrn(a, size=5, alpha=1e-4, beta=0.75, k=2.0, groups=1):
    """§3.3, channel by channel and tower by tower; alpha / size is the 2012 source's."""
    out = []
    for tower in a.chunk(groups, dim=1):
        for i in range(tower.shape[1]):
            window = tower[:, max(0, i - size // 2) : i + (size - 1) // 2 + 1]
            out.append(tower[:, i] / (k + alpha / size * (window**2).sum(1)) ** beta)
    return torch.stack(out, dim=1)


def paper_network(p, x, towers):
    """§3.1 to §3.5 and Fig. 2 from windows and sums; outputs of fc6 and fc7 are halved (§4.2)."""

    def conv(x, name, stride=1, padding=0, towers=1):
        weight, bias = p[f"features.{name}.weight"], p[f"features.{name}.bias"]
        size = weight.shape[-1]
        windows = F.pad(x, [padding] * 4).unfold(2, size, stride).unfold(3, size, stride)
        parts = zip(windows.chunk(towers, dim=1), weight.chunk(towers), strict=True)
        sums = [torch.einsum("nchwij,ocij->nohw", part, filters) for part, filters in parts]
        return (torch.cat(sums, dim=1) + bias[:, None, None]).clamp(min=0)

    def pool(x):
        return x.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))

    def full(x, name):
        return x @ p[f"classifier.{name}.weight"].T + p[f"classifier.{name}.bias"]

    x = pool(paper_lrn(conv(x, "conv1", stride=4), groups=towers))
    x = pool(paper_lrn(conv(x, "conv2", padding=2, towers=towers), groups=towers))
    x = conv(x, "conv3", padding=1)
    x = conv(x, "conv4", padding=1, towers=towers)
    x = pool(conv(x, "conv5", padding=1, towers=towers)).flatten(1)
    x = full(x, "fc6").clamp(min=0) / 2
    x = full(x, "fc7").clamp(min=0) / 2
    return full(x, "fc8")


@pytest.mark.parametrize("towers", [1, 2])
def test_forward_and_gradients_equal_the_paper_in_float64(towers):
    network = AlexNet(groups=towers).double().eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "fc8" in name:
            nn.init.normal_(parameter)
    parameters = dict(network.named_parameters())
    image = 100 * torch.randn(1, 3, 227, 227, dtype=torch.float64)  # large, so that LRN matters
    image.requires_grad_()
    direction = torch.randn(1, 10, dtype=torch.float64)
    results = []
    for logits in (network(image), paper_network(parameters, image, towers)):
        grads = torch.autograd.grad(logits, [image, *parameters.values()], direction)
        results.append([logits, *grads])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-13 * expected.norm()


@pytest.mark.parametrize("shape", [(3, 227, 227), (1, 3, 224, 224), (1, 1, 227, 227), (1, 3)])
def test_another_size_is_one_clear_error(network, shape):
    for call in (network, network.embed):
        with pytest.raises(ValueError, match=r"of shape \[N, 3, 227, 227\], got \[.*\]$") as error:
            call(torch.zeros(shape))
        assert str(list(shape)) in str(error.value)


def test_embed_gives_the_activations_of_fc7(network, images):
    outputs = []
    hook = network.classifier.fc7.register_forward_hook(lambda _, __, out: outputs.append(out))
    network(images)
    hook.remove()
    assert outputs[0].shape == (2, 4096)
    assert torch.equal(network.embed(images), outputs[0].clamp(min=0))


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_keeps_values_in_training_and_scales_them_at_test_time(p):
    x = torch.randn(100)
    network = on_meta(dropout=p)
    for layer in (network.classifier.drop6, network.classifier.drop7):
        dropped = layer.train()(x.expand(10_000, 100))
        left = dropped != 0
        torch.testing.assert_close(dropped[left], x.expand(10_000, 100)[left])
        assert left.double().mean() == pytest.approx(1 - p, abs=0.003)
        torch.testing.assert_close(layer.eval()(x), (1 - p) * x)
        torch.testing.assert_close(dropped.mean(0), layer(x), rtol=0.05, atol=0)


@pytest.mark.parametrize("scheme", INIT)
def test_initial_weights_are_normal_with_the_schemes_deviations_and_biases(network, scheme):
    if scheme != "he":  # the constructor's
        network = copy.deepcopy(network)
        init_weights(network, scheme)
    for name, deviation, bias in zip(PARAMETERS, *INIT[scheme], strict=True):
        weight, n = layers(network)[name].weight, layers(network)[name].weight.numel()
        assert abs(weight.mean()) < 5 * deviation / n**0.5, name
        assert weight.std().item() == pytest.approx(deviation, rel=5 / (2 * n) ** 0.5), name
        within = (weight.abs() < deviation).double().mean().item()
        assert within == pytest.approx(0.6827, abs=5 * 0.4655 / n**0.5), name
        assert (layers(network)[name].bias == bias).all(), name


def test_another_scheme_is_a_clear_error(network):
    with pytest.raises(ValueError, match="scheme must be he or 2012, got uniform"):
        init_weights(network, "uniform")


def test_loss_starts_near_that_of_guessing(network, images):
    loss = F.cross_entropy(network(images), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(math.log(10), abs=0.1)


# --- Local response normalization ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 7), {}),
        ((2, 7, 5), {"size": 4, "beta": 0.5}),
        ((1, 6, 3, 2), {"size": 3, "groups": 2}),
        ((1, 4, 1, 3, 2), {"size": 2}),
        ((2, 6, 1, 2), {"size": 9, "groups": 3}),
        ((2, 1, 2, 2), {"size": 1, "beta": 1.0}),
    ],
)
def test_lrn_and_its_derivatives_equal_the_formula_in_float64(shape, settings):
    settings = {"alpha": 0.3, "k": 1.5, **settings}
    norm = LocalResponseNorm(**settings)
    a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(a), paper_lrn(a, **settings), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(norm, a)
    assert torch.autograd.gradgradcheck(norm, a)


@pytest.mark.parametrize("size", [4, 5])
def test_lrn_equals_torchs(size):
    a = (50 * torch.randn(2, 96, 9, 9)).requires_grad_()
    grad = torch.randn_like(a)
    norms = LocalResponseNorm(size), nn.LocalResponseNorm(size, 1e-4, 0.75, 2.0)
    ours, theirs = ((norm(a), *torch.autograd.grad(norm(a), a, grad)) for norm in norms)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lrn_rounds_half_precision_once(dtype):
    a = (300 * torch.randn(2, 96, 5, 5)).to(dtype)  # float16 ends below the squares
    ours = LocalResponseNorm()(a)
    assert ours.dtype == dtype
    half_a_step = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), paper_lrn(a.double()), rtol=half_a_step, atol=1e-7)


# --- What one does with a network ---------------------------------------------------------------


# Parameters and multiply-adds for one image, counted by hand.
@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({}, ["58,322,314", "1,131,201,056"]),
        ({"groups": 2, "num_classes": 1000}, ["60,965,224", "724,406,816"]),
    ],
)
def test_summary_has_the_papers_numbers(settings, total):
    lines = on_meta(**settings).summary().splitlines()
    sizes = {line.split()[0]: line[8:24].strip() for line in lines[1:-1]}
    assert sizes == {**SIZES, "fc8": str(settings.get("num_classes", 10))}
    assert lines[-1].split() == ["total", *total]


def test_summary_is_right_after_layers_were_replaced():
    network = on_meta()
    network.features.norm1 = nn.BatchNorm2d(96)
    network.classifier.fc8 = nn.Linear(4096, 5)
    lines = {line.split()[0]: line.split() for line in network.summary().splitlines()}
    assert lines["norm1"][1:] == ["96", "x", "55", "x", "55", "192"]
    assert lines["fc8"][1:] == ["5", "20,485", "20,480"]
    assert lines["total"][1:] == ["58,302,021", "1,131,180,576"]


def test_summary_leaves_the_network_untouched(network):
    def state():
        tensors = {name: (t.data_ptr(), t._version) for name, t in network.state_dict().items()}
        return tensors, [(m.training, len(m._forward_hooks)) for m in network.modules()]

    calls = []
    hook = network.classifier.fc8.register_forward_hook(lambda *_: calls.append(1))
    network.train()
    before = state()
    network.summary()
    after = state()
    network.eval()
    hook.remove()
    assert after == before
    assert not calls


def test_replaced_layers_work_in_training_and_evaluation(network, images):
    network = copy.deepcopy(network).train()
    network.features.relu1 = nn.Tanh()
    network.features.norm1 = nn.BatchNorm2d(96)
    network.features.norm2 = nn.Identity()
    network.features.pool5 = nn.AvgPool2d(3, 2)
    network.classifier.fc8 = nn.Linear(4096, 5)
    loss = F.cross_entropy(network(images), torch.tensor([0, 4]))
    grads = torch.autograd.grad(loss, list(network.parameters()))
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    assert network.features.norm1.num_batches_tracked == 1
    assert network.eval()(images).shape == (2, 5)


def test_copies_pickles_and_state_dicts_compute_the_same(network, images):
    restored = on_meta().to_empty(device="cpu").eval()
    restored.load_state_dict(network.state_dict())
    expected = network(images)
    for other in (restored, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images), expected)


def test_exports_with_any_batch_size(network, images):
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    three = torch.cat([images, images[:1]])
    torch.testing.assert_close(exported.module()(three), network(three))


def test_file_alone_needs_nothing_but_torch(tmp_path):
    shutil.copy(ROOT / "model.py", tmp_path)
    code = (
        "import sys, torch; before = set(sys.modules); from model import AlexNet; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(new - {'model', 'torch', *sys.stdlib_module_names}); "
        "print(AlexNet()(torch.zeros(2, 3, 227, 227)).shape)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\ntorch.Size([2, 10])\n", "")
