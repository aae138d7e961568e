"""The tensors of a decoder layer in the order of ``torch.ops.lorap_cpu.decoder_layer``, while calling it means no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import ATTENTION, MLP
from lorap.nn.linear import Linear, LowRankLinear, has_global_hooks
from lorap.nn.low_rank_tensors import WEIGHT_PACKED, WEIGHT_SCALE
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import TrellisLinear

NONE = torch.empty(0)
_GONE = object()
# Tensors with dtypes of their own.
NUMBERS = {WEIGHT_PACKED, WEIGHT_SCALE, "pivot_rows"}
# Forms of a dense projection with weights in few bits; those of a pair are the next ones.
STORED: dict[type, int] = {QuantizedLinear: 2, TrellisLinear: 4}


@dataclass
class Weights:
    """The tensors of one decoder layer, and what must stay as it is for them to be all that it computes with.

    Args:
        dtype: of x.
        tensors: in the order of the op (csrc/cpu/decoder_layer_ops.cpp).
        forms: of the seven projections.
        modules: all that are called, and of which class; hooks would be in their attributes.
        members: what is to be found under which name in which dictionary of a module.
        floats: those of the tensors that have the dtype of x.
    """

    dtype: torch.dtype
    tensors: list[Tensor] = field(default_factory=list)
    forms: list[int] = field(default_factory=list)
    modules: list[tuple[nn.Module, type, dict[str, Any]]] = field(default_factory=list)
    members: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    floats: list[Tensor] = field(default_factory=list)

    def hold(self) -> bool:
        """Whether calling the layer still means these tensors and nothing else."""
        if has_global_hooks():
            return False
        for module, kind, attributes in self.modules:
            if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or "forward" in attributes:
                return False
            if module.__class__ is not kind:
                return False
        for dictionary, name, member in self.members:
            if dictionary.get(name, _GONE) is not member:
                return False
        return all(tensor.dtype is self.dtype for tensor in self.floats)

    def calls(self, module: nn.Module) -> None:
        """Count ``module`` among those that must stay as they are."""
        self.modules.append((module, module.__class__, vars(module)))


def collect(layer: Any, dtype: torch.dtype) -> Weights | None:
    """The weights of a layer; None where calling it means more than the op computes."""
    found = Weights(dtype)
    parts = layer._modules
    attention, mlp, first = parts["self_attn"], parts["mlp"], parts["input_layernorm"]
    found.members.extend((parts, name, parts[name]) for name in ("self_attn", "mlp"))
    found.calls(attention)
    found.calls(mlp)
    # In training it drops some of what it attends to.
    found.members.append((vars(attention), "training", False))
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
            found.members += [(owner, name, norm), (vars(norm), "variance_epsilon", norm.variance_epsilon)]
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
    if kind in STORED:
        found.tensors += _taken(found, module, WEIGHT_PACKED, WEIGHT_SCALE, "bias")
        return STORED[kind] + 8 * module.bits + 128 * module.group_size
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
    kind = type(left)
    alike = type(right) is kind in STORED and (right.bits, right.group_size) == (left.bits, left.group_size)
    if not alike or own[1] is not NONE:
        return None
    for part in (left, right):
        found.tensors += _taken(found, part, WEIGHT_PACKED, WEIGHT_SCALE)
    found.tensors += bias
    return 1 + STORED[kind] + 8 * left.bits + 128 * left.group_size


def _taken(found: Weights, module: Any, *names: str) -> list[Tensor]:
    """Parameters and buffers of a module, which from now on must stay; NONE for what is None.

    Where a module has no such name any more, since something else computes its weight, :meth:`Weights.hold` is false.
    """
    found.calls(module)
    tensors = []
    for name in names:
        dictionary = module._parameters if name in module._parameters else module._buffers
        tensor = dictionary.get(name)
        found.members.append((dictionary, name, tensor))
        tensors.append(NONE if tensor is None else tensor)
        if name not in NUMBERS and tensor is not None:
            found.floats.append(tensor)
    return tensors
