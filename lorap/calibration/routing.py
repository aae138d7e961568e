"""What the experts of one decoder layer read: each token goes to a few of them, and each expert is judged on its own tokens.

Expert e gives ``w * down(act(gate(x)) * up(x))`` for a token x that the router sends to it with weight w, and the layer adds up
what its experts give. So an error of ``down`` counts w^2, and tokens of other experts do not count at all. Inner activations are
computed again, from the layer's inputs and in float32: moments of all experts together would be many times the layer.

An expert that hardly any token was sent to can be judged on all tokens of the layer instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorap.architectures.experts import Experts
from lorap.calibration.offload import HiddenStateStore, OffloadedTensor
from lorap.calibration.statistics import ActivationStats, Folds
from lorap.calibration.stream import CalibrationStream, token_weights
from lorap.distributed import Processes

# Tokens of one expert whose inner activations are computed at once.
TOKENS = 2048


@dataclass(frozen=True)
class Routed:
    """One batch.

    Args:
        hidden: (tokens, hidden_size), no padding among them.
        experts: (tokens, k) which each token is sent to.
        weights: (tokens, k), what it counts there.
        scale: (tokens,), what it counts where routing is not asked; None for 1.
        fold: of the batch.
    """

    hidden: OffloadedTensor
    experts: Tensor
    weights: Tensor
    scale: Tensor | None
    fold: int

    @classmethod
    def of(
        cls, args: Sequence[Tensor], *, scale: Tensor | None, mask: Tensor | None, fold: int, store: HiddenStateStore
    ) -> Routed:
        """What experts were called with.

        Args:
            args: (tokens, hidden_size); (tokens, k) which experts each token is sent to, and their weights.
            scale: what each token counts besides the square of these; None for 1.
            mask: False on padding, as many as there are tokens; None where there is none.
            fold: of the batch.
            store: keeps the tokens.
        """
        hidden, chosen, weights = args
        counted = weights.float().square()  # since the error of an output is
        if scale is not None:
            scale = scale.flatten().detach()
            counted = counted * scale[:, None]
        if mask is not None:
            real = mask.flatten().bool()
            hidden, chosen, counted = hidden[real], chosen[real], counted[real]
            scale = None if scale is None else scale[real]
        return cls(store.put(hidden.detach()), chosen, counted.detach(), scale, fold)


class RoutedTokens:
    """The tokens that the experts of one layer read, those of this process.

    Args:
        experts: of the layer.
        batches: of this process.
        folds: how many halves the calibration text has.
        processes: sums are taken over all of them.
    """

    def __init__(self, experts: Experts, batches: Sequence[Routed], folds: int, processes: Processes) -> None:
        self.experts, self.batches, self.folds, self.processes = experts, batches, folds, processes

    @classmethod
    def record(
        cls, stream: CalibrationStream, index: int, layer: nn.Module, experts: Experts, *, weighted: bool = False
    ) -> RoutedTokens:
        """Run the layer as far as its experts.

        Args:
            stream: before the layer.
            index: of the layer.
            layer: in memory.
            experts: of the layer, dense.
            weighted: tokens count as :attr:`lorap.calibration.stream.Probe.weighted` has it, besides.
        """
        floor = stream.smallest_sq_norm() if weighted else 0.0
        batches = []
        for batch, args in stream.record(index, layer, experts.module):
            scale = token_weights(batch, floor) if weighted else None
            batches.append(Routed.of(args, scale=scale, mask=batch.mask, fold=batch.fold, store=batch.store))
        return cls(experts, batches, stream.folds, stream.processes)

    @torch.no_grad()
    def statistics(
        self, expert: int, *, mean: bool = False, moments: bool = False, all_tokens: bool = False
    ) -> tuple[Folds, Folds]:
        """Sums over the tokens of one expert and over all processes, one per fold.

        Args:
            expert: which.
            mean: also sum up the inner activations.
            moments: also sum up their outer products.
            all_tokens: as if the router sent every token of the layer to it, with weight 1.

        Returns:
            Of what gate and up read, where all tokens count alike; and of what down reads, where each counts as the square of its
            routing weight.
        """
        device = self.experts.module.down_proj.device
        _, hidden_size, width = self.experts.module.down_proj.shape
        inputs = tuple(ActivationStats(hidden_size, device=device) for _ in range(self.folds))
        inner = tuple(ActivationStats(width, mean=mean, moments=moments, device=device) for _ in range(self.folds))
        gate, up, _ = (
            weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in self.experts.weights(expert)
        )
        for x, weights, fold in self._all_tokens() if all_tokens else self._tokens_of(expert):
            inputs[fold].update(x)
            x = x.to(gate.dtype)
            inner[fold].update(self.experts.activation(x @ gate.T) * (x @ up.T), None, weights)
        for stats in (*inputs, *inner):
            stats.add_up(self.processes)
        return inputs, inner

    def _tokens_of(self, expert: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """(tokens, hidden_size), (tokens,) what each counts or None for 1, and the fold; in pieces."""
        for batch in self.batches:
            rows, places = (batch.experts == expert).nonzero(as_tuple=True)
            if len(rows):
                hidden = batch.hidden.get()
                for some, at in zip(rows.split(TOKENS), places.split(TOKENS), strict=True):
                    yield hidden[some], batch.weights[some, at], batch.fold

    def _all_tokens(self) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """The same of every token of the layer."""
        for batch in self.batches:
            hidden = batch.hidden.get()
            for start in range(0, len(hidden), TOKENS):
                some = slice(start, start + TOKENS)
                yield hidden[some], None if batch.scale is None else batch.scale[some], batch.fold
