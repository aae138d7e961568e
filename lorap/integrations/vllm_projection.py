"""One projection of a compressed checkpoint, or one worker's part of it: its tensors, loaded by name, checked and run.

With tensor parallelism every worker holds its rows of ``left`` and all of ``right`` where the output is shared out (q, k, v,
gate, up), and its columns of ``right`` and all of ``left`` where the input is (o, down). Widths that the workers do not divide
are shared out unevenly. Nothing here knows vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.checkpoint.build import check_pivot_rows
from lorap.errors import CheckpointError
from lorap.kernels import reference
from lorap.nn import ops
from lorap.nn.low_rank_tensors import GUARD, LEFT, NAMED_GUARD, PIVOT_ROWS, RIGHT, LowRankTensors


@dataclass(frozen=True)
class Share:
    """What one worker holds of one axis of a projection: elements ``start`` to ``stop`` of ``size``."""

    start: int
    stop: int
    size: int

    @classmethod
    def of(cls, size: int, part: int, parts: int) -> Share:
        """One of several parts, as even as it goes.

        Args:
            size: of the axis.
            part: from 0 to ``parts`` - 1.
            parts: how many workers share it.
        """
        return cls(size * part // parts, size * (part + 1) // parts, size)

    @property
    def length(self) -> int:
        """Elements held here."""
        return self.stop - self.start


class Projection(nn.Module):
    """One projection of the checkpoint: the tensors of this worker, empty at first.

    Args:
        name: full name in the checkpoint.
        rank: inner size, None for a dense projection.
        pivoted: how the low-rank ones are stored.
        rows: this worker's share of the output.
        columns: this worker's share of the input.
        bias: whether it has one.
        dtype: of the weights.
    """

    def __init__(
        self, name: str, rank: int | None, pivoted: bool, rows: Share, columns: Share, bias: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.right: Any  # (rank, columns); the weight itself, (rows, columns), where the projection is dense
        self.left: Any  # (rows, rank)
        self.pivot_rows: Any
        self.bias: Any
        self.name, self.rank, self.rows, self.columns = name, rank, rows, columns
        self.out_features = rows.size
        self.missing: set[str] = set()
        # name in the checkpoint -> (name here, shape in the checkpoint, this worker's part of it)
        self.sources: dict[str, tuple[str, tuple[int, ...], tuple[slice, ...]]] = {}
        for target in ("right", "left", "pivot_rows", "bias"):
            self.register_parameter(target, None)
        part, inputs, all_of = slice(rows.start, rows.stop), slice(columns.start, columns.stop), slice(None)
        if rank is None:
            self._expect("weight", "right", (rows.size, columns.size), (part, inputs), dtype)
            if bias:
                self._expect("bias", "bias", (rows.size,), (part,), dtype)
            return
        stored = LowRankTensors(rows.size, columns.size, rank, bias, pivoted)
        # The rows of an output that is shared out are picked once all is there where they are pivoted, see finish().
        parts = {
            RIGHT: ("right", (all_of, inputs)),
            LEFT: ("left", (all_of if pivoted else part, all_of)),
            PIVOT_ROWS: ("pivot_rows", (all_of,)),
            stored.bias_name: ("bias", (part,)),
        }
        for key, shape in stored.shapes().items():
            if key in parts:  # no guard
                target, pieces = parts[key]
                self._expect(key, target, shape, pieces, torch.int64 if key == PIVOT_ROWS else dtype)

    def load(self, key: str, tensor: Tensor) -> str:
        """Take over one tensor of the checkpoint; the name of the parameter that it filled.

        Raises:
            CheckpointError: config.json does not announce such a tensor, or not in this shape.
        """
        if key == NAMED_GUARD and self.rank is not None:
            return "right"
        if key == GUARD and self.rank is not None:
            if tuple(tensor.shape) != (1,):
                raise CheckpointError(
                    f"{self.name} is low-rank in config.json, but the checkpoint holds its dense weight"
                )
            return "right"  # the guard
        if key not in self.sources:
            raise CheckpointError(f"the checkpoint holds {self.name}.{key}, which config.json does not announce")
        target, shape, part = self.sources[key]
        own = getattr(self, target).data
        check_tensor(f"{self.name}.{key}", tensor, shape, own.dtype)
        own.copy_(tensor[part])
        self.missing.discard(key)
        return target

    def finish(self) -> None:
        """Check that all is there, and bring pivoted storage into the form of this worker's rows.

        Raises:
            CheckpointError: a tensor is missing, or the pivot rows are not rows.
        """
        check_complete(self.name, self.missing)
        if self.rank is None or self.pivot_rows is None:
            return
        check_pivot_rows(self, self.name)
        if self.rows.length < self.rows.size:
            identity = torch.eye(self.rank, dtype=self.left.dtype, device=self.left.device)
            order = reference.output_order(self.pivot_rows, self.out_features)[self.rows.start : self.rows.stop]
            self.left = frozen(torch.cat((identity, self.left))[order])
            self.pivot_rows = None

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, this worker's columns) to (tokens, this worker's rows), without the bias."""
        if self.rank is None:
            return ops.linear(x, self.right)
        return ops.low_rank_linear(x, self.right, self.left, None, self.pivot_rows)

    def _expect(
        self, key: str, target: str, shape: tuple[int, ...], part: tuple[slice, ...], dtype: torch.dtype
    ) -> None:
        sizes = [len(range(*piece.indices(size))) for piece, size in zip(part, shape, strict=True)]
        empty = torch.arange(sizes[0]) if dtype == torch.int64 else torch.empty(sizes, dtype=dtype)
        self.register_parameter(target, frozen(empty))
        self.sources[key] = (target, shape, part)
        self.missing.add(key)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a stored tensor of another shape than config.json says, or of another kind of numbers than ``dtype``.

    Raises:
        CheckpointError: naming the tensor.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, but config.json says {shape}")
    if tensor.dtype != dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
        needed = "floating point" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}; {needed} is needed")


def check_complete(name: str, missing: set[str]) -> None:
    """Refuse a projection of which tensors have not come.

    Raises:
        CheckpointError: naming the first of them.
    """
    if missing:
        raise CheckpointError(
            f"the checkpoint is incomplete: {name}.{min(missing)} is missing; download or copy it again"
        )


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)
