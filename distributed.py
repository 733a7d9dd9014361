"""The processes of one run, as torchrun starts them: who is who, and what they agree on.

    torchrun --nproc_per_node=4 train.py

Each process holds the whole network and takes its shard of every batch. With a single process, as
plain python starts it, all of this does nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, select_device, summarize_error

T = TypeVar("T")
# How long one process may keep the others waiting: for a download, perhaps. When one dies, torchrun
# ends the others at once.
TIMEOUT = timedelta(days=1)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, default)
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{variable}={value} is not a number; unset it") from error


class Processes:
    """The processes of a run, seen from one of them; torchrun's environment variables name it.

    Attributes:
        rank: this process's number, 0..world_size - 1.
        world_size: how many processes there are.
        local_rank: this process's number on its machine.
        is_main: whether this is the process that writes files and prints: rank 0.
        shard: the slice of a batch that is this process's; together they have each item once.
    """

    def __init__(self):
        self.world_size = _number("WORLD_SIZE", 1)
        self.rank = _number("RANK", 0) if self.world_size > 1 else 0
        self.local_rank = _number("LOCAL_RANK", 0) if self.world_size > 1 else 0
        self.is_main = self.rank == 0
        self.shard = slice(self.rank, None, self.world_size)

    def connect(self) -> None:
        """Wait until all processes are there. They talk by NCCL between GPUs, else by gloo.

        Raises UserError if torchrun's variables are incomplete.
        """
        if self.world_size == 1:
            return
        has_gpus = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=TIMEOUT)
        except ValueError as error:
            raise UserError(
                f"WORLD_SIZE is {self.world_size}, but torchrun's other variables are not set "
                f"({summarize_error(error)}); start with torchrun, or unset WORLD_SIZE"
            ) from error

    def disconnect(self) -> None:
        """Wait for the others, then end: when one process exits, torchrun kills the rest."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()

    def select_device(self, name: str) -> torch.device:
        """Return this process's own device, of the kind called "auto", "cpu" or "cuda".

        A single process may name any device. Raises UserError if several name one device, or if
        a machine has too few of the kind.
        """
        gpus = torch.cuda.device_count()
        if self.world_size == 1 or name == "cpu" or (name == "auto" and not gpus):
            return select_device(name)
        if name not in ("auto", "cuda"):
            raise UserError(f"--device {name} is one device; with torchrun use auto, cpu or cuda")
        if self.local_rank >= gpus:
            advice = f"--nproc_per_node={gpus} or " if gpus else ""
            raise UserError(
                f"torchrun started more processes than this machine has GPUs ({gpus}); "
                f"use {advice}--device cpu"
            )
        device = select_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)  # NCCL takes the current one
        return device

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return the network such that backward() averages the gradients of all processes."""
        if self.world_size == 1:
            return network
        return DistributedDataParallel(network, gradient_as_bucket_view=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, in each of them."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Return of each number the highest that any process has, in each of them."""
        if self.world_size == 1:
            return list(numbers)
        highest = torch.tensor(numbers)  # on the CPU, so that nobody waits for a GPU
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def barrier(self) -> None:
        """Return once every process has called it."""
        self.all_reduce_max(0)

    def broadcast_from_main(self, function: Callable[[], T]) -> T:
        """Call function() in the main process alone, and return its result in each of them."""
        values = [function() if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let one process of each machine go first: it downloads what the others then find."""
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()


def is_connection_lost(error: RuntimeError) -> bool:
    """Return whether another process of the run is gone, which is how those left learn of it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
