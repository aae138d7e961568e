"""The one way to open a model: a Hugging Face folder, a hub name, or a GGUF file.

``find_model`` finds out what it is given and checks all of it, from headers alone (lorap/checkpoint/validate.py); every
command and every function that takes a path begins with it. ``load_model`` then reads the weights, all at once or when they
are used. No other file asks transformers for a model.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, GenerationConfig

from lorap.architectures import ARCHITECTURES, split_model
from lorap.checkpoint.find import ModelSource, locate
from lorap.checkpoint.finite import check_finite
from lorap.checkpoint.folders import weight_files
from lorap.checkpoint.foreign import is_floating_point_read
from lorap.checkpoint.gguf.reading import check_gguf_file, load_gguf
from lorap.checkpoint.gguf.tokenizer import load_gguf_tokenizer
from lorap.checkpoint.paging import main_dtype, paged_model
from lorap.checkpoint.rows import joined
from lorap.checkpoint.unused_tensors import check_unused
from lorap.checkpoint.validate import CheckedFolder, check_folder, empty_model, model_class
from lorap.distributed import local_rank
from lorap.errors import CheckpointError, ConfigError, LoRAPError
from lorap.jsonio import named

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What else people call them.
SPELLINGS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
# What is fetched from the hub: all but other formats, and weights in folders of their own, which are copies for other hosts.
FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
NOT_FETCHED = ("*/*.json", "*/*.safetensors", "*/*.bin", "*/*.model")
# What may lie in a folder as a tokenizer.
TOKENIZERS = ("tokenizer*", "tekken.json", "vocab.json", "spiece.model")


def find_model(model: str | Path, *, fetch: bool = True) -> ModelSource:
    """Tell a folder, a GGUF file and a hub name apart, and refuse a folder that cannot be opened rightly.

    Args:
        model: a folder, a GGUF file or the folder it is in, or a hub name.
        fetch: bring a hub name into the hub's cache, where it is a folder like any other.

    Raises:
        CheckpointError: there is no such folder, or it is half-written, truncated, ambiguous, or describes another model than it
            holds.
    """
    try:
        source = _find(str(model), Path(model).expanduser())
        return source if source.folder or not fetch else _fetched(source)
    except LoRAPError:
        raise
    # transformers and torch stumble over a bad config in any way there is: here that is a bad checkpoint, not a bug.
    except Exception as error:
        raise CheckpointError(f"cannot open {named(str(model))}: {_told(error)}") from error


def _find(model: str, path: Path) -> ModelSource:
    source = locate(model, path)
    if source.gguf_file:
        check_gguf_file(path if path.is_file() else path / source.gguf_file)
    elif source.folder:
        return replace(source, checked=check_folder(source.folder))
    return source


def _fetched(source: ModelSource) -> ModelSource:
    """The snapshot of a hub name in the hub's cache; weights in pickles are fetched only where there are no others.

    Raises:
        CheckpointError: it cannot be had, or as a folder.
    """
    try:
        folder = Path(snapshot_download(source.location, allow_patterns=[*FETCHED], ignore_patterns=[*NOT_FETCHED]))
        if not any(folder.glob("*.safetensors")):
            patterns = [*FETCHED, "*.bin"]
            folder = Path(snapshot_download(source.location, allow_patterns=patterns, ignore_patterns=[*NOT_FETCHED]))
    except Exception as error:
        raise CheckpointError(
            f"cannot fetch {named(source.location)}, which is no local folder either: {_first_lines(error)}"
        ) from error
    return replace(_find(str(folder), folder), name=source.name)


def dtype_name(dtype: str) -> str:
    """One spelling for each dtype: ``auto``, or one of ``DTYPES``.

    Raises:
        ConfigError: there is no such dtype.
    """
    name = dtype.strip().lower().removeprefix("torch.")
    name = SPELLINGS.get(name, name)
    if name != "auto" and name not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    return name


def load_model(
    source: ModelSource, *, dtype: str = "auto", device: torch.device | str = "cpu", paged: bool = False
) -> Any:
    """The model, in evaluation mode, with every weight found in the files, and finite.

    Args:
        source: from :func:`find_model`.
        dtype: ``auto`` for the checkpoint's own (float32 for GGUF), or float32, bfloat16 or float16.
        device: where to put it.
        paged: leave the weights in the files until they are used, where that can be done (:mod:`lorap.checkpoint.paging`);
        whoever goes
            through the files then looks for NaN (:func:`lorap.compression.runs.fingerprints.check_weights`).

    Raises:
        CheckpointError: it cannot be read, or weights are missing, NaN or infinite.
        ArchitectureError: with ``paged``, the family is not known.
    """
    wanted = DTYPES.get(dtype_name(dtype))
    try:
        if paged and source.checked and not source.gguf_file:
            model = paged_model(source.checked, dtype=wanted, device=torch.device(device))
            if model is not None:
                return model
        model = _load_whole(source, wanted).to(device)
    except LoRAPError:
        raise
    except Exception as error:  # as in find_model
        raise CheckpointError(f"cannot load {source.name}: {_first_lines(error)}") from error
    check_finite(model.named_parameters())
    return model


def _load_whole(source: ModelSource, dtype: torch.dtype | None) -> Any:
    """The model of a GGUF file or a folder.

    Raises:
        CheckpointError: the folder lacks weights of it.
    """
    if source.gguf_file:
        return load_gguf(Path(source.location) / source.gguf_file, dtype or torch.float32)
    if source.checked is None:
        raise CheckpointError(f"{source.name} was not fetched")
    model, found = _load_folder(source.checked, dtype)
    absent = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{source.name} is incomplete: {len(absent)} tensors are missing or misshapen, first {absent[0]}"
        )
    return model.eval()


def _load_folder(folder: CheckedFolder, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """The model from ``from_pretrained``, and what that found in the files."""
    if is_floating_point_read(folder.tensors):
        return _load_quantized(folder, dtype)
    # Never None, with which transformers asks at the terminal whether to run the checkpoint's code.
    loaded: Any = model_class(folder.config).from_pretrained(
        str(folder.folder),
        config=folder.config,
        dtype=dtype or "auto",
        use_safetensors=weight_files(folder.folder)[0].suffix != ".bin",
        weights_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, found = loaded
    check_unused(model, folder.tensors, found["unexpected_keys"])
    if folder.config.model_type in ARCHITECTURES:
        split_model(model)
    return model, found


def _load_quantized(folder: CheckedFolder, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """The same where weights are read as the floating-point numbers that they stand for."""
    wanted = dtype or getattr(folder.config, "dtype", None) or main_dtype(folder.tensors)
    empty = empty_model(folder.config, wanted)
    dtypes = {name: tensor.dtype for name, tensor in empty.state_dict().items()}
    state = {name: stored.read().to(dtypes.get(name, wanted)) for name, stored in folder.tensors.items()}
    loaded: Any = type(empty).from_pretrained(
        None,
        config=folder.config,
        state_dict=joined(state, folder.config.model_type),
        dtype=wanted,
        output_loading_info=True,
    )
    model, found = loaded
    check_unused(model, folder.tensors, found["unexpected_keys"])
    split_model(model)
    model.config._name_or_path = str(folder.folder)
    if (folder.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder.folder))
    return model, found


def load_tokenizer(source: ModelSource) -> Any | None:
    """The tokenizer that lies beside the model, or None where there is none.

    Raises:
        CheckpointError: it cannot be read, holds no vocabulary, or needs a package that is not installed.
    """
    if source.gguf_file:
        return load_gguf_tokenizer(Path(source.location) / source.gguf_file)
    if source.folder and not any(any(source.folder.glob(pattern)) for pattern in TOKENIZERS):
        return None
    if source.folder:
        _check_tokenizer_packages(source.folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # as in find_model
        hint = ""
        if source.folder and (source.folder / "tekken.json").is_file() and not find_spec("mistral_common"):
            hint = "; tekken.json may need a package: pip install mistral-common"
        raise CheckpointError(f"cannot load the tokenizer of {source.name}: {_first_lines(error)}{hint}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        # transformers makes an empty one where it finds no file that it can read.
        raise CheckpointError(f"the tokenizer of {source.name} holds no vocabulary; its tokenizer.json is missing")
    return tokenizer


def _check_tokenizer_packages(folder: Path) -> None:
    """Refuse a tokenizer.model alone where what reads it is not installed: transformers would guess at another format."""
    alone = folder / "tokenizer.model"
    if not alone.is_file() or (folder / "tokenizer.json").is_file() or (folder / "tekken.json").is_file():
        return
    with alone.open("rb") as file:
        sentencepiece = file.read(1) == b"\n"  # the first field of its protobuf message; tiktoken's are lines of base64
    packages = {"sentencepiece": "sentencepiece", "google": "protobuf"} if sentencepiece else {"tiktoken": "tiktoken"}
    missing = [package for module, package in packages.items() if not find_spec(module)]
    if missing:
        raise CheckpointError(
            f"{folder} has its tokenizer in tokenizer.model alone, which needs what is not installed: "
            f"pip install {' '.join(missing)}"
        )


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


def own_device(device: str) -> torch.device:
    """:func:`resolve_device` for this process: among several that torchrun started, each has a GPU of its own.

    Raises:
        ConfigError: as :func:`resolve_device`.
    """
    local = local_rank()
    if local is not None and device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", local)
    return resolve_device(device)


def _told(error: Exception) -> str:
    """What transformers stumbled over; its own words where they are meant for people."""
    words = _first_lines(error)
    if isinstance(error, (KeyError, IndexError, AttributeError, ArithmeticError)):
        return f"transformers makes no model of its config.json: {type(error).__name__} {words}; correct the file"
    return words


def _first_lines(error: BaseException) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= 300 else text[:300] + " ..."
