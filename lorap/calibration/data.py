"""Text to token windows.

A source is anything people keep text in: a text file, a JSONL file with a text field, a file of tokens, a ``datasets`` name,
one of the texts that ship with lorap, or tokens in memory. It is read, tokenized as one stream, cut into windows that do not
overlap, and the seed draws which of them are used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
DEFAULT_CALIBRATION = "default"
DEFAULT_EVALUATION = "heldout"

TOKEN_SUFFIXES = (".safetensors", ".npy")
# A longer name is no name but a text given by mistake.
MAX_NAME = 1000
# Of a larger text file, this many bytes are read, in equal pieces spread over the file.
MAX_TEXT_BYTES = 32 * 2**20
TEXT_PIECES = 32


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of equal length.

    Args:
        input_ids: (windows, seq_len) int64.
        name: where they came from, for reports.
        sha256: of the ids, so that two runs can be told apart.
        attention_mask: (windows, seq_len), 0 on padding; None where every token is real.
    """

    input_ids: Tensor
    name: str
    sha256: str
    attention_mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that count: all but padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())


def draw_windows(
    source: Source, tokenizer: Any, *, num_samples: int, seq_len: int, seed: int, vocab_size: int
) -> TokenWindows:
    """Draw ``num_samples`` windows of ``seq_len`` tokens from ``source``.

    Token matrices of shape (windows, seq_len), and mappings with ``input_ids`` and ``attention_mask``, are used as they are.

    Raises:
        CalibrationError: the source cannot be read, is binary, empty or too short, or the tokens do not fit the model.
    """
    name = source_name(source)
    ids, mask = read_tokens(source, tokenizer, vocab_size=vocab_size)
    if ids.ndim == 2:
        return TokenWindows(ids, name, _sha256(ids), mask)
    available = len(ids) // seq_len
    if available < num_samples:
        raise CalibrationError(
            f"{name} has {len(ids):,} tokens, which is {available} windows of {seq_len}; {num_samples} were asked for. "
            + (
                f"Give a longer text or ask for {available} samples"
                if available
                else "Give a longer text or shorter windows"
            )
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
    windows = ids[: available * seq_len].view(available, seq_len)[order]
    return TokenWindows(windows, name, _sha256(windows))


def consecutive_windows(
    source: Source, tokenizer: Any, *, seq_len: int, max_tokens: int | None, vocab_size: int
) -> TokenWindows:
    """All windows of ``source`` in order, without overlap; the last tokens that do not fill a window are dropped.

    Raises:
        CalibrationError: as :func:`draw_windows`.
    """
    name = source_name(source)
    ids, mask = read_tokens(source, tokenizer, vocab_size=vocab_size)
    if ids.ndim == 2:
        return TokenWindows(ids, name, _sha256(ids), mask)
    ids = ids[:max_tokens]
    available = len(ids) // seq_len
    if not available:
        raise CalibrationError(
            f"{name} has {len(ids):,} tokens, less than one window of {seq_len}; give a longer text or shorter windows"
        )
    windows = ids[: available * seq_len].view(available, seq_len)
    return TokenWindows(windows, name, _sha256(windows))


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
    if str(source) in (DEFAULT_CALIBRATION, DEFAULT_EVALUATION):
        text = _packaged_text(str(source))
    elif len(str(source)) > MAX_NAME or "\n" in str(source):
        raise CalibrationError(
            f"{source_name(source)} is a text, not the name of one; write it to a file or give its tokens"
        )
    elif path.is_file():
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
    if isinstance(source, (str, Path)):
        if len(str(source)) > MAX_NAME:
            return f"{str(source)[:40]!r}..."
        path = Path(source)
        return path.name if path.exists() else str(source)
    return "tokens"


def _packaged_text(name: str) -> str:
    texts = resources.files("lorap.calibration") / "texts"
    if name == DEFAULT_EVALUATION:
        return (texts / "heldout.txt").read_text("utf-8")
    parts = sorted(
        entry.name for entry in texts.iterdir() if entry.name.endswith(".txt") and entry.name != "heldout.txt"
    )
    return "\n\n".join((texts / part).read_text("utf-8") for part in parts)


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


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
