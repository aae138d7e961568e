"""Plain values out of JSON as the dataclasses that a program wants, checked on the way."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union

from lorap.errors import CheckpointError, LoRAPError
from lorap.jsonio import named, shown

# Of whole numbers: nothing that is counted here comes near it, and floats can hold it.
LARGEST = 2**63
_SCALARS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


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
