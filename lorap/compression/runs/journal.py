"""What an unfinished run has done so far, in the hidden work folder of its output (:mod:`lorap.outputs`), so that the same
command can go on after any interruption.

::

    .OUT.lorap/, or OUT/.lorap/
        lock              held by the process at work; the system lets go of it when that process dies, however it dies
        identity.json     what the run depends on: options, model files, texts, versions
        NAME.json         one finished step each; what it says of tensors is in NAME.safetensors, which is written first
        hidden/           hidden states that did not fit into memory; worthless to another process
        stage/            the folder that becomes OUT
        stage.replaced/   what was OUT before, while the two change places

A file appears complete or not at all, by a rename, and is on the disk before the next step begins. So there is nothing to repair:
a step whose JSON is there is done.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorap.checkpoint.stored_tensors import StoredTensor, stored_tensors
from lorap.checkpoint.write import Writable, write_tensors
from lorap.distributed import SINGLE_PROCESS, Processes
from lorap.errors import CheckpointError, JournalError, LoRAPError, ProcessError
from lorap.files import reason, remove, replacing
from lorap.jsonio import differences, read_as, read_json, write_json
from lorap.outputs import LOCK, WorkFolder, work_folder, work_path

IDENTITY = "identity"
THREADS = "threads"
# All is in the stage; only names are still to change.
COMPLETE = "complete"
STAGE = "stage"
# In the same folder, but nothing of a run's.
NOT_OURS = (LOCK, "recovery")
# These alone are no reason to leave a folder behind.
PREPARATIONS = (IDENTITY, "weights")
# After these the same command may well succeed.
NO_REFUSAL = (CheckpointError, JournalError, ProcessError)

_logger = logging.getLogger(__name__)


class Journal:
    """The steps of a run that are done; see above.

    Args:
        folder: where they are.
        processes: who share the run; the first one writes.
        work: what puts the stage in place; of the first process.
    """

    def __init__(self, folder: Path, processes: Processes = SINGLE_PROCESS, work: WorkFolder | None = None) -> None:
        self.folder = folder
        self.processes = processes
        self.work = work

    def has(self, step: str) -> bool:
        """Whether a step is done; for all processes what the first one finds."""
        return self.processes.broadcast(self._path(step, "json").is_file())

    def has_alone(self, step: str) -> bool:
        """The same for this process alone."""
        return self._path(step, "json").is_file()

    def read(self, step: str) -> dict[str, Any]:
        """What a step left.

        Raises:
            CheckpointError: its file is damaged.
        """
        return read_json(self._path(step, "json"))

    def finished(self, kind: Any, step: str) -> Any:
        """What :meth:`keep_finished` was given: a value, as ``kind``, and seconds by stage; None where the step is not done.

        Raises:
            CheckpointError: its file is damaged, or holds something else.
        """
        if not self.has(step):
            return None
        return read_as(tuple[kind, dict[str, float]], self.read(step).get("finished"), str(self._path(step, "json")))

    def keep_finished(
        self, step: str, value: Any, seconds: Mapping[str, float], tensors: Mapping[str, Writable] | None = None
    ) -> None:
        """:meth:`keep` a step as a value, of dataclasses and what JSON holds, and the seconds it took by stage.

        Args:
            step: its name.
            value: what it left.
            seconds: of each stage.
            tensors: written before; None for none.
        """
        self.keep(step, {"finished": (value, dict(seconds))}, tensors)

    def tensors(self, step: str) -> dict[str, StoredTensor]:
        """The tensors of a step, still in their file; errors as :meth:`read`."""
        return stored_tensors(self._path(step, "safetensors"))

    def keep(self, step: str, value: Mapping[str, Any], tensors: Mapping[str, Writable] | None = None) -> None:
        """Write down that a step is done, and wait for the others.

        Args:
            step: its name.
            value: what it left, as JSON holds it.
            tensors: written before ``value``; None for none.

        Raises:
            CheckpointError: the disk is full or broken; steps before this one are still there.
        """
        if self.processes.is_main_process:
            self.keep_alone(step, value, tensors)
        self.processes.barrier()

    def keep_alone(self, step: str, value: Mapping[str, Any], tensors: Mapping[str, Writable] | None = None) -> None:
        """The same by the first process, while others do something else; errors as :meth:`keep`.

        Args:
            step: its name.
            value: what it left, as JSON holds it.
            tensors: written before ``value``; None for none.
        """
        if tensors is not None:
            self.keep_tensors(step, tensors)
        with self._writing(step, "json") as path:
            write_json(path, value, indent=None, default=asdict)
        _logger.debug("%s is kept in %s", step, self.folder)

    def keep_tensors(self, step: str, tensors: Mapping[str, Writable]) -> None:
        """Write tensors of a step that is not done yet; errors as :meth:`keep`."""
        if self.processes.is_main_process:
            with self._writing(step, "safetensors") as path:
                write_tensors(path, tensors)

    def forget_tensors(self, step: str) -> None:
        """Remove tensors that nothing will need again."""
        if self.processes.is_main_process:
            self._path(step, "safetensors").unlink(missing_ok=True)

    def tensor_steps(self, prefix: str) -> list[str]:
        """Steps of this ``prefix`` that tensors were written of."""
        return sorted(path.stem for path in self.folder.glob(f"{prefix}*.safetensors"))

    def has_layers(self) -> bool:
        """Whether there is work that would be lost: a finished layer."""
        return _has_layers(self.folder)

    def forget(self, step: str) -> None:
        """A step is not done any more."""
        if self.processes.is_main_process:
            self._path(step, "json").unlink(missing_ok=True)

    def begin_anew(self) -> None:
        """Forget all steps; what the run depends on stays."""
        if self.processes.is_main_process:
            _begin(self, self.read(IDENTITY))
        self.processes.barrier()

    def _path(self, step: str, suffix: str) -> Path:
        return self.folder / f"{step}.{suffix}"

    @contextmanager
    def _writing(self, step: str, suffix: str) -> Iterator[Path]:
        path = self._path(step, suffix)
        try:
            with replacing(path) as draft:
                yield draft
        except OSError as error:
            raise CheckpointError(
                f"cannot keep {step.replace('-', ' ')} in {path.parent}: {reason(error, path)}; what was finished before is "
                "kept: mend that and run the same command again"
            ) from error


@contextmanager
def open_journal(out: Path, *, restart: bool = False, processes: Processes = SINGLE_PROCESS) -> Iterator[Journal]:
    """The journal of the run that writes ``out``; no other process can open it meanwhile.

    What was not begun in earnest (no step done) leaves nothing behind, and neither does a run that was refused before its first
    layer was finished.

    Args:
        out: the folder that the run will write; the journal is beside it.
        restart: throw away what an unfinished run has done.
        processes: who do the run together; the first one writes.

    Raises:
        JournalError: another process is at work on ``out``.
        CheckpointError: the folder cannot be made.
    """
    if not processes.is_main_process:
        yield Journal(work_path(out), processes)
        return
    with work_folder(out) as work:
        try:
            if restart or _is_lost(work):
                clear(work.path)
            shutil.rmtree(work.path / "hidden", ignore_errors=True)
            yield Journal(work.path, processes, work)
        except LoRAPError as error:
            if not isinstance(error, NO_REFUSAL) and not _has_layers(work.path):
                clear(work.path)
            raise
        finally:
            if not any(path.suffix == ".json" and path.stem not in PREPARATIONS for path in work.path.glob("*")):
                clear(work.path)


def check_identity(journal: Journal, identity: Mapping[str, Any], *, threads: int) -> None:
    """Begin a run that depends on ``identity``, or go on with one that depends on the same.

    One that has not finished a layer yet holds up nobody: what it has prepared is thrown away. Another number of
    ``threads`` changes the last digits of sums, and so gives a warning, not a refusal.

    Args:
        journal: of the run, in the first process.
        identity: what the run depends on, from :func:`lorap.compression.runs.fingerprints.identity_of`.
        threads: of torch.

    Raises:
        JournalError: an unfinished run depends on something else, which is named.
    """
    if not (journal.folder / f"{IDENTITY}.json").is_file():
        _begin(journal, {**identity, THREADS: threads})
        return
    begun = journal.read(IDENTITY)
    begun_with = begun.pop(THREADS, threads)
    changes = differences(begun, identity)
    if changes and not journal.has_layers():
        _logger.warning(
            "an earlier run to this output had other options and no finished layer; what it had prepared is thrown away"
        )
        _begin(journal, {**identity, THREADS: threads})
    elif changes:
        raise JournalError(
            f"an unfinished run with this output is another one: {'; '.join(changes)}. Run its own command again to finish it, "
            "choose another output, or pass --restart to throw away what it has done"
        )
    elif begun_with != threads:
        _logger.warning(
            "begun with %s threads and going on with %s: as good, but not the bytes of a run with one number of threads "
            "(OMP_NUM_THREADS=%s gives those)",
            begun_with,
            threads,
            begun_with,
        )


def _begin(journal: Journal, identity: Mapping[str, Any]) -> None:
    clear(journal.folder)
    journal.keep_alone(IDENTITY, identity)


def _has_layers(folder: Path) -> bool:
    return any(folder.glob("layer-*.json"))


def is_complete(out: Path) -> bool:
    """Whether an interrupted run has done everything but put the folder in place."""
    return (work_path(out) / f"{COMPLETE}.json").is_file()


def finish(journal: Journal) -> None:
    """The stage becomes the output, and the journal goes. It may be interrupted anywhere and called again.

    Raises:
        CheckpointError: the output cannot be replaced.
    """
    folder, work = journal.folder, journal.work
    assert work is not None
    try:
        work.put_in_place(folder / STAGE)
        clear(folder, placed=True)
    except OSError as error:
        raise CheckpointError(
            f"could not put {work.out} in place: {reason(error, work.out)}; it is whole in {folder / STAGE}: mend that "
            "and run the same command again"
        ) from error


def clear(folder: Path, *, placed: bool = False) -> None:
    """Everything of a run goes. What says that it is complete goes first, but last where the output is in its place."""
    complete = folder / f"{COMPLETE}.json"
    if not placed:
        complete.unlink(missing_ok=True)
    last = [complete, *(folder / f"{step}.json" for step in PREPARATIONS)]
    for path in folder.iterdir():
        if path not in last and path.name not in NOT_OURS:
            remove(path)
    for path in last:
        path.unlink(missing_ok=True)


def _is_lost(work: WorkFolder) -> bool:
    """Whether a run was complete and somebody has removed what came out of it."""
    whole = (work.path / STAGE).is_dir() or work.out.is_dir()
    return (work.path / f"{COMPLETE}.json").is_file() and not whole
