"""What a file holds, told by its first bytes and not by its name alone; and its bytes, unpacked, as UTF-8.

No container is ever read as prose: what lorap cannot read is refused by its own name.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from lorap.calibration.chats import LAYOUTS
from lorap.calibration.packing import packing_of, unpacked
from lorap.calibration.places import DATA_SUFFIXES, MARKUP_SUFFIXES, PACKED_SUFFIXES, SETTINGS_SUFFIXES, Place
from lorap.errors import CalibrationError

# A file tells what it is within so many bytes.
HEAD = 2**16

TEXT, JSON, JSON_LINES, CSV, TSV = "text", "JSON", "JSON lines", "CSV", "TSV"
PARQUET, ARROW, TOKENS = "Parquet", "Arrow", "tokens"

# First bytes of what is no text, what it is, and what to do about it.
_FOREIGN = [
    (b"%PDF-", "a PDF document", "extract its text first"),
    (b"PK\x03\x04", "a zip archive (.zip, .docx, .xlsx, .npz or .pt)", "unpack or convert it first"),
    (b"PK\x05\x06", "an empty zip archive", "give another"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"Rar!\x1a", "a RAR archive", "unpack it first"),
    (b"GGUF\x03\0", "a GGUF model", "give a text"),
    (b"SQLite format 3\0", "an SQLite database", "write its texts to a JSONL file"),
    (b"Obj\x01", "an Avro file", "convert it to Parquet or JSONL"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"%!PS-Adobe", "a PostScript document", "extract its text first"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer and not the file itself",
        "fetch that with `git lfs pull`",
    ),
]
_UNICODE = [(codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16")]
_UNICODE += [(codecs.BOM_UTF16_BE, "utf-16")]
# The first line of a table that came without its name, such as through a pipe; prose that begins like this is none.
_TABLE = re.compile(rb"\"?[\w.-]+\"?(?:([,\t])\"?[\w.-]+\"?)(?:\1\"?[\w.-]+\"?)*\r?$")
# How pages, feeds and dumps begin; Markdown may begin with a single tag.
_MARKUP = re.compile(rb"<(\?xml|!doctype|html|mediawiki|rss)\b", re.IGNORECASE)
_OBJECT = re.compile(rb'\{\s*("(?:[^"\\]|\\.){0,200}"\s*:|\}\s*$)', re.DOTALL)
_LIST_OF_OBJECTS = re.compile(rb'\[\s*\{\s*"(?:[^"\\]|\\.){0,200}"\s*:', re.DOTALL)


@dataclass(frozen=True)
class Content:
    """What was found in a file.

    Args:
        place: where it is.
        kind: ``TEXT``, ``JSON``, ...
        packing: ``gzip`` and the like, or empty.
        encoding: ``utf-8``, or another that is turned into it on the way.
    """

    place: Place
    kind: str
    packing: str = ""
    encoding: str = "utf-8"

    @property
    def size(self) -> int | None:
        """Bytes, where the file can be read from any place in it."""
        return None if self.packing or self.encoding != "utf-8" else self.place.path.stat().st_size

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, unpacked, in UTF-8.

        Raises:
            CalibrationError: the file cannot be opened or unpacked, or is not in its encoding.
        """
        with unpacked(self.place.path, self.place.name, self.packing, self.encoding) as file:
            yield file


def look(place: Place) -> Content:
    """What a file holds.

    Raises:
        CalibrationError: it is nothing that lorap reads, such as an archive, or cannot be opened.
    """
    suffixes = [suffix.lower() for suffix in place.path.suffixes]
    with Content(place, TEXT).open() as file:
        head = file.read(HEAD)
    if packing := packing_of(head):
        with Content(place, TEXT, packing).open() as file:
            head = file.read(HEAD)
        if packing_of(head):
            raise CalibrationError(f"{place.name} is packed twice; unpack it once")
        if suffixes and suffixes[-1] in PACKED_SUFFIXES:
            suffixes.pop()
    _refuse_foreign(place, head)
    if head.startswith((b"PAR1\x15", b"ARROW1\0", b"\xff\xff\xff\xff")):
        return Content(place, PARQUET if head.startswith(b"PAR1") else ARROW, packing)
    suffix = suffixes[-1] if suffixes else ""
    named = DATA_SUFFIXES.get(suffix, TEXT)
    if head.startswith(b"\x93NUMPY") or named == TOKENS:
        return Content(place, TOKENS, packing)
    if named in (PARQUET, ARROW) and head:
        raise CalibrationError(
            f"{place.name} is no {named} file, though it is called one; its first bytes are {head[:8]!r}"
        )
    encoding = next((encoding for mark, encoding in _UNICODE if head.startswith(mark)), "utf-8")
    if encoding != "utf-8":
        head = codecs.getincrementaldecoder(encoding)("replace").decode(head).encode("utf-8", "replace")
    return Content(place, _kind(place, named, suffix, head.removeprefix(codecs.BOM_UTF8)), packing, encoding)


def _refuse_foreign(place: Place, head: bytes) -> None:
    for first, what, remedy in _FOREIGN:
        if head.startswith(first):
            raise CalibrationError(f"{place.name} is {what}, which is no text to read; {remedy}")
    if head[257:262] == b"ustar":
        raise CalibrationError(f"{place.name} is a tar archive; unpack it and give the files in it")


_WAY_OUT = "give the text alone, or, where just this is wanted, a JSONL file with it in the field `text`"


def _kind(place: Place, named: str, suffix: str, head: bytes) -> str:
    """JSON and markup are known by how they begin, whatever the name; tables by their name, for prose has commas too."""
    start = head.lstrip()
    if _MARKUP.match(start) or (suffix in MARKUP_SUFFIXES and start.startswith(b"<")):
        raise CalibrationError(
            f"{place.name} holds markup, a web page or XML: most of what the model would read is tags; {_WAY_OUT}"
        )
    if named in (CSV, TSV):
        return named
    if named in (JSON, JSON_LINES):
        return _named_json(named, start)
    if _LIST_OF_OBJECTS.match(start):
        return JSON
    if _OBJECT.match(start):
        lines = _whole_first_lines(head)
        if not lines or all(isinstance(_parsed(line), dict) for line in lines):
            return JSON_LINES
        if _is_object_start(start):
            return JSON
    first = start.partition(b"\n")[0]
    if (table := _TABLE.match(first)) and _known_names(first, table[1]):
        return CSV if table[1] == b"," else TSV
    if suffix in SETTINGS_SUFFIXES:
        raise CalibrationError(f"{place.name} holds settings ({suffix[1:].upper()}) and no text; {_WAY_OUT}")
    return TEXT


def _known_names(first: bytes, separator: bytes) -> bool:
    """Whether names in the first line of a table are those of a layout."""
    names = {name.strip().strip(b'"').decode("utf-8", "replace") for name in first.split(separator)}
    return any(names.issuperset(layout) for layout in LAYOUTS)


def _named_json(named: str, start: bytes) -> str:
    """Whether records stand on a line each, or are values of any shape, one after the other or in a list."""
    if named == JSON_LINES and not _LIST_OF_OBJECTS.match(start):
        first = _whole_first_lines(start)[:1]
        # An object over several lines, as jq writes them.
        return JSON if first and first[0].strip() == b"{" else JSON_LINES
    lines = _whole_first_lines(start)
    return JSON_LINES if lines and all(isinstance(_parsed(line), dict) for line in lines) else JSON


def _whole_first_lines(head: bytes) -> list[bytes]:
    """The first lines that are not blank and surely whole, five at most."""
    lines = head.split(b"\n")
    if len(head) >= HEAD - 8:
        lines.pop()
    return [line for line in lines if line.strip()][:5]


def _is_object_start(start: bytes) -> bool:
    """Whether text that begins like an object over several lines goes on like one: prose does not, {"a": 1} and prose may."""
    try:
        json.JSONDecoder().raw_decode(start.decode("utf-8", "replace"))
    except ValueError:
        return False
    except RecursionError:
        return True
    return b"\n" in start.partition(b"}")[0]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
