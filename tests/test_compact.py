"""compact.py: a network in a small file."""

from pathlib import Path

import numpy as np
import pytest
import torch

import compact
import evaluate
import train
from checkpoint import load_checkpoint, load_network, save_checkpoint
from utils import UserError


def test_small_file_stands_for_the_truncated_decomposition(tiny, tiny_run, capsys):
    """Computed by NumPy in float64; int8 numbers are within half a step of the largest."""
    assert tiny(tiny_run / "last.pt", "small.pt", "--rank", 9, script=compact) == 0
    size = Path("small.pt").stat().st_size
    assert f"wrote small.pt: {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert size < (tiny_run / "best.pt").stat().st_size / 2
    before, _, content = load_network(tiny_run / "last.pt")
    after, _, small = load_network("small.pt")
    assert small.keys() == content.keys() - {"optimizer", "scaler", "progress"}
    for name, old in before.state_dict().items():
        new, old = after.state_dict()[name].double().numpy(), old.double().numpy()
        if old.ndim == 1:
            np.testing.assert_array_equal(new, old)
        elif name in ("classifier.fc6.weight", "classifier.fc7.weight"):
            left, values, right = np.linalg.svd(old)
            expected = left[:, :9] * values[:9] @ right[:9]
            assert np.linalg.norm(new - expected) < 0.02 * np.linalg.norm(expected)
        else:
            step = np.abs(old.reshape(len(old), -1)).max(1) / 127
            error = np.abs(new - old).reshape(len(old), -1).max(1)
            assert (error <= 0.5001 * step).all()


def test_small_file_is_evaluated_and_not_resumed(tiny, tiny_run, capsys):
    assert tiny(tiny_run / "best.pt", "small.pt", "--rank", 48, script=compact) == 0
    assert tiny("small.pt", script=evaluate) == 0
    assert "small.pt: AlexNet after " in capsys.readouterr().out
    Path("small.pt").replace(tiny_run / "last.pt")
    assert tiny("--resume", "run", "--epochs", 3, script=train) == 2
    assert "run/last.pt cannot be resumed from" in capsys.readouterr().err


def test_row_of_zeros_and_a_row_of_tiny_numbers_come_back():
    matrix = torch.stack([torch.zeros(3), torch.tensor([1e-20, -2e-20, 0.5e-20])])
    numbers, scales = compact.quantize(matrix)
    assert torch.equal((numbers * scales)[0], matrix[0])
    torch.testing.assert_close(numbers * scales, matrix, rtol=0.01, atol=1e-22)


@pytest.mark.parametrize(
    "forged",
    [
        [],
        [torch.ones(64, 64)],
        [(torch.ones(10**6, 1, dtype=torch.int8), 1.0), (torch.ones(1, 10**6), 1.0)],
        "x",
    ],
)
def test_forged_factors_are_one_line(tiny_run, forged, tmp_path):
    content = load_checkpoint(tiny_run / "best.pt")
    content["weights"]["classifier.fc7.weight"] = forged
    save_checkpoint(tmp_path / "forged.pt", content)
    with pytest.raises(UserError, match=r"forged\.pt is not a complete checkpoint"):
        load_network(tmp_path / "forged.pt")
