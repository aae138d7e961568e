"""The processes of one run, as ``torchrun`` starts them: who does what, sums over all, and one process's result for all.

Alone, every function returns at once, so that callers need not ask how many there are. Nothing is scheduled here: torchrun starts
the processes and ends them all when one dies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lorap.errors import LoRAPError, ProcessError

T = TypeVar("T")
# Others wait this long for a process; one factorization of the largest matrices takes minutes on two cores.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; ``rank`` 0 writes and talks."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that are this process's: each has every ``count``-th."""
        return list(items[self.rank :: self.count])

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count > 1:
            with _peers():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def sum_number(self, value: float, device: torch.device) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=device)
        self.sum(total)
        return float(total)

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank, for all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """What the first process has, for all of them."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        with _peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _peers():
                dist.barrier()


ALONE = Processes()


def is_first_process() -> bool:
    """Whether this process is the one that talks, known even before the others can be reached."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started together with this one; alone without torchrun.

    Raises:
        ProcessError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE
        return
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _peers():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except LoRAPError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ProcessError(
            f"another process of this run is gone ({reason}); layers that were finished are kept: run the same command again, "
            "with as many processes as you like"
        ) from error
