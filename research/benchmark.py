"""Measures this project beside the textbook script: python benchmark.py [--json FILE]

The textbook script is AlexNet made of torch's own layers, as in a tutorial: a DataLoader that
resizes image by image with Pillow, torch.nn.LocalResponseNorm, float32, NCHW, and a loss read at
every step. Each side runs in a process of its own, with its own settings and its own peak memory,
and the sides take turns, so that whatever else the machine does meets them alike. Images are
random: their values do not change the work.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

import figures
from dataset import Augmentation, Dataset, Preprocessing, Split, in_fast_layout, training_batches
from model import IMAGE_SIZE, AlexNet, LocalResponseNorm
from parallel import Processes
from recipes import new_config
from train import Run, train_step
from utils import (
    OneLineParser,
    UserError,
    autocast,
    compiled,
    environment,
    first_line,
    keep_freed_memory,
    output_file,
    peak_memory_mib,
    positive_int,
    run_script,
    select_device,
    select_precision,
    write_json,
)

PARTS = {
    "pipeline": "data pipeline",
    "pipeline-1-core": "data pipeline, one core",
    "lrn": "LRN forward + backward",
    "step": "training step",
    "inference": "inference",
    "loop": "training loop, data included",
}
WHOLE_EPOCHS = ("pipeline", "pipeline-1-core", "loop")  # a turn is an epoch, not a batch
ALL_PARTS = [*PARTS, "operations", "growth"]
GROWTH_BATCH_SIZES = [4**i for i in range(6)]
PATIENCE = 5  # seconds for a process to end when it is told to
SECONDS_PER_TURN = 0.3  # short calls are repeated that long
PROFILED_STEPS = 4
OPERATIONS_SHOWN = 15
TABLE_HEAD = (
    f"{'':<46}{'batch':>6}  {'images/s':<27}{'times the textbook':<22}"
    f"{'memory':>10}  {'of the peak':<16}"
)
MEAN, STD = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]  # of CIFAR-10, in 0..255


@dataclass(frozen=True)
class Case:
    """What one process measures.

    side is "textbook", "here", "compiled" (this project with --compile) or "product" (the machine's
    matrix-multiply peak); images is how many a call handles.
    """

    part: str
    side: str
    precision: str
    batch_size: int
    images: int
    device: str
    workers: int


# ---------------------------------------------------------------------------------------------
# The textbook script
# ---------------------------------------------------------------------------------------------


def textbook_network() -> nn.Sequential:
    """AlexNet as it is usually written down, from torch's own layers."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4),
        nn.ReLU(),
        nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(96, 256, 5, padding=2),
        nn.ReLU(),
        nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
        nn.Linear(9216, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 10),
    )


class TextbookDataset(torch.utils.data.Dataset):
    """Pictures that are resized one by one, as torchvision.datasets.CIFAR10 gives them."""

    def __init__(self, split: Split):
        self.images = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.Resize(IMAGE_SIZE),
                transforms.ToTensor(),
                transforms.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def textbook_step(device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A training step of the textbook script, as a function of images and labels."""
    network = textbook_network().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        logits = network(images)
        loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        loss.item()
        (logits.argmax(1) == labels).sum().item()

    return step


def textbook_call(case: Case, device: torch.device) -> Callable[[], None]:
    """What a turn of the textbook script calls."""
    if case.part == "lrn":
        return lrn_call(case, nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0), torch.contiguous_format)
    if case.part == "step":
        step = textbook_step(device)
        images, labels = random_batch(case, device)
        return lambda: step(images, labels)
    if case.part == "inference":
        network = textbook_network().to(device).eval()
        images, _ = random_batch(case, device)
        return torch.no_grad()(lambda: network(images))

    loader = DataLoader(
        TextbookDataset(random_split(case.images)),
        case.batch_size,
        shuffle=True,
        num_workers=case.workers,
        persistent_workers=True,
        # The system's usual way, as in a script: this process was itself started in another.
        multiprocessing_context=multiprocessing.get_all_start_methods()[0],
        pin_memory=device.type == "cuda",
    )
    step = textbook_step(device) if case.part == "loop" else lambda images, labels: None

    def epoch() -> None:
        for images, labels in loader:
            step(images.to(device), labels.to(device))

    return epoch


# ---------------------------------------------------------------------------------------------
# This project
# ---------------------------------------------------------------------------------------------


def our_call(case: Case, device: torch.device) -> Callable[[], None]:
    """What a turn of this project calls."""
    if case.part == "lrn":
        return lrn_call(case, LocalResponseNorm(), torch.channels_last)
    if case.part == "inference":
        return our_inference(case, device)
    if case.part == "step":
        run = our_run(case, device)
        images, labels = (part[run.processes.share] for part in random_batch(case, device))
        images = in_fast_layout(images)
        return lambda: train_step(run, images, labels)

    split = random_split(case.images).to(device)
    run = our_run(case, device) if case.part == "loop" else None

    def epoch() -> None:
        batches = training_batches(
            split, Preprocessing(MEAN, STD), Augmentation(), case.batch_size, 0, 0
        )
        for images, labels in batches:
            if run:
                train_step(run, images, labels)

    return epoch


def our_inference(case: Case, device: torch.device) -> Callable[[], Tensor]:
    """Inference on a batch as this project does it."""
    network = AlexNet().to(device, memory_format=torch.channels_last).eval()
    if case.side == "compiled":
        network = compiled(network, device)
    images, _ = random_batch(case, device)
    images = in_fast_layout(images)

    @torch.no_grad()
    def infer() -> Tensor:
        with autocast(device, case.precision):
            return network(images)

    return infer


def our_run(case: Case, device: torch.device) -> Run:
    """A training run as train.py makes it, which no step of the benchmark writes to."""
    split = random_split(case.batch_size)
    dataset = Dataset([str(i) for i in range(10)], split, split, split)
    given = {
        "precision": case.precision,
        "batch_size": case.batch_size,
        "mix": "none",  # as the textbook has none
        "compile": case.side == "compiled",
    }
    return Run(Path("unused"), new_config(given), dataset, device, Processes())


# ---------------------------------------------------------------------------------------------
# Both
# ---------------------------------------------------------------------------------------------


def random_split(n: int) -> Split:
    """n images of noise, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 10)


def random_batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal noise [B, 3, 227, 227] and labels [B]."""
    images = torch.randn(case.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    return images, torch.arange(case.batch_size, device=device) % 10


def lrn_call(case: Case, norm: nn.Module, memory_format: torch.memory_format):
    """Both normalisations of the network, forward and backward."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    pairs = []
    for shape in ((96, 55, 55), (256, 27, 27)):
        a = torch.randn(case.batch_size, *shape, device=case.device, dtype=dtype).relu()
        a = a.contiguous(memory_format=memory_format).requires_grad_()
        pairs.append((a, torch.randn_like(a)))

    def call() -> None:
        for a, grad in pairs:
            torch.autograd.grad(norm(a), a, grad)

    return call


def product_call(case: Case, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """The fastest of some square matrix products, and its operations.

    As a product and as a 1x1 convolution, because torch computes them with different libraries.
    """
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    candidates = []
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        image = a.view(1, n, n // 32, 32).contiguous(memory_format=torch.channels_last)
        filters = b.view(n, n, 1, 1)
        candidates.append((lambda a=a, b=b: a @ b, 2 * n**3))
        candidates.append((lambda x=image, w=filters: F.conv2d(x, w), 2 * n**3))

    def speed(candidate) -> float:
        call, operations = candidate
        return operations / seconds_of(call, repeats_of(call, device), device)

    with torch.no_grad():
        return max(candidates, key=speed)


def seconds_of(call: Callable, repeats: int, device: torch.device) -> float:
    """Mean duration of a call."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def repeats_of(call: Callable, device: torch.device) -> int:
    """How many calls make a turn; warms up on the way."""
    seconds_of(call, 2, device)
    return math.ceil(SECONDS_PER_TURN / seconds_of(call, 1, device))


def usable_cores() -> int:
    """Cores that this process may use, which on a shared machine can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---------------------------------------------------------------------------------------------
# Processes that take turns
# ---------------------------------------------------------------------------------------------


def work(case: Case, connection) -> None:
    """The life of a process: measures the case, until the other end says stop or is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows it is not inherited
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends a loader too
    try:
        serve(case, connection)
    except (EOFError, ConnectionError):
        return
    except (RuntimeError, UserError) as error:
        connection.send(UserError(f"measuring {case} failed ({first_line(error)})"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself, in good order


def serve(case: Case, connection) -> None:
    """Prepares the case when sent environment variables, then measures a turn each time."""
    connection.send("ready")
    os.environ.update(connection.recv())
    if case.side != "textbook":
        keep_freed_memory()
    if case.part == "pipeline-1-core":
        torch.set_num_threads(1)
    device, processes = torch.device(case.device), Processes()
    if processes.count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes.count))
        processes.connect()
        device = processes.select_device(device.type)
    operations = None
    if case.side == "product":
        call, operations = product_call(case, device)
    elif case.side == "textbook":
        call = textbook_call(case, device)
    else:
        call = our_call(case, device)
    [repeats] = processes.highest(repeats_of(call, device))
    connection.send(operations)
    while connection.recv() == "turn":
        connection.send(seconds_of(call, repeats, device))
    connection.send(peak_memory_mib(device))


class Worker:
    """A process that measures one case, seen from the outside."""

    def __init__(self, case: Case):
        self.case = case
        self.seconds: list[float] = []
        context = multiprocessing.get_context("spawn")
        self.connection, other_end = context.Pipe()
        # Not a daemon: a textbook side has worker processes of its own.
        self.process = context.Process(target=work, args=(case, other_end))
        self.process.start()
        other_end.close()

    def ask(self, message):
        """The process's answer. Raises UserError if it failed or is no more."""
        return ask_all([self], [message])[0]

    def answer(self):
        try:
            result = self.connection.recv()
        except (EOFError, ConnectionError):
            result = UserError(f"measuring {self.case} was ended, perhaps for want of memory")
        if isinstance(result, UserError):
            raise result
        return result


@contextlib.contextmanager
def interrupts_delayed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and never reaches processes started there.

    On Windows it reaches them until they have imported what they need.
    """
    arrived = []
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    # Another thread, such as the progress bar's, is sent what the main one blocks.
    handler = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        if can_block:
            resource_tracker.ensure_running()  # which the first process starts, and which unblocks
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if arrived:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def started(cases: list[Case]) -> Iterator[list[Worker]]:
    """A process for each case, all imports done; none outlives the block."""
    workers = []
    try:
        with interrupts_delayed():
            for case in cases:
                workers.append(Worker(case))
        for worker in workers:
            worker.answer()
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()  # after an error one may be in the middle of a turn
        for worker in workers:
            worker.process.join(PATIENCE)
            worker.process.kill()  # in the middle of one long operation
            worker.process.join()


def ask_all(workers: list[Worker], messages: list) -> list:
    """What each process answers, all of them being asked before the first answer is waited for."""
    for worker, message in zip(workers, messages, strict=True):
        with contextlib.suppress(ConnectionError):  # which answer() reports
            worker.connection.send(message)
    return [worker.answer() for worker in workers]


def finish(workers: list[Worker]) -> list[int | None]:
    """Ends the processes. Returns the peak memory of each in MiB."""
    memory = ask_all(workers, ["stop"] * len(workers))
    for worker in workers:
        worker.process.join()
    return memory


def measure(cases: list[Case], rounds: int) -> list[dict]:
    """A row for each case but the products, measured in turns."""
    with started(cases) as workers:
        operations = [worker.ask({}) for worker in workers]
        for _ in range(rounds):
            for worker in workers:
                worker.seconds.append(worker.ask("turn"))
        memory = finish(workers)
    peaks = {
        worker.case.precision: [count / s for s in worker.seconds]
        for worker, count in zip(workers, operations, strict=True)
        if count
    }
    return [  # the first is the textbook's
        row_of(worker, workers[0], memory_mib, peaks)
        for worker, memory_mib in zip(workers, memory, strict=True)
        if worker.case.side != "product"
    ]


def row_of(worker: Worker, textbook: Worker, memory: int | None, peaks: dict) -> dict:
    """Medians over the rounds with the lowest and the highest.

    Ratios are taken round by round; peaks are a product's operations per second, by precision.
    """
    case = worker.case
    row = asdict(case) | {
        "name": PARTS[case.part],
        "images_per_second": spread(case.images / s for s in worker.seconds),
        "times_the_textbook": spread(
            other / own for other, own in zip(textbook.seconds, worker.seconds, strict=True)
        ),
        "peak_memory_mib": memory,
    }
    if case.precision in peaks:
        operations = case.images * operations_per_image(training=case.part != "inference")
        turns = list(zip(worker.seconds, peaks[case.precision], strict=True))
        row["peak_gflops"] = spread(peak / 1e9 for _, peak in turns)
        row["share_of_peak"] = spread(operations / seconds / peak for seconds, peak in turns)
    return row


def spread(values) -> list[float]:
    """[median, lowest, highest]"""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def operations_per_image(training: bool) -> int:
    """Multiplications and additions of the convolutions and fully connected layers."""
    with torch.device("meta"):
        network, image = AlexNet(), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        logits = network(image)
        if training:
            logits.sum().backward()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def comparison(
    part: str, batch_size: int, sides: list[tuple[str, str]], device: torch.device, workers: int
) -> list[Case]:
    """The cases to measure in turns, the textbook script's first; sides are (side, precision)."""
    images = batch_size
    if part in WHOLE_EPOCHS:
        # Long enough to be timed, short enough for a CPU.
        on_cpu = 2 if part == "loop" else 8
        images *= 80 if device.type == "cuda" else on_cpu
    if part in ("pipeline", "pipeline-1-core"):
        sides = [("here", "fp32")]
    elif part == "lrn":
        sides = [side for side in sides if side[0] == "here"]
    elif part == "loop":
        sides = [side for side in sides if side[0] != "product"]
    workers = 1 if part == "pipeline-1-core" else workers
    return [
        Case(part, side, precision, batch_size, images, device=str(device), workers=workers)
        for side, precision in [("textbook", "fp32"), *sides]
    ]


def sides_of(precision: str, with_compile: bool) -> list[tuple[str, str]]:
    """(side, precision) of all that a comparison may hold beside the textbook script."""
    precisions = ["fp32"] if precision == "fp32" else ["fp32", precision]
    sides = [(side, p) for side in ("here", "product") for p in precisions]
    return [*sides, ("compiled", precision)] if with_compile else sides


def step_case(precision: str, batch_size: int, device: torch.device) -> Case:
    """A training step of this project, by itself."""
    return Case(
        "step", "here", precision, batch_size, images=batch_size, device=str(device), workers=0
    )


def measure_growth(precision: str, device: torch.device) -> Iterator[dict]:
    """Time and memory of a training step by number of processes and batch size, one by one."""
    # Several processes need several devices, and cuda:1 is one.
    most = {"cpu": 2, "cuda": torch.cuda.device_count()}.get(str(device), 1)
    counts = [2**i for i in range(most.bit_length())]
    sizes = {count: [size for size in GROWTH_BATCH_SIZES if size >= count] for count in counts}
    total = sum(map(len, sizes.values()))
    with tqdm(total=total, desc="batch sizes", leave=False, disable=None) as bar:
        for count in counts:
            cases = [
                step_case(precision, size, device) for size in sizes[count] for _ in range(count)
            ]
            with started(cases) as workers:
                for i, size in enumerate(sizes[count]):
                    together = workers[i * count : (i + 1) * count]
                    yield {"processes": count, "batch_size": size, **measure_together(together)}
                    bar.update()


def measure_together(workers: list[Worker]) -> dict:
    """Time of a step, and memory, of processes that share its batch."""
    count = len(workers)
    ask_all(workers, environments(count))
    seconds = [max(ask_all(workers, ["turn"] * count)) for _ in range(3)]
    memory = finish(workers)
    total = None if None in memory else sum(memory)
    return {"seconds": statistics.median(seconds), "peak_memory_mib": total}


def environments(count: int) -> list[dict]:
    """The environment variables that torchrun would give to each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**everyone, "RANK": i, "LOCAL_RANK": i}.items()}
        for i in range(count)
    ]


def measure_operations(precision: str, batch_size: int, device: torch.device) -> list[dict]:
    """Where the time of a training step goes: milliseconds by torch operation, most first."""
    keep_freed_memory()
    call = our_call(step_case(precision, batch_size, device), device)
    seconds_of(call, 5, device)
    # Keeps the profiler's own notices off the screen.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile() as profiler:
        seconds_of(call, PROFILED_STEPS, device)
    on_device = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [
        {
            "operation": event.key,
            "milliseconds": getattr(event, on_device) / 1000 / PROFILED_STEPS,
            "calls": event.count // PROFILED_STEPS,
        }
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU  # a GPU's kernels are counted by what called them
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])


def print_operations(rows: list[dict], batch_size: int) -> None:
    """The profiler's operations, the slowest first."""
    total = sum(row["milliseconds"] for row in rows) or 1.0  # a profiler may see nothing
    print(f"\nby operation: {short(total)} ms, training step at batch {batch_size} in the profiler")
    for row in rows[:OPERATIONS_SHOWN]:
        share = row["milliseconds"] / total
        print(
            f"{row['operation']:<46}{row['milliseconds']:>9.2f} ms {share:>6.1%} "
            f"{row['calls']:>6} calls"
        )


def growth_line(row: dict) -> str:
    """Speed and memory of a training step at a batch size and number of processes."""
    memory = f", {row['peak_memory_mib']:,} MiB" if row["peak_memory_mib"] else ""
    return (
        f"{row['processes']} process{'es' if row['processes'] > 1 else ''}, "
        f"batch {row['batch_size']}: {row['seconds']:.4g} s, "
        f"{short(row['batch_size'] / row['seconds'])} images/s{memory}"
    )


def table_line(row: dict) -> str:
    """A side of a comparison under TABLE_HEAD, with spread."""
    name = f"{PARTS[row['part']]}: {side_name(row)}"
    rates = "{} ({} to {})".format(*map(short, row["images_per_second"]))
    ratios = "{:.2f} ({:.2f} to {:.2f})".format(*row["times_the_textbook"])
    share = row.get("share_of_peak")
    shares = "{:.0%} ({:.0%} to {:.0%})".format(*share) if share else ""
    memory = f"{row['peak_memory_mib']:,} MiB" if row["peak_memory_mib"] else ""
    return f"{name:<46}{row['batch_size']:>6}  {rates:<25}  {ratios:<22}{memory:>10}  {shares:<16}"


def short(number: float) -> str:
    """Four digits, or all of a larger whole number."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def side_name(row: dict) -> str:
    """For the tables: the textbook, or this project with its precision."""
    return row["side"] if row["side"] == "textbook" else f"{row['side']}, {row['precision']}"


def batch_making_share(rows: list[dict]) -> str | None:
    """How much of the fastest training step its batch takes to make, at the largest batch size."""
    batch_size = max(row["batch_size"] for row in rows)
    ours = [row for row in rows if row["side"] != "textbook" and row["batch_size"] == batch_size]
    rates = {}
    for row in ours:  # in one precision or several, compiled or not
        rates[row["part"]] = max(row["images_per_second"][0], rates.get(row["part"], 0))
    if "step" not in rates or "pipeline" not in rates:
        return None
    shares = {part: rates["step"] / rates[part] for part in rates if part.startswith("pipeline")}
    words = ", ".join(f"{PARTS[part]} {share:.1%}" for part, share in shares.items())
    return f"time to make a batch, as a share of the fastest training step at {batch_size}: {words}"


# ---------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Measure this project beside the textbook script.")
    add = parser.add_argument
    add("--parts", nargs="+", choices=ALL_PARTS, default=ALL_PARTS, help="default: all")
    add(
        "--batch-sizes",
        nargs="+",
        type=positive_int,
        default=[32, 128],
        metavar="N",
        help="default: 32 128",
    )
    add("--rounds", type=positive_int, default=7, help="turns of each side; default: 7")
    add(
        "--workers",
        type=positive_int,
        help="of the textbook's DataLoader; default: 8, or fewer cores",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--compile", action="store_true", help="measure torch.compile's network too")
    add("--json", type=output_file, metavar="FILE", help="write all results to FILE")
    add("--figure", type=output_file, metavar="FILE", help="draw the results")
    add(
        "--growth-figure",
        type=output_file,
        metavar="FILE",
        help="draw time and memory by batch size",
    )
    return parser.parse_args()


def save(results: dict, path: Path | None) -> None:
    """Writes all results so far, if there is a file for them."""
    if path:
        write_json(path, results)


def main() -> None:
    args = parse_arguments()
    device = select_device(args.device)
    precision = select_precision("auto", device)
    sides = sides_of(precision, args.compile)
    workers = args.workers or min(8, usable_cores())
    about = environment(device) | {"workers": workers, "rounds": args.rounds}
    print(
        f"torch {about['torch']} on {about['device']}, {workers} workers for the textbook's loader"
    )

    comparisons = [
        comparison(part, batch_size, sides, device, workers)
        for part in args.parts
        if part in PARTS and (part != "pipeline-1-core" or device.type == "cpu")
        for batch_size in args.batch_sizes
    ]
    rows, operations, growth = [], [], []
    results = {"environment": about, "rows": rows, "operations": operations, "growth": growth}
    # Each result is shown and saved at once: it took minutes, and the next may want more memory.
    if comparisons:
        print(TABLE_HEAD)
    for cases in tqdm(comparisons, "comparisons", leave=False, disable=None):
        for row in measure(cases, args.rounds):
            rows.append(row)
            tqdm.write(table_line(row))
        save(results, args.json)
    if rows:
        if share := batch_making_share(rows):
            print(share)
        if args.figure:
            figures.save_figure(figures.speed(rows, about["device"]), args.figure)
    if "operations" in args.parts:
        operations += measure_operations(precision, max(args.batch_sizes), device)
        save(results, args.json)
        print_operations(operations, max(args.batch_sizes))
    if "growth" in args.parts:
        print("\ntraining step by batch size")
        for row in measure_growth(precision, device):
            growth.append(row)
            tqdm.write(growth_line(row))
            save(results, args.json)
            if args.growth_figure:
                figures.save_figure(figures.growth(growth, about["device"]), args.growth_figure)


if __name__ == "__main__":
    run_script(main)
