"""Reading one source: text or tokens, from wherever people keep them.

A source is a text file, a JSONL file with a text field, a file of tokens, a ``datasets`` name, one of the texts that ship with
lorap, tokens in memory, or ``self``, what the model writes when left alone. It is read whole and tokenized as one stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorap.errors import CalibrationError

Source = Union[str, Path, Tensor, Mapping[str, Tensor]]

# Texts inside the package (lorap/calibration/texts/SOURCES.md): a mixture to calibrate on, and another source to judge by.
# A single text of the mixture is DEFAULT_CALIBRATION/its name.
DEFAULT_CALIBRATION = "default"
DEFAULT_EVALUATION = "heldout"
# What the model writes itself (lorap/calibration/samples.py).
OWN_SAMPLES = "self"

TOKEN_SUFFIXES = (".safetensors", ".npy")
# A longer name is no name but a text given by mistake.
MAX_NAME = 1000
# Of a larger text file, this many bytes are read, in equal pieces spread over the file.
MAX_TEXT_BYTES = 32 * 2**20
TEXT_PIECES = 32


def read_tokens(source: Source, tokenizer: Any, *, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """Token ids of a source: (tokens,) for a text, or (windows, seq_len) and a mask where it holds windows already."""
    name = source_name(source)
    mask = None
    if isinstance(source, (str, Path)) and Path(source).suffix in TOKEN_SUFFIXES:
        source = _read_token_file(Path(source))
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
        ids = torch.tensor(tokenizer(read_source(source), verbose=False)["input_ids"])
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


def read_source(source: str | Path) -> str:
    """The text of a file, of a ``datasets`` name, or of a text that ships with lorap; documents are joined by blank lines.

    Raises:
        CalibrationError: there is no such source, or it is empty or binary.
    """
    path = Path(source)
    if _is_packaged(str(source)):
        text = _packaged_text(str(source))
    elif len(str(source)) > MAX_NAME or "\n" in str(source):
        raise CalibrationError(
            f"{source_name(source)} is a text, not the name of one; write it to a file or give its tokens"
        )
    elif os.path.isfile(path):  # where the path is too long for the system, Path.is_file() raises
        text = _read_file(path)
    elif path.is_dir() and not any(path.iterdir()):
        raise CalibrationError(f"{path} is an empty folder")
    else:
        text = _read_dataset(str(source))
    if not text.strip():
        raise CalibrationError(f"{source} holds no text")
    return text


def source_name(source: Source) -> str:
    """A short name for reports and messages: no folder names, because reports are published."""
    if not isinstance(source, (str, Path)):
        return "tokens"
    if len(str(source)) > MAX_NAME:
        return f"{str(source)[:40]!r}..."
    return Path(source).name if os.path.exists(source) and not _is_packaged(str(source)) else str(source)


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


def _is_packaged(name: str) -> bool:
    return name in (DEFAULT_CALIBRATION, DEFAULT_EVALUATION, OWN_SAMPLES) or name.startswith(f"{DEFAULT_CALIBRATION}/")


def _read_file(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= MAX_TEXT_BYTES:
            raw = file.read()
        else:
            raw = b"\n".join(_whole_lines(file, size * piece // TEXT_PIECES) for piece in range(TEXT_PIECES))
    position = raw.find(b"\0")
    if position >= 0:
        raise CalibrationError(f"{path} is binary (a zero byte at offset {position}); give a UTF-8 text or JSONL file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (offset {error.start}); convert it first") from None
    return _join_jsonl(path, text) if path.suffix in (".jsonl", ".ndjson") else text


def _whole_lines(file: Any, offset: int) -> bytes:
    file.seek(offset)
    piece: bytes = file.read(MAX_TEXT_BYTES // TEXT_PIECES)
    first = piece.find(b"\n") + 1 if offset else 0
    last = piece.rfind(b"\n") + 1
    if last > first:
        return piece[first:last]
    # One line longer than the piece: cut it between characters (a continuation byte of UTF-8 looks like 10xxxxxx).
    return piece.decode("utf-8", errors="ignore").encode() if b"\0" not in piece else piece


def _join_jsonl(path: Path, text: str) -> str:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(
                f'{path} line {number} has no text field; each line must look like {{"text": "..."}}'
            )
        documents.append(row["text"])
    return "\n\n".join(documents)


def _read_dataset(name: str) -> str:
    """``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT`` through the ``datasets`` package; the column is ``text``."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{name} is no file, and the package `datasets` is not installed to look for a data set of that name"
        ) from None
    path, config, split = [*name.split(":"), "", ""][:3]
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=True)
        texts, length = [], 0
        for row in rows:
            texts.append(row["text"])
            length += len(row["text"])
            if length >= MAX_TEXT_BYTES:
                break
    except KeyError:
        raise CalibrationError(f"data set {name} has no column `text`") from None
    except Exception as error:  # the hub client, the network and the data set's reader each raise their own kinds
        raise CalibrationError(f"{name} is no file, and reading it as a data set failed: {error}") from error
    return "\n\n".join(texts)


def _read_token_file(path: Path) -> Tensor | Mapping[str, Tensor]:
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": lambda file: torch.from_numpy(np.load(file, allow_pickle=False)),
        ".safetensors": load_file,
    }
    try:
        tokens = readers[path.suffix](path)
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"cannot read tokens from {path}: {error}") from error
    return tokens


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
