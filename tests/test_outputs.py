"""Output folders wherever people put them: links, mount points, folders that are not theirs to replace; killed at every step.

Proved here: one function puts folders in place; a link stays a link; a folder that cannot be renamed is filled; a half-placed
folder is no model; whatever kills a command, the next one finds the old folder or the new one, whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lorap
from lorap import outputs
from lorap.compression.runs.journal import COMPLETE, STAGE, finish, is_complete, open_journal
from lorap.errors import CheckpointError, JournalError
from lorap.files import hash_files
from lorap.outputs import check_output, staged_folder, work_folder, work_path

OLD = {"config.json": "old", "old.txt": "old", "sub/old.txt": "old", "z.txt": "old"}
NEW = {"config.json": "new", "a.txt": "new", "sub/new.txt": "new", "sub/deep/new.txt": "new", "z.txt": "new"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(out: Path, new: dict[str, str] = NEW, **options: Any) -> None:
    with staged_folder(out, **options) as stage:
        fill(stage, new)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"mount is not permitted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_nothing_else_puts_files_and_folders_in_place() -> None:
    package = Path(lorap.__file__).parent
    renames = re.compile(
        r"os\.(rename|renames|replace)\(|shutil\.move\(|\w\.rename\(|(path|partial|draft|stage)\.replace\("
    )
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if renames.search(path.read_text("utf-8"))
    }
    assert found == {"files.py", "outputs.py"}


# ----------------------------------------------------------------------------------------------------------------------
# Where an output can be


@pytest.mark.parametrize("kind", ["absolute", "relative", "chain", "dangling", "in a linked folder"])
def test_a_link_stays_and_what_it_leads_to_is_written(kind: str, tmp_path: Path) -> None:
    real, out = tmp_path / "elsewhere" / "real", tmp_path / "links" / "out"
    real.parent.mkdir()
    out.parent.mkdir()
    if kind == "in a linked folder":
        (out.parent / "there").symlink_to(real.parent)
        out = out.parent / "there" / "real"
    elif kind == "chain":
        (tmp_path / "links" / "next").symlink_to(real)
        out.symlink_to("next")
    else:
        out.symlink_to(Path("../elsewhere/real") if kind == "relative" else real)
    if kind != "dangling":
        fill(real, OLD)
        with pytest.raises(CheckpointError, match="is not empty"):
            check_output(out)
    write(out, overwrite=True)
    assert out.is_symlink() == (kind != "in a linked folder")
    assert not real.is_symlink()
    assert content(real) == NEW
    assert [path.name for path in real.parent.iterdir()] == ["real"]


def test_links_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match=r"output .*a is a link that leads back to itself"):
        check_output(tmp_path / "a")


def test_a_mount_point_and_a_link_to_one_are_filled(other_disk: Path, tmp_path: Path) -> None:
    (other_disk / "lost+found").mkdir(mode=0o700)
    assert work_path(other_disk) == other_disk / ".lorap"
    write(other_disk)
    assert os.path.ismount(other_disk)
    assert content(other_disk) == NEW
    (tmp_path / "link").symlink_to("disk")
    write(tmp_path / "link", OLD, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(other_disk) == OLD
    assert {path.name for path in other_disk.iterdir()} == {"config.json", "old.txt", "sub", "z.txt", "lost+found"}


def fails_for(out: Path, code: int) -> Callable[..., None]:
    """os.rename that cannot rename ``out``, nor across its border when the code is EXDEV."""
    rename = os.rename

    def renames(source: Any, target: Any) -> None:
        ends = [Path(source), Path(target)]
        inside = [out in end.parents for end in ends]
        if out in ends or (code == errno.EXDEV and inside[0] != inside[1]):
            raise OSError(code, os.strerror(code))
        rename(source, target)

    return renames


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES], ids=errno.errorcode.get)
def test_a_folder_that_turns_out_not_to_be_renamed_is_filled(code: int, tmp_path: Path, monkeypatch: Any) -> None:
    """As a folder of a container's image, which overlayfs does not rename, or one that a volume was mounted on meanwhile."""
    out = tmp_path / "out"
    fill(out, OLD)
    inode = out.stat().st_ino
    monkeypatch.setattr(os, "rename", fails_for(out, code))
    write(out, overwrite=True)
    assert content(out) == NEW
    assert out.stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def as_nobody(parent: Path, names: list[str]) -> list[str]:
    """What becomes of outputs there when a user writes who may do little."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for name in names:
                try:
                    write(parent / name, {"sub/new": ""}, overwrite=True)
                    found = " ".join(sorted(content(parent / name)))
                except CheckpointError as error:
                    found = str(error)
                os.write(writing, f"{found}\n".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read().splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_mine_in_a_folder_of_others(tmp_path: Path) -> None:
    for folder in [tmp_path, *(one for one in tmp_path.parents if "pytest-" in str(one))]:
        folder.chmod(0o755)
    parent = tmp_path / "parent"
    for name in ("mine", "sticky/theirs", "sticky/mine"):
        fill(parent / name, {"old": ""})
    (parent / "sticky").chmod(0o1777)
    (parent / "sticky/theirs").chmod(0o777)
    for name in ("mine", "sticky/mine"):
        os.chown(parent / name, 65534, 65534)
    assert as_nobody(parent, ["mine", "sticky/theirs", "sticky/mine", "new"]) == [
        "sub/new",
        "sub/new",
        "sub/new",
        f"no permission to write into {parent}; choose another output folder",
    ]
    assert (parent / "sticky/theirs").stat().st_uid == 0  # the folder is whose it was


@pytest.mark.parametrize("kind", ["private", "shared with a group", "current folder"])
def test_a_folder_that_is_there_stays_what_it_is(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    mode = {"private": 0o700, "shared with a group": 0o2775, "current folder": 0o755}[kind]
    out.chmod(mode)
    if kind == "current folder":
        monkeypatch.chdir(out)
    inode = out.stat().st_ino
    write(Path() if kind == "current folder" else out)
    assert content(out) == NEW
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert (out.stat().st_ino == inode) == (kind != "private")
    assert bool((out / "sub" / "deep").stat().st_mode & stat.S_ISGID) == (kind == "shared with a group")


@pytest.mark.parametrize(("umask", "folders", "files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_folders_inside_can_be_entered(umask: int, folders: int, files: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "out") as stage:
            fill(stage, NEW)
            for path in stage.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folders if path.is_dir() else files), path


def test_two_writers_of_one_output_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with work_folder(tmp_path / "out") as work:
        for name in ("out", "link"):
            for tries in (lambda out=name: check_output(tmp_path / out), lambda out=name: write(tmp_path / out)):
                with pytest.raises(JournalError, match=f"process {os.getpid()} is writing .*out already"):
                    tries()
        with work.staged() as stage:
            fill(stage, NEW)
    assert content(tmp_path / "out") == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


# ----------------------------------------------------------------------------------------------------------------------
# Killed


def killed(at: int, action: Callable[[], None]) -> bool:
    """Run it in a process that ends without a word before its ``at``-th change of a folder; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        try:
            for name in ("rename", "replace", "mkdir", "rmdir", "unlink"):
                setattr(os, name, before(getattr(os, name)))
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.fixture(params=["beside", "inside", "other disk"])
def way(request: Any, monkeypatch: Any) -> str:
    """How a folder comes to its place."""
    if request.param == "inside":
        monkeypatch.setattr(outputs, "_must_stay", Path.is_dir)
    return request.param


def prepare(out: Path, way: str, monkeypatch: Any) -> None:
    fill(out, OLD)
    if way == "other disk":
        monkeypatch.setattr(os, "rename", fails_for(out, errno.EXDEV))


def is_whole_or_no_model(out: Path) -> bool:
    visible = {name: text for name, text in content(out).items() if not name.startswith(".")} if out.exists() else {}
    return visible in (OLD, NEW) or "config.json" not in visible


def test_killed_anywhere_the_old_folder_or_the_new_is_there_and_the_same_command_ends_well(
    way: str, tmp_path: Path, monkeypatch: Any
) -> None:
    at, seen, stride = 0, set(), 5 if way == "other disk" else 1  # a copy takes many more
    while at := at + stride:
        out = tmp_path / str(at) / "out"
        prepare(out, way, monkeypatch)
        if not killed(at, partial(write, out, overwrite=True)):
            break
        assert is_whole_or_no_model(out), at
        if len(seen) % 2:  # what any other command would find
            with work_folder(out):
                assert content(out).items() >= OLD.items() or content(out).items() >= NEW.items(), at
        write(out, overwrite=True)
        assert content(out) == NEW, at
        assert [path.name for path in out.parent.iterdir()] == ["out"], at
        seen.add(at)
    assert len(seen) > 10
    assert content(out) == NEW


def test_a_run_killed_while_it_ends_is_ended_by_the_same_command(way: str, tmp_path: Path, monkeypatch: Any) -> None:
    def begin(out: Path) -> None:
        with open_journal(out) as journal:
            journal.keep("layer-00000", {})
            stage = work_path(out) / STAGE
            stage.mkdir()
            fill(stage, NEW)
            journal.keep_alone(COMPLETE, {})

    def end(out: Path) -> None:
        with open_journal(out) as journal:
            finish(journal)

    at, stride = 0, 5 if way == "other disk" else 1
    while at := at + stride:
        out = tmp_path / str(at) / "out"
        prepare(out, way, monkeypatch)
        begin(out)
        if not killed(at, partial(end, out)):
            break
        assert is_whole_or_no_model(out), at
        if is_complete(out):
            end(out)
        with work_folder(out):
            pass
        assert content(out) == NEW, at
        assert [path.name for path in out.parent.iterdir()] == ["out"], at
    assert at > 10


def test_an_output_that_was_removed_before_the_run_had_ended_is_not_taken_for_done(tmp_path: Path) -> None:
    with open_journal(tmp_path / "out") as journal:
        journal.keep_alone(COMPLETE, {})
    with open_journal(tmp_path / "out") as journal:
        assert not journal.has(COMPLETE)


def test_files_are_hashed_one_after_the_other(tmp_path):
    whole = os.urandom(2**24 + 7)  # more than is read at once
    for name, part in {"a": whole[:-3], "b": whole[-3:], "c": b""}.items():
        (tmp_path / name).write_bytes(part)
    assert hash_files(*(tmp_path / name for name in "acb")) == hashlib.sha256(whole).hexdigest()
    assert hash_files(tmp_path / "b", tmp_path / "a") != hashlib.sha256(whole).hexdigest()
    with pytest.raises(CheckpointError, match=re.escape(f"cannot read {tmp_path / 'd'}")):
        hash_files(tmp_path / "a", tmp_path / "d")
