"""JSON from a folder that somebody else wrote: parsed without surprises, and shown without them.

Python's parser keeps the last of two equal keys, takes NaN for a number and UTF-16 for text, and leaves halves of surrogate pairs
in strings, on which the first ``print`` fails. None of that is ever meant in a model folder.

:func:`read_as` turns plain values into the dataclasses that a program wants, checked on the way.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Container
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union

from lorap.errors import CheckpointError, LoRAPError

# Config files have kilobytes; the index of a model with 90,000 tensors has 9 MB.
MAX_BYTES = 100_000_000
# transformers copies and prints configs recursively; real ones are 4 deep.
MAX_DEPTH = 32
INFINITY = ("Infinity", "-Infinity")
# Of whole numbers: nothing that is counted here comes near it, and floats can hold it.
LARGEST = 2**63
_SCALARS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


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


def read_as(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``, with lists as tuples and objects as dataclasses where ``kind`` says so.

    Args:
        kind: a dataclass, a scalar type, or ``tuple``, ``list``, ``dict``, ``Union`` or ``Any`` of such. A float may be whole.
        value: of what ``json.loads`` returns.
        where: what to call the value in messages.

    Raises:
        CheckpointError: the value does not fit; a field is missing that has no default, or is unknown.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(parts, value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {name: read_as(parts[1], entry, f"{where}.{named(name)}") for name, entry in value.items()}
    if origin in (tuple, list):
        _expect(isinstance(value, list), "a list", value, where)
        if origin is list or parts[-1] is Ellipsis:
            parts = (parts[0],) * len(value)
        _expect(len(value) == len(parts), f"a list of {len(parts)}", value, where)
        listed = enumerate(zip(parts, value, strict=True))
        return origin(read_as(part, entry, f"{where}[{index}]") for index, (part, entry) in listed)
    _expect(_is_scalar(kind, value), _SCALARS.get(kind, "null"), value, where)
    return value


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


def _is_scalar(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, int):
        return kind in (int, float) and abs(value) < LARGEST
    return isinstance(value, kind)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first of ``kinds`` that fits; if none does, what the last says."""
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType) if value is not None else kinds
    for kind in kinds[:-1]:
        try:
            return read_as(kind, value, where)
        except CheckpointError:
            continue
    return read_as(kinds[-1], value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    known = {field.name: field for field in fields(kind)}
    missing = [
        name
        for name, field in known.items()
        if name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    unknown = sorted(value.keys() - known.keys())
    for names, what in ((missing, "has no entry"), (unknown, "has an unknown entry")):
        if names:
            raise CheckpointError(f"{where} {what} {named(names[0])}; another version of lorap may have written it")
    hints = typing.get_type_hints(kind)
    entries = {name: read_as(hints[name], entry, f"{where}.{name}") for name, entry in value.items()}
    try:
        return kind(**entries)
    except LoRAPError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _expect(condition: bool, what: str, value: Any, where: str) -> None:
    if not condition:
        raise CheckpointError(f"{where} should be {what} and is {shown(value)}")
