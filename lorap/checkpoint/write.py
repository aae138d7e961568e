"""Tensors, models and their config written as Hugging Face files, streamed from where they lie, so that nothing is held twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from lorap.checkpoint.folders import INDEX
from lorap.checkpoint.paging import offloaded_tensors
from lorap.checkpoint.stored_tensors import STORED_DTYPES, StoredTensor
from lorap.jsonio import write_json
from lorap.system import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
GENERATION_CONFIG = "generation_config.json"
# How images become numbers: of models that see, in files of its own.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Cast:
    """A stored tensor that is to be written in another dtype."""

    stored: StoredTensor
    dtype: torch.dtype


Writable = Union[Tensor, StoredTensor, Cast]


def write_model(model: PreTrainedModel, folder: Path, *, max_shard_size: str | int) -> None:
    """Config, generation config and safetensors, as ``save_pretrained`` would write them.

    Args:
        model: whose modules are in memory, or offloaded.
        folder: an existing one.
        max_shard_size: largest safetensors file.

    Raises:
        ConfigError: ``max_shard_size`` is no size.
        OSError: a file cannot be written.
        CheckpointError: a weight cannot be read back.
    """
    shard_bytes = parse_bytes(max_shard_size)
    write_settings(model, folder)
    tensors = dict(model_tensors(model))
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=nbytes,
        filename_pattern="model{suffix}.safetensors",
        get_storage_id=lambda tensor: None,
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index, sort_keys=True)


def write_settings(model: PreTrainedModel, folder: Path) -> None:
    """Config and generation config, and how images become numbers, where the model was opened from a folder that tells.

    The generation config is what its author published, whatever transformers thinks of it: ``save_pretrained`` refuses a
    temperature without sampling, as vicuna's has, which every host opens and generates with.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    source = Path(model.config._name_or_path or "")
    for name in PROCESSORS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            (folder / name).write_bytes((source / name).read_bytes())
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG, use_diff=True)


def model_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Writable]]:
    """What a checkpoint of ``model`` holds, by name: a tied head is not in it."""
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings()
    paged = {
        f"{path}.{name}": _as_loaded(stored, offloaded.dtypes.get(name, stored.dtype))
        for path, module in model.named_modules()
        if (offloaded := offloaded_tensors(module)) is not None
        for name, stored in offloaded.tensors.items()
    }
    skipped = {f"{path}.weight" for path, module in model.named_modules() if module is head} if tied else set()
    for name, tensor in model.state_dict().items():
        if name not in skipped:
            yield name, paged.get(name, tensor)


def write_tensors(path: Path, tensors: Mapping[str, Writable]) -> None:
    """One safetensors file, in place of any that was there, and on the disk when this returns.

    Raises:
        OSError: the file cannot be written; what there was is gone.
    """
    # In safetensors' own order: large elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-_dtype(tensors[name]).itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        start, end = end, end + nbytes(tensors[name])
        shape, dtype = list(_shape(tensors[name])), DTYPE_NAMES[_dtype(tensors[name])]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}  # type: ignore[dict-item]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for name in order:
            for piece in _pieces(tensors[name]):
                write_all(file.fileno(), piece)
        os.fsync(file.fileno())


def nbytes(tensor: Writable) -> int:
    """Bytes on disk."""
    return torch.Size(_shape(tensor)).numel() * _dtype(tensor).itemsize


def write_all(file: int, data: memoryview) -> None:
    """All of ``data``; a single write may take less."""
    done = 0
    while done < len(data):
        done += os.write(file, data[done:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, row by row."""
    flat: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return flat


def _as_loaded(stored: StoredTensor, dtype: torch.dtype) -> Writable:
    """A stored tensor in the dtype that it has in the model."""
    return stored if stored.dtype == dtype else Cast(stored, dtype)


def _pieces(tensor: Writable) -> Iterator[memoryview]:
    if isinstance(tensor, StoredTensor):
        for _, piece in tensor.pieces():
            yield piece.numpy().data
    else:
        yield as_bytes(tensor.stored.read().to(tensor.dtype) if isinstance(tensor, Cast) else tensor)


def _shape(tensor: Writable) -> tuple[int, ...]:
    return tensor.stored.info.shape if isinstance(tensor, Cast) else tensor.shape


def _dtype(tensor: Writable) -> torch.dtype:
    return tensor.dtype
