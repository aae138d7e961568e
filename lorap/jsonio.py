"""JSON from a folder that somebody else wrote: parsed without surprises, and shown without them.

Python's parser keeps the last of two equal keys, takes NaN for a number and UTF-16 for text, and leaves halves of surrogate pairs
in strings, on which the first ``print`` fails. None of that is ever meant in a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

from lorap.errors import CheckpointError

# Config files have kilobytes; the index of a model with 90,000 tensors has 9 MB.
MAX_BYTES = 100_000_000
# transformers copies and prints configs recursively; real ones are 4 deep.
MAX_DEPTH = 32
INFINITY = ("Infinity", "-Infinity")


def parse_object(data: bytes, constants: Container[str] = ()) -> dict[str, Any]:
    """A JSON object in UTF-8; ``constants`` are those of NaN, Infinity and -Infinity that may stand in it.

    Raises:
        ValueError: it is none, an object has a key twice, a constant is not allowed, or it is nested too deeply.
    """

    def constant(name: str) -> float:
        if name not in constants:
            raise ValueError(f"it contains {name}")
        return float(name)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    _check_values(value)
    return value


def read_json(path: Path, *, constants: Container[str] = ("NaN", *INFINITY)) -> dict[str, Any]:
    """A JSON object from a model folder. lorap's own reports may hold NaN; ``constants`` as in :func:`parse_object`.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object as above.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        return parse_object(path.read_bytes(), constants)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def shown(value: object) -> str:
    """A value from a file, for a message: printable and short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits, lists in lists
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:80]}..."


def named(name: object) -> str:
    """A name from a file, for a message: as it is where that is safe."""
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200
    return str(name) if plain else shown(name)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"it has the key {named(key)} twice")
            seen.add(key)
    return value


def _check_values(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode("utf-8")  # raises a ValueError at half a surrogate pair
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level = below
