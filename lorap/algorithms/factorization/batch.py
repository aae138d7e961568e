"""``factorize`` and ``factorize_batch``: from weights and metrics to factor pairs with certificates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.algorithms.factorization.checks import check
from lorap.algorithms.factorization.problem import Problem, weigh
from lorap.algorithms.factorization.solvers import TOLERANCES, Solved, choose, solve
from lorap.algorithms.factorization.tasks import Task, grouped, uploaded
from lorap.errors import FactorizationError


@dataclass(frozen=True)
class Factorization:
    """W ~ left @ right.

    Args:
        left: (out_features, rank), in the dtype of the weight.
        right: (rank, in_features), in the dtype of the weight.
        error: ||A^(1/2) (W - left @ right) C^(1/2)||_F / ||A^(1/2) W C^(1/2)||_F before rounding to that dtype; 0 is exact.
        singular_values: float64, of A^(1/2) W C^(1/2), descending: all min(out, in) of them, except from the block iteration
            (``subspace``), which knows little more than the first ``rank``. Those beyond come from float32 where ``mixed`` ran.
        excess: at most this share of ``error`` lies above the least possible one, by proof; 0 also where that error is too
            small for float64 to tell.
        method: what solved it: ``eigh``, ``mixed``, ``subspace`` or ``svd``.
        missed: methods that were tried before and did not reach the tolerance.
    """

    left: Tensor
    right: Tensor
    error: float
    singular_values: Tensor
    excess: float = 0.0
    method: str = "eigh"
    missed: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The method in words, such as ``eigh after subspace, mixed`` where those missed the tolerance."""
        return f"{self.method} after {', '.join(self.missed)}" if self.missed else self.method


def factorize(
    weight: Tensor,
    rank: int,
    metric: Tensor | None = None,
    *,
    output_metric: Tensor | None = None,
    name: str = "weight",
    method: str = "auto",
    tolerance: float | None = None,
    spectrum: bool = False,
) -> Factorization:
    """Best rank-``rank`` factor pair of ``weight`` in the norm that ``metric`` and ``output_metric`` define.

    Each component carries the same norm in both factors, so that neither overflows nor underflows in 16 bits.

    Args:
        weight: (out_features, in_features), floating point.
        rank: between 1 and min(out_features, in_features).
        metric: None for the plain SVD; a vector (in_features,) C_jj >= 0 (pass ``channel_sq_norm``); or a positive
            semi-definite matrix (in_features, in_features).
        output_metric: None, or a positive semi-definite matrix (out_features, out_features); the product is 0 in directions
            that a singular one does not see.
        name: what to call the weight in messages.
        method: ``auto``; ``eigh``, the float64 reference; ``mixed``, a float32 eigensolver with float64 steps; ``subspace``,
            block iteration for the first vectors, all matrix products; ``svd``, torch's SVD of the weighted matrix in float64.
        tolerance: how far the error may lie above the least one, relatively; None for 1e-6 with ``auto``, 1e-4 with ``mixed`` and
            ``subspace``. Where a method cannot prove that, the next sturdier one takes over.
        spectrum: whether all singular values are wanted.

    Raises:
        FactorizationError: shapes do not fit, the rank or the method is impossible, or an entry is NaN or infinite.
    """
    (factors,) = factorize_batch(
        [weight],
        [rank],
        [metric],
        output_metrics=[output_metric],
        names=[name],
        method=method,
        tolerance=tolerance,
        spectrum=spectrum,
    )
    return factors


@torch.no_grad()
def factorize_batch(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    metrics: Sequence[Tensor | None] | None = None,
    *,
    output_metrics: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    method: str = "auto",
    tolerance: float | None = None,
    spectrum: bool = False,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
) -> list[Factorization]:
    """:func:`factorize` for many weights, in their order.

    Matrices whose smaller sides are equal are solved together on a GPU, as many as the memory budget allows, while the next ones
    are uploaded. On a CPU they are taken one by one: a matrix product already uses all threads.

    Args:
        weights, ranks, metrics, output_metrics, names: one of each per factorization, as in :func:`factorize`. A metric that
            several share is best passed as one tensor: it is uploaded once.
        device: where to work; None for where each weight is. Results come back to where the weight was.
        memory_budget: bytes that may be used beyond the inputs and the results; None for two thirds of what is free on a GPU. A
            single factorization runs in any case.

    Returns:
        One for each weight, in their order.

    Raises:
        FactorizationError: as in :func:`factorize`, before anything is computed; or the lengths differ.
    """
    tasks = _tasks(weights, ranks, metrics, output_metrics, names, method, spectrum, device)
    tolerance = TOLERANCES[method] if tolerance is None else tolerance
    results: list[Factorization | None] = [None] * len(tasks)
    for group in uploaded(grouped(tasks, memory_budget)):
        for task, factors in zip(group, _solve_group(group, tolerance), strict=True):
            results[task.index] = factors
    return [factors for factors in results if factors is not None]


def _tasks(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    metrics: Sequence[Tensor | None] | None,
    output_metrics: Sequence[Tensor | None] | None,
    names: Sequence[str] | None,
    method: str,
    spectrum: bool,
    device: torch.device | str | None,
) -> list[Task]:
    count = len(weights)
    metrics = [None] * count if metrics is None else metrics
    output_metrics = [None] * count if output_metrics is None else output_metrics
    names = [f"weight {index}" for index in range(count)] if names is None else names
    lengths = {"ranks": ranks, "metrics": metrics, "output_metrics": output_metrics, "names": names}
    for what, given in lengths.items():
        if len(given) != count:
            raise FactorizationError(f"{count} weights were given and {len(given)} {what}; there must be one for each")
    tasks = []
    for index, (weight, rank, c, a, name) in enumerate(
        zip(weights, ranks, metrics, output_metrics, names, strict=True)
    ):
        check(weight, rank, c, a, name)
        place = weight.device if device is None else torch.device(device)
        chosen = choose(method, place, min(weight.shape), rank, spectrum=spectrum)
        tasks.append(Task(index, weight, rank, c, a, chosen, place, weight.device))
    return tasks


def _solve_group(tasks: Sequence[Task], tolerance: float) -> Iterator[Factorization]:
    """Results in the order of the tasks, which share a method and a size."""
    if tasks[0].method == "svd":
        for task in tasks:
            yield _by_svd(task)
        return
    problems = [Problem.of(task.weight, task.metric, task.output_metric) for task in tasks]
    grams = [problem.gram for problem in problems]
    solved = solve(grams, [task.rank for task in tasks], method=tasks[0].method, tolerance=tolerance)
    totals = [float(gram.trace()) for gram in grams]
    # What is solved is not needed to make factors.
    problems = [replace(problem, gram=problem.gram.new_empty(0, 0)) for problem in problems]
    del grams
    for task, problem, answer, total in zip(tasks, problems, solved, totals, strict=True):
        yield _factorization(task, problem, answer, total)


def _factorization(task: Task, problem: Problem, solved: Solved, total: float) -> Factorization:
    eigen = solved.eigen
    left, right = problem.factors(problem.outputs(eigen), task.weight.dtype)
    return Factorization(
        left=left.to(task.home),
        right=right.to(task.home),
        error=math.sqrt(min(1.0, eigen.lost / total)) if total > 0 else 0.0,
        singular_values=(eigen.values / problem.scale).sqrt().to(task.home),
        excess=eigen.excess,
        method=solved.method,
        missed=solved.missed,
    )


def _by_svd(task: Task) -> Factorization:
    """torch's SVD of the weighted matrix in float64, for comparison: on a GPU the driver it prefers."""
    problem = Problem.of(task.weight, task.metric, task.output_metric)
    weighted = problem.weighted
    if weighted is None:
        weighted = weigh(problem.seen, None if task.metric is None else task.metric.to(problem.seen))
    u, s, _ = torch.linalg.svd(weighted, full_matrices=False)
    energy = s.square()
    total = energy.sum()
    full = task.rank == min(problem.seen.shape)
    outputs = torch.linalg.qr(problem.seen).Q[:, : task.rank] if full else u[:, : task.rank]
    left, right = problem.factors(outputs, task.weight.dtype)
    return Factorization(
        left=left.to(task.home),
        right=right.to(task.home),
        error=float((energy[task.rank :].sum() / total).sqrt()) if total > 0 else 0.0,
        singular_values=s.to(task.home),
        method="svd",
    )
