"""Documents become token ids: texts as one stream with blank lines between them, chats one by one through the chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lorap.calibration.chats import Chat, Document
from lorap.errors import CalibrationError, shown

# Chats that are rendered and tokenized in one call.
BATCH = 64


def encode(documents: Sequence[Document], tokenizer: Any, name: str) -> list[int]:
    """Token ids of documents that are all texts, or all chats.

    A chat gets exactly the ids of ``tokenizer.apply_chat_template``: the special tokens that the template writes become their
    ids, and the tokenizer adds none of its own.

    Args:
        documents: of one source.
        tokenizer: of the model.
        name: of the source, for messages.

    Raises:
        CalibrationError: the tokenizer has no chat template, or the template refuses a chat.
    """
    if not any(isinstance(document, Chat) for document in documents):
        ids: list[int] = tokenizer(joined_texts(documents), verbose=False)["input_ids"]
        return ids
    check_template(tokenizer, name)
    found = (_templated(tokenizer, chats, tokenize=True) for chats in _batches(documents))
    return [token for batch in found for chat in batch for token in chat]


def render(documents: Sequence[Document], tokenizer: Any, name: str) -> str:
    """The same as text.

    Args:
        documents: texts and chats.
        tokenizer: whose chat template writes chats; not needed for texts.
        name: of the source, for messages.

    Raises:
        CalibrationError: as :func:`encode`; there are chats and no tokenizer.
    """
    if not any(isinstance(document, Chat) for document in documents):
        return joined_texts(documents)
    check_template(tokenizer, name)
    return "".join(text for chats in _batches(documents) for text in _templated(tokenizer, chats, tokenize=False))


def joined_texts(documents: Sequence[Document]) -> str:
    """Texts with blank lines between them."""
    return "\n\n".join(document for document in documents if isinstance(document, str))


def check_template(tokenizer: Any, name: str) -> None:
    """A tokenizer that can read chats is there.

    Raises:
        CalibrationError: it has no chat template, or there is no tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError(
            f"{name} holds chats, which only a tokenizer with a chat template can turn into tokens; give one"
        )
    if not getattr(tokenizer, "chat_template", "its own"):
        raise CalibrationError(
            f"{name} holds chats, and this model's tokenizer has no chat template to write them with; put the "
            "chat_template.jinja of a model like it beside the tokenizer, or write the chats as texts (a field `text`)"
        )


def _batches(documents: Sequence[Document]) -> Iterator[list[Chat]]:
    """Chats in order, those with the same tools together."""
    chats = [document for document in documents if isinstance(document, Chat)]
    for _, group in groupby(chats, key=lambda chat: repr(chat.tools)):
        same = list(group)
        yield from (same[first : first + BATCH] for first in range(0, len(same), BATCH))


def _templated(tokenizer: Any, chats: Sequence[Chat], *, tokenize: bool) -> list[Any]:
    """Ids or text of each chat.

    Raises:
        CalibrationError: naming the chat that the template refuses.
    """
    options: dict[str, Any] = {"tools": chats[0].tools, "tokenize": tokenize}
    if tokenize:
        options["return_dict"] = True
    try:
        found = tokenizer.apply_chat_template([list(chat.messages) for chat in chats], **options)
    except Exception as error:  # a template is a program of its own: whatever it raises says that it refuses the chat
        if len(chats) > 1:
            return [result for chat in chats for result in _templated(tokenizer, [chat], tokenize=tokenize)]
        reason = shown(error) or type(error).__name__
        raise CalibrationError(f"{chats[0].where}: the model's chat template refuses this chat: {reason}") from error
    return list(found["input_ids"] if tokenize else found)
