import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST_PATHS, ROOT, identity_maps, run_python

import benchmark
from benchmark import Case, operations_per_image, row_of, textbook_network
from dataset import Preprocessing, draw_shapes, resample
from model import AlexNet
from utils import autocast, compiled, run_script

# Multiply-adds by hand: positions x filter size x filters (paper §3.5 and Fig. 2).
MULTIPLY_ADDS = {
    "conv1": 55 * 55 * (3 * 11 * 11) * 96,
    "conv2": 27 * 27 * (96 * 5 * 5) * 256,
    "conv3": 13 * 13 * (256 * 3 * 3) * 384,
    "conv4": 13 * 13 * (384 * 3 * 3) * 384,
    "conv5": 13 * 13 * (384 * 3 * 3) * 256,
    "fc6": 9216 * 4096,
    "fc7": 4096 * 4096,
    "fc8": 4096 * 10,
}


@pytest.fixture(scope="module")
def shapes_batch():
    train = draw_shapes().train
    images = resample(train.images[:20], identity_maps(20), Preprocessing.of(train.images))
    return images, train.labels[:20]


def test_operations_are_counted_exactly():
    forward = sum(MULTIPLY_ADDS.values())
    assert operations_per_image(training=False) == 2 * forward
    # Backward: a product for the weights and one for the input, which the first layer does without.
    assert operations_per_image(training=True) == 2 * (3 * forward - MULTIPLY_ADDS["conv1"])


def test_the_textbook_network_is_the_same_function():
    """Otherwise the comparison would compare two things."""
    ours = AlexNet().eval()
    textbook = copy_of(ours).eval()
    images = torch.randn(2, 3, 227, 227) * 50
    with torch.no_grad():
        torch.testing.assert_close(ours(images), textbook(images), rtol=1e-4, atol=1e-5)


def test_ratios_are_taken_round_by_round():
    """A slow moment of the machine meets both sides: no ratio may mix two rounds."""
    case = Case("step", "here", "fp32", 10, 10, "cpu", 1)
    textbook = SimpleNamespace(case=None, seconds=[2.0, 4.0, 8.0])
    ours = SimpleNamespace(case=case, seconds=[1.0, 1.0, 4.0])
    row = row_of(ours, textbook, 100, {"fp32": [1e12, 2e12, 4e12]})
    assert row["times_the_textbook"] == [2.0, 2.0, 4.0]
    assert row["images_per_second"] == [10.0, 2.5, 10.0]
    operations = 10 * 2 * (3 * sum(MULTIPLY_ADDS.values()) - MULTIPLY_ADDS["conv1"])
    shares = [operations / 1e12, operations / 2e12, operations / 16e12]
    assert row["share_of_peak"] == pytest.approx([shares[1], shares[2], shares[0]])


def test_growth_is_measured_with_one_process_and_with_two_that_share_a_batch(monkeypatch):
    monkeypatch.setattr(benchmark, "GROWTH_BATCH_SIZES", [1, 3])
    found = list(benchmark.measure_growth("fp32", torch.device("cpu")))
    assert [(row["processes"], row["batch_size"]) for row in found] == [(1, 1), (1, 3), (2, 3)]
    for row in found:
        assert row["seconds"] > 0
        # Weights, gradients and momentum of each process.
        assert row["peak_memory_mib"] > row["processes"] * 58 * 4 * 3


def test_interrupted_measurement_leaves_no_process(monkeypatch):
    """Ctrl-C does not wait for a turn, of half a minute here."""
    monkeypatch.setattr(benchmark, "PATIENCE", 120)  # on a slow machine the end takes a while
    case = Case("pipeline", "textbook", "fp32", 100, 20_000, "cpu", 1)
    with contextlib.suppress(KeyboardInterrupt), benchmark.started([case]) as [worker]:
        worker.connection.send({})
        raise KeyboardInterrupt
    assert worker.process.exitcode == 128 + signal.SIGTERM


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to process groups")
@pytest.mark.parametrize("seconds", [0, 0.05, 2])
def test_interrupt_of_a_terminal_is_one_line(tmp_path, seconds):
    """Ctrl-C reaches the processes that measure as well, which are still importing."""
    options = ["--parts", "lrn", "--batch-sizes", "2", "--device", "cpu"]
    script = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmark.py"), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background, a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while script.stdout.readline() != benchmark.TABLE_HEAD + "\n":
        assert script.poll() is None
    time.sleep(seconds)
    os.killpg(script.pid, signal.SIGINT)
    _, error = script.communicate(timeout=120)
    assert script.returncode == 128 + signal.SIGINT
    assert error == "benchmark.py: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no os.kill with SIGINT")
def test_interrupt_waits_although_another_thread_takes_it(handlers_restored):
    """The progress bar's thread takes a signal that the main one blocks."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    over, finished = threading.Event(), threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()

    def interrupt_within():
        with benchmark.interrupts_delayed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            finished.set()

    with pytest.raises(KeyboardInterrupt):
        interrupt_within()
    over.set()
    assert finished.is_set()


@pytest.mark.parametrize("side", ["textbook", "here"])
def test_a_turn_of_the_loop_sees_each_image_once(monkeypatch, side):
    seen = []

    def note(images, labels):
        seen.append((tuple(images.shape), labels))

    monkeypatch.setattr(benchmark, "textbook_step", lambda device: note)
    monkeypatch.setattr(benchmark, "our_run", lambda case, device: "a run")
    monkeypatch.setattr(benchmark, "train_step", lambda run, *batch: note(*batch))
    cpu = torch.device("cpu")
    cases = benchmark.comparison("loop", 4, [("here", "fp32")], cpu, 1)
    [case] = [case for case in cases if case.side == side]
    call = benchmark.textbook_call if side == "textbook" else benchmark.our_call
    call(case, cpu)()
    assert case.images == 8
    assert [shape for shape, _ in seen] == [(4, 3, 227, 227)] * 2
    assert torch.cat([labels for _, labels in seen]).sort().values.tolist() == list(range(8))


def test_seconds_are_those_of_one_call(monkeypatch):
    now = 0.0

    def call():
        nonlocal now
        now += 3.0

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: now))
    assert benchmark.seconds_of(call, 4, torch.device("cpu")) == 3.0


def copy_of(network):
    """The textbook network with an AlexNet's weights."""
    textbook = textbook_network()
    weights = zip(textbook.state_dict(), network.state_dict().values(), strict=True)
    textbook.load_state_dict(dict(weights))
    return textbook


# Losses to within rounding. Gradients (length of the difference by length of the gradient) less so:
# rounding changes which of some nearly equal values is the largest of its pooling window, or
# whether one is above zero, and the gradient then takes another way.
@pytest.mark.parametrize(
    ("precision", "loss_bound", "gradient_bound"), [("fp32", 1e-6, 0.01), ("bf16", 2**-9, 0.25)]
)
@pytest.mark.parametrize("device", FAST_PATHS)
def test_speed_changes_no_loss_and_no_gradient(
    shapes_batch, device, precision, loss_bound, gradient_bound, monkeypatch
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images, labels = shapes_batch
    device, *options = device.split()
    device = torch.device(device)
    if device.type == "cuda":  # which adds up in another order
        loss_bound = max(loss_bound, 1e-5)
    fast = AlexNet(dropout=0.0)
    plain = copy_of(fast).eval()  # without dropout
    fast.to(device, memory_format=torch.channels_last)
    network = compiled(fast, device) if options else fast
    with autocast(device, precision):
        fast_loss = F.cross_entropy(network(images.to(device)), labels.to(device))
    plain_loss = F.cross_entropy(plain(images.contiguous()), labels)
    fast_loss.backward()
    plain_loss.backward()
    assert fast_loss.item() == pytest.approx(plain_loss.item(), rel=loss_bound)
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        difference = torch.linalg.norm(ours.grad.cpu() - theirs.grad)
        difference /= torch.linalg.norm(theirs.grad)
        assert difference < gradient_bound, name


@pytest.mark.parametrize("device", FAST_PATHS)
def test_speed_changes_no_training(shapes_batch, device):
    """The same steps, fast in bf16 and plain in float32, learn a batch alike.

    CUDA graphs are replayed from the third step on.
    """
    device, *options = device.split()
    images, labels = (part[:10].to(device) for part in shapes_batch)
    fast = AlexNet(dropout=0.0)
    plain = copy_of(fast).eval().to(device)
    fast.to(device, memory_format=torch.channels_last)
    fast = compiled(fast, images.device) if options else fast
    losses = {}
    for network, precision in ((fast, "bf16"), (plain, "fp32")):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.004, momentum=0.9)
        losses[precision] = []
        for _ in range(12):
            with autocast(images.device, precision):
                loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[precision].append(loss.item())
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)


def test_script_measures_and_writes(tmp_path):
    options = ["--parts", "lrn", "--batch-sizes", 1, "--rounds", 1, "--device", "cpu"]
    options += ["--json", "b.json", "--figure", "b.png"]
    done = run_python("benchmark.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {row["side"] for row in rows} == {"textbook", "here"}
    for row in rows:
        assert row["images_per_second"][0] > 0
        assert row["peak_memory_mib"] > 100
    assert benchmark.PARTS["lrn"] in done.stdout
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ["--rounds", "0"],
        ["--batch-sizes", "-1"],
        ["--parts", "all"],
        ["--device", "tpu"],
        ["--json", "no/x"],
    ],
)
def test_bad_command_is_one_line(monkeypatch, capsys, options):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options])
    with pytest.raises(SystemExit) as stopped:
        run_script(benchmark.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark.py: error: ")
    assert error.count("\n") == 1
    assert options[0] in error


def test_side_without_memory_ends_in_one_line(tmp_path):
    """A process that fails must not leave the others waiting."""
    options = ["--parts", "lrn", "--batch-sizes", 10**9, "--rounds", 1, "--device", "cpu"]
    done = run_python("benchmark.py", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "batch_size=1000000000" in done.stderr
    assert "allocate memory" in done.stderr


def test_share_of_making_a_batch_is_of_the_fastest_step():
    rates = {
        ("textbook", "pipeline", "fp32"): 50.0,
        ("textbook", "step", "fp32"): 900.0,
        ("here", "pipeline", "fp32"): 1000.0,
        ("here", "step", "fp32"): 20.0,
        ("compiled", "step", "bf16"): 80.0,
        ("here", "step", "bf16"): 40.0,
    }
    rows = [
        {"side": side, "part": part, "precision": precision, "batch_size": 8}
        | {"images_per_second": [rate, rate / 2, rate * 2]}
        for (side, part, precision), rate in rates.items()
    ]
    rows.append({**rows[2], "batch_size": 4, "images_per_second": [160.0, 160.0, 160.0]})
    assert benchmark.batch_making_share(rows).endswith(" at 8: data pipeline 8.0%")  # 80 / 1000
    assert benchmark.batch_making_share(rows[:3]) is None
