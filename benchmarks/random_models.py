"""Models of real sizes with random weights: speed does not depend on the values, so nothing is downloaded or factorized.

Ranks and FFN widths of the compressed ones are those that ``lorap.compression.allocation`` gives the paper's recipe.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lorap
from lorap.architectures import ARCHITECTURES, ATTENTION
from lorap.compression.allocation import LayerPlan, plan_layer
from lorap.nn.quantized import packed_linears
from lorap.nn.trellis import layer_of
from lorap.weights import INTEGERS, KINDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}


def plan(sizes: dict[str, int], sparsity: float) -> tuple[dict[str, tuple[int, int]], LayerPlan]:
    """(out_features, in_features) of the seven projections, and the paper's ranks and width for them."""
    hidden, width = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    shapes = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    shapes |= {"o_proj": (hidden, hidden), "down_proj": (hidden, width)}
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (width, hidden))
    return shapes, plan_layer(shapes, lorap.CompressionConfig(recipe="lorap", sparsity=sparsity))


@functools.lru_cache(maxsize=3)
def random_model(
    name: str, sparsity: float, dtype: torch.dtype, *, layers: int, vocab_size: int = 64, tie: bool = False
) -> Any:
    """A model as ``lorap compress`` would leave it, in evaluation mode; ``name`` is a key of SIZES, or ``tiny``."""
    sizes = TINY if name == "tiny" else SIZES[name]
    _, layer_plan = plan(sizes, sparsity)
    options = sizes | {"intermediate_size": layer_plan.intermediate_size}
    config = LlamaConfig(vocab_size=vocab_size, num_hidden_layers=layers, tie_word_embeddings=tie, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for layer in model.model.layers:
            for role in layer_plan.ranks.keys() & set(ATTENTION):
                old = getattr(layer.self_attn, role)
                new = lorap.LowRankLinear(
                    old.in_features, old.out_features, layer_plan.ranks[role], bias=False, dtype=dtype
                )
                setattr(layer.self_attn, role, new)
    model.to_empty(device=DEVICE)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)  # its buffers are computed, not loaded
    for parameter in model.parameters():
        limit = (3 / parameter.shape[-1]) ** 0.5
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.uniform_(parameter, -limit, limit)
    return model


def pack_randomly(model: Any, kind: str) -> None:
    """Random numbers or codes in place of all weights of the decoder layers; ``kind`` is a key of KINDS."""
    coding, bits = KINDS[kind]
    for name, linear in list(packed_linears(model)):
        layer = layer_of(coding).empty_like(linear, bits=bits, group_size=coding.group_size)
        layer.weight_packed.random_(-(2**31), 2**31)
        layer.weight_scale.fill_(linear.in_features**-0.5 / (2 ** (bits - 1) if coding is INTEGERS else 1))
        model.set_submodule(name, layer)


def bytes_of(model: Any) -> int:
    """Of all weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def optimized(model: Any) -> Any:
    """A copy that shares its weights with ``model``, optimized for decoding."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return lorap.optimize_for_inference(copy.deepcopy(model, memo=shared))


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers, in order."""
    return list(ARCHITECTURES[model.config.model_type].decoder_layers(model))
