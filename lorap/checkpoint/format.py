"""``quantization_config`` as transformers wants it."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from lorap.checkpoint.quantization_fields import FORMAT_VERSIONS, GUARDED, QUANT_METHOD, QuantizationFields

__all__ = ["FORMAT_VERSIONS", "GUARDED", "QUANT_METHOD", "LoRAPConfig"]


class LoRAPConfig(QuantizationFields, QuantizationConfigMixin):  # type: ignore[misc]
    """The shapes of a compressed checkpoint; arguments and errors as :class:`QuantizationFields`."""

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; what format version 1 does not know only where it is not the default."""
        fields: dict[str, Any] = super().to_dict()
        if fields["storage"] == "factors":
            del fields["storage"]
        if not fields["biases"]:
            del fields["biases"]
        if fields["weights"] == "float":
            del fields["weights"]
        if fields["group_size"] is None:
            del fields["group_size"]
        if not fields["other_bits"]:
            del fields["other_bits"]
        return fields
