import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile

import pytest
import torch
from conftest import ROOT, needs_gpu, run_python

import utils
from checkpoint import load_checkpoint, save_checkpoint
from pictures import read_image
from recipes import read_record
from utils import (
    FolderLock,
    StopRequest,
    UserError,
    atomic_write,
    count_of,
    duration,
    select_device,
    select_precision,
)

CPU = torch.device("cpu")


def run_and_raise(error):
    """Return the exit code of a script that raises this error."""

    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        utils.run_script(fail)
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("first\nsecond"), 2, "error: first second"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "free some disk space"),
        (MemoryError(), 2, "error: out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory; "),
        (RuntimeError("MPS backend out of memory (8.00 GB)"), 2, "error: out of memory; "),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory; "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_a_user_can_cause_is_one_line(signal_handlers, capsys, error, code, message):
    assert run_and_raise(error) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert message in text


def test_closed_pipe_is_told_by_the_code_alone(monkeypatch, capsys):
    """As with | head."""
    monkeypatch.setattr(utils, "_discard", lambda stream: None)
    assert run_and_raise(BrokenPipeError()) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), OSError(errno.EACCES, "x"), FileNotFoundError("x")]
)
def test_programming_error_keeps_its_traceback(error):
    """So does an OSError that is not of a user's file."""
    with pytest.raises(type(error)):
        run_and_raise(error)


def load_damaged(path):
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    load_checkpoint(path)


def read_content(function, path, content):
    path.write_bytes(content)
    function(path)


def lock_twice(path):
    first = FolderLock(path.parent)
    try:
        FolderLock(path.parent)
    finally:
        first.release()


def write(path, content="x"):
    with atomic_write(path) as temporary:
        temporary.write_text(content)


@pytest.mark.parametrize(
    ("fail", "cause"),
    [
        (load_checkpoint, FileNotFoundError),
        (load_damaged, BadZipFile),
        (lambda path: read_content(read_record, path, b"{"), ValueError),
        (lambda path: read_content(utils.read_csv, path, b"\xff"), UnicodeDecodeError),
        (lambda path: read_content(partial(read_image, size=8), path, b"x"), Exception),
        (lambda path: select_device("cuda:99"), Exception),
        (lambda path: write(path / "x"), FileNotFoundError),
        (lock_twice, BlockingIOError),
    ],
)
def test_error_for_the_user_keeps_its_cause(tmp_path, fail, cause):
    with pytest.raises(UserError) as caught:
        fail(tmp_path / "x.pt")
    assert isinstance(caught.value.__cause__, cause)
    assert str(caught.value).count("\n") == 0


def test_scripts_started_by_python_are_wired(tmp_path):
    """tests/test_train.py starts train.py."""
    pipes = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = ["evaluate.py", "x.pt"], ["predict.py", "x.pt", "x.png"], ["figures.py", "x"]
    started = [
        subprocess.Popen([sys.executable, ROOT / script, *arguments], **pipes)
        for script, *arguments in commands
    ]
    for (script, *_), process in zip(commands, started, strict=True):
        output, error = process.communicate(timeout=300)
        assert (process.returncode, output, error.count("\n")) == (2, "", 1)
        assert error.startswith(f"{script}: error: ")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no such terminals")
def test_line_to_a_terminal_that_was_closed_is_dropped(monkeypatch):
    ours, theirs = os.openpty()
    os.close(ours)
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        utils.log("nobody reads this")
        utils.log("nor this")


def test_numbers_for_people():
    assert [count_of(n, "epoch") for n in (0, 1, 45_000)] == [
        "0 epochs",
        "1 epoch",
        "45,000 epochs",
    ]
    cases = {1.2: "1 second", 89: "89 seconds", 150: "2 minutes", 5000: "83 minutes"}
    cases |= {5400: "1.5 hours"}
    assert {seconds: duration(seconds) for seconds in cases} == cases


def test_first_interrupt_is_a_request_and_the_second_stops_at_once(signal_handlers, capfd):
    """After another signal an interrupt is the first: what is about to be saved is not lost."""
    stop = StopRequest()
    assert stop.signal == 0
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
        assert stop.signal == number
    assert "Ctrl-C again" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_closed_terminal_is_a_request_except_under_nohup(signal_handlers):
    for handler, expected in ((signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)):
        signal.signal(signal.SIGHUP, handler)
        stop = StopRequest()
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == expected


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("system", "environ", "expected"),
    [
        ("posix", {}, "python train.py --resume 'runs/my $run'"),
        ("nt", {}, 'python train.py --resume "runs/my $run"'),
        ("posix", TORCHRUN, "torchrun --nproc_per_node=4 train.py --resume 'runs/my $run'"),
    ],
)
def test_command_is_quoted_for_the_users_shell(monkeypatch, system, environ, expected):
    monkeypatch.setattr(utils, "os", SimpleNamespace(name=system, environ=environ))
    assert utils.command_line("train.py", "--resume", Path("runs/my $run")) == expected


@pytest.mark.parametrize(
    ("device", "hardware", "expected"),
    [
        ("cuda", (7, 0), "fp16"),
        ("cuda", (7, 5), "fp16"),
        ("cuda", (8, 0), "bf16"),
        ("cpu", ("AMD EPYC", []), "fp32"),
        ("cpu", ("AMD EPYC", ["avx512_bf16"]), "bf16"),
        ("cpu", ("Intel(R) Xeon(R)", ["avx512_bf16"]), "fp32"),
        ("cpu", ("Intel(R) Xeon(R)", ["avx512_bf16", "amx_bf16"]), "bf16"),
        ("mps", None, "fp32"),
    ],
)
def test_automatic_precision_is_what_the_hardware_is_made_for(
    monkeypatch, device, hardware, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: hardware)
    if device == "cpu":
        name, names = hardware
        monkeypatch.setattr(utils, "_cpu_name", lambda: name)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
    assert select_precision("auto", torch.device(device)) == expected
    assert select_precision("fp16", torch.device(device)) == "fp16"  # whoever asks gets it
    with pytest.raises(ValueError, match="precision must be auto or fp32 or fp16 or bf16, got x"):
        select_precision("x", torch.device(device))


def test_products_are_of_the_precision():
    for name, dtype in utils.PRECISIONS.items():
        with utils.autocast(CPU, name):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_device_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == CPU
    for name in ("meta", "tpu9", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}"):
            select_device(name)


def test_deterministic_asks_torch_and_cublas_and_refuses_mps(monkeypatch):
    """The documentation of torch.use_deterministic_algorithms names MaxPool2d on MPS."""
    with pytest.raises(UserError, match="--deterministic"):
        utils.make_deterministic(torch.device("mps"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back when the test ends
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    utils.make_deterministic(CPU)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")  # that documentation's


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_seed_is_torchs(name):
    device = torch.device(name, torch.cuda.device_count() - 1) if name == "cuda" else CPU
    utils.seed_device(device, 5)
    ours = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.rand(3, device=device))


@pytest.mark.long
def test_peak_memory_is_of_this_process_alone(tmp_path):
    """A child of a process that holds 600 MiB more; Linux's ru_maxrss would have those."""
    (tmp_path / "program.py").write_text(
        "import subprocess, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, utils\n"
        "if len(sys.argv) > 1:\n"
        "    held = b'x' * (600 * 2**20)\n"
        "    subprocess.run([sys.executable, sys.argv[0]], check=True)\n"
        "print(utils.peak_memory_mib(torch.device('cpu')), flush=True)\n"
    )
    done = run_python(tmp_path / "program.py", "parent", cwd=tmp_path)
    child, parent = map(int, done.stdout.split())
    assert 100 < child < parent - 500


def test_write_replaces_the_file_at_its_end(tmp_path):
    path, plain = tmp_path / "file", tmp_path / "plain"
    for each in (path, plain):
        each.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode == plain.stat().st_mode
    assert {each.name for each in tmp_path.iterdir()} == {"file", "plain"}


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (RuntimeError("unexpected pos 576 vs 470"), UserError),  # torch.save's for a full disk
        (torch.OutOfMemoryError("CUDA"), torch.OutOfMemoryError),  # not the file's
        (torch.AcceleratorError("CUDA"), torch.AcceleratorError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failed_write_leaves_the_old_file(tmp_path, error, raised):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(raised):
        write_half()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "old")]


def test_folder_is_locked_until_it_is_released(tmp_path):
    first = FolderLock(tmp_path)
    with pytest.raises(UserError, match=f"another process is writing to {tmp_path}"):
        FolderLock(tmp_path)
    first.release()
    first.release()
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_environment_names_the_commit():
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = utils.environment(CPU)["git_commit"]
    assert (commit or "").removesuffix("-modified") == done.stdout[:12]
