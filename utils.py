"""What the scripts share: errors, options, device, precision, files, the record of a run."""

import argparse
import contextlib
import csv
import ctypes
import errno
import json
import math
import os
import platform
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

UNFINISHED = ".unfinished-"  # how a file is called until it is whole
# What values of wrong types or sizes in a checkpoint can raise where they are used.
DAMAGE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


class UserError(Exception):
    """What the user can put right. Its one line names the file or option and says what to do."""


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits into one line; its type if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def run_script(main) -> None:
    """Calls main() and exits with its code; what a user can cause becomes one line and code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        code = _code_of(main)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + 13)  # as a shell reports SIGPIPE
    except (UserError, OSError) as error:
        _exit_with_line(f"error: {error}", 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it without a traceback
        _exit_with_line("interrupted", 128 + signal.SIGINT)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "free some, use --device cpu, or train with a smaller --batch-size"
        _exit_with_line(f"error: out of memory; {advice}", 2)


def _code_of(main) -> int | None:
    try:
        return main()
    except SystemExit as stopped:  # as after --help
        return stopped.code


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that there is too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Of CPUs, of CPUs on Windows, of cuDNN, of Apple's GPUs.
    words = ("allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    return any(word in str(error) for word in words)


def _exit_with_line(message: str, code: int) -> None:
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""  # by torchrun
    print(f"{Path(sys.argv[0]).name}{process}: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, which the message is about
        _drop_output()
    sys.exit(code)


def say(text: str) -> None:
    """Prints a line at once. If nobody can read it, StopRequest hears so (SIGPIPE, SIGHUP)."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a closed pipe, a closed terminal
            raise
        _drop_output()


def _drop_output(stream=None) -> None:
    """Sends the stream, by default stdout, to nowhere, as its reader has gone (head, for one)."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), (stream or sys.stdout).fileno())


class StopRequest:
    """Turns Ctrl-C, SIGTERM, a closed terminal or pipe (as head leaves it) into a request to stop.

    A second Ctrl-C stops at once. A second SIGTERM does not: a cluster's manager and torchrun may
    each send one. Under nohup the terminal may be closed.
    """

    def __init__(self):
        self.signal = 0  # its number, once there is one
        self._on_terminal = [f for f in (sys.stdout, sys.stderr) if f.isatty()]
        for name in ("SIGINT", "SIGTERM", "SIGPIPE", "SIGHUP"):
            if not hasattr(signal, name):  # Windows has but two
                continue
            number = getattr(signal, name)
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._request)

    def _request(self, number, _frame) -> None:
        self.signal = number
        if number == getattr(signal, "SIGHUP", None):
            for stream in self._on_terminal:  # which is gone: writing to it would be an error
                _drop_output(stream)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._say_how_to_stop_at_once()

    def _say_how_to_stop_at_once(self) -> None:
        if "RANK" in os.environ:
            return  # torchrun has its own words
        with contextlib.suppress(OSError):  # not print, in the middle of which this may be
            os.write(2, b"\nstopping after this step; Ctrl-C again: at once, without saving\n")


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line without the whole usage."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def _number(kind: type, is_allowed: Callable, what: str, text: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan  # in no range
    if not is_allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


# Argparse types: functions of the text that the user gave.
positive_int = partial(_number, int, lambda n: n > 0, "a whole number above 0")
seed_number = partial(_number, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to below 2^63")
positive_float = partial(_number, float, lambda x: 0 < x < math.inf, "a number above 0")
non_negative_float = partial(_number, float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = partial(_number, float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
probability = partial(_number, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def output_file(text: str) -> Path:
    """An argparse type, for a file to be written once the work is done."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


# ---------------------------------------------------------------------------------------------
# Device and precision
# ---------------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """The device called name: "auto" (a CUDA GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps".

    Raises UserError if torch does not know it or cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).add(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a GPU too old for this torch fails only here
    except Exception as error:  # torch raises many types
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}); try --device cpu"
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or mps")
    return device


PRECISIONS = ("auto", "fp32", "bf16")


def select_precision(name: str, device: torch.device) -> str:
    """The name unless it is "auto": then bf16 if the hardware is made for it, else fp32.

    Raises ValueError for a name other than "auto", "fp32" and "bf16".
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be {' or '.join(PRECISIONS)}, got {name}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "fp32"


def _cpu_multiplies_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs in this precision ("fp32" or "bf16")."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds torch's generators of the CPU and the device.

    torch.manual_seed(), which asks every kind of device that there is, takes longer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def compiled(network: torch.nn.Module, device: torch.device):
    """The network fused by torch.compile; on a GPU replayed as CUDA graphs.

    It is compiled anew for every other shape of input: to be called with one batch size only.
    """
    torch.compiler.reset()  # an earlier run of this process counts against torch's limit
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(network, dynamic=False, mode=mode)


def is_compiler_error(error: RuntimeError) -> bool:
    """Whether torch.compile failed, for want of a C++ compiler for example."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def make_deterministic(device: torch.device) -> None:
    """Lets torch take only operations that give the same bits each time, also on an NVIDIA GPU.

    Raises UserError for Apple's, where torch's max pooling has no such gradient.
    """
    if device.type == "mps":
        raise UserError(
            "--deterministic is for a CPU or an NVIDIA GPU; use --no-deterministic, or leave "
            "--device mps out"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Lets the process reuse the memory of freed tensors; call it before the first tensor.

    glibc returns each large block to the system when it is freed, and the next one costs a page
    fault per 4 KiB, in each training step. Does nothing without glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: larger pages for large tensors
    m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the CPU's and the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(device: torch.device) -> int | None:
    """The most memory that this process has taken so far; None if unknown.

    On a CUDA GPU what torch has reserved there, not what tensors occupy: CUDA graphs keep theirs
    reserved. Earlier runs of the process count, as in ablate.py.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) // 2**20
    with contextlib.suppress(OSError):  # Linux, whose getrusage counts the parent's memory as well
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 2**10  # from KiB
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------
# Files that are whole or not there
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yields a temporary path beside `path`, which replaces it once written and on the disk.

    Raises UserError if that cannot be done (a full disk, a folder that is not writable); `path`
    is then as it was.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}-{secrets.token_hex(4)}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError; a GPU's errors are of a subclass.
        if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
            raise
        raise UserError(f"cannot write {path}: {first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: dict | list) -> None:
    """Writes a JSON file that is whole or not there."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    """Writes the rows' values of these columns; the file is whole or not there."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict]:
    """A CSV file's rows as text, none if it is not there. Raises UserError if it is damaged."""
    if not path.exists():
        return []
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); use another") from None


def read_history(run_dir: Path) -> list[dict]:
    """A row for each epoch of a run: epoch, val_loss, val_accuracy, minutes of training so far.

    Raises UserError if it has no validated epochs.
    """
    try:
        history, seconds = [], 0.0
        metrics, timing = (read_csv(run_dir / name) for name in ("metrics.csv", "timing.csv"))
        for row, time in zip(metrics, timing, strict=False):  # the run may be between the two files
            seconds += float(time["seconds"])
            numbers = {name: float(row[name]) for name in ("epoch", "val_loss", "val_accuracy")}
            history.append({**numbers, "minutes": seconds / 60})
        if history:
            return history
    except (OSError, LookupError, ValueError, TypeError):
        pass
    raise UserError(f"{run_dir} has no validated epochs; name the folders of runs of train.py")


def finished_names(folder: Path) -> set[str]:
    """What is in a folder, but for what a killed process had begun to write."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(UNFINISHED)}


def remove_unfinished(folder: Path) -> None:
    """Deletes what a killed process had begun to write to the folder; nobody else may use it."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            path.unlink()


class FolderLock:
    """Held by the process that writes to a folder, until release() or its end, even by kill -9.

    Raises UserError if another process holds it. Nothing is written. Windows, and file systems that
    know no locks, go without.
    """

    def __init__(self, folder: Path):
        self._handle = None
        if fcntl is None:
            return
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"another process is writing to {folder}; wait until it ends, or use another folder"
            ) from None
        except OSError:
            self.release()

    def release(self) -> None:
        """Lets others have the folder; may be called again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


# ---------------------------------------------------------------------------------------------
# What a run is made of
# ---------------------------------------------------------------------------------------------


def command_line(*arguments: str) -> str:
    """A command with these arguments, run by python, or by torchrun if this program was.

    Of torchrun's options it has the number of processes on a machine; the others are not known.
    """
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*launcher, *map(str, arguments)])


def environment(device: torch.device) -> dict:
    """Versions, hardware, git commit and command line: what one needs to repeat a run."""
    return {
        "command": command_line(*sys.argv),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """The commit of the code, "-modified" if tracked files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=-modified", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
