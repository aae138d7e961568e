"""One backward pass with one decoder layer in memory at a time: forward through all of them first, then back from the last one.

Only activations have gradients. What passes the linear layers on the way, inputs and gradients of outputs, goes to a gatherer;
the weights are the caller's while their layer is in memory, and may change: nothing below needs them again.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from lorap.calibration.context import DecoderContext
from lorap.calibration.offload import OffloadedTensor
from lorap.calibration.shared_keys import SharedGradients, TracedStates
from lorap.calibration.stream import Batch, CalibrationStream, logits_of, run_layer, summed_loss

# Tokens that run backward at once. Each keeps all activations of one layer, and once the logits.
BATCH_TOKENS = 512


class Gatherer(Protocol):
    """Takes what passes the linear layers of one decoder layer."""

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None, fold: int, *routing: Tensor) -> None:
        """Take what passed one linear layer, or the experts of a layer.

        Args:
            role: of the linear layer.
            x: (windows, seq_len, in_features), its inputs.
            g: (windows, seq_len, out_features), gradients of the summed loss at its outputs.
            mask: (windows, seq_len) bool, False on padding; None where every token is real.
            fold: which half of the calibration text the windows belong to.
            routing: of experts, (tokens, k) which of them each token is sent to, and their weights; x and g are (tokens, ...).
        """


G = TypeVar("G", bound=Gatherer)


def backward_pass(
    context: DecoderContext,
    stream: CalibrationStream,
    linears_of: Callable[[nn.Module], Mapping[str, nn.Linear]],
    gatherer: Callable[[], G],
    *,
    targets: CalibrationStream | None = None,
    desc: str = "",
) -> Generator[tuple[int, Mapping[str, nn.Linear], G]]:
    """(layer index, its linear layers, what was gathered), from the last decoder layer to the first, while it is in memory.

    Args:
        context: the model; its store keeps the hidden states before every layer, (tokens, hidden_size) each.
        stream: windows before the first layer; afterwards they are behind the last one.
        linears_of: the linear layers of a decoder layer that are asked for, by name.
        gatherer: makes one for each layer.
        targets: the same windows behind the last layer of another model with the same head. The loss then is how far the
            predictions are from that model's, and not how badly they predict the text.
        desc: of the progress bar.
    """
    inputs = []
    for index, layer in enumerate(context.layers):
        inputs.append([batch.held for batch in stream.batches])
        with context.on_device(index):
            stream.advance(index, layer)
    with context.head_in_memory():
        if targets is None:
            gradients = [_loss_gradient(context, batch) for batch in stream.batches]
        else:
            pairs = zip(stream.batches, targets.batches, strict=True)
            gradients = [_distance_gradient(context, batch, target) for batch, target in pairs]
    shared = [SharedGradients() for _ in stream.batches]
    for index in context.bar(reversed(range(len(context.layers))), desc=desc):
        layer, hidden = context.layers[index], inputs.pop()
        gathered = gatherer()
        with context.on_device(index):
            linears = linears_of(layer)
            for position, (batch, held) in enumerate(zip(stream.batches, hidden, strict=True)):
                above = gradients[position].get(), shared[position]
                gradient = _backward(index, layer, batch, held.get(), above, linears, gathered)
                gradients[position] = context.store.put(gradient)
            yield index, linears, gathered


def _loss_gradient(context: DecoderContext, batch: Batch) -> OffloadedTensor:
    """Gradient of the summed loss with respect to the last layer's output."""
    hidden = batch.hidden
    with torch.enable_grad():
        states = _at_head(context, hidden).requires_grad_(True)
        loss, _ = summed_loss(context, batch, states)
        (gradient,) = torch.autograd.grad(loss, states)
    return batch.store.put(gradient.to(hidden.device))


def _distance_gradient(context: DecoderContext, batch: Batch, target: Batch) -> OffloadedTensor:
    """The same of the Kullback-Leibler divergence from the predictions of ``target``, summed over all real tokens.

    That of the logits is the difference of the probabilities, so the divergence itself is never computed.
    """
    hidden = batch.hidden
    with torch.enable_grad():
        states = _at_head(context, hidden).requires_grad_(True)
        logits = logits_of(context, states)
    with torch.no_grad():
        difference = logits.softmax(-1, dtype=torch.float32)
        difference -= logits_of(context, _at_head(context, target.hidden)).softmax(-1, dtype=torch.float32)
        if batch.mask is not None:
            difference *= batch.mask.to(difference.device)[..., None]
    (gradient,) = torch.autograd.grad(logits, states, difference.to(logits.dtype))
    return batch.store.put(gradient.to(hidden.device))


def _at_head(context: DecoderContext, hidden: Tensor) -> Tensor:
    return hidden.to(context.model.get_output_embeddings().weight.device).detach()


def _backward(
    index: int,
    layer: nn.Module,
    batch: Batch,
    hidden: Tensor,
    above: tuple[Tensor, SharedGradients],
    linears: Mapping[str, nn.Linear],
    gathered: Gatherer,
) -> Tensor:
    """Gradient with respect to the layer's input; adds what passed the linear layers on the way to ``gathered``.

    ``above`` is the gradient with respect to its output, and with respect to keys and values that later layers read.
    """
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}

    def note(role: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, args, output: seen.__setitem__(role, (args, output))

    with torch.enable_grad(), ExitStack() as hooks:
        for role, linear in linears.items():
            hooks.callback(linear.register_forward_hook(note(role)).remove)
        hidden = hidden.detach().requires_grad_(True)
        traced = None if batch.shared is None else TracedStates(batch.shared)
        outputs, gradients, read = [run_layer(layer, hidden, batch, index, shared=traced)], [above[0]], list[Tensor]()
        if traced is not None:
            given, of_given = above[1].of_given(traced)
            outputs, gradients = outputs + given, gradients + of_given
            read = [one for states in traced.read.values() for one in states]
        wanted = [hidden, *(seen[role][1] for role in linears), *read]
        below, *at_outputs = torch.autograd.grad(outputs, wanted, gradients)
    if traced is not None:
        for kind in reversed(traced.read):
            count = len(traced.read[kind])
            above[1].add(kind, tuple(at_outputs[-count:]))
            del at_outputs[-count:]
    for role, g in zip(linears, at_outputs, strict=True):
        x, *routing = (one.detach() for one in seen[role][0])
        gathered.add(role, x, g, batch.mask, batch.fold, *routing)
    return below
