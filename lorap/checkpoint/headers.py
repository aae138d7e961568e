"""What a safetensors file holds, from its header alone, checked against the file's size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorap.errors import CheckpointError
from lorap.jsonio import parse_object, shown

# safetensors itself refuses larger headers.
MAX_HEADER_BYTES = 100_000_000
# torch has no more dimensions; names are dotted paths of a few words.
MAX_DIMENSIONS, MAX_NAME = 64, 1000
# Every dtype that safetensors can spell, and the bits of one element.
BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
    | {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32}
    | {"U64": 64, "I64": 64, "F64": 64, "C64": 64}
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its header alone.

    Args:
        dtype: as safetensors spells it.
        shape: of the tensor.
        nbytes: on disk.
        offset: of its first byte, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_guard(self) -> bool:
        """The one-element tensor that keeps hosts without lorap from loading a low-rank layer (lorap/nn/low_rank_tensors.py)."""
        return self.shape == (1,)

    @property
    def is_index(self) -> bool:
        """Row numbers such as ``pivot_rows``: bytes on disk, but nothing that was trained."""
        return self.dtype == "I64"

    @property
    def is_parameter(self) -> bool:
        """True for what counts as a parameter wherever lorap reports one: neither guard nor index."""
        return not self.is_guard and not self.is_index


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking that they fill the file exactly as the header says.

    Raises:
        CheckpointError: the file is truncated or corrupt, or its header contradicts itself.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"cannot read {path}: it is no file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_object(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ is not an object of strings")
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
        _check_tiling(tensors, 8 + length, size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}; download or copy it again") from error
    return tensors


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    """One entry of a header, for a file whose data start at ``start``."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a tensor is called {shown(name)}")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {shown(entry)}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has the shape {shown(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} has the data_offsets {shown(offsets)}")
    nbytes = offsets[1] - offsets[0]
    info = TensorInfo(dtype=dtype, shape=tuple(shape), nbytes=nbytes, offset=start + offsets[0])
    if info.numel * BITS[dtype] != 8 * nbytes:
        raise ValueError(f"{name} is {dtype} of shape {shown(shape)}, which cannot be {nbytes:,} bytes")
    return info


def _are_sizes(value: Any) -> bool:
    """Whether this is a list of integers that fit into a signed 64-bit one and are not negative."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_tiling(tensors: Mapping[str, TensorInfo], start: int, end: int) -> None:
    """Tensors must follow each other from ``start`` to ``end`` of the file without a gap and without sharing bytes."""
    reached = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != reached:
            problem = "shares bytes with the one before it" if tensor.offset < reached else "leaves a gap before it"
            raise ValueError(f"{name} starts at byte {tensor.offset:,}, not {reached:,}: it {problem}")
        reached += tensor.nbytes
    if reached != end:
        raise ValueError(f"the header describes {reached:,} bytes, the file has {end:,}")
