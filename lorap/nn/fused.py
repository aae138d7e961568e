"""Projections that read the same activations, run as one: q, k and v; gate and up.

A decode step is bound by memory and by the number of kernel launches. Merging leaves every weight, name and checkpoint key
where it is and changes only how forward runs: the first of q, k, v to be called computes all three in one grouped op and the
others collect their share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lorap.architectures import MLP, SHARED_INPUTS, Architecture, known_architecture
from lorap.errors import ConfigError
from lorap.nn import ops
from lorap.nn.decoder_layer import fuse_decoder_layer
from lorap.nn.dtypes import float32_names
from lorap.nn.linear import Linear, LowRankLinear, has_plain_factors, is_autocast, is_plain, is_untouched
from lorap.nn.packed_group import in_one_launch
from lorap.nn.padding import pad_ranks
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.warming import capture_steps, warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
# What transformers makes of "silu" and of "swish".
SILU = (type(ACT2FN["silu"]), nn.SiLU)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SharedInput:
    """A group of projections that read the same x. Not a module: the projections own their parameters, as before."""

    def __init__(self, members: Sequence[LowRankLinear | Linear]) -> None:
        self.members = list(members)
        self._waiting: tuple[Tensor, int | None, list[Tensor | None]] | None = None
        self._rows: dict[tuple[int, torch.device], Tensor] = {}
        for member in self.members:
            member.group = self

    def output(self, member: LowRankLinear | Linear, x: Tensor) -> Tensor | None:
        """The output of one member, computed with the others or collected; None where it must run by itself."""
        index = next(i for i, candidate in enumerate(self.members) if candidate is member)
        waiting, version = self._waiting, _version(x)
        if waiting is not None and waiting[0] is x and waiting[1] == version and waiting[2][index] is not None:
            y, waiting[2][index] = waiting[2][index], None
            if all(part is None for part in waiting[2]):
                self._waiting = None
            return y
        outputs = self._outputs(x)
        if outputs is None:
            return None
        parts: list[Tensor | None] = list(outputs.split([member.out_features for member in self.members], dim=-1))
        y, parts[index] = parts[index], None
        self._waiting = (x, version, parts)
        return y

    def _outputs(self, x: Tensor) -> Tensor | None:
        """(..., out_features of all members), or None where each must run by itself."""
        if self._can_merge(x) and (run := ops.served("low_rank_linear_group", x)) is not None:
            y: Tensor = run(x, *self._factors())
            return y
        return in_one_launch(x, self.members)

    def _can_merge(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or is_autocast(x):
            return False
        return all(
            has_plain_factors(member)
            if isinstance(member, LowRankLinear)
            else is_untouched(member) and type(member.weight) is nn.Parameter
            for member in self.members
        )

    def _factors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """right, left, bias and pivot_rows of each member, the last two empty where none has them.

        A dense member is a pivoted layer whose every row is a pivot.
        """
        right: list[Tensor] = []
        left: list[Tensor] = []
        bias, pivots = [], []
        for member in self.members:
            if isinstance(member, LowRankLinear):
                for found, factor in zip((right, left), member.factors(), strict=True):
                    found.append(factor)
                pivots.append(_or_empty(member.pivot_rows, member.right.weight))
            else:
                right.append(member.weight)
                left.append(member.weight.new_empty(0, member.out_features))
                pivots.append(self._all_rows(member))
            bias.append(_or_empty(member.bias, right[-1]))
        some_bias = bias if any(b.numel() for b in bias) else []
        return right, left, some_bias, pivots if any(p.numel() for p in pivots) else []

    def _all_rows(self, member: Linear) -> Tensor:
        key = (member.out_features, member.weight.device)
        if key not in self._rows:
            self._rows[key] = torch.arange(member.out_features, device=member.weight.device)
        return self._rows[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_waiting": None, "_rows": {}}  # a copy of a model takes no activations along


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate, up and the product in one op; takes the place of a transformers MLP.

    The children keep their names, so the state dict does too.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    @property
    def in_features(self) -> int:
        """Size of the last axis of the input."""
        width: Any = self.gate_proj.in_features
        return int(width)

    @property
    def intermediate_size(self) -> int:
        """Width of the FFN."""
        width: Any = self.gate_proj.out_features
        return int(width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to (..., hidden)."""
        inner = self.gated(x)
        if inner is None:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(inner)
        return y

    def gated(self, x: Tensor) -> Tensor | None:
        """silu(gate(x)) * up(x), (..., hidden) to (..., intermediate_size), in one op; None where each must run by itself."""
        gate: Any = self.gate_proj
        up: Any = self.up_proj
        if is_autocast(x) or torch.is_grad_enabled():
            return None
        if is_plain(gate) and is_plain(up):
            run = ops.served("silu_gated_linear", x)
            return None if run is None else run(x, gate.weight, up.weight, gate.bias, up.bias)
        if type(gate) is type(up) is QuantizedLinear:
            return _gated_quantized(x, gate, up)
        if not all(isinstance(one, LowRankLinear) and has_plain_factors(one) for one in (gate, up)):
            return None
        pivoted = gate.pivot_rows is not None or up.pivot_rows is not None
        if pivoted or (run := ops.served("low_rank_silu_gated_linear", x)) is None:
            return None
        bias = [] if gate.bias is None and up.bias is None else [_bias_or_zeros(gate), _bias_or_zeros(up)]
        right, left = zip(gate.factors(), up.factors(), strict=True)
        return run(x, list(right), list(left), bias)


def _gated_quantized(x: Tensor, gate: QuantizedLinear, up: QuantizedLinear) -> Tensor | None:
    """The same of weights in few bits; None where a bias or a hook is in the way, or their bits differ."""
    plain = all(one.bias is None and is_untouched(one) for one in (gate, up))
    alike = (gate.bits, gate.group_size) == (up.bits, up.group_size)
    if not plain or not alike or (run := ops.served("quantized_silu_gated_linear", x)) is None:
        return None
    weights = (gate.weight_packed, gate.weight_scale, up.weight_packed, up.weight_scale)
    y: Tensor = run(x, *weights, gate.bits, gate.group_size)
    return y


def merge_shared_inputs(model: Model) -> Model:
    """Run q/k/v and gate/up of every decoder layer as one op each, for inference; changes ``model`` and returns it.

    Weights, names and checkpoints stay as they are. Training, adapters, hooks and long inputs keep working: where the merged
    op does not apply or does not pay, each projection runs by itself. An FFN whose activation is not SiLU, and experts, stay as
    they are.

    Raises:
        ArchitectureError: the model's family is unknown.
    """
    architecture = known_architecture(model, to="merge the projections of", experts=True)
    for layer in architecture.decoder_layers(model):
        _merge_layer(layer, architecture)
    return model


def optimize_for_inference(model: Model, *, dtype: torch.dtype | None = None, compile: bool = False) -> Model:
    """:func:`merge_shared_inputs`, and every other dense projection and the output head through ``torch.ops.lorap.linear``.

    For generation, most of all on a CPU, where torch reaches half of the memory's bandwidth or less. Dense and compressed
    models alike; logits are as before, within what their dtype resolves. Changes ``model`` and returns it. On a GPU it also
    compiles the kernels that a CUDA graph of one token takes (:func:`lorap.warm_up`).

    Args:
        model: in transformers.
        dtype: cast the weights first: float32, bfloat16 or float16; None leaves them. What the model computes in float32
            whatever its weights are, such as rotary frequencies, stays as ``from_pretrained(dtype=...)`` would leave it.
        compile: on a GPU, give the model a static cache, with which transformers' ``generate`` compiles a step and captures it
            in a CUDA graph (torch.compile, ``reduce-overhead``); kept in ``model.generation_config`` as if set there by hand.
            On a CPU nothing is compiled: the step in one C++ call is faster than a compiled one.

    Raises:
        ArchitectureError: as merge_shared_inputs.
        ConfigError: another dtype.
    """
    if dtype is not None:
        _cast(model, dtype)
    architecture = known_architecture(model, to="merge the projections of", experts=True)
    for layer in architecture.decoder_layers(model):
        optimize_layer(layer, architecture)
    if isinstance(getattr(model, "lm_head", None), nn.Linear):
        _swap_linear(model, "lm_head")
    pad_ranks(model)
    warm_up(model)
    if compile:
        capture_steps(model)
    return model


def optimize_layer(layer: nn.Module, architecture: Architecture) -> None:
    """What :func:`optimize_for_inference` does to each decoder layer; changes ``layer``."""
    _merge_layer(layer, architecture)
    for role in _alone(layer, architecture):
        _swap_linear(layer, architecture.projections[role])
    fuse_decoder_layer(layer)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights and stored buffers to ``dtype``; buffers that are computed and not stored, and quantized weights, stay."""
    if dtype not in DTYPES:
        raise ConfigError(f"cannot cast a model to {dtype}; choose from {', '.join(map(str, DTYPES))}, or quantize it")
    float32 = float32_names(model, dtype)

    def of(path: str, name: str) -> torch.dtype:
        return torch.float32 if f"{path}.{name}" in float32 else dtype

    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.to(of(path, name))
        for name, buffer in module._buffers.items():
            stored = buffer is not None and name not in module._non_persistent_buffers_set
            if stored and buffer.is_floating_point():  # type: ignore[union-attr]
                module._buffers[name] = buffer.to(of(path, name))  # type: ignore[union-attr]
    model.config.dtype = dtype


def _merge_layer(layer: nn.Module, architecture: Architecture) -> None:
    _merge_attention(layer, architecture)
    mlp = layer.get_submodule(architecture.mlp)
    if architecture.experts(layer):
        return  # transformers runs them in one grouped op each, which is as good
    if not isinstance(mlp, GatedMLP) and is_untouched(mlp) and _is_silu(architecture.activation_of(layer)):
        parts = [layer.get_submodule(architecture.projections[role]) for role in MLP]
        layer.set_submodule(architecture.mlp, GatedMLP(*parts).train(mlp.training))


def _merge_attention(layer: nn.Module, architecture: Architecture) -> None:
    roles = [role for role in SHARED_INPUTS["attention_input"] if role in architecture.roles(layer)]
    members = [_swap_linear(layer, architecture.projections[role]) for role in roles]
    ours = all(isinstance(member, (LowRankLinear, Linear)) for member in members)
    if ours and members[1:] and any(member.group is None for member in members):
        SharedInput(members)


def _alone(layer: nn.Module, architecture: Architecture) -> list[str]:
    """The projections that no op of several computes: o and down; gate and up where the activation is not SiLU."""
    fused = isinstance(layer.get_submodule(architecture.mlp), GatedMLP)
    together = SHARED_INPUTS["attention_input"] + (SHARED_INPUTS["mlp_input"] if fused else ())
    return [role for role in architecture.roles(layer) if role not in together]


def _is_silu(activation: Any) -> bool:
    """Whether an FFN calls SiLU and nothing else. The module is asked, since configs name it in several fields."""
    return (type(activation) in SILU and is_untouched(activation)) or activation is F.silu


def _swap_linear(parent: nn.Module, path: str) -> Any:
    old: Any = parent.get_submodule(path)
    if is_plain(old):
        parent.set_submodule(path, Linear.from_linear(old))
    return parent.get_submodule(path)


def _version(x: Tensor) -> int | None:
    """Grows when x is changed in place; None where torch does not count."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _bias_or_zeros(layer: LowRankLinear) -> Tensor:
    return layer.left.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
