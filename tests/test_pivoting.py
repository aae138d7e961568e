"""Pivoted storage is the same matrix in fewer numbers: rows of it, and coefficients within 2 for the others.

Proved here: the product comes back to float64 rounding for random, ill-scaled, rank-deficient and adversarial factors;
coefficients stay bounded, also where elimination alone lets them grow to 1e10; ranks and counts are exact integers.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorap import FactorizationError, LowRankLinear, factorize
from lorap.algorithms.pivoting import (
    COEFFICIENT_BOUND,
    PivotedFactors,
    _rows_by_elimination,
    pivot,
    pivoted_parameters,
    pivoted_rank,
    storage_error,
)

BOUND = COEFFICIENT_BOUND * (1 + 1e-9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def others(stored: PivotedFactors, rows: int) -> Tensor:
    return torch.tensor([row for row in range(rows) if row not in stored.pivot_rows.tolist()], dtype=torch.int64)


def product(stored: PivotedFactors) -> Tensor:
    rows = len(stored.left) + len(stored.right)
    weight = torch.empty(rows, stored.right.shape[1], dtype=torch.float64)
    weight[stored.pivot_rows] = stored.right
    weight[others(stored, rows)] = stored.left @ stored.right
    return weight


def check(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> PivotedFactors:
    """Everything that holds for every matrix."""
    (m, rank), n = left.shape, right.shape[1]
    stored = pivot(left, right)
    assert (stored.left.shape, stored.right.shape) == ((m - rank, rank), (rank, n))
    assert {tensor.dtype for tensor in (stored.left, stored.right)} == {torch.float64}
    rows = stored.pivot_rows
    assert rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows[0] >= 0
    assert rows[-1] < m
    assert stored.largest_coefficient == (float(stored.left.abs().max()) if m > rank else 0)
    assert stored.largest_coefficient <= BOUND
    weight = left.double() @ right.double()
    assert float((product(stored) - weight).norm()) <= tolerance * float(weight.norm())
    return stored


def test_exact_values() -> None:
    """Rows 1 and 3 are the large ones; row 0 is half their sum, row 2 is zero, row 4 their quarter difference."""
    left = torch.tensor([[2.0, 2], [4, 0], [0, 0], [0, 4], [1, -1]])
    right = torch.tensor([[1.0, 0, 2], [0, 1, -1]])
    stored = pivot(left, right)
    assert stored.pivot_rows.tolist() == [1, 3]
    torch.testing.assert_close(stored.right, torch.tensor([[4.0, 0, 8], [0, 4, -4]], dtype=torch.float64))
    expected = torch.tensor([[0.5, 0.5], [0, 0], [0.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(stored.left, expected)
    assert stored.largest_coefficient == pytest.approx(0.5)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), data=st.data(), seed=st.integers(0, 999))
@settings(max_examples=100, deadline=None)
def test_any_product_comes_back(rows: int, columns: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, rows))
    # Small integers make equal rows, dependent columns and ties common.
    kind = data.draw(st.sampled_from(["gaussian", "integers"]))
    left = normal(rows, rank, seed=seed)
    left = left if kind == "gaussian" else left.round()
    check(left, normal(rank, columns, seed=seed + 1), tolerance=1e-9)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def wilkinson(rank: int) -> Tensor:
    """Partial pivoting takes the first rows, and the last one then needs coefficients up to 0.9 * 1.9^(rank - 1)."""
    below = torch.full((rank + 1, rank), -0.9, dtype=torch.float64).tril(-1)
    below[rank] = 0.9
    return below + torch.eye(rank + 1, rank, dtype=torch.float64)


HARD = {
    "zero": torch.zeros(40, 7, dtype=torch.float64),
    "zero-rows": torch.cat((normal(30, 11), torch.zeros(33, 11, dtype=torch.float64))),
    "duplicated-rows": normal(20, 11).repeat(5, 1),
    "rank-deficient": normal(100, 3) @ normal(3, 30, seed=1),
    "one-column-twice": normal(63, 1).expand(63, 2),
    "8-decades": orthonormal(100, 63) * torch.logspace(0, -8, 63, dtype=torch.float64) @ orthonormal(63, 63, 1),
    "16-decades": orthonormal(100, 63) * torch.logspace(0, -16, 63, dtype=torch.float64) @ orthonormal(63, 63, 1),
    "row-scales": normal(63, 11) * torch.logspace(0, -12, 63, dtype=torch.float64)[:, None],
    "monomials": torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None] ** torch.arange(60),
    "wilkinson-10": wilkinson(10),
    "wilkinson-40": wilkinson(40),
    "wilkinson-100": wilkinson(100),
    "square": normal(30, 30),
    "one-by-one": normal(1, 1),
    "one-column": normal(63, 1),
    "one-row-less": normal(63, 62),
}


@pytest.mark.parametrize("left", HARD.values(), ids=HARD)
def test_hard_factors(left: Tensor) -> None:
    check(left, normal(left.shape[1], 50, seed=2))


@pytest.mark.parametrize("rank", [4, 10, 40])
def test_exchanges_are_what_bounds_the_coefficients(rank: int) -> None:
    _, coefficients = _rows_by_elimination(torch.linalg.qr(wilkinson(rank)).Q)
    assert float(coefficients.abs().max()) == pytest.approx(0.9 * 1.9 ** (rank - 1), rel=1e-3)
    assert pivot(wilkinson(rank), normal(rank, 50)).largest_coefficient <= BOUND


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_scales_that_cancel_between_the_factors_do_no_harm(scale: float) -> None:
    spread = torch.logspace(0, math.log10(scale), 11, dtype=torch.float64)
    check(normal(63, 11) * spread, normal(11, 50) / spread[:, None])


def test_rows_that_depend_on_nothing_get_coefficients_0() -> None:
    """Two independent rows at rank 3: the third pivot is free, and no row is made from it."""
    left = torch.zeros(5, 3, dtype=torch.float64)
    left[1, 0], left[3, 1] = 1, 1
    stored = check(left, normal(3, 7))
    free = [column for column, row in enumerate(stored.pivot_rows.tolist()) if row not in (1, 3)]
    assert len(free) == 1
    assert float(stored.left[:, free].abs().max()) < 1e-12


def test_the_result_depends_on_the_inputs_alone() -> None:
    left, right = normal(100, 63), normal(63, 50)
    first, second = pivot(left, right), pivot(left.clone(), right.clone())
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.pivot_rows, second.pivot_rows)


def test_the_choice_of_rows_is_that_of_the_matrix_not_of_its_factors() -> None:
    left, right, mix = normal(100, 11), normal(11, 50), normal(11, 11, seed=3)
    stored, mixed = pivot(left, right), pivot(left @ mix, torch.linalg.solve(mix, right))
    for a, b in ((product(stored), product(mixed)),):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert mixed.largest_coefficient <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_any_dtype_are_taken_at_face_value(dtype: torch.dtype) -> None:
    check(normal(63, 11).to(dtype), normal(11, 50).to(dtype))


def test_a_factorized_weight_keeps_its_optimal_error() -> None:
    weight, sq_norm = normal(100, 63), normal(63, seed=1).square()
    factors = factorize(weight, 20, sq_norm)
    stored = check(factors.left, factors.right)
    error = float(((weight - product(stored)) * sq_norm.sqrt()).norm() / (weight * sq_norm.sqrt()).norm())
    assert error == pytest.approx(factors.error, rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    left, right = normal(100, 63), normal(63, 50)
    stored = pivot(left.cuda(), right.cuda())
    assert stored.left.is_cuda
    assert stored.pivot_rows.is_cuda
    assert stored.largest_coefficient <= BOUND
    moved = PivotedFactors(stored.left.cpu(), stored.right.cpu(), stored.pivot_rows.cpu(), 0)
    torch.testing.assert_close(product(moved), left @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (
            normal(7, 3),
            normal(4, 5),
            r"left \(7, 3\) and right \(4, 5\) are no factors of w; \(m, r\) and \(r, n\) fit",
        ),
        (normal(7), normal(1, 5), r"left \(7,\) .* are no factors"),
        (normal(7, 0), normal(0, 5), r"left \(7, 0\) .* are no factors"),
        (normal(3, 4), normal(4, 5), r"of w: 3 rows cannot hold 4 pivots; lower the rank"),
        (torch.ones(3, 2, dtype=torch.int64), normal(2, 5), r"torch\.int64 and torch\.float64, not floating point"),
        (normal(3, 2) * torch.nan, normal(2, 5), "factors of w contain NaN or infinity"),
        (normal(3, 2), normal(2, 5) / 0, "factors of w contain NaN or infinity"),
    ],
)
def test_impossible_factors_are_refused(left: Tensor, right: Tensor, message: str) -> None:
    with pytest.raises(FactorizationError, match=message):
        pivot(left, right, name="w")


# --- counts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [((100, 63), 10, 1530), ((100, 63), 63, 6300), ((63, 100), 63, 6300), ((7, 5), 0, 0), ((1, 1), 1, 1)],
)
def test_pivoted_parameters(shape: tuple[int, int], rank: int, expected: int) -> None:
    assert pivoted_parameters(shape, rank) == expected
    if 0 < rank < min(shape):
        stored = pivot(normal(shape[0], rank), normal(rank, shape[1]))
        assert stored.left.numel() + stored.right.numel() == expected


@pytest.mark.parametrize(
    ("shape", "kept", "rank"),
    [
        ((4096, 4096), 0.75, 2048),  # exactly a quarter is saved: 2048 * (8192 - 2048) = 3/4 * 4096^2
        ((4096, 4096), 0.8, 2264),  # a factor pair has 1638
        ((10, 10), 0.51, 3),  # 3 * 17 = 51
        ((10, 10), 0.5099, 2),
        ((10, 10), 0.19, 1),
        ((10, 10), 0.1899, 0),
        ((100, 63), 1.0, 63),
        ((100, 63), 0.0, 0),
        ((1, 63), 0.99, 0),
        ((1, 1), 1.0, 1),
    ],
)
def test_pivoted_rank(shape: tuple[int, int], kept: float, rank: int) -> None:
    assert pivoted_rank(shape, kept) == rank


@given(m=st.integers(1, 20_000), n=st.integers(1, 20_000), kept=st.floats(0, 1))
def test_pivoted_rank_is_the_largest_that_fits(m: int, n: int, kept: float) -> None:
    rank, budget = pivoted_rank((m, n), kept), kept * (m * n)
    assert 0 <= rank <= min(m, n)
    assert pivoted_parameters((m, n), rank) <= budget
    assert rank == min(m, n) or pivoted_parameters((m, n), rank + 1) > budget


@given(m=st.integers(1, 20_000), n=st.integers(1, 20_000), data=st.data())
def test_a_share_that_one_rank_fills_exactly_gives_that_rank(m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    share = pivoted_parameters((m, n), rank) / (m * n)
    # Dividing may round down, and then the budget is short by less than one parameter.
    assert pivoted_rank((m, n), math.nextafter(share, 2)) == rank


# --- storage error ---------------------------------------------------------------------------------------------------------


def test_storage_error_by_hand() -> None:
    """Errors 3 and 4 on weights 6 and 8; the second column is seen at a quarter of the energy, or not at all."""
    reference = torch.tensor([[6.0, 0], [0, 8]], dtype=torch.float64)
    stored = torch.tensor([[3.0, 0], [0, 4]])
    assert storage_error(reference, stored) == pytest.approx(0.5)
    half = torch.tensor([[6.0, 0], [0, 4]])
    assert storage_error(reference, half, torch.tensor([1.0, 0.25])) == pytest.approx(2 / math.sqrt(52))
    assert storage_error(reference, half, torch.tensor([1.0, 0.0])) == 0
    # A full metric [[2, 1], [1, 2]]: 4^2 * 2 over 6^2 * 2 + 8^2 * 2.
    assert storage_error(reference, half, torch.tensor([[2.0, 1], [1, 2]])) == pytest.approx(0.4)
    assert storage_error(reference * 0, stored * 0) == 0
    assert storage_error(reference * 0, stored) == math.inf
    with pytest.raises(FactorizationError, match=r"stored has shape \(1, 2\), the reference \(2, 2\)"):
        storage_error(reference, stored[:1])


@pytest.mark.parametrize(
    "metric", [None, normal(63).square(), normal(63, 63) @ normal(63, 63).T], ids=["none", "c", "C"]
)
@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_storing_in_16_bits_costs_about_one_rounding(dtype: torch.dtype, eps: float, metric: Tensor | None) -> None:
    stored = pivot(normal(100, 20), normal(20, 63))
    module = LowRankLinear.from_factors(stored.left.to(dtype), stored.right.to(dtype), None, stored.pivot_rows)
    error = storage_error(product(stored), module.reconstruct(dtype=torch.float64), metric)
    assert 0.1 * eps < error < 2 * eps
