"""The contract of a decoder layer, and its verification: what lorap takes for granted of the seven linear layers.

- Each is called once in a forward pass of its layer.
- q, k and v read one tensor; gate and up read one tensor.
- Values reach o through v alone, or k where they are the keys, or an earlier layer's v; what o gives is what attention gives.
- down reads act(gate) * up and nothing else, and what down gives is what the FFN gives.
- Experts, once per layer, give the sum of what those that the router chose for a token give, times its weights; each is an FFN as
  above. Routers, and what FFNs add beside their experts, are nobody's concern.

Statistics are summed up once per shared input, channels are dropped from gate, up and down together, and kernels fuse what lies
between them: each is wrong where the contract does not hold, and nothing else that a layer does matters. So a row of
:mod:`lorap.architectures` is compared with what the layer computes, on its own weights and random tokens, before anything is
compressed. Attention is not computed again: its scores may be scaled, capped, windowed or gated in any way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorap.architectures import SHARED_INPUTS, text_config
from lorap.architectures.experts import Experts
from lorap.calibration.context import DecoderContext, on_device
from lorap.calibration.shared_keys import SilentStates
from lorap.calibration.stream import CalibrationStream, run_layer
from lorap.calibration.windows import TokenWindows
from lorap.distributed import SINGLE_PROCESS
from lorap.errors import ArchitectureError

TOKENS = 8
# Largest relative difference of what should be equal. The same operations on the same numbers give the same, but kernels may
# choose another order; another activation differs by 3 % and more.
TOLERANCE = 1e-4
# What gives values to a layer that has none of its own.
SHARED = "the earlier layer's v_proj"


@dataclass
class _Calls:
    """What one module was called with in one forward pass of its layer, and what it gave."""

    count: int = 0
    read: Tensor | None = None
    args: tuple[Any, ...] = ()
    gave: Tensor | None = None


@torch.no_grad()
def verify_contract(context: DecoderContext) -> None:
    """Refuse a model that is not what its row says, by running one layer of each kind on a few random tokens.

    Args:
        context: the dense model, in memory or offloaded.

    Raises:
        ArchitectureError: naming the layer, the modules and the difference.
    """
    ids = torch.randint(context.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    stream = CalibrationStream.from_windows(replace(context, processes=SINGLE_PROCESS), TokenWindows(ids, "", ""))
    handed_over = False
    for index in _one_of_each_kind(context):
        if context.architecture.reads_keys(context.layers[index]) and not handed_over:
            _hand_over(context, stream, before=index)
            handed_over = True
        with on_device(context.layers[index], context.device):
            _Layer(context, stream, index).verify()


def _hand_over(context: DecoderContext, stream: CalibrationStream, *, before: int) -> None:
    """Run the layers whose keys and values later ones attend to."""
    for index, layer in enumerate(context.layers[:before]):
        if context.architecture.gives_keys(layer):
            with on_device(layer, context.device):
                run_layer(layer, stream.batches[0].hidden.clone(), stream.batches[0], index)


def _one_of_each_kind(context: DecoderContext) -> Iterator[int]:
    """The first layer of each structure and each kind of attention."""
    kinds = getattr(text_config(context.model.config), "layer_types", None) or ()
    seen = set()
    for index, layer in enumerate(context.layers):
        structure = tuple((name, type(module)) for name, module in layer.named_modules())
        kind = structure, kinds[index] if index < len(kinds) else None
        if kind not in seen:
            seen.add(kind)
            yield index


class _Layer:
    """One decoder layer beside its row."""

    def __init__(self, context: DecoderContext, stream: CalibrationStream, index: int) -> None:
        self.context, self.index = context, index
        self.layer, (self.batch,) = context.layers[index], stream.batches
        self.architecture = context.architecture
        self.linears = self.architecture.linears(self.layer)

    def verify(self) -> None:
        experts = self.architecture.experts(self.layer)
        parts = {"mlp": experts.module if experts else self.layer.get_submodule(self.architecture.mlp)}
        parts["attention"] = self.architecture.attention_of(self.layer)
        modules: dict[str, nn.Module] = {**self.linears, **parts}
        calls = self._run(modules)
        for role, linear in self.linears.items():
            if calls[role].count != 1:
                raise self._refusal(
                    f"{self._name(role)} is called {calls[role].count} times in one forward pass, not once"
                )
            twins = [other for other, module in self.linears.items() if module is linear and other != role]
            if twins:
                raise self._refusal(f"{' and '.join(sorted([role, *twins]))} are both {self._name(role)}")
        for first, *others in (readers for readers in SHARED_INPUTS.values() if readers[0] in self.linears):
            for other in (role for role in others if role in self.linears):
                self._same(calls[other].read, calls[first].read, f"what {other} reads is not what {first} reads")
        if experts:
            self._verify_experts(experts, calls["mlp"])
        else:
            self._verify_ffn(calls)
        if "o_proj" in self.linears:
            self._verify_attention(calls)

    def _verify_ffn(self, calls: Mapping[str, _Calls]) -> None:
        inner = self.architecture.activation_of(self.layer)(_given(calls["gate_proj"])) * _given(calls["up_proj"])
        what = f"what down_proj reads is not {self._activation()}(gate_proj) * up_proj"
        self._same(calls["down_proj"].read, inner, what)
        self._same(calls["mlp"].gave, calls["down_proj"].gave, "what the FFN gives is not what down_proj gives")

    def _verify_experts(self, experts: Experts, calls: _Calls) -> None:
        name = self.architecture.ffn_name(self.index, self.layer)
        if calls.count != 1 or len(calls.args) != 3:
            raise self._refusal(
                f"{name} is called {calls.count} times with {len(calls.args)} arguments in one forward pass, not once with "
                "hidden states, experts and weights"
            )
        activation, (x, chosen, weights) = self.architecture.activation_of(self.layer), calls.args
        expected = torch.zeros_like(x)
        for expert in range(experts.count):
            gate, up, down = experts.weights(expert)
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            found = (activation(x[rows] @ gate.T) * (x[rows] @ up.T)) @ down.T * weights[rows, places, None]
            expected.index_add_(0, rows, found.to(expected.dtype))
        what = f"what {name} gives is not the sum of {self._activation()}(gate_proj) * up_proj through down_proj, by weight"
        self._same(calls.gave, expected, what)

    def _verify_attention(self, calls: Mapping[str, _Calls]) -> None:
        self._same(calls["attention"].gave, calls["o_proj"].gave, "what attention gives is not what o_proj gives")
        source = next((role for role in ("v_proj", "k_proj") if role in self.linears), "")
        silenced = self._run({"o_proj": self.linears["o_proj"]}, silent=source or SHARED)["o_proj"]
        left, whole = _norm(silenced.read), _norm(calls["o_proj"].read)
        if left > TOLERANCE * whole:
            share = left / whole if whole else math.inf
            raise self._refusal(f"with {source or SHARED} silenced, {share:.3g} of what o_proj reads stays")

    def _run(self, modules: Mapping[str, nn.Module], silent: str = "") -> dict[str, _Calls]:
        """One forward pass of the layer; what ``modules`` read and gave in it, with the output of the role ``silent`` zero."""
        calls = {name: _Calls() for name in modules}

        def note(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                found = calls[name]
                found.count += 1
                found.args, found.read = args, args[0] if args else next(iter(kwargs.values()))
                found.gave = output[0] if isinstance(output, tuple) else output

            return hook

        with ExitStack() as hooks:
            for name, module in modules.items():
                hooks.callback(module.register_forward_hook(note(name), with_kwargs=True).remove)
            shared = None
            if silent == SHARED and self.batch.shared is not None:
                shared = SilentStates(self.batch.shared)
            elif silent:
                linear = self.linears[silent]
                hooks.callback(linear.register_forward_hook(lambda _module, _args, output: output * 0).remove)
            # Layers may change what they are given in place.
            run_layer(self.layer, self.batch.hidden.clone(), self.batch, self.index, shared=shared)
        return calls

    def _same(self, found: Tensor | None, expected: Tensor | None, what: str) -> None:
        if found is None or expected is None or found.shape != expected.shape:
            shapes = [None if one is None else tuple(one.shape) for one in (found, expected)]
            raise self._refusal(f"{what}: shapes {shapes[0]} and {shapes[1]}")
        difference = float((found.double() - expected.double()).norm()) / max(_norm(expected), 1e-30)
        if not difference <= max(TOLERANCE, 2 * torch.finfo(found.dtype).eps):
            raise self._refusal(f"{what}, the relative difference is {difference:.3g}")

    def _name(self, role: str) -> str:
        return self.architecture.module_name(self.index, role)

    def _activation(self) -> str:
        activation = self.architecture.activation_of(self.layer)
        return getattr(activation, "__name__", type(activation).__name__)

    def _refusal(self, what: str) -> ArchitectureError:
        model_type = self.context.model.config.model_type
        return ArchitectureError(
            f"{self.architecture.layers}.{self.index} is not what lorap knows of {model_type} models: {what}; nothing was "
            f"compressed. transformers here is {transformers.__version__}: use one that docs/models.md names"
        )


def _given(calls: _Calls) -> Tensor:
    assert calls.gave is not None
    return calls.gave


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.double().norm())
