import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_gpu, run_python

from utils import (
    OneLineParser,
    StopRequest,
    UserError,
    atomic_write,
    autocast,
    make_deterministic,
    run_script,
    say,
    seed_device,
    select_device,
    select_precision,
)


def test_write_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("full")])
def test_failed_write_leaves_the_file_as_it_was(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(UserError, match="cannot write"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_error_of_a_gpu_is_not_told_as_one_of_the_file(tmp_path, kind):
    def write_half():
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("ne")
            raise kind("CUDA error")

    with pytest.raises(kind):
        write_half()
    assert os.listdir(tmp_path) == []


def test_written_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_write(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_user_error_is_one_line_and_code_2(capsys):
    def fail():
        raise UserError("first\nsecond")

    with pytest.raises(SystemExit) as stopped:
        run_script(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("error: first second\n")


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends a process of Windows otherwise")
def test_second_interrupt_is_no_traceback(tmp_path):
    """Ctrl-C twice: the second one comes while Python cleans up."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import utils\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "def main():\n"
        "    raise KeyboardInterrupt\n"
        "utils.run_script(main)\n"
    )
    done = run_python(script, cwd=tmp_path)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "script.py: interrupted\n"


def test_ctrl_c_after_another_signal_is_the_first(handlers_restored):
    """One that stopped at once would lose what is about to be saved."""
    stop = StopRequest()
    signal.raise_signal(signal.SIGTERM)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pytest.fail("it stopped at once")
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="Windows has no such terminals")
def test_line_to_a_terminal_that_was_closed_is_dropped(monkeypatch):
    ours, theirs = os.openpty()
    os.close(ours)
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        say("nobody reads this")
        say("nor this")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_line_to_a_full_disk_is_an_error(monkeypatch):
    with open("/dev/full", "w") as full, open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            say("this would be lost")
        os.dup2(nowhere.fileno(), full.fileno())  # or closing it would be an error too


def test_programming_error_is_not_hidden():
    def fail():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_script(fail)


def test_parser_takes_no_abbreviations():
    parser = OneLineParser()
    parser.add_argument("--epochs")
    with pytest.raises(UserError, match="--epo"):
        parser.parse_args(["--epo", "3"])


def test_precision_asked_for_is_kept():
    for name in ("fp32", "bf16"):
        assert select_precision(name, torch.device("cpu")) == name


def test_deterministic_products_are_asked_of_cublas(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back when the test ends
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    make_deterministic(torch.device("cpu"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert deterministic
    # One of the two values in torch.use_deterministic_algorithms's documentation.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")


def test_deterministic_is_refused_where_max_pooling_is_not():
    # The documentation of torch.use_deterministic_algorithms names MaxPool2d on MPS.
    with pytest.raises(UserError, match="--deterministic"):
        make_deterministic(torch.device("mps"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_products_are_of_the_precision_chosen():
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), name):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_automatic_precision_on_a_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert select_precision("auto", torch.device("cpu")) == expected


def test_precision_of_another_name_is_refused():
    with pytest.raises(ValueError, match="precision must be auto or fp32 or bf16, got fp16"):
        select_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_automatic_precision_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_precision("auto", torch.device("cuda")) == expected


def test_automatic_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")


def test_peak_memory_is_of_this_process_alone(tmp_path):
    """A child of a process that holds 600 MiB more than it; Linux's ru_maxrss would have those."""
    program = (
        "import subprocess, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, utils\n"
        "if len(sys.argv) > 1:\n"
        "    held = b'x' * (600 * 2**20)\n"
        "    subprocess.run([sys.executable, sys.argv[0]], check=True)\n"
        "print(utils.peak_memory_mib(torch.device('cpu')), flush=True)\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = run_python(tmp_path / "program.py", "parent", cwd=tmp_path)
    child, parent = map(int, done.stdout.split())
    assert 100 < child < parent - 500


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_one_line(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_script(fail)
    assert stopped.value.code == 2
    assert "out of memory" in capsys.readouterr().err


def test_seeds_what_dropout_draws_from():
    seed_device(torch.device("cpu"), 5)
    ours = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.rand(3))


@needs_gpu
def test_seeds_the_gpu_in_use():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    seed_device(device, 5)
    ours = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.rand(3, device=device))
