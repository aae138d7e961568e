"""transformers: ``import lorap`` teaches ``from_pretrained`` to open compressed checkpoints.

The checkpoint says ``quantization_config.quant_method = "lorap"``; transformers then builds the dense model on the meta
device, this plug-in swaps the compressed projections in, and the weights are loaded as usual: sharded, in any dtype, with a
device map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# This module is imported while transformers imports its quantizers (lorap/integrations/preparation.py): of those that come
# after them there is nothing yet.
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from lorap.checkpoint.build import check_pivot_rows, check_quantized, check_stored, join_model, keep_whole, put_layers
from lorap.checkpoint.format import QUANT_METHOD, LoRAPConfig
from lorap.checkpoint.guards import put_guards, register_activations
from lorap.checkpoint.int8_rows import pack_rows
from lorap.nn.linear import LowRankLinear
from lorap.nn.padding import pad_ranks
from lorap.nn.quantized import QuantizedLinear
from lorap.weights import INTEGERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRAPHfQuantizer(HfQuantizer):
    """Swaps compressed layers into the empty model before its weights are loaded."""

    requires_calibration = True
    quantization_config: LoRAPConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        wanted = put_layers(model, self.quantization_config)
        check_stored(model, checkpoint_files or (), wanted)
        keep_whole(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.quantization_config.has_row_scales:
            pack_rows(model)
            as_packed = {"group_size": INTEGERS.group_size, "format_version": None}
            self.quantization_config = LoRAPConfig(**(self.quantization_config.to_dict() | as_packed))
            attach_quantization_config(model, self.quantization_config)
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                check_pivot_rows(module, name)
            elif isinstance(module, QuantizedLinear):
                check_quantized(module, name)
        pad_ranks(model)
        # True forbids casts, and training without adapters.
        model.is_quantized = not self.is_trainable  # type: ignore[assignment]

    def is_serializable(self) -> bool:
        """``save_pretrained`` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights are floating-point numbers."""
        return self.quantization_config.weights == "float"

    @property
    def is_qat_trainable(self) -> bool:
        """Of all weights, without adapters: they are ordinary floating point numbers."""
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` takes the model."""
        return True


def attach_quantization_config(model: PreTrainedModel, config: LoRAPConfig) -> None:
    """Make ``model.save_pretrained`` write a checkpoint that the plug-in opens again."""
    model.config.quantization_config = config
    quantizer = LoRAPHfQuantizer(config, pre_quantized=True)
    for name, value in (
        ("hf_quantizer", quantizer),
        ("quantization_method", QUANT_METHOD),
        ("is_quantized", not quantizer.is_trainable),
    ):
        setattr(model, name, value)
    put_guards(model, config.is_guarded)


def get_quantization_config(model: PreTrainedModel) -> LoRAPConfig | None:
    """What :func:`attach_quantization_config` or loading put there; None where lorap has not changed the model."""
    found = getattr(model.config, "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        found = LoRAPConfig(**found)
    return found if isinstance(found, LoRAPConfig) else None


def weights_of(model: PreTrainedModel) -> str:
    """How the weights of the decoder's linear layers are stored: ``float``, ``int8``, ``int4``, ..., or several in words."""
    if (compression := get_quantization_config(model)) is not None:
        return compression.weights_text
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return next((module.coding.kind(module.bits) for module in packed), "float")


def detach_quantization_config(model: PreTrainedModel) -> None:
    """Make ``model.save_pretrained`` write an ordinary checkpoint again; only for what opens without the plug-in.

    Raises:
        ArchitectureError: what the family stores as one matrix is none any more.
    """
    LoRAPHfQuantizer(LoRAPConfig(), pre_quantized=True).remove_quantization_config(model)
    join_model(model)
    put_guards(model, False)


def forget_gguf(model: PreTrainedModel) -> None:
    """Make a model that can be saved of one that transformers made dense of a GGUF file, and still holds for quantized.

    See ``findings/transformers-gguf-dense-called-quantized.sh``. One whose weights stayed in GGUF's blocks is left as it is.
    """
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    if method == "gguf" and all(parameter.is_floating_point() for parameter in model.parameters()):
        LoRAPHfQuantizer(LoRAPConfig(), pre_quantized=True).remove_quantization_config(model)


def register() -> None:
    """Make the plug-in known to transformers; safe to call twice (it refuses a second registration by itself)."""
    register_activations()
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(LoRAPConfig)
        register_quantizer(QUANT_METHOD)(LoRAPHfQuantizer)


register()
