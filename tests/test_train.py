import contextlib
import copy
import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_PATHS, ROOT, needs_gpu, rows, run_python, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataset
import evaluate
import model
import recipes
import train
from checkpoint import check_progress, fitting_state, load_network
from dataset import (
    Augmentation,
    Dataset,
    Preprocessing,
    Split,
    in_fast_layout,
    training_batches,
)
from evaluate import loss_and_accuracy, predict
from model import AlexNet
from parallel import Processes
from utils import FolderLock, UserError, select_precision

# --- Schedule and learning ----------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 1000, 0.1, 0.05) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1 / 50)
    assert rates[49] == pytest.approx(0.1)
    assert rates[525] == pytest.approx(0.05, rel=1e-3)  # half-way down the cosine
    assert rates[999] < 1e-6
    assert rates[50:] == sorted(rates[50:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_learning_rate_of_a_very_short_run(total):
    rates = [train.learning_rate(step, total, 0.1, 0.05) for step in range(total)]
    assert all(0 < rate <= 0.1 for rate in rates)


def test_warm_up_of_three_tenths_is_one_cycle():
    """PyTorch's own, which starts and ends at 1e-9 of the peak and counts from its first step."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1)
    divisors = {"div_factor": 1e9, "final_div_factor": 1}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 1000, pct_start=0.3, **divisors)
    falling = []
    for _ in range(1000):
        falling.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(falling) < 1000:
            schedule.step()
    rates = [train.learning_rate(step, 1000, 0.1, 0.3) for step in range(1000)]
    assert rates[299:] == pytest.approx(falling[299:], abs=3e-4)
    assert rates[:300] == pytest.approx([0.1 * (step + 1) / 300 for step in range(300)])


@pytest.mark.parametrize(
    ("accuracies", "divisions"),
    [
        ([], 0),
        ([0.1], 0),
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
    assert train.plateau_rate(accuracies, 0.01) == pytest.approx(0.01 * 0.1**divisions)


LATER_IDEAS = {"norm": "lrn-at-work", "dropout_scaling": "test"}
# About half of the first 19 of 188 steps.
LATER_IDEAS |= {"mix": "cutmix", "mix_off": 0.9, "mix_probability": 0.5}


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "sgd", "augmentation": "jitter"},
        LATER_IDEAS,
        {"optimizer": "adamw", "ema": 0.99, "mix": "cutmix", "label_smoothing": 0.1},
        {"optimizer": "adam", "mix": "mixup", "augmentation": "strong"},
        {"recipe": "paper"},
    ],
)
def test_step_waits_for_no_value(given, monkeypatch):
    """On the device "meta", which has shapes and no values: reading one, as .item() does, fails.

    On a GPU such a read would wait until all work before it is done.
    """
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())  # none for meta
    config = recipes.new_config({"dataset": "shapes", "precision": "fp32", **given})
    run = train.Run(Path("run"), config, dataset.draw_shapes(), torch.device("meta"), Processes())
    assert (run.mix is None) == (config["mix"] == "none")
    for group in run.optimizer.param_groups:
        group["fused"] = False  # not for meta either
    arguments = run.train_split, run.preprocessing, run.augmentation, config["batch_size"], 0, 0
    for images, labels in training_batches(*arguments):
        loss, correct = train.train_step(run, images, labels)
        run.losses[run.step] = loss
        run.correct += correct
        run.step += 1
    assert run.step == 1500 // 32 + 1
    assert run.losses.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run.check_losses()  # what is done once a second


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "given", [{"ema": 0.99, "mix": "cutmix"}, LATER_IDEAS, {"recipe": "paper"}]
)
def test_steps_do_not_wait_for_a_gpu(given, compiled):
    """Not for values, nor for copies. The first four compile, record and fill caches."""
    config = recipes.new_config({"dataset": "shapes", "precision": "bf16", **given})
    config["compile"] = compiled
    run = train.Run(Path("run"), config, dataset.draw_shapes(), torch.device("cuda"), Processes())
    arguments = run.train_split, run.preprocessing, run.augmentation, config["batch_size"], 0, 0
    try:
        for images, labels in training_batches(*arguments):
            loss, _ = train.train_step(run, images, labels)
            run.losses[run.step] = loss
            run.step += 1
            torch.cuda.set_sync_debug_mode("error" if run.step >= 4 else "default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.check_losses()
    if config["init"] == "he":
        assert run.losses[0].item() == pytest.approx(math.log(10), abs=0.1)


# --- The paper's recipe -------------------------------------------------------------------------


def test_parameter_groups_of_the_paper():
    with torch.device("meta"):
        network = AlexNet()
    weights, biases = train.parameter_groups(network, recipes.new_config({"recipe": "paper"}))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for group, kind in ((weights, "weight"), (biases, "bias")):
        layers = [f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"]
        assert [names[id(p)] for p in group["params"]] == [f"{name}.{kind}" for name in layers]
    optimizer = train.make_optimizer(network, recipes.new_config({"recipe": "paper"}))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0]
    assert [group["lr_factor"] for group in optimizer.param_groups] == [1, 2]
    [everything] = train.parameter_groups(network, recipes.new_config({}))
    assert len(everything["params"]) == 16


def test_optimizers_are_those_asked_for():
    with torch.device("meta"):
        network = AlexNet()
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        optimizer = train.make_optimizer(network, recipes.new_config({"optimizer": name}))
        assert type(optimizer) is kind
    for nesterov in (False, True):
        config = recipes.new_config({"nesterov": nesterov, "momentum": 0.8})
        [group] = train.make_optimizer(network, config).param_groups
        assert (group["nesterov"], group["momentum"]) == (nesterov, 0.8)


def test_common_reading_starts_blind():
    """What tells images apart reaches the last layer in the recipe, not in the other reading."""
    images = dataset.draw_shapes().train.images
    common = {"init": "as-printed", "input": "standardised"}
    spread = []
    for given in ({}, common):
        given = {"recipe": "paper", "dropout_scaling": "training", **given}  # the same in both
        config = recipes.new_config(given)
        network = train.make_network(config, 10)
        preprocessing = Preprocessing.of(images, config["input"], "paper")
        logits = predict(network, images[:20], preprocessing, "fp32")
        spread.append(logits.std(0).mean().item())
    assert spread[0] > 0.1
    assert spread[1] < 0.002


def test_steps_follow_the_papers_equations():
    """§5, by hand in float64: v <- 0.9 v - 0.0005 e w - e g, w <- w + v; 2 e and no decay for b."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    network = torch.nn.Linear(4, 3).double()
    w, b = (p.detach().numpy().copy() for p in (network.weight, network.bias))
    v, u = np.zeros_like(w), np.zeros_like(b)
    e = 0.1
    run = bare_run(network, recipe="paper", lr=e)
    for run.step in range(5):
        scores = np.exp(x.numpy() @ w.T + b)
        g = (scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[y]) / 6
        v = 0.9 * v - 0.0005 * e * w - e * g.T @ x.numpy()
        u = 0.9 * u - 2 * e * g.sum(axis=0)
        w, b = w + v, b + u
        train.train_step(run, x, y)
        np.testing.assert_allclose(network.weight.detach().numpy(), w, rtol=1e-12)
        np.testing.assert_allclose(network.bias.detach().numpy(), b, rtol=1e-12)


def bare_run(network, **given):
    """What train_step needs of a run with these settings, its network any module."""
    config = recipes.new_config({"batch_size": 6, "precision": "fp32", **given})
    run = SimpleNamespace(config=config, device=torch.device("cpu"), processes=Processes())
    run.network = run.compiled = network
    run.history, run.train_split, run.mix = [], SimpleNamespace(labels=range(60)), None
    run.optimizer, run.average = train.make_optimizer(network, config), None
    run.epoch, run.step, run.steps_per_epoch, run.total_steps = 0, 0, 10, 20
    return run


@pytest.mark.parametrize(("images", "taken"), [(12, [True, True]), (9, [True, False]), (4, [True])])
def test_compiled_network_takes_all_but_a_smaller_last_batch(images, taken):
    """Batches have six images, or all that there are."""
    run = bare_run(torch.nn.Linear(2, 3))
    run.train_split = SimpleNamespace(labels=range(images))
    seen = []
    run.compiled = lambda x: seen.append(True) or run.network(x)
    run.parallel = lambda x: seen.append(False) or run.network(x)
    for run.step, start in enumerate(range(0, images, 6)):
        count = min(6, images - start)
        train.train_step(run, torch.ones(count, 2), torch.zeros(count, dtype=torch.int64))
    assert seen == taken


def test_loss_of_smoothed_and_mixed_labels():
    """In float64: the label keeps 1 - s, and s is shared by all classes (Szegedy 2016, §7)."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    run = bare_run(network, label_smoothing=0.2)
    mixed = torch.tensor([[0.7, 0.3, 0], [0, 1, 0], [0.4, 0, 0.6], [0, 0.5, 0.5], [1, 0, 0]])
    targets = torch.cat([mixed, torch.tensor([[0, 0.25, 0.75]])]).double()
    run.mix = lambda images, labels: (2 * images, targets)
    x = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    scores = network(2 * x).detach()
    log_probabilities = scores - scores.exp().sum(1, keepdim=True).log()
    smooth = 0.8 * targets + 0.2 / 3
    loss, correct = train.train_step(run, x, torch.zeros(6, dtype=torch.int64))
    assert loss.item() == pytest.approx(-(smooth * log_probabilities).sum().item() / 6)
    assert correct.item() == (scores.argmax(1) == torch.tensor([0, 1, 2, 1, 0, 2])).sum().item()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_images_hold_as_much_of_each_as_their_labels(name):
    """An image of class c is white in channel c and black in the others."""
    labels = torch.arange(8) % 3
    images = F.one_hot(labels, 3)[:, :, None, None].expand(8, 3, 227, 227).float()
    mixed, targets = train.make_mix(recipes.new_config({"mix": name}), 3)(images, labels)
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 8)
    assert 0 < targets.max(1).values.min() < 1


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_share_of_a_mixed_image_is_uniform(name):
    """Beta(1, 1), as alpha is 1: the smaller share is a quarter on average.

    CutMix's rectangles are cut off at the edges, which makes it a little more.
    """
    mix = train.make_mix(recipes.new_config({"mix": name}), 2)
    images, labels = torch.zeros(2, 3, 64, 64), torch.tensor([0, 1])
    smaller = [mix(images, labels)[1].min().item() for _ in range(2000)]
    assert np.mean(smaller) == pytest.approx(0.25, abs=0.04)


def test_last_steps_are_not_mixed_where_asked():
    """--mix-off 0.3: the last 6 of 20 steps."""
    mixed = []
    run = bare_run(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), mix="cutmix", mix_off=0.3
    )
    run.mix = lambda images, labels: mixed.append(place) or (images, F.one_hot(labels, 3) / 1)
    for place in range(20):
        run.epoch, run.step = divmod(place, 10)
        train.train_step(run, torch.ones(6, 1, 2, 2), torch.arange(6) % 3)
    assert mixed == list(range(14))


def test_batches_are_mixed_as_often_as_asked():
    """Three tenths of 400 (standard error 2.3 points); seeds differ, processes do not."""
    drawn = {}
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        run = bare_run(torch.nn.Linear(4, 3), mix="cutmix", mix_probability=0.3, seed=seed)
        run.mix, run.total_steps, run.processes.rank = True, 400, rank
        drawn[seed, rank] = [train.is_mixed(run, step) for step in range(400)]
    assert drawn[0, 0] == drawn[0, 1] != drawn[1, 0]
    for draws in drawn.values():
        assert np.mean(draws) == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_not_rounded_to_bf16(dtype, monkeypatch):
    """As the logits are, and as it would be without autocast, or with a GPU's."""
    seen, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(
        train.F,
        "cross_entropy",
        lambda x, *a, **k: seen.append(x.dtype) or cross_entropy(x, *a, **k),
    )
    run = bare_run(torch.nn.Linear(4, 3), precision="fp32" if dtype == torch.float32 else "bf16")
    run.compiled = lambda x: seen.append(run.network(x).dtype) or run.network(x)
    train.train_step(run, torch.ones(6, 4), torch.arange(6) % 3)
    assert seen == [dtype, torch.float32]


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_images_are_mixed_in_the_networks_precision(name, dtype):
    seen = []
    run = bare_run(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), precision=name)
    run.mix = lambda images, labels: (seen.append(images.dtype) or images, F.one_hot(labels, 3) / 1)
    train.train_step(run, torch.ones(6, 1, 2, 2), torch.arange(6) % 3)
    assert seen == [dtype]


def test_dropout_is_drawn_anew_for_each_seed_epoch_step_and_process():
    masks = set()
    layers = (torch.nn.Linear(4, 50), torch.nn.Dropout(), torch.nn.Linear(50, 3))
    layers[1].register_forward_hook(lambda *call: masks.add((call[2] != 0).numpy().tobytes()))
    for seed, *place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        run = bare_run(torch.nn.Sequential(*layers), seed=seed, lr=1e-30)
        run.epoch, run.step, run.processes.rank = place
        train.train_step(run, torch.ones(6, 4), torch.arange(6) % 3)
    assert len(masks) == 5


@pytest.mark.parametrize("path", FAST_PATHS)
def test_dropout_of_the_whole_network_is_drawn_anew_at_each_step(path):
    """And again as it was when a step is done again; a GPU replays a graph from the third on."""
    device, *options = path.split()
    config = recipes.new_config({"dataset": "shapes", "precision": "fp32", "mix": "none"})
    config |= {"batch_size": 4, "lr": 1e-30, "compile": bool(options)}  # which changes no weight
    run = train.Run(Path("run"), config, dataset.draw_shapes(), torch.device(device), Processes())
    run.network.reset_parameters("2012")  # whose outputs differ by more than He's at first
    images = in_fast_layout(torch.randn(4, 3, 227, 227, device=device))
    losses = []
    for step in (0, 1, 2, 3, 4, 4):
        run.step = step
        loss, _ = train.train_step(run, images, torch.arange(4, device=device))
        losses.append(loss.item())
    assert losses[5] == pytest.approx(losses[4], rel=1e-4)
    nearest = min(abs(a - b) for a, b in itertools.combinations(losses[:5], 2))
    assert nearest > 10 * abs(losses[5] - losses[4])


def test_average_of_the_weights():
    """By hand: it keeps 0.3 of itself at each step, but 1/10 and 2/11 at the first two."""
    network = torch.nn.Linear(4, 3)
    run = bare_run(network, lr=1.0, ema=0.3)
    run.average, run.steps_per_epoch = copy.deepcopy(network), 2
    expected = network.weight.detach().clone()
    for step, keep in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):
        run.epoch, run.step = divmod(step, 2)
        train.train_step(run, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        expected = keep * expected + (1 - keep) * network.weight.detach()
    torch.testing.assert_close(run.average.weight, expected)
    assert (expected - network.weight).abs().max() > 1e-3


def test_average_is_what_is_validated_and_kept(tiny):
    assert tiny("--epochs", 1, "--ema", 0.9, "--output-dir", "run") == 0
    last = torch.load("run/last.pt")
    average, current = last["weights"]["fc8.weight"], last["weights_in_training"]["fc8.weight"]
    assert not torch.equal(average, current)
    assert torch.equal(torch.load("run/best.pt")["weights"]["fc8.weight"], average)
    network, preprocessing, content = load_network("run/best.pt")
    val = dataset.draw_shapes().val
    logits = predict(network, val.images, preprocessing, content["training"]["precision"])
    [row] = rows("run")
    assert loss_and_accuracy(logits, val.labels)[0] == pytest.approx(float(row["val_loss"]))
    network.load_state_dict(last["weights_in_training"])
    logits = predict(network, val.images, preprocessing, content["training"]["precision"])
    assert loss_and_accuracy(logits, val.labels)[0] != pytest.approx(float(row["val_loss"]))


def test_resume_with_damaged_weights_in_training(tiny, capsys):
    assert tiny("--epochs", 1, "--ema", 0.9, "--output-dir", "run") == 0
    last = torch.load("run/last.pt")
    weights = last["weights_in_training"]
    for damaged in (
        None,
        {},
        weights | {"fc8.weight": 1.0},
        weights | {"fc8.weight": torch.ones(2)},
    ):
        torch.save({**last, "weights_in_training": damaged}, "run/last.pt")
        assert tiny("--resume", "run", "--epochs", 2) == 2
        error = capsys.readouterr().err
        assert "cannot be resumed from" in error
        assert error.count("\n") == 1


def test_history_has_numbers():
    last = torch.load(ROOT / "tests" / "first-version" / "last.pt")
    columns = train.METRICS + train.TIMING
    check_progress(last, 5, columns, validated=True)
    last["progress"]["history"][0]["peak_memory_mib"] = None  # as on some systems
    check_progress(last, 5, columns, validated=True)
    [row] = last["progress"]["history"]
    accuracy = row["val_accuracy"]
    for value in (None, "", [], {}, "x", math.nan):
        row["val_accuracy"] = value
        with pytest.raises((ValueError, TypeError)):
            check_progress(last, 5, columns, validated=True)
    row |= {"val_loss": None, "val_accuracy": None}
    check_progress(last, 5, columns, validated=False)
    row["val_accuracy"] = accuracy  # which a run without validation cannot have
    with pytest.raises(ValueError, match="validations"):
        check_progress(last, 5, columns, validated=False)
    del row["lr"]
    with pytest.raises(KeyError):
        check_progress(last, 5, columns, validated=True)


def test_weights_gone_wrong_are_not_kept_without_validation(tiny, monkeypatch):
    """The loss of the second epoch's last step is finite and its update is not."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: math.inf if step == 15 else 1e-3)
    assert tiny("--epochs", 2, "--train-split", "full", "--output-dir", "run") == 2
    kept = torch.load("run/best.pt")
    assert kept["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept["weights"].values())


def test_full_split_trains_on_the_validation_images(tiny, capsys, monkeypatch):
    options = ("--train-split", "full", "--epochs", 2, "--output-dir", "run")
    assert tiny(*options) == 0
    assert "60 training and 0 validation images" in capsys.readouterr().out
    assert [(row["val_loss"], row["val_accuracy"]) for row in rows("run")] == [("", "")] * 2
    assert [row["step"] for row in rows("run")] == ["8", "16"]
    best, last = (torch.load(f"run/{name}.pt") for name in ("best", "last"))
    assert best["epoch"] == 2
    assert same(best["weights"], last["weights"])
    assert tiny("--resume", "run", "--epochs", 3) == 0
    assert len(rows("run")) == 3
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run/best.pt", "--split", "val"])
    with pytest.raises(UserError, match="was trained on the validation images"):
        evaluate.main()


def test_full_split_is_training_and_validation_images(tiny):
    given = {"dataset": "shapes", "train_split": "full", "device": "cpu", "output_dir": Path("run")}
    with train.prepare(given, Processes()) as run:
        shapes = dataset.draw_shapes()
        for ours, *parts in zip(run.train_split, shapes.train, shapes.val, strict=True):
            assert torch.equal(ours, torch.cat(parts))


def test_rate_of_a_run_follows_the_schedule_to_its_end(tiny, monkeypatch):
    """By hand: 5 steps an epoch, three tenths of all steps warm up; then two more epochs."""
    used, step = [], train.train_step

    def note(run, images, labels):
        result = step(run, images, labels)
        used.append(run.optimizer.param_groups[0]["lr"])
        return result

    monkeypatch.setattr(train, "train_step", note)
    options = "--train-images 10 --batch-size 2 --lr 0.02 --warm-up 0.3 --epochs 2"
    assert tiny(*options.split(), "--output-dir", "run") == 0
    assert tiny("--resume", "run", "--epochs", 4) == 0

    def rate(step, steps, warm_up):
        if step < warm_up:
            return 0.02 * (step + 1) / warm_up
        return 0.01 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    expected = [rate(i, 10, 3) for i in range(10)] + [rate(i, 20, 6) for i in range(10, 20)]
    assert used == pytest.approx(expected)
    assert [float(row["lr"]) for row in rows("run")] == pytest.approx(expected[4::5])


def test_rate_falls_within_a_run_when_validation_stalls(tiny, monkeypatch, capsys):
    """A network that never learns, by the numbers it is validated with: the first is the best."""
    accuracies = iter([0.1, 0.05, 0.1])
    monkeypatch.setattr(train, "PATIENCE", 1)
    monkeypatch.setattr(train, "loss_and_accuracy", lambda *_: (2.3, next(accuracies)))
    options = ("--recipe", "paper", "--epochs", 3, "--train-images", 10)
    assert tiny(*options, "--output-dir", "run") == 0
    assert [float(row["lr"]) for row in rows("run")] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert torch.load("run/best.pt")["epoch"] == 1
    assert torch.load("run/last.pt")["epoch"] == 3
    assert "best validation accuracy 10.00% after epoch 1" in capsys.readouterr().out


def test_checkpoint_records_every_switch(tiny):
    switches = "--activation tanh --norm none --pooling non-overlapping --groups 2 --dropout 0.2"
    switches += " --dropout-scaling training"
    options = f"--recipe paper --epochs 1 --train-images 20 --output-dir run {switches}"
    assert tiny(*options.split()) == 0
    network, preprocessing, content = load_network("run/best.pt")
    assert network.config == {
        "num_classes": 10,
        "activation": "tanh",
        "norm": "none",
        "pooling": "non-overlapping",
        "groups": 2,
        "dropout": 0.2,
        "dropout_scaling": "training",
    }
    assert (preprocessing.std, preprocessing.enlarged_size) == ([1.0] * 3, 256)
    assert content["training"]["train_images"] == 20
    val = dataset.draw_shapes().val
    logits = predict(network, val.images, preprocessing, content["training"]["precision"])
    loss, _ = loss_and_accuracy(logits, val.labels)
    [row] = rows("run")
    assert loss == pytest.approx(float(row["val_loss"]), rel=1e-6)
    assert row["step"] == "3"  # 20 images in batches of 8


def test_training_overfits_32_images(tmp_path):
    split = Split(*(tensor[:32] for tensor in dataset.draw_shapes().train))
    given = {"dataset": "shapes", "optimizer": "adam", "dropout": 0.0, "epochs": 15}
    config = recipes.new_config(given)
    config["precision"] = select_precision("auto", torch.device("cpu"))
    data = Dataset(dataset.SHAPES, split, split, split)
    run = train.Run(tmp_path, config, data, torch.device("cpu"), Processes())
    plain = Augmentation(flip=False, shift=0)
    [batch] = training_batches(split, run.preprocessing, plain, 32, 0, 0)
    for _ in range(15):
        train.train_step(run, *batch)
        run.epoch += 1
    logits = predict(run.network, split.images, run.preprocessing, config["precision"])
    loss, accuracy = loss_and_accuracy(logits, split.labels)
    assert accuracy == 1
    assert loss < 0.3  # chance is 2.3


# --- A run and its folder -----------------------------------------------------------------------


def test_run_folder_is_complete(trained_run):
    folder, _ = trained_run
    run_dir = folder / "runs" / "shapes-adam"
    names = {"config.json", "metrics.csv", "timing.csv", "curves.png", "last.pt", "best.pt"}
    assert names <= {path.name for path in run_dir.iterdir()}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-4
    assert config["settings"]["precision"] in ("fp32", "bf16")
    assert [start["torch"] for start in config["starts"]] == [torch.__version__]
    [row] = rows(run_dir)
    assert row["epoch"] == "1"
    assert row["step"] == "47"
    assert all(math.isfinite(float(value)) for value in row.values())


def test_output_is_lines_when_it_is_no_terminal(trained_run):
    _, done = trained_run
    assert "\r" not in done.stdout + done.stderr
    assert done.stderr == ""
    assert "this run will take about" in done.stdout
    assert "python evaluate.py runs/shapes-adam/best.pt" in done.stdout


def test_one_epoch_leaves_chance(trained_run):
    """Chance is 10%; 66% were measured."""
    folder, _ = trained_run
    assert float(rows(folder / "runs" / "shapes-adam")[0]["val_accuracy"]) > 0.4


def test_run_checkpoint_and_evaluation_agree(trained_run, monkeypatch, capsys):
    folder, _ = trained_run
    monkeypatch.chdir(folder)
    # All validation images, few neighbours.
    monkeypatch.setattr(dataset, "SHAPES_PER_CLASS", dataset.SHAPES_PER_CLASS | {"train": 10})
    options = ["runs/shapes-adam/best.pt", "--split", "val", "--json", "val.json", "--figures"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options])
    evaluate.main()
    printed = capsys.readouterr().out
    evaluated = json.loads((folder / "val.json").read_text())
    [row] = rows(folder / "runs" / "shapes-adam")
    assert evaluated["accuracy"] == float(row["val_accuracy"])
    assert evaluated["loss"] == float(row["val_loss"])
    names = "confusion filters learned-filters predictions neighbours classes reliability "
    for name in f"{names} feature-maps normalisation mistakes".split():
        picture = folder / "runs" / "shapes-adam" / f"best-{name}-val.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"wrote runs/shapes-adam/best-{name}-val.png" in printed


ADDITIONS = "--ema 0.9 --mix cutmix --augmentation strong --augmentation-ramp 0.9 --nesterov"


@pytest.mark.parametrize(
    ("kind", "last_step"),
    [
        ("--optimizer adam", 2),
        ("--recipe paper", 4),
        ("--momentum 0", 2),
        (ADDITIONS, 3),
        pytest.param("--device cuda --deterministic", 2, marks=needs_gpu),
        pytest.param("--device cuda --deterministic --compile", 2, marks=needs_gpu),
    ],
)
def test_interrupted_run_equals_an_uninterrupted_one(tiny, kind, last_step, monkeypatch):
    """Stopped within an epoch, and after the last of its five steps, before its validation.

    Twice, as by torchrun and a cluster's manager.
    """
    options = (*kind.split(), "--epochs", 2)
    assert tiny(*options, "--output-dir", "whole") == 0
    step = train.train_step

    def terminate_in_second_epoch(run, images, labels):
        if run.epoch == 1 and run.step == last_step:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        return step(run, images, labels)

    monkeypatch.setattr(train, "train_step", terminate_in_second_epoch)
    assert tiny(*options, "--output-dir", "parts") == 128 + signal.SIGTERM
    monkeypatch.setattr(train, "train_step", step)
    assert len(rows("parts")) == 1
    assert tiny("--resume", "parts") == 0

    assert Path("parts/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        whole, parts = (torch.load(Path(folder, name)) for folder in ("whole", "parts"))
        for checkpoint in (whole, parts):
            for row in checkpoint.pop("progress", {}).get("history", []):
                for column in ("seconds", "images_per_second", "peak_memory_mib"):
                    del row[column]
        assert same(whole, parts), name


def test_batches_are_those_of_the_settings_and_the_seconds_those_of_the_epoch(
    tiny, monkeypatch, capfd
):
    """Each step takes a second, saving a hundred; Ctrl-C comes in the eighth step."""
    seen, seconds = [], 0
    save = train.Run.save

    def save_slowly(run):
        nonlocal seconds
        save(run)
        seconds += 100

    def step(run, images, labels):
        nonlocal seconds
        seconds += 1
        seen.append([images, labels])
        for weight in run.network.parameters():  # the optimizer's state is saved
            weight.grad = torch.zeros_like(weight)
        run.optimizer.step()
        if len(seen) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(()), torch.zeros((), dtype=torch.int64)

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(seconds)))
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train.Run, "save", save_slowly)
    options = ("--epochs", 2, "--seed", 3, "--augmentation", "strong", "--output-dir", "run")
    assert tiny(*options, "--save-every", 0.04) == 128 + signal.SIGINT
    assert capfd.readouterr().err.count("stopping after this step; Ctrl-C again") == 1
    assert tiny("--resume", "run") == 0
    split = dataset.draw_shapes().train
    how = Preprocessing.of(split.images), Augmentation.of("strong", split.images)
    epochs = [list(map(list, training_batches(split, *how, 8, 3, epoch))) for epoch in (0, 1)]
    assert same(seen, epochs[0] + epochs[1])
    with open("run/timing.csv") as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == [5, 5]


def test_epoch_in_metrics_csv_is_in_timing_csv_already(tiny, monkeypatch):
    """Whoever finds an epoch in metrics.csv takes it to be over, whenever the run was killed."""
    write, written = train.write_csv, []
    monkeypatch.setattr(train, "write_csv", lambda p, *a: written.append(p.name) or write(p, *a))
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    assert written == ["timing.csv", "metrics.csv"]


def test_command_to_evaluate_names_the_folder_of_the_data():
    config = {"dataset": "cifar10", "data_dir": "my data"}
    run = SimpleNamespace(config=config, dir=Path("runs/x"))
    command = "python evaluate.py runs/x/best.pt"
    assert train.evaluate_command(run) == f"{command} --data-dir 'my data'"
    config["data_dir"] = dataset.DEFAULT_DATA_DIR
    assert train.evaluate_command(run) == command


def test_augmentation_grows_over_the_first_epochs(tiny, monkeypatch):
    """Over half of four epochs: nothing, half, all, all."""
    seen = []

    def no_batches(split, preprocessing, augmentation, *_):
        seen.append(augmentation.rotation)
        return iter([])

    monkeypatch.setattr(train, "training_batches", no_batches)
    monkeypatch.setattr(train, "running_metrics", lambda run: (1.0, 0.5))
    ramp = ("--augmentation", "affine", "--augmentation-ramp", 0.5)
    assert tiny("--epochs", 4, *ramp, "--output-dir", "run") == 0
    assert seen == [0, 7.5, 15, 15]


def test_longer_run_says_what_follows_its_new_length(tiny, capsys):
    options = "--mix cutmix --mix-off 0.5 --augmentation affine --augmentation-ramp 0.5"
    assert tiny("--epochs", 1, *options.split(), "--output-dir", "run") == 0
    assert tiny("--resume", "run", "--epochs", 2) == 0
    what = "the learning rate and the growth of augmentation and the end of mixing"
    assert f"2 epochs instead of 1: from here {what} will be as for the" in capsys.readouterr().out


def test_training_metrics_are_means_over_the_images_of_an_epoch(tiny):
    """With a rate of nothing: those of the same weights, evaluated. Batches of 13, 13, 13 and 1."""
    options = "--batch-size 13 --lr 1e-30 --dropout 0 --augmentation none --precision fp32"
    network = "--init 2012 --input centred"  # whose first loss is not that of guessing
    assert tiny(*f"{options} {network} --epochs 2 --output-dir run".split()) == 0
    network, preprocessing, _ = load_network("run/best.pt")
    split = dataset.draw_shapes().train
    logits = predict(network, split.images, preprocessing, "fp32")
    expected = loss_and_accuracy(logits, split.labels)
    for row in rows("run"):
        found = float(row["train_loss"]), float(row["train_accuracy"])
        assert found == pytest.approx(expected, rel=1e-4)


def test_finished_run_can_be_lengthened(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    before = Path("run/last.pt").read_bytes()
    assert tiny("--resume", "run") == 0
    assert "finished" in capsys.readouterr().out
    assert Path("run/last.pt").read_bytes() == before
    assert tiny("--resume", "run", "--epochs", 2) == 0
    assert [row["epoch"] for row in rows("run")] == ["1", "2"]
    assert json.loads(Path("run/config.json").read_text())["settings"]["epochs"] == 2
    assert tiny("--resume", "run", "--epochs", 1) == 2
    assert "--epochs 1 is less than the 2" in capsys.readouterr().err


def test_run_killed_before_its_first_save_starts_over(tiny):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    expected = rows("run")
    for path in Path("run").iterdir():
        if path.name != "config.json":
            path.unlink()
    assert tiny("--resume", "run") == 0
    assert rows("run") == expected


def test_run_whose_last_checkpoint_was_deleted_is_not_begun_anew(tiny, capsys):
    """As after tidying up, or in most folders of results/."""
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    Path("run/last.pt").unlink()
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert tiny("--resume", "run", "--epochs", 2) == 2
    assert "--resume run: its last.pt is gone" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_file_in_place_of_a_run_is_named(tiny, capsys):
    Path("last.pt").write_bytes(b"")
    assert tiny("--resume", "last.pt") == 2
    assert "--resume last.pt is a file; name its folder, ." in capsys.readouterr().err


def test_run_of_the_first_version_is_resumed(tiny, capsys, monkeypatch):
    """Its checkpoint was thinned out: each weight has one input's values for all inputs."""
    monkeypatch.setattr(model, "UNITS", 4096)
    shutil.copytree(ROOT / "tests" / "first-version", "old")
    assert tiny("--resume", "old") == 0
    assert "old has all its 1 epochs" in capsys.readouterr().out
    assert tiny("--resume", "old", "--lr", 0.5) == 2
    assert "--lr 0.5 would make it another experiment" in capsys.readouterr().err
    assert tiny("--resume", "old", "--epochs", 2, "--precision", "fp32") == 0
    assert [row["epoch"] for row in rows("old")] == ["1", "2"]


def test_state_of_the_optimizer_is_laid_out_as_the_weights_are():
    """The fused step reads it as they lie, whatever a file says of its strides."""
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    sgd = torch.optim.SGD([parameter], momentum=0.9, fused=True)
    plain = torch.randn(4, 3, 2, 2)
    for value in (plain, plain[:1, :1].expand(4, 3, 2, 2)):
        [[(name, fitted)]] = [
            s.items() for s in fitting_state({0: {"momentum_buffer": value}}, sgd).values()
        ]
        assert name == "momentum_buffer"
        assert fitted.stride() == parameter.stride()
        assert torch.equal(fitted, value)


@pytest.mark.parametrize(
    "state",
    [
        {0: {"momentum_buffer": torch.tensor(1.0)}},
        {0: {"momentum_buffer": torch.ones(3)}},
        {0: {"momentum_buffer": torch.ones(2, dtype=torch.float64)}},
        {0: {"momentum_buffer": torch.ones(2, device="meta")}},
        {0: {"momentum_buffer": torch.ones(2).to_sparse()}},
        {0: {"momentum_buffer": None}},
        {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2), "step": torch.tensor(1.0)}},
        {},
        {0: {}},
        {0: None},
        {-1: {"momentum_buffer": torch.ones(2)}},
        {0: {"momentum_buffer": torch.ones(2)}, 1: {"momentum_buffer": torch.ones(2)}},
    ],
)
def test_state_of_another_kind_is_refused(state):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], momentum=0.9, fused=True)
    with pytest.raises(ValueError, match="the optimizer's state"):
        fitting_state(state, sgd)


def test_sgd_without_momentum_keeps_nothing():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], momentum=0.0, fused=True)
    assert fitting_state({}, sgd) == {}
    with pytest.raises(ValueError, match="the optimizer's state"):
        fitting_state({0: {"momentum_buffer": torch.ones(2)}}, sgd)


def test_output_dir_may_hold_what_a_killed_process_had_begun(tiny):
    Path("run").mkdir()
    Path("run/.unfinished-config.json-x").write_text("half")
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    assert not Path("run/.unfinished-config.json-x").exists()


def test_folder_in_use_is_refused(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    last = Path("run/last.pt").read_bytes()
    lock = FolderLock(Path("run"))
    assert tiny("--resume", "run", "--epochs", 2) == 2
    assert "another process is writing to run" in capsys.readouterr().err
    assert Path("run/last.pt").read_bytes() == last
    lock.release()
    assert tiny("--resume", "run", "--epochs", 2) == 0


def test_what_a_killed_process_had_begun_to_write_is_deleted(tiny):
    assert tiny("--epochs", 1, "--output-dir", "run") == 0
    Path("run/.unfinished-last.pt-x").write_text("half")
    Path("run/mine.txt").write_text("mine")
    assert tiny("--resume", "run") == 0
    assert not Path("run/.unfinished-last.pt-x").exists()
    assert Path("run/mine.txt").exists()


def test_closed_pipe_stops_the_run_and_saves_it(tmp_path):
    """As `python train.py | head -1` does."""
    options = ["--dataset", "shapes", "--batch-size", "8", "--epochs", "50", "--output-dir", "run"]
    command = [sys.executable, str(ROOT / "tests" / "tiny_train.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout.readline().startswith("AlexNet on shapes")
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(600) == 128 + signal.SIGPIPE
    assert "stopped; go on with: python train.py --resume run" in error
    assert "Traceback" not in error
    last = torch.load(tmp_path / "run" / "last.pt")
    assert (last["epoch"], last["progress"]["step"]) > (0, 0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows knows no SIGHUP")
@pytest.mark.parametrize("nohup", [False, True])
def test_closed_terminal_stops_the_run_and_saves_it(tmp_path, nohup):
    """It takes the output with it, and whatever writes there would fail. Not so under nohup."""
    import fcntl
    import pty
    import termios

    def begin_on_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    epochs = 20 if nohup else 1000
    options = f"--dataset shapes --batch-size 8 --epochs {epochs} --output-dir run".split()
    command = [sys.executable, str(ROOT / "tests" / "tiny_train.py"), *options]
    ours, theirs = pty.openpty()
    with open(tmp_path / "nohup.out", "w") as file:
        output = file if nohup else theirs
        process = subprocess.Popen(
            command, cwd=tmp_path, stdin=theirs, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=begin_on_terminal,
        )  # fmt: skip
    os.close(theirs)
    printed = b""
    while b"the run's folder is run" not in printed:
        assert process.poll() is None, printed
        printed = (tmp_path / "nohup.out").read_bytes() if nohup else printed + os.read(ours, 4096)
        time.sleep(0.02)
    assert process.poll() is None
    os.close(ours)
    assert process.wait(600) == (0 if nohup else 128 + signal.SIGHUP)
    last = torch.load(tmp_path / "run" / "last.pt")
    assert (last["epoch"] == epochs) == nohup
    if nohup:
        assert "finished 20 epochs" in (tmp_path / "nohup.out").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_output_to_a_full_disk_is_one_line(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "train.py"), "--help"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=600
        )
    assert done.returncode == 2
    assert done.stderr == "train.py: error: [Errno 28] No space left on device\n"


def test_home_that_cannot_be_written_to_and_no_display(tmp_path):
    options = ["--dataset", "shapes", "--batch-size", "40", "--epochs", "1", "--output-dir", "run"]
    command = [sys.executable, str(ROOT / "tests" / "tiny_train.py"), *options]
    kept = ("PATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["HOME"] = "/dev/null/nowhere"  # the tests may run as root, who can make folders
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "run" / "curves.png").exists()


def test_tensorboard_shows_each_epoch_once(tiny):
    """As a run does that was killed after its second epoch's log and before its last.pt."""
    assert tiny("--epochs", 1, "--output-dir", "run", "--tensorboard") == 0
    shutil.copytree("run", "killed", ignore=shutil.ignore_patterns("events*"))
    assert tiny("--resume", "run", "--epochs", 2) == 0
    for name in ("last.pt", "config.json"):
        shutil.copy(f"killed/{name}", "run")
    assert tiny("--resume", "run", "--epochs", 3) == 0
    events = EventAccumulator("run").Reload()
    for name in ("train_loss", "val_accuracy", "lr", "images_per_second"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3], name
    expected = [float(row["val_loss"]) for row in rows("run")]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(expected)


def test_tensorboard_that_is_not_installed(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert tiny("--epochs", 1, "--tensorboard", "--output-dir", "run") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not Path("run").exists()


def test_default_folder_is_a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("", "-2", "-3"):
        made = train.make_run_dir(recipes.new_config({"dataset": "shapes"}), None)
        assert made == Path(f"runs/shapes-sgd{number}")


# --- Numbers that go wrong ----------------------------------------------------------------------


def test_nan_stops_the_run_and_keeps_the_best(tiny, monkeypatch, capsys):
    rate = train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda step, *rest: 1e30 if step >= 6 else rate(step, *rest)
    )
    assert tiny("--epochs", 3, "--output-dir", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the loss became nan in epoch 2, step 3" in error
    assert "--lr" in error
    assert error.endswith("Kept from before: run/best.pt\n")
    kept = torch.load("run/best.pt")
    assert kept["epoch"] == 1
    assert all(weight.isfinite().all() for weight in kept["weights"].values())

    monkeypatch.setattr(train, "learning_rate", rate)
    assert tiny("--resume", "run") == 0
    told = capsys.readouterr().out
    assert "begins anew" in told
    assert "its best network until then is now run/best-before.pt" in told
    before = torch.load("run/best-before.pt")
    torch.testing.assert_close(before["weights"], kept["weights"], rtol=0, atol=0)
    assert torch.load("run/last.pt")["epoch"] == 3


def test_first_of_two_errors_is_told(tiny, monkeypatch, capsys):
    """From the second, in keeping the best network, the user could not see what went wrong."""

    def no_room(run):
        raise UserError("there is no room")

    monkeypatch.setattr(train.Run, "save_best", no_room)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e30 if step >= 6 else 1e-3)
    assert tiny("--epochs", 2) == 2
    second, first = capsys.readouterr().err.splitlines()
    assert second == "best.pt was not kept: there is no room"
    assert "the loss became nan" in first


def test_second_ctrl_c_writes_nothing_more(tiny, monkeypatch):
    step = train.train_step

    def interrupted_in_second_epoch(run, images, labels):
        if run.epoch == 1:
            raise KeyboardInterrupt
        return step(run, images, labels)

    monkeypatch.setattr(train, "train_step", interrupted_in_second_epoch)
    assert tiny("--epochs", 2, "--output-dir", "run") == 128 + signal.SIGINT
    assert not list(Path("run").glob("*.pt"))


def test_weights_gone_wrong_are_not_saved(tiny, monkeypatch, capsys):
    """The last step's loss is finite but its update is not."""
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: math.inf if step == 4 else 1e-3)
    assert tiny("--epochs", 1, "--output-dir", "run") == 2
    assert "Kept from before: nothing, no epoch was finished" in capsys.readouterr().err
    assert not Path("run/last.pt").exists()


# --- Bad input: one line, exit code 2, nothing left behind --------------------------------------


def test_user_sees_one_line_from_the_real_script(tmp_path):
    done = run_python("train.py", "--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_dir_that_cannot_be_made(tiny, capsys, monkeypatch):
    """The tests may run as root, who may write everywhere."""

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert tiny("--output-dir", "locked/run") == 2
    assert "cannot make the folder locked/run: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["runs", "runs/shapes-sgd"])
def test_link_to_nothing_is_one_line(tiny, capsys, link):
    """As when a cluster's scratch space was cleared: the name is taken, and nothing is there."""
    Path(link).parent.mkdir(exist_ok=True)
    Path(link).symlink_to("gone")
    assert tiny() == 2
    assert capsys.readouterr().err == (
        "train.py: error: cannot make the folder runs/shapes-sgd: File exists\n"
    )


def test_empty_folder_in_one_that_is_not_writable_can_be_used(tmp_path, monkeypatch):
    """As a cluster or a container gives it. The tests may run as root, who may write everywhere."""
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) == mine)
    assert train.free_run_dir({}, mine) == mine
    with pytest.raises(UserError, match="is not a writable folder"):
        train.free_run_dir({}, tmp_path / "other")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != mine)
    with pytest.raises(UserError, match="mine is not a writable folder"):
        train.free_run_dir({}, mine)


def test_two_runs_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    """The second takes the name between the first's look and its mkdir."""
    monkeypatch.chdir(tmp_path)
    config = recipes.new_config({"dataset": "shapes"})
    look = train.free_run_dir

    def look_then_lose_the_race(*arguments):
        found = look(*arguments)
        if not Path("runs").exists():
            Path("runs/shapes-sgd").mkdir(parents=True)
        return found

    monkeypatch.setattr(train, "free_run_dir", look_then_lose_the_race)
    assert train.make_run_dir(config, None) == Path("runs/shapes-sgd-2")


def test_resume_refuses_the_checkpoint_of_another_run(tiny, capsys):
    assert tiny("--epochs", 1, "--output-dir", "sgd") == 0
    assert tiny("--epochs", 1, "--optimizer", "adam", "--output-dir", "adam") == 0
    Path("adam/last.pt").replace("sgd/last.pt")
    assert tiny("--resume", "sgd", "--epochs", 2) == 2
    assert "last.pt is not of this run" in capsys.readouterr().err


def test_resume_from_a_damaged_checkpoint(tiny, capsys):
    shutil.copytree(ROOT / "tests" / "first-version", "run")
    with open("run/last.pt", "rb+") as file:
        file.truncate(1000)
    assert tiny("--resume", "run", "--epochs", 2) == 2
    error = capsys.readouterr().err
    assert "last.pt is truncated or damaged" in error
    assert error.count("\n") == 1
