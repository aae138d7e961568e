"""The tokenizer goes into a GGUF file: tokens with their types, merges or scores, and llama.cpp's name for how text is split."""

from __future__ import annotations

import json
import re
from typing import Any

from lorap.checkpoint.gguf.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT
from lorap.errors import ArchitectureError

# How a byte-level tokenizer splits text before merging, and llama.cpp's name for it.
PRE_TOKENIZERS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2", TEKKEN_SPLIT: "tekken"}
# Those with which llama.cpp takes a word that is a token as it stands, without merging.
WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
# Normalizers that the names stand for, or that change no text which is normalized already.
NORMALIZERS = ("NFC", "Prepend", "Replace")


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Add a tokenizer to a file that is being written.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: a fast one.
        vocab_size: rows of the embedding; those without a token become unused tokens.

    Raises:
        ArchitectureError: there is none, or it is of a kind that llama.cpp has no name for.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ArchitectureError("GGUF holds the tokenizer as well, and this model has none that can be read")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ArchitectureError(
            f"only BPE tokenizers are written to GGUF, and this one is {state['model']['type']}; use --format stock"
        )
    _check_normalizer(state.get("normalizer"))
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in state["model"]["merges"]]
    _check_merging(state["model"], merges)
    tokens, types = _vocabulary(tokenizer, state, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if state["model"].get("byte_fallback"):
        # SentencePiece, as llama.cpp has it: scores decide what is merged first, and stand for the order of the merges.
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens == ["▁a"])
    else:
        writer.add_tokenizer_model("gpt2")
        name = pre_tokenizer_name(state.get("pre_tokenizer"))
        _check_whole_words(state, whole_first=name in WHOLE_WORDS_FIRST)
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for kind in ("bos", "eos", "pad", "unk"):
        found = getattr(tokenizer, f"{kind}_token_id")
        if found is not None:
            getattr(writer, f"add_{kind}_token_id")(found)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, dict):
        templates = tokenizer.chat_template.items()
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _check_merging(model: dict[str, Any], merges: list[tuple[str, ...]]) -> None:
    if not merges and any(len(token) > 1 for token in model["vocab"]):
        raise ArchitectureError(
            "this tokenizer has no merges, by which alone llama.cpp makes tokens of more than a letter; use --format stock"
        )
    for field in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(field):
            raise ArchitectureError(
                f"this tokenizer has {field}, {model[field]!r}, which GGUF cannot say; use --format stock"
            )


def _check_whole_words(state: dict[str, Any], *, whole_first: bool) -> None:
    """``ignore_merges`` has no field in GGUF, it goes by the name of the split; and is nothing where merging ends at the same."""
    if bool(state["model"].get("ignore_merges")) == whole_first:
        return
    from tokenizers import Tokenizer

    bare = {"version": "1.0", "added_tokens": [], "model": state["model"] | {"ignore_merges": False}}
    added = {token["content"] for token in state["added_tokens"]}
    words = [word for word in state["model"]["vocab"] if word not in added]
    encoded = Tokenizer.from_str(json.dumps(bare)).encode_batch(words)
    other = [word for word, found in zip(words, encoded, strict=True) if found.tokens != [word]]
    if other:
        raise ArchitectureError(
            f"this tokenizer's ignore_merges is {not whole_first}, llama.cpp merges as if it were {whole_first}, and then splits "
            f"{len(other):,} tokens, {other[0]!r} for one; use --format stock"
        )


def _check_normalizer(normalizer: dict[str, Any] | None) -> None:
    for step in (normalizer or {}).get("normalizers", [normalizer] if normalizer else []):
        if step["type"] not in NORMALIZERS:
            raise ArchitectureError(
                f"this tokenizer changes text by {step['type']} before it splits it, which GGUF cannot say; use --format stock"
            )


def _vocabulary(tokenizer: Any, state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types; embeddings without a token are called unused."""
    from gguf import TokenType

    added = {token["id"]: token for token in state["added_tokens"]}
    known = {index: token for token, index in tokenizer.get_vocab().items()}
    bytes_as_tokens = bool(state["model"].get("byte_fallback"))
    tokens, types = [], []
    for index in range(vocab_size):
        token = known.get(index, f"[PAD{index}]")
        kind = TokenType.NORMAL if index in known else TokenType.UNUSED
        if index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif bytes_as_tokens and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kind = TokenType.BYTE
        if bytes_as_tokens and index == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def pre_tokenizer_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text, from its ``pre_tokenizer`` in tokenizer.json.

    Raises:
        ArchitectureError: it is none of those that are known here.
    """
    steps = (pre or {}).get("pretokenizers", [pre or {}])
    kinds = [step.get("type") for step in steps]
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    if kinds[-1] == "ByteLevel" and steps[-1].get("add_prefix_space"):
        kinds.append("a space before the text")
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    elif pattern in PRE_TOKENIZERS and steps[0].get("behavior") == "Isolated" and not steps[1].get("use_regex", True):
        return PRE_TOKENIZERS[pattern]
    raise ArchitectureError(
        f"how this tokenizer splits text ({', '.join(map(str, kinds))}) has no name in llama.cpp that is known here; "
        "use --format stock"
    )
