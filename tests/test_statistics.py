"""Activation sums are what a float64 sum over all real tokens gives, however the tokens are split into batches."""

import pytest
import torch
from torch import Tensor

from lorap.calibration import ActivationStats
from lorap.kernels.reference import CHUNK_TOKENS


def activations(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.1, 3, shape[-1]) + 0.5


def gathered(*batches: Tensor, moments: bool = True) -> ActivationStats:
    stats = ActivationStats(batches[0].shape[-1], moments=moments)
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
    merged, rest = gathered(x[:37], moments=moments), gathered(x[37:], moments=moments)
    merged.merge(rest)
    whole = gathered(x[:37], x[37:], moments=moments)
    assert merged.tokens == whole.tokens == 100
    assert torch.equal(merged.sq_sum, whole.sq_sum)
    if moments:
        assert torch.equal(merged.total, whole.total)
        assert torch.equal(merged.outer, whole.outer)
    else:
        assert merged.total is None
        assert merged.outer is None


def test_merge_refuses_missing_moments() -> None:
    with pytest.raises(ValueError, match="moments"):
        gathered(activations(3, 2)).merge(gathered(activations(3, 2), moments=False))


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan"), float("inf")])
def test_masked_tokens_never_count(padding: float) -> None:
    x = activations(3, 21, 7)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, 15:], mask[2, :4], mask[1, 20] = False, False, False
    padded = torch.where(mask[..., None], x, padding)
    stats = ActivationStats(7, moments=True)
    stats.update(padded, mask)
    assert stats.tokens == 63 - 6 - 4 - 1
    assert stats.is_finite
    assert_sums(stats, x[mask])


def test_everything_masked() -> None:
    stats = ActivationStats(7, moments=True)
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
