"""Weights that other programs have quantized, read as the floating-point numbers that they stand for, tensor by tensor.

Each formula is exact arithmetic on what is stored, computed in float32: a whole number, or one of 8 bits, less a zero point,
times a scale. Which tensors belong to a weight, :mod:`lorap.checkpoint.foreign` tells.

Sources: compressed-tensors 0.20.1 (``pack-quantized``, ``int-quantized``, ``float-quantized``), transformers'
``integrations/finegrained_fp8.py``, AutoAWQ's ``gemm`` layout, GPTQModel's ``gptq`` and ``gptq_v2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.errors import CheckpointError
from lorap.kernels.packing import unpack

Tensors = Mapping[str, Tensor]
# The nibble of a word in which AWQ keeps each of its eight columns.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class QuantizedWeight(StoredTensor):
    """A weight of several stored tensors; ``info`` has the dtype and bytes that are stored, and the shape of the weight.

    Args:
        sources: the stored tensors, by the last part of their names.
        formula: the weight, from their values.
    """

    sources: Mapping[str, StoredTensor] = field(default_factory=dict)
    formula: Callable[[Tensors], Tensor] = field(kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of what :meth:`read` returns."""
        return torch.float32

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What lies in files."""
        return tuple(self.sources.values())

    def read(self) -> Tensor:
        """The weight (out_features, in_features) in float32.

        Raises:
            CheckpointError: as :meth:`StoredTensor.read`, or the stored tensors do not fit each other.
        """
        try:
            weight = self.formula({leaf: stored.read() for leaf, stored in self.sources.items()})
        except (CheckpointError, RuntimeError, IndexError) as error:
            raise CheckpointError(f"cannot read {self.name}: {' '.join(str(error).split())}") from error
        if tuple(weight.shape) != self.shape:
            raise CheckpointError(f"{self.name} stands for a weight of shape {tuple(weight.shape)}, not {self.shape}")
        return weight.contiguous()

    def pieces(self, *, size: int = 2**26) -> Iterator[tuple[int, Tensor]]:
        """As of any stored tensor, of the weight."""
        data = self.read().flatten().view(torch.uint8)
        for start in range(0, len(data), size):
            yield start, data[start : start + size]


def spread(grid: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Each number of ``grid`` for all of its block of rows and columns: ``shape``; the last block of a side may be cut off."""
    rows, columns = (min(size, whole) for size, whole in zip(block, shape, strict=True))
    wide = grid.repeat_interleave(rows, 0)[: shape[0]]
    return wide.repeat_interleave(columns, 1)[:, : shape[1]]


def powers_of_two(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents, 127 more than they mean."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def scaled(numbers: Tensor, scales: Tensor, zeros: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Numbers (out, in) of 8 bits less ``zeros``, times ``scales``; both as many as there are blocks."""
    shape = (numbers.shape[0], numbers.shape[1])
    weight = numbers.float()
    if zeros is not None:
        weight = weight - spread(zeros.float(), block, shape)
    return weight * spread(powers_of_two(scales), block, shape)


def packed(tensors: Tensors, *, bits: int, group: int, shape: tuple[int, int]) -> Tensor:
    """compressed-tensors' ``pack-quantized``: rows of words, zero points in words along the rows, scales (out, groups)."""
    numbers = unpack(tensors["weight_packed"], bits, shape[1]).float()
    groups = column_groups(tensors.get("weight_g_idx"), group, shape[1])
    if "weight_zero_point" in tensors:
        zeros = unpack(tensors["weight_zero_point"].T.contiguous(), bits, shape[0]).T
        numbers = numbers - zeros.float()[:, groups]
    return numbers * tensors["weight_scale"].float()[:, groups]


def gptq(tensors: Tensors, *, bits: int, group: int, stored_less: int) -> Tensor:
    """GPTQ: words along the inputs (in / n, out), zero points in words (groups, out / n), scales (groups, out).

    ``stored_less`` is what was taken off the zero points when they were stored: 1 in ``gptq``, where zero points of 0 became
    the largest number and may have borrowed from their neighbours, so that programs read them in several ways.

    Raises:
        CheckpointError: there are such zero points.
    """
    zeros = whole_numbers(tensors["qzeros"], bits)[:, : tensors["scales"].shape[1]]
    if stored_less and bool((zeros == 2**bits - 1).any()):
        raise CheckpointError(
            f"qzeros hold {2**bits - 1}, which programs read as 0 or as {2**bits}; "
            "store them as gptq_v2 (GPTQModel), or start from the model in floating point"
        )
    numbers = whole_numbers(tensors["qweight"].T, bits).T
    groups = column_groups(tensors.get("g_idx"), group, len(numbers))
    return ((numbers.float() - (zeros.float() + stored_less)[groups]) * tensors["scales"].float()[groups]).T


def awq(tensors: Tensors, *, group: int) -> Tensor:
    """AWQ's ``gemm``: words of eight columns in an order of their own (in, out / 8), zero points alike, scales (groups, out)."""
    numbers, zeros = (in_order(whole_numbers(tensors[leaf], 4)).float() for leaf in ("qweight", "qzeros"))
    groups = column_groups(None, group, len(numbers))
    return ((numbers - zeros[groups]) * tensors["scales"].float()[groups]).T


def whole_numbers(words: Tensor, bits: int) -> Tensor:
    """Words (N, K) as the uint8 numbers (N, K * 32 / bits) in them, lowest bits first."""
    numbers = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8)
    for place in range(32 // bits):
        numbers[:, :, place] = (words >> (bits * place)) & (2**bits - 1)
    return numbers.flatten(1)


def in_order(numbers: Tensor) -> Tensor:
    """The columns of AWQ's words in the order of the weight."""
    return numbers.unflatten(1, (-1, 8))[:, :, torch.tensor(AWQ_ORDER)].flatten(1)


def column_groups(stored: Tensor | None, group: int, columns: int) -> Tensor:
    """The group of each input: as stored, or ``group`` after ``group`` of them."""
    return torch.arange(columns) // group if stored is None else stored.long()
