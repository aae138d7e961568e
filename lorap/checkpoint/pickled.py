"""What a ``pytorch_model.bin`` holds, from its pickle alone, which ``torch.load(weights_only=True)`` reads without running code.

torch writes such a file as a zip archive without compression, one entry per storage. So once the pickle has told where each
tensor begins, the file is read like one of safetensors: a tensor is so many bytes at such an offset.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorap.checkpoint.headers import MAX_NAME, TensorInfo
from lorap.errors import CheckpointError
from lorap.jsonio import shown

# The pickle of a model of 1,000 tensors has 150 kB.
MAX_PICKLE_BYTES = 100_000_000
# In an entry's own header, the lengths of its name and of what pads it come here; its bytes come behind both.
LENGTHS = 26
# The mark of a folder. torch reads nothing of such an entry, and leaves its tensor as the memory was.
FOLDER = 0x10
# safetensors' names for torch's dtypes, so that nobody else has to know which kind of file a tensor is in.
NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)


def read_pickled_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file that ``torch.save`` wrote from a state dict.

    Raises:
        CheckpointError: the file is truncated or corrupt, holds more than tensors, or a tensor is not stored row by row.
    """
    try:
        entries = _check_archive(path)
        with FakeTensorMode():  # tensors without memory, which know where in the file they are
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
        return {name: _tensor(name, tensor, entries) for name, tensor in state.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which lorap never unpickles: it could run code; "
            "if you trust it, load it with torch elsewhere and save its tensors as safetensors"
        ) from error
    # The pickle may be damaged in any way there is, and torch stumbles over it accordingly.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is truncated or corrupt: {shown(text)}; download or copy it again") from error


def _check_archive(path: Path) -> dict[int, int]:
    """Sizes of entries by where their bytes begin. Refuses what is no archive of torch, or would grow when it is read."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no archive as torch.save writes them since 1.6")
    entries = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {shown(entry.filename)} is compressed")
            if entry.external_attr & FOLDER:
                raise ValueError(f"its entry {shown(entry.filename)} is marked as a folder")
            archive.open(entry).close()  # it begins where the list of entries says
            file.seek(entry.header_offset + LENGTHS)
            begin = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(begin + entry.file_size)
            if file.read(2) != b"PK":  # whatever comes behind begins so
                raise ValueError(f"its entry {shown(entry.filename)} does not end where its header says")
            entries[begin] = entry.file_size
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"its pickle has {entry.file_size:,} bytes, more than {MAX_PICKLE_BYTES:,}")
                archive.read(entry)  # its checksum, which torch does not look at
    return entries


def _tensor(name: Any, tensor: Any, entries: Mapping[int, int]) -> TensorInfo:
    """Where one tensor is in the file.

    torch adds up where a storage begins from the sizes of those before it, so an entry must begin there.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"a tensor is called {shown(name)}")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"{name} is {shown(tensor)}, not a tensor")
    if tensor.dtype not in NAMES:
        raise ValueError(f"{name} has the unknown dtype {tensor.dtype}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not stored row by row; load the file and save its tensors as safetensors")
    start: int | None = tensor.untyped_storage()._checkpoint_offset
    if start is None or start not in entries:
        raise ValueError(f"{name} should begin at byte {start}, where nothing does")
    within, nbytes = int(tensor.storage_offset()) * tensor.itemsize, tensor.numel() * tensor.itemsize
    if within < 0 or within + nbytes > entries[start]:
        raise ValueError(f"{name} ends at byte {within + nbytes:,} of an entry of {entries[start]:,}")
    return TensorInfo(dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), nbytes=nbytes, offset=start + within)
