"""What the keys of a GGUF file mean, in the words of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorap.checkpoint.gguf.header import GGUFHeader
from lorap.checkpoint.gguf.names import READ, gguf_names
from lorap.checkpoint.gguf.rope import ROPE_TENSORS, read_rope
from lorap.errors import CheckpointError
from lorap.jsonio import named, shown

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Tables that are computed anew, in files of old converters.
COMPUTED = ".attn_rot_embd."
# Keys of an architecture that say nothing about what it computes, or what the tensors say again.
IGNORED = ("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "pooling_type", "expert_used_count")
# Keys that change nothing at these values; others that are not read here change nothing at 0.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attention.output_scale": (0, 1),
}


def gguf_settings(header: GGUFHeader) -> dict[str, Any]:
    """What a file's keys mean in the words of config.json, from its header alone; it takes no torch.

    Raises:
        CheckpointError: the architecture is not read, a key is missing, or one is there that would be lost.
    """
    if header.architecture not in READ:
        raise CheckpointError(
            f"{header.path.name}: GGUF files of architecture {named(header.architecture)} are not read; possible: "
            f"{', '.join(READ)}. Start from the model's Hugging Face folder"
        )
    keys = _Keys(header)
    sizes = _sizes(keys, header)
    head_dim = sizes["head_dim"]
    factors = {name: read_numbers(header, name) for name in ROPE_TENSORS if name in header.tensors}
    rope = read_rope(keys.value, factors, head_dim=head_dim, context=sizes["max_position_embeddings"])
    keys.refuse_rest(head_dim, sizes["max_position_embeddings"])
    tokens = {name: header.values.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    biases = {field: any(f"blk.0.{name}.bias" in header.tensors for name in names) for field, names in _BIASES.items()}
    return {
        **sizes,
        "rope_parameters": rope,
        "tie_word_embeddings": HEAD not in header.tensors,
        **({} if header.architecture == "qwen2" else biases),  # Qwen2 has them always
        **tokens,
    }


_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}


class _Keys:
    """The values of one architecture; remembers which were asked for."""

    def __init__(self, header: GGUFHeader) -> None:
        self.file, prefix = header.path.name, header.architecture + "."
        self.values = {
            key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)
        }
        self.asked: set[str] = set(IGNORED)

    def value(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        return self.values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive number that all layers share."""
        found = self.value(key, default)
        if found is None:
            raise CheckpointError(f"{self.file} is incomplete: it has no key {key}")
        numbers = found if isinstance(found, list) else [found]
        if len(set(numbers)) != 1:
            raise CheckpointError(
                f"{self.file}: {key} differs by layer ({shown(sorted(set(numbers)))}), and the model's class has one for all; "
                "start from the model's Hugging Face folder"
            )
        if type(numbers[0]) is not int or not 0 < numbers[0] < 2**31:
            raise CheckpointError(f"{self.file}: {key} is {shown(numbers[0])}, which is no size")
        return numbers[0]

    def refuse_rest(self, head_dim: int, context: int) -> None:
        """Whatever was not asked for must change nothing."""
        for key in sorted(self.values.keys() - self.asked):
            value = self.values[key]
            fine = value in NEUTRAL.get(key, (0, False, ""))
            if key == "attention.scale":
                fine = value == 0 or (isinstance(value, float) and math.isclose(value, head_dim**-0.5, rel_tol=1e-6))
            if key == "attention.sliding_window":
                fine = value == 0 or (type(value) is int and value >= context)
            if isinstance(value, list):
                fine = not any(value)
            if not fine:
                raise CheckpointError(
                    f"{self.file}: {named(key)} is {shown(value)}, which the model read from it would not have; start from the "
                    "model's Hugging Face folder"
                )


def _sizes(keys: _Keys, header: GGUFHeader) -> dict[str, Any]:
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path.name} is incomplete: it has no matrix {EMBEDDING}")
    hidden, heads, layers = keys.size("embedding_length"), keys.size("attention.head_count"), keys.size("block_count")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path.name}: block_count is {layers:,}, but the file holds {len(header.tensors):,} tensors"
        )
    if not keys.values.get("attention.key_length") and hidden % heads:
        raise CheckpointError(f"{header.path.name}: embedding_length {hidden} is no multiple of {heads} heads")
    head_dim = keys.size("attention.key_length", hidden // heads)
    if (other := keys.size("attention.value_length", hidden // heads)) != head_dim:
        raise CheckpointError(
            f"{header.path.name}: heads have {head_dim} components in keys and {other} in values; one size is read"
        )
    epsilon = keys.value("attention.layer_norm_rms_epsilon", None)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise CheckpointError(f"{header.path.name}: attention.layer_norm_rms_epsilon is {shown(epsilon)}")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": epsilon,
    }


def tensor_sources(
    header: GGUFHeader, settings: Mapping[str, Any], places: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The file's tensor for each key of the state dict; every tensor of the file is one, and of the right shape.

    Args:
        header: of the file.
        settings: from :func:`gguf_settings`.
        places: shape of each key of the model's state dict.

    Raises:
        CheckpointError: naming the tensor that is missing, misshapen or would be lost.
    """
    names = gguf_names(header.architecture, settings["num_hidden_layers"], places)
    if settings["tie_word_embeddings"]:
        names.pop("lm_head.weight", None)
    sources = {key: name for key, name in names.items() if name is not None and name in header.tensors}
    lost = sorted(header.tensors.keys() - sources.values() - set(ROPE_TENSORS))
    lost = [name for name in lost if COMPUTED not in name]
    if lost:
        raise CheckpointError(
            f"{header.path.name} holds {len(lost)} tensors that a {READ[header.architecture]} has no place "
            f"for, first {lost[0]}; start from the model's Hugging Face folder"
        )
    missing = [str(name or key) for key, name in names.items() if key not in sources and not key.endswith(".bias")]
    if missing:
        raise CheckpointError(
            f"{header.path.name} is incomplete: {len(missing)} tensors are missing, first {missing[0]}"
        )
    for key, name in sources.items():
        if header.tensors[name].shape != places[key]:
            raise CheckpointError(
                f"{header.path.name}: {name} has the shape {header.tensors[name].shape}, but its keys make it {places[key]}"
            )
    return sources


def read_numbers(header: GGUFHeader, name: str) -> np.ndarray[Any, Any]:
    """One tensor in float32, in its shape."""
    from gguf import GGMLQuantizationType, dequantize

    info = header.tensors[name]
    raw = np.memmap(header.path, np.uint8, "r", offset=info.offset, shape=(info.nbytes,))
    rows = info.numel // info.shape[-1] if info.shape else 1
    try:
        values = dequantize(raw.reshape(rows, -1), GGMLQuantizationType[info.dtype])
    except NotImplementedError:
        raise CheckpointError(
            f"{header.path.name}: {name} is stored as {info.dtype}, which the gguf package does not decode"
        ) from None
    return np.array(values, np.float32).reshape(info.shape)
