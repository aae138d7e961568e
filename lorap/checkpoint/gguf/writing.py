"""GGUF files, for llama.cpp and what is built on it.

The model is written as :func:`lorap.reconstruct` leaves it: dense attention, FFNs truly narrower, each as wide as it is. Matrices
keep the model's dtype (F32, F16 or BF16) or are quantized; vectors are F32, as llama.cpp wants them. The ``gguf`` package does
the writing; names, the order of rotary pairs and the tokenizer are llama.cpp's conventions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorap.architectures import known_architecture
from lorap.checkpoint.gguf.architecture import choose_architecture, head_dim, rope_of
from lorap.checkpoint.gguf.names import INTERLEAVED, gguf_names, interleaved
from lorap.checkpoint.gguf.quantizing import quantized_type
from lorap.checkpoint.gguf.rope import FREQUENCIES
from lorap.checkpoint.gguf.vocabulary import add_tokenizer
from lorap.errors import ArchitectureError
from lorap.nn.linear import embedding_weight
from lorap.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# llama.cpp computes in no more than float32.
FILE_TYPES = {torch.float64: "F32", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(model: PreTrainedModel, file: Path, *, tokenizer: Any, name: str, kind: str | None = None) -> str:
    """Write a reconstructed model and its tokenizer into one file.

    Args:
        model: attention dense; FFNs may differ in width.
        file: to write; replaced where it exists.
        tokenizer: of the model, a fast one.
        name: of the model, for the file.
        kind: one of ``quantizing.OWN``, to quantize the matrices; None keeps their dtype.

    Returns:
        llama.cpp's name of the architecture.

    Raises:
        ArchitectureError: as :func:`choose_architecture`, or the tokenizer is of a kind that llama.cpp has no name for.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    architecture = choose_architecture(model)
    writer = GGUFWriter(file, architecture)
    try:
        _add_sizes(writer, model, architecture, name, kind or FILE_TYPES[model.dtype])
        add_tokenizer(writer, tokenizer, len(embedding_weight(model)))
        for tensor_name, tensor in _tensors(model, architecture):
            stored = GGMLQuantizationType[_type_of(tensor_name, tensor, kind)]
            block, block_bytes = GGML_QUANT_SIZES[stored]
            shape, nbytes = tuple(tensor.shape), tensor.numel() // block * block_bytes
            writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), nbytes, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in _tensors(
            model, architecture
        ):  # one at a time: no second copy of the model in memory
            writer.write_tensor_data(_values_of(tensor, _type_of(tensor_name, tensor, kind)))
    finally:
        writer.close()
    return architecture


def _add_sizes(writer: Any, model: PreTrainedModel, architecture: str, name: str, kind: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config = model.config
    widths = known_architecture(model, to="export").ffn_widths(model)
    writer.add_name(name)
    writer.add_description(f"compressed and exported by lorap {__version__}")
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(len(embedding_weight(model)))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(widths[0] if len(set(widths)) == 1 else widths)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    for key, value in rope_of(config)[0].items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name, and the tensor in its order; tied embeddings once."""
    config, state = model.config, model.state_dict()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    factors = rope_of(config)[1]
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


def _type_of(name: str, tensor: Tensor, kind: str | None) -> str:
    if tensor.ndim == 1:
        return "F32"
    return FILE_TYPES[tensor.dtype] if kind is None else quantized_type(name, tensor, kind)


def _values_of(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quantize

    tensor = tensor.detach().cpu().contiguous()
    if kind == "BF16":
        return tensor.view(torch.uint16).numpy()
    return quantize(tensor.float().numpy(), GGMLQuantizationType[kind])
