"""``QuantizedLinear``: a linear layer whose weight is whole numbers of 4 or 8 bits and scales.

Its tensors are named and packed as compressed-tensors' ``pack-quantized`` format has them (:mod:`lorap.kernels.packing`)::

    down_proj.weight_packed   (out_features, words) int32
    down_proj.weight_scale    (out_features, ceil(in_features / group_size)), in the dtype of the model
    down_proj.weight_shape    (2,) int64: out_features, in_features
    down_proj.bias            (out_features,), where the layer has one
    down_proj.weight          (1,), the guard of lorap/nn/low_rank_tensors.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorap.architectures import ARCHITECTURES, Architecture
from lorap.kernels.packing import dequantize, pack
from lorap.nn import ops
from lorap.nn.low_rank_tensors import GUARD_VALUE, WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE
from lorap.weights import INTEGERS, Coding

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self


class QuantizedLinear(nn.Module):
    """y = x @ (numbers * scales).T + bias through ``torch.ops.lorap.quantized_linear``, for inference.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        bits: of a number, one of those of ``coding``.
        group_size: numbers of a row that share a scale; the last group may have fewer.
        bias: (out_features,), used and not copied; None for none.
        device: where the tensors are created, empty.
        dtype: of the scales.
    """

    coding: ClassVar[Coding] = INTEGERS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, group_size
        shape = self.coding.packed_shape(out_features, in_features, bits)
        packed = torch.empty(shape, dtype=torch.int32, device=device)
        scale = torch.empty(out_features, -(-in_features // group_size), dtype=dtype, device=device)
        self.weight_packed: Tensor
        self.weight_scale: Tensor
        self.weight_shape: Tensor
        self.register_buffer(WEIGHT_PACKED, packed)
        self.register_buffer(WEIGHT_SCALE, scale)
        self.register_buffer(WEIGHT_SHAPE, torch.tensor([out_features, in_features], device=device))
        self.register_buffer("weight", torch.full((1,), GUARD_VALUE, dtype=dtype, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def from_numbers(
        cls, numbers: Tensor, scales: Tensor, *, bits: int, group_size: int, bias: nn.Parameter | None = None
    ) -> Self:
        """The layer of a rounded weight.

        Args:
            numbers: (out_features, in_features), whole numbers in the range of ``bits``; of a subclass what it packs.
            scales: (out_features, ceil(in_features / group_size)), used and not copied.
            bits: of a number.
            group_size: numbers of a row that share a scale.
            bias: (out_features,) or None.
        """
        layer = cls(
            numbers.shape[1],
            len(scales),
            bits=bits,
            group_size=group_size,
            bias=bias,
            device=numbers.device,
            dtype=scales.dtype,
        )
        layer.weight_packed, layer.weight_scale = cls.pack(numbers, bits), scales
        return layer

    @staticmethod
    def pack(numbers: Tensor, bits: int) -> Tensor:
        """What ``weight_packed`` holds of the numbers of :meth:`from_numbers`."""
        return pack(numbers, bits)

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, bits: int, group_size: int) -> Self:
        """A layer in the place of ``linear``, whose values are still to come; the bias is taken over."""
        weight = linear.weight
        return cls(
            linear.in_features,
            linear.out_features,
            bits=bits,
            group_size=group_size,
            bias=linear.bias,
            device=weight.device,
            dtype=weight.dtype,
        ).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return self.product(x, self._parameters["bias"])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same with another bias (out_features,) or none in place of its own."""
        buffers = self._buffers  # nn.Module's attribute access takes longer than a small layer
        packed: Any = buffers[WEIGHT_PACKED]
        scale: Any = buffers[WEIGHT_SCALE]
        return ops.quantized_linear(x, packed, scale, bias, self.bits, self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out_features, in_features), in ``dtype`` or that of the scales."""
        scale = self.weight_scale
        return dequantize(self.weight_packed, scale, self.bits, self.group_size, self.in_features, dtype or scale.dtype)

    def drop_guard(self) -> None:
        """Leave the guard out of what is saved."""
        self._non_persistent_buffers_set.add("weight")

    def extra_repr(self) -> str:
        """Sizes and bits."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, bits={self.bits}, group_size={self.group_size}"


def decoder_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer in the decoder layers, factors included; not the embeddings, not the head."""
    path = _layers_path(model)
    for name, part in model.get_submodule(path).named_modules():
        if isinstance(part, nn.Linear):
            yield f"{path}.{name}", part


def packed_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """What is packed: the projections of all decoder layers, of low-rank ones both factors."""
    architecture = ARCHITECTURES[model.config.model_type]
    path = _layers_path(model)
    layers: Any = model.get_submodule(path)
    for index, layer in enumerate(layers):
        for _, name, linear in projection_linears(layer, architecture):
            yield f"{path}.{index}.{name}", linear


def _layers_path(model: PreTrainedModel) -> str:
    """Where the decoder layers are, in a base model (``AutoModel``) too."""
    path, prefix = ARCHITECTURES[model.config.model_type].layers, str(model.base_model_prefix)
    return path if prefix in model._modules else path.removeprefix(f"{prefix}.")


def projection_linears(layer: nn.Module, architecture: Architecture) -> Iterator[tuple[str, str, nn.Linear]]:
    """The same of one decoder layer: the role of each, its name within the layer, and itself."""
    for role in architecture.roles(layer):
        path = architecture.projections[role]
        for name, part in layer.get_submodule(path).named_modules(prefix=path):
            if isinstance(part, nn.Linear):
                yield role, name, part


def put_empty(
    module: nn.Module, bits: Mapping[str, int | None], *, kind: type[QuantizedLinear], group_size: int
) -> list[str]:
    """Make room for quantized weights in the linear layers of ``module``.

    Args:
        module: that they are in.
        bits: of each, by its name.
        kind: of layer that they become.
        group_size: numbers of a row that share a scale.

    Returns:
        The names of their tensors.
    """
    tensors = []
    for name, each in bits.items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert each is not None
        module.set_submodule(name, kind.empty_like(linear, bits=each, group_size=group_size))
        tensors += [f"{name}.{key}" for key in (WEIGHT_PACKED, WEIGHT_SCALE, WEIGHT_SHAPE)]
    return tensors
