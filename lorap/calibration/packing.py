"""Bytes of a file as they were before it was packed, in UTF-8."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lorap.errors import CalibrationError, shown


def packing_of(head: bytes) -> str:
    """How a file is packed, from its first bytes; empty where it is not."""
    return next((name for name, found in _PACKINGS.items() if found(head)), "")


@contextmanager
def unpacked(path: Path, name: str, packing: str, encoding: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked, in UTF-8.

    Args:
        path: of the file.
        name: for messages.
        packing: as :func:`packing_of` tells it.
        encoding: of the file.

    Raises:
        CalibrationError: it cannot be opened or unpacked, or is not in that encoding.
    """
    try:
        with _UNPACK[packing](path) as file:
            yield file if encoding == "utf-8" else cast(Any, io.BufferedReader(_Recoded(file, encoding)))
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{name} is not {error.encoding} text throughout ({error.reason}); convert it first"
        ) from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{name} is damaged: its {packing} data cannot be unpacked ({shown(error)})") from None
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise CalibrationError(f"{name} is damaged: its zstd data cannot be unpacked ({shown(error)})") from None


def _zstd(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise CalibrationError(
            f"{path.name} is packed with zstd, and the package `zstandard` is not installed to unpack it: pip install zstandard"
        ) from None
    return cast(IO[bytes], io.BufferedReader(cast(Any, _Frames(path.open("rb"), zstandard.ZstdDecompressor()))))


_PACKINGS: dict[str, Callable[[bytes], bool]] = {
    "gzip": lambda head: head.startswith(b"\x1f\x8b"),
    "bzip2": lambda head: head.startswith(b"BZh") and head[4:10] == b"1AY&SY",
    "xz": lambda head: head.startswith(b"\xfd7zXZ\0"),
    "zstd": lambda head: head.startswith(b"\x28\xb5\x2f\xfd"),
}
_UNPACK: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    "gzip": gzip.GzipFile,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _zstd,
}


class _Recoded(io.RawIOBase):
    """UTF-8 bytes of a file in another encoding."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._file, self._decoder, self._left = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._file.read(2**16)
            self._left = self._decoder.decode(data, final=not data).encode()
            if not data:
                break
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


class _Frames(io.RawIOBase):
    """Zstandard frames, one after the other; the package's own reader takes a file that was cut off for one that ends there."""

    def __init__(self, file: IO[bytes], decompressor: Any) -> None:
        self._file, self._decompressor, self._frame = file, decompressor, None
        self._packed, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._packed = self._packed or self._file.read(2**16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            frame: Any = self._frame or self._decompressor.decompressobj()
            self._left = frame.decompress(self._packed)
            self._packed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
