"""Names and shapes of all tensors of a model, from its config.json alone, for five families of lorap.architectures.

transformers knows the same by building the model, which takes seconds of imports. What is not certain here is left to it: there
is no answer then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorap.architectures import ARCHITECTURES, ATTENTION, MLP
from lorap.checkpoint.quantization_fields import QuantizationFields
from lorap.nn.low_rank_tensors import (
    INT8_DATA,
    INT8_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WEIGHT_SHAPE,
    LowRankTensors,
)

Shapes = dict[str, tuple[int, ...]]
# What the classes of the families have beside the seven projections and two norms (transformers/models/*/modeling_*.py).
ALWAYS_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj")}
BIAS_FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": ATTENTION, "mlp_bias": MLP},
    "qwen3": {"attention_bias": ATTENTION},
    "smollm3": {"attention_bias": ATTENTION, "mlp_bias": MLP},
}
HEAD_NORMS = {"qwen3": ("q_norm", "k_norm")}
# The families of which this file knows everything; of the others the class itself must be asked.
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def dense_shapes(model_type: str, settings: Mapping[str, Any]) -> Shapes | None:
    """What a dense model's state dict holds, its head included, whether that is tied or not.

    Args:
        model_type: one of ``PLAIN``.
        settings: config.json, or what a GGUF file says in its words.

    Returns:
        None where the class would fall back on a default of its own, or refuse the sizes.
    """
    sizes: list[Any] = [settings.get(name) for name in (*SIZES, "num_key_value_heads")]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    vocabulary, hidden, width, layers, heads, kv_heads = sizes
    head_dim = settings.get("head_dim")
    if head_dim is None and model_type not in HEAD_NORMS:  # Qwen3 has a default of its own
        head_dim = hidden // heads
    if type(head_dim) is not int or head_dim < 1 or head_dim % 2 or hidden % heads or heads % kv_heads:
        return None
    outer, inner = heads * head_dim, kv_heads * head_dim
    linears = {
        "q_proj": (outer, hidden),
        "k_proj": (inner, hidden),
        "v_proj": (inner, hidden),
        "o_proj": (hidden, outer),
    }
    linears |= {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    biased = {*ALWAYS_BIASED.get(model_type, ())}
    for name, roles in BIAS_FIELDS.get(model_type, {}).items():
        biased |= {*roles} if settings.get(name) else set()
    architecture = ARCHITECTURES[model_type]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for index in range(layers):
        for role, shape in linears.items():
            name = architecture.module_name(index, role)
            shapes[f"{name}.weight"] = shape
            if role in biased:
                shapes[f"{name}.bias"] = shape[:1]
        layer = f"{architecture.layers}.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        for norm in HEAD_NORMS.get(model_type, ()):
            shapes[f"{layer}.{architecture.attention}.{norm}.weight"] = (head_dim,)
    return shapes


def compressed_shapes(dense: Shapes, fields: QuantizationFields) -> Shapes | None:
    """The same once the layers are as ``fields`` describes them; None where these do not fit the dense model.

    It says in names and shapes what lorap/checkpoint/build.py does to an empty model.
    """
    shapes = dict(dense)
    for name, rank in fields.ranks.items():
        if f"{name}.weight" not in dense or not 0 < rank < min(dense[f"{name}.weight"]):
            return None
        outputs, inputs = shapes.pop(f"{name}.weight")
        bias = shapes.pop(f"{name}.bias", None) is not None
        pivoted, guarded = fields.storage == "pivoted", fields.is_guarded
        layer = LowRankTensors(outputs, inputs, rank, bias=bias, pivoted=pivoted, guarded=guarded)
        shapes |= {f"{name}.{key}": shape for key, shape in layer.shapes().items()}
    for name, width in fields.intermediate_sizes.items():
        if any(f"{name}.{role}.weight" not in dense or f"{name}.{role}" in fields.ranks for role in MLP):
            return None
        for role in MLP:
            outputs, inputs = shapes[f"{name}.{role}.weight"]
            shape = (outputs, width) if role == "down_proj" else (width, inputs)
            shapes[f"{name}.{role}.weight"] = shape
            if f"{name}.{role}.bias" in shapes:
                shapes[f"{name}.{role}.bias"] = shape[:1]
    for name in fields.biases:
        if len(shapes.get(f"{name}.weight", ())) != 2:
            return None
        shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    if any(f"{name}.weight" not in dense or ".layers." not in name for name in fields.other_bits):
        return None
    return shapes if fields.weights == "float" else quantized_shapes(shapes, fields)


def quantized_shapes(shapes: Shapes, fields: QuantizationFields) -> Shapes:
    """The same with every matrix in the decoder layers as lorap/nn/quantized.py, lorap/nn/trellis.py, or without groups
    lorap/checkpoint/int8_rows.py has it.
    """
    stored: Shapes = {}
    for name, shape in shapes.items():
        stored[name] = shape
        if ".layers." not in name or len(shape) != 2:
            continue
        layer, (rows, columns) = name.removesuffix("weight"), shape
        stored[name] = (1,)
        bits, coding, group_size = fields.bits_of(layer.removesuffix(".")), fields.coding, fields.group_size
        if bits is None or coding is None or group_size is None:
            stored |= {f"{layer}{INT8_DATA}": shape, f"{layer}{INT8_SCALE}": (rows, 1)}
        else:
            stored[f"{layer}{WEIGHT_PACKED}"] = coding.packed_shape(rows, columns, bits)
            stored[f"{layer}{WEIGHT_SCALE}"] = (rows, -(-columns // group_size))
            stored[f"{layer}{WEIGHT_SHAPE}"] = (2,)
    return stored
