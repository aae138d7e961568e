"""The tokenizer goes into a GGUF file: tokens with their types, merges or scores, and llama.cpp's name for how text is split."""

from __future__ import annotations

import json
import re
from typing import Any

from lorap.checkpoint.gguf.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT
from lorap.errors import ArchitectureError

# How a byte-level tokenizer splits text before merging, and llama.cpp's name for it.
PRE_TOKENIZERS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2", TEKKEN_SPLIT: "tekken"}
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
        writer.add_tokenizer_pre(pre_tokenizer_name(state.get("pre_tokenizer")))
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
