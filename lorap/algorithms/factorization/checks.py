"""What a factorization refuses, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lorap.errors import FactorizationError


def check(weight: Tensor, rank: int, metric: Tensor | None, output_metric: Tensor | None, name: str) -> None:
    """Refuse what :func:`lorap.factorize` cannot factorize.

    Args:
        weight: must be (out_features, in_features), floating point.
        rank: must lie in [1, min(out_features, in_features)].
        metric: must be (in_features,), not negative, or (in_features, in_features); None for none.
        output_metric: must be (out_features, out_features); None for none.
        name: of the weight, for messages.

    Raises:
        FactorizationError: a shape, the rank or a number is impossible; it names ``name``, the numbers and what would fit.
    """
    _check_weight(weight, rank, name)
    _check_metric(weight, metric, name)
    _check_output_metric(weight, output_metric, name)


def _check_weight(weight: Tensor, rank: int, name: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FactorizationError(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)}; a floating-point matrix is needed"
        )
    if not 1 <= rank <= min(weight.shape):
        raise FactorizationError(
            f"rank {rank} is impossible for {name} of shape {tuple(weight.shape)}; it must lie in [1, {min(weight.shape)}]"
        )
    if not torch.isfinite(weight).all():
        raise FactorizationError(f"{name} contains NaN or infinity")


def _check_metric(weight: Tensor, metric: Tensor | None, name: str) -> None:
    if metric is None:
        return
    in_features = weight.shape[1]
    if metric.shape not in ((in_features,), (in_features, in_features)):
        raise FactorizationError(
            f"the metric of {name} has shape {tuple(metric.shape)}; ({in_features},) or ({in_features}, {in_features}) fits"
        )
    if not torch.isfinite(metric).all():
        raise FactorizationError(f"the metric of {name} contains NaN or infinity")
    if metric.ndim == 1 and bool((metric < 0).any()):
        raise FactorizationError(
            f"the metric of {name} has a negative entry ({float(metric.min())}); pass squared norms"
        )


def _check_output_metric(weight: Tensor, output_metric: Tensor | None, name: str) -> None:
    if output_metric is None:
        return
    out_features = weight.shape[0]
    if output_metric.shape != (out_features, out_features):
        raise FactorizationError(
            f"the output metric of {name} has shape {tuple(output_metric.shape)}; ({out_features}, {out_features}) fits"
        )
    if not torch.isfinite(output_metric).all():
        raise FactorizationError(f"the output metric of {name} contains NaN or infinity")
