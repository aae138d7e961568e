"""Break a compression at its n-th access to the file system, go on after it, and compare what comes out.

    python tests/crashing.py KIND MODEL TOKENS FOLDER [STRIDE [LAST]]

prints one JSON object a line. It forks a process for each attempt, so that everything is imported once. Kinds: ``kill`` ends the
process before the n-th access, as SIGKILL does; ``full`` makes that access and all after it fail as on a full disk; ``eio`` makes
the n-th read fail; ``short`` makes all reads return less than was asked for. With a stride, every STRIDE-th access and the
last 12 (or LAST), among which are the renames, are broken; without one all are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lorap
from lorap import CompressionConfig
from lorap.compression.runs.run import RunOptions, compress_to_folder

CONFIG = CompressionConfig(sparsity=0.4, num_calibration_samples=12, calibration_seq_len=32)
KILLED, FAILED = 9, 3


class Disk:
    """Counts accesses, and breaks at the n-th."""

    def __init__(self, kind: str, at: int) -> None:
        self.kind, self.at, self.count = kind, at, 0

    def access(self) -> None:
        self.count += 1
        if self.kind == "kill" and self.count == self.at:
            os._exit(KILLED)
        if self.kind == "full" and self.count >= self.at:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.kind == "eio" and self.count == self.at:
            raise OSError(errno.EIO, "Input/output error")

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.access()
            return function(*args, **kwargs)

        return wrapped

    def half(self, file: int, buffers: list[memoryview], offset: int) -> int:
        return _preadv(file, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    def install(self) -> None:
        if self.kind == "short":
            os.preadv = self.half  # type: ignore[assignment]
        elif self.kind == "eio":
            os.preadv = self.before(os.preadv)  # type: ignore[assignment]
        else:
            for name in ("write", "fsync", "rename", "replace", "mkdir"):
                setattr(os, name, self.before(getattr(os, name)))
            pathlib.Path.write_text = self.before(pathlib.Path.write_text)  # type: ignore[assignment, method-assign]
            if self.kind == "kill":  # a full disk lets one remove things
                shutil.rmtree = self.before(shutil.rmtree)  # type: ignore[assignment]
                pathlib.Path.unlink = self.before(pathlib.Path.unlink)  # type: ignore[assignment, method-assign]


_preadv = os.preadv


def attempt(disk: Disk, model: Path, tokens: Path, out: Path) -> tuple[int, str, int]:
    """(exit status, message, accesses) of a compression in a process of its own, on that disk."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status, message = 1, ""
        try:
            disk.install()
            compress_to_folder(
                model,
                out,
                CONFIG,
                RunOptions(calibration=str(tokens), evaluation=[str(tokens)], progress=False, overwrite=True),
            )
            status = 0
        except lorap.LoRAPError as error:
            status, message = FAILED, str(error)
        except BaseException as error:
            message = repr(error)
        _write(writing, json.dumps([message, disk.count]).encode())
        os._exit(status)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        text = file.read()
    message, count = json.loads(text) if text else ("", 0)
    return os.waitstatus_to_exitcode(status), message, count


_write = os.write


def digest(folder: Path) -> dict[str, str]:
    """Hashes of all files, but for the reports, which tell times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("lorap_report.json", "report.html")
    }


def main(kind: str, model: Path, tokens: Path, folder: Path, stride: int = 1, last: int = 12) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    healthy, old = Disk("none", 0), {"old.txt": hashlib.sha256(b"old").hexdigest()}
    whole = folder / "whole"
    status, message, accesses = attempt(healthy if kind in ("eio", "short") else Disk("count", 0), model, tokens, whole)
    assert status == 0, message
    expected, source = digest(whole), digest(model)
    counting = Disk("eio" if kind == "eio" else "kill" if kind == "kill" else "count", 0)
    (folder / "counted").mkdir()
    (folder / "counted" / "old.txt").write_text("old")
    _, _, accesses = attempt(counting, model, tokens, folder / "counted")
    end = range(max(1, accesses + 1 - last), accesses + 1)
    every = [1] if kind == "short" else sorted({*range(1, accesses + 1, stride), *end})
    print(json.dumps({"accesses": accesses}), flush=True)
    for at in every:
        out = folder / f"out{at}"
        out.mkdir()
        (out / "old.txt").write_text("old")
        broken, message, _ = attempt(Disk(kind, at), model, tokens, out)
        between = digest(out) if out.exists() else None
        resumed, again, _ = attempt(Disk("none", 0), model, tokens, out)
        print(
            json.dumps(
                {
                    "at": at,
                    "broken": broken,
                    "message": message,
                    "between": "gone"
                    if between is None
                    else "old"
                    if between == old
                    else "new"
                    if between == expected
                    else "?",
                    "resumed": resumed,
                    "again": again,
                    "same": resumed == 0 and digest(out) == expected,
                    "source": digest(model) == source,
                    "left": sorted(path.name for path in folder.glob(f".out{at}.*")),
                }
            ),
            flush=True,
        )
        shutil.rmtree(out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:5]), *map(int, sys.argv[5:]))
