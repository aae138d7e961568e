"""The channel_sq_norm kernel against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorap.kernels.channel_sq_norm import channel_sq_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("poison")


def expected(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return (x if mask is None else x[mask.reshape(-1).bool()]).square().sum(0)


def check(x: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    total, count = channel_sq_norm(x, mask)
    tokens = x.shape[:-1].numel()
    assert total.dtype == torch.float64
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert count.item() == (tokens if mask is None else mask.bool().sum().item())
    torch.testing.assert_close(total, expected(x, mask), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (63, 100), (100, 256), (2, 50, 257), (1100, 16)])
def test_values(shape, dtype):
    check(torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_have_no_influence_even_as_nan(dtype):
    x = torch.randn(3, 70, 100, dtype=dtype)
    mask = torch.rand(3, 70) < 0.6
    x[~mask] = torch.tensor([float("nan"), float("inf")], dtype=dtype).repeat(50)
    check(x, mask)
    check(x, mask.long())


def test_a_mask_may_hide_everything_or_nothing():
    x = torch.randn(40, 30)
    check(x, torch.zeros(40, dtype=torch.bool))
    check(x, torch.ones(40, dtype=torch.bool))


def test_nan_in_a_token_that_counts_is_reported():
    x = torch.ones(40, 30)
    x[7, 3] = float("nan")
    total, _ = channel_sq_norm(x)
    assert total.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, 5:68],
        lambda x: x.transpose(0, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x[..., ::2],
        lambda x: x[0].T,
        lambda x: x[:1].expand(3, -1, -1),
    ],
    ids=[
        "every second token",
        "some channels",
        "tokens swapped",
        "transposed",
        "every second channel",
        "2d",
        "expanded",
    ],
)
def test_views(view):
    x = view(torch.randn(4, 50, 80))
    check(x)
    check(x, torch.rand(x.shape[:-1]) < 0.5)


def test_mask_of_a_view():
    check(torch.randn(40, 30), (torch.rand(40, 2) < 0.5)[:, 0])


@pytest.mark.parametrize("shape", [(0, 30), (2, 0, 30), (4, 0)])
def test_empty(shape):
    total, count = channel_sq_norm(torch.empty(shape, dtype=torch.bfloat16))
    assert total.equal(torch.zeros(shape[-1], dtype=torch.float64))
    assert count.item() == torch.Size(shape[:-1]).numel()
    assert channel_sq_norm(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.bool))[1].item() == 0


def test_squares_do_not_overflow_float16():
    total, _ = channel_sq_norm(torch.full((64, 8), 300.0, dtype=torch.float16))
    assert total.tolist() == [64 * 300.0**2] * 8


def test_partial_sums_are_added_in_float64():
    """After a square of 1e12, a float32 sum would not notice the 40 partial sums of 64 that follow."""
    x = torch.ones(41 * 64, 8)
    x[0] = 1e6
    total, _ = channel_sq_norm(x)
    first, _ = channel_sq_norm(x[:64])
    assert (total - first).tolist() == [40 * 64] * 8


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) for 4 tokens"):
        channel_sq_norm(torch.randn(4, 8), torch.ones(3))
