"""Records of folders and of hub names, through the ``datasets`` package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorap.calibration.pieces import MAX_TEXT_BYTES
from lorap.calibration.places import Place
from lorap.calibration.records import Reading, read_records
from lorap.errors import CalibrationError, shown

# Seconds to wait for the hub before it counts as out of reach; `datasets` alone tries for half a minute or more.
REACH_SECONDS = 5.0
DEFAULT_SPLIT = "train"


def read_folder(place: Place) -> Reading:
    """A folder of data files, a copy of a data set's repository, or what ``save_to_disk`` wrote.

    Raises:
        CalibrationError: it is empty, ``datasets`` is missing or cannot read it, or its records hold no text.
    """
    if not any(place.path.iterdir()):
        raise CalibrationError(f"{place.path} is an empty folder")
    library = _library(f"{place.path} is a folder, and")
    if (place.path / "dataset_dict.json").is_file() or (place.path / "state.json").is_file():
        rows = _guarded(f"cannot read {place.path} as a saved data set", lambda: _saved(library, place))
    else:
        rows = _guarded(f"cannot read {place.path} as a data set", lambda: _loaded(library, str(place.path), place))
    return read_records(_numbered(rows, place.name), place.name, place.field)


def read_hub(name: str) -> Reading:
    """``NAME``, ``NAME:CONFIG``, ``NAME:CONFIG:SPLIT`` or ``NAME:CONFIG:SPLIT:FIELD``; of a large one the beginning.

    Raises:
        CalibrationError: ``datasets`` is missing, the hub is out of reach, there is no such data set, or it holds no text.
    """
    library = check_hub(name)
    path, config, split, field = [*name.split(":"), "", "", "", ""][:4]
    place = Place(Path(path), name, field, config, split)
    rows = _guarded(f"{name} is no file, and reading it as a data set failed", lambda: _loaded(library, path, place))
    return read_records(_first(_numbered(rows, name)), name, field)


def check_hub(name: str) -> Any:
    """The ``datasets`` package, where it has a copy of the data set or the hub answers; whether that has it is not asked.

    Raises:
        CalibrationError: it is not installed, or no hub can be reached, which takes REACH_SECONDS at most to find out.
    """
    library = _library(f"{name} is no file, and")
    copy = Path(library.config.HF_DATASETS_CACHE) / name.partition(":")[0].replace("/", "___")
    if not copy.is_dir() and (reason := _out_of_reach()):
        raise CalibrationError(
            f"{name} is no file or folder here, and no hub can be reached to look for a data set of that name ({reason}); give "
            "a file, or a folder that datasets.save_to_disk wrote"
        )
    return library


def _library(because: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{because} the package `datasets` is not installed to read it as a data set: pip install 'lorap[eval]'"
        ) from None
    return datasets


def _loaded(library: Any, path: str, place: Place) -> Any:
    return library.load_dataset(path, place.config or None, split=place.split or DEFAULT_SPLIT, streaming=True)


def _saved(library: Any, place: Place) -> Any:
    if place.config:
        raise CalibrationError(f"{place.name}: a saved data set has no configurations; write FOLDER::SPLIT:FIELD")
    found = library.load_from_disk(str(place.path))
    if not isinstance(found, dict):
        return found
    split = place.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in found else next(iter(found)) if len(found) == 1 else "")
    if split not in found:
        raise CalibrationError(f"{place.name} has the splits {', '.join(found)}; choose one with FOLDER::SPLIT")
    return found[split]


def _guarded(failed: str, action: Any) -> Any:
    try:
        return action()
    except CalibrationError:
        raise
    except Exception as error:  # the hub client, the network and the data set's reader each raise their own kinds
        raise CalibrationError(f"{failed}: {shown(error, 500)}") from error


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    rows, number = iter(rows), 0
    while True:
        row = _guarded(f"{name} cannot be read behind record {number:,}", lambda: next(rows, None))
        if row is None:
            return
        number += 1
        yield f"record {number:,}", row


def _first(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The beginning: a whole data set would have to come through the network."""
    length = 0
    for where, row in rows:
        yield where, row
        length += len(str(row))
        if length >= MAX_TEXT_BYTES:
            return


def _out_of_reach() -> str:
    """Why the hub cannot be asked; empty where it can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
    except Exception as error:  # whatever the client of this version raises
        return shown(error) or type(error).__name__
    return ""
