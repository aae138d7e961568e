"""The files of a recovery: the folder it works in, and the checkpoint it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorap.checkpoint.finite import count_not_finite
from lorap.checkpoint.folders import read_tensors, weight_files
from lorap.errors import CheckpointError, ConfigError
from lorap.files import replacing
from lorap.jsonio import differences, read_json, write_json
from lorap.outputs import WorkFolder
from lorap.recovery.config import RECOVERY

# The one folder that transformers makes in a model folder.
CHAT_TEMPLATES = "additional_chat_templates"
SETTINGS = "settings.json"
STATE = "state.safetensors"


@contextmanager
def state_folder(work: WorkFolder, settings: Mapping[str, Any], *, restart: bool = False) -> Iterator[Path]:
    """Where a run keeps its state: new, or that of a run with the same settings, which can be resumed. A run that stops before
    it has a state leaves nothing.

    Raises:
        ConfigError: a run with other settings was begun there.
        CheckpointError: it cannot be written.
    """
    folder = work.path / RECOVERY
    try:
        if restart or not (folder / STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        if (folder / SETTINGS).exists():
            if changes := differences(read_json(folder / SETTINGS), settings):
                raise ConfigError(
                    f"a run that is to become {work.out} was begun with other settings: {', '.join(changes)}. Give the same "
                    "again to go on, or --restart to begin anew"
                )
        else:
            folder.mkdir()
            with replacing(folder / SETTINGS) as draft:
                write_json(draft, dict(settings))
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error.strerror}") from error
    try:
        yield folder
    finally:
        if not (folder / STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def merge_into_copy(trained: Mapping[str, Tensor], names: Sequence[str], origin: Path, stage: Path) -> None:
    """Copy the folder ``origin`` to ``stage``, with adapters added to the weights of ``names``.

    All else is copied as it is, so that nothing about the checkpoint can change but these numbers.

    Args:
        trained: the adapters, by the names that PEFT gives them.
        names: the layers that have adapters.
        origin: the checkpoint that was tuned.
        stage: an empty folder.

    Raises:
        CheckpointError: a weight is not in the files, or is not finite with its adapter.
    """
    left = {f"{name}.weight": f"base_model.model.{name}." for name in names}
    files = weight_files(origin)
    _copy_others(origin, stage, {file.name for file in files})
    for file in files:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            metadata = stored.metadata()
        for name in tensors.keys() & left.keys():
            adapter = left.pop(name)
            delta = trained[f"{adapter}lora_B.default.weight"] @ trained[f"{adapter}lora_A.default.weight"]
            tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
            if count := count_not_finite(tensors[name]):
                raise CheckpointError(
                    f"tuning has made {count:,} values of {name} NaN, or too large for {tensors[name].dtype}; begin anew with a "
                    "lower --learning-rate and --restart"
                )
        save_file(tensors, stage / file.name, metadata=metadata)
    if left:
        raise CheckpointError(f"{origin} has no tensor {min(left)}, although the model was loaded from it")
    before, after = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in read_tensors(folder).items()}
        for folder in (origin, stage)
    )
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise CheckpointError(
            f"{changed[0]} was {before.get(changed[0])} and would be written as {after.get(changed[0])}"
        )


def _copy_others(origin: Path, stage: Path, weights: set[str]) -> None:
    for path in sorted(origin.iterdir()):
        if path.is_file() and path.name not in weights:
            shutil.copyfile(path, stage / path.name)
        elif path.is_dir() and path.name == CHAT_TEMPLATES:
            shutil.copytree(path, stage / path.name)
