"""How much the loss minds an error at the output of each projection: one backward pass, one decoder layer in memory at a time.

A projection W is replaced by W' and its output y changes by ``(W' - W) x``. To second order, with the Fisher information in
place of the Hessian, the loss of a token then rises by ``1/2 E[(g^T (W' - W) x)^2]``, g being the gradient of the loss with
respect to y. If g and x are independent this is ``1/2 tr(A dW C dW^T)`` with ``A = E[g g^T]`` and ``C = E[x x^T]``
(Kronecker-factored Fisher; Martens and Grosse, arXiv 1503.05671): errors of all projections of all layers in one unit, nats
per token.

Independent they are not: the few tokens whose activations are huge have tiny gradients, and an attention sink, usually the first
token, the opposite. In E[g g^T] and E[x x^T] each of them outweighs all other tokens, and their product prices a layer up to 50
times too high (the FFN of layer 11 of SmolLM2-135M). Nothing in ``(g^T dW x)^2`` changes when g is divided and x multiplied by
the same number, so both are made equally long, token by token, before their moments are taken.

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

from lorap.calibration.data import TokenWindows
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import Batch, CalibrationStream, bypassed, on_device, run_layer

# Tokens that run backward at once. Each keeps all activations of one layer, and once the logits.
BATCH_TOKENS = 512
# Keeps the product of a vanishing gradient and its weight within float32.
LARGEST_RATIO = 1e30


@dataclass(frozen=True)
class Sensitivity:
    """What an error of one projection costs.

    Args:
        output: A (out_features, out_features) float32, mean over tokens of g g^T |x| / |g|.
        input: C (in_features, in_features) float64, mean over tokens of x x^T |g| / |x|.
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
        inputs.append([batch.hidden for batch in stream.batches])
        with on_device(layer, device):
            stream.advance(index, layer)
    gradients = _loss_gradients(model, layers, windows, stream.batches)
    for index in progress(reversed(range(len(layers)))):
        layer, hidden = layers[index], inputs.pop()
        sums = _Sums()
        with on_device(layer, device):
            linears = projections(layer)
            for position, (batch, states) in enumerate(zip(stream.batches, hidden, strict=True)):
                batch.hidden = states
                gradients[position] = _backward(index, layer, batch, gradients[position], linears, sums)
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
    """Second moments of the inputs and of the output gradients, by role."""

    def __init__(self) -> None:
        self.inputs: dict[str, ActivationStats] = {}
        self.outputs: dict[str, ActivationStats] = {}

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None) -> None:
        x_norm, g_norm = (part.float().norm(dim=-1) for part in (x, g))
        _moments(self.inputs, role, x).update(x, mask, _ratio(g_norm, x_norm))
        _moments(self.outputs, role, g).update(g, mask, _ratio(x_norm, g_norm))

    def sensitivities(self) -> dict[str, Sensitivity]:
        return {
            role: Sensitivity(output=_per_token(stats).float(), input=_per_token(self.inputs[role]))
            for role, stats in self.outputs.items()
        }


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where ``below`` is 0: such a token moves nothing."""
    return torch.where(below > 0, above / below, 0.0).clamp(max=LARGEST_RATIO)


def _per_token(stats: ActivationStats) -> Tensor:
    """The weighted sum of outer products over the number of tokens, not over their weights."""
    return stats.second_moment * (stats.weight / max(stats.tokens, 1))


def _moments(stats: dict[str, ActivationStats], role: str, x: Tensor) -> ActivationStats:
    if role not in stats:
        stats[role] = ActivationStats(x.shape[-1], moments=True, device=x.device)
    return stats[role]


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
    for role, g in zip(linears, at_outputs, strict=True):
        sums.add(role, seen[role][0].detach(), g, batch.mask)
    return below
