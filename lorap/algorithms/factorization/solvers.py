"""Which method solves an eigenproblem, and which one takes over where its certificate is not good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.algorithms.factorization import eigen
from lorap.algorithms.factorization.eigen import Eigen
from lorap.errors import FactorizationError

METHODS = ("auto", "eigh", "mixed", "subspace", "svd")
# Relative distance to the least error that is allowed, unless a caller says otherwise.
TOLERANCES = {"auto": 1e-6, "eigh": 1e-6, "mixed": 1e-4, "subspace": 1e-4, "svd": 1e-6}
STURDIER = {"subspace": "mixed", "mixed": "eigh"}


@dataclass(frozen=True)
class Rule:
    """When ``auto`` chooses what.

    Args:
        eigh_up_to: size of the smaller side up to which the whole float64 eigenproblem is solved.
        subspace_share: largest share of the size that a rank may have for the block iteration, which carries a fifth more.
        mixed_share: the same for the float32 eigensolver, whose float64 steps are eigenproblems of a fifth more than the rank.
    """

    eigh_up_to: int
    subspace_share: float
    mixed_share: float

    def choose(self, size: int, rank: int, *, spectrum: bool) -> str:
        """The method that this rule takes: ``eigh``, ``mixed`` or ``subspace``.

        Args:
            size: of the smaller side.
            rank: that is wanted.
            spectrum: whether all eigenvalues are wanted, which the block iteration does not have.
        """
        if size <= self.eigh_up_to or rank > self.mixed_share * size or eigen.basis_size(size, rank) == size:
            return "eigh"
        return "mixed" if spectrum or rank > self.subspace_share * size else "subspace"


# Measured on two cores with AVX-512: at 1,024 eigh takes 0.17 s and mixed 0.21; at 4,096 mixed takes 4.8 s for a rank of 1,024
# and 3.6 for 256, eigh 6.4, and the block iteration 7.1 and 3.0. On one core, size 4,096: mixed takes 0.72, 0.89, 1.12, 1.45 and
# 1.97 x the time of eigh at ranks of 0.25, 0.35, 0.45, 0.55 and 0.7 of the size; size 1,280: 0.71, 0.94, 1.41, 1.80 and 2.60 x.
CPU = Rule(eigh_up_to=1024, subspace_share=0.07, mixed_share=0.4)
# Predicted, never measured: eigensolvers of a GPU are further behind its matrix products than those of a CPU, and the more so
# where float64 runs at a 64th of the rate of float32: there the block iteration has the fewest float64 operations of all.
GPU = Rule(eigh_up_to=512, subspace_share=0.7, mixed_share=1.0)
GPU_SLOW_FLOAT64 = Rule(eigh_up_to=128, subspace_share=0.8, mixed_share=1.0)
# Compute capabilities with float64 at half the rate of float32: P100, V100, A100, H100, B200.
FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def rule_for(device: torch.device) -> Rule:
    """What ``auto`` follows on a device."""
    if device.type != "cuda":
        return CPU
    return GPU if torch.cuda.get_device_capability(device) in FAST_FLOAT64 else GPU_SLOW_FLOAT64


@dataclass(frozen=True)
class Solved:
    """An eigenproblem's answer, the method it comes from, and those that missed the tolerance before."""

    eigen: Eigen
    method: str
    missed: tuple[str, ...] = ()


def choose(method: str, device: torch.device, size: int, rank: int, *, spectrum: bool) -> str:
    """The method itself, or what ``auto`` means here.

    Args:
        method: one of ``METHODS``.
        device: where the problem is solved.
        size: of the smaller side.
        rank: that is wanted.
        spectrum: whether all eigenvalues are wanted.

    Raises:
        FactorizationError: there is no such method.
    """
    if method not in METHODS:
        raise FactorizationError(f"method {method!r} is not known; choose from {', '.join(METHODS)}")
    return rule_for(device).choose(size, rank, spectrum=spectrum) if method == "auto" else method


def solve(grams: Sequence[Tensor], ranks: Sequence[int], *, method: str, tolerance: float) -> list[Solved]:
    """Solve matrices of one size, each to ``tolerance``; those that miss it are solved alone, then by the next sturdier method.

    Args:
        grams: (n, n) float64, with traces near n.
        ranks: how many vectors of each.
        method: ``eigh``, ``mixed`` or ``subspace``.
        tolerance: relative distance to the least error.

    Returns:
        One for each matrix, in their order.
    """
    if method == "subspace":
        stacked = torch.stack(tuple(grams)) if len(grams) > 1 else grams[0][None]
        found = eigen.subspace(stacked, ranks, tolerance=tolerance)
        del stacked
    elif method == "mixed":
        found = [eigen.mixed(gram, rank, tolerance=tolerance) for gram, rank in zip(grams, ranks, strict=True)]
    else:
        found = [eigen.eigh(gram, rank) for gram, rank in zip(grams, ranks, strict=True)]
    return [
        Solved(answer, method) if answer else _again(gram, rank, method, tolerance, alone=len(grams) == 1)
        for gram, rank, answer in zip(grams, ranks, found, strict=True)
    ]


def _again(gram: Tensor, rank: int, method: str, tolerance: float, *, alone: bool) -> Solved:
    """A batch shares its polynomials' degrees, so that what misses the tolerance in company may reach it alone."""
    (solved,) = solve([gram], [rank], method=STURDIER[method] if alone else method, tolerance=tolerance)
    return replace(solved, missed=(method, *solved.missed)) if alone else solved
