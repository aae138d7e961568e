"""The weights and the config of a compressed model as Hugging Face files, streamed from where they lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from lorap.checkpoint.folders import INDEX
from lorap.checkpoint.paging import Pages, pages_of
from lorap.checkpoint.stored_tensors import StoredTensor
from lorap.checkpoint.tensor_files import Cast, Writable, nbytes, write_tensors
from lorap.system import parse_bytes

GENERATION_CONFIG = "generation_config.json"


def write_model(model: Any, folder: Path, *, max_shard_size: str | int) -> None:
    """Config, generation config and safetensors, as ``save_pretrained`` would write them.

    Args:
        model: whose modules are in memory, or have pages.
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
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def write_settings(model: Any, folder: Path) -> None:
    """Config and generation config.

    The latter is what its author published, whatever transformers thinks of it: ``save_pretrained`` refuses a temperature without
    sampling, as vicuna's has, which every host opens and generates with.
    """
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG, use_diff=True)


def model_tensors(model: Any) -> Iterator[tuple[str, Writable]]:
    """What a checkpoint of ``model`` holds, by name: a tied head is not in it."""
    tied = model.config.tie_word_embeddings
    head = model.get_output_embeddings()
    paged = {
        f"{path}.{name}": _as_loaded(stored, pages)
        for path, module in model.named_modules()
        if (pages := pages_of(module)) is not None
        for name, stored in pages.tensors.items()
    }
    skipped = {f"{path}.weight" for path, module in model.named_modules() if module is head} if tied else set()
    for name, tensor in model.state_dict().items():
        if name not in skipped:
            yield name, paged.get(name, tensor)


def _as_loaded(stored: StoredTensor, pages: Pages) -> Writable:
    """A stored tensor in the dtype that it has in the model."""
    if pages.dtype is None or stored.dtype == pages.dtype or not stored.dtype.is_floating_point:
        return stored
    return Cast(stored, pages.dtype)
