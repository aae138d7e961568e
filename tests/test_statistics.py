"""Activation sums are what a float64 sum over all real tokens gives, however the tokens are split into batches."""

import pytest
import torch
from torch import Tensor

from lorap.calibration import ActivationStats
from lorap.calibration.statistics import merged
from lorap.kernels.reference import CHUNK_TOKENS


def activations(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.1, 3, shape[-1]) + 0.5


def gathered(*batches: Tensor, moments: bool = True) -> ActivationStats:
    stats = ActivationStats(batches[0].shape[-1], mean=moments, moments=moments)
    for batch in batches:
        stats.update(batch)
    return stats


def assert_sums(stats: ActivationStats, x: Tensor, rtol: float = 1e-5) -> None:
    x = x.double().reshape(-1, x.shape[-1])
    assert stats.tokens == len(x)
    assert stats.sq_sum.dtype == stats.total.dtype == stats.outer.dtype == torch.float64
    outer = x.T @ x
    torch.testing.assert_close(stats.sq_sum, x.square().sum(0), rtol=rtol, atol=0)
    torch.testing.assert_close(stats.total, x.sum(0), rtol=rtol, atol=rtol * float(x.abs().sum(0).max()))
    torch.testing.assert_close(stats.outer, outer, rtol=rtol, atol=rtol * float(outer.max()))


@pytest.mark.parametrize("features", [1, 7, 63])
@pytest.mark.parametrize("splits", [[100], [1, 63, 36], [1] * 100, [99, 0, 1]], ids=["one", "odd", "single", "empty"])
def test_sums_over_any_split(splits: list[int], features: int) -> None:
    x = activations(100, features)
    stats = gathered(*x.split(splits))
    assert_sums(stats, x)
    assert stats.is_finite
    assert torch.equal(stats.channel_sq_norm, stats.sq_sum)
    torch.testing.assert_close(stats.second_moment, stats.outer / 100)


@pytest.mark.parametrize("tokens", [CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 63])
def test_many_tokens_are_chunked(tokens: int) -> None:
    x = activations(tokens, 5)
    stats = gathered(x)
    assert_sums(stats, x)
    chunks = gathered(*x.split(CHUNK_TOKENS))
    assert torch.equal(stats.sq_sum, chunks.sq_sum)
    assert torch.equal(stats.outer, chunks.outer)


def test_long_sums_are_kept_in_float64() -> None:
    # A float32 sum would stop growing: 2^24 + 1 = 2^24.
    stats = gathered(torch.full((1, 1), 4096.0), *[torch.ones(1, 1)] * 5)
    assert stats.sq_sum.tolist() == [2**24 + 5]
    assert stats.outer.tolist() == [[2**24 + 5]]


@pytest.mark.parametrize("moments", [True, False], ids=["moments", "norms"])
def test_merge_equals_one_pass(moments: bool) -> None:
    x = activations(100, 7)
    both, rest = gathered(x[:37], moments=moments), gathered(x[37:], moments=moments)
    both.merge(rest)
    whole = gathered(x[:37], x[37:], moments=moments)
    assert both.tokens == whole.tokens == 100
    assert torch.equal(both.sq_sum, whole.sq_sum)
    if moments:
        assert torch.equal(both.total, whole.total)
        assert torch.equal(both.outer, whole.outer)
    else:
        assert both.total is None
        assert both.outer is None


def test_merge_refuses_missing_moments() -> None:
    with pytest.raises(ValueError, match="moments"):
        gathered(activations(3, 2)).merge(gathered(activations(3, 2), moments=False))


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_tokens_never_count(padding: float) -> None:
    x = activations(3, 21, 7)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, 15:], mask[2, :4], mask[1, 20] = False, False, False
    padded = torch.where(mask[..., None], x, padding)
    stats = ActivationStats(7, mean=True, moments=True)
    stats.update(padded, mask)
    assert stats.tokens == 63 - 6 - 4 - 1
    assert stats.is_finite
    assert_sums(stats, x[mask])


def test_everything_masked() -> None:
    stats = ActivationStats(7, mean=True, moments=True)
    stats.update(activations(2, 3, 7), torch.zeros(2, 3, dtype=torch.bool))
    assert stats.tokens == 0
    assert torch.equal(stats.second_moment, torch.zeros(7, 7, dtype=torch.float64))
    assert torch.equal(stats.covariance, torch.zeros(7, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_lose_nothing_more(dtype: torch.dtype) -> None:
    x = (activations(2, 63, 7) * 100).to(dtype)  # squares overflow float16
    assert_sums(gathered(x), x)


def test_non_contiguous_and_gradient_inputs() -> None:
    x = activations(7, 100).T.requires_grad_()
    stats = gathered(x)
    assert_sums(stats, x.detach())
    assert not stats.sq_sum.requires_grad


@pytest.mark.parametrize("features", [1, 7, 63])
def test_covariance_is_the_biased_one(features: int) -> None:
    x = activations(101, features)
    expected = torch.cov(x.double().T, correction=0).reshape(features, features)
    covariance = gathered(*x.split(10)).covariance
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), float("-inf"), 1e30], ids=["nan", "inf", "-inf", "overflow"]
)
@pytest.mark.parametrize("moments", [True, False], ids=["moments", "norms"])
def test_is_finite_notices(bad: float, moments: bool) -> None:
    x = activations(63, 7)
    x[40, 3] = bad
    stats = gathered(x[:40], moments=moments)
    assert stats.is_finite
    stats.update(x[40:])
    assert not stats.is_finite
    stats.update(x[:10])
    assert not stats.is_finite


def test_covariance_of_channels_far_from_zero() -> None:
    x = torch.randn(4096, 4, generator=torch.Generator().manual_seed(0)) + 1000
    expected = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(gathered(x).covariance, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("features", [1, 63, 200])
def test_outer_products_next_to_the_size_of_their_channels(features: int) -> None:
    """They are float32 before they are added, and no coarser than that, over many batches and channels of very different size."""
    x = activations(3000, features) * torch.logspace(-3, 3, features)
    stats = ActivationStats(features, moments=True)
    for batch in x.split(77):
        stats.update(batch)
    expected = x.double().T @ x.double()
    size = expected.diagonal().sqrt()
    assert stats.outer.dtype == torch.float64
    assert float(((stats.outer - expected) / torch.outer(size, size)).abs().max()) < 3e-7
    assert torch.equal(stats.outer, stats.outer.T)


def test_mean_and_moments_are_gathered_only_when_asked_for() -> None:
    x = activations(63, 7)
    mean, moments = ActivationStats(7, mean=True), ActivationStats(7, moments=True)
    for stats in (mean, moments):
        stats.update(x)
    assert mean.outer is None
    assert moments.total is None
    torch.testing.assert_close(mean.mean, x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.second_moment, x.double().T @ x.double() / 63, rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError, match="mean=True"):
        _ = moments.mean
    with pytest.raises(AssertionError, match="moments=True"):
        _ = mean.second_moment


@pytest.mark.parametrize("features", [1, 7, 63])
def test_variance_is_the_diagonal_of_the_covariance(features: int) -> None:
    x = activations(101, features)
    stats = gathered(*x.split(17))
    torch.testing.assert_close(stats.variance, x.double().var(0, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.variance, stats.covariance.diagonal(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_token_of_weight_w_counts_w_times(masked: bool) -> None:
    x = activations(3, 21, 7)
    weights = torch.rand(3, 21, generator=torch.Generator().manual_seed(1)) * 4 + 0.01
    mask = torch.rand(3, 21, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    counted = torch.ones(3, 21, dtype=torch.bool) if mask is None else mask
    # What padding is, and what it would weigh, has no influence.
    x, weights = torch.where(counted[..., None], x, float("nan")), torch.where(counted, weights, float("nan"))
    stats = ActivationStats(7, mean=True, moments=True)
    stats.update(x, mask, weights)
    real, w = x[counted].double(), weights[counted].double()
    assert stats.tokens == int(counted.sum())
    assert stats.weight == pytest.approx(float(w.sum()), rel=1e-6)
    torch.testing.assert_close(stats.sq_sum, w @ real.square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.mean, w @ real / w.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.second_moment, (real.T * w) @ real / w.sum(), rtol=1e-5, atol=1e-5)
    spread = (real - w @ real / w.sum()).square()
    torch.testing.assert_close(stats.variance, w @ spread / w.sum(), rtol=1e-4, atol=1e-6)


def test_equal_weights_change_sums_and_no_mean() -> None:
    x = activations(63, 7)
    plain, heavy = gathered(x), ActivationStats(7, mean=True, moments=True)
    heavy.update(x, None, torch.full((63,), 4.0))
    assert heavy.weight == 4 * 63
    torch.testing.assert_close(heavy.sq_sum, 4 * plain.sq_sum)
    torch.testing.assert_close(heavy.covariance, plain.covariance)


def test_merged_folds_are_left_alone() -> None:
    x = activations(100, 7)
    folds = (gathered(x[:37]), gathered(x[37:]))
    before = [fold.outer.clone() for fold in folds]
    both, whole = merged(folds), gathered(x[:37], x[37:])
    assert (both.tokens, both.weight) == (100, 100.0)
    for name in ("sq_sum", "total", "outer"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(fold.outer, old) for fold, old in zip(folds, before, strict=True))
    assert merged(folds[:1]) is folds[0]


def test_the_largest_magnitude_of_tokens_that_count() -> None:
    """Padding and weights change nothing; sums of two processes or batches have the larger."""
    x = torch.tensor([[[1.0, -7.5, 2.0], [900.0, 0.0, 0.0]], [[3.0, 4.0, -5.0], [0.5, 0.0, 0.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    stats, other, empty = (ActivationStats(3) for _ in range(3))
    stats.update(x, mask, torch.full((2, 2), 0.01))
    assert float(stats.largest) == 7.5
    other.update(x)
    empty.update(x, torch.zeros(2, 2, dtype=torch.bool))
    assert float(empty.largest) == 0
    empty.merge(stats)
    assert float(empty.largest) == 7.5
    stats.merge(other)
    assert float(stats.largest) == 900
