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

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import text_config
from lorap.calibration.context import DecoderContext
from lorap.calibration.losses import IGNORED, next_token_loss, next_tokens
from lorap.calibration.offload import IN_MEMORY, HiddenStateStore
from lorap.calibration.shared_keys import SharedStates
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.paging import in_memory
from lorap.distributed import SINGLE_PROCESS, Processes

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


class Batch:
    """Windows that travel together.

    Args:
        hidden: (windows, seq_len, hidden_size), the inputs of the next layer; assign others to replace them.
        mask: (windows, seq_len) bool, False on padding; None where every token is real.
        layer_kwargs: keyword arguments of each decoder layer, as the model passes them.
        fold: which half of the calibration text the windows belong to.
        ids: (windows, seq_len) int64, the tokens.
        shared: keys and values that layers hand over to later ones, where a family does that.
        store: keeps the hidden states.
    """

    def __init__(
        self,
        *,
        hidden: Tensor,
        mask: Tensor | None,
        layer_kwargs: Sequence[Mapping[str, Any]],
        fold: int = 0,
        ids: Tensor | None = None,
        shared: SharedStates | None = None,
        store: HiddenStateStore = IN_MEMORY,
    ) -> None:
        self.mask, self.layer_kwargs, self.fold, self.ids = mask, layer_kwargs, fold, ids
        self.shared, self.store = shared, store
        self.held = store.put(hidden)

    def copy(self) -> Batch:
        """The same windows at the same place, for another stream."""
        found = copy.copy(self)
        found.shared = None if self.shared is None else self.shared.copied()
        return found

    @property
    def hidden(self) -> Tensor:
        """(windows, seq_len, hidden_size), the inputs of the next layer; read back where they are in a file."""
        return self.held.get()

    @hidden.setter
    def hidden(self, value: Tensor) -> None:
        self.held = self.store.put(value)


class CalibrationStream:
    """Hidden states of the calibration windows, between two decoder layers: those of this process, where several share them.

    Args:
        batches: of this process.
        folds: how many halves the windows of all processes are split into.
        processes: sums are taken over all of them.
    """

    def __init__(
        self, batches: Sequence[Batch], *, folds: int | None = None, processes: Processes = SINGLE_PROCESS
    ) -> None:
        self.batches = batches
        self.folds = folds or 1 + max(batch.fold for batch in batches)
        self.processes = processes

    @classmethod
    @torch.no_grad()
    def from_windows(
        cls,
        context: DecoderContext,
        windows: TokenWindows,
        *,
        fold_of: Tensor | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> CalibrationStream:
        """Run the embedding only: every decoder layer is bypassed, but notes what it was called with.

        Batches do not depend on the number of processes, so that neither do their results.

        Args:
            context: the model; its processes share the windows.
            windows: all of them.
            fold_of: (windows,) bool, which of them form the second fold; without it there is one.
            batch_tokens: that run through a layer at once.
        """
        model, device, processes = context.model, context.device, context.processes
        embedding, keys = model.get_input_embeddings(), context.architecture.shared_keys
        handed = keys.argument if keys else None
        size = max(1, batch_tokens // windows.input_ids.shape[1])
        every = list(_batches(len(windows.input_ids), size, fold_of))
        batches = []
        with in_memory(embedding):
            home = context.embedding_device
            for fold, rows in processes.shard(every):
                ids = windows.input_ids[rows]
                mask = None if windows.attention_mask is None else windows.attention_mask[rows].bool()
                with bypassed(context.layers) as calls:
                    attention_mask = None if mask is None else mask.to(home)
                    model.base_model(input_ids=ids.to(home), attention_mask=attention_mask, use_cache=False)
                moved: dict[int, Tensor] = {}  # layers share their rotary tables and masks
                batches.append(
                    Batch(
                        hidden=calls[0][0].to(device),
                        mask=None if mask is None else mask.to(device),
                        layer_kwargs=[
                            _to_device({name: one for name, one in kwargs.items() if name != handed}, device, moved)
                            for _, kwargs in calls
                        ],
                        fold=fold,
                        ids=ids,
                        shared=SharedStates(handed, context.store) if handed else None,
                        store=context.store,
                    )
                )
        return cls(batches, folds=1 + max(fold for fold, _ in every), processes=processes)

    def copy(self) -> CalibrationStream:
        """Another stream at the same place: one stays there when the other advances. Until then hidden states are shared."""
        batches = [batch.copy() for batch in self.batches]
        return CalibrationStream(batches, folds=self.folds, processes=self.processes)

    @torch.no_grad()
    def observe(
        self, index: int, layer: nn.Module, probes: Mapping[str, Probe]
    ) -> dict[str, tuple[ActivationStats, ...]]:
        """Statistics of the inputs of linear layers; the layer runs only as far as it has to.

        Args:
            index: of the layer.
            layer: the decoder layer, in memory.
            probes: what to gather at which linear layers inside it, by any names.

        Returns:
            By the names of ``probes``, one per fold, summed over all processes.
        """
        stats = {name: tuple(_empty(probe) for _ in range(self.folds)) for name, probe in probes.items()}
        floor = self.smallest_sq_norm() if any(probe.weighted for probe in probes.values()) else 0.0
        for batch in self.batches:
            seen: set[str] = set()
            with ExitStack() as hooks:
                for name, probe in probes.items():
                    update = _updater(
                        stats[name][batch.fold], batch, probe, name, seen, wanted=len(probes), floor=floor
                    )
                    hooks.callback(probe.linear.register_forward_pre_hook(update).remove)
                with suppress(_SeenEnough):
                    run_layer(layer, batch.hidden, batch, index)
        for folds in stats.values():
            for fold in folds:
                fold.add_up(self.processes)
        return stats

    @torch.no_grad()
    def record(self, index: int, layer: nn.Module, module: nn.Module) -> Iterator[tuple[Batch, tuple[Any, ...]]]:
        """(batch, positional arguments of ``module``), batch by batch of this process; the layer runs as far as that.

        Args:
            index: of the layer.
            layer: the decoder layer, in memory.
            module: inside it.
        """
        for batch in self.batches:
            found: list[tuple[Any, ...]] = []

            def note(_module: nn.Module, args: tuple[Any, ...], found: list[tuple[Any, ...]] = found) -> None:
                found.append(args)
                raise _SeenEnough

            handle = module.register_forward_pre_hook(note)
            try:
                with suppress(_SeenEnough):
                    run_layer(layer, batch.hidden, batch, index)
            finally:
                handle.remove()
            yield batch, found[0]

    def smallest_sq_norm(self) -> float:
        """The mean square that weights are bounded by: over all real tokens, so that it does not depend on batches."""
        found = [
            _sq_norm(batch) if batch.mask is None else _sq_norm(batch)[batch.mask.bool()] for batch in self.batches
        ]
        mine = torch.cat([part.flatten() for part in found]).cpu() if found else torch.empty(0)
        return max(float(torch.cat(self.processes.all_gather(mine)).median()) / LARGEST_WEIGHT, SMALLEST_SQ_NORM)

    @torch.no_grad()
    def advance(self, index: int, layer: nn.Module) -> None:
        """Replace the hidden states by the outputs of ``layer``."""
        for batch in self.batches:
            batch.hidden = run_layer(layer, batch.hidden, batch, index)


def run_layer(
    layer: nn.Module, hidden: Tensor, batch: Batch, index: int, *, shared: MutableMapping[str, Any] | None = None
) -> Tensor:
    """Run one decoder layer on one batch.

    Args:
        layer: a decoder layer, in memory.
        hidden: (windows, seq_len, hidden_size), its inputs.
        batch: gives what the layer is called with besides.
        index: of the layer.
        shared: takes the place of the keys and values that layers of the batch hand over.

    Returns:
        (windows, seq_len, hidden_size).
    """
    handed = {} if batch.shared is None else {batch.shared.argument: batch.shared if shared is None else shared}
    output = layer(hidden, **batch.layer_kwargs[index], **handed)
    return output[0] if isinstance(output, tuple) else output


def logits_of(context: DecoderContext, hidden: Tensor) -> Tensor:
    """(windows, seq_len, vocab_size), given the outputs of the last layer."""
    beside = context.architecture.head_inputs(text_config(context.model.config), hidden)
    with bypassed(context.layers, output=hidden):
        logits: Tensor = context.model(inputs_embeds=hidden, use_cache=False, **beside).logits
    return logits


def summed_loss(context: DecoderContext, batch: Batch, hidden: Tensor) -> tuple[Tensor, int]:
    """Negative log-likelihood of a batch; padding is neither predicted nor predicted from.

    Args:
        context: the model.
        batch: with its token ids.
        hidden: (windows, seq_len, hidden_size), the outputs of the last layer.

    Returns:
        The sum in nats, (), and how many tokens were predicted.
    """
    assert batch.ids is not None
    logits = logits_of(context, hidden)
    targets = next_tokens(batch.ids.to(logits.device), batch.mask)
    return next_token_loss(logits, targets, reduction="sum"), int((targets != IGNORED).sum())


class _SeenEnough(Exception):
    """Ends the forward pass of a layer whose remaining outputs nobody needs."""


def _updater(
    stats: ActivationStats, batch: Batch, probe: Probe, name: str, seen: set[str], *, wanted: int, floor: float
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    weights = token_weights(batch, floor) if probe.weighted else None

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        stats.update(args[0], batch.mask, weights)
        seen.add(name)
        if len(seen) == wanted:
            raise _SeenEnough

    return hook


def token_weights(batch: Batch, floor: float) -> Tensor:
    """(windows, seq_len) float32: what :attr:`Probe.weighted` counts each token by.

    Args:
        batch: before the layer.
        floor: from :meth:`CalibrationStream.smallest_sq_norm`.
    """
    return 1 / _sq_norm(batch).clamp(min=floor)


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
def bypassed(
    layers: Sequence[nn.Module], *, output: Tensor | None = None
) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """While active, each layer returns its input unchanged and appends (hidden, keyword arguments) to the list.

    Args:
        layers: of the decoder.
        output: what they return instead; some models scale the embeddings that they are given.
    """
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    names = [list(inspect.signature(type(layer).forward).parameters)[2:] for layer in layers]  # after self and hidden

    def recorder(positional: Sequence[str]) -> Callable[..., Tensor]:
        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((hidden, dict(zip(positional, args, strict=False)) | kwargs))
            return hidden if output is None else output

        return record

    own = [vars(layer).get("forward") for layer in layers]
    for layer, positional in zip(layers, names, strict=True):
        layer.forward = recorder(positional)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]


def _to_device(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """``value`` with its tensors on ``device``; what occurs in ``moved`` already is the same tensor again."""
    if isinstance(value, Tensor):
        return moved.setdefault(id(value), value.to(device))
    if isinstance(value, (tuple, list)):
        return type(value)(_to_device(item, device, moved) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device, moved) for key, item in value.items()}
    return value
