"""What a model folder holds: which files, which tensors, which JSON. Only headers are read, and no code is run."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorap.checkpoint.headers import TensorInfo, read_header
from lorap.errors import CheckpointError
from lorap.jsonio import read_json
from lorap.nn.low_rank_tensors import WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
# In the order in which transformers looks for them: what is checked must be what is loaded.
CONTAINERS = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def weight_files(folder: Path) -> list[Path]:
    """The files that a host would read a folder's weights from, each checked to be there: safetensors, else ``.bin``.

    Raises:
        CheckpointError: the folder holds neither, or the index names files that are missing or elsewhere.
    """
    for single, index in CONTAINERS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = sorted(set(_weight_map(folder / index, Path(single).suffix).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
                )
            return [folder / name for name in names]
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.pt*") for path in folder.glob(pattern))
    raise CheckpointError(
        f"{folder} is incomplete: it has no {', no '.join(name for pair in CONTAINERS for name in pair)}"
        + (f"; {others[0]} is none of them" if others else "")
    )


def read_file(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one weight file, from its header alone; errors as :func:`read_header` and :func:`read_pickled_header`."""
    if path.suffix != ".bin":
        return read_header(path)
    from lorap.checkpoint.pickled import read_pickled_header  # takes torch, which reading JSON does not

    return read_pickled_header(path)


def read_files(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """Every tensor of a model folder, file by file, from the headers alone.

    Where an index says that tensors are means nothing: which of them the model needs, lorap/checkpoint/validate.py knows.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, or a tensor is in two files.
    """
    files = {path: read_file(path) for path in weight_files(folder)}
    seen: set[str] = set()
    for path, tensors in files.items():
        if twice := seen & tensors.keys():
            raise CheckpointError(f"{path} holds {min(twice)}, which another file of {folder} holds as well")
        seen |= tensors.keys()
    return files


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, by name; errors as :func:`read_files`."""
    return {name: tensor for tensors in read_files(folder).values() for name, tensor in tensors.items()}


def packed_shapes(files: Mapping[Path, Mapping[str, TensorInfo]]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each packed weight (lorap/nn/quantized.py), by the name of its layer, as its file says them.

    Args:
        files: tensors by name, by file, from :func:`read_files`.

    Raises:
        CheckpointError: a file cannot be read, or a shape is none.
    """
    shapes = {}
    for path, tensors in files.items():
        for name, info in tensors.items():
            layer, _, leaf = name.rpartition(".")
            if leaf == WEIGHT_SHAPE:
                shapes[layer] = _read_shape(path, name, info)
    return shapes


def _read_shape(path: Path, name: str, info: TensorInfo) -> tuple[int, int]:
    if (info.dtype, info.shape) != ("I64", (2,)):
        raise CheckpointError(f"{name} is {info.dtype} of shape {info.shape}; I64 of shape (2,) is needed")
    try:
        with path.open("rb") as file:
            file.seek(info.offset)
            rows, columns = struct.unpack("<2q", file.read(16))
    except (OSError, struct.error) as error:
        raise CheckpointError(f"cannot read {name} from {path}: {error}") from error
    return rows, columns


def stored_parameters(folder: Path) -> int:
    """Parameters of a model folder, counted on what is stored; errors as :func:`read_tensors`."""
    files = read_files(folder)
    packed = packed_shapes(files)
    plain = sum(
        tensor.numel
        for tensors in files.values()
        for name, tensor in tensors.items()
        if _is_plain(name, tensor, packed)
    )
    return plain + sum(rows * columns for rows, columns in packed.values())


def _is_plain(name: str, tensor: TensorInfo, packed: Mapping[str, tuple[int, int]]) -> bool:
    layer, _, leaf = name.rpartition(".")
    return tensor.is_parameter and not (layer in packed and leaf in (WEIGHT_PACKED, WEIGHT_SCALE))


def _weight_map(path: Path, suffix: str) -> dict[str, str]:
    """Tensor name to file name, from the index at ``path``; a file name may not leave the folder."""
    names = read_json(path, constants=()).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_is_file_name(name, suffix) for name in names.values()):
        kind = suffix.removeprefix(".")
        raise CheckpointError(f"{path} has no usable weight_map: it must name {kind} files of the same folder")
    return names


def _is_file_name(name: Any, suffix: str) -> bool:
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 255
    return plain and name.endswith(suffix) and not any(sign in name for sign in "/\\:")
