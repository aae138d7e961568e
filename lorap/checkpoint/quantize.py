"""Quantization on top of compression: fewer bits for the weights that stayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lorap.architectures import known_architecture
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config, get_quantization_config, weights_of
from lorap.errors import ArchitectureError
from lorap.nn.int8 import quantize_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def quantize_int8(model: Model) -> Model:
    """int8 weights for every linear layer of the decoder: factors, dense projections and FFNs; changes ``model``, returns it.

    Weight-only, symmetric, one scale for each row, by torchao; :func:`lorap.quantize` has scales for groups, and 4 bits.
    Embeddings and the output head stay as they are.
    ``save_pretrained`` writes a checkpoint that ``from_pretrained`` opens again with identical weights. It saves memory
    and disk; lorap's kernels leave int8 weights to torch, so on a CPU it does not make a model faster.

    Raises:
        ArchitectureError: the family is unknown, or the weights are quantized already.
        BackendError: torchao is not installed.
    """
    known_architecture(model, to="quantize")
    compression = get_quantization_config(model) or LoRAPConfig()
    if (stored := weights_of(model)) != "float":
        raise ArchitectureError(f"the weights of this model are {stored} already")
    quantize_weights(model)
    attach_quantization_config(
        model, LoRAPConfig(**(compression.to_dict() | {"weights": "int8", "format_version": None}))
    )
    return model
