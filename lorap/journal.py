"""What an unfinished run has done so far, in a hidden folder beside its output, so that the same command can go on after any
interruption.

::

    .OUT.lorap/
        lock              held by the process at work; the system lets go of it when that process dies, however it dies
        identity.json     what the run depends on: options, model files, texts, versions
        NAME.json         one finished step each; what it says of tensors is in NAME.safetensors, which is written first
        hidden/           hidden states that did not fit into memory; worthless to another process
        stage/            the folder that becomes OUT
        replaced/         the folder that was OUT before, for the moment between two renames

A file appears complete or not at all, by a rename, and is on the disk before the next step begins. So there is nothing to repair:
a step whose JSON is there is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorap.checkpoint import reason
from lorap.errors import CheckpointError, JournalError
from lorap.folders import read_json
from lorap.processes import ALONE, Processes
from lorap.stored_tensors import StoredTensor, stored_tensors
from lorap.tensor_files import Writable, write_tensors

IDENTITY = "identity"
# All is in the stage; only names are still to change.
COMPLETE = "complete"
STAGE = "stage"
REPLACED = "replaced"
# These alone are no reason to leave a folder behind.
PREPARATIONS = (IDENTITY, "weights")


class Journal:
    """The steps of a run that are done; see above.

    Args:
        folder: None for a run that keeps nothing.
        processes: who share the run; the first one writes.
    """

    def __init__(self, folder: Path | None, processes: Processes = ALONE) -> None:
        self.folder = folder
        self.processes = processes

    def has(self, step: str) -> bool:
        """Whether a step is done; for all processes what the first one finds."""
        return self.processes.from_first(self.folder is not None and self._path(step, "json").is_file())

    def read(self, step: str) -> dict[str, Any]:
        """What a step left.

        Raises:
            CheckpointError: its file is damaged.
        """
        return read_json(self._path(step, "json"))

    def tensors(self, step: str) -> dict[str, StoredTensor]:
        """The tensors of a step, still in their file; errors as :meth:`read`."""
        return stored_tensors(self._path(step, "safetensors"))

    def keep(self, step: str, value: Mapping[str, Any], tensors: Mapping[str, Writable] | None = None) -> None:
        """Write down that a step is done, and wait for the others.

        Raises:
            CheckpointError: the disk is full or broken; steps before this one are still there.
        """
        if self.processes.is_first:
            self.keep_alone(step, value, tensors)
        self.processes.wait()

    def keep_alone(self, step: str, value: Mapping[str, Any], tensors: Mapping[str, Writable] | None = None) -> None:
        """The same by the first process, while others do something else; errors as :meth:`keep`."""
        if self.folder is None:
            return
        if tensors is not None:
            self.keep_tensors(step, tensors)
        with self._writing(step, "json") as path:
            path.write_text(json.dumps(value), "utf-8")
            sync(path)

    def keep_tensors(self, step: str, tensors: Mapping[str, Writable]) -> None:
        """Write tensors of a step that is not done yet; errors as :meth:`keep`."""
        if self.folder is not None and self.processes.is_first:
            with self._writing(step, "safetensors") as path:
                write_tensors(path, tensors)

    def forget_tensors(self, step: str) -> None:
        """Remove tensors that nothing will need again."""
        if self.folder is not None and self.processes.is_first:
            self._path(step, "safetensors").unlink(missing_ok=True)

    def _path(self, step: str, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.{suffix}"

    @contextmanager
    def _writing(self, step: str, suffix: str) -> Iterator[Path]:
        path = self._path(step, suffix)
        draft = path.with_suffix(path.suffix + ".draft")
        try:
            yield draft
            draft.rename(path)
            sync(path.parent)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot keep {step.replace('-', ' ')} in {path.parent}: {reason(error, path)}; what was finished before is "
                "kept: mend that and run the same command again"
            ) from error


NO_JOURNAL = Journal(None)


def journal_folder(out: Path) -> Path:
    """Where the journal of a run with this output is."""
    return out.absolute().parent / f".{out.name}.lorap"


@contextmanager
def open_journal(out: Path, *, restart: bool = False, processes: Processes = ALONE) -> Iterator[Journal]:
    """The journal of the run that writes ``out``; no other process can open it meanwhile.

    What was not begun in earnest (no step done) leaves nothing behind.

    Raises:
        JournalError: another process is at work on ``out``.
        CheckpointError: the folder cannot be made.
    """
    folder = journal_folder(out)
    if not processes.is_first:
        yield Journal(folder, processes)
        return
    lock = _lock(folder, out)
    try:
        if restart:
            clear(folder)
        if (folder / REPLACED).exists() and not out.exists():
            (folder / REPLACED).rename(out)  # what was there before is whole again until the new folder is
        shutil.rmtree(folder / "hidden", ignore_errors=True)
        yield Journal(folder, processes)
    finally:
        if not any(path.suffix == ".json" and path.stem not in PREPARATIONS for path in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_identity(journal: Journal, identity: Mapping[str, Any]) -> None:
    """Begin a run that depends on ``identity``, or go on with one that depends on the same.

    Raises:
        JournalError: an unfinished run depends on something else, which is named.
    """
    assert journal.folder is not None
    if not (journal.folder / f"{IDENTITY}.json").is_file():
        clear(journal.folder)
        journal.keep_alone(IDENTITY, identity)
        return
    before = _flat(journal.read(IDENTITY))
    now = _flat(json.loads(json.dumps(identity)))
    changes = [
        f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise JournalError(
            f"an unfinished run with this output is another one: {'; '.join(changes)}. Run its own command again to finish it, "
            "choose another output, or pass --restart to throw away what it has done"
        )


def is_complete(out: Path) -> bool:
    """Whether an interrupted run has done everything but the last renames."""
    return (journal_folder(out) / f"{COMPLETE}.json").is_file()


def put_in_place(journal: Journal, out: Path) -> None:
    """The stage becomes ``out``, whatever was there goes, and the journal with it.

    It may be interrupted anywhere and called again: until the last rename ``out`` can be had from the journal, then it is there.

    Raises:
        CheckpointError: ``out`` cannot be replaced.
    """
    folder = journal.folder
    assert folder is not None
    stage = folder / STAGE
    try:
        if stage.exists():
            if out.exists():
                shutil.rmtree(folder / REPLACED, ignore_errors=True)
                out.rename(folder / REPLACED)
            try:
                stage.rename(out)
            except OSError:
                if (folder / REPLACED).exists():
                    (folder / REPLACED).rename(out)
                raise
            sync(out.absolute().parent)
        last = [folder / f"{step}.json" for step in (COMPLETE, *PREPARATIONS)]
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in last and path.name != "lock":
                path.unlink()
        for path in last:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"could not put {out} in place: {reason(error, out)}; it is whole in {stage}: mend that and run the same "
            "command again"
        ) from error


def clear(folder: Path) -> None:
    """Everything in the folder goes, but for the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _lock(folder: Path, out: Path) -> int:
    """The open lock file of a journal, held by this process."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise CheckpointError(
                f"cannot write into {folder.parent}: {error.strerror}; choose another output"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "another one"
            os.close(lock)
            raise JournalError(
                f"process {holder} is writing {out} already; wait for it, or choose another output"
            ) from None
        if (folder / "lock").exists() and os.fstat(lock).st_ino == (folder / "lock").stat().st_ino:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        os.close(lock)  # of a folder that its last user removed in this moment


def sync(path: Path) -> None:
    """What was written to a file, or renamed within a folder, is on the disk when this returns; so are the files of a folder."""
    for inner in path.iterdir() if path.is_dir() and path.name == STAGE else ():
        sync(inner)
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name} ") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
