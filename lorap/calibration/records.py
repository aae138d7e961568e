"""The records of a file, a folder or a data set, one after the other, each with where it is; and the documents in them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from lorap.calibration import files, tables
from lorap.calibration.chats import Document, document_of, layout_of, size_of
from lorap.calibration.files import Content
from lorap.calibration.pieces import MAX_RECORD_BYTES, in_pieces, lines_of, spread, text_of
from lorap.errors import CalibrationError, shown

# Characters that are read of JSON at once.
CHUNK = 2**20
Records = Iterable[tuple[str, Any]]


@dataclass(frozen=True)
class Reading:
    """What a source holds.

    Args:
        documents: texts, or chats.
        told: what was read, in words; empty for plain text.
    """

    documents: Sequence[Document]
    told: str = ""


def read_file(content: Content) -> Reading:
    """The text of a file, or the texts or chats of its records.

    Raises:
        CalibrationError: it is damaged, or a record has no text.
    """
    field, packing = content.place.field, f", {content.packing}" if content.packing else ""
    recoded = "" if content.encoding == "utf-8" else f", {content.encoding.upper()}"
    if content.kind == files.TEXT:
        if field:
            raise CalibrationError(f"{content.place.name}: a plain text has no fields; leave out :{field}")
        return Reading([text_of(content)], (packing + recoded).removeprefix(", "))
    found = read_records(_READERS[content.kind](content), content.place.name, field)
    if content.kind == files.JSON_LINES and in_pieces(content):
        found = Reading(found.documents, f"{found.told}, from pieces of it")
    return Reading(found.documents, found.told + f" ({content.kind}{packing}{recoded})")


def read_records(records: Records, name: str, field: str = "") -> Reading:
    """The texts or chats of records; of many, some spread over all of them.

    Args:
        records: (where it is, record), one after the other.
        name: of the source, for messages.
        field: the only one to read; empty for those that are known.

    Raises:
        CalibrationError: a record is not like the first, or has no text.
    """
    layout: tuple[str, ...] | None = None
    blank = 0

    def documents() -> Iterator[Document]:
        nonlocal layout, blank
        for where, record in records:
            where = f"{name} {where}"
            if layout is None:
                layout = layout_of(record, where, field)
            document = document_of(record, layout, where)
            if document is None:
                blank += 1
            else:
                yield document

    kept, total = spread(documents(), size_of)
    told = f"{total + blank:,} records"
    if layout:
        told += f", {'fields' if len(layout) > 1 else 'field'} {' + '.join(layout)}"
    if blank:
        told += f", {blank:,} of them blank"
    if len(kept) < total:
        told += f", {len(kept):,} of them used"
    return Reading(kept, told)


# JSON


def _json_lines(content: Content) -> Records:
    for where, line in lines_of(content):
        if b"\0" in line:
            raise CalibrationError(f"{content.place.name} {where} is binary (it holds a zero byte)")
        try:
            yield where, json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{content.place.name} {where} is not UTF-8 text (offset {error.start} in it)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{content.place.name} {where} is not JSON: {_short(error)}") from None


def _json_values(content: Content) -> Records:
    """Values in a list, or one after the other; a comma too many does no harm."""
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    number = 0
    with content.open() as raw:
        text = _Chunks(content, raw)
        text.skip(space)
        in_list = text.peek() == "["
        if in_list:
            text.at += 1
        while True:
            text.skip(space)
            if not text.peek() or (in_list and text.peek() == "]"):
                break
            number += 1
            yield f"record {number:,}", text.value(decoder, number)
        if in_list and not text.peek():
            raise CalibrationError(
                f"{content.place.name} ends behind record {number:,}, within its list: a part is missing"
            )
        text.at += in_list
        text.skip(space)
        if text.peek():
            raise CalibrationError(f"{content.place.name} goes on behind the end of its list of {number:,} records")


class _Chunks:
    """Text of which as much is in memory as the value at ``at`` needs."""

    def __init__(self, content: Content, raw: IO[bytes]) -> None:
        self.name, self.raw, self.text, self.at = content.place.name, raw, "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.ended = False

    def more(self) -> bool:
        """Reads on; False at the end. What is behind is let go, and twice as much is read where a value is long."""
        if self.ended:
            return False
        rest = self.text[self.at :]
        data = self.raw.read(max(CHUNK, len(rest)))
        try:
            self.text, self.at = rest + self.decoder.decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{self.name} is not UTF-8 text ({error.reason}); convert it first") from None
        self.ended = not data
        return not self.ended

    def skip(self, space: re.Pattern[str]) -> None:
        while True:
            self.at = cast(re.Match[str], space.match(self.text, self.at)).end()
            if self.at < len(self.text) or not self.more():
                return

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def value(self, decoder: json.JSONDecoder, number: int) -> Any:
        while True:
            try:
                found, end = decoder.raw_decode(self.text, self.at)
                # A number may go on behind the end of what was read.
                if end < len(self.text) or not self.more():
                    self.at = end
                    return found
            except ValueError as error:
                if len(self.text) - self.at > MAX_RECORD_BYTES:
                    reason = f"it is longer than {MAX_RECORD_BYTES // 2**20} MB, or no JSON"
                    raise CalibrationError(f"{self.name} record {number:,}: {reason}") from None
                if not self.more():
                    raise CalibrationError(f"{self.name} record {number:,} is not JSON: {_short(error)}") from None
            except RecursionError:
                raise CalibrationError(f"{self.name} record {number:,} is nested too deeply") from None


def _short(error: Exception) -> str:
    return shown(error) if isinstance(error, ValueError) else "it is nested too deeply"


_READERS: dict[str, Callable[[Content], Records]] = {
    files.JSON: _json_values,
    files.JSON_LINES: _json_lines,
    **tables.READERS,
}
