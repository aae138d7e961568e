"""Second moments of the gradients at the output of each projection: one backward pass, one decoder layer in memory at a time.

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

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorap.architectures import MLP
from lorap.calibration.backward import BATCH_TOKENS, backward_pass
from lorap.calibration.context import DecoderContext
from lorap.calibration.offload import IN_MEMORY
from lorap.calibration.routing import Routed, RoutedTokens
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows
from lorap.distributed import Processes

# Keeps the product of a vanishing gradient and its weight within float32.
LARGEST_RATIO = 1e30
# Above so many channels sums are float32: prices need no more, and in float64 all moments of a layer are several times the layer.
WIDE = 2048
# Their outputs are as wide as the FFN, and only errors of single rows of them are priced.
DIAGONAL = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Sensitivity:
    """What an error of one projection costs.

    Args:
        output: A (out_features, out_features) float32, mean over tokens of g g^T |x| / |g|; its diagonal, where no
            more was asked for.
        input: C (in_features, in_features) float32, mean over tokens of x x^T |g| / |x|.
        routed: where the projection is one of each expert, what these read, x and g being those of all experts of a layer; tokens
            count |g| / |x| times as much.
        tokens: that were counted.
    """

    output: Tensor
    input: Tensor
    routed: RoutedTokens | None = None
    tokens: int = 0


def layer_sensitivities(
    context: DecoderContext,
    windows: TokenWindows,
    projections: Callable[[nn.Module], Mapping[str, nn.Linear]],
    *,
    diagonal: Collection[str] = (),
) -> Generator[tuple[int, dict[str, Sensitivity]]]:
    """(layer index, sensitivity by role), from the last layer to the first; meanwhile the weights of that layer are in memory.

    Args:
        context: the dense model; its processes share the windows, and all get the same sensitivities.
        windows: on which the loss is taken; their hidden states before every layer are kept, (tokens, hidden_size) each.
        projections: the linear layers of a decoder layer that are asked for, by role.
        diagonal: roles of which the diagonal of A is enough.
    """
    stream = CalibrationStream.from_windows(context, windows, batch_tokens=BATCH_TOKENS)
    for index, linears, sums in backward_pass(context, stream, projections, lambda: _Sums(diagonal), desc="Planning"):
        experts = context.architecture.experts(context.layers[index])
        # Who has no window adds nothing.
        sums.add_up({role: _sizes(linear) for role, linear in linears.items()}, context.device, context.processes)
        routed = RoutedTokens(experts, sums.routed, 1, context.processes) if experts else None
        yield index, sums.sensitivities(routed)


class _Sums:
    """Second moments of the inputs and of the output gradients, by role."""

    def __init__(self, diagonal: Collection[str] = ()) -> None:
        self.diagonal = diagonal
        self.inputs: dict[str, ActivationStats] = {}
        self.outputs: dict[str, ActivationStats] = {}
        self.routed: list[Routed] = []

    def add(self, role: str, x: Tensor, g: Tensor, mask: Tensor | None, fold: int = 0, *routing: Tensor) -> None:
        if routing and mask is not None:
            mask = mask.flatten()
        x_norm, g_norm = (part.float().norm(dim=-1) for part in (x, g))
        _moments(self.inputs, role, x.shape[-1], x.device).update(x, mask, _ratio(g_norm, x_norm))
        moments = role not in self.diagonal
        _moments(self.outputs, role, g.shape[-1], g.device, moments).update(g, mask, _ratio(x_norm, g_norm))
        if routing:
            scale = _ratio(g_norm, x_norm)
            self.routed.append(Routed.of((x, *routing), scale=scale, mask=mask, fold=0, store=IN_MEMORY))

    def add_up(self, sizes: Mapping[str, tuple[int, int]], device: torch.device, processes: Processes) -> None:
        """Sums over all processes, of which some may have seen nothing."""
        for role, (in_features, out_features) in sizes.items():
            _moments(self.inputs, role, in_features, device).add_up(processes)
            _moments(self.outputs, role, out_features, device, role not in self.diagonal).add_up(processes)

    def sensitivities(self, routed: RoutedTokens | None = None) -> dict[str, Sensitivity]:
        """By role, of all that was summed up; the sums are used up. ``routed`` is what experts read, where there are any."""
        found = {}
        for role in list(self.outputs):
            tokens = self.outputs[role].tokens
            output, input_ = (_per_token(stats.pop(role)).float() for stats in (self.outputs, self.inputs))
            found[role] = Sensitivity(output, input_, routed if role in MLP else None, tokens)
        return found


def _sizes(linear: Any) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, or of all experts together."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return (linear.down_proj.shape[1],) * 2


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where ``below`` is 0: such a token moves nothing."""
    return torch.where(below > 0, above / below, 0.0).clamp(max=LARGEST_RATIO)


def _per_token(stats: ActivationStats) -> Tensor:
    """The weighted sum of outer products, or squares, over the number of tokens, not over their weights, in place of the sums."""
    sums = stats.sq_sum if stats.outer is None else stats.outer
    return sums.div_(max(stats.tokens, 1))


def _moments(
    stats: dict[str, ActivationStats], role: str, features: int, device: torch.device | str, moments: bool = True
) -> ActivationStats:
    if role not in stats:
        stats[role] = ActivationStats(features, moments=moments, device=device, wide=WIDE)
    return stats[role]
