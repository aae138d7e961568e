"""Where the text of a source lies: a file and a field of its records, a folder, a pipe that is read once, or not on this disk.

Whoever reads, hashes or names a source asks :func:`located`, so that all of them mean the same bytes.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorap.errors import CalibrationError

STDIN = "-"
# A longer name is no name but a text given by mistake.
MAX_NAME = 1000
# What a name says about a file, and what its first bytes may deny (lorap/calibration/files.py).
DATA_SUFFIXES = {".json": "JSON", ".jsonl": "JSON lines", ".ndjson": "JSON lines", ".csv": "CSV", ".tsv": "TSV"}
DATA_SUFFIXES |= {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}
DATA_SUFFIXES |= {".npy": "tokens", ".safetensors": "tokens"}
MARKUP_SUFFIXES = (".html", ".htm", ".xhtml", ".xml", ".svg", ".rss", ".atom")
SETTINGS_SUFFIXES = (".yaml", ".yml", ".toml", ".ini", ".cfg")
# A name that ends like this means a file, here or nowhere; packed ones may end in one of PACKED_SUFFIXES as well.
FILE_SUFFIXES = {
    *DATA_SUFFIXES,
    *MARKUP_SUFFIXES,
    *SETTINGS_SUFFIXES,
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".log",
    ".tex",
    ".py",
}
FILE_SUFFIXES |= {".rtf", ".gguf", ".pdf", ".docx", ".xlsx", ".zip", ".tar", ".tgz"}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lzma")

# Copies of what pipes have said, by the pipe: each can be read only once in the life of this process.
_spooled: dict[object, Path] = {}
# The same by the names that were given, for worker processes, which have other pipes under these names.
_copies: dict[str, str] = {}
_copies_of_others: dict[str, str] = {}


@dataclass(frozen=True)
class Place:
    """A file or folder, and what of it is meant.

    Args:
        path: of the file or folder; of a copy where the source is a pipe.
        name: for reports, without folder names, because reports are published.
        field: of the records; empty for the usual ones.
        config: of a data set in a folder.
        split: of a data set in a folder.
    """

    path: Path
    name: str
    field: str = ""
    config: str = ""
    split: str = ""


def copies() -> dict[str, str]:
    """Where the copies of pipes are, by the names of the pipes; for :func:`use_copies` in a worker process."""
    return _copies | _copies_of_others


def use_copies(found: Mapping[str, str]) -> None:
    """Read the copies that another process has made, instead of pipes of these names."""
    _copies_of_others.update(found)


def located(source: str | Path) -> Place | None:
    """The file or folder that ``FILE``, ``FILE:FIELD``, ``FOLDER``, ``FOLDER:CONFIG:SPLIT:FIELD`` or ``-`` means.

    Returns:
        None for a name that may be that of a data set on the hub.

    Raises:
        CalibrationError: the name is that of a file, and there is none; it is a text and no name; a pipe cannot be read.
    """
    text = str(source)
    if len(text) > MAX_NAME or "\n" in text or "\0" in text:
        raise CalibrationError(
            f"{text[:40]!r}... is a text, not the name of one; write it to a file, pass it through a pipe (-) or give its tokens"
        )
    if not text:
        raise CalibrationError(
            "the name of a text is empty; give a file, or leave it out for the texts that ship with lorap"
        )
    base, _, field = text.rpartition(":")
    for path, wanted in ((text, ""), (base, field)):
        if (
            path == STDIN
            or path in _copies_of_others
            or (path and os.path.exists(path) and not (wanted and os.path.isdir(path)))
        ):
            shown = _copied_name(path) + (f":{wanted}" if wanted else "")
            return Place(_readable(path), shown, field=wanted)
    folder, *more = text.split(":")
    if len(more) <= 3 and os.path.isdir(folder):
        config, split, field = [*more, "", "", ""][:3]
        return Place(Path(folder), ":".join([_last(folder), *more]), field, config, split)
    if isinstance(source, Path) or any(map(_is_file_name, (text, base, folder))):
        raise CalibrationError(f"there is no file {text}")
    return None


def _is_file_name(name: str) -> bool:
    """Whether a name can only be that of a file: data sets on the hub are called ``name`` or ``owner/name``."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix
    begins = name.startswith((os.sep, "./", "../", "~")) or name in (".", "..")
    return begins or path.suffix in PACKED_SUFFIXES or suffix in FILE_SUFFIXES or name.count("/") > 1 or "\\" in name


def _last(path: str) -> str:
    return Path(path).name or str(Path(path).resolve().name)


def _copied_name(path: str) -> str:
    """The name of a file; the number of a pipe changes from run to run and says nothing."""
    if path == STDIN:
        return STDIN
    return "pipe" if path in _copies_of_others or _is_pipe(path) else _last(path)


def _is_pipe(path: str) -> bool:
    mode = os.stat(path).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)


def _readable(path: str) -> Path:
    """The path itself, or a copy of what comes out of a pipe: texts are read more than once, and some from the middle."""
    if path in _copies_of_others:
        return Path(_copies_of_others[path])
    if path != STDIN and not _is_pipe(path):
        return Path(path)
    key: object = STDIN
    if path != STDIN:
        found = os.stat(path)
        key = (found.st_dev, found.st_ino, found.st_rdev)
    if key not in _spooled:
        _spooled[key] = _spool(path)
    _copies[path] = str(_spooled[key])
    return _spooled[key]


def _spool(path: str) -> Path:
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise CalibrationError(
            f"{path} can be read by one process only, and this run has several; write it to a file first"
        )
    folder = Path(tempfile.mkdtemp(prefix="lorap-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / ("stdin" if path == STDIN else "pipe")
    try:
        with _opened(path) as source, copy.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error
    return copy


def _opened(path: str) -> AbstractContextManager[IO[bytes]]:
    if path != STDIN:
        return open(path, "rb")
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or stdin.closed or stdin.isatty():
        raise CalibrationError(
            "- stands for the standard input, and nothing is piped into it; give a file, or pipe a text in"
        )
    return nullcontext(stdin)
