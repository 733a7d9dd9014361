"""Measure this repository beside the textbook script: python -m research.benchmark --json FILE

Each side runs in a process of its own, with its own settings and its own peak memory, and the sides
take turns, so that whatever else the machine does affects them alike. Images are random: their
values do not change the work. textbook.py is the textbook script.
"""

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from dataset import Dataset, Split
from distributed import Processes
from figures import save_figure
from model import IMAGE_SIZE, AlexNet, LocalResponseNorm
from recipes import new_config
from research import figures, textbook
from run import Run
from transforms import Augmentation, Preprocessing, to_channels_last, training_batches
from utils import (
    PRECISIONS,
    OneLineParser,
    UserError,
    add_device_options,
    autocast,
    command_line,
    compile_network,
    environment,
    keep_freed_memory,
    output_file,
    peak_memory_mib,
    positive_int,
    run_script,
    select_device,
    select_precision,
    summarize_error,
    to_device,
    write_json,
)

PARTS = {
    "pipeline": "data pipeline",
    "lrn": "LRN forward + backward",
    "step": "training step",
    "inference": "inference",
    "loop": "training loop, data included",
}
PATIENCE = 5  # seconds for a process to end when it is told to
SECONDS_PER_ROUND = 0.3  # short calls are repeated that long
Work = Callable[[int], None]  # does what is measured n times


@dataclass(frozen=True)
class Case:
    """What one process measures.

    side is "textbook", "ours", "compiled" (ours with --compile) or "matmul" (the machine's fastest
    matrix product); images is how many it handles each time; workers are those of the textbook's
    DataLoader.
    """

    part: str
    side: str
    precision: str
    batch_size: int
    images: int
    device: str
    workers: int = 0


# --- The textbook script ---


def textbook_work(case: Case, device: torch.device) -> Work:
    """Return what is measured of the textbook script."""
    if case.part == "lrn":
        return lrn_work(case, textbook.local_response_norm(), torch.contiguous_format)
    if case.part == "step":
        step, batch = textbook.training_step(device), random_batch(case, device)
        return repeated(lambda: step(*batch))
    if case.part == "inference":
        network, (images, _) = textbook.alexnet().to(device).eval(), random_batch(case, device)
        return torch.no_grad()(repeated(lambda: network(images)))
    split = random_split(case.images)
    loader = textbook.data_loader(split, case.batch_size, case.workers, device)
    step = textbook.training_step(device) if case.part == "loop" else lambda images, labels: None

    def epoch() -> None:
        for images, labels in loader:
            step(images.to(device), labels.to(device))

    return repeated(epoch)


# --- This repository ---


def our_work(case: Case, device: torch.device) -> Work:
    """Return what is measured of this repository."""
    if case.part == "lrn":
        return lrn_work(case, to_device(LocalResponseNorm(), device), torch.channels_last)
    if case.part == "inference":
        return our_inference(case, device)
    if case.part == "step":
        return our_steps(case, device)
    if case.part == "loop":
        run = our_run(case, device)
        return lambda n: train_epochs(run, n)
    split = random_split(case.images).to(device)
    settings = Preprocessing(textbook.MEAN, textbook.STD), Augmentation(), case.batch_size

    def epoch() -> None:
        for _ in training_batches(split, *settings, seed=0, epoch=0):
            pass

    return repeated(epoch)


def our_inference(case: Case, device: torch.device) -> Work:
    """Return inference on a batch, as evaluate.py and predict.py do it."""
    network = to_device(AlexNet(), device).eval()
    if case.side == "compiled":
        network = compile_network(network, device)
    images = to_channels_last(random_batch(case, device)[0])

    @torch.no_grad()
    def infer() -> None:
        with autocast(device, case.precision):
            network(images)

    return repeated(infer)


def our_run(case: Case, device: torch.device) -> Run:
    """Return a run as train.py makes it, but whose epochs end without validation or files."""
    settings = {
        "precision": case.precision,
        "batch_size": case.batch_size,
        "compile": case.side == "compiled",
        "mix": "none",  # as the textbook has none
        "schedule": "plateau",  # without validation a constant rate
        "lr": 0.001,  # the textbook's
        "save_every": 1e9,
    }
    split = random_split(case.images)
    dataset = Dataset([str(i) for i in range(10)], split, split, split)
    run = train.make_run(Path("unused"), new_config(settings), dataset, device, Processes())
    run.quiet = True

    def finish_epoch(lr: float) -> None:
        run.epoch += 1
        run.step = 0

    run.finish_epoch = finish_epoch
    return run


def train_epochs(run: Run, n: int) -> None:
    """Train n epochs more in the loop of train.py."""
    run.config.epochs = run.epoch + n
    train.train(run, SimpleNamespace(signal=0))


def our_steps(case: Case, device: torch.device) -> Work:
    """Return training steps on a batch made beforehand, n of them as one epoch.

    train.py waits for the device at the end of an epoch, not of a step.
    """
    run = our_run(case, device)
    images, labels = random_batch(case, device)
    images = to_channels_last(images)

    def steps(n: int) -> None:
        run.steps_per_epoch = n
        run.images_done = lambda step: step * case.batch_size
        run.losses = torch.zeros(n, device=device)
        run.batches = lambda: itertools.repeat((images, labels), n)
        train_epochs(run, 1)

    return steps


# --- Both sides ---


def repeated(call: Callable[[], object]) -> Work:
    """Return a function of n that calls call() n times."""

    def work(n: int) -> None:
        for _ in range(n):
            call()

    return work


def random_split(n: int) -> Split:
    """Return n images of noise, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 10)


def random_batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return normal noise [B, 3, 227, 227] and labels [B]."""
    images = torch.randn(case.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    return images, torch.arange(case.batch_size, device=device) % 10


def lrn_work(case: Case, norm: nn.Module, memory_format: torch.memory_format) -> Work:
    """Return both normalizations of the network, forward and backward."""
    settings = {"device": case.device, "dtype": PRECISIONS[case.precision]}
    pairs = []
    for shape in ((96, 55, 55), (256, 27, 27)):
        a = torch.randn(case.batch_size, *shape, **settings).relu()
        a = a.contiguous(memory_format=memory_format).requires_grad_()
        pairs.append((a, torch.randn_like(a)))

    def call() -> None:
        for a, grad in pairs:
            torch.autograd.grad(norm(a), a, grad)

    return repeated(call)


def matmul_work(case: Case, device: torch.device) -> tuple[Work, int]:
    """Return the fastest of some square matrix products, and its floating-point operations.

    As a product and as a 1x1 convolution, because torch computes them with different libraries.
    """
    candidates = []
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device, dtype=PRECISIONS[case.precision])
        image = a.view(1, n, n // 32, 32).contiguous(memory_format=torch.channels_last)
        filters = b.view(n, n, 1, 1)
        candidates.append((repeated(lambda a=a, b=b: a @ b), 2 * n**3))
        candidates.append((repeated(lambda x=image, w=filters: F.conv2d(x, w)), 2 * n**3))

    def flops_per_second(candidate: tuple[Work, int]) -> float:
        work, flops = candidate
        return flops / seconds_of(work, repeats_of(work, device), device)

    with torch.no_grad():
        return max(candidates, key=flops_per_second)


def seconds_of(work: Work, repeats: int, device: torch.device) -> float:
    """Return the mean duration of so many repeats."""
    synchronize(device)
    start = time.perf_counter()
    work(repeats)
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def repeats_of(work: Work, device: torch.device) -> int:
    """Return how many repeats make a round. Warms up on the way."""
    seconds_of(work, 2, device)
    return math.ceil(SECONDS_PER_ROUND / seconds_of(work, 1, device))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# --- Processes that take turns ---


def measure_on_request(case: Case, connection) -> None:
    """Measure the case in a process of its own, until the other end says stop or is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not inherited
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends a loader too
    try:
        answer_requests(case, connection)
    except (EOFError, ConnectionError):
        return
    except (RuntimeError, UserError) as error:
        connection.send(UserError(f"measuring {case} failed ({summarize_error(error)})"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending already


def answer_requests(case: Case, connection) -> None:
    """Say that all is imported; then prepare, measure rounds, and tell the peak memory."""
    connection.send("imported")
    connection.recv()
    if case.side != "textbook":
        keep_freed_memory()
    device, flops = torch.device(case.device), None
    if case.side == "matmul":
        work, flops = matmul_work(case, device)
    elif case.side == "textbook":
        work = textbook_work(case, device)
    else:
        work = our_work(case, device)
    repeats = repeats_of(work, device)
    connection.send(flops)
    while connection.recv() == "measure":
        connection.send(seconds_of(work, repeats, device))
    connection.send(peak_memory_mib(device))


class Worker:
    """A process that measures one case, seen from the outside."""

    def __init__(self, case: Case):
        self.case = case
        self.seconds: list[float] = []  # of each round
        self.flops: int | None = None  # of a matrix product
        self.peak_memory_mib: int | None = None
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        # Not a daemon: the textbook's loader starts processes of its own.
        self.process = context.Process(target=measure_on_request, args=(case, other_end))
        self.process.start()
        other_end.close()

    def ask(self, message: str):
        """Return the process's answer. Raises UserError if it failed or is no more."""
        with contextlib.suppress(ConnectionError):  # which answer() reports
            self.connection.send(message)
        return self.answer()

    def answer(self):
        try:
            result = self.connection.recv()
        except (EOFError, ConnectionError):
            result = UserError(f"measuring {self.case} was ended, perhaps for want of memory")
        if isinstance(result, UserError):
            raise result
        return result


@contextlib.contextmanager
def started(cases: list[Case]) -> Iterator[list[Worker]]:
    """Yield a process for each case, all imports done; none outlives the block."""
    workers = []
    # A terminal sends Ctrl-C to all processes. Those started now inherit that they ignore it, and
    # are ended from here.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        try:
            workers += map(Worker, cases)
        finally:
            signal.signal(signal.SIGINT, handler)
        for worker in workers:
            worker.answer()
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()  # after an error one may be in the middle of a round
        for worker in workers:
            worker.process.join(PATIENCE)
            worker.process.kill()  # in the middle of one long operation
            worker.process.join()


def take_turns(cases: list[Case], rounds: int) -> list[Worker]:
    """Return the processes of the cases, ended, with what they have measured."""
    with started(cases) as workers:
        for worker in workers:
            worker.flops = worker.ask("prepare")
        for _ in range(rounds):
            for worker in workers:
                worker.seconds.append(worker.ask("measure"))
        for worker in workers:
            worker.peak_memory_mib = worker.ask("stop")
            worker.process.join()
    return workers


# --- Comparisons with the textbook script ---


def comparison(
    part: str, batch_size: int, precision: str, device: str, workers: int, with_compile: bool
) -> list[Case]:
    """Return the cases to measure in turns, the textbook's first."""
    batches = 1
    precisions = ["fp32"] if precision == "fp32" else ["fp32", precision]
    sides = [("ours", name) for name in precisions]
    if part in ("step", "inference"):
        sides += [("matmul", name) for name in precisions]
    if part in ("step", "inference", "loop") and with_compile:
        sides.append(("compiled", precision))
    if part == "loop":
        batches = 80 if device.startswith("cuda") else 2
    if part == "pipeline":
        batches = 80 if device.startswith("cuda") else 8
        sides = [("ours", "fp32")]
    return [
        Case(part, side, name, batch_size, batch_size * batches, device, workers)
        for side, name in [("textbook", "fp32"), *sides]
    ]


def compare(cases: list[Case], rounds: int) -> list[dict]:
    """Return a row for each case but the matrix products, measured in turns."""
    workers = take_turns(cases, rounds)
    peaks = {
        worker.case.precision: [worker.flops / seconds for seconds in worker.seconds]
        for worker in workers
        if worker.flops
    }
    sides = [worker for worker in workers if not worker.flops]
    return [row_of(worker, sides[0].seconds, peaks.get(worker.case.precision)) for worker in sides]


def row_of(worker: Worker, textbook_seconds: list[float], peak: list[float] | None) -> dict:
    """Return medians over the rounds with the lowest and the highest.

    Ratios are taken round by round. peak is a matrix product's operations per second, if measured.
    """
    case, seconds = worker.case, worker.seconds
    row = asdict(case) | {
        "name": PARTS[case.part],
        "images_per_second": spread(case.images / own for own in seconds),
        "times_the_textbook": spread(
            other / own for other, own in zip(textbook_seconds, seconds, strict=True)
        ),
        "peak_memory_mib": worker.peak_memory_mib,
    }
    if peak:
        flops = case.images * flops_per_image(training=case.part != "inference")
        row["peak_gflops"] = spread(value / 1e9 for value in peak)
        row["share_of_peak"] = spread(
            flops / own / value for own, value in zip(seconds, peak, strict=True)
        )
    return row


def spread(values: Iterator[float]) -> list[float]:
    """Return [median, lowest, highest]."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def flops_per_image(training: bool) -> int:
    """Return multiplications plus additions of the convolutions and fully connected layers."""
    with torch.device("meta"):
        network, image = AlexNet(), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        logits = network(image)
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


def comparison_line(row: dict) -> str:
    """Return a row of compare() for people."""
    name = f"{row['name']}: {row['side']}, {row['precision']}"
    rates = "{:,.4g} ({:,.4g} to {:,.4g}) images/s".format(*row["images_per_second"])
    ratios = "{:.2f} ({:.2f} to {:.2f}) times".format(*row["times_the_textbook"])
    memory = f"{row['peak_memory_mib'] or 0:,} MiB"
    share = row.get("share_of_peak")
    shares = "{:.0%} ({:.0%} to {:.0%}) of the peak".format(*share) if share else ""
    return f"{name:<46}{row['batch_size']:>6}  {rates:<37}{ratios:<30}{memory:>12}  {shares}"


# --- The script ---


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m research.benchmark",
        description="Measure this repository beside the textbook script.",
    )
    add = parser.add_argument
    # On a shared machine a process may use fewer cores than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    sizes = {"nargs": "+", "type": positive_int, "default": [32, 128], "metavar": "N"}
    add("--batch-sizes", help="default: 32 128", **sizes)
    add("--rounds", type=positive_int, default=7, help="of each side; default: 7")
    what = "of the textbook's DataLoader; default: 8, or as many as there are cores if fewer"
    add("--workers", type=positive_int, default=min(8, cores or 1), help=what)
    add_device_options(parser)
    add("--compile", action="store_true", help="measure torch.compile's network too")
    files = {"type": output_file, "metavar": "FILE"}
    add("--json", help="write all results to FILE", **files)
    add("--figure", help="draw the comparisons", **files)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = select_device(args.device)
    precision = select_precision(args.precision, device)
    about = environment(device) | {"workers": args.workers, "rounds": args.rounds}
    about["command"] = command_line("-m", "research.benchmark", *sys.argv[1:])
    rows = []
    print(f"torch {about['torch']} on {about['device']}, textbook's loader: {args.workers} workers")
    comparisons = [
        comparison(part, size, precision, str(device), args.workers, args.compile)
        for part in args.parts
        for size in args.batch_sizes
    ]
    for cases in tqdm(comparisons, "comparisons", leave=False, disable=None):
        new_rows = compare(cases, args.rounds)
        rows += new_rows
        tqdm.write("\n".join(map(comparison_line, new_rows)))
        if args.json:  # at once: it took minutes, and the next part may want more memory
            write_json(args.json, {"environment": about, "rows": rows})
    if args.figure:
        save_figure(figures.speed(rows, about["device"]), args.figure)


if __name__ == "__main__":
    run_script(main)
