"""What config.json says about a compressed checkpoint (docs/checkpoint-format.md), and what it may say; it takes no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorap.errors import CheckpointError
from lorap.jsonio import named, shown

QUANT_METHOD = "lorap"
# How low-rank layers are stored, and the first format version that has it.
STORAGES = {"factors": 1, "pivoted": 2}
# The same for how weights are stored: in the model's dtype, or as int8 (lorap/nn/int8.py).
WEIGHTS = {"float": 1, "int8": 3}
FORMAT_VERSIONS = (1, 2, 3, 4)
# From here on checkpoints that need lorap carry all guards (docs/checkpoint-format.md); older ones only those in shapes.
GUARDED = 4
# Ranks and widths beyond this are damage: the largest matrices have some 100,000 rows.
MAX_SIZE = 2**31 - 1


class QuantizationFields:
    """The shapes of a compressed checkpoint, as stored in config.json under ``quantization_config``, checked.

    Args:
        format_version: of the checkpoint; a newer one than this library knows is refused. None for that of a new checkpoint.
        ranks: rank of each low-rank projection, by full module name.
        intermediate_sizes: width of each FFN, by full module name, where it differs from ``config.intermediate_size``.
        biases: full names of linear layers that have a bias although the model's own config gives them none.
        dense_intermediate_size: FFN width before compression, so that the kept share can be told from the checkpoint alone.
        sparsity: what was asked for.
        recipe: what was run.
        lorap_version: what ran it.
        storage: of every low-rank layer: ``factors``, or ``pivoted`` (:mod:`lorap.algorithms.pivoting`).
        weights: of every linear layer in the decoder: ``float``, or ``int8`` (:func:`lorap.quantize_int8`).

    Raises:
        CheckpointError: a version, storage or field is unknown or of the wrong type, version and storage contradict each
            other, or a size is not a positive whole number.
    """

    def __init__(
        self,
        /,  # so that a field called "self" is an unknown field, not a TypeError
        format_version: int | None = None,
        ranks: Mapping[str, int] | None = None,
        intermediate_sizes: Mapping[str, int] | None = None,
        biases: Sequence[str] = (),
        dense_intermediate_size: int | None = None,
        sparsity: float | None = None,
        recipe: str | None = None,
        lorap_version: str | None = None,
        storage: str = "factors",
        weights: str = "float",
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = _one_of((QUANT_METHOD,), quant_method, "quant_method")
        self.recipe = _text(recipe, "recipe")
        self.lorap_version = _text(lorap_version, "lorap_version")
        _check_version(format_version, self.lorap_version)
        if unknown:
            fields = ", ".join(named(field) for field in sorted(unknown)[:5])
            raise CheckpointError(f"unknown field in quantization_config: {fields}")
        self.storage = _one_of(STORAGES, storage, "storage")
        self.weights = _one_of(WEIGHTS, weights, "weights")
        self.biases = _names(biases, "biases")
        self.ranks = _sizes(ranks, "ranks")
        self.intermediate_sizes = _sizes(intermediate_sizes, "intermediate_sizes")
        if format_version is None and self.needs_lorap:
            format_version = GUARDED
        self.format_version = _format_version(format_version, self.storage, self.weights, self.biases)
        if dense_intermediate_size is not None and not _is_size(dense_intermediate_size):
            size = shown(dense_intermediate_size)
            raise CheckpointError(f"quantization_config.dense_intermediate_size is {size}, not a positive whole number")
        self.dense_intermediate_size = dense_intermediate_size
        if sparsity is not None and not _is_finite(sparsity):
            raise CheckpointError(f"quantization_config.sparsity is {shown(sparsity)}, not a number")
        self.sparsity = sparsity

    @property
    def needs_lorap(self) -> bool:
        """Whether a host that knows nothing of lorap would compute something else than lorap does."""
        return bool(self.ranks or self.intermediate_sizes or self.biases) or self.weights != "float"

    @property
    def is_guarded(self) -> bool:
        """Whether the checkpoint carries the guards in words (lorap/checkpoint/guards.py)."""
        return self.needs_lorap and self.format_version >= GUARDED


def _check_version(version: Any, written_by: str | None) -> None:
    if version is not None and (type(version) is not int or version not in FORMAT_VERSIONS):
        raise CheckpointError(
            f"this checkpoint has format version {shown(version)} and this lorap reads "
            f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}; "
            f"it was written by lorap {named(written_by)}: install that version or a newer one"
        )


def _format_version(version: int | None, storage: str, weights: str, biases: Sequence[str]) -> int:
    """The version, or the lowest that fits where there is none."""
    lowest = max(STORAGES[storage], 2 if biases else 1, WEIGHTS[weights])
    if version is not None and version < lowest:
        raise CheckpointError(
            f"quantization_config says {storage} storage{' and added biases' if biases else ''}"
            f"{' and int8 weights' if weights == 'int8' else ''} and format version {version}, which has none; "
            f"it must be {lowest}"
        )
    return lowest if version is None else version


def _one_of(known: Sequence[str] | Mapping[str, int], value: Any, field: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"quantization_config.{field} is {shown(value)}; known: {', '.join(known)}")
    return value


def _text(value: Any, field: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"quantization_config.{field} is {shown(value)}, not a string")
    return value


def _names(value: Any, field: str) -> list[str]:
    wanted = isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if not wanted or len(set(value)) < len(value):
        raise CheckpointError(f"quantization_config.{field} is {shown(value)}, not a list of different module names")
    return list(value)


def _sizes(value: Any, field: str) -> dict[str, int]:
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"quantization_config.{field} is {shown(value)}, not an object of module names and sizes")
    for name, size in value.items():
        if not _is_size(size):
            raise CheckpointError(
                f"quantization_config.{field}: {named(name)} is {shown(size)}, not a positive whole number"
                f"{f' up to {MAX_SIZE:,}' if _is_integer(size) and size > 0 else ''}"
            )
    return dict(value)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and 1 <= value <= MAX_SIZE


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))
