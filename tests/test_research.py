"""The benchmark, the ablation and the tables of the pages."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny as tiny_module
import torch
from conftest import ROOT
from torch import nn

from model import AlexNet
from recipes import Config
from research import ablate, benchmark, tables, textbook
from utils import run_script

CPU = torch.device("cpu")


@pytest.fixture
def call(signal_handlers, monkeypatch, tmp_path):
    """Run main() of a module in tmp_path with these arguments; return the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        name = f"{module.__name__.rpartition('.')[2]}.py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            run_script(module.main)
        return stopped.value.code or 0

    return run


def read_rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# --- Benchmark ---

# By hand: positions x filter size x filters (paper §3.5 and Fig. 2), then fc6, fc7, fc8.
CONV1 = 55 * 55 * (3 * 11 * 11) * 96
MULTIPLY_ADDS = (
    CONV1
    + 27 * 27 * (96 * 5 * 5) * 256
    + 13 * 13 * 9 * (256 * 384 + 384 * 384 + 384 * 256)
    + 9216 * 4096
    + 4096 * 4096
    + 4096 * 10
)


def test_textbook_network_is_the_same_function():
    """Otherwise the benchmark would compare two things."""
    ours, theirs = AlexNet().double().eval(), textbook.alexnet().double().eval()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 58_322_314
    # The paper's dropout halves what PyTorch's leaves as it is at test time.
    weights = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    weights["19.weight"], weights["22.weight"] = weights["19.weight"] / 2, weights["22.weight"] / 2
    theirs.load_state_dict(weights)
    images = 50 * torch.randn(2, 3, 227, 227, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-12)


def test_operations_are_counted():
    assert benchmark.flops_per_image(training=False) == 2 * MULTIPLY_ADDS
    # Backward: a product for the weights and one for the input, which conv1 does without.
    assert benchmark.flops_per_image(training=True) == 2 * (3 * MULTIPLY_ADDS - CONV1)


def test_ratios_are_taken_round_by_round():
    """A slow moment of the machine affects both sides, so no ratio may mix two rounds."""
    case = benchmark.Case("step", "ours", "fp32", 10, 10, "cpu")
    worker = SimpleNamespace(case=case, seconds=[1.0, 1.0, 4.0], peak_memory_mib=100)
    row = benchmark.row_of(worker, [2.0, 4.0, 8.0], [1e12, 2e12, 4e12])
    assert row["times_the_textbook"] == [2.0, 2.0, 4.0]
    assert row["images_per_second"] == [10.0, 2.5, 10.0]
    flops = 10 * 2 * (3 * MULTIPLY_ADDS - CONV1)
    shares = [flops / 2e12, flops / 16e12, flops / 1e12]  # median, lowest, highest
    assert row["share_of_peak"] == pytest.approx(shares)


@pytest.mark.parametrize("part", ["step", "loop"])
def test_training_is_measured_in_the_loop_of_train(monkeypatch, after_step, part):
    """n units of work are n steps of one batch, or n epochs that see each image once."""
    tiny_module.shrink(monkeypatch.setattr)
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", tiny_module.IMAGE_SIZE)
    labels, rates = [], set()

    def note(run, loss, logits, targets):
        labels.append(targets)
        rates.add(run.optimizer.param_groups[0]["lr"])

    after_step(note)
    cases = benchmark.comparison(part, 4, "fp32", "cpu", 1, with_compile=False)
    [case] = [case for case in cases if case.side == "ours"]
    work = benchmark.our_work(case, CPU)
    work(2)
    work(3)
    batches = case.images // case.batch_size
    assert len(labels) == 5 * batches
    for i in range(5):
        seen = torch.cat(labels[i * batches : (i + 1) * batches])
        assert seen.sort().values.tolist() == [label % 10 for label in range(case.images)]
    assert rates == {0.001}  # the textbook's


def test_benchmark_writes_json_and_pictures(tmp_path):
    """As a user calls it."""
    command = [sys.executable, "-m", "research.benchmark", "--parts", "lrn", "--batch-sizes", "1"]
    files = ["--json", tmp_path / "b.json", "--figure", tmp_path / "b.png"]
    command += ["--rounds", "1", "--device", "cpu", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "b.json").read_text())
    assert {row["side"] for row in results["rows"]} == {"textbook", "ours"}
    for row in results["rows"]:
        assert row["images_per_second"][0] > 0
        assert row["peak_memory_mib"] > 100
    assert results["environment"]["command"].startswith("python -m research.benchmark --parts lrn")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to process groups")
def test_interrupted_benchmark_is_one_line_and_leaves_no_process():
    """Ctrl-C reaches the processes that measure as well, while they are still importing."""
    command = [sys.executable, "-u", "-m", "research.benchmark", "--device", "cpu"]
    script = subprocess.Popen(
        [*command, "--parts", "pipeline", "--batch-sizes", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "textbook's loader" in script.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        script.wait(2)
    os.killpg(script.pid, signal.SIGINT)
    _, error = script.communicate(timeout=120)
    assert (script.returncode, error) == (130, "benchmark.py: interrupted\n")
    assert group_ends(script.pid)


def group_ends(number):
    """Whether a group of processes is gone soon; multiprocessing's own one is the last to go."""
    for _ in range(300):
        try:
            os.killpg(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_side_without_memory_says_so(signal_handlers):
    """A process that fails must not leave the others waiting."""
    sent = []
    connection = SimpleNamespace(send=sent.append, recv=lambda: "prepare")
    case = benchmark.Case("lrn", "textbook", "fp32", 10**9, 10**9, "cpu")
    benchmark.measure_on_request(case, connection)
    assert sent[0] == "imported"
    assert "Case(part='lrn'" in str(sent[1])
    assert "allocate memory" in str(sent[1])


# --- Ablation ---


@pytest.mark.parametrize(
    ("variant", "layers", "kind"),
    [
        ("tanh", "relu1 relu2 relu3 relu4 relu5 relu6 relu7", nn.Tanh),
        ("no-norm", "norm1 norm2", nn.Identity),
        ("pooling-2x2", "", None),
        ("inverted-dropout", "drop6 drop7", nn.Dropout),
    ],
)
def test_idea_changes_its_layers_alone(variant, layers, kind):
    with torch.device("meta"):
        network, changed = AlexNet(), AlexNet()
    ablate.IDEAS[variant].change(changed)
    before, after = (
        {name: type(layer) for name, layer in each.named_modules()} for each in (network, changed)
    )
    replaced = {name[-5:]: after[name] for name in before if before[name] != after[name]}
    assert replaced == dict.fromkeys(layers.split(), kind)
    assert changed(torch.empty(1, 3, 227, 227, device="meta")).shape == (1, 10)


def test_pooling_without_overlap_keeps_the_sizes_of_the_maps():
    with torch.device("meta"):
        network = AlexNet()
        ablate.IDEAS["pooling-2x2"].change(network)
        x, sizes = torch.empty(1, 3, 227, 227), []
        for layer in network.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                assert (layer.kernel_size, layer.stride) == (2, 2)
                sizes.append(x.shape[-1])
    assert sizes == [27, 13, 6]


def test_printed_norm_divides_by_the_formula_as_printed():
    with torch.device("meta"):
        network = AlexNet()
    ablate.IDEAS["printed-norm"].change(network)
    a = 100 * torch.rand(1, 8, 1, 1, dtype=torch.float64)
    energy = [sum(a[0, max(0, i - 2) : i + 3, 0, 0] ** 2) for i in range(8)]
    expected = a[0, :, 0, 0] / (2 + 1e-4 * torch.stack(energy)) ** 0.75
    torch.testing.assert_close(network.features.norm2(a)[0, :, 0, 0], expected)


@pytest.fixture
def ablation(call, monkeypatch):
    """Run ablate.py on tiny networks; return the exit code."""
    tiny_module.shrink(monkeypatch.setattr)
    options = ("--dataset", "shapes", "--output-dir", "out", "--epochs", 2, "--seeds", 1)
    return lambda *arguments: call(ablate, *options, *arguments)


def test_ablation_goes_on_where_it_was_stopped(ablation, after_step):
    """Stopped in the second run; the same command goes on, and a third time trains nothing."""
    steps = []

    def stop_in_second_run(run, *_):
        steps.append(run.dir.name)
        if run.dir.name == "tanh-0" and steps.count("tanh-0") == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    after_step(stop_in_second_run)
    assert ablation("--only", "tanh") == 128 + signal.SIGTERM
    assert [row["variant"] for row in read_rows("out/ablation.csv")] == ["base"]
    done = len(steps)
    assert ablation("--only", "tanh") == 0
    assert set(steps[done:]) == {"tanh-0"}
    done = len(steps)
    assert ablation("--only", "tanh") == 0
    assert len(steps) == done

    results = read_rows("out/ablation.csv")
    assert [row["variant"] for row in results] == ["base", "tanh"]
    epochs = read_rows("out/epochs.csv")
    for row in results:
        metrics = read_rows(f"out/{row['variant']}-0/metrics.csv")
        assert (len(metrics), row["outcome"]) == (2, "finished")
        assert float(row["val_accuracy"]) == float(metrics[-1]["val_accuracy"])
        assert float(row["val_loss"]) == float(metrics[-1]["val_loss"])
        errors = [float(r["train_error"]) for r in epochs if r["variant"] == row["variant"]]
        assert errors == [pytest.approx(1 - float(r["train_accuracy"]), abs=1e-6) for r in metrics]
    for name in ("ablation.png", "relu-and-tanh.png"):
        assert Path("out", name).read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").rglob("*.pt"))


def test_diverged_run_is_a_result(ablation, after_step):
    def diverge_without_norm(run, *_):
        if run.dir.name == "no-norm-0":
            run.losses[0] = torch.nan

    after_step(diverge_without_norm)
    assert ablation("--only", "no-norm") == 0
    base, diverged = read_rows("out/ablation.csv")
    assert (base["outcome"], diverged["outcome"]) == ("finished", "diverged")
    assert diverged["val_accuracy"] == ""
    assert "the loss became nan" in Path("out/no-norm-0/diverged.txt").read_text()


def test_folder_of_another_ablation_is_refused(ablation, capsys):
    assert ablation("--only", "no-dropout") == 0
    assert ablation("--only", "no-dropout", "--epochs", 3) == 2
    assert "has other settings" in capsys.readouterr().err
    assert ablation("--only", "no-dropout", "--output-dir", "out/base-0") == 2
    assert "is not empty" in capsys.readouterr().err


def test_differences_are_paired_by_seed():
    """By hand; positive where the idea helps, and only where both runs finished."""
    accuracies = {("base", 0): 0.5, ("base", 1): 0.6, ("base", 2): 0.7}
    accuracies |= {("tanh", 0): 0.4, ("tanh", 1): 0.65}
    runs = [
        {"variant": variant, "seed": seed, "outcome": "finished", "val_accuracy": accuracy}
        for (variant, seed), accuracy in accuracies.items()
    ]
    runs.append({"variant": "tanh", "seed": 2, "outcome": "diverged"})
    [idea] = ablate.compare(runs)
    assert idea["idea"] == "ReLU, not tanh"
    assert idea["differences"] == pytest.approx([10, -5])
    assert (idea["diverged"], idea["seeds"]) == (1, 3)


# --- Tables ---


@pytest.fixture
def results(monkeypatch, tmp_path):
    """A project in tmp_path with made-up results; call it to add a run of 90 seconds an epoch."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "ON_CIFAR10", {})
    (tmp_path / "results" / "speed").mkdir(parents=True)
    (tmp_path / "docs").mkdir()

    def add_run(folder, seed=0, test=0.8, accuracies=(0.5, 0.75), **old_settings):
        tables.ON_CIFAR10[folder] = "python train.py"
        path = tmp_path / "results" / folder
        path.mkdir()
        settings = {**vars(Config()), "seed": seed, "precision": "bf16", **old_settings}
        start = {"device": "Intel(R) Xeon(R) Processor @ 2.50GHz, 2 threads"}
        (path / "config.json").write_text(json.dumps({"settings": settings, "starts": [start]}))
        rows = [f"{i},1.5,{accuracy}" for i, accuracy in enumerate(accuracies, 1)]
        (path / "metrics.csv").write_text("\n".join(["epoch,val_loss,val_accuracy", *rows]))
        rows = [f"{i},90" for i in range(1, len(accuracies) + 1)]
        (path / "timing.csv").write_text("\n".join(["epoch,seconds", *rows]))
        tested = {"accuracy": test, "interval_95": [test - 0.1, test + 0.1]}
        tested |= {"calibration_error": 0.03, "ten_views": {"accuracy": test + 0.01}}
        (path / "test.json").write_text(json.dumps(tested))

    return add_run


def test_single_run_has_an_interval(results):
    results("run", accuracies=(0.75, 0.5))
    hardware = "Intel Xeon, 2 threads, bf16"
    assert tables.short_results_table(tables.ON_CIFAR10).splitlines()[2:] == [
        "| [`python train.py`](results/run) | 80.0% (70.0% to 90.0%) | 2 epochs, 3 min "
        f"| {hardware} |"
    ]
    assert tables.results_table().splitlines()[2:] == [
        "| `python train.py` | [0](results/run) | 75.0% | 80.0% (70.0% to 90.0%) | 81.0% | 3.0% "
        f"| 2 epochs, 3 min | {hardware} |"
    ]


def test_seeds_are_together(results):
    """Two as they are, three as mean ± standard deviation."""
    results("run", 0, 0.80)
    results("run-1", 1, 0.82, accuracies=(0.5, 0.75, 0.75, 0.75))
    row = tables.results_table().splitlines()[2]
    assert "| [0](results/run), [1](results/run-1) | 75.0%, 75.0% | 80.0%, 82.0% |" in row
    assert "3 to 6 min" in row
    results("run-2", 2, 0.87)
    row = tables.results_table().splitlines()[2]
    assert "| 75.0% ± 0.0 | 83.0% ± 3.6 | 84.0% ± 3.6 | 3.0% ± 0.0 |" in row


def test_runs_with_pytorchs_dropout_are_marked(results):
    results("new")
    results("older", 1, ema=0.0, dropout_scaling="test")
    assert "¹" not in tables.results_table()
    results("oldest", 2, ema=0.0)
    for table in (
        tables.short_results_table(tables.ON_CIFAR10),
        tables.results_table(),
        tables.time_table(),
    ):
        marked = [line for line in table.splitlines() if "¹" in line]
        assert len(marked) == 2
        assert "PyTorch's dropout" in marked[1]


def test_time_to_an_accuracy(results):
    results("slow", accuracies=(0.6, 0.61))
    results("run", 5, accuracies=(0.6, 0.61, 0.71, 0.7, 0.85))
    header, _, row = tables.time_table().splitlines()
    assert header == "| command | seed | hardware | 70% | 80% | 85% | 90% | 93% | 94% | 95% |"
    assert row.endswith(
        "| 5 | Intel Xeon, 2 threads, bf16 | 4.5 min | 7.5 min | 7.5 min |  |  |  |  |"
    )


def test_tried_shows_failures_and_full_trainings_alone(results, tmp_path):
    header = "recipe,setting,images,epochs,val_accuracy,val_loss,hardware,verdict\n"
    rows = 'sgd,no norm,"45,000",2,0.5,1.25,a CPU,worse\nsgd,none,"45,000",0 of 2,,,a CPU,stopped\n'
    rows += 'sgd,short,"4,500",2,0.5,1.25,a CPU,worse\n'
    (tmp_path / "results" / "tried.csv").write_text(header + rows)
    assert tables.tried_table().splitlines()[2:] == [
        "| sgd | no norm | 2 | 50.0% | 1.250 | worse |",
        "| sgd | none | 0 of 2 |  |  | stopped |",
    ]


def test_speed_shows_the_precision_that_is_chosen(results, tmp_path):
    def row(part, side, precision, rate, times, **others):
        several = {"images_per_second": [rate, 1, 2], "times_the_textbook": times}
        about = {"part": part, "side": side, "precision": precision, "name": part}
        return {**about, "batch_size": 128, "peak_memory_mib": 1500, **several, **others}

    rows = [row(part, "textbook", "fp32", 10, [1, 1, 1]) for part in ("step", "loop")]
    rows += [
        row("step", "ours", "fp32", 20, [2, 1.5, 3]),
        row("step", "ours", "bf16", 40, [4, 3, 5], share_of_peak=[0.8, 0.7, 0.9]),
        row("step", "compiled", "bf16", 60, [6, 5, 7]),
        row("loop", "ours", "bf16", 30, [3, 2, 4]),
        row("step", "ours", "bf16", 99, [9, 9, 9], batch_size=32),
    ]
    (tmp_path / "results" / "speed" / "cpu.json").write_text(json.dumps({"rows": rows}))
    assert tables.short_speed_table().splitlines()[2:] == [
        "| loop, bf16 | 10 | 30 | 3.0 (2.0 to 4.0) |",
        "| step, bf16 | 10 | 40 | 4.0 (3.0 to 5.0) |",
    ]
    assert tables.speed_table("cpu.json").splitlines()[3:] == [
        "| step, fp32 | 10 | 20 | 2.0 (1.5 to 3.0) |  |",
        "| step, bf16 | 10 | 40 | 4.0 (3.0 to 5.0) | 80% (70% to 90%) |",
        "| step, bf16, compiled | 10 | 60 | 6.0 (5.0 to 7.0) |  |",
    ]


def test_stale_table_is_found_and_written(results, call, tmp_path, capsys):
    results("run")
    (tmp_path / "README.md").write_text("No table.\n")
    page = tmp_path / "docs" / "results.md"
    page.write_text("before\n<!-- table results -->\nold\n<!-- end -->\nafter\n")
    assert call(tables, "--check") == 1
    assert capsys.readouterr().out == "out of date: docs/results.md\n"
    assert "old" in page.read_text()
    assert call(tables) == 0
    start, table, end = page.read_text().partition(tables.results_table().replace("](", "](../"))
    assert table
    assert (start, end) == ("before\n<!-- table results -->\n\n", "\n<!-- end -->\nafter\n")
    assert call(tables, "--check") == 0
    page.write_text("<!-- table magic -->\n<!-- end -->\n")
    assert call(tables) == 2
    assert "no table is called magic" in capsys.readouterr().err


# --- Command lines ---


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (benchmark, "--rounds 0"),
        (benchmark, "--batch-sizes -1"),
        (benchmark, "--parts all"),
        (benchmark, "--device tpu"),
        (benchmark, "--json no/x"),
        (ablate, "--seeds 0"),
        (ablate, "--only magic"),
        (ablate, "--train-images 25 --dataset shapes"),
        (tables, "--chek"),
    ],
)
def test_bad_command_is_one_line(call, capsys, module, options):
    assert call(module, *options.split()) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert error.count("\n") == 1
    assert options.split()[0] in error
