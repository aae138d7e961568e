"""Text and lines of a file, all of them or pieces spread over it, in bounded memory.

Nothing is cut within a record; prose is cut between lines, or between characters where a line has no end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import IO, TypeVar

from lorap.calibration.files import Content
from lorap.errors import CalibrationError

T = TypeVar("T")

# Of a larger text, this many bytes are read, in equal pieces spread over it.
MAX_TEXT_BYTES = 32 * 2**20
TEXT_PIECES = 32
# A longer line is no record.
MAX_RECORD_BYTES = 2**28


def in_pieces(content: Content) -> bool:
    """Whether a file is so large that only pieces of it are looked at."""
    return content.size is not None and content.size > MAX_TEXT_BYTES


def text_of(content: Content) -> str:
    """The text of a file of prose, or pieces of it.

    Raises:
        CalibrationError: it is binary, or not UTF-8.
    """
    path, size = content.place.path, content.size
    with content.open() as file:
        if size is None:
            blocks, total = spread(_blocks(file), len)
            raw = b"".join(blocks) if len(blocks) == total else b"\n".join(map(_trimmed, blocks))
        elif size <= MAX_TEXT_BYTES:
            raw = file.read()
        else:
            raw = b"\n".join(_whole_lines(file, size * piece // TEXT_PIECES) for piece in range(TEXT_PIECES))
    if (position := raw.find(b"\0")) >= 0:
        raise CalibrationError(f"{path} is binary (a zero byte at offset {position}); give a UTF-8 text or JSONL file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (offset {error.start}); convert it first") from None


def lines_of(content: Content) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, each with where it is; of a large file that can be read from any place, lines spread over it.

    Returns:
        Where each line is, for messages, and its bytes.

    Raises:
        CalibrationError: a line is longer than any record.
    """
    with content.open() as file:
        if in_pieces(content):
            yield from _spread_lines(content, file)
            return
        number = 0
        while line := _line(content, file, number + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"line {number}", line


def _spread_lines(content: Content, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Whole lines from equal distances; a line that is longer than a piece takes the place of the next ones."""
    taken = end = 0
    size = content.size or 0
    for piece in range(TEXT_PIECES):
        start = size * piece // TEXT_PIECES
        if start > end:
            file.seek(start - 1)
            end = start - 1 + len(_line(content, file, None))
        else:
            file.seek(end)
        while taken < MAX_TEXT_BYTES * (piece + 1) // TEXT_PIECES and (line := _line(content, file, None)):
            where, end, taken = f"the line at byte {end:,}", end + len(line), taken + len(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if where.endswith(" 0") else line
            if line.strip():
                yield where, line


def _line(content: Content, file: IO[bytes], number: int | None) -> bytes:
    line = file.readline(MAX_RECORD_BYTES + 1)
    if len(line) > MAX_RECORD_BYTES:
        where = "a line" if number is None else f"line {number}"
        raise CalibrationError(
            f"{content.place.name}: {where} is longer than {MAX_RECORD_BYTES // 2**20} MB, which is no record; split it"
        )
    return line


def _whole_lines(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    piece = file.read(MAX_TEXT_BYTES // TEXT_PIECES)
    first = piece.find(b"\n") + 1 if offset else 0
    last = piece.rfind(b"\n") + 1
    return piece[first:last] if last > first else _trimmed(piece)


def _trimmed(piece: bytes) -> bytes:
    """A piece of a line, cut between characters: a continuation byte of UTF-8 looks like 10xxxxxx."""
    return piece.decode("utf-8", errors="ignore").encode() if b"\0" not in piece else piece


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """A file that can only be read forwards, in whole lines where they are not too long."""
    size = MAX_TEXT_BYTES // (4 * TEXT_PIECES)
    while block := file.read(size):
        yield block + file.readline(size)


def spread(items: Iterable[T], size: Callable[[T], int]) -> tuple[list[T], int]:
    """All items, or runs of neighbours at equal distances, of ``MAX_TEXT_BYTES`` at most; and how many items there were.

    One pass, in bounded memory, without knowing the length: whenever too much is held, every second run goes, and from then on
    only as many are taken.
    """
    kept: list[tuple[int, int, list[T]]] = []
    run: list[T] = []
    index = total = run_size = 0
    stride = 1

    def close() -> None:
        nonlocal kept, run, run_size, stride, index
        if index % stride == 0:
            kept.append((index, run_size, run))
        while len(kept) > 1 and sum(part for _, part, _ in kept) > MAX_TEXT_BYTES:
            stride *= 2
            kept = [part for part in kept if part[0] % stride == 0]
        index, run, run_size = index + 1, [], 0

    for item in items:
        total += 1
        run.append(item)
        run_size += size(item)
        if run_size >= MAX_TEXT_BYTES // (2 * TEXT_PIECES):
            close()
    if run:
        close()
    return [item for _, _, part in kept for item in part], total
