"""Where the projections live in each model family: one table, no per-family classes.

All families below have the seven linear layers of LLaMA's decoder layer: attention with separate q, k, v and o, and a gated FFN
with separate gate, up and down. What else a layer does needs no entry here, because nothing but the seven is touched: norms
before, between or after its parts, norms of heads, biases, sliding windows, scaled embeddings, residuals and logits, rotary
positions of any kind. What the seven are to each other is a contract, which is in :mod:`lorap.calibration.contract` and is
verified on the weights before anything is compressed. Where attention is of another kind, in some layers or all, only the FFNs
are lorap's.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from lorap.architectures.architecture import (
    ATTENTION,
    MLP,
    PROJECTIONS,
    SHARED_INPUTS,
    STOCK_MULTIPLES,
    Architecture,
)
from lorap.architectures.experts import check_packed
from lorap.architectures.families import ARCHITECTURES, REFUSED
from lorap.architectures.splitting import split
from lorap.errors import ArchitectureError

if TYPE_CHECKING:  # names and shapes alone take no torch
    from torch import nn

__all__ = [
    "ARCHITECTURES",
    "ATTENTION",
    "MLP",
    "PROJECTIONS",
    "REFUSED",
    "SHARED_INPUTS",
    "STOCK_MULTIPLES",
    "Architecture",
    "cache_argument",
    "find_architecture",
    "known_architecture",
    "split_model",
    "text_config",
]


def known_architecture(model: nn.Module, *, to: str, experts: bool = False) -> Architecture:
    """The table entry for a model, dense or compressed.

    Args:
        model: of transformers; what its family stores as one matrix is split.
        to: what it is wanted for, for the message.
        experts: whether that can be done to mixtures of experts.

    Raises:
        ArchitectureError: the family is unknown.
    """
    model_type = getattr(model.config, "model_type", "")
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(f"cannot {to} model type {model_type!r}; known: {', '.join(ARCHITECTURES)}")
    if ARCHITECTURES[model_type].packed and not experts:
        raise ArchitectureError(
            f"cannot {to} a model of type {model_type}, whose FFNs are mixtures of experts: lorap compresses, evaluates and runs "
            "those in floating point, and nothing else so far"
        )
    return split_model(model)


def split_model(model: Any) -> Architecture:
    """Split what the family of ``model``, one of ``ARCHITECTURES``, stores as one matrix; the model computes the same."""
    architecture = ARCHITECTURES[model.config.model_type]
    if architecture.fused:
        split(architecture.decoder_layers(model), architecture.fused)
    return architecture


def find_architecture(model: nn.Module) -> Architecture:
    """The table entry for a model, after checking that its layers really look like that; splits as :func:`known_architecture`.

    Raises:
        ArchitectureError: the family is unknown, or a projection is missing, fused, quantized or already compressed.
    """
    config = model.config
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in ARCHITECTURES:
        why = f": {REFUSED[model_type]}" if model_type in REFUSED else ""
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(
            f"cannot compress model type {model_type!r} ({type(model).__name__}){why}; supported: {known}"
        )
    if (getattr(config, "quantization_config", None) or {}) and _quant_method(config) == "lorap":
        raise ArchitectureError(
            "this model was compressed by lorap already; start from the dense model and ask for a higher "
            "sparsity or fewer bits instead"
        )
    text = text_config(config)
    if asked := [name for name in ARCHITECTURES[model_type].refused if getattr(text, name, None)]:
        raise ArchitectureError(
            f"cannot compress this {model_type} model: {asked[0]} is {getattr(text, asked[0])}, and "
            f"{ARCHITECTURES[model_type].refused[asked[0]]}"
        )
    architecture = split_model(model)
    if architecture.packed:
        _check_mixtures(architecture, model)
    for index, layer in enumerate(architecture.decoder_layers(model)):
        for role in architecture.roles(layer):
            _check_linear(layer, architecture.projections[role], architecture.module_name(index, role))
    return architecture


def text_config(config: Any) -> Any:
    """The part of a model's config that describes its language model: of a model for texts alone the whole."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def cache_argument(model: nn.Module) -> str:
    """What the model's forward and its outputs call keys and values: ``cache``, or in older transformers ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _quant_method(config: object) -> str:
    quantization = config.quantization_config  # type: ignore[attr-defined]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return str(getattr(method, "value", method))


def _check_mixtures(architecture: Architecture, model: Any) -> None:
    """Experts, in layers that have them, are packed as lorap knows them."""
    for index, layer in enumerate(architecture.decoder_layers(model)):
        if (experts := architecture.experts(layer)) is not None:
            check_packed(experts.module, architecture.ffn_name(index, layer))


def _check_linear(layer: nn.Module, path: str, name: str) -> None:
    from torch import nn  # there is a model, so it is imported already

    try:
        module = layer.get_submodule(path)
    except AttributeError:
        raise ArchitectureError(
            f"{name} does not exist: the projections of this model are fused or named otherwise; "
            "lorap needs separate q, k, v, o, gate, up and down"
        ) from None
    if type(module) is not nn.Linear:
        raise ArchitectureError(
            f"{name} is a {type(module).__name__}, not a plain torch.nn.Linear; load the model without quantization or adapters"
        )
