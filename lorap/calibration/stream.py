"""The calibration windows on their way through the decoder, one layer at a time.

The stream starts as the inputs of the first layer. Each layer is *observed* (it runs, the inputs of its linear layers are summed
up, the outputs are thrown away) and, once it is compressed, *advanced* (the outputs become the inputs of the next layer). So the
statistics of layer i come from inputs that the compressed layers 0 .. i-1 produced. A layer may be observed several times
while it is being compressed, each time as far as the last probe, so that its later parts see what became of its earlier ones.

Windows may be split into two folds, whose sums are kept apart: what one says can then be judged on the other.

What a layer wants besides the hidden states (rotary tables, a causal or sliding mask) is taken from the model's own forward
pass, so that nothing here depends on the model family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.calibration.data import TokenWindows
from lorap.calibration.statistics import ActivationStats

# Tokens that run through a layer at once: large enough for efficient matmuls, small next to a layer's weights.
BATCH_TOKENS = 2048

# No token weighs more than so many times the median one; a hidden state of norm 0 would weigh infinitely much.
LARGEST_WEIGHT = 100.0
SMALLEST_SQ_NORM = 1e-9


@dataclass(frozen=True)
class Probe:
    """What to gather at the input of one linear layer.

    Args:
        linear: the layer; it may sit inside whatever reads the same input.
        mean: the sum of x.
        moments: the sum of x x^T.
        weighted: each token counts by the inverse mean square of the hidden state that enters the decoder layer, to which the
            output is added. The next normalisation divides by that norm, and without it the few tokens of huge norm that
            language models have (attention sinks) outweigh all others.
    """

    linear: nn.Module
    mean: bool = False
    moments: bool = False
    weighted: bool = False


@dataclass
class Batch:
    """Windows that travel together.

    Args:
        hidden: (windows, seq_len, hidden_size), the inputs of the next layer.
        mask: (windows, seq_len) bool, False on padding; None where every token is real.
        layer_kwargs: keyword arguments of each decoder layer, as the model passes them.
        fold: which half of the calibration text the windows belong to.
    """

    hidden: Tensor
    mask: Tensor | None
    layer_kwargs: Sequence[Mapping[str, Any]]
    fold: int = 0


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
        fold_of: Tensor | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> CalibrationStream:
        """Run the embedding only: every decoder layer is bypassed, but notes what it was called with.

        ``fold_of`` (windows,) bool says which windows form the second fold; without it there is one.
        """
        home = next(model.parameters()).device
        layers = list(layers)
        size = max(1, batch_tokens // windows.input_ids.shape[1])
        batches = []
        for fold, rows in _batches(len(windows.input_ids), size, fold_of):
            ids = windows.input_ids[rows].to(home)
            mask = None if windows.attention_mask is None else windows.attention_mask[rows].bool()
            with bypassed(layers) as calls:
                attention_mask = None if mask is None else mask.to(home)
                model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            hidden = calls[0][0].to(device)
            batches.append(
                Batch(
                    hidden=hidden,
                    mask=None if mask is None else mask.to(device),
                    layer_kwargs=[_to_device(kwargs, device) for _, kwargs in calls],
                    fold=fold,
                )
            )
        return cls(batches)

    @torch.no_grad()
    def observe(
        self, index: int, layer: nn.Module, probes: Mapping[str, Probe]
    ) -> dict[str, tuple[ActivationStats, ...]]:
        """Statistics of the inputs of the given linear layers by the names of ``probes``, one per fold.

        The layer runs only as far as it has to.
        """
        folds = 1 + max(batch.fold for batch in self.batches)
        stats = {name: tuple(_empty(probe) for _ in range(folds)) for name, probe in probes.items()}
        floor = self._smallest_sq_norm() if any(probe.weighted for probe in probes.values()) else 0.0
        for batch in self.batches:
            seen: set[str] = set()
            with ExitStack() as hooks:
                for name, probe in probes.items():
                    update = _updater(
                        stats[name][batch.fold], batch, probe, name, seen, wanted=len(probes), floor=floor
                    )
                    hooks.callback(probe.linear.register_forward_pre_hook(update).remove)
                with suppress(_SeenEnough):
                    run_layer(layer, batch, index)
        return stats

    def _smallest_sq_norm(self) -> float:
        """The mean square that weights are bounded by: over all real tokens, so that it does not depend on batches."""
        found = [
            _sq_norm(batch) if batch.mask is None else _sq_norm(batch)[batch.mask.bool()] for batch in self.batches
        ]
        return max(float(torch.cat([part.flatten() for part in found]).median()) / LARGEST_WEIGHT, SMALLEST_SQ_NORM)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of ``layer``."""
        for batch in self.batches:
            batch.hidden = run_layer(layer, batch, index)


@contextmanager
def on_device(layer: nn.Module, device: torch.device) -> Iterator[None]:
    """``layer`` is on ``device`` while this is active, and afterwards where it was."""
    home = next(layer.parameters()).device
    layer.to(device)
    try:
        yield
    finally:
        layer.to(home)


def run_layer(layer: nn.Module, batch: Batch, index: int) -> Tensor:
    output = layer(batch.hidden, **batch.layer_kwargs[index])
    return output[0] if isinstance(output, tuple) else output


class _SeenEnough(Exception):
    """Ends the forward pass of a layer whose remaining outputs nobody needs."""


def _updater(
    stats: ActivationStats, batch: Batch, probe: Probe, name: str, seen: set[str], *, wanted: int, floor: float
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    weights = None
    if probe.weighted:
        weights = 1 / _sq_norm(batch).clamp(min=floor)

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stats.update(args[0], batch.mask, weights)
        seen.add(name)
        if len(seen) == wanted:
            raise _SeenEnough

    return hook


def _sq_norm(batch: Batch) -> Tensor:
    """(windows, seq_len) float32, mean square of each hidden state."""
    return batch.hidden.float().square().mean(-1)


def _empty(probe: Probe) -> ActivationStats:
    weight = next(probe.linear.parameters())
    return ActivationStats(
        int(probe.linear.in_features),  # type: ignore[arg-type]
        mean=probe.mean,
        moments=probe.moments,
        device=weight.device,
    )


def _batches(count: int, size: int, fold_of: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(fold, rows) of each batch; no batch mixes folds."""
    rows = torch.arange(count)
    folds = [rows] if fold_of is None else [rows[~fold_of], rows[fold_of]]
    for fold, members in enumerate(members for members in folds if len(members)):
        for start in range(0, len(members), size):
            yield fold, members[start : start + size]


@contextmanager
def bypassed(layers: list[nn.Module]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
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
