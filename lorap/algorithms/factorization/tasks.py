"""Factorizations on their way to a device: which go together, how much memory they take, and their uploads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.algorithms.factorization.memory import Footprint, working_bytes

# Share of a GPU's free memory that a batch may take when nobody says how much.
FREE_SHARE = 2 / 3


@dataclass(frozen=True)
class Task:
    """One factorization that is wanted.

    Args:
        index: its place among the results.
        weight, rank, metric, output_metric: as in :func:`lorap.factorize`.
        method: not ``auto`` any more.
        device: where it is worked on.
        home: where the result goes.
    """

    index: int
    weight: Tensor
    rank: int
    metric: Tensor | None
    output_metric: Tensor | None
    method: str
    device: torch.device
    home: torch.device

    @property
    def kind(self) -> tuple[str, torch.device, int]:
        """Tasks of one kind can be solved together."""
        return self.method, self.device, min(self.weight.shape)

    @property
    def footprint(self) -> Footprint:
        """What it takes of memory."""
        out_features, in_features = self.weight.shape
        return Footprint(
            out_features,
            in_features,
            self.rank,
            method=self.method,
            metric=0 if self.metric is None else self.metric.ndim,
            output_metric=self.output_metric is not None,
            converted=self.weight.dtype != torch.float64,
        )


def grouped(tasks: Sequence[Task], memory_budget: int | None) -> list[list[Task]]:
    """Tasks of one kind together, as many as fit; alone on a CPU unless a budget is given."""
    kinds: dict[tuple[str, torch.device, int], list[Task]] = {}
    for task in tasks:
        kinds.setdefault(task.kind, []).append(task)
    groups: list[list[Task]] = []
    for (_, device, _), members in kinds.items():
        budget = _budget(device) if memory_budget is None else memory_budget
        for position, task in enumerate(members):
            together = [*groups[-1], task] if position else []
            if together and working_bytes([one.footprint for one in together]) <= budget:
                groups[-1] = together
            else:
                groups.append([task])
    return groups


def _budget(device: torch.device) -> int:
    return int(FREE_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0


def uploaded(groups: Sequence[Sequence[Task]]) -> Iterator[list[Task]]:
    """The groups with their tensors in place; to a GPU the next group travels while one is worked on."""
    coming = _Upload(groups[0]) if groups else None
    for following in [*groups[1:], None]:
        if coming is None:
            return
        arrived = coming.wait()
        coming = None if following is None else _Upload(following)
        yield arrived
        del arrived


class _Upload:
    """One group's transfer, on a stream of its own and out of pinned memory where it goes from a CPU to a GPU."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.device = tasks[0].device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.moved: dict[int, Tensor] = {}  # a metric that several share travels once
        if self.stream is None:
            self.tasks = [self._placed(task) for task in tasks]
        else:
            with torch.cuda.stream(self.stream):
                self.tasks = [self._placed(task) for task in tasks]

    def wait(self) -> list[Task]:
        """The tasks, usable on the current stream."""
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in self.moved.values():
                tensor.record_stream(current)
        return self.tasks

    def _placed(self, task: Task) -> Task:
        return replace(
            task,
            weight=self._move(task.weight),
            metric=None if task.metric is None else self._move(task.metric),
            output_metric=None if task.output_metric is None else self._move(task.output_metric),
        )

    def _move(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if id(tensor) not in self.moved:
            source = tensor.pin_memory() if self.stream is not None and tensor.is_cpu else tensor
            self.moved[id(tensor)] = source.to(self.device, non_blocking=self.stream is not None)
        return self.moved[id(tensor)]
