"""What a model folder holds: which files, which tensors, which JSON. Only headers are read, and nothing here unpickles."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorap.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# safetensors itself refuses larger headers.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its header alone.

    Args:
        dtype: as safetensors spells it.
        shape: of the tensor.
        nbytes: on disk.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_guard(self) -> bool:
        """The one-element tensor that keeps hosts without lorap from loading a low-rank layer (lorap/modules.py)."""
        return self.shape == (1,)

    @property
    def is_index(self) -> bool:
        """Row numbers such as ``pivot_rows``: bytes on disk, but nothing that was trained."""
        return self.dtype == "I64"

    @property
    def is_parameter(self) -> bool:
        """True for what counts as a parameter wherever lorap reports one: neither guard nor index."""
        return not self.is_guard and not self.is_index


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be there.

    Raises:
        CheckpointError: the folder holds no safetensors weights, or the index names files that are missing.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = sorted(set(index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{folder / INDEX} has no usable weight_map")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which lorap never opens; convert them to safetensors"
        )
    raise CheckpointError(f"{folder} is incomplete: it has no {WEIGHTS} and no {INDEX}")


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, from the headers alone.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        tensors |= read_header(path)
    return tensors


def stored_parameters(folder: Path) -> int:
    """Parameters of a model folder, counted on what is stored; errors as :func:`read_tensors`."""
    return sum(tensor.numel for tensor in read_tensors(folder).values() if tensor.is_parameter)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking that the file is as long as its header says.

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if end != size:
                raise ValueError(f"the header describes {end:,} bytes, the file has {size:,}")
            return {
                name: TensorInfo(
                    dtype=entry["dtype"],
                    shape=tuple(int(length) for length in entry["shape"]),
                    nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}; download or copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
