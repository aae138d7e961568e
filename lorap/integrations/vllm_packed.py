"""One projection of a checkpoint in few bits: lorap's own layer for it, loaded by name, checked and run.

It is a :class:`QuantizedLinear`, on a trellis a :class:`TrellisLinear`, or a :class:`LowRankLinear` of two of them. The bias is
beside it, since vLLM's layers hold theirs. Nothing here knows vLLM, and nothing is shared out among workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorap.checkpoint.build import check_pivot_rows, check_quantized
from lorap.errors import CheckpointError
from lorap.integrations.vllm_projection import Share, check_complete, check_tensor, frozen
from lorap.kernels.packing import pack
from lorap.nn.linear import LowRankLinear
from lorap.nn.low_rank_tensors import (
    FACTORS,
    GUARD,
    INT8_DATA,
    INT8_SCALE,
    NAMED_GUARD,
    PIVOT_ROWS,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    LowRankTensors,
)
from lorap.nn.quantized import QuantizedLinear
from lorap.weights import INTEGERS


class PackedProjection(nn.Module):
    """One projection of the checkpoint in numbers of few bits and scales, empty at first.

    Args:
        name: full name in the checkpoint.
        rank: inner size, None for a dense projection.
        pivoted: how the low-rank ones are stored.
        rows: the output, all of it.
        columns: the input, all of it.
        bias: whether it has one.
        dtype: of scales and bias.
        kind: of layer that it is, or that both factors are.
        bits: of its numbers, or of those of both factors, one of those of the coding of ``kind``.
        group_size: numbers of a row that share a scale; None for int8 with one scale a row (:mod:`lorap.checkpoint.int8_rows`).
    """

    def __init__(
        self,
        name: str,
        rank: int | None,
        pivoted: bool,
        rows: Share,
        columns: Share,
        bias: bool,
        dtype: torch.dtype,
        *,
        kind: type[QuantizedLinear] = QuantizedLinear,
        bits: int,
        group_size: int | None,
    ) -> None:
        super().__init__()
        self.name, self.rank, self.rows, self.bits = name, rank, rows, bits
        # name in the checkpoint -> (name here, shape and dtype in the checkpoint)
        self.sources: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self.guards = {GUARD} if rank is None else {GUARD, NAMED_GUARD, *(f"{one}.{GUARD}" for one in FACTORS)}
        self.bias: Any
        self.register_parameter("bias", frozen(torch.empty(rows.size, dtype=dtype)) if bias else None)
        group = group_size or INTEGERS.group_size
        self.layer: Any
        if rank is None:
            self.layer = kind(columns.size, rows.size, bits=bits, group_size=group, dtype=dtype)
            self._expect_packed("", self.layer, by_row=group_size is None)
            bias_name = "bias"
        else:
            stored = LowRankTensors(rows.size, columns.size, rank, bias=bias, pivoted=pivoted)
            bias_name = stored.bias_name
            self.layer = LowRankLinear(columns.size, rows.size, rank, False, "meta", dtype, pivoted)
            self.layer.weight = self.layer.needs_import_lorap = None  # guards
            for factor in FACTORS:
                empty = getattr(self.layer, factor)
                linear = kind(empty.in_features, empty.out_features, bits=bits, group_size=group, dtype=dtype)
                setattr(self.layer, factor, linear)
                self._expect_packed(f"{factor}.", linear, by_row=group_size is None)
            if pivoted:
                self.layer.pivot_rows = torch.arange(rank)
                self.sources[PIVOT_ROWS] = (f"layer.{PIVOT_ROWS}", (rank,), torch.int64)
        if bias:
            self.sources[bias_name] = ("bias", (rows.size,), dtype)
        self.missing = set(self.sources)

    def load(self, key: str, tensor: Tensor) -> str:
        """Take over one tensor of the checkpoint; the name of the tensor that it filled.

        Raises:
            CheckpointError: config.json does not announce such a tensor, or not in this shape, or of such numbers.
        """
        if key in self.guards:
            if tuple(tensor.shape) != (1,):
                raise CheckpointError(
                    f"{self.name}.{key} has shape {tuple(tensor.shape)}, but config.json says that it is in {self.bits} bits"
                )
            return next(name for name, _, _ in self.sources.values())
        if key not in self.sources:
            raise CheckpointError(f"the checkpoint holds {self.name}.{key}, which config.json does not announce")
        target, shape, dtype = self.sources[key]
        check_tensor(f"{self.name}.{key}", tensor, shape, dtype)
        own = dict(self.named_buffers()) | dict(self.named_parameters())
        # One scale a row is that of each of its groups.
        own[target].data.copy_(pack(tensor, self.bits) if key.endswith(INT8_DATA) else tensor)
        self.missing.discard(key)
        return target

    def finish(self) -> None:
        """Check that all is there and can be computed with.

        Raises:
            CheckpointError: a tensor is missing, scales are no numbers, or the pivot rows are not rows.
        """
        check_complete(self.name, self.missing)
        for path, linear in self.layer.named_modules():
            if isinstance(linear, QuantizedLinear):
                check_quantized(linear, f"{self.name}.{path}" if path else self.name)
        if self.rank is not None:
            check_pivot_rows(self.layer, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, columns) to (tokens, rows), without the bias."""
        y: Tensor = self.layer(x)
        return y

    def _expect_packed(self, prefix: str, linear: QuantizedLinear, *, by_row: bool) -> None:
        where, dtype = f"layer.{prefix}", linear.weight_scale.dtype
        linear.drop_guard()
        if by_row:
            shape = (linear.out_features, linear.in_features)
            self.sources[prefix + INT8_DATA] = (where + WEIGHT_PACKED, shape, torch.int8)
            self.sources[prefix + INT8_SCALE] = (where + WEIGHT_SCALE, (linear.out_features, 1), dtype)
            return
        for key in (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE):
            tensor: Tensor = getattr(linear, key)
            self.sources[prefix + key] = (where + key, tuple(tensor.shape), tensor.dtype)


def merge_dense(parts: Iterable[PackedProjection]) -> list[QuantizedLinear | LowRankLinear]:
    """The layers of projections that read the same x, in their order; dense ones of the same bits side by side become one.

    Their words and scales are copied once, and those of each part are rows of them. Where rows share words in tiles, another part
    can only follow whole ones.
    """
    runs: list[list[PackedProjection]] = []
    for part in parts:
        if runs and _can_follow(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [run[0].layer if len(run) == 1 else _side_by_side([part.layer for part in run]) for run in runs]


def _can_follow(before: PackedProjection, part: PackedProjection) -> bool:
    dense = before.rank is None and part.rank is None
    return dense and before.bits == part.bits and before.rows.size % before.layer.coding.tile == 0


def _side_by_side(linears: list[QuantizedLinear]) -> QuantizedLinear:
    first = linears[0]
    rows = sum(linear.out_features for linear in linears)
    merged = type(first)(first.in_features, rows, bits=first.bits, group_size=first.group_size, device="meta")
    for key in (WEIGHT_PACKED, WEIGHT_SCALE):
        pieces = [getattr(linear, key) for linear in linears]
        whole = torch.cat(pieces)
        setattr(merged, key, whole)
        for linear, piece in zip(linears, whole.split([len(piece) for piece in pieces]), strict=True):
            setattr(linear, key, piece)
    return merged
