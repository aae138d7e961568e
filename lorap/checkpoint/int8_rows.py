"""int8 weights with one scale a row, which lorap wrote before it had packed ones (format versions 3 and 4), as it reads them.

A layer ``down_proj`` is stored as::

    down_proj._weight_qdata   (out_features, in_features) int8
    down_proj._weight_scale   (out_features, 1), in the dtype of the model
    down_proj.bias            as before
    down_proj.weight          (1,), the guard of lorap/nn/low_rank_tensors.py

While a checkpoint is read, each is an :class:`Int8Rows` with just these tensors; afterwards a projection is packed, and each
group of a row has its scale. Other linear layers, such as those of linear attention, were int8 as well; they become floating
point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorap.checkpoint.finite import check_scales
from lorap.errors import CheckpointError
from lorap.nn.low_rank_tensors import GUARD_VALUE, INT8_DATA, INT8_SCALE
from lorap.nn.quantized import QuantizedLinear, decoder_linears, packed_linears
from lorap.weights import INTEGERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int8Rows(nn.Module):
    """The stored tensors of one linear layer, empty until a checkpoint fills them.

    Args:
        linear: the layer in whose place it is; its bias is taken over.
        is_projection: whether it will be packed.
    """

    def __init__(self, linear: nn.Linear, *, is_projection: bool) -> None:
        super().__init__()
        weight, self.is_projection = linear.weight, is_projection
        self.register_buffer(INT8_DATA, torch.empty_like(weight, dtype=torch.int8))
        self.register_buffer(INT8_SCALE, weight.new_empty(linear.out_features, 1))
        self.register_buffer("weight", weight.new_full((1,), GUARD_VALUE))
        self.bias = linear.bias

    def layer(self, name: str) -> QuantizedLinear | nn.Linear:
        """What computes with them, with the same weights.

        Args:
            name: full name, for messages.

        Raises:
            CheckpointError: they were left on the disk, or are no such numbers.
        """
        numbers: Tensor = getattr(self, INT8_DATA)
        scales: Tensor = getattr(self, INT8_SCALE)
        if numbers.is_meta or (self.bias is not None and self.bias.is_meta):
            raise CheckpointError(
                f"{name} is int8 as older versions of lorap wrote it, which cannot stay on the disk; open the model in memory, "
                "save it with save_pretrained, and open what was saved"
            )
        if numbers.dtype != torch.int8:
            raise CheckpointError(f"{name}.{INT8_DATA} is {numbers.dtype}; torch.int8 is needed")
        check_scales(scales, f"{name}.{INT8_SCALE}")
        rows, columns = numbers.shape
        if self.is_projection:
            group = INTEGERS.group_size
            scales = scales.expand(rows, -(-columns // group)).contiguous()
            packed = QuantizedLinear.from_numbers(numbers, scales, bits=8, group_size=group, bias=self.bias)
            return packed.train(self.training)
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(numbers.to(scales.dtype) * scales, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)


def put_rows(model: PreTrainedModel) -> list[str]:
    """Make room for such tensors in every linear layer of an empty model's decoder; returns their names."""
    linears, projections = dict(decoder_linears(model)), dict(packed_linears(model))
    for name, linear in linears.items():
        model.set_submodule(name, Int8Rows(linear, is_projection=name in projections))
    return [f"{name}.{key}" for name in linears for key in (INT8_DATA, INT8_SCALE)]


def pack_rows(model: nn.Module) -> None:
    """Every :class:`Int8Rows` becomes the layer that computes with it.

    Raises:
        CheckpointError: naming the first tensor that cannot be used.
    """
    for name, rows in [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Rows)]:
        model.set_submodule(name, rows.layer(name))
