"""transformers: ``import lorap`` teaches ``from_pretrained`` to open compressed checkpoints.

The checkpoint says ``quantization_config.quant_method = "lorap"``; transformers then builds the dense model on the meta
device, this plug-in swaps the compressed projections in, and the weights are loaded as usual: sharded, in any dtype, with a
device map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorap.errors import CheckpointError
from lorap.modules import LowRankLinear

QUANT_METHOD = "lorap"
FORMAT_VERSION = 1


class LoRAPConfig(QuantizationConfigMixin):
    """The shapes of a compressed checkpoint, as stored in config.json under ``quantization_config``.

    Args:
        format_version: of the checkpoint; a newer one than this library knows is refused.
        ranks: rank of each low-rank projection, by full module name.
        intermediate_sizes: width of each FFN, by full module name, where it differs from ``config.intermediate_size``.
        dense_intermediate_size: FFN width before compression, so that the kept share can be told from the checkpoint alone.
        sparsity: what was asked for.
        recipe: what was run.
        lorap_version: what ran it.

    Raises:
        CheckpointError: a version or field is unknown, or a size is not a positive whole number.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        ranks: Mapping[str, int] | None = None,
        intermediate_sizes: Mapping[str, int] | None = None,
        dense_intermediate_size: int | None = None,
        sparsity: float | None = None,
        recipe: str | None = None,
        lorap_version: str | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has format version {format_version} and this lorap reads {FORMAT_VERSION}; "
                f"it was written by lorap {lorap_version}: install that version or a newer one"
            )
        if unknown:
            raise CheckpointError(f"unknown field in quantization_config: {', '.join(sorted(unknown))}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.ranks = _positive(ranks or {}, "ranks")
        self.intermediate_sizes = _positive(intermediate_sizes or {}, "intermediate_sizes")
        self.dense_intermediate_size = dense_intermediate_size
        self.sparsity = sparsity
        self.recipe = recipe
        self.lorap_version = lorap_version


class LoRAPHfQuantizer(HfQuantizer):
    """Swaps compressed layers into the empty model before its weights are loaded."""

    requires_calibration = True
    quantization_config: LoRAPConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, rank in self.quantization_config.ranks.items():
            dense = _linear(model, name)
            if rank >= min(dense.in_features, dense.out_features):
                raise CheckpointError(
                    f"rank {rank} of {name} does not fit its shape ({dense.out_features}, {dense.in_features})"
                )
            low_rank = LowRankLinear(
                dense.in_features,
                dense.out_features,
                rank,
                bias=dense.bias is not None,
                device=dense.weight.device,
                dtype=dense.weight.dtype,
            )
            model.set_submodule(name, low_rank)
        for name, width in self.quantization_config.intermediate_sizes.items():
            resize_mlp(model, name, width)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def resize_mlp(model: nn.Module, name: str, width: int) -> None:
    """Give the FFN ``name`` empty linear layers of another width, keeping device, dtype and biases."""
    mlp = model.get_submodule(name)
    mlp.intermediate_size = width  # type: ignore[assignment]
    for role in ("gate_proj", "up_proj", "down_proj"):
        old = _linear(model, f"{name}.{role}")
        sizes = (width, old.out_features) if role == "down_proj" else (old.in_features, width)
        new = nn.Linear(*sizes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        setattr(mlp, role, new)


def mark_compressed(model: Any, config: LoRAPConfig) -> None:
    """Make ``model.save_pretrained`` write a checkpoint that the plug-in opens again."""
    model.config.quantization_config = config
    model.hf_quantizer = LoRAPHfQuantizer(config, pre_quantized=True)
    model.quantization_method = QUANT_METHOD


def register() -> None:
    """Make the plug-in known to transformers; safe to call twice (it refuses a second registration by itself)."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LoRAPConfig)
        register_quantizer(QUANT_METHOD)(LoRAPHfQuantizer)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"quantization_config names {name}, but the model has no such layer") from None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"quantization_config names {name}, which is a {type(module).__name__}, not a linear layer"
        )
    return module


def _positive(sizes: Mapping[str, int], field: str) -> dict[str, int]:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"quantization_config.{field}: {name} is {size!r}, not a positive whole number")
    return dict(sizes)
