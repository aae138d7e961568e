"""Folders with int8 weights as lorap wrote them before it packed them: numbers and one scale a row, rounded as torchao does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorap.checkpoint.folders import INDEX
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config, get_quantization_config
from lorap.jsonio import read_json, write_json
from lorap.nn.quantized import decoder_linears


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (out, in) int8 and scales (out, 1) in the dtype of a weight, as torchao 0.18 has them."""
    largest = weight.abs().amax(1, keepdim=True)
    scale = (largest / 127.5).float().clamp(min=torch.finfo(torch.float32).eps)
    numbers = (weight.float() * (1 / scale)).round().clamp(-128, 127)
    return numbers.to(torch.int8), scale.to(weight.dtype)


def save_old_int8(model: Any, folder: Path, *, version: int = 4, **options: Any) -> dict[str, Tensor]:
    """Write ``model``, dense or compressed, in the layout of format versions 3 and 4.

    Args:
        model: with weights in floating point; loses its guards with version 3.
        folder: where to.
        version: of the format.
        options: of ``save_pretrained``.

    Returns:
        By name, the weights that are stored, in float64.
    """
    fields = get_quantization_config(model) or LoRAPConfig()
    as_old = {"weights": "int8", "group_size": None, "format_version": version}
    attach_quantization_config(model, LoRAPConfig(**(fields.to_dict() | as_old)))
    model.save_pretrained(folder, **options)
    linears, weights, places = dict(decoder_linears(model)), {}, {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in linears.keys() & {name.removesuffix(".weight") for name in tensors}:
            numbers, scale = rounded(tensors[f"{name}.weight"])
            weights[name] = numbers.double() * scale.double()
            tensors[f"{name}.weight"] = torch.ones(1, dtype=scale.dtype)
            tensors |= {f"{name}._weight_qdata": numbers, f"{name}._weight_scale": scale}
        places |= dict.fromkeys(tensors, file.name)
        save_file(tensors, file, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        write_json(folder / INDEX, read_json(folder / INDEX) | {"weight_map": places})
    return weights
