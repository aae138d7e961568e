"""The tokenizer in a GGUF file.

It holds tokens with their types, merges or scores, and a name for how text is split before merging. transformers' reader knows
some of the names, adds tokens that the model has no embedding for, and puts a space before the text whatever the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorap.checkpoint.gguf.header import read_gguf
from lorap.errors import CheckpointError
from lorap.jsonio import named, shown

KEYS = "tokenizer.ggml."
# Types of tokens.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
# transformers' names of special tokens -> those in the keys.
SPECIALS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# How the families' own tokenizers cut text into words.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3_SPLIT = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_SPLIT = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names, by what they mean.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez")
DIGITS_NAMES = ("smollm", "starcoder", "refact", "codeshell", "command-r")
PLAIN_NAMES = ("gpt-2", "default", "")
_PATTERNS = (
    dict.fromkeys(LLAMA3_NAMES, LLAMA3_SPLIT) | dict.fromkeys(QWEN2_NAMES, QWEN2_SPLIT) | {"tekken": TEKKEN_SPLIT}
)
# Words that are tokens are not merged; and a text begins with the first token unless the file says otherwise.
WHOLE_WORDS = (*LLAMA3_NAMES, "tekken")


def load_gguf_tokenizer(path: Path) -> Any | None:
    """The tokenizer of one GGUF file; None where it has none.

    Raises:
        CheckpointError: the file is damaged, or its tokenizer is of a kind that is not read.
    """
    header = read_gguf(path)
    values = {key.removeprefix(KEYS): value for key, value in header.values.items() if key.startswith(KEYS)}
    kind = values.get("model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path.name} has a tokenizer of type {shown(kind)}; gpt2 and llama (SentencePiece) are read; start from the model's "
            "Hugging Face folder"
        )
    try:
        backend = _byte_level(values) if kind == "gpt2" else _sentencepiece(values)
        specials = {f"{name}_token": _token(values, key) for name, key in SPECIALS.items()}
        _add_tokens(backend, values)
        _add_ends(backend, values, specials, kind)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"the tokenizer in {path.name} is damaged: {named(str(error))}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_templates(header.values),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in specials.items() if token is not None},
    )


def _byte_level(values: Mapping[str, Any]) -> Tokenizer:
    name = values.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", ())]
    kinds = values.get("token_type") or [NORMAL] * len(values["tokens"])
    joined = [token for token, kind in zip(values["tokens"], kinds, strict=True) if kind == NORMAL and len(token) > 1]
    if joined and not merges:  # writers leave out a list that is empty, as where tokens are single bytes
        raise ValueError(f"it has no merges, but tokens such as {shown(joined[0])} that need them")
    backend = _bpe(_vocabulary(values), merges, ignore_merges=name in WHOLE_WORDS)
    if name in _PATTERNS:
        split = [pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated")]
        steps = [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif name in DIGITS_NAMES or name in PLAIN_NAMES:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name in DIGITS_NAMES else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    else:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {shown(name)}, and how that splits text is not known here; start from the model's Hugging "
            "Face folder"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    if name in QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(values: Mapping[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(values)
    unknown = _token(values, "unknown") or values["tokens"][0]
    backend = _bpe(vocabulary, _merges(values, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    spaced = values.get("add_space_prefix", True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if spaced else "never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    return backend


def _bpe(vocabulary: Mapping[str, int], merges: list[Any], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, **options))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"its merges do not fit its tokens: {error}") from error


def _vocabulary(values: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(values["tokens"])}


def _merges(values: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs that make a token, best score first; among equal ones the longest left part, as transformers has them."""
    if "merges" in values:
        return [tuple(merge.split(" ", 1)) for merge in values["merges"]]
    kinds = values.get("token_type") or [1] * len(values["tokens"])
    pairs = []
    for token, score, kind in zip(values["tokens"], values["scores"], kinds, strict=True):
        if kind in (CONTROL, BYTE):
            continue
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(score, len(left), len(right), (left, right)) for left, right in known]
    pairs.sort(key=lambda entry: entry[:3], reverse=True)
    return [entry[3] for entry in pairs]


def _token(values: Mapping[str, Any], name: str) -> str | None:
    index = values.get(f"{name}_token_id")
    if index is None:
        # SentencePiece's own places, which llama.cpp takes where the file says nothing.
        index = {"unknown": 0, "bos": 1, "eos": 2}.get(name) if values.get("model") == "llama" else None
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(values["tokens"]):
        raise ValueError(f"{name}_token_id is {shown(index)} of {len(values['tokens']):,} tokens")
    return str(values["tokens"][index])


def _add_tokens(backend: Tokenizer, values: Mapping[str, Any]) -> None:
    """Tokens that are found in the text as a whole."""
    kinds = values.get("token_type") or []
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [token for token, own in zip(values["tokens"], kinds, strict=False) if own == kind and token]
        tokens = [AddedToken(token, normalized=False, special=special) for token in found]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)


def _add_ends(backend: Tokenizer, values: Mapping[str, Any], specials: Mapping[str, str | None], kind: str) -> None:
    """The tokens that every text begins and ends with."""
    first = values.get("add_bos_token", kind == "llama" or values.get("pre") in WHOLE_WORDS)
    ends = [name if wanted else None for name, wanted in (("bos", first), ("eos", values.get("add_eos_token", False)))]
    begin, end = (specials[f"{name}_token"] if name else None for name in ends)
    known = [(token, backend.token_to_id(token)) for token in {begin, end} if token is not None]
    if not known:
        return

    def around(text: str, number: int) -> list[str]:
        return [f"{part}:{number}" for part in (begin, text, end) if part is not None]

    backend.post_processor = processors.TemplateProcessing(
        single=around("$A", 0), pair=[*around("$A", 0), *around("$B", 1)], special_tokens=known
    )


def _chat_templates(values: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or all of them by name where the file has several."""
    default = values.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    others = {key.removeprefix(prefix): text for key, text in values.items() if key.startswith(prefix)}
    if not others:
        return default
    return ({"default": default} if default is not None else {}) | others
