"""The header of a GGUF file: its values and where its tensors are. No weight is read.

The ``gguf`` package reads headers too, but it makes an array of every token and merge, which takes seconds a file, and it
trusts every number in a damaged one. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorap.checkpoint.headers import MAX_NAME, TensorInfo
from lorap.errors import CheckpointError, ConfigError
from lorap.jsonio import named, shown

VERSIONS = (2, 3)
MAX_GGUF_DIMENSIONS = 4
ALIGNMENT = 32  # where the file names none
# Numbers by their type in the file; a string is 8 and an array 9.
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says, without its weights.

    Args:
        path: of the file.
        values: by key: numbers, strings, booleans, and lists of them.
        tensors: by llama.cpp's name; shapes as torch has them, so (outputs, inputs), dtypes by ggml's names (``F16``, ``Q4_K``).
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model family."""
        return str(self.values["general.architecture"])


def find_gguf(folder: Path) -> str | None:
    """The name of the one GGUF file in ``folder``; None where there is none.

    Raises:
        CheckpointError: there are several, or parts of one.
    """
    files = sorted(file.name for file in folder.glob("*.gguf"))
    for name in files:
        _refuse_part(folder / name)
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files ({', '.join(files)}); give one of them")
    return files[0] if files else None


def read_gguf(path: Path) -> GGUFHeader:
    """The header of one file, every number of it checked against the file's size.

    Raises:
        CheckpointError: it is damaged, truncated, one part of several, or no model.
        ConfigError: the ``gguf`` package, which knows the sizes of all types, is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(f"reading {path.name} needs the package gguf: pip install 'lorap[eval]'") from None
    _refuse_part(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(path, data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is no GGUF file, or a damaged one: {error}; download or copy it again"
        ) from error
    if header.values.get("split.count", 0) not in (0, 1):
        raise CheckpointError(_split(path, int(header.values["split.count"])))
    kind = header.values.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} holds no model but something of type {shown(kind)}; give the model's own file")
    return header


def _refuse_part(path: Path) -> None:
    part = _SPLIT_NAME.fullmatch(path.name)
    if part and int(part[3]) > 1:
        raise CheckpointError(_split(path, int(part[3])))


def _split(path: Path, parts: int) -> str:
    part = _SPLIT_NAME.fullmatch(path.name)
    first, merged = (f"{part[1]}-00001-of-{part[3]}.gguf", f"{part[1]}.gguf") if part else (path.name, "merged.gguf")
    return (
        f"{path} is one of {parts} parts of a split model; merge them first: "
        f"llama-gguf-split --merge {first} {merged}, and give the merged file"
    )


class _Cursor:
    """A place in the file that moves on with everything that is read; it never leaves the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.size - self.at:
            raise ValueError(f"{nbytes:,} bytes are announced at byte {self.at:,} of {self.size:,}")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind == STRING:
                if count > (self.size - self.at) // 8:
                    raise ValueError(f"a list of {count:,} strings is announced at byte {self.at:,} of {self.size:,}")
                return [self.string() for _ in range(count)]
            return self._numbers(kind, count)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        if kind not in NUMBERS:
            raise ValueError(f"a value before byte {self.at:,} is of the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _parse(path: Path, data: mmap.mmap) -> GGUFHeader:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("<I")
    if version and version & 0xFFFF == 0:
        raise ValueError("its numbers are big-endian; write it anew with gguf-convert-endian")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}, and versions {' and '.join(map(str, VERSIONS))} are known")
    num_tensors, num_values = cursor.number("<Q"), cursor.number("<Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in values or not key.isprintable() or len(key) > MAX_NAME:
            raise ValueError(f"a key is called {shown(key)}, or is there twice")
        values[key] = cursor.value(cursor.number("<I"))
    if not isinstance(values.get("general.architecture"), str):
        raise ValueError("it names no general.architecture")
    entries = [_entry(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"its alignment is {shown(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    return GGUFHeader(path, values, _placed(entries, start, cursor.size))


def _entry(cursor: _Cursor) -> tuple[str, TensorInfo]:
    """A tensor's name, and the rest of what the header says about it; its offset counts from the first tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.string()
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a tensor is called {shown(name)}")
    num_dimensions = cursor.number("<I")
    if num_dimensions > MAX_GGUF_DIMENSIONS:
        raise ValueError(f"{name} has {num_dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(num_dimensions))[::-1]
    number = cursor.number("<I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(
            f"{name} is of ggml type {number}, which this version of the gguf package does not know"
        ) from None
    block, nbytes = GGML_QUANT_SIZES[kind]
    rows = TensorInfo(kind.name, shape, 0, 0).numel
    if rows >= 2**63 or (shape and shape[-1] % block):
        raise ValueError(f"{name} has the shape {shown(shape)}, which {kind.name} cannot hold")
    return name, TensorInfo(kind.name, shape, rows // block * nbytes, cursor.number("<Q"))


def _placed(entries: list[tuple[str, TensorInfo]], start: int, size: int) -> dict[str, TensorInfo]:
    """Tensors with their offsets in the file; no two share a byte or a name, and all are inside."""
    reached, tensors = start, {}
    for name, info in sorted(entries, key=lambda entry: (entry[1].offset, entry[1].nbytes)):
        begin = start + info.offset
        if name in tensors:
            raise ValueError(f"{named(name)} is there twice")
        if begin < reached or begin + info.nbytes > size:
            where = (
                "shares bytes with the tensor before it" if begin < reached else f"ends after the file's {size:,} bytes"
            )
            raise ValueError(f"{name} ({info.nbytes:,} bytes at byte {begin:,}) {where}")
        reached = begin + info.nbytes
        tensors[name] = TensorInfo(info.dtype, info.shape, info.nbytes, begin)
    return {name: tensors[name] for name, _ in entries}
