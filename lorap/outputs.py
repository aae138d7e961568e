"""Output folders: where they may be, and how they appear whole or not at all.

An output folder is made in a hidden *work folder* and then put in its place, by :meth:`WorkFolder.put_in_place` and by nothing
else. Links are followed first. The work folder is beside the output, ``.OUT.lorap``, and renames do the rest. Where the output
has to stay the folder that it is (a mount point, in a parent that is not writable, somebody else's, the current folder), the work
folder is inside it, ``OUT/.lorap``, and the files move in one by one:

    1. what was in OUT moves to STAGE.retiring, config.json first; then that is renamed to STAGE.retired
    2. what is in STAGE moves to OUT, config.json last; then STAGE is removed

So a half-placed folder is no model to anybody, and whoever opens the work folder next sees how far it went and takes it back.

No library does this: packages for atomic writes replace one file at a time, and no call of Python replaces a folder that is not
empty, or brings back what a killed process has half moved. Locks are filelock's.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from lorap.errors import CheckpointError
from lorap.files import PARTIAL, existing, locked, move, reason, remove, share, sync, sync_tree

INSIDE = ".lorap"
LOCK = "lock"
# The stage of commands that begin anew when they were interrupted.
WRITTEN = "written"
# What makes a folder a model.
MODEL_FILE = "config.json"
# Not part of an output: the work folder, and what a disk of its own has at its root.
NOT_CONTENT = (INSIDE, "lost+found")
# How a rename fails that can never work here, while the files inside could still move.
CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES, errno.EROFS, errno.EINVAL)


def resolved(out: str | Path) -> Path:
    """Where an output really is, links followed; it need not exist.

    Raises:
        CheckpointError: links lead in a circle.
    """
    path = Path(os.path.realpath(out))
    if path.is_symlink():
        raise CheckpointError(f"output {out} is a link that leads back to itself; remove it or choose another output")
    return path


def work_path(out: str | Path) -> Path:
    """The work folder of an output, whether it exists or not; one that exists stays where it was begun."""
    out = resolved(out)
    inside, beside = out / INSIDE, out.parent / f".{out.name}.lorap"
    if inside.is_dir() or (not beside.is_dir() and _must_stay(out)):
        return inside
    return beside


def check_output(
    out: str | Path, *, source: Path | None = None, overwrite: bool = False, needed_bytes: int = 0
) -> None:
    """Refuse an output folder before hours of work go into it. What an interrupted command has half placed is taken back first.

    Args:
        out: folder to write.
        source: folder of the model that is read; None for none.
        overwrite: whether a folder that is not empty may be replaced.
        needed_bytes: about how much will be written.

    Raises:
        CheckpointError: it is not empty, would touch the source model, cannot be written, or the disk is too full.
        JournalError: another process is writing it.
    """
    path = resolved(out)
    if source is not None:
        origin = source.resolve()
        if path == origin or origin in path.parents or path in origin.parents:
            raise CheckpointError(f"output {out} overlaps the source model {source}; choose a folder outside it")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"output {out} is a file; choose a new folder")
    parent = existing(work_path(path).parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"no permission to write into {parent}; choose another output folder")
    if work_path(path).parent.is_dir():
        with work_folder(path):
            pass
    if path.is_dir() and _content(path) and not overwrite:
        raise CheckpointError(f"output {out} is not empty; choose a new folder or pass --overwrite")
    check_room(work_path(path), needed_bytes, shown=out)


def check_room(folder: Path, needed_bytes: int, *, shown: str | Path) -> None:
    """Refuse a disk that is too full for what is to be written into ``folder``.

    Args:
        folder: to write into, whether it exists or not.
        needed_bytes: about how much will be written.
        shown: what the message calls it.

    Raises:
        CheckpointError: with both numbers.
    """
    free = shutil.disk_usage(existing(folder)).free
    if free < needed_bytes:
        raise CheckpointError(
            f"the disk of {shown} has {free / 1e6:,.0f} MB free and about {needed_bytes / 1e6:,.0f} MB are needed; make room, or "
            "choose an output on another disk"
        )


@dataclass(frozen=True)
class WorkFolder:
    """The hidden folder in which an output is made, locked by this process.

    Args:
        out: where the output goes, links resolved.
        path: of the work folder.
    """

    out: Path
    path: Path

    @property
    def is_half_placed(self) -> bool:
        """Whether what was in the output is in here."""
        return any(path.suffix in (".replaced", ".retiring", ".retired") for path in self.path.iterdir())

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """An empty folder that becomes the output if the block succeeds and vanishes if it does not.

        Raises:
            CheckpointError: it cannot be written or put in place.
        """
        stage = self.path / WRITTEN
        try:
            stage.mkdir()
            yield stage
            self.put_in_place(stage)
        except (OSError, SafetensorError) as error:
            left = f"what was there is in {self.path}, until a command writes there again"
            raise CheckpointError(
                f"could not write {self.out}: {reason(error, self.out)}; "
                f"{left if self.is_half_placed else 'nothing was left there'}"
            ) from error
        finally:
            if not self.is_half_placed:
                shutil.rmtree(stage, ignore_errors=True)

    def put_in_place(self, stage: Path) -> None:
        """A folder of the work folder becomes the output; what was there before goes. A stage that is gone is in place already.

        Killed anywhere, the next :func:`work_folder` takes back what was done, and this can be called again.

        Raises:
            OSError: the output cannot be replaced. It is what it was, if that could be brought back.
        """
        try:
            if stage.exists():
                share(stage)
                sync_tree(stage)
                if not self._swap(stage):
                    self._fill(stage)
        except BaseException:
            with suppress(OSError):
                self.restore()
            raise
        for suffix in (".replaced", ".retired"):
            shutil.rmtree(stage.with_suffix(suffix), ignore_errors=True)

    def restore(self) -> None:
        """Take back what an interrupted :meth:`put_in_place` has done, so that output and stage are as before.

        Raises:
            OSError: a file cannot be moved back.
        """
        for path in self.path.glob("*.replaced"):
            if not self.out.exists():
                os.rename(path, self.out)
            elif not path.with_suffix("").exists():
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob("*.retired"):
            stage = path.with_suffix("")
            if stage.exists():
                _move_all(_content(self.out), stage, first=True)
                os.rename(path, path.with_suffix(".retiring"))
            else:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob("*.retiring"):
            _move_all(_content(path), self.out)
            path.rmdir()

    def _swap(self, stage: Path) -> bool:
        """By renames of whole folders; False where that cannot work, and then nothing has changed."""
        replaced = stage.with_suffix(".replaced")
        if self.path.parent == self.out or _must_stay(self.out):
            return False
        try:
            if self.out.exists():
                stage.chmod(stat.S_IMODE(self.out.stat().st_mode))
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(self.out, replaced)
            os.rename(stage, self.out)
        except OSError as error:
            if replaced.exists() and not self.out.exists():
                os.rename(replaced, self.out)
            if error.errno in CANNOT_RENAME and self.out.is_dir():
                return False
            raise
        sync(self.out.parent)
        return True

    def _fill(self, stage: Path) -> None:
        """File by file, into the folder that is there."""
        retiring, retired = (stage.with_suffix(suffix) for suffix in (".retiring", ".retired"))
        retiring.mkdir(exist_ok=True)
        _move_all(_content(self.out), retiring, first=True)
        sync(self.out)
        os.rename(retiring, retired)
        sync(self.path)
        _move_all(_content(stage), self.out)
        sync(self.out)
        stage.rmdir()
        sync(self.path)


@contextmanager
def work_folder(out: str | Path) -> Iterator[WorkFolder]:
    """The work folder of an output; no other process can open it meanwhile. It goes again if nothing is left in it.

    Raises:
        JournalError: another process is at work on ``out``.
        CheckpointError: the folder cannot be made.
    """
    work = WorkFolder(resolved(out), work_path(out))
    with locked(work.path / LOCK, work.out):
        try:
            work.restore()
        except OSError as error:
            raise CheckpointError(f"cannot bring back what was in {out}: {error}; it is in {work.path}") from error
        shutil.rmtree(work.path / WRITTEN, ignore_errors=True)
        try:
            yield work
        finally:
            if {path.name for path in work.path.glob("*")} <= {LOCK}:
                shutil.rmtree(work.path, ignore_errors=True)


@contextmanager
def staged_folder(out: str | Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder that becomes ``out`` if the block succeeds and vanishes if it does not; errors as :func:`check_output`.

    Args:
        out: folder to write.
        overwrite: whether a folder that is not empty may be replaced.
        needed_bytes: about how much will be written.
    """
    check_output(out, overwrite=overwrite, needed_bytes=needed_bytes)
    with work_folder(out) as work, work.staged() as stage:
        yield stage


def _must_stay(out: Path) -> bool:
    """Whether a folder cannot be replaced by another of its name, or would belong to somebody else then."""
    if not out.is_dir():
        return False
    seen = out.stat()
    shared = seen.st_uid != os.geteuid() or bool(seen.st_mode & (stat.S_ISGID | stat.S_ISVTX))
    if shared or os.path.ismount(out) or not os.access(out.parent, os.W_OK | os.X_OK):
        return True
    try:
        return os.path.samefile(out, os.curdir)
    except OSError:
        return False


def _content(folder: Path) -> list[Path]:
    """What is in a folder; unfinished copies are removed first."""
    for path in folder.glob(f"{PARTIAL}*"):
        remove(path)
    return sorted(path for path in folder.iterdir() if path.name not in NOT_CONTENT)


def _move_all(paths: list[Path], folder: Path, *, first: bool = False) -> None:
    """Into a folder, what makes it a model last, or ``first``."""
    for path in sorted(paths, key=lambda path: (path.name == MODEL_FILE) != first):
        move(path, folder / path.name)
