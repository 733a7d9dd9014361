"""The processes of one run, as torchrun starts them: who is who, and what they agree on.

    torchrun --nproc_per_node=4 train.py

Each process holds the whole network and takes its share of every batch. With a single process, as
plain python starts it, all of this does nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, first_line, select_device

T = TypeVar("T")


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, default)
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{variable}={value} is not a number; unset it") from None


class Processes:
    """The processes of a run, seen from one of them. torchrun tells it by environment variables.

    Attributes:
        rank: this process's number, 0..count - 1; number 0 alone writes files and prints.
        count: how many processes there are.
        local_rank: this process's number on its machine.
        max_restarts: how often torchrun may start all of them anew after one has died.
    """

    def __init__(self):
        self.count = _number("WORLD_SIZE", 1)
        self.rank = _number("RANK", 0) if self.count > 1 else 0
        self.local_rank = _number("LOCAL_RANK", 0) if self.count > 1 else 0
        self.max_restarts = _number("TORCHELASTIC_MAX_RESTARTS", 0)
        self._shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def connect(self) -> None:
        """Waits until all processes are there. They talk by NCCL on GPUs, else by gloo.

        Raises UserError if not all of torchrun's variables are there, or if restarted processes
        could wait for ever for those from before, whose addresses torchrun keeps in one store for
        all restarts unless it is told not to.
        """
        if self.count > 1 and self.max_restarts and self._shares_store:
            raise UserError(
                "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
                "environment, and --standalone or --rdzv_backend=c10d"
            )
        if self.count > 1:
            has_gpus = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo")
            except ValueError as error:
                raise UserError(
                    f"WORLD_SIZE is {self.count}, but torchrun's other variables are not set "
                    f"({first_line(error)}); start with torchrun, or unset WORLD_SIZE"
                ) from None

    def disconnect(self) -> None:
        """Ends together: the first may still be writing, and torchrun ends all when one exits."""
        if self.count > 1:
            self.wait_for_all()
            dist.destroy_process_group()

    def select_device(self, name: str) -> torch.device:
        """This process's own device, of the kind called name: "auto", "cpu" or "cuda".

        One process may name any device. Raises UserError if several name a single one, or if a
        machine has too few of the kind.
        """
        gpus = torch.cuda.device_count()
        if self.count == 1 or name == "cpu" or (name == "auto" and not gpus):
            return select_device(name)
        if name not in ("auto", "cuda"):
            raise UserError(f"--device {name} is one device; with torchrun use auto, cpu or cuda")
        if self.local_rank >= gpus:
            raise UserError(
                f"torchrun started more processes than this machine has GPUs ({gpus}); "
                f"{f'use --nproc_per_node={gpus} or' if gpus else 'use'} --device cpu"
            )
        device = select_device(f"cuda:{self.local_rank}")
        torch.cuda.set_device(device)  # NCCL takes the current one
        return device

    @property
    def share(self) -> slice:
        """Which items of a batch are this process's; together the processes have each once."""
        return slice(self.rank, None, self.count)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network; backward() leaves it the mean of the gradients of all processes."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.count == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def highest(self, *numbers: int) -> list[int]:
        """Of each number the highest that any process has, in each of them."""
        if self.count == 1:
            return list(numbers)
        highest = torch.tensor(numbers)  # on the CPU, so that nobody waits for a GPU
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return highest.tolist()

    def wait_for_all(self) -> None:
        """Returns once every process has called it."""
        self.highest(0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What function() returns in the first process, which alone calls it, in each of them."""
        values = [function() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    @contextlib.contextmanager
    def one_before_the_others(self) -> Iterator[None]:
        """On each machine one process goes first, and downloads what the others then find."""
        if self.local_rank > 0:
            self.wait_for_all()
        yield
        if self.local_rank == 0:
            self.wait_for_all()


def is_connection_lost(error: RuntimeError) -> bool:
    """Whether another process of the run is gone, which is how those left learn of it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
