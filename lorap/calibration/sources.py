"""Reading one source: text or tokens, from wherever people keep them.

A source is a text file, a file or folder of records with texts or chats (:mod:`lorap.calibration.records`), a file of tokens, a
pipe, a ``datasets`` name, one of the texts that ship with lorap, tokens in memory, or ``self``, what the model writes when left
alone. It is read whole and tokenized as one stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorap.calibration import files
from lorap.calibration.hub import check_hub, read_folder, read_hub
from lorap.calibration.places import MAX_NAME, Place, located
from lorap.calibration.records import Reading, read_file
from lorap.calibration.templates import encode, render
from lorap.errors import CalibrationError

Source = Union[str, Path, Tensor, Mapping[str, Tensor]]

# Texts inside the package (lorap/calibration/texts/SOURCES.md): a mixture to calibrate on, and another source to judge by.
# A single text of the mixture is DEFAULT_CALIBRATION/its name.
DEFAULT_CALIBRATION = "default"
DEFAULT_EVALUATION = "heldout"
# What the model writes itself (lorap/calibration/self_text.py).
OWN_SAMPLES = "self"

_logger = logging.getLogger(__name__)


def read_tokens(source: Source, tokenizer: Any, *, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """Token ids of a source.

    Args:
        source: a name, token ids, or a mapping with ``input_ids`` and ``attention_mask``.
        tokenizer: reads texts; None where there is none.
        vocab_size: rows of the embedding, which ids must stay below.

    Returns:
        int64 (tokens,) and None for a text or a stream of tokens; (windows, seq_len) where the source holds windows
        already, with their mask (windows, seq_len) bool or None.

    Raises:
        CalibrationError: the source cannot be read, is empty, holds no token ids, or ids that the model does not have.
    """
    name = source_name(source)
    mask = None
    if isinstance(source, (str, Path)) and (path := _token_file(source)) is not None:
        source = _read_token_file(path)
    if isinstance(source, Mapping):
        if not isinstance(source.get("input_ids"), Tensor):
            raise CalibrationError(f"{name} has no tensor `input_ids`, only {', '.join(sorted(source)) or 'nothing'}")
        mask = source.get("attention_mask")
        source = source["input_ids"]
    if isinstance(source, Tensor):
        ids = source
        if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
            raise CalibrationError(
                f"{name}: tokens must be whole numbers of shape (tokens,) or (windows, seq_len), not {_kind(ids)}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise CalibrationError(f"{name}: attention_mask is {_kind(mask)} but input_ids are {_kind(ids)}")
    else:
        if tokenizer is None:
            raise CalibrationError(f"the model has no tokenizer, so {name} cannot be read; give tokens instead of text")
        ids = torch.tensor(encode(_read(source).documents, tokenizer, name), dtype=torch.int64)
        if not ids.numel():
            raise CalibrationError(f"{name} gives no tokens")
    ids = ids.long().cpu()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise CalibrationError(
            f"{name} gives token {bad}, but the model has {vocab_size} embeddings: this tokenizer belongs to another model"
        )
    mask = None if mask is None else mask.bool().cpu()
    if ids.ndim == 1 and mask is not None:
        return ids[mask], None
    return ids, mask


def read_source(source: str | Path, tokenizer: Any = None) -> str:
    """The text of a file, of a ``datasets`` name, or of a text that ships with lorap; documents are joined by blank lines.

    Args:
        source: its name.
        tokenizer: whose chat template writes chats as text, one behind the other; not needed for texts.

    Raises:
        CalibrationError: there is no such source, it is empty or binary, a record has no text, or there are chats and no
            tokenizer.
    """
    return render(_read(source).documents, tokenizer, source_name(source))


def check_source(source: Source) -> None:
    """Make sure that a source can be opened, before anything expensive is done; its records are not looked at.

    What comes through a pipe is read now, and kept.

    Raises:
        CalibrationError: there is no such file or text, or it is of a kind that lorap does not read.
    """
    if isinstance(source, (str, Path)) and str(source) != OWN_SAMPLES:
        if is_packaged(str(source)):
            _packaged_text(str(source))
        elif (place := located(source)) is None:
            check_hub(str(source))
        elif not place.path.is_dir():
            files.look(place)


def source_name(source: Source) -> str:
    """A short name for reports and messages: no folder names, because reports are published."""
    if not isinstance(source, (str, Path)):
        return "tokens"
    if len(str(source)) > MAX_NAME or "\n" in str(source):
        return f"{str(source)[:40]!r}..."
    if is_packaged(str(source)):
        return str(source)
    try:
        place = located(source)
    except CalibrationError:
        return str(source)
    return str(source) if place is None else place.name


def _read(source: str | Path) -> Reading:
    """Everything that a source says."""
    if is_packaged(str(source)):
        reading = Reading([_packaged_text(str(source))])
    elif (place := located(source)) is None:
        reading = read_hub(str(source))
    else:
        reading = read_folder(place) if place.path.is_dir() else _read_text_file(place)
    if not any(not isinstance(document, str) or document.strip() for document in reading.documents):
        raise CalibrationError(f"{source} holds no text" + (f": {reading.told}" if reading.told else ""))
    if reading.told:
        _logger.info("%s: %s", source_name(source), reading.told)
    return reading


def _read_text_file(place: Place) -> Reading:
    content = files.look(place)
    if content.kind == files.TOKENS:
        raise CalibrationError(f"{place.name} holds tokens, not text")
    return read_file(content)


def shipped_texts() -> dict[str, str]:
    """The texts that ``default`` is a mixture of, by the names under which each can be used alone; sorted."""
    folder = resources.files("lorap.calibration") / "texts"
    files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".txt"))
    return {
        f"{DEFAULT_CALIBRATION}/{name.removesuffix('.txt')}": (folder / name).read_text("utf-8")
        for name in files
        if name != f"{DEFAULT_EVALUATION}.txt"
    }


def _packaged_text(name: str) -> str:
    if name == DEFAULT_EVALUATION:
        return (resources.files("lorap.calibration") / "texts" / f"{DEFAULT_EVALUATION}.txt").read_text("utf-8")
    if name == OWN_SAMPLES:
        raise CalibrationError(
            f"{name} stands for text that a model writes, and can only be drawn together with one. "
            f"A file of that name must be called ./{name}"
        )
    texts = shipped_texts()
    if name == DEFAULT_CALIBRATION:
        return "\n\n".join(texts.values())
    if name not in texts:
        raise CalibrationError(
            f"no text {name} ships with lorap; there are {', '.join(texts)} and {DEFAULT_EVALUATION}. "
            f"A file of that name must be called ./{name}"
        )
    return texts[name]


def is_packaged(name: str) -> bool:
    """Whether a name means a text that ships with lorap, or what the model writes itself."""
    return name in (DEFAULT_CALIBRATION, DEFAULT_EVALUATION, OWN_SAMPLES) or name.startswith(f"{DEFAULT_CALIBRATION}/")


def _token_file(source: str | Path) -> Path | None:
    """Where tokens lie; None where the source is another."""
    if is_packaged(str(source)) or (place := located(source)) is None or place.path.is_dir():
        return None
    content = files.look(place)
    if content.kind != files.TOKENS:
        return None
    if content.packing or place.field:
        raise CalibrationError(f"{place.name} holds tokens; give the file itself, unpacked and without a field")
    return place.path


def _read_token_file(path: Path) -> Tensor | Mapping[str, Tensor]:
    read: Callable[[Path], Any] = load_file
    if path.suffix.lower() != ".safetensors":
        read = lambda file: torch.from_numpy(np.load(file, allow_pickle=False))  # noqa: E731
    try:
        tokens = read(path)
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"cannot read tokens from {path}: {error}") from error
    return tokens


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
