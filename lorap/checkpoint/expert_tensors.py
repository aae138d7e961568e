"""What files hold in parts, as the model has it: matrices of single experts (:mod:`lorap.architectures.experts`), and others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorap.architectures import ARCHITECTURES
from lorap.architectures.experts import DOWN, GATE_UP
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.quantized_weights import QuantizedWeight
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.errors import CheckpointError
from lorap.jsonio import named

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class PackedTensor(StoredTensor):
    """Stored tensors of one dtype, the numbers of one after those of another.

    Args:
        sources: of them all, in order.
    """

    sources: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of its sources."""
        return self.sources[0].dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What lies in files."""
        return self.sources

    def pieces(self, *, size: int = 2**26) -> Iterator[tuple[int, Tensor]]:
        """As of any stored tensor."""
        begin = 0
        for source in self.sources:
            for start, piece in source.pieces(size=size):
                yield begin + start, piece
            begin += source.info.nbytes


def pack_experts(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """``tensors`` with one for all experts of a layer in place of those of each, or what else a family stores apart.

    Args:
        model: with or without weights.
        tensors: of the weight files, by name.

    Raises:
        CheckpointError: a matrix of an expert is missing, unlike those of others, or quantized.
    """
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or architecture.packed is None:
        return _joined(dict(tensors), architecture.stored_apart if architecture else {})
    packed = architecture.packed
    single = re.compile(rf"(.+)\.{re.escape(packed.stored)}\.(\d{{1,9}})\.({'|'.join(packed.parts)})\.weight")
    found: dict[str, StoredTensor] = {}
    layers: dict[str, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, stored in tensors.items():
        if match := single.fullmatch(name):
            layers[match[1]][int(match[2]), match[3]] = stored
        else:
            found[name] = stored
    gate, up, down = packed.parts
    for layer, matrices in layers.items():
        count = 1 + max(expert for expert, _ in matrices)
        for leaf, parts in ((GATE_UP, (gate, up)), (DOWN, (down,))):
            keys = [(expert, part) for expert in range(count) for part in parts]
            missing = next((key for key in keys if key not in matrices), None)
            if missing:
                raise CheckpointError(
                    f"the folder is incomplete: it holds {count} experts in {named(layer)}, but no {missing[1]} of expert "
                    f"{missing[0]}; copy it again"
                )
            name = f"{layer}.{packed.path}.{leaf}"
            found[name] = _packed(name, [matrices[key] for key in keys], count)
    return _joined(found, architecture.stored_apart)


def _joined(tensors: dict[str, StoredTensor], stored_apart: Mapping[str, tuple[str, ...]]) -> dict[str, StoredTensor]:
    """With each tensor whose parts are all there in place of these; what is missing otherwise is told as of any tensor."""
    for whole, parts in stored_apart.items():
        layers = [name.removesuffix(f".{parts[0]}") for name in tensors if name.endswith(f".{parts[0]}")]
        for layer in layers:
            names = [f"{layer}.{part}" for part in parts]
            if all(name in tensors for name in names):
                tensors[f"{layer}.{whole}"] = _below_each_other(
                    f"{layer}.{whole}", [tensors.pop(name) for name in names]
                )
    return tensors


def _below_each_other(name: str, sources: list[StoredTensor]) -> PackedTensor:
    first = sources[0]
    for source in sources:
        if isinstance(source, QuantizedWeight):
            raise CheckpointError(f"{named(source.name)} is quantized, which lorap does not read of such parts yet")
        if (source.shape[1:], source.info.dtype) != (first.shape[1:], first.info.dtype) or not source.shape:
            raise CheckpointError(
                f"{named(source.name)} is {source.info.dtype} of shape {source.shape}, but {named(first.name)}, which is to be "
                f"joined with it, {first.info.dtype} of shape {first.shape}; the folder is damaged"
            )
    shape = (sum(source.shape[0] for source in sources), *first.shape[1:])
    info = TensorInfo(first.info.dtype, shape, sum(source.info.nbytes for source in sources), first.info.offset)
    return PackedTensor(first.path, name, info, first.stamp, sources=tuple(sources))


def _packed(name: str, sources: list[StoredTensor], count: int) -> PackedTensor:
    first = sources[0]
    for source in sources:
        if isinstance(source, QuantizedWeight):
            raise CheckpointError(f"{named(source.name)} is quantized, which lorap does not read of experts yet")
        if (source.shape, source.info.dtype) != (first.shape, first.info.dtype) or len(source.shape) != 2:
            raise CheckpointError(
                f"{named(source.name)} is {source.info.dtype} of shape {source.shape}, but {named(first.name)}, which is to be "
                f"packed with it, {first.info.dtype} of shape {first.shape}; the folder is damaged"
            )
    rows, columns = first.shape
    info = TensorInfo(
        first.info.dtype,
        (count, len(sources) // count * rows, columns),
        sum(source.info.nbytes for source in sources),
        first.info.offset,
    )
    return PackedTensor(first.path, name, info, first.stamp, sources=tuple(sources))
