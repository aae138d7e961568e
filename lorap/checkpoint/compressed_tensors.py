"""``quantization_config`` of compressed-tensors, for packed weights in hosts without lorap.

The words of :mod:`lorap.kernels.packing` are those of its ``pack-quantized`` format, so that only config.json differs, and the
guards, which no such host may find. It takes rows of whole groups alone: of others it works out another group size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lorap.nn.quantized import QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "compressed-tensors"


def attach_compressed_tensors(model: PreTrainedModel, *, bits: int, group_size: int) -> None:
    """Make ``model.save_pretrained`` write a folder that opens without lorap, where compressed-tensors is installed.

    Args:
        model: whose projections are packed; those that are not are named in its config.
        bits: of a number.
        group_size: numbers of a row that share a scale.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.drop_guard()
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": plain,
    }
    model.config.quantization_config = settings
