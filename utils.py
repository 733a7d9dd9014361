"""What the scripts share: errors, options, signals, device, precision, files, environment."""

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
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import kernels  # faster layers; the folder may be deleted
except ModuleNotFoundError as error:
    if error.name != "kernels":
        raise
    kernels = None

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What values of wrong types or sizes in a file can raise where they are used.
DAMAGE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
UNFINISHED = ".unfinished-"  # begins a file's name until it is complete


# --- Errors and output ---


class UserError(Exception):
    """An error the user can put right: one line that names the file or option and what to do."""


def summarize_error(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def user_file(action: str, path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block, which works on a file of the user, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {action} {path}: {error.strerror or error}") from error


def run_script(main: Callable[[], int | None]) -> None:
    """Call main() and exit with its code. What a user can cause becomes one line and code 2."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    try:
        try:
            code = main()
        except SystemExit as stopped:  # after --help
            code = stopped.code
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        code = 128 + 13  # as a shell reports SIGPIPE
    except UserError as error:
        code = _report(f"error: {error}", 2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends it without a traceback
        code = _report("interrupted", 128 + signal.SIGINT)
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            advice = "free some, use --device cpu, or train with a smaller --batch-size"
            code = _report(f"error: out of memory; {advice}", 2)
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            code = _report(f"error: {error}; free some disk space", 2)
        else:
            raise
    sys.exit(code)


def _report(message: str, code: int) -> int:
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""  # by torchrun
    print(f"{Path(sys.argv[0]).name}{process}: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, which the message is about
        _discard(sys.stdout)
    return code


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that there is too little memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Of CPUs, of CPUs on Windows, of cuDNN, of Apple's GPUs.
    words = ("allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def log(text: str) -> None:
    """Print a line at once. If the pipe or terminal is closed, drop it: a signal stops the run."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        _discard(sys.stdout)


def _discard(stream) -> None:
    """Send a stream to nowhere, as its reader has gone."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def count_of(number: int, noun: str) -> str:
    """Return "1 epoch", "2 epochs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, for people."""
    if seconds < 90:
        return count_of(round(seconds), "second")
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


class StopRequest:
    """Turn Ctrl-C, SIGTERM and a closed terminal or pipe into a request to stop after a step.

    A second Ctrl-C stops at once. A second SIGTERM does not: a cluster's manager and torchrun may
    each send one. Under nohup the terminal may be closed.
    """

    def __init__(self):
        self.signal = 0  # its number, once there is one
        self._terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        for name in ("SIGINT", "SIGTERM", "SIGPIPE", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has only two
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._request)

    def _request(self, number, _frame) -> None:
        self.signal = number
        if number == getattr(signal, "SIGHUP", None):
            for stream in self._terminals:  # writing to a terminal that is gone would be an error
                _discard(stream)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if "RANK" not in os.environ:  # torchrun has its own words
                with contextlib.suppress(OSError):  # print() may be what this interrupts
                    os.write(2, b"\nstopping after this step; Ctrl-C again: at once, unsaved\n")


# --- Command line ---


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


# Types for argparse: functions of the option's text.
positive_int = partial(_number, int, lambda n: n > 0, "a whole number above 0")
seed_number = partial(_number, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to below 2^63")
positive_float = partial(_number, float, lambda x: 0 < x < math.inf, "a number above 0")
non_negative_float = partial(_number, float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = partial(_number, float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
probability = partial(_number, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --precision."""
    devices = "auto, cpu, cuda, cuda:1 or mps; default: auto"
    parser.add_argument("--device", default="auto", help=devices)
    what = "auto: 16 bits where the hardware is made for it; default: auto"
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help=what)


def output_file(text: str) -> Path:
    """Return the path of a file that can be written; an argparse type."""
    path = Path(text)
    with user_file("write", path):
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
        if path.exists() and not path.is_file():
            raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


def command_line(*arguments: str | Path, alone: bool = False) -> str:
    """Return a command for the user's shell: python, or torchrun if this program was started so.

    Of torchrun's options it has the number of processes per machine; the others are not known.
    alone: it is a program of one process.
    """
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ and not alone:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join([*launcher, *map(str, arguments)])


def script_path(name: str) -> Path:
    """Return the path of a script beside the one that the user has started."""
    return Path(sys.argv[0]).with_name(name)


# --- Device and precision ---


def select_device(name: str) -> torch.device:
    """Return the device called "auto" (a CUDA GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps".

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
            f"--device {name} cannot be used here ({summarize_error(error)}); try --device cpu"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or mps")
    return device


def select_precision(name: str, device: torch.device) -> str:
    """Return "fp32", "fp16" or "bf16": the name, or for "auto" what the hardware is made for.

    Raises ValueError for another name.
    """
    if name in PRECISIONS:
        return name
    if name != "auto":
        raise ValueError(f"precision must be auto or {' or '.join(PRECISIONS)}, got {name}")
    if device.type == "cuda":  # tensor cores have bf16 since compute capability 8.0 (Ampere)
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        return "bf16" if _cpu_is_fast_in_bf16() else "fp32"
    return "fp32"


def _cpu_is_fast_in_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return True
    # Faster than float32 on AMD's (results/speed/cpu.json), slower on Intel's (no-amx.txt).
    return bool(capabilities.get("avx512_bf16")) and "AMD" in _cpu_name()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which the network runs in this precision."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)


def to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in its fast memory format and with kernels/; return it."""
    network.to(device, memory_format=torch.channels_last)
    return kernels.accelerate(network) if kernels else network


def seed_device(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and the device.

    torch.manual_seed() asks every kind of device there is, which takes longer.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def compile_network(network: nn.Module, device: torch.device) -> nn.Module:
    """Return the network fused by torch.compile, on a GPU replayed as CUDA graphs.

    It is compiled anew for every other shape of input: call it with one batch size only.
    """
    torch.compiler.reset()  # an earlier run of this process counts against torch's limit
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(network, dynamic=False, mode=mode)


def make_deterministic(device: torch.device) -> None:
    """Let torch use only operations that give the same bits each time, also on an NVIDIA GPU.

    Raises UserError for Apple's, where torch's max pooling has no such gradient.
    """
    if device.type == "mps":
        raise UserError("--deterministic is for a CPU or an NVIDIA GPU; leave --device mps out")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Let the process reuse the memory of freed tensors; call it before the first tensor.

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
    """Return the GPU's name, or the CPU's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return f"{_cpu_name()}, {count_of(torch.get_num_threads(), 'thread')}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mib(device: torch.device) -> int | None:
    """Return the most memory in MiB that this process has taken so far; None if unknown.

    On a CUDA GPU it is what torch has reserved there, as CUDA graphs keep theirs reserved.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) // 2**20
    with contextlib.suppress(OSError):  # Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 2**10  # from KiB
    return None


# --- Files ---


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces it once written and on the disk.

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
        raise UserError(f"cannot write {path}: {summarize_error(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: dict | list) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    """Write the rows' values of these columns atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return a CSV file's rows, none if it does not exist. Raises UserError if it is damaged."""
    try:
        with user_file("read", path):
            if not path.exists():
                return []
            with open(path, newline="") as file:
                return list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); use another") from error


def finished_names(folder: Path) -> set[str]:
    """Return the names in a folder, without what a killed process had begun to write."""
    with user_file("read", folder):
        return {path.name for path in folder.iterdir() if not path.name.startswith(UNFINISHED)}


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process had begun to write to the folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            path.unlink()


class FolderLock:
    """Keep other processes from writing to a folder until release() or the end of the process.

    Raises UserError if another process holds it. Nothing is written. Windows, and file systems
    without locks, go without.
    """

    def __init__(self, folder: Path):
        self._handle = None
        if fcntl is None:
            return
        with user_file("open", folder):
            self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(
                f"another process is writing to {folder}; wait until it ends, or use another folder"
            ) from error
        except OSError:
            self.release()

    def release(self) -> None:
        """Give the folder free; may be called again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


# --- The record of a run ---


def environment(device: torch.device) -> dict:
    """Return versions, hardware, git commit and command: what one needs to repeat a run."""
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
    """Return the code's commit, "-modified" if tracked files differ from it; None without git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=-modified", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
