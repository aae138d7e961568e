"""The processes of one run, as ``torchrun`` starts them: who does what, sums over all, and one process's result for all.

Alone, every function returns at once, so that callers need not ask how many there are. Nothing is scheduled here: torchrun starts
the processes and ends them all when one dies.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from lorap.errors import LoRAPError, ProcessError

_logger = logging.getLogger(__name__)
T = TypeVar("T")
# Others wait this long for a process; one factorization of the largest matrices takes minutes on two cores.
TIMEOUT = timedelta(hours=2)
# All start together, so that who is not there by then will not come. Reading Python's files from a busy disk takes minutes.
JOIN_SECONDS = 600.0
# Waiting that is worth a word.
TOLD_SECONDS = 1.0
# What torchrun gives to every process that it starts. Some of it alone is left over from something else.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; ``rank`` 0 writes and talks."""

    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """The items that are this process's: each has every ``count``-th."""
        return list(items[self.rank :: self.count])

    def all_reduce(self, *tensors: Tensor) -> None:
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
        self.all_reduce(total)
        return float(total)

    def all_gather(self, value: T) -> list[T]:
        """What every process has, by rank, for all of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """What the first process has, for all of them."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        with _peers():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _peers():
                dist.barrier()


SINGLE_PROCESS = Processes()


@dataclass(frozen=True)
class Launch:
    """What torchrun set for this process: which it is of ``count``, which on its machine, and where all of them meet."""

    rank: int
    count: int
    local_rank: int
    address: str


def launched() -> Launch | None:
    """What torchrun set; None where it has not started this process, whatever is left in the environment of others that did.

    Raises:
        ProcessError: what torchrun sets is no number.
    """
    told = {name: os.environ.get(name, "").strip() for name in TORCHRUN}
    if not all(told.values()):
        return None
    try:
        rank, count, local_rank = (int(told[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except ValueError:
        wrong = next(name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if not told[name].isdecimal())
        raise ProcessError(
            f"{wrong} is {told[wrong]!r}, which is no number; start with torchrun, or unset TORCHELASTIC_RUN_ID to run alone"
        ) from None
    return Launch(rank, count, local_rank, f"{told['MASTER_ADDR']}:{told['MASTER_PORT']}")


def is_main_process() -> bool:
    """Whether this process is the one that talks, known even before the others can be reached."""
    launch = launched()
    return launch is None or launch.rank == 0


def local_rank() -> int | None:
    """Which process of its machine this is; None where torchrun has not started it."""
    launch = launched()
    return None if launch is None else launch.local_rank


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started together with this one; alone without torchrun.

    Raises:
        ProcessError: the others cannot be reached.
    """
    launch = launched()
    if launch is None or launch.count < 2:
        yield SINGLE_PROCESS
        return
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with _peers():
        _join(backend, launch)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _join(backend: str, launch: Launch) -> None:
    """Wait for the others, in a thread: torch waits in C++, where no signal would end it."""
    failures: list[BaseException] = []

    def join() -> None:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except BaseException as error:
            failures.append(error)

    waiting, begun, told = Thread(target=join, daemon=True), time.monotonic(), False
    whom = f"process {launch.rank + 1} of {launch.count} waits for the others at {launch.address}"
    waiting.start()
    while waiting.is_alive():
        waiting.join(0.1)
        waited = time.monotonic() - begun
        if waited > JOIN_SECONDS:
            raise ProcessError(f"{whom}, and after {waited / 60:.0f} minutes not all were there; {_WAY_OUT}")
        if waited > TOLD_SECONDS and waiting.is_alive() and not told:
            told = True
            _logger.warning("%s, for %.0f minutes at most; %s", whom, JOIN_SECONDS / 60, _WAY_OUT)
    if failures:
        raise failures[0]


_WAY_OUT = "where no others were started, unset TORCHELASTIC_RUN_ID, which torchrun has left"


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
