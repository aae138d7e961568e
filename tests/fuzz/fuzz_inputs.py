"""Damaged checkpoints: small valid ones, and hypothesis strategies that change them field by field or byte by byte."""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from old_int8 import save_old_int8

from lorap.checkpoint.build import put_layers
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config
from lorap.compression.quantization import quantize

Q, K, UP, DOWN = (
    f"model.layers.{name}" for name in ("0.self_attn.q_proj", "1.self_attn.k_proj", "0.mlp.up_proj", "1.mlp.down_proj")
)
SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
# kind -> (model type, its config, what lorap did to it)
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("qwen3", SIZES | {"head_dim": 6, "tie_word_embeddings": True}, {}),
    "other-family": ("gpt2", GPT2, {}),
    "factors": ("llama", SIZES, {"ranks": {Q: 3, K: 2}, "intermediate_sizes": {"model.layers.1.mlp": 5}}),
    "pivoted": ("llama", SIZES, {"ranks": {Q: 3, UP: 2}, "storage": "pivoted", "biases": [DOWN]}),
    "int8": ("qwen2", SIZES, {"ranks": {Q: 3}, "weights": "int8"}),
    "mixed": ("llama", SIZES, {"ranks": {Q: 3}, "weights": "int4", "group_size": 32, "other_bits": {Q: 8, DOWN: 8}}),
    "trellis": ("llama", SIZES, {"ranks": {Q: 3}, "weights": "tcq3", "group_size": 32, "other_bits": {Q: 2, DOWN: 4}}),
}


@dataclass(frozen=True)
class Checkpoint:
    """The files that matter of one small folder: config.json parsed, and the safetensors file in its parts."""

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes

    def write(self, folder: Path, config: bytes | None = None, weights: bytes | None = None) -> Path:
        """Put the folder down, with other bytes where they are given."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes(dump(self.config) if config is None else config)
        (folder / "model.safetensors").write_bytes(safetensors(self.header, self.data) if weights is None else weights)
        return folder


def make_checkpoint(kind: str, folder: Path) -> Checkpoint:
    """A random model of one kind, saved by transformers and read back."""
    model_type, sizes, fields = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **sizes))
    if fields:
        config = LoRAPConfig(
            **{name: value for name, value in fields.items() if name not in ("weights", "group_size", "other_bits")}
        )
        put_layers(model, config)
        attach_quantization_config(model, config)
    if "other_bits" in fields:
        quantize(model, fields["weights"], group_size=fields["group_size"], other_bits=fields["other_bits"])
    if fields.get("weights") == "int8":
        save_old_int8(model, folder)
    else:
        model.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    return Checkpoint(
        json.loads((folder / "config.json").read_text()), json.loads(weights[8 : 8 + length]), weights[8 + length :]
    )


def safetensors(header: Any, data: bytes) -> bytes:
    text = dump(header)
    return struct.pack("<Q", len(text)) + text + data


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


@dataclass(frozen=True)
class Nested:
    """A value in so many lists."""

    value: Any
    depth: int


def dump(value: Any) -> bytes:
    """JSON, also of what JSON forbids: NaN, halves of surrogate pairs, :class:`Pairs` and :class:`Nested`."""

    def text(item: Any) -> str:
        if isinstance(item, Pairs):
            return "{" + ", ".join(f"{json.dumps(key)}: {text(member)}" for key, member in item) + "}"
        if isinstance(item, Nested):
            return "[" * item.depth + text(item.value) + "]" * item.depth
        if isinstance(item, dict):
            return text(Pairs(item.items()))
        if isinstance(item, list):
            return "[" + ", ".join(map(text, item)) + "]"
        return json.dumps(item)

    return text(value).encode()


NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 5, 7, 12, 20, 64, 65, 99, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30)]
)
WORDS = [
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "\ud800",
    "\x1b[2J",
    "lorap",
    "llama",
    "gpt2",
    "F32",
    "I64",
    "F4",
    "float16",
]
WORDS += [
    "pivoted",
    "int8",
    Q,
    f"{Q}.right",
    f"{Q}.weight",
    "model",
    "lm_head",
    "base_model.layers.0.mlp",
    "x" * 3000,
    "sdpa",
    "default",
]
SCALARS = st.one_of(
    NUMBERS,
    st.sampled_from([None, True, False, 0.5, 3.0, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(WORDS),
    st.integers(),
    st.text(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=5,
)
# Fields that no valid folder has, and that make transformers do more than build a model.
EXTRA = [
    "auto_map",
    "transformers_weights",
    "configuration_files",
    "attn_implementation",
    "_attn_implementation",
    "num_labels",
]
EXTRA += [
    "quantization_config",
    "text_config",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "per_layer_config",
]
EXTRA += [
    "layer_types",
    "head_dim",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "pruned_heads",
    "__class__",
    "to_dict",
    "self",
]
EXTRA += [
    "load_in_4bit",
    "attention_bias",
    "mlp_bias",
    "storage",
    "ranks",
    "use_cache",
    "fusion_config",
    "id2label",
    "shape",
]


# What breaks the JSON itself is rare: it hides whatever else is wrong.
ACTIONS = ["nudge"] * 4 + ["replace"] * 3 + ["add", "swap", "remove", "rename"] * 2 + ["double", "nest"]


@st.composite
def edited(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one to three of its values changed, removed, doubled, moved or nested."""
    box = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        places = _places(box)
        container, key = places[draw(st.integers(0, len(places) - 1))]
        action = draw(st.sampled_from(ACTIONS))
        value = container[key]
        if action == "nudge" and type(value) is int:
            container[key] = value + draw(st.sampled_from([-1, 1, value, -2 * value]))
        elif action == "remove" and container is not box:
            del container[key]
        elif action == "add" and isinstance(value, dict):
            value[draw(st.sampled_from(EXTRA))] = draw(VALUES)
        elif action == "double" and isinstance(value, dict) and value:
            container[key] = Pairs([*value.items(), (draw(st.sampled_from(sorted(value))), draw(VALUES))])
        elif action == "swap":
            other, at = places[draw(st.integers(0, len(places) - 1))]
            container[key] = copy.deepcopy(other[at])
        elif action == "nest":
            container[key] = Nested(value, draw(st.sampled_from([1, 2, 20, 40, 600, 3000])))
        elif action == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from([*WORDS, *EXTRA, *container]))] = container.pop(key)
        else:
            container[key] = draw(VALUES)
    return box[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value; the whole, of which the generator is fond of the first, comes last."""
    found = []
    level = [value]
    while level and len(found) < 400:
        items = [(item, key) for item in level for key in (item if isinstance(item, dict) else range(len(item)))]
        found += items
        level = [
            item[key] for item, key in items if isinstance(item[key], (dict, list)) and not isinstance(item[key], Pairs)
        ]
    return found[::-1]


@st.composite
def broken_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes with a few overwritten, a piece cut out or doubled, or something else altogether."""
    data = bytearray(original)
    action = draw(st.sampled_from(["flip", "cut", "double", "insert", "other"]))
    at = draw(st.integers(0, min(len(data), 4000)))
    if action == "flip":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, min(len(data), 4000) - 1))] = draw(st.integers(0, 255))
    elif action == "cut":
        del data[at : at + draw(st.integers(1, 64))]
    elif action == "double":
        data[at:at] = data[at : at + draw(st.integers(1, 64))]
    elif action == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=16))
    else:
        return draw(st.binary(max_size=64))
    return bytes(data)


@st.composite
def broken_json(draw: st.DrawFn, document: Any) -> bytes:
    """Mostly an edited document, sometimes broken bytes."""
    if draw(st.integers(0, 9)):
        return dump(draw(edited(document)))
    return draw(broken_bytes(dump(document)))


@st.composite
def broken_weights(draw: st.DrawFn, checkpoint: Checkpoint) -> bytes:
    """A safetensors file with an edited header, another length, other data, broken bytes, or none of it."""
    header, data = checkpoint.header, checkpoint.data
    action = draw(st.sampled_from(["header", "header", "header", "length", "data", "bytes", "padding", "none"]))
    if action == "header":
        return safetensors(draw(edited(header)), data)
    if action == "none":
        return safetensors(header, data)
    if action == "length":
        text = dump(header)
        length = draw(st.sampled_from([0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", length) + text + data
    if action == "data":
        return safetensors(header, data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9)))
    if action == "padding":
        text = dump(header) + draw(st.sampled_from([b" ", b"  \n", b"\0", b"{}", b"\xff"]))
        return struct.pack("<Q", len(text)) + text + data
    return draw(broken_bytes(safetensors(header, data)))
