"""One parameter budget for all matrices of a model: each gets the size at which another parameter helps no less elsewhere.

Every matrix, or FFN, has candidate sizes with a price in parameters and a cost in expected loss. Minimising the sum of the
costs under a budget is a knapsack problem; on the lower convex hulls of the candidates the greedy choice by steepest descent
solves it up to the last step (it is the Lagrangian solution at the multiplier where the budget is reached), and what is left
over then takes the steps that still fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from lorap.architectures import STOCK_MULTIPLES
from lorap.compression.allocation import Shape, break_even_rank
from lorap.errors import ConfigError
from lorap.nn.low_rank_tensors import LowRankTensors

Key = TypeVar("Key", bound=Hashable)

# Ranks and widths go to multiples of this where the model can afford it: tensor-core tiles and 16-byte loads need no tail then.
LARGEST_MULTIPLE = 64
# A rank that is no multiple of 8 sends 16-bit GPU loads down the slow path.
SMALLEST_RANK_MULTIPLE = 8
# In a narrower FFN a block of 32 would be more than this share of the axis; such models are toys.
SMALLEST_BLOCK_SHARE = 1 / 4
# A multiple is affordable if it is no more than this share of the axis, ...
AXIS_SHARE = 1 / 16
# ... and if one step of it changes no more than this share of all parameters: the budget is met to 0.2 % after rounding.
BUDGET_SHARE = 1 / 500


@dataclass(frozen=True)
class Candidate:
    """One size that a matrix or an FFN could have.

    Args:
        size: rank or width; for a matrix the smaller side means that it stays dense.
        params: that it would hold; bytes where the budget is one of bytes.
        cost: expected increase of the loss, in nats per token, or any other unit that all candidates share.
        bits: of its weights where these are mixed: of a matrix, or of gate and up, and of down.
    """

    size: int
    params: int
    cost: float
    bits: tuple[int, ...] = ()


def rank_candidates(shape: Shape, tail: Tensor, *, pivoted: bool, multiple: int) -> list[Candidate]:
    """Ranks of a matrix that are smaller than the dense matrix, and dense as the last.

    Args:
        shape: (out_features, in_features).
        tail: (min(shape) + 1,) cost at each rank, from rank 0 on.
        pivoted: storage of r (m + n - r) numbers instead of r (m + n).
        multiple: ranks are multiples of it.

    Returns:
        By ascending rank; dense is the last, at cost 0.
    """
    out_features, in_features = shape
    full = min(shape)
    limit = full if pivoted else break_even_rank(shape)
    costs = tail.tolist()
    candidates = [
        Candidate(rank, LowRankTensors(*shape, rank, pivoted=pivoted).factor_params, costs[rank])
        for rank in range(multiple, full, multiple)
        if rank < limit
    ]
    return [*candidates, Candidate(full, out_features * in_features, 0.0)]


def width_candidates(hidden_size: int, tail: Tensor, *, matrices: int = 3, multiple: int) -> list[Candidate]:
    """Widths of a gated FFN, the dense one as the last.

    Args:
        hidden_size: of the model.
        tail: (width + 1,), the cost at each width, from 0 on.
        matrices: that a channel is a row or column of.
        multiple: widths between the dense one and 0 are multiples of it.

    Returns:
        By ascending width; the dense one is the last, at cost 0.
    """
    width, costs = len(tail) - 1, tail.tolist()
    sizes = [*range(multiple, width, multiple), width]
    return [Candidate(size, matrices * hidden_size * size, 0.0 if size == width else costs[size]) for size in sizes]


def shared_across_layers(curves: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The same size in every layer, as one curve; all must have candidates of the same sizes and bits, in the same order."""
    return [
        replace(
            candidates[0],
            params=sum(candidate.params for candidate in candidates),
            cost=sum(candidate.cost for candidate in candidates),
        )
        for candidates in zip(*curves, strict=True)
    ]


def allocate_budget(curves: Mapping[Key, Sequence[Candidate]], budget: float) -> dict[Key, Candidate]:
    """The candidate that each key takes, so that parameters stay within ``budget`` and the sum of costs is least.

    Returns:
        One candidate for each key.

    Raises:
        ConfigError: not even the smallest candidates fit.
    """
    hulls = {key: lower_hull(candidates) for key, candidates in curves.items()}
    taken = {key: hull[0] for key, hull in hulls.items()}
    used = sum(candidate.params for candidate in taken.values())
    if used > budget:
        raise ConfigError(
            f"the smallest ranks and widths need {used:,} parameters and the sparsity leaves {budget:,.0f}; lower the sparsity, "
            "or choose a smaller rank_multiple and width_multiple"
        )
    steps = []
    for position, (key, hull) in enumerate(hulls.items()):
        for before, after in itertools.pairwise(hull):
            gain = (before.cost - after.cost) / (after.params - before.params)
            steps.append((-gain, position, after.params, key, after))
    for _, _, _, key, after in sorted(steps, key=lambda step: step[:3]):
        extra = after.params - taken[key].params
        if used + extra > budget:
            break  # flatter steps would still fit, but candidates between the corners of this one may help more
        taken[key] = after
        used += extra
    return _top_up(curves, taken, budget - used)


def _top_up(
    curves: Mapping[Key, Sequence[Candidate]], taken: dict[Key, Candidate], left: float
) -> dict[Key, Candidate]:
    """Spend what the hulls' steps were too large for, on the candidates between them."""
    while True:
        best: tuple[float, Key, Candidate] | None = None
        for key, candidates in curves.items():
            for candidate in candidates:
                extra = candidate.params - taken[key].params
                gain = taken[key].cost - candidate.cost
                if 0 < extra <= left and gain > 0 and (best is None or gain / extra > best[0]):
                    best = (gain / extra, key, candidate)
        if best is None:
            return taken
        _, key, candidate = best
        left -= candidate.params - taken[key].params
        taken[key] = candidate


def lower_hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no mixture of two others beats, by ascending parameters and descending cost."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.params, candidate.cost)):
        if hull and candidate.cost >= hull[-1].cost:
            continue
        while len(hull) >= 2 and _is_above(hull[-2], hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _is_above(first: Candidate, middle: Candidate, last: Candidate) -> bool:
    """Whether ``middle`` lies on or above the line from ``first`` to ``last``."""
    return (middle.cost - first.cost) * (last.params - first.params) >= (last.cost - first.cost) * (
        middle.params - first.params
    )


def stock_multiple(width: int, params_per_channel: int, total_params: int) -> int:
    """What FFN widths for other hosts are multiples of: 256 in FFNs of 4,096 channels or more, else 32.

    llama.cpp leaves a matrix whose rows are no multiple of its blocks in 16 bits, and says nothing.

    Args:
        width: channels of the dense FFN.
        params_per_channel: of one layer.
        total_params: of the layer's compressed sub-layers.
    """
    large, small = STOCK_MULTIPLES
    if large <= width * AXIS_SHARE:
        return large
    if small <= width * SMALLEST_BLOCK_SHARE:
        return small
    return affordable_multiple(width, params_per_channel, total_params, smallest=1)


def affordable_multiple(axis: int, params_per_unit: int, total_params: int, *, smallest: int) -> int:
    """The largest power of two up to 64 that ``axis`` and the budget can afford as a step, at least ``smallest``.

    Args:
        axis: the smallest size that is to be cut, such as min(out_features, in_features).
        params_per_unit: parameters that one more rank or channel costs, over all layers that change together.
        total_params: of all compressed sub-layers.
        smallest: what is used if nothing larger fits.
    """
    multiple = LARGEST_MULTIPLE
    while multiple > smallest and (
        multiple > axis * AXIS_SHARE or multiple * params_per_unit > total_params * BUDGET_SHARE
    ):
        multiple //= 2
    return multiple
