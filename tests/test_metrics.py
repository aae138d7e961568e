"""What two halves of the calibration text agree on is kept, what they do not is shrunk away."""

import pytest
import torch
from torch import Tensor

from lorap.calibration import ActivationStats
from lorap.compression.shrinkage import (
    DEFAULT_RIDGE,
    DEFAULT_SHRINKAGE,
    RIDGES,
    choose_ridge,
    choose_shrinkage,
    output_metric,
    shrunk,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fold(x: Tensor) -> ActivationStats:
    stats = ActivationStats(x.shape[-1], moments=True)
    stats.update(x)
    return stats


@pytest.mark.parametrize("features", [1, 63])
def test_shrunk_keeps_the_diagonal(features: int) -> None:
    c = fold(normal(100, features)).second_moment
    assert torch.equal(shrunk(c, 0.0), c)
    assert torch.equal(shrunk(c, 1.0), torch.diag(c.diagonal()))
    quarter = shrunk(c.float(), 0.25)
    assert quarter.dtype == torch.float64
    expected = c.float().double() * 0.75
    expected.diagonal().copy_(c.float().diagonal())
    torch.testing.assert_close(quarter, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equal_folds_need_no_shrinkage(scale: float) -> None:
    x = normal(300, 40) @ normal(40, 40, seed=1) * scale
    assert choose_shrinkage((fold(x), fold(x))) == pytest.approx(0, abs=1e-12)


def test_noise_is_shrunk_away() -> None:
    # Correlations that have nothing to do with each other: agreement 0, reliability 0.
    found = choose_shrinkage((fold(normal(200, 100, seed=1)), fold(normal(200, 100, seed=2))))
    assert found == pytest.approx(1.0, abs=0.05)


def test_shrinkage_by_hand() -> None:
    def stats(correlation: float) -> ActivationStats:
        one = ActivationStats(2, moments=True)
        one.tokens, one.weight = 10, 10.0
        one.outer = 10 * torch.tensor([[4.0, 2 * correlation], [2 * correlation, 1.0]], dtype=torch.float64)
        return one

    # <R1, R2> / mean(|R1|^2, |R2|^2) = 0.5 / 0.625 = 0.8
    assert choose_shrinkage((stats(1.0), stats(0.5))) == pytest.approx(0.2 / 1.8)
    assert choose_shrinkage((stats(0.5), stats(-0.5))) == pytest.approx(1.0)


def test_more_tokens_need_less_shrinkage() -> None:
    mix = normal(50, 50, seed=3)
    found = [
        choose_shrinkage((fold(normal(tokens, 50, seed=1) @ mix), fold(normal(tokens, 50, seed=2) @ mix)))
        for tokens in (20, 100, 1000, 10000)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.1
    assert found[-1] < 0.02


def test_shrinkage_of_what_has_no_correlations() -> None:
    dead = normal(100, 5)
    dead[:, 2] = 0
    assert 0 <= choose_shrinkage((fold(dead), fold(dead.flip(0)))) < 1e-9
    assert choose_shrinkage((fold(dead * 0), fold(dead * 0))) == 1.0
    assert choose_shrinkage((fold(normal(9, 1)), fold(normal(9, 1, seed=2)))) == 1.0
    assert 0 <= choose_shrinkage((fold(dead), fold(dead * 0))) <= 1


def test_folds_are_left_alone() -> None:
    folds = fold(normal(100, 7)), fold(normal(100, 7, seed=1))
    before = [one.outer.clone() for one in folds]
    choose_shrinkage(folds)
    choose_ridge(normal(3, 7), folds, torch.arange(4), shrinkage=0.1)
    assert all(torch.equal(one.outer, old) for one, old in zip(folds, before, strict=True))


def test_one_fold_gets_the_default() -> None:
    folds = (fold(normal(100, 7)),)
    assert choose_shrinkage(folds) == DEFAULT_SHRINKAGE
    assert choose_ridge(normal(3, 7), folds, torch.arange(4), shrinkage=0.1) == DEFAULT_RIDGE


def test_ridge_is_small_where_folds_agree() -> None:
    x = normal(400, 6) @ normal(6, 40, seed=1) + 0.1 * normal(400, 40, seed=2)
    assert choose_ridge(normal(9, 40, seed=3), (fold(x), fold(x)), torch.arange(20), shrinkage=0.0) == min(RIDGES)


def test_ridge_is_large_where_folds_disagree() -> None:
    # Fewer tokens than channels and nothing in common: whatever one fold teaches is wrong on the other.
    folds = fold(normal(15, 40, seed=1)), fold(normal(15, 40, seed=2))
    assert choose_ridge(normal(9, 40, seed=3), folds, torch.arange(20), shrinkage=0.0) == max(RIDGES)


@pytest.mark.parametrize("tokens", [1, 5, 400])
@pytest.mark.parametrize("size", [1, 7, 63])
def test_output_metric_is_positive_definite(size: int, tokens: int) -> None:
    g = normal(tokens, size).double() * 1e-4
    moment = g.T @ g / tokens
    metric = output_metric(moment.float())
    assert metric.dtype == torch.float32
    eigenvalues = torch.linalg.eigvalsh(metric.double())
    mean = moment.diagonal().mean()
    assert float(eigenvalues.min()) >= 0.099 * float(mean)
    # The total weight stays what it was, so that prices of different projections compare.
    torch.testing.assert_close(metric.double().trace(), moment.trace(), rtol=1e-5, atol=0)
    off = ~torch.eye(size, dtype=torch.bool)
    torch.testing.assert_close(metric.double()[off], moment[off] * 0.81, rtol=1e-4, atol=1e-6 * float(mean))


@pytest.mark.parametrize("size", [1, 7])
def test_no_gradient_is_the_identity(size: int) -> None:
    assert torch.equal(output_metric(torch.zeros(size, size)), torch.eye(size))


def test_an_output_without_gradient_still_counts_a_little() -> None:
    metric = output_metric(torch.diag(torch.tensor([0.0, 2.0, 4.0])))
    torch.testing.assert_close(metric, torch.diag(torch.tensor([0.2, 2.0, 3.8])))
