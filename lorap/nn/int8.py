"""torchao: linear layers whose weights are int8 with one scale a row, and how they get into safetensors and back.

A quantized layer ``down_proj`` is stored as::

    down_proj._weight_qdata   (out_features, in_features) int8
    down_proj._weight_scale   (out_features, 1)
    down_proj.bias            as before
    down_proj.weight          (1,), the guard of lorap/nn/low_rank_tensors.py: without it other hosts would fill in random numbers

While a checkpoint is read, each layer is an :class:`Int8Slot` with just these tensors; afterwards it is an ``nn.Linear`` again
whose weight is a ``torchao.quantization.Int8Tensor``.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.errors import BackendError
from lorap.nn.low_rank_tensors import GUARD_VALUE
from lorap.nn.low_rank_tensors import INT8_DATA as DATA
from lorap.nn.low_rank_tensors import INT8_SCALE as SCALE
from lorap.nn.quantized import decoder_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int8Slot(nn.Module):
    """The stored tensors of one quantized linear layer, empty until a checkpoint fills them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        where = linear.weight.device
        self.register_buffer(DATA, torch.empty(linear.weight.shape, dtype=torch.int8, device=where))
        self.register_buffer(SCALE, torch.empty(linear.out_features, 1, dtype=linear.weight.dtype, device=where))
        self.register_buffer("weight", torch.full((1,), GUARD_VALUE, dtype=linear.weight.dtype, device=where))
        self.bias = linear.bias

    def to_linear(self) -> nn.Linear:
        """The layer that computes with them."""
        data: Tensor = getattr(self, DATA)
        out_features, in_features = data.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(_int8_tensor(data, getattr(self, SCALE)), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)


def quantize_weights(model: PreTrainedModel) -> None:
    """Round the weights of :func:`decoder_linears` to int8, symmetric, one scale a row; biases stay.

    Raises:
        BackendError: torchao is not installed.
    """
    check_installed()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    wanted = dict(decoder_linears(model))
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in wanted)
    for linear in wanted.values():
        weight: Any = linear.weight
        # float32 scales would be rounded to the model's dtype when it is loaded, and are when torchao multiplies.
        scale = weight.scale.to(weight.dtype)
        linear.weight = nn.Parameter(_int8_tensor(weight.qdata, scale), requires_grad=False)


def put_slots(model: PreTrainedModel) -> list[str]:
    """Make room for the tensors of a quantized checkpoint in an empty model; returns their names."""
    names = []
    for name, linear in list(decoder_linears(model)):
        model.set_submodule(name, Int8Slot(linear))
        names += [f"{name}.{key}" for key in (DATA, SCALE)]
    return names


def fill_slots(model: PreTrainedModel) -> None:
    """Every :class:`Int8Slot` becomes the linear layer that it holds."""
    for name, slot in [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Slot)]:
        model.set_submodule(name, slot.to_linear())


def flat_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in tensors that safetensors can hold."""
    flat = {}
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "qdata"):
            layer = name.removesuffix("weight")
            flat[layer + DATA], flat[layer + SCALE] = tensor.qdata, tensor.scale
            flat[name] = tensor.scale.new_full((1,), GUARD_VALUE)
        else:
            flat[name] = tensor
    return flat


def check_installed() -> None:
    """Raises:
    BackendError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise BackendError("int8 weights need torchao, which is not installed: pip install 'lorap[quant]'")


def _int8_tensor(data: Tensor, scale: Tensor) -> Tensor:
    from torchao.quantization import Int8Tensor

    return Int8Tensor(data, scale, block_size=[1, data.shape[1]], dtype=scale.dtype)  # type: ignore[no-any-return]
