"""Rounding of weights to few bits, held against float64 and against rounding to the nearest."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lorap.algorithms import rounding
from lorap.algorithms.rounding import round_factors, round_weight, search_scales

F64 = torch.float64


def correlated(columns: int, tokens: int = 400) -> Tensor:
    """Second moment of inputs whose channels share a few directions and have very different sizes."""
    x = torch.randn(tokens, columns, dtype=F64) + torch.randn(tokens, 3, dtype=F64) @ torch.randn(3, columns, dtype=F64)
    x *= torch.logspace(-1, 1, columns, dtype=F64)[torch.randperm(columns)]
    return x.T @ x / tokens


def error(weight: Tensor, stored: Tensor, moment: Tensor) -> Tensor:
    """(N,): what the rounding of each row does to its outputs."""
    difference = weight - stored
    return ((difference @ moment) * difference).sum(1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 32), (5, 63, 32), (17, 100, 64), (9, 130, 32), (3, 64, 64)]
)
def test_no_row_is_worse_than_rounded_to_the_nearest_on_the_same_grid(
    bits: int, rows: int, columns: int, group: int
) -> None:
    torch.manual_seed(columns)
    weight, moment = torch.randn(rows, columns, dtype=F64), correlated(columns)
    found = round_weight(weight, moment, bits=bits, group=group, scale_dtype=torch.float32)
    assert found.numbers.dtype == torch.int8
    assert found.numbers.shape == weight.shape
    assert found.scales.shape == (rows, -(-columns // group))
    half = 2 ** (bits - 1)
    assert int(found.numbers.min()) >= -half
    assert int(found.numbers.max()) < half
    scales = found.scales.double()[:, torch.arange(columns) // group]
    nearest = (weight / scales).round().clamp(-half, half - 1) * scales
    damped = moment + rounding.DAMPING * moment.diagonal().mean() * torch.eye(columns, dtype=F64)
    ours, theirs = (error(weight, stored, damped) for stored in (found.weight(F64), nearest))
    assert bool((ours <= theirs * (1 + 1e-9)).all())
    if columns > 50 and bits < 8:
        assert float(ours.sum()) < 0.65 * float(theirs.sum())  # far better where inputs are correlated


def test_each_column_takes_back_what_those_before_it_did_wrong() -> None:
    """Against the definition, solved column by column: the target is the best one given the errors that are made already."""
    torch.manual_seed(0)
    columns = 7
    weight, moment = torch.randn(2, columns, dtype=F64), correlated(columns)
    scale = torch.full_like(weight, 0.4)
    factor = rounding.upper_factor(moment)
    metric = factor @ factor.T
    numbers = rounding.compensate(weight, scale, factor, lambda *of: rounding._numbers(*of, 4))
    for row in range(2):
        errors = torch.zeros(columns, dtype=F64)
        for k in range(columns):
            rest = slice(k, columns)
            # Least error over all later columns if they were free: e_rest = -C_rr^-1 C_rk e_<k, so the target is w_k - e_k.
            free = torch.linalg.solve(metric[rest, rest], -(metric[rest, :k] @ errors[:k]))
            number = ((weight[row, k] - free[0]) / 0.4).round().clamp(-8, 7)
            assert number == numbers[row, k]
            errors[k] = weight[row, k] - number * 0.4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("moment", [False, True], ids=["nearest", "compensated"])
def test_weights_that_lie_on_a_grid_stay_as_they_are(bits: int, moment: bool) -> None:
    torch.manual_seed(0)
    half = 2 ** (bits - 1)
    numbers = torch.randint(-half + 1, half, (11, 100)).double()
    numbers[:, ::32] = torch.tensor([-half, half - 1, 1 - half]).repeat(4)[
        :11, None
    ]  # an end of the range in every group
    scales = (torch.rand(11, 4, dtype=F64) + 0.5).bfloat16().double()
    weight = numbers * scales[:, torch.arange(100) // 32]
    found = round_weight(weight, correlated(100) if moment else None, bits=bits, group=32, scale_dtype=torch.bfloat16)
    assert torch.equal(found.weight(F64), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_judged_as_they_are_stored_and_never_zero(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 64, dtype=F64) * torch.tensor([1e-3, 1, 1e3, 0, 1e-6, 1], dtype=F64)[:, None]
    found = round_weight(weight, None, bits=8, group=32, scale_dtype=dtype)
    assert found.scales.dtype == dtype
    assert bool((found.scales != 0).all())
    assert bool(torch.isfinite(found.scales).all())
    stored = found.weight(F64)
    assert not stored[3].any()
    for row in (0, 1, 2, 5):
        assert float((stored[row] - weight[row]).norm() / weight[row].norm()) < 0.01


def test_important_columns_decide_on_the_scale() -> None:
    torch.manual_seed(1)
    weight, importance = torch.randn(50, 32, dtype=F64), torch.full((32,), 1e-3, dtype=F64)
    importance[:4] = 1.0

    def cost(weights: Tensor | None) -> float:
        scales = search_scales(weight, weights, bits=3, group=32, dtype=torch.float32).double()
        error = weight - (weight / scales).round().clamp(-4, 3) * scales
        return float((importance * error.square()).sum())

    assert cost(importance) < 0.5 * cost(None)


@pytest.mark.parametrize(("rows", "rank", "columns"), [(63, 1, 100), (100, 17, 63), (40, 33, 70)])
@pytest.mark.parametrize("moment", [False, True], ids=["nearest", "compensated"])
def test_factors_keep_their_product_and_are_better_than_each_rounded_alone(
    rows: int, rank: int, columns: int, moment: bool
) -> None:
    torch.manual_seed(rank)
    left, right = torch.randn(rows, rank, dtype=F64), torch.randn(rank, columns, dtype=F64)
    left *= torch.logspace(0, 2, rank, dtype=F64)  # factors as far from balanced as pivoted ones
    right *= torch.logspace(1, -1, rank, dtype=F64)[:, None]
    inputs = correlated(columns)
    options = {"bits": 4, "group": 32, "scale_dtype": torch.float32}
    given = inputs if moment else None
    found_left, found_right = round_factors(left, right, given, partial(round_weight, **options))
    alone = [round_weight(factor, None, **options).weight(F64) for factor in (left, right)]
    exact = left @ right
    ours = float(error(exact, found_left.weight(F64) @ found_right.weight(F64), inputs).sum())
    theirs = float(error(exact, alone[0] @ alone[1], inputs).sum())
    size = float(error(exact, torch.zeros_like(exact), inputs).sum())
    assert ours < theirs or rank == 1
    assert ours < 0.05 * size
    # With enough bits nothing is left but the rounding of float64.
    fine = round_factors(left, right, given, partial(round_weight, **(options | {"bits": 8})))
    assert float(error(exact, fine[0].weight(F64) @ fine[1].weight(F64), inputs).sum()) < 3e-4 * size


def test_the_same_factors_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(20, 5), torch.randn(5, 40)
    to_nearest = partial(round_weight, bits=4, group=32, scale_dtype=torch.bfloat16)
    first, second = (round_factors(left, right, None, to_nearest) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.numbers, other.numbers)
        assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("bits", [3, 4])
def test_factors_lose_less_than_behind_a_random_rotation_alone(bits: int) -> None:
    """Left orthonormal, any rotation, each factor rounded once in the metric of its inputs: the others."""
    torch.manual_seed(3)
    options = {"bits": bits, "group": 32, "scale_dtype": torch.float32}
    lost = torch.zeros(2, dtype=F64)
    for _ in range(4):
        inputs = correlated(100)
        left, right = (
            torch.randn(63, 30, dtype=F64),
            torch.logspace(0, -1, 30, dtype=F64)[:, None] * torch.randn(30, 100),
        )
        triangle = torch.linalg.qr(left).R
        rotation = torch.linalg.qr(torch.randn(30, 30, dtype=F64)).Q
        plain = round_weight(rotation.T @ triangle @ right, inputs, **options).weight(F64)
        seen = plain @ inputs
        fitted = torch.linalg.solve(plain @ seen.T, left @ right @ seen.T, left=False)
        others = round_weight(fitted, plain @ seen.T, **options).weight(F64) @ plain
        found = round_factors(left, right, inputs, partial(round_weight, **options))
        ours = found[0].weight(F64) @ found[1].weight(F64)
        size = error(left @ right, torch.zeros_like(ours), inputs).sum()
        lost += torch.stack([error(left @ right, product, inputs).sum() / size for product in (ours, others)])
    assert lost[0] < 0.8 * lost[1]


def test_what_left_takes_back_costs_right_nothing() -> None:
    torch.manual_seed(4)
    right, moment = torch.randn(9, 40, dtype=F64), correlated(40)
    metric = rounding._not_taken_back(right, moment)
    drawn = 1e-3 * torch.randn(9, 40, dtype=F64)
    within = torch.randn(9, 9, dtype=F64) @ right
    beyond = drawn - drawn @ moment @ right.T @ torch.linalg.inv(right @ moment @ right.T) @ right
    assert torch.allclose(
        error(beyond, torch.zeros_like(beyond), metric), error(beyond, torch.zeros_like(beyond), moment)
    )
    assert error(within, 0 * within, metric).sum() < 0.02 * error(within, 0 * within, moment).sum()
    # The same as what least squares leave, for any left.
    left, changed = torch.randn(7, 9, dtype=F64), right + drawn
    fitted = torch.linalg.solve(changed @ moment @ changed.T, left @ right @ moment @ changed.T, left=False)
    remaining = error(left @ right, fitted @ changed, moment)
    assert torch.allclose(remaining, error(left @ beyond, 0 * left @ drawn, metric), rtol=0.02)


@pytest.mark.parametrize("worse", [0, 2], ids=["first", "second"])
def test_the_better_of_two_rights_stays(worse: int) -> None:
    torch.manual_seed(5)
    left, right, inputs = torch.randn(50, 12, dtype=F64), torch.randn(12, 63, dtype=F64), correlated(63)
    made: list[rounding.Rounded] = []  # a right, the left, a right

    def round_one(weight: Tensor, metric: Tensor | None) -> rounding.Rounded:
        bits = 2 if len(made) == worse else 4
        made.append(round_weight(weight, metric, bits=bits, group=32, scale_dtype=torch.float32))
        return made[-1]

    found = round_factors(left, right, inputs, round_one)
    assert found[0] is made[1]
    assert found[1] is made[2 - worse]


def test_without_a_moment_all_inputs_are_alike() -> None:
    torch.manual_seed(6)
    left, right = torch.randn(63, 20), torch.randn(20, 100)
    options = {"bits": 4, "group": 32, "scale_dtype": torch.float32}
    given = round_factors(left, right, torch.eye(100, dtype=F64), partial(round_weight, **options))
    none = round_factors(left, right, None, partial(round_weight, **options))
    for one, other in zip(given, none, strict=True):
        assert torch.equal(one.numbers, other.numbers)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factors_of_nothing_stay_nothing(dtype: torch.dtype) -> None:
    options = {"bits": 4, "group": 32, "scale_dtype": torch.bfloat16}
    for left, right in ((torch.zeros(7, 3), torch.randn(3, 40)), (torch.randn(7, 3), torch.zeros(3, 40))):
        found = round_factors(left.to(dtype), right.to(dtype), correlated(40), partial(round_weight, **options))
        assert float((found[0].weight(F64) @ found[1].weight(F64)).abs().max()) < 1e-6
