"""One gated FFN, or one expert, with fewer channels: which stay, and what down_proj becomes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorap.algorithms.pruning import channel_importance, removed_shares
from lorap.algorithms.refit import fluctuation_scores, keep_best, output_scores, removed_share, repair_down
from lorap.calibration.statistics import ActivationStats, Folds, merged
from lorap.compression.shrinkage import choose_ridge, shrinkage_of
from lorap.config import CompressionConfig
from lorap.system import release_freed_memory


@dataclass(frozen=True)
class FFN:
    """A dense FFN and what it read during calibration.

    Args:
        gate, up: (intermediate_size, hidden_size).
        down: (hidden_size, intermediate_size).
        inputs: statistics of what gate and up read, one per fold.
        inner: the same of what down reads; tokens may have weights.
        metric: (hidden_size, hidden_size) second moment of the gradients of the outputs; None where all count alike.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    inputs: Folds
    inner: Folds
    metric: Tensor | None = None

    def prune(self, width: int, config: CompressionConfig) -> PrunedFFN:
        """Leave the best ``width`` channels, and refit down_proj to them where ``config`` says so; uses the statistics up."""
        weights, inner = (self.gate, self.up, self.down), merged(self.inner, moments=False)
        norms = self._sq_norms(inner)
        kept = keep_best(self._scores(inner, norms, config), width, least_important_kept=config.least_important_kept)
        errors, down = removed_shares(*weights, *norms, kept), self.down[:, kept]
        if config.repair:
            down = self._repaired(kept, config)
            errors["down_proj"] = removed_share(self.down, self.inner[0].moment, kept, down)
        return PrunedFFN(kept, down.to(self.down.dtype).contiguous(), errors)

    def _sq_norms(self, inner: ActivationStats) -> tuple[Tensor, Tensor]:
        """Of the channels that gate and up read, and of those that down reads; ``inner``: of all folds together."""
        # Weighted tokens or not, the norms of both inputs are of as many tokens: the paper's score adds one to the other.
        sq_norm = inner.channel_sq_norm * (inner.tokens / inner.weight if inner.weight > 0 else 1.0)
        return merged(self.inputs).channel_sq_norm, sq_norm

    def _scores(self, inner: ActivationStats, norms: tuple[Tensor, Tensor], config: CompressionConfig) -> Tensor:
        """(intermediate_size,) float64."""
        if config.channel_score == "lorap":
            return channel_importance(self.gate, self.up, self.down, *norms)
        if config.channel_score == "output":
            return output_scores(self.down, inner.channel_sq_norm, self.metric)
        if config.channel_score == "fluctuation":
            return fluctuation_scores(self.down, inner.variance)
        raise AssertionError(f"channel_score {config.channel_score!r} has no formula here")

    def _repaired(self, kept: Tensor, config: CompressionConfig) -> Tensor:
        """The refitted down projection; afterwards the first fold holds the sums of all, and the others no outer products."""
        folds, ridge = self.inner, config.repair_ridge
        shrinkage = shrinkage_of(folds, config.metric_shrinkage)
        if ridge == "auto":
            ridge = choose_ridge(self.down, folds, kept, shrinkage=shrinkage)
        for fold in folds[1:]:
            folds[0].merge(fold)
            fold.outer = None
        release_freed_memory(self.down.numel())
        return repair_down(self.down, folds[0].moment.shrunk(shrinkage), kept, ridge=float(ridge))


@dataclass(frozen=True)
class PrunedFFN:
    """What is left of an FFN.

    Args:
        kept: (width,) int64, the channels that stay.
        down: (hidden_size, width).
        errors: relative error of each projection, by role.
    """

    kept: Tensor
    down: Tensor
    errors: dict[str, float]
