"""Chats get exactly the ids of the tokenizer's chat template, whoever wrote the file; what is none is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from drawing import VOCAB, refusal, write
from transformers import PreTrainedTokenizerFast

from lorap import CalibrationError
from lorap.calibration import read_source
from lorap.calibration.sources import read_tokens
from lorap.calibration.windows import consecutive_windows

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
)
FIRST = [
    {"role": "system", "content": "Answer in verse."},
    {"role": "user", "content": "What is a rank?\n\nBriefly, é."},
    {"role": "assistant", "content": "A number\nof directions <eos> here."},
]
SECOND = [{"role": "user", "content": "And a nail?"}, {"role": "assistant", "content": "A pin of steel."}]
CHATS = [FIRST, SECOND]


@pytest.fixture(scope="module")
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template that writes bos and eos, and that puts a bos before every text of its own."""
    found = copy.deepcopy(tokenizer)
    found.bos_token = "<pad>"
    from tokenizers.processors import TemplateProcessing

    found.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    found.chat_template = TEMPLATE
    assert found("a")["input_ids"][0] == found.bos_token_id == 1
    return found


def expected(tokenizer: Any, chats: list[list[dict[str, Any]]], **options: Any) -> list[int]:
    each = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options) for chat in chats]
    return [token for one in each for token in one["input_ids"]]


def ids_of(path: Path | str, tokenizer: Any) -> list[int]:
    ids, mask = read_tokens(path, tokenizer, vocab_size=VOCAB)
    assert mask is None
    return ids.tolist()


def lines(path: Path, records: list[Any]) -> Path:
    return write(path, "\n".join(json.dumps(record) for record in records))


def sharegpt(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in chat]


def parts(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def split(text: str) -> list[Any]:
        return [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]

    return [message | {"content": split(message["content"])} for message in chat]


RECORDS = {
    "messages": lambda chat: {"id": 1, "messages": chat},
    "messages-before-text": lambda chat: {"text": "something else", "messages": chat},
    "conversations": lambda chat: {"conversations": sharegpt(chat), "source": "x"},
    "conversation": lambda chat: {"conversation": chat},
    "parts": lambda chat: {"messages": parts(chat)},
    "prompt-completion": lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]},
    "prompt-chosen": lambda chat: {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": chat[-1:]},
    "null-keys": lambda chat: {"messages": [m | {"name": None, "tool_calls": None} for m in chat], "tools": None},
    "capitals": lambda chat: {"messages": [m | {"role": m["role"].capitalize()} for m in chat]},
}


@pytest.mark.parametrize("form", RECORDS)
def test_chats_get_the_ids_of_the_template(form: str, tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "chats.jsonl", [RECORDS[form](chat) for chat in CHATS])
    ids = ids_of(path, chatty)
    assert ids == expected(chatty, CHATS)
    assert ids[0] == chatty.bos_token_id != ids[1]  # one bos, by the template alone
    assert ids.count(chatty.bos_token_id) == 2
    assert ids.count(chatty.eos_token_id) == 6  # five ends of turns, and one that a speaker wrote


def test_windows_run_through_the_chats(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    windows = consecutive_windows(path, chatty, seq_len=7, max_tokens=None, vocab_size=VOCAB)
    ids = expected(chatty, CHATS)
    assert windows.input_ids.flatten().tolist() == ids[: len(ids) // 7 * 7]
    assert windows.name == "chats.jsonl"


def test_a_list_of_bare_chats_and_another_field(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "chats.json", json.dumps([{"talk": chat, "text": "no"} for chat in CHATS], indent=1))
    assert ids_of(f"{path}:talk", chatty) == expected(chatty, CHATS)
    assert read_source(f"{path}:text") == "no\n\nno"


@pytest.mark.parametrize(
    ("record", "chat"),
    [
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."},
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Add."},
                {"role": "assistant", "content": "3"},
            ],
        ),
        (
            {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "x"},
            [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}],
        ),
    ],
    ids=["alpaca", "alpaca-system", "dolly"],
)
def test_instructions(record: dict, chat: list, tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    assert ids_of(lines(tmp_path / "a.jsonl", [record]), chatty) == expected(chatty, [chat])


def test_prompts_and_completions_that_are_texts_are_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "a.jsonl", [{"prompt": "One, ", "completion": "two."}, {"prompt": "3", "completion": " 4"}])
    assert ids_of(path, tokenizer) == tokenizer("One, two.\n\n3 4")["input_ids"]


def test_tools_and_their_calls(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
    ]
    written = copy.deepcopy(chat)
    written[1]["content"] = None
    written[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 1}'  # as OpenAI writes it
    first = lines(tmp_path / "a.jsonl", [{"messages": written, "tools": tools}, {"messages": SECOND}])
    ids = expected(chatty, [chat], tools=tools) + expected(chatty, [SECOND])
    assert ids_of(first, chatty) == ids
    second = lines(tmp_path / "b.jsonl", [{"messages": written, "tools": json.dumps(tools)}, {"messages": SECOND}])
    assert ids_of(second, chatty) == ids


def test_a_tokenizer_with_several_templates(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    several = copy.deepcopy(chatty)
    several.chat_template = {"default": TEMPLATE, "rag": "none"}
    assert ids_of(path, several) == expected(chatty, CHATS)
    several.chat_template = {"rag": "none"}
    message = refusal(path, several)
    assert "chats.jsonl line 1" in message


def test_chats_as_text(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    assert read_source(path, chatty) == "".join(chatty.apply_chat_template(chat, tokenize=False) for chat in CHATS)
    with pytest.raises(CalibrationError, match=r"chats\.jsonl holds chats.*tokenizer"):
        read_source(path)


def test_a_tokenizer_without_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    message = refusal(path, tokenizer)
    assert "chats.jsonl holds chats" in message
    assert "no chat template" in message
    assert "chat_template.jinja" in message


def test_a_chat_that_the_template_refuses(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    strict = copy.deepcopy(chatty)
    strict.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Start with user!') }}{% endif %}x"
    path = lines(tmp_path / "chats.jsonl", [{"messages": SECOND}, {"messages": SECOND}, {"messages": FIRST}])
    message = refusal(path, strict)
    assert "chats.jsonl line 3" in message
    assert "Start with user!" in message


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": "hello"}, ["field messages", "text"]),
        ({"messages": 5}, ["field messages", "number"]),
        ({"messages": ["hello"]}, ["message 1", "text"]),
        ({"messages": [{"role": "user"}]}, ["message 1", "no content", "role"]),
        ({"messages": [{"content": "a"}]}, ["message 1", "no role", "content"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["message 1", "number"]),
        ({"messages": [{"role": "poet", "content": "a"}]}, ["message 1", "'poet'", "user"]),
        ({"messages": [SECOND[0], {"role": "user", "content": [{"type": "image_url"}]}]}, ["message 2", "image_url"]),
        ({"conversations": [{"from": "human"}]}, ["message 1", "no content"]),
        ({"prompt": "a", "completion": SECOND}, ["prompt and completion"]),
        ({"instruction": "a", "output": 5}, ["field output", "number"]),
        ({"instruction": "a", "input": ["b"], "output": "c"}, ["field input", "list"]),
        ({"messages": SECOND, "tools": "{"}, ["field tools"]),
        ({"question": "a", "answer": "b"}, ["question, answer", "FILE:FIELD"]),
        ({"messages": []}, ["no text", "1 of them blank"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refuses_bad_chats(record: dict, words: list[str], tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    message = refusal(lines(tmp_path / "bad.jsonl", [record]), chatty)
    for word in ["bad.jsonl", "line 1" if "blank" not in words[-1] else "1 records", *words]:
        assert word in message


def test_a_record_unlike_the_first_is_named(tmp_path: Path, chatty: PreTrainedTokenizerFast) -> None:
    message = refusal(lines(tmp_path / "bad.jsonl", [{"messages": SECOND}, {"text": "a"}]), chatty)
    assert "bad.jsonl line 2 has no messages field" in message
    assert "text" in message
