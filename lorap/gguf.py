"""GGUF files, for llama.cpp and what is built on it.

The model is written as :func:`lorap.export.make_stock` leaves it: dense attention, FFNs truly narrower. Weights keep the model's
dtype (F32, F16 or BF16); vectors are F32, as llama.cpp wants them. The ``gguf`` package does the writing; names, the order of
rotary pairs and the tokenizer are llama.cpp's conventions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorap.errors import ArchitectureError, ConfigError
from lorap.version import __version__

# model_type -> what llama.cpp calls the architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Rotary pairs are neighbours there; transformers keeps the halves of a head apart.
INTERLEAVED = ("llama",)
FILE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How a byte-level tokenizer splits text before merging, and llama.cpp's name for it: what its pattern must contain, in order.
PRE_TOKENIZERS = ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"))


def check_gguf(model: Any) -> None:
    """Refuse what GGUF or llama.cpp cannot hold, before anything is reconstructed.

    Raises:
        ArchitectureError: the family, its positions or its attention window have no place there.
        ConfigError: the ``gguf`` package is not installed.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ArchitectureError(f"no GGUF for model type {config.model_type!r}; possible: {', '.join(ARCHITECTURES)}")
    kind = _rope(config).get("rope_type", "default")
    if kind != "default":
        raise ArchitectureError(f"rotary positions of type {kind!r} are not written to GGUF; use --format stock")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise ArchitectureError(
            f"the attention window of {window:,} tokens has no place in GGUF's {ARCHITECTURES[config.model_type]} architecture; "
            "use --format stock"
        )
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError("GGUF needs the package gguf: pip install 'lorap[eval]'") from None


def write_gguf(model: Any, file: Path, *, tokenizer: Any, name: str) -> None:
    """Write a stock model and its tokenizer into one file.

    Raises:
        ArchitectureError: as :func:`check_gguf`, or the tokenizer is of a kind that llama.cpp has no name for.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    check_gguf(model)
    writer = GGUFWriter(file, ARCHITECTURES[model.config.model_type])
    try:
        _add_sizes(writer, model, name)
        _add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
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


def _add_sizes(writer: Any, model: Any, name: str) -> None:
    from gguf import LlamaFileType

    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_description(f"compressed and exported by lorap {__version__}")
    writer.add_file_type(LlamaFileType[{"F32": "ALL_F32"}.get(kind := FILE_TYPES[model.dtype], f"MOSTLY_{kind}")])
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name, and the tensor in its order; tied embeddings once."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    wanted = ARCHITECTURES[config.model_type]
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    assert isinstance(architecture, MODEL_ARCH)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ArchitectureError(f"llama.cpp's {wanted} architecture has no place for {key}; use --format stock")
        role = key.split(".")[-2]
        yield name, _interleaved(tensor, heads[role]) if wanted in INTERLEAVED and role in heads else tensor


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from (halves, pairs) to (pairs, halves)."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


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
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


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
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    pattern = str(steps[0].get("pattern", {}).get("Regex", "")) if kinds == ["Split", "ByteLevel"] else ""
    for part, name in PRE_TOKENIZERS:
        if part in pattern and "(?i:'s" in pattern:
            return name
    raise ArchitectureError(
        f"how this tokenizer splits text ({', '.join(map(str, kinds))}) has no name in llama.cpp that is known here; "
        "use --format stock"
    )
