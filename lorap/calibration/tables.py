"""Rows of CSV, TSV, Parquet and Arrow files, one after the other."""

from __future__ import annotations

import csv
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from lorap.calibration import files
from lorap.calibration.files import Content
from lorap.calibration.pieces import MAX_RECORD_BYTES
from lorap.errors import CalibrationError, shown


def separated(content: Content) -> Iterator[tuple[str, Any]]:
    """Rows of CSV or TSV under the names in its first row.

    Returns:
        Where each row is, for messages, and its values by name.

    Raises:
        CalibrationError: a row has more or fewer values than there are names, or the file is not UTF-8.
    """
    name = content.place.name
    csv.field_size_limit(min(MAX_RECORD_BYTES, sys.maxsize))
    with content.open() as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        rows = csv.reader(text, delimiter="\t" if content.kind == files.TSV else ",", strict=True)
        try:
            header = next(rows, [])
            for number, row in enumerate((row for row in rows if row), 1):
                if len(row) != len(header):
                    raise CalibrationError(
                        f"{name} record {number:,} (line {rows.line_num:,}) has {len(row)} values under {len(header)} names"
                    )
                yield f"record {number:,}", dict(zip(header, row, strict=True))
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{name} is not UTF-8 text near line {rows.line_num:,} ({error.reason})") from None
        except csv.Error as error:
            raise CalibrationError(f"{name} line {rows.line_num:,} is no {content.kind}: {shown(error)}") from None


def parquet(content: Content) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file.

    Returns:
        Where each row is, for messages, and its values by name.

    Raises:
        CalibrationError: it is damaged, or pyarrow is not installed.
    """

    def batches(library: Any, file: Any) -> Iterator[Any]:
        from pyarrow.parquet import ParquetFile

        yield from ParquetFile(file).iter_batches(batch_size=256)

    return _arrow_rows(content, batches)


def arrow(content: Content) -> Iterator[tuple[str, Any]]:
    """Rows of an Arrow file or stream; errors as :func:`parquet`."""

    def batches(library: Any, file: Any) -> Iterator[Any]:
        start = file.read(6)
        file.seek(0)
        if start == b"ARROW1":
            found = library.ipc.open_file(file)
            yield from (found.get_batch(index) for index in range(found.num_record_batches))
        else:
            yield from library.ipc.open_stream(file)

    return _arrow_rows(content, batches)


def _arrow_rows(content: Content, batches: Callable[[Any, Any], Iterator[Any]]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
    except ImportError:
        raise CalibrationError(
            f"{content.place.name} is a {content.kind} file, and the package `pyarrow`, which comes with `datasets`, is not "
            "installed to read it: pip install 'lorap[eval]'"
        ) from None
    number = 0
    with _on_disk(content) as file:
        try:
            for batch in batches(pyarrow, file):
                batch.validate(full=True)  # pyarrow itself trusts the lengths in a damaged file
                for row in batch.to_pylist():
                    number += 1
                    yield f"record {number:,}", row
        except MemoryError:
            reason = f"behind record {number:,} it asks for more memory than there is"
            raise CalibrationError(f"{content.place.name} is a damaged {content.kind} file: {reason}") from None
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise CalibrationError(f"{content.place.name} is a damaged {content.kind} file: {shown(error)}") from None


def _on_disk(content: Content) -> IO[bytes]:
    """The file, unpacked: these formats begin at their end."""
    if not content.packing:
        return content.place.path.open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with content.open() as file:
        shutil.copyfileobj(file, copy, 2**20)
    copy.seek(0)
    return cast(IO[bytes], copy)


READERS: dict[str, Callable[[Content], Iterator[tuple[str, Any]]]] = {
    files.CSV: separated,
    files.TSV: separated,
    files.PARQUET: parquet,
    files.ARROW: arrow,
}
