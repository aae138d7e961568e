"""One budget for all: never exceeded, as good as trying everything up to the last step, and more never makes it worse."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorap.algorithms.factorization import suffix_sums
from lorap.compression.budget import (
    Candidate,
    affordable_multiple,
    allocate_budget,
    lower_hull,
    rank_candidates,
    shared_across_layers,
    stock_multiple,
    width_candidates,
)
from lorap.errors import ConfigError


def candidates(*rows: tuple[int, int, float]) -> list[Candidate]:
    return [Candidate(*row) for row in rows]


def totals(taken: dict) -> tuple[int, float]:
    return sum(candidate.params for candidate in taken.values()), sum(candidate.cost for candidate in taken.values())


def brute_force(curves: dict, budget: float) -> float:
    """The least cost of all combinations that fit."""
    every = itertools.product(*curves.values())
    return min(sum(o.cost for o in one) for one in every if sum(o.params for o in one) <= budget)


@st.composite
def curve(draw, largest: int = 5) -> list[Candidate]:
    """Ascending sizes and prices, descending costs, of no particular curvature; the last one costs nothing."""
    steps = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=largest))
    params, cost = draw(st.integers(1, 20)), sum(drop for _, drop in steps)
    found = [Candidate(1, params, float(cost))]
    for size, (price, drop) in enumerate(steps, 2):
        params, cost = params + price, cost - drop
        found.append(Candidate(size, params, float(cost)))
    return found


curve_sets = st.lists(curve(), min_size=1, max_size=4).map(lambda found: dict(enumerate(found)))


@settings(max_examples=300, deadline=None)
@given(curves=curve_sets, share=st.floats(0, 1))
def test_within_budget_and_optimal_up_to_the_last_step(curves: dict, share: float) -> None:
    least = sum(found[0].params for found in curves.values())
    budget = least + share * (sum(found[-1].params for found in curves.values()) - least)
    taken = allocate_budget(curves, budget)
    params, cost = totals(taken)
    assert set(taken) == set(curves)
    assert all(taken[key] in curves[key] for key in curves)
    assert params <= budget
    best = brute_force(curves, budget)
    hulls = [lower_hull(found) for found in curves.values()]
    largest_step = max((a.cost - b.cost for hull in hulls for a, b in itertools.pairwise(hull)), default=0.0)
    assert best - 1e-9 <= cost <= best + largest_step + 1e-9
    # Nothing that would still help fits into what is left.
    assert not any(
        candidate.cost < taken[key].cost and 0 < candidate.params - taken[key].params <= budget - params
        for key, found in curves.items()
        for candidate in found
    )


@settings(max_examples=200, deadline=None)
@given(
    drops=st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4, unique=True), min_size=1, max_size=4),
    step=st.integers(1, 30),
    affordable=st.integers(0, 16),
)
def test_strictly_convex_curves_of_equal_steps_are_solved_exactly(
    drops: list[list[int]], step: int, affordable: int
) -> None:
    curves = {}
    for key, each in enumerate(drops):
        falling = sorted(each, reverse=True)
        curves[key] = [Candidate(size + 1, step * (size + 1), float(sum(falling[size:]))) for size in range(5)]
    budget = step * (len(curves) + affordable)
    params, cost = totals(allocate_budget(curves, budget))
    assert params <= budget
    assert cost == brute_force(curves, budget)
    for uniform in range(5):
        if step * (uniform + 1) * len(curves) <= budget:
            assert cost <= sum(found[uniform].cost for found in curves.values())


@settings(max_examples=300, deadline=None)
@given(curves=curve_sets, first=st.integers(0, 60), more=st.integers(0, 60))
def test_more_budget_never_costs_more(curves: dict, first: int, more: int) -> None:
    least = sum(found[0].params for found in curves.values())
    tight, loose = allocate_budget(curves, least + first), allocate_budget(curves, least + first + more)
    assert totals(loose)[1] <= totals(tight)[1] + 1e-9


def test_by_hand() -> None:
    curves = {
        "steep": candidates((1, 10, 100.0), (2, 20, 40.0), (3, 30, 0.0)),  # 6, then 4 a parameter
        "flat": candidates((1, 10, 10.0), (2, 20, 5.0), (3, 30, 0.0)),  # 0.5 a parameter
    }
    sizes = {
        budget: [o.size for o in allocate_budget(curves, budget).values()]
        for budget in (20, 29, 30, 39, 40, 50, 60, 1e9)
    }
    assert sizes == {
        20: [1, 1],
        29: [1, 1],
        30: [2, 1],
        39: [2, 1],
        40: [3, 1],
        50: [3, 2],
        60: [3, 3],
        1e9: [3, 3],
    }


def test_what_is_left_buys_offers_between_the_steps_of_a_hull() -> None:
    # The candidate of size 2 lies above the line from 1 to 3, but 3 does not fit.
    curves = {"only": candidates((1, 10, 10.0), (2, 20, 9.0), (3, 30, 0.0))}
    assert [o.size for o in lower_hull(curves["only"])] == [1, 3]
    assert allocate_budget(curves, 29)["only"].size == 2
    assert allocate_budget(curves, 30)["only"].size == 3


def test_a_step_that_does_not_fit_is_not_passed_over_for_a_flatter_one() -> None:
    curves = {
        "straight": candidates((1, 1, 3.0), (4, 5, 1.0), (5, 7, 0.0)),  # 0.5 a parameter, in one step of 6
        "bent": candidates((1, 1, 4.0), (4, 5, 1.0), (5, 10, 0.0)),  # 0.75, then 0.2
    }
    assert [o.size for o in allocate_budget(curves, 10).values()] == [4, 4]
    assert [o.size for o in allocate_budget(curves, 11).values()] == [4, 4]  # not [1, 5]
    assert [o.size for o in allocate_budget(curves, 12).values()] == [5, 4]


def test_too_little_is_refused() -> None:
    curves = {0: candidates((8, 1000, 1.0), (16, 2000, 0.0)), 1: candidates((8, 500, 1.0))}
    assert totals(allocate_budget(curves, 1500)) == (1500, 2.0)
    with pytest.raises(ConfigError) as error:
        allocate_budget(curves, 1499)
    for words in ("1,500", "1,499", "lower the sparsity", "rank_multiple"):
        assert words in str(error.value)


def test_ties_go_by_order() -> None:
    curves = {key: candidates((1, 10, 5.0), (2, 20, 0.0)) for key in ("b", "a", "c")}
    assert [o.size for o in allocate_budget(curves, 40).values()] == [2, 1, 1]
    assert [o.size for o in allocate_budget(curves, 50).values()] == [2, 2, 1]


@settings(max_examples=200, deadline=None)
@given(curve=curve(largest=9), seed=st.integers(0, 99))
def test_lower_hull_is_convex_and_below_everything(curve: list[Candidate], seed: int) -> None:
    order = torch.randperm(len(curve), generator=torch.Generator().manual_seed(seed)).tolist()
    hull = lower_hull([curve[index] for index in order])
    assert hull == lower_hull(curve)
    assert all(a.params < b.params and a.cost > b.cost for a, b in itertools.pairwise(hull))
    slopes = [(b.cost - a.cost) / (b.params - a.params) for a, b in itertools.pairwise(hull)]
    assert all(a < b for a, b in itertools.pairwise(slopes))
    assert hull[0].params == min(o.params for o in curve)
    assert hull[-1].cost == min(o.cost for o in curve)
    for candidate in curve:
        for a, b in itertools.pairwise(hull):
            if a.params <= candidate.params <= b.params:
                line = a.cost + (b.cost - a.cost) * (candidate.params - a.params) / (b.params - a.params)
                assert candidate.cost >= line - 1e-9


def test_lower_hull_of_equal_prices_and_of_a_rising_curve() -> None:
    assert lower_hull(candidates((1, 10, 5.0), (2, 10, 3.0), (3, 10, 4.0))) == candidates((2, 10, 3.0))
    assert lower_hull(candidates((1, 10, 5.0), (2, 20, 5.0), (3, 30, 7.0))) == candidates((1, 10, 5.0))
    # Three on one line: the one between is no corner.
    assert lower_hull(candidates((1, 10, 2.0), (2, 20, 1.0), (3, 30, 0.0))) == candidates((1, 10, 2.0), (3, 30, 0.0))


def test_tied_adds_up() -> None:
    both = shared_across_layers([candidates((1, 10, 5.0), (2, 20, 0.0)), candidates((1, 10, 3.0), (2, 20, 1.0))])
    assert both == candidates((1, 20, 8.0), (2, 40, 1.0))
    with pytest.raises(ValueError, match=r"shorter|longer"):
        shared_across_layers([candidates((1, 10, 5.0)), candidates((1, 10, 3.0), (2, 20, 1.0))])


@pytest.mark.parametrize("multiple", [1, 7, 8])
@pytest.mark.parametrize("shape", [(63, 100), (100, 63), (64, 64), (1, 63), (8, 100)], ids=str)
def test_rank_offers(shape: tuple[int, int], multiple: int) -> None:
    full, dense = min(shape), shape[0] * shape[1]
    tail = torch.arange(full, -1, -1.0) + 0.5
    for pivoted in (True, False):
        found = rank_candidates(shape, tail, pivoted=pivoted, multiple=multiple)
        assert found[-1] == Candidate(full, dense, 0.0)
        price = (lambda r: r * (sum(shape) - r)) if pivoted else (lambda r: r * sum(shape))
        every = [rank for rank in range(1, full) if rank % multiple == 0 and price(rank) < dense]
        assert [o.size for o in found[:-1]] == every
        for candidate in found[:-1]:
            assert candidate.params == price(candidate.size) < dense
            assert candidate.cost == full - candidate.size + 0.5


@pytest.mark.parametrize(("width", "multiple"), [(1, 1), (63, 1), (63, 8), (100, 32), (64, 64), (64, 16)])
def test_width_offers(width: int, multiple: int) -> None:
    tail = torch.arange(width, -1, -1.0) + 0.5
    found = width_candidates(7, tail, multiple=multiple)
    assert [o.size for o in found] == [*(size for size in range(1, width) if size % multiple == 0), width]
    assert [o.params for o in found] == [3 * 7 * o.size for o in found]
    assert [o.cost for o in found] == [width - o.size + 0.5 for o in found[:-1]] + [0.0]


@pytest.mark.parametrize(
    ("axis", "unit", "total", "smallest", "multiple"),
    [
        (4096, 8192, 7 * 10**9, 8, 64),  # LLaMA-7B, one layer
        (4096, 8192 * 32, 7 * 10**9, 8, 32),  # all its layers in step
        (192, 768, 10**8, 8, 8),  # 192 / 16 = 12
        (1536, 1728, 106_168_320, 1, 64),
        (1536, 1728 * 30, 106_168_320, 1, 4),
        (100, 192, 62_976, 1, 1),
        (32, 96, 62_976, 4, 4),  # not even 4 is affordable
        (10**6, 1, 10**9, 8, 64),
    ],
)
def test_affordable_multiple(axis: int, unit: int, total: int, smallest: int, multiple: int) -> None:
    assert affordable_multiple(axis, unit, total, smallest=smallest) == multiple


@given(st.integers(1, 10**5), st.integers(1, 10**6), st.integers(1, 10**10), st.sampled_from([1, 2, 4, 8]))
def test_affordable_multiple_is_the_largest_power_of_two(axis: int, unit: int, total: int, smallest: int) -> None:
    found = affordable_multiple(axis, unit, total, smallest=smallest)
    powers = [power for power in (1, 2, 4, 8, 16, 32, 64) if power >= smallest]
    fits = [power for power in powers if 16 * power <= axis and 500 * power * unit <= total]
    assume(all(500 * power * unit != total for power in powers))
    assert found == max(fits, default=smallest)


@pytest.mark.parametrize("count", [0, 1, 63])
def test_suffix_sums(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.tensor([float(values[k:].sum()) for k in range(count + 1)], dtype=torch.float64)
    torch.testing.assert_close(suffix_sums(values), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("width", "hidden", "multiple"),
    [
        (14336, 4096, 256),
        (4864, 896, 256),
        (4096, 1024, 256),
        (4095, 1024, 32),
        (1536, 576, 32),
        (160, 64, 32),
        (100, 64, 1),
    ],
)
def test_stock_widths_are_whole_blocks(width: int, hidden: int, multiple: int) -> None:
    """7B and Qwen2.5-0.5B: K-quants. SmolLM2 and what is narrower: the other formats."""
    assert stock_multiple(width, 3 * hidden, 3 * hidden * width + 4 * hidden**2) == multiple
