"""Reading models: a Hugging Face folder, a hub name, or a GGUF file.

transformers does the reading. This file finds out what it is given, has a folder checked before it is opened
(lorap/consistency.py), turns the many ways in which it can be broken into one clear sentence each, and refuses weights that were
not all in the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lorap.consistency import CONFIG, check_folder, read_config
from lorap.errors import CheckpointError, ConfigError, LoRAPError
from lorap.folders import read_json, read_tensors
from lorap.strict_json import INFINITY, named

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Args:
        location: folder or hub name, as ``from_pretrained`` takes it.
        name: what to call the model in reports: a hub name, or the folder's own name.
        gguf_file: name of the GGUF file inside the folder.
        folder: the local folder; None for a hub name.
    """

    location: str
    name: str
    gguf_file: str | None = None
    folder: Path | None = None


def find_model(model: str | Path) -> ModelSource:
    """Tell a folder, a GGUF file and a hub name apart, and check a folder's files before they are loaded.

    Raises:
        CheckpointError: there is no such folder, or it is half-written, truncated or ambiguous.
    """
    try:
        return _find(str(model), Path(model).expanduser())
    except (OSError, RuntimeError, ValueError) as error:  # no permission, a name too long, no such user, a NUL
        raise CheckpointError(f"cannot open {named(str(model))}: {_first_lines(error)}") from error


def _find(model: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; give the model's folder, or a .gguf file")
        return ModelSource(str(path.parent), path.stem, gguf_file=path.name, folder=path.parent)
    if not path.is_dir():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
            raise CheckpointError(f"no model folder {named(model)}")
        return ModelSource(model, model)
    if (path / CONFIG).is_file():
        read_json(path / CONFIG, constants=INFINITY)
        read_tensors(path)
        return ModelSource(str(path), path.resolve().name, folder=path)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return ModelSource(str(path), Path(files[0]).stem, gguf_file=files[0], folder=path)
    if files:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files ({', '.join(files)}); give one of them")
    raise CheckpointError(f"{path} is no model folder: it has neither config.json nor a .gguf file")


def load_model(source: ModelSource, *, dtype: str = "auto", device: torch.device | str = "cpu") -> Any:
    """The model, in evaluation mode, with every weight found in the files.

    Args:
        source: from :func:`find_model`.
        dtype: ``auto`` for the checkpoint's own (float32 for GGUF), or float32, bfloat16 or float16.
        device: where to put it.

    Raises:
        CheckpointError: it cannot be read, or weights are missing.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    wanted: Any = DTYPES.get(dtype, "auto")
    options: dict[str, Any] = {"dtype": wanted, "output_loading_info": True}
    options |= _gguf_options(source, wanted) if source.gguf_file else {"use_safetensors": True}
    try:
        if not source.gguf_file:
            _check_source(source)
        # Never None, with which transformers asks at the terminal whether to run the checkpoint's code.
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.location, trust_remote_code=False, **options)
    except LoRAPError:
        raise
    # transformers and torch stumble over a bad config in any way there is: here that is a bad checkpoint, not a bug.
    except Exception as error:
        hint = "" if source.folder else " (it is no local folder either)"
        raise CheckpointError(f"cannot load {source.name}{hint}: {_first_lines(error)}") from error
    model, info = loaded
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{source.name} is incomplete: {len(absent)} tensors are missing or misshapen, first {absent[0]}"
        )
    return model.eval().to(device)


def load_tokenizer(source: ModelSource) -> Any | None:
    """The tokenizer that lies beside the model, or None where there is none."""
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if source.folder and not gguf and not any(source.folder.glob("tokenizer*")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False, **gguf)
    except Exception as error:  # as in load_model
        raise CheckpointError(f"cannot load the tokenizer of {source.name}: {_first_lines(error)}") from error
    if source.gguf_file and _gguf_pre_tokenizer(source) == "smollm":
        # transformers' GGUF reader drops the split of numbers into digits that this family was trained with.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce tokens the model has no embedding for.

    Raises:
        CheckpointError: it has more tokens than the model has embeddings.
    """
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the model has {vocab_size:,} embeddings: it belongs to another "
            "model, or tokens were added without model.resize_token_embeddings"
        )


def resolve_device(device: str) -> torch.device:
    """``auto`` is the first GPU where there is one, else the CPU.

    Raises:
        ConfigError: the name means nothing to torch, or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {_first_lines(error)}") from error
    return resolved


def _check_source(source: ModelSource) -> None:
    """Refuse what transformers would run, or read from elsewhere; and, in a local folder, whatever does not fit together."""
    if find_adapter_config_file(source.location):
        raise CheckpointError(
            f"{source.name} holds an adapter (adapter_config.json); merge it into its model first, or remove it"
        )
    if source.folder:
        check_folder(source.folder, read_tensors(source.folder))
    else:
        read_config(Path(str(cached_file(source.location, CONFIG))))


def _gguf_options(source: ModelSource, dtype: Any) -> dict[str, Any]:
    options = {"gguf_file": source.gguf_file, "dtype": torch.float32 if dtype == "auto" else dtype}
    if hasattr(transformers, "GgufConfig"):
        # Without it newer versions keep the model marked as quantized and refuse to save it.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def _gguf_pre_tokenizer(source: ModelSource) -> str:
    from gguf import GGUFReader  # the tokenizer was read through the same package

    field = GGUFReader(Path(source.location) / str(source.gguf_file)).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _first_lines(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= 300 else text[:300] + " ..."
