"""What a model folder holds: which files, which tensors, which JSON. Only headers are read, and no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorap.checkpoint.headers import TensorInfo, read_header
from lorap.errors import CheckpointError
from lorap.jsonio import read_json

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "TensorInfo",
    "read_file",
    "read_files",
    "read_header",
    "read_json",
    "read_tensors",
    "stored_parameters",
    "weight_files",
]

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


def stored_parameters(folder: Path) -> int:
    """Parameters of a model folder, counted on what is stored; errors as :func:`read_tensors`."""
    return sum(tensor.numel for tensor in read_tensors(folder).values() if tensor.is_parameter)


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
