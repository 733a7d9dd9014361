"""The loop of train.py: learning rate, optimizer, and what a step computes and waits for."""

import contextlib
import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny as tiny_module
import torch
import torch.nn.functional as F
from conftest import DEVICES, needs_gpu, read_rows, run_python, same

import dataset
import optimizers
import run as run_module
import train
from dataset import draw_shapes
from distributed import Processes
from evaluate import loss_and_accuracy
from model import AlexNet
from optimizers import cosine_lr, make_optimizer, plateau_lr
from predict import Classifier
from recipes import new_config
from transforms import Mix, to_channels_last

NO_STOP = SimpleNamespace(signal=0)


def make_run(folder, device="cpu", **overrides):
    """Return a run on shapes at its start, which prints nothing."""
    settings = {"dataset": "shapes", "epochs": 1, "batch_size": 8, "precision": "fp32"}
    config = new_config(settings | overrides)
    run = train.make_run(folder, config, draw_shapes(), torch.device(device), Processes())
    run.quiet = True
    return run


@pytest.fixture
def small(monkeypatch):
    tiny_module.shrink(monkeypatch.setattr)


# --- Learning rate ---


def test_warm_up_and_cosine_are_one_cycle():
    """As torch's, which starts and ends at 1e-9 of the peak and counts from its first step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1)
    divisors = {"div_factor": 1e9, "final_div_factor": 1}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 1000, pct_start=0.3, **divisors)
    expected = []
    for _ in range(1000):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 1000:
            schedule.step()
    rates = [cosine_lr(step, 1000, 0.1, 0.3) for step in range(1000)]
    assert rates[299:] == pytest.approx(expected[299:], abs=3e-4)
    assert rates[:300] == pytest.approx([0.1 * (step + 1) / 300 for step in range(300)])  # linear
    for total in (1, 2, 5):
        assert all(0 < cosine_lr(step, total, 0.1, 0.05) <= 0.1 for step in range(total))


@pytest.mark.parametrize(
    ("accuracies", "divisions"),
    [
        ([], 0),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0),
        ([0.5, 0.4, 0.4, 0.4, 0.4], 0),  # four epochs without a new best
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.5], 1),  # five; the same again is no new best
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.6, 0.5, 0.5, 0.5, 0.5], 0),  # a new best just in time
        ([0.5] * 6 + [0.4] * 4, 1),  # the lower rate is given as long
        ([0.5] * 6 + [0.4] * 5, 2),
        ([0.5] * 6 + [0.6] * 6, 2),
        ([0.5] * 16, 3),
        ([0.5] * 90, 3),  # three times at most
    ],
)
def test_plateau_divides_the_rate_by_ten(accuracies, divisions):
    assert plateau_lr(accuracies, 0.01) == pytest.approx(0.01 * 0.1**divisions)


def test_rate_of_a_run_follows_the_schedule_to_its_end(tiny, after_step):
    """By hand: 5 steps an epoch, three tenths of all steps warm up; then two more epochs."""
    used = []
    after_step(lambda run, *_: used.append([group["lr"] for group in run.optimizer.param_groups]))
    options = "--lr 0.02 --warm-up 0.3 --epochs 2 --bias-lr-factor 2 --output-dir run"
    assert tiny(*options.split()) == 0
    assert tiny("--resume", "run", "--epochs", 4) == 0

    def rate(step, steps, warm_up):
        if step < warm_up:
            return 0.02 * (step + 1) / warm_up
        return 0.01 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    expected = [rate(i, 10, 3) for i in range(10)] + [rate(i, 20, 6) for i in range(10, 20)]
    assert [weights for weights, _ in used] == pytest.approx(expected)
    assert [biases for _, biases in used] == pytest.approx([2 * lr for lr in expected])
    rows = read_rows("run/metrics.csv")
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected[4::5])


def test_rate_falls_within_a_run_when_validation_stalls(tiny, monkeypatch, capsys):
    accuracies = iter([0.1, 0.05, 0.1])
    monkeypatch.setattr(optimizers, "PATIENCE", 1)
    monkeypatch.setattr(run_module, "loss_and_accuracy", lambda *_: (2.3, next(accuracies)))
    assert tiny("--recipe", "paper", "--epochs", 3, "--output-dir", "run") == 0
    rows = read_rows("run/metrics.csv")
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert torch.load("run/best.pt")["epoch"] == 1
    assert "best validation accuracy 10.00% after epoch 1" in capsys.readouterr().out


# --- Optimizer ---


def test_parameter_groups():
    with torch.device("meta"):
        network = AlexNet()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    layers = [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]
    optimizer = make_optimizer(network, new_config({"recipe": "paper"}))
    for group, kind in zip(optimizer.param_groups, ("weight", "bias"), strict=True):
        found = [names[id(parameter)].partition(".")[2] for parameter in group["params"]]
        assert found == [f"{layer}.{kind}" for layer in layers]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0]
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1, 2]
    for recipe, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        optimizer = make_optimizer(network, new_config({"recipe": recipe}))
        assert type(optimizer) is kind
        [everything] = optimizer.param_groups
        assert len(everything["params"]) == 16
    banks, others = make_optimizer(network, new_config({"recipe": "muon"})).param_groups
    assert [names[id(bank)] for bank in banks["params"]] == [
        f"features.conv{i}.weight" for i in range(2, 6)
    ]
    assert len(others["params"]) == 12


def test_steps_follow_the_papers_equations():
    """§5, by hand in float64: v <- 0.9 v - 0.0005 e w - e g, w <- w + v; 2 e and no decay for b."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    network = torch.nn.Linear(4, 3).double()
    w, b = (parameter.detach().numpy().copy() for parameter in network.parameters())
    v, u = np.zeros_like(w), np.zeros_like(b)
    e = 0.1
    optimizer = make_optimizer(network, new_config({"recipe": "paper"}))
    for _ in range(5):
        scores = np.exp(x.numpy() @ w.T + b)
        g = (scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[y]) / 6
        v = 0.9 * v - 0.0005 * e * w - e * g.T @ x.numpy()
        u = 0.9 * u - 2 * e * g.sum(axis=0)
        w, b = w + v, b + u
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * e
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        np.testing.assert_allclose(network.weight.detach().numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(network.bias.detach().numpy(), b, rtol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_along_the_orthogonalized_momentum(memory_format):
    """As Jordan et al. describe it, by hand in float64; torch's is in bf16. Adam has the rest."""
    network = torch.nn.Module()
    network.features = torch.nn.Sequential(*(torch.nn.Conv2d(4, n, 3) for n in (4, 4, 60)))
    network.to(memory_format=memory_format)
    banks = [layer.weight for layer in network.features][1:]
    optimizer = make_optimizer(network, new_config({"optimizer": "muon"}))
    for group in optimizer.param_groups:
        group["lr"] = group["lr_factor"] * 4e-4
    momenta = [0.0] * len(banks)
    for _ in range(3):
        before = copy.deepcopy(network)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for i, bank in enumerate(banks):
            g = bank.grad.double().flatten(1)
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            x = 0.05 * g + 0.95 * momenta[i]
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
            expected = -0.02 * max(1, len(x) / x.shape[1]) ** 0.5 * x
            step = (bank - before.features[i + 1].weight).double().flatten(1)
            assert (step - expected).norm() < 0.06 * expected.norm()
        for name in ("0.weight", "0.bias", "1.bias"):  # Adam's first steps are of the learning rate
            step = network.features.get_parameter(name) - before.features.get_parameter(name)
            assert 1e-4 < step.abs().mean() < 5e-4


# --- A step ---


def test_training_metrics_are_means_over_the_images_of_an_epoch(tiny):
    """With a rate of nothing: those of the same weights, evaluated. Batches of 13, 13, 13 and 1."""
    options = "--batch-size 13 --lr 1e-30 --dropout 0 --augmentation none --epochs 2"
    network = "--init 2012 --input centered"  # whose first loss is not that of guessing
    assert tiny(*f"{options} {network} --output-dir run".split()) == 0
    split = draw_shapes().train
    logits = Classifier.from_checkpoint("run/best.pt", "cpu", "fp32").logits(split.images)
    expected = loss_and_accuracy(logits, split.labels)
    for row in read_rows("run/metrics.csv"):
        found = float(row["train_loss"]), float(row["train_accuracy"])
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer": "sgd", "mix": "cutmix", "mix_probability": 0.5},
        {"optimizer": "adam"},
        {"optimizer": "muon"},
        {"recipe": "paper"},
    ],
)
def test_step_waits_for_no_value(small, tmp_path, overrides, monkeypatch):
    """On the device "meta", which has shapes and no values: reading one, as .item() does, fails.

    On a GPU such a read would wait until all work before it is done.
    """
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())  # none for meta
    run = make_run(tmp_path, "meta", **overrides)
    for group in run.optimizer.param_groups:
        group["fused"] = False  # not for meta either
    for state in run.optimizer.state.values():
        state |= {"step": torch.zeros(())} if "step" in state else {}  # plain Adam's is on the CPU
    for state in run.optimizer.state.values():
        state["step"] = torch.zeros(())  # where Adam reads it if it is not fused
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.train(run, NO_STOP)  # which reads the losses when the epoch is over
    assert run.step == run.steps_per_epoch == 5


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {"mix": "cutmix", "mix_probability": 0.5},
        {"recipe": "paper"},
        {"precision": "fp16"},
        {"optimizer": "adam", "precision": "fp16"},
        {"optimizer": "muon"},
    ],
)
def test_steps_do_not_wait_for_a_gpu(tmp_path, overrides, compiled):
    """Not for values, nor for copies. The first four compile, record and fill caches."""
    run = make_run(tmp_path, "cuda", **{"precision": "bf16", "compile": compiled} | overrides)
    batches = run.batches

    def watched_batches():
        for batch in batches():
            torch.cuda.set_sync_debug_mode("error" if run.step >= 4 else "default")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    run.batches = watched_batches
    try:
        train.train(run, NO_STOP)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    [row] = run.history
    assert math.isfinite(row["train_loss"])


@pytest.mark.parametrize("device", [*DEVICES, pytest.param("cuda --compile", marks=needs_gpu)])
def test_dropout_is_drawn_anew_for_each_seed_step_and_process(small, tmp_path, device, after_step):
    """Seen in the loss of one batch; a GPU replays a graph from the third step on.

    A run that is repeated draws it again as it was.
    """
    losses = []
    after_step(lambda run, loss, *_: losses.append(loss.item()))
    device, *options = device.split()
    for seed, rank in ((0, 0), (1, 0), (0, 1), (0, 0)):
        run = make_run(tmp_path, device, lr=1e-30, compile=bool(options))  # no weight changes
        torch.nn.init.normal_(run.network.classifier.fc8.weight, std=0.5)
        torch.manual_seed(0)
        run.config.seed, run.processes.rank = seed, rank
        images = to_channels_last(torch.randn(8, 3, 67, 67).to(device))
        batch = images, torch.arange(8, device=device)
        run.batches = lambda batch=batch: [batch] * 5
        train.train(run, NO_STOP)
    repeated, differing = losses[15:], losses[:15]
    assert repeated == pytest.approx(losses[:5], rel=1e-4)
    nearest = min(abs(a - b) for a, b in itertools.combinations(differing, 2))
    noise = max(abs(a - b) for a, b in zip(repeated, losses[:5], strict=True))
    assert nearest > 10 * noise


def test_batches_are_mixed_as_often_as_asked(small, tmp_path, monkeypatch, after_step):
    """Three tenths of 100 steps (standard error 5 points); seeds differ, processes do not."""
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", {"train": 20, "val": 1, "test": 1})
    mixed = {}
    after_step(lambda run, loss, logits, targets: draws.append(targets.dim() == 2))
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        draws = mixed[seed, rank] = []
        run = make_run(
            tmp_path, batch_size=2, mix="cutmix", mix_probability=0.3, seed=seed, lr=1e-6
        )
        run.processes.rank = rank
        train.train(run, NO_STOP)
        assert len(draws) == 100
        assert np.mean(draws) == pytest.approx(0.3, abs=0.15)
    assert mixed[0, 0] == mixed[0, 1] != mixed[1, 0]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_images_are_mixed_in_the_networks_precision_and_the_loss_is_not(
    tiny, monkeypatch, precision, dtype
):
    seen, mix, cross_entropy = set(), Mix.__call__, F.cross_entropy

    def note_mix(self, images, labels, step):
        seen.add(("images", images.dtype))
        return mix(self, images, labels, step)

    def note_loss(logits, *others, **settings):
        seen.add(("loss", logits.dtype))
        return cross_entropy(logits, *others, **settings)

    monkeypatch.setattr(Mix, "__call__", note_mix)
    monkeypatch.setattr(train.F, "cross_entropy", note_loss)
    assert tiny("--epochs", 1, "--mix", "cutmix", "--precision", precision) == 0
    assert seen == {("images", dtype), ("loss", torch.float32)}


@pytest.mark.parametrize(
    ("batch_size", "compiled"), [(8, [8] * 5), (13, [13] * 3), (40, [40]), (64, [40])]
)
def test_compiled_network_takes_all_but_a_smaller_last_batch(
    tiny, monkeypatch, batch_size, compiled
):
    """Of 40 images."""
    seen = []

    def compile_network(network, device):
        return lambda images: seen.append(len(images)) or network(images)

    monkeypatch.setattr(run_module, "compile_network", compile_network)
    assert tiny("--epochs", 1, "--compile", "--batch-size", batch_size) == 0
    assert seen == compiled


# --- fp16 ---


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_steps_whose_fp16_gradients_overflow_are_skipped(tiny, monkeypatch, after_step, optimizer):
    """At a scale of 2^30 those of the first steps do; it is halved until they do not.

    With --deterministic torch fills fresh memory with NaN, so that reading any of it shows.
    """
    scaler, weights, losses = torch.amp.GradScaler, [], []

    def note(run, loss, *_):
        weights.append(run.network.classifier.fc8.weight.detach().clone())
        losses.append(loss.item())

    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**30, enabled=enabled)
    )
    after_step(note)
    options = "--precision fp16 --deterministic --train-split full --train-images 10 --batch-size 2"
    assert tiny(*options.split(), "--optimizer", optimizer, "--epochs", 4, "--output-dir", "r") == 0
    assert all(map(math.isfinite, losses))
    assert all(weight.isfinite().all() for weight in weights)
    skipped = 1 + sum(map(same, weights, weights[1:]))
    assert same(weights[0], weights[1])
    assert 2 <= skipped < 20
    assert torch.load("r/last.pt")["scaler"]["scale"] == 2.0 ** (30 - skipped)


# --- Learning ---


def test_training_overfits_a_few_images(tiny):
    options = "--optimizer adam --lr 2e-3 --epochs 40 --train-images 30 --dropout 0"
    assert tiny(*options.split(), "--augmentation", "none", "--output-dir", "run") == 0
    row = read_rows("run/metrics.csv")[-1]
    assert float(row["train_accuracy"]) == 1
    assert float(row["train_loss"]) < 0.3  # chance is 2.3


def test_script_says_in_one_line_what_is_wrong(tmp_path):
    done = run_python("train.py", "--epochs", "0", cwd=tmp_path)
    error = "argument --epochs: 0 is not a whole number above 0; see --help"
    assert (done.returncode, done.stderr) == (2, f"train.py: error: {error}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_script_trains_the_whole_network(tmp_path):
    """By one epoch of shapes; chance is 10%."""
    options = "--dataset shapes --optimizer adam --epochs 1 --device cpu --output-dir run"
    done = run_python("train.py", *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = read_rows(tmp_path / "run" / "metrics.csv")
    assert float(row["val_accuracy"]) > 0.4
