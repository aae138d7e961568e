"""Files that appear whole or not at all, and what a folder needs besides: to be on the disk, to be readable, to be moved."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorap.errors import CheckpointError, JournalError

# A copy that is not complete, or is on its way out.
PARTIAL = ".partial-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place, and is on the disk, if the block succeeds.

    Raises:
        OSError: it cannot be written; a file that was there before still is.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """What was written to a file, or renamed within a folder, is on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(path: Path) -> None:
    """:func:`sync` of a file, or of a folder and everything below it."""
    if path.is_symlink():
        return
    for inner in path.iterdir() if path.is_dir() else ():
        sync_tree(inner)
    sync(path)


def hash_files(*paths: Path) -> str:
    """sha256 of what the files hold, one after the other, in hexadecimal.

    Raises:
        CheckpointError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while piece := file.read(2**24):
                    digest.update(piece)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def share(folder: Path) -> None:
    """Give everything below the permissions of ordinary new files and folders; safetensors' own files are private at first."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod((0o777 & ~umask) | (path.stat().st_mode & stat.S_ISGID))
        elif path.is_file():
            path.chmod(0o666 & ~umask)


def reason(error: Exception, out: Path) -> str:
    """What went wrong with writing, in words; for a full disk how full it is."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(existing(out)).free
        return f"the disk is full or a quota is reached ({free / 1e6:,.0f} MB free)"
    return str(error)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def move(source: Path, target: Path) -> None:
    """One file or folder; across file systems by a copy, which is complete before it has its name."""
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            raise
    partial, leaving = target.with_name(PARTIAL + target.name), source.with_name(PARTIAL + source.name)
    for path in (partial, leaving):  # of a move that was interrupted
        if path.exists():
            remove(path)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, partial, symlinks=True)
    else:
        shutil.copy2(source, partial, follow_symlinks=False)
    sync_tree(partial)
    if target.exists():  # a copy that was complete when its source was still there
        remove(target)
    os.rename(partial, target)
    os.rename(source, leaving)
    remove(leaving)


def remove(path: Path) -> None:
    """A file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """The file ``path`` is locked by this process meanwhile. The system lets go of it when the process dies, however it dies.

    Raises:
        JournalError: another process holds it, and so writes ``what``.
        CheckpointError: it cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0, mode=0o600)
    holder = ""
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # some versions of filelock empty a file that they fail to lock
                holder = path.read_text("utf-8", errors="replace")[:20]
            lock.acquire()
            path.write_text(str(os.getpid()), "utf-8")
        except (Timeout, FileNotFoundError):  # it is held, or its folder went with its last user in this moment
            whose = f"process {holder}" if holder else "another process"
            raise JournalError(f"{whose} is writing {what} already; wait for it, or choose another output") from None
        except OSError as error:
            folder = path.parent.parent
            raise CheckpointError(f"cannot write into {folder}: {error.strerror}; choose another output") from error
        yield
    finally:
        lock.release()
