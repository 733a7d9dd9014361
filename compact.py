"""Write a trained network to a small file: python compact.py runs/cifar10-sgd/best.pt small.pt

The file is a checkpoint for all that takes one, but --resume. fc6 and fc7, 93% of the parameters,
become products of two thin matrices (the truncated singular value decomposition), and all weights
int8 numbers with a scale for each row: 9 MB instead of 233. Evaluate it: its accuracy is its own.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_network, save_checkpoint
from utils import OneLineParser, output_file, positive_int, run_script

RANK = 256
RESUMING = ("optimizer", "scaler", "progress")  # parts that only --resume needs


def compact(weight: Tensor, rank: int) -> list[tuple[Tensor, Tensor]] | Tensor:
    """Return the factors of a weight for checkpoint.multiply_out(); biases remain what they are.

    A fully connected layer has two factors of this rank if they are smaller than its matrix. All
    else [N, ...] has one, a matrix of N rows.
    """
    if weight.dim() < 2:
        return weight
    matrix = weight.flatten(1)
    if weight.dim() > 2 or rank * sum(matrix.shape) >= matrix.numel():
        return [quantize(matrix)]
    # The eigenvectors of A A^T are A's left singular vectors, and found in less time.
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)  # by increasing singular values
    left = vectors[:, -rank:]
    return [quantize(left), quantize(left.T @ matrix)]


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [N, M] and float32 [N, 1], whose product is the matrix but for rounding."""
    scales = matrix.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (matrix / scales).round().to(torch.int8), scales


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description="Write a trained network to a small file.")
    parser.add_argument("checkpoint", type=Path, help="a best.pt or last.pt of train.py")
    parser.add_argument("output", type=output_file, help="the file to write")
    what = f"of fc6 and fc7; more is larger and closer to the network; default: {RANK}"
    parser.add_argument("--rank", type=positive_int, default=RANK, metavar="N", help=what)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    network, _, checkpoint = load_network(args.checkpoint)
    content = {name: checkpoint[name] for name in checkpoint if name not in RESUMING}
    weights = network.state_dict()
    content["weights"] = {name: compact(weight, args.rank) for name, weight in weights.items()}
    save_checkpoint(args.output, content)
    print(f"wrote {args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
