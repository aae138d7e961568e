"""The calibration windows on their way through the decoder, one layer at a time.

The stream starts as the inputs of the first layer. For each layer it is first *observed* (the layer runs, its linear inputs
are summed up, the outputs are thrown away) and, once the layer is compressed, *advanced* (the outputs become the inputs of the
next layer). So the statistics of layer i come from inputs that the compressed layers 0 .. i-1 produced.

What a layer wants besides the hidden states (rotary tables, a causal or sliding mask) is taken from the model's own forward
pass, so that nothing here depends on the model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.calibration.data import TokenWindows
from lorap.calibration.statistics import ActivationStats

# Tokens that run through a layer at once: large enough for efficient matmuls, small next to a layer's weights.
BATCH_TOKENS = 2048


@dataclass
class Batch:
    """Windows that travel together.

    Args:
        hidden: (windows, seq_len, hidden_size), the inputs of the next layer.
        mask: (windows, seq_len) bool, False on padding; None where every token is real.
        layer_kwargs: keyword arguments of each decoder layer, as the model passes them.
    """

    hidden: Tensor
    mask: Tensor | None
    layer_kwargs: Sequence[Mapping[str, Any]]


class CalibrationStream:
    """Hidden states of all calibration windows, between two decoder layers."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: Any,
        layers: Iterable[nn.Module],
        windows: TokenWindows,
        *,
        device: torch.device,
        batch_tokens: int = BATCH_TOKENS,
    ) -> CalibrationStream:
        """Run the embedding only: every decoder layer is bypassed, but notes what it was called with."""
        home = next(model.parameters()).device
        layers = list(layers)
        size = max(1, batch_tokens // windows.input_ids.shape[1])
        batches = []
        for start in range(0, len(windows.input_ids), size):
            ids = windows.input_ids[start : start + size].to(home)
            mask = None if windows.attention_mask is None else windows.attention_mask[start : start + size].bool()
            with _bypassed(layers) as calls:
                attention_mask = None if mask is None else mask.to(home)
                model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            hidden = calls[0][0].to(device)
            batches.append(
                Batch(
                    hidden=hidden,
                    mask=None if mask is None else mask.to(device),
                    layer_kwargs=[_to_device(kwargs, device) for _, kwargs in calls],
                )
            )
        return cls(batches)

    @torch.no_grad()
    def observe(
        self, index: int, layer: nn.Module, inputs: Mapping[str, nn.Linear], *, moments: Mapping[str, bool]
    ) -> dict[str, ActivationStats]:
        """Statistics of the inputs of the given linear layers, by the names of ``inputs``."""
        stats = {
            name: ActivationStats(linear.in_features, moments=moments.get(name, False), device=linear.weight.device)
            for name, linear in inputs.items()
        }
        for batch in self.batches:
            with ExitStack() as hooks:
                for name, linear in inputs.items():
                    handle = linear.register_forward_pre_hook(_updater(stats[name], batch.mask))
                    hooks.callback(handle.remove)
                _run(layer, batch, index)
        return stats

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of ``layer``."""
        for batch in self.batches:
            batch.hidden = _run(layer, batch, index)


def _run(layer: nn.Module, batch: Batch, index: int) -> Tensor:
    output = layer(batch.hidden, **batch.layer_kwargs[index])
    return output[0] if isinstance(output, tuple) else output


def _updater(stats: ActivationStats, mask: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stats.update(args[0], mask)

    return hook


@contextmanager
def _bypassed(layers: list[nn.Module]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """While active, each layer returns its input unchanged and appends (hidden, keyword arguments) to the list."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(hidden: Tensor, **kwargs: Any) -> Tensor:
        calls.append((hidden, kwargs))
        return hidden

    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = record  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value
