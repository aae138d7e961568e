"""A record becomes a text or a chat, and a chat becomes tokens through the tokenizer's chat template.

Which fields mean what follows the people who publish such files: ``messages`` with role and content (OpenAI, TRL),
``conversations`` with from and value (ShareGPT), ``prompt`` with ``completion`` or ``chosen`` (TRL), ``instruction``, ``input``,
``output`` (Alpaca; Dolly calls them instruction, context, response). The first record decides; all others must be like it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Union

from lorap.errors import CalibrationError, shown

CHAT_FIELDS = ("messages", "conversations", "conversation")
# Sets of fields that make a text or a chat, in the order in which they are looked for.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in CHAT_FIELDS),
    ("text",),
    ("prompt", "completion"),
    ("prompt", "chosen"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("content",),
)
# What speakers are called, and what templates call them.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", "function_response": "tool"}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")


@dataclass(frozen=True)
class Chat:
    """One conversation: messages as chat templates take them, and the tools that could be called."""

    messages: tuple[dict[str, Any], ...]
    tools: Any = None
    where: str = ""


Document = Union[str, Chat]


def size_of(document: Document) -> int:
    """Roughly its characters."""
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message.get("content", ""))) + 16 for message in document.messages)


def layout_of(record: Any, where: str, field: str = "") -> tuple[str, ...]:
    """The fields that hold the text of a record, and of all records after it.

    Args:
        record: the first one.
        where: it is, for messages.
        field: the only one to read; empty for those that are known.

    Returns:
        Names of fields; none where the record is a text itself.

    Raises:
        CalibrationError: there is no field that is known, or none of the name that was asked for.
    """
    if isinstance(record, str):
        if field:
            raise CalibrationError(f"{where} is a text without fields, so it has no {field}")
        return ()
    if not isinstance(record, Mapping):
        raise CalibrationError(
            f'{where} has no text field: it is {_kind(record)}; each record must look like {{"text": "..."}}'
        )
    if field:
        if field not in record:
            raise CalibrationError(f"{where} has no field {field}, only {_names(record)}")
        return (field,)
    for layout in LAYOUTS:
        if all(name in record for name in layout):
            return layout
    raise CalibrationError(
        f"{where} has no text field: it has {_names(record)}; name one of them, as in FILE:FIELD, or call it text or messages"
    )


def document_of(record: Any, layout: Sequence[str], where: str) -> Document | None:
    """The text or chat of a record; None where it is blank.

    Args:
        record: one like the first.
        layout: of the first record, from :func:`layout_of`.
        where: it is, for messages.

    Raises:
        CalibrationError: a field is missing, or holds something else.
    """
    if isinstance(record, str) and not layout:
        return record if record.strip() else None
    if not isinstance(record, Mapping) or not layout:
        raise CalibrationError(f"{where} has no text field: it is {_kind(record)}, not a record like the first one")
    missing = [name for name in layout if name not in record]
    if missing:
        raise CalibrationError(
            f"{where} has no {missing[0]} field, which the first record has; it has {_names(record)}"
        )
    if layout[0] == "instruction":
        return _instruction(record, layout[1], where)
    values = [_value(record[name], f"{where}, field {name}") for name in layout]
    if any(value is None for value in values):
        return None
    if all(isinstance(value, str) for value in values):
        text = "".join(value for value in values if isinstance(value, str))
        return text if text.strip() else None
    if any(isinstance(value, str) for value in values):
        raise CalibrationError(f"{where}: {' and '.join(layout)} must both be texts or both be lists of messages")
    messages = [message for value in values if not isinstance(value, str) for message in value or ()]
    return _chat(messages, record, where)


def _value(value: Any, where: str) -> str | list[dict[str, Any]] | None:
    """A text, or messages; None for null."""
    if isinstance(value, str) and where.endswith(CHAT_FIELDS) and value.lstrip().startswith("["):
        try:  # tables have no lists, so that messages are written as JSON there
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise CalibrationError(f"{where} is neither a list of messages nor JSON of one") from None
    if value is None:
        return None
    if isinstance(value, str):
        if where.endswith(CHAT_FIELDS):
            raise CalibrationError(f"{where} is a text, not a list of messages")
        return _clean(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]
    raise CalibrationError(f"{where} is {_kind(value)}, not a text")


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which JSON can hold and no tokenizer reads, become question marks."""
    return text.encode("utf-8", "replace").decode()


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise CalibrationError(f"{where} is {_kind(message)}, not a message with role and content")
    shared = "from" in message and "role" not in message
    role, content = message.get("from" if shared else "role"), message.get("value" if shared else "content")
    if not isinstance(role, str):
        raise CalibrationError(f"{where} has no role; it has {_names(message)}")
    role = ROLES.get(role.lower(), role.lower() if role.lower() in KNOWN_ROLES else role)
    if role not in KNOWN_ROLES:
        raise CalibrationError(
            f"{where} has the role {shown(role, 40)!r}; known are {', '.join((*KNOWN_ROLES, *ROLES))}"
        )
    # Tables give every message every key, with null where it had none; templates would print that.
    more = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
    calls = more.get("tool_calls")
    if calls:
        more["tool_calls"] = [_call(call, where) for call in calls] if isinstance(calls, Sequence) else calls
    elif content is None:
        raise CalibrationError(f"{where} has no content; it has {_names(message)}")
    return more | {"role": role, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """A text, or the texts of its parts, one after the other, as templates write them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return _clean(content)
    if not isinstance(content, Sequence):
        raise CalibrationError(f"{where} has {_kind(content)} as content, not a text")
    parts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise CalibrationError(f"{where} has a part of type {shown(kind, 40)}; only parts of type text can be read")
        parts.append(_clean(text))
    return "".join(parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI writes them as a text, templates would quote that once more."""
    if not isinstance(call, Mapping):
        raise CalibrationError(f"{where} has {_kind(call)} among its tool_calls")
    found = {key: value for key, value in call.items() if value is not None}
    if isinstance(found.get("function"), Mapping):
        found["function"] = _call(found["function"], where)
    if isinstance(found.get("arguments"), str):
        with suppress(ValueError, RecursionError):  # a text after all
            found["arguments"] = json.loads(found["arguments"])
    return found


def _instruction(record: Mapping[str, Any], answer: str, where: str) -> Document | None:
    """Alpaca: the instruction and its input are what the user says, the output is what the assistant says."""
    texts = {}
    for name in ("instruction", "input", "context", answer):
        value = record.get(name)
        if not isinstance(value, str) and value is not None:
            raise CalibrationError(f"{where}, field {name} is {_kind(value)}, not a text")
        texts[name] = _clean(value or "")
    asked = "\n".join(text for text in (texts["instruction"], texts["input"] or texts["context"]) if text.strip())
    if not asked or not texts[answer].strip():
        return None
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": texts[answer]}]
    return _chat(messages, record, where)


def _chat(messages: list[dict[str, Any]], record: Mapping[str, Any], where: str) -> Chat | None:
    if not messages:
        return None
    system, tools = record.get("system"), record.get("tools")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _clean(system)}, *messages]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise CalibrationError(f"{where}, field tools is a text that is no JSON") from None
    return Chat(tuple(messages), _without_nulls(tools) or None, where)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(member) for member in value]
    return value


def _names(record: Mapping[str, Any]) -> str:
    names = [shown(name, 40) for name in record]
    return (
        ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        if names
        else "no field at all"
    )


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "a text",
    }
    return "null" if value is None else kinds.get(type(value), f"of type {type(value).__name__}")
