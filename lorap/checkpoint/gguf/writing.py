"""GGUF files, for llama.cpp and what is built on it.

The model is written as :func:`lorap.integrations.stock.make_stock` leaves it: dense attention, FFNs truly narrower. Weights
keep the model's dtype (F32, F16 or BF16); vectors are F32, as llama.cpp wants them. The ``gguf`` package does the writing;
names, the order of rotary pairs and the tokenizer are llama.cpp's conventions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorap.checkpoint.gguf.names import INTERLEAVED, WRITTEN, gguf_names, interleaved
from lorap.checkpoint.gguf.rope import FREQUENCIES, rope_to_gguf
from lorap.checkpoint.gguf.tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT
from lorap.checkpoint.guards import activation_of
from lorap.errors import ArchitectureError, ConfigError
from lorap.nn.linear import embedding_weight
from lorap.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How a byte-level tokenizer splits text before merging, and llama.cpp's name for it.
PRE_TOKENIZERS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2", TEKKEN_SPLIT: "tekken"}
# Normalizers that the names stand for, or that change no text which is normalized already.
NORMALIZERS = ("NFC", "Prepend", "Replace")


def check_gguf(model: PreTrainedModel) -> None:
    """Refuse what GGUF or llama.cpp cannot hold, before anything is reconstructed.

    Raises:
        ArchitectureError: the family, its positions or its attention window have no place there.
        ConfigError: the ``gguf`` package is not installed.
    """
    config = model.config
    if config.model_type not in WRITTEN:
        raise ArchitectureError(f"no GGUF for model type {config.model_type!r}; possible: {', '.join(WRITTEN)}")
    _rope(config)
    if (activation := activation_of(config)) not in ("silu", "swish"):
        raise ArchitectureError(
            f"llama.cpp computes FFNs of this family with silu, and this model's hidden_act is {activation!r}; "
            "use --format stock"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ArchitectureError(
            f"the attention window of {window:,} tokens has no place in GGUF's {WRITTEN[config.model_type]} architecture; "
            "use --format stock"
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("GGUF needs the package gguf: pip install 'lorap[eval]'") from None


def write_gguf(model: PreTrainedModel, file: Path, *, tokenizer: Any, name: str) -> None:
    """Write a stock model and its tokenizer into one file.

    Args:
        model: a stock model: attention dense, FFNs of one width.
        file: to write; replaced where it exists.
        tokenizer: of the model, a fast one.
        name: of the model, for the file.

    Raises:
        ArchitectureError: as :func:`check_gguf`, or the tokenizer is of a kind that llama.cpp has no name for.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    check_gguf(model)
    writer = GGUFWriter(file, WRITTEN[model.config.model_type])
    try:
        _add_sizes(writer, model, name)
        _add_tokenizer(writer, tokenizer, len(embedding_weight(model)))
        for tensor_name, tensor in _tensors(model):
            kind = GGMLQuantizationType[_type_of(tensor)]
            nbytes = tensor.numel() * (4 if kind == GGMLQuantizationType.F32 else 2)
            writer.add_tensor_info(tensor_name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in _tensors(model):  # one at a time: no second copy of the model in memory
            writer.write_tensor_data(_bytes_of(tensor))
    finally:
        writer.close()


def _add_sizes(writer: Any, model: PreTrainedModel, name: str) -> None:
    from gguf import LlamaFileType

    config = model.config
    heads, head_dim = config.num_attention_heads, _head_dim(config)
    writer.add_name(name)
    writer.add_description(f"compressed and exported by lorap {__version__}")
    writer.add_file_type(LlamaFileType[{"F32": "ALL_F32"}.get(kind := FILE_TYPES[model.dtype], f"MOSTLY_{kind}")])
    writer.add_vocab_size(len(embedding_weight(model)))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    for key, value in _rope(config)[0].items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{WRITTEN[config.model_type]}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(config: Any) -> tuple[dict[str, Any], Any]:
    return rope_to_gguf(getattr(config, "rope_parameters", None) or {}, head_dim=_head_dim(config))


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name, and the tensor in its order; tied embeddings once."""
    config, state = model.config, model.state_dict()
    architecture = WRITTEN[config.model_type]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    factors = _rope(config)[1]
    if factors is not None:
        yield FREQUENCIES, torch.from_numpy(factors)
    for key, name in gguf_names(architecture, config.num_hidden_layers, state).items():
        if key == "lm_head.weight" and torch.equal(state[key], embedding_weight(model)):
            continue  # whatever the config says: llama.cpp takes the embedding where there is no head
        if name is None:
            raise ArchitectureError(
                f"llama.cpp's {architecture} architecture has no place for {key}; use --format stock"
            )
        role = key.split(".")[-2]
        tensor = state[key]
        yield name, interleaved(tensor, heads[role]) if architecture in INTERLEAVED and role in heads else tensor


def _type_of(tensor: Tensor) -> str:
    return "F32" if tensor.ndim == 1 else FILE_TYPES[tensor.dtype]


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.ndim == 1:
        tensor = tensor.float()
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
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
