"""How much the loss minds an error at the output of each projection: one backward pass, one decoder layer in memory at a time.

A projection W is replaced by W' and its output y changes by ``(W' - W) x``. To second order, with the Fisher information in
place of the Hessian, the loss of a token then rises by ``1/2 E[(g^T (W' - W) x)^2]``, g being the gradient of the loss with
respect to y. If g and x are independent this is ``1/2 tr(A dW C dW^T)`` with ``A = E[g g^T]`` and ``C = E[x x^T]``
(Kronecker-factored Fisher; Martens and Grosse, arXiv 1503.05671): errors of all projections of all layers in one unit, nats
per token.

Nothing is trained: no weight has a gradient, only activations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorap import ops
from lorap.calibration.data import TokenWindows
from lorap.calibration.stream import Batch, CalibrationStream, bypassed, run_layer

# Tokens that run backward at once. Each keeps all activations of one layer, and once the logits.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Sensitivity:
    """What an error of one projection costs.

    Args:
        output: (out_features, out_features) float32, mean over tokens of g g^T, in nats^2 per unit^2.
        input: (in_features, in_features) float64, mean over tokens of x x^T.
    """

    output: Tensor
    input: Tensor


def layer_sensitivities(
    model: Any,
    layers: Sequence[nn.Module],
    windows: TokenWindows,
    projections: Callable[[nn.Module], Mapping[str, nn.Linear]],
    *,
    device: torch.device,
    progress: Any = iter,
) -> Iterator[tuple[int, dict[str, Sensitivity]]]:
    """(layer index, sensitivity by role), from the last layer to the first.

    Args:
        model: dense, in evaluation mode.
        layers: its decoder layers.
        windows: on which the loss is taken; their hidden states before every layer are kept, (tokens, hidden_size) each.
        projections: the linear layers of a decoder layer that are asked for, by role.
        device: where the layers are worked on.
        progress: wraps the layer indices, for a progress bar.
    """
    stream = CalibrationStream.from_model(model, layers, windows, device=device, batch_tokens=BATCH_TOKENS)
    inputs = []
    for index, layer in enumerate(layers):
        home = next(layer.parameters()).device
        layer.to(device)
        inputs.append([batch.hidden for batch in stream.batches])
        stream.advance(index, layer)
        layer.to(home)
    gradients = _loss_gradients(model, layers, windows, stream.batches)
    for index in progress(reversed(range(len(layers)))):
        layer, hidden = layers[index], inputs.pop()
        home = next(layer.parameters()).device
        layer.to(device)
        sums = _Sums()
        for batch, states, position in zip(stream.batches, hidden, range(len(hidden)), strict=True):
            batch.hidden = states
            gradients[position] = _backward(index, layer, batch, gradients[position], projections(layer), sums)
        layer.to(home)
        yield index, sums.sensitivities()


def _loss_gradients(
    model: Any, layers: Sequence[nn.Module], windows: TokenWindows, batches: Sequence[Batch]
) -> list[Tensor]:
    """Gradient of the summed loss with respect to the last layer's output, by batch."""
    home = model.get_input_embeddings().weight.device
    gradients, start = [], 0
    for batch in batches:
        count = len(batch.hidden)
        ids = windows.input_ids[start : start + count].to(home)
        start += count
        with torch.enable_grad(), bypassed(list(layers)):
            states = batch.hidden.to(home).detach().requires_grad_(True)
            logits = model(inputs_embeds=states, use_cache=False).logits[:, :-1]
            targets = ids[:, 1:]
            if batch.mask is not None:
                mask = batch.mask.to(home)
                targets = targets.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -100)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, states)
        gradients.append(gradient.to(batch.hidden.device))
    return gradients


class _Sums:
    """Running sums of x x^T and g g^T by role."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.source: dict[str, str] = {}

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None, *, same_input_as: str | None) -> None:
        self.source[role] = same_input_as or role
        if same_input_as is None:
            moment, tokens = ops.second_moment(x, mask)
            self.inputs[role] = self.inputs.get(role, 0) + moment
            self.tokens[role] = self.tokens.get(role, 0) + int(tokens)
        self.outputs[role] = self.outputs.get(role, 0) + ops.second_moment(g, mask)[0]

    def sensitivities(self) -> dict[str, Sensitivity]:
        return {
            role: Sensitivity(
                output=(outer / max(self.tokens[self.source[role]], 1)).float(),
                input=self.inputs[self.source[role]] / max(self.tokens[self.source[role]], 1),
            )
            for role, outer in self.outputs.items()
        }


def _backward(
    index: int, layer: nn.Module, batch: Batch, gradient: Tensor, linears: Mapping[str, nn.Linear], sums: _Sums
) -> Tensor:
    """Gradient with respect to the layer's input; adds what passed the projections on the way to ``sums``."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(role: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, args, output: seen.__setitem__(role, (args[0], output))

    with torch.enable_grad(), ExitStack() as hooks:
        for role, linear in linears.items():
            hooks.callback(linear.register_forward_hook(note(role)).remove)
        batch.hidden = batch.hidden.detach().requires_grad_(True)
        output = run_layer(layer, batch, index)
        wanted = [batch.hidden, *(seen[role][1] for role in linears)]
        below, *at_outputs = torch.autograd.grad(output, wanted, gradient)
    first_reader: dict[int, str] = {}
    for role, g in zip(linears, at_outputs, strict=True):
        x = seen[role][0]
        same = first_reader.setdefault(id(x), role)
        sums.add(role, x.detach(), g, batch.mask, same_input_as=None if same == role else same)
    return below
