"""The tensors of a decoder layer in the order of ``torch.ops.lorap_cpu.decoder_layer``, while calling it means no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import ATTENTION, MLP
from lorap.nn.linear import Linear, LowRankLinear
from lorap.nn.low_rank_tensors import WEIGHT_PACKED, WEIGHT_SCALE
from lorap.nn.quantized import QuantizedLinear

NONE = torch.empty(0)
# Tensors with dtypes of their own.
NUMBERS = {WEIGHT_PACKED, WEIGHT_SCALE, "pivot_rows"}


@dataclass
class Weights:
    """The tensors of one decoder layer, and what must stay as it is for them to be all that it computes with.

    Args:
        dtype: of x.
        tensors: in the order of the op (csrc/cpu/decoder_layer_ops.cpp).
        forms: of the seven projections.
        modules: the attributes of all modules; hooks would be there.
        members: what is to be found under which name in which dictionary of a module.
        floats: those of the tensors that have the dtype of x.
    """

    dtype: torch.dtype
    tensors: list[Tensor] = field(default_factory=list)
    forms: list[int] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)
    members: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    floats: list[Tensor] = field(default_factory=list)

    def hold(self) -> bool:
        """Whether calling the layer still means these tensors and nothing else."""
        for attributes in self.modules:
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
                return False
        for dictionary, name, member in self.members:
            if dictionary[name] is not member:
                return False
        return all(tensor.dtype is self.dtype for tensor in self.floats)


def collect(layer: Any, dtype: torch.dtype) -> Weights | None:
    """The weights of a layer; None where calling it means more than the op computes."""
    found = Weights(dtype)
    parts = layer._modules
    attention, mlp, first = parts["self_attn"], parts["mlp"], parts["input_layernorm"]
    found.members.extend((parts, name, parts[name]) for name in ("self_attn", "mlp"))
    found.modules.extend((vars(attention), vars(mlp)))
    if not hasattr(type(mlp), "gated"):
        return None
    within = attention._modules
    for owner, name in (
        (parts, "input_layernorm"),
        (parts, "post_attention_layernorm"),
        (within, "q_norm"),
        (within, "k_norm"),
    ):
        norm = owner.get(name)
        if norm is None:
            found.tensors.append(NONE)
        elif type(norm).__name__.endswith("RMSNorm") and norm.variance_epsilon == first.variance_epsilon:
            found.members.append((owner, name, norm))
            found.tensors += _taken(found, norm, "weight")
        else:
            return None
    for owner, roles in ((within, ATTENTION), (mlp._modules, MLP)):
        for role in roles:
            found.members.append((owner, role, owner[role]))
            form = _projection(found, owner[role])
            if form is None:
                return None
            found.forms.append(form)
    ours = all(one is NONE or (one.is_cpu and type(one) in (Tensor, nn.Parameter)) for one in found.tensors)
    return found if ours and found.hold() else None


def _projection(found: Weights, module: Any) -> int | None:
    """Adds the tensors of a projection, and returns its form (csrc/cpu/decoder_layer_ops.cpp); None for other layers."""
    kind = type(module)
    if kind is Linear or kind is nn.Linear:
        found.tensors += _taken(found, module, "weight", "bias")
        return 0
    if kind is QuantizedLinear:
        found.tensors += _taken(found, module, WEIGHT_PACKED, WEIGHT_SCALE, "bias")
        return 2 + 4 * module.bits + 64 * module.group_size
    if kind is not LowRankLinear:
        return None
    right, left = module._modules["right"], module._modules["left"]
    found.members.extend((module._modules, name, module._modules[name]) for name in ("right", "left"))
    own = _taken(found, module, "output_bias", "pivot_rows")
    bias = (
        [own[0]]
        if module.output_bias is not None
        else _taken(found, left, "bias")
        if hasattr(left, "bias")
        else own[:1]
    )
    if type(right) is type(left) is nn.Linear:
        found.tensors += _taken(found, right, "weight") + _taken(found, left, "weight") + bias + own[1:]
        return 1
    alike = type(right) is type(left) is QuantizedLinear and (right.bits, right.group_size) == (
        left.bits,
        left.group_size,
    )
    if not alike or own[1] is not NONE:
        return None
    for part in (left, right):
        found.tensors += _taken(found, part, WEIGHT_PACKED, WEIGHT_SCALE)
    found.tensors += bias
    return 3 + 4 * left.bits + 64 * left.group_size


def _taken(found: Weights, module: Any, *names: str) -> list[Tensor]:
    """Parameters and buffers of a module, which from now on must stay; NONE for what is None."""
    found.modules.append(vars(module))
    tensors = []
    for name in names:
        dictionary = module._parameters if name in module._parameters else module._buffers
        found.members.append((dictionary, name, dictionary[name]))
        tensors.append(NONE if dictionary[name] is None else dictionary[name])
        if name not in NUMBERS and dictionary[name] is not None:
            found.floats.append(tensors[-1])
    return tensors
