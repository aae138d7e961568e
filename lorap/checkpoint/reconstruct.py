"""Factor pairs back to dense layers: the same model, as large as it was, without a trace of lorap where that is possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import (
    attach_quantization_config,
    detach_quantization_config,
    get_quantization_config,
    weights_of,
)
from lorap.errors import ArchitectureError
from lorap.nn.linear import LowRankLinear, has_plain_factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def reconstruct(model: Model) -> Model:
    """Every :class:`lorap.LowRankLinear` becomes the dense ``nn.Linear`` that it stands for; changes ``model`` and returns it.

    Products are computed in float32 for 16-bit factors, in float64 otherwise, and rounded once, to the dtype of the factors.
    Pruned FFNs stay as narrow as they are. ``save_pretrained`` then writes an ordinary checkpoint, which opens without lorap,
    if all FFNs have one width and no layer gained a bias; if not, the config keeps saying so, and lorap is still needed.
    A merged model (:func:`lorap.optimize_for_inference`) stays valid; merge it once more to run q, k and v as one again.

    Raises:
        ArchitectureError: the factors of a layer are not plain (adapters, hooks, offloaded weights), or weights are quantized.
    """
    pairs = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    compression = check_floating_point(model)
    for name, pair in pairs.items():
        _check(pair, name)
    for name, pair in pairs.items():
        if pair.group is not None:
            for member in pair.group.members:
                member.group = None
        model.set_submodule(name, dense(pair))
    if compression is not None:
        _reduce_quantization_config(model, compression)
    return model


def check_floating_point(model: PreTrainedModel) -> LoRAPConfig | None:
    """What lorap has done to a model whose weights are floating-point numbers; None where it has not changed it.

    Raises:
        ArchitectureError: the weights are quantized.
    """
    refuse_quantized(weights_of(model))
    return get_quantization_config(model)


def refuse_quantized(weights: str) -> None:
    """The same of a model that is not loaded, by how its weights are stored (``LoRAPConfig.weights_text``).

    Raises:
        ArchitectureError: the weights are quantized.
    """
    if weights != "float":
        raise ArchitectureError(
            f"the weights of this model are {weights}; reconstruct or export it before it is quantized"
        )


@torch.no_grad()
def dense(pair: LowRankLinear) -> nn.Linear:
    """One layer: weight (out_features, in_features) in the dtype and on the device of the factors; the bias is taken over."""
    factor = pair.right.weight
    exact = torch.float32 if factor.dtype.itemsize == 2 else torch.float64
    weight = pair.reconstruct(dtype=exact).to(factor.dtype)
    linear = nn.Linear(pair.in_features, pair.out_features, bias=False, device="meta", dtype=factor.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=factor.requires_grad)
    if pair.bias is not None:
        linear.bias = pair.bias  # type: ignore[assignment]
    return linear.train(pair.training)


def _check(pair: LowRankLinear, name: str) -> None:
    if not has_plain_factors(pair):
        raise ArchitectureError(
            f"the factors of {name} are not plain linear layers ({type(pair.right).__name__}, {type(pair.left).__name__}, or a "
            "hook or another kind of weight on them): merge or remove adapters and load the model without quantization first"
        )
    if pair.right.weight.is_meta or pair.left.weight.is_meta:
        raise ArchitectureError(f"the factors of {name} are not in memory; load the model without offloading")


def _reduce_quantization_config(model: PreTrainedModel, compression: LoRAPConfig) -> None:
    """Only what a dense model of this class cannot say by itself stays in the config."""
    if compression.intermediate_sizes or compression.biases:
        fields = compression.to_dict() | {"ranks": {}, "storage": "factors", "format_version": None}
        attach_quantization_config(model, LoRAPConfig(**fields))
    else:
        detach_quantization_config(model)
