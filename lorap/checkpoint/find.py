"""Which kind of thing a path or a name of a model is; nothing in it is read, and nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.checkpoint.folders import CONFIG, weight_files
from lorap.checkpoint.gguf.header import find_gguf
from lorap.checkpoint.headers import TensorInfo
from lorap.checkpoint.quantization_fields import QuantizationFields
from lorap.errors import CheckpointError
from lorap.jsonio import named

if TYPE_CHECKING:
    from lorap.checkpoint.validate import CheckedFolder

# What goes before a GGUF file that lies beside it.
WEIGHTS = ("*.safetensors*", "*.bin", "*.pt*")


@dataclass(frozen=True)
class Contents:
    """What a model folder says and holds.

    Args:
        settings: config.json.
        headers: dtype, shape and size of every tensor, by name.
        compression: what lorap has done to the model; None for others.
    """

    settings: Mapping[str, Any]
    headers: Mapping[str, TensorInfo]
    compression: QuantizationFields | None = None


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        location: the folder; a hub name where that was not fetched.
        name: what to call the model in reports: a hub name, or the folder's own name.
        gguf_file: name of the GGUF file inside the folder.
        folder: the local folder; None for a hub name that was not fetched.
        checked: what the checks found in a folder; None for a GGUF file, and where nothing was checked.
        contents: what a folder holds that is plain enough to do without (lorap/checkpoint/plain.py).
    """

    location: str
    name: str
    gguf_file: str | None = None
    folder: Path | None = None
    checked: CheckedFolder | None = field(default=None, repr=False, compare=False)
    contents: Contents | None = field(default=None, repr=False, compare=False)

    @property
    def weight_files(self) -> list[Path]:
        """The files that the weights are read from; none of a hub name that was not fetched.

        Raises:
            CheckpointError: as :func:`lorap.checkpoint.folders.weight_files`.
        """
        if self.folder is None:
            return []
        return [self.folder / self.gguf_file] if self.gguf_file else weight_files(self.folder)


def locate(model: str, path: Path) -> ModelSource:
    """Tell a folder, a GGUF file and a hub name apart; what is in them is not checked.

    Args:
        model: as it was given.
        path: the same as a path.

    Raises:
        CheckpointError: there is no such folder, or nothing in it that is a model, or several.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; give the model's folder, or a .gguf file")
        return _gguf_source(path)
    if not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise CheckpointError(f"no model folder {named(model)}")
        return ModelSource(model, model)
    if (path / CONFIG).is_file() and (any(any(path.glob(kind)) for kind in WEIGHTS) or not find_gguf(path)):
        return ModelSource(str(path), model_name(path), folder=path)
    if file := find_gguf(path):
        return _gguf_source(path / file)
    raise CheckpointError(f"{path} is no model folder: it has neither config.json nor a .gguf file")


def _gguf_source(file: Path) -> ModelSource:
    return ModelSource(str(file.parent), file.stem, gguf_file=file.name, folder=file.parent)


def model_name(folder: Path) -> str:
    """What people call the model in a folder: the folder's name, or the repository's in the hub's cache.

    The cache has models--OWNER--NAME/snapshots/COMMIT.
    """
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name
