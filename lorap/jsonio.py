"""JSON from a folder that somebody else wrote: parsed without surprises, and shown without them.

Python's parser keeps the last of two equal keys, takes NaN for a number and UTF-16 for text, and leaves halves of surrogate pairs
in strings, on which the first ``print`` fails. None of that is ever meant in a model folder.

:func:`read_as` turns plain values into the dataclasses that a program wants, and :func:`check_fields` looks at those
that a program made. Both are pydantic's work, which is imported when something is read: that takes a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from annotated_types import Interval

from lorap.errors import CheckpointError, ConfigError, LoRAPError

if TYPE_CHECKING:
    from pydantic import ValidationError

# Config files have kilobytes; the index of a model with 90,000 tensors has 9 MB.
MAX_BYTES = 100_000_000
# transformers copies and prints configs recursively; real ones are 4 deep.
MAX_DEPTH = 32
INFINITY = ("Infinity", "-Infinity")
# How pydantic begins.
SHOULD = "Input should be "
# Nothing that is counted here comes near the end, and floats can hold it.
Count = Annotated[int, Interval(ge=0, lt=2**63)]
Size = Annotated[int, Interval(ge=1, lt=2**63)]


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


def write_json(path: Path, value: Any, **options: Any) -> None:
    """A JSON file, indented by 2 unless ``options``, which are those of ``json.dumps``, say otherwise.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(json.dumps(value, **{"indent": 2, **options}) + "\n", "utf-8")


def read_as(kind: Any, value: Any, where: str, error: type[LoRAPError] = CheckpointError) -> Any:
    """``value`` as ``kind``, with lists as tuples and objects as dataclasses where ``kind`` says so.

    Types are strict, but a float may be whole. A dataclass has no fields but its own.

    Args:
        kind: what pydantic knows: dataclasses, tuples, lists, dicts and unions of such and of scalars, annotated with limits.
        value: of what ``json.loads`` returns.
        where: what to call the value in messages.
        error: what is raised.

    Raises:
        LoRAPError: the value does not fit; the message says what does not, what it should be and what it is.
    """
    from pydantic import ValidationError

    try:
        # As JSON: of Python's own objects strict types would want tuples and dataclasses already.
        return _reader(kind).validate_json(json.dumps([value]))[0]
    except ValidationError as found:
        raise error(_told(found, value, where)) from None
    except (TypeError, ValueError, RecursionError) as found:
        raise error(f"{where} is no JSON: {found}") from None


def check_fields(instance: Any) -> None:
    """Refuse a dataclass that was made with other values than the annotations of its fields allow.

    Raises:
        ConfigError: the message says which field, what it should be and what it is.
    """
    kind: Any = type(instance)
    for name, value in vars(instance).items():
        read_as(_hints(kind)[name], value, name, ConfigError)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _reader(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # In a list, because only there the config is handed down to dataclasses.
    return TypeAdapter(list[kind], config=ConfigDict(strict=True, extra="forbid"))


def _told(error: ValidationError, value: Any, where: str) -> str:
    """One sentence on the first thing that pydantic found; where a value may be of several types, on all of them."""
    found = [(_path(value, each["loc"][1:], where), each) for each in error.errors(include_url=False)]
    path, first = found[0]
    other = "another version of lorap may have written it"
    if first["type"] == "missing":
        return f"{path} has no entry {named(first['loc'][-1])}; {other}"
    if first["type"] == "unexpected_keyword_argument":
        return f"{path} is an unknown entry; {other}"
    if first["type"] == "value_error":
        return f"{path}: {first['ctx']['error']}"
    if not first["msg"].startswith(SHOULD):
        return f"{path}: {first['msg']}"
    wanted = [each["msg"].removeprefix(SHOULD) for place, each in found if place == path]
    return f"{path} should be {' or '.join(dict.fromkeys(wanted))} and is {shown(first['input'])}"


def _path(value: Any, loc: Sequence[int | str], where: str) -> str:
    """Where in ``value`` an error is, as Python would write it. The name of a type among several is not part of a path."""
    for part in loc:
        try:
            value = value[part]
        except (LookupError, TypeError):
            break
        where += f"[{part}]" if isinstance(part, int) else f".{named(part)}"
    return where


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


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two JSON objects, each as ``NAME was X and is Y``; what is in an object has the names of both."""
    old, new = _flat(before), _flat(json.loads(json.dumps(now)))
    return [
        f"{name} was {_short(old.get(name))} and is {_short(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name} ") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def _short(value: Any) -> str:
    """Hashes by their beginning."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}..."


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
