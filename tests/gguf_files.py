"""GGUF files as llama.cpp's converter lays them out, and with what people's files have besides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def write_file(
    file: Path,
    model: Any,
    tokenizer: Any,
    *,
    values: Mapping[str, Any] = {},
    tensors: Mapping[str, Any] = {},
    leave_out: tuple[str, ...] = (),
    architecture: str = "llama",
) -> Path:
    """``values`` and ``tensors`` come on top; keys without a dot before them are the architecture's."""
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    config, writer = model.config, GGUFWriter(str(file), architecture)
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    everything = {f"{architecture}.{key}": getattr(config, field) for key, field in KEYS.items()}
    everything |= {
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.rope.dimension_count": head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [tokens[index] for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [3 if tokens[index] in special else 1 for index in range(len(tokens))],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }
    others = ("tokenizer.", "general.", "split.")
    everything |= {key if key.startswith(others) else f"{architecture}.{key}": value for key, value in values.items()}
    for key, value in everything.items():
        add = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        if value != []:
            getattr(writer, f"add_{add}")(key, value)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads and architecture == "llama":
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stored[names.get_name(key, try_suffixes=(".weight", ".bias"))] = tensor.float().numpy()
    for name, tensor in (stored | dict(tensors)).items():
        if name not in leave_out:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
