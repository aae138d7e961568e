"""Rows of the one matrix that a family stores, as the tensors of a split model (:mod:`lorap.architectures.splitting`), or of one
whose class has a linear layer for each projection while its files do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import ARCHITECTURES
from lorap.architectures.splitting import row_ranges
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.quantized_weights import QuantizedWeight
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.errors import CheckpointError
from lorap.jsonio import named


def split_tensors(tensors: Mapping[str, StoredTensor], model: Any) -> dict[str, StoredTensor]:
    """``tensors`` with the rows of each projection in place of the matrix that they are in.

    Args:
        tensors: of the weight files, by name.
        model: split where lorap splits it, with or without weights.

    Raises:
        CheckpointError: a matrix has other rows than all of its projections together.
    """
    found: dict[str, StoredTensor] = {}
    sizes = dict(_sizes(model))
    for name, stored in tensors.items():
        path, _, leaf = name.rpartition(".")
        ending = next((ending for ending in sizes if path.endswith(ending)), None)
        if ending is None:
            found[name] = stored
            continue
        out_features = sizes[ending]
        rows = sum(out_features.values())
        if stored.shape[:1] != (rows,):
            raise CheckpointError(f"{named(name)} has the shape {stored.shape}, but config.json gives it {rows:,} rows")
        layer = path.removesuffix(ending)
        for part, (begin, end) in zip(out_features, row_ranges([*out_features.values()]), strict=True):
            found[f"{layer}.{part}.{leaf}"] = rows_of(stored, begin, end)
    return found


def joined(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The tensors of a split model by the names of its class: the opposite of :func:`split_tensors`, in memory."""
    found = dict(state)
    for path, (whole, parts) in ARCHITECTURES[model_type].fused.items():
        for name in [name for name in state if f".{path}.{parts[0]}." in name]:
            names = [name.replace(f".{path}.{parts[0]}.", f".{path}.{part}.") for part in parts]
            found[name.replace(f".{path}.{parts[0]}.", f".{path}.{whole}.")] = torch.cat([found.pop(n) for n in names])
    return found


def rows_of(stored: StoredTensor, begin: int, end: int) -> StoredTensor:
    """Some rows of a stored tensor, which follow each other in its file."""
    info, rows = stored.info, stored.shape[0]
    size = info.nbytes // rows
    offset = info.offset if isinstance(stored, QuantizedWeight) else info.offset + begin * size
    part = TensorInfo(info.dtype, (end - begin, *stored.shape[1:]), (end - begin) * size, offset)
    if isinstance(stored, QuantizedWeight):
        formula = stored.formula
        return replace(stored, info=part, formula=lambda tensors: formula(tensors)[begin:end])
    return replace(stored, info=part)


def _sizes(model: Any) -> Iterator[tuple[str, dict[str, int]]]:
    """The end of the name of each matrix, and the rows of its projections by their names in a layer; all layers are alike."""
    architecture = ARCHITECTURES[model.config.model_type]
    matrices = {
        f"{path}.{whole}": tuple(f"{path}.{part}" for part in parts)
        for path, (whole, parts) in architecture.fused.items()
    }
    layer: nn.Module = architecture.decoder_layers(model)[0]
    for name, parts in (matrices | dict(architecture.stored_together)).items():
        linears: Any = [layer.get_submodule(part) for part in parts]
        yield f".{name}", {part: one.out_features for part, one in zip(parts, linears, strict=True)}
