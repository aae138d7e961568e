"""One tensor in a file: where it lies, and plain reads of it that notice when the file changes.

Files are read into memory of our own. A memory map would be shorter, but a file that is cut off meanwhile kills the process with
a bus error, and its pages count as memory of the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorap.checkpoint.folders import read_file
from lorap.checkpoint.headers import TensorInfo
from lorap.errors import CheckpointError

# safetensors' names for what a model may hold.
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stamp:
    """Size and time of change of a file: another one means that somebody wrote to it."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """That of a file now, by its path or descriptor."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file.

    Args:
        path: of the file.
        name: in the file, for messages.
        info: what its header says.
        stamp: of the file when its header was read.
    """

    path: Path
    name: str
    info: TensorInfo
    stamp: Stamp

    @property
    def shape(self) -> tuple[int, ...]:
        """As its header says."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        """
        Raises:
            CheckpointError: torch has no such dtype.
        """
        if self.info.dtype not in STORED_DTYPES:
            raise CheckpointError(f"{self.path}: {self.name} is stored as {self.info.dtype}, which lorap cannot read")
        return STORED_DTYPES[self.info.dtype]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """What of it lies in files: itself."""
        return (self,)

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file was changed, is shorter than it was, or cannot be read.
        """
        data = torch.empty(self.info.nbytes, dtype=torch.uint8)
        for start, piece in self.pieces():
            data[start : start + len(piece)] = piece
        return data.view(self.dtype).view(self.shape)

    def pieces(self, *, size: int = 2**26) -> Iterator[tuple[int, Tensor]]:
        """(offset within the tensor, uint8 bytes), piece by piece; errors as :meth:`read`."""
        try:
            with self.path.open("rb", buffering=0) as file:
                if Stamp.of(file.fileno()) != self.stamp:
                    raise CheckpointError(f"{self.path} was changed while it was in use; bring it back, or start again")
                for start in range(0, self.info.nbytes, size):
                    piece = torch.empty(min(size, self.info.nbytes - start), dtype=torch.uint8)
                    if read_into(file.fileno(), piece.numpy().data, self.info.offset + start) < len(piece):
                        raise CheckpointError(
                            f"{self.path} ends within {self.name}: it was cut off while it was in use; copy it again"
                        )
                    yield start, piece
        except OSError as error:
            raise CheckpointError(f"cannot read {self.name} from {self.path}: {error.strerror}") from error


def read_into(file: int, view: memoryview, offset: int) -> int:
    """Fill ``view`` from a file; a single read may return less than was asked for.

    Args:
        file: descriptor of an open file.
        view: bytes to fill.
        offset: where in the file to begin.

    Returns:
        How many bytes there were.
    """
    done = 0
    while done < len(view) and (got := os.preadv(file, [view[done:]], offset + done)):
        done += got
    return done


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one weight file, by name."""
    stamp = Stamp.of(path)
    return {name: StoredTensor(path, name, info, stamp) for name, info in read_file(path).items()}


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, whatever their dtypes; both are read piece by piece."""
    if (one.path, one.info.offset, one.info.dtype) == (other.path, other.info.offset, other.info.dtype):
        return one.shape == other.shape
    if one.shape != other.shape:
        return False
    elements = 2**23
    pieces = (stored.pieces(size=elements * stored.dtype.itemsize) for stored in (one, other))
    return all(
        torch.equal(ours.view(one.dtype).double(), theirs.view(other.dtype).double())
        for (_, ours), (_, theirs) in zip(*pieces, strict=True)
    )
