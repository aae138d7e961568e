"""The refitted down projection is the least-squares one, and never reproduces the FFN worse than dropping channels does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorap.algorithms import refit
from lorap.algorithms.refit import (
    SMALLEST_RIDGE,
    fluctuation_scores,
    keep_best,
    output_scores,
    removed_share,
    repair_down,
    repaired_tail,
)
from lorap.compression.allocation import pruned_positions

WIDTH, HIDDEN = 63, 17


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(kind: str = "correlated", tokens: int = 400) -> Tensor:
    """(tokens, 63) inner activations."""
    if kind == "few-tokens":
        tokens = 9
    x = normal(tokens, WIDTH, seed=1) + normal(tokens, 5, seed=2) @ normal(5, WIDTH, seed=3)
    x = x * torch.logspace(-1, 1, WIDTH, dtype=torch.float64)
    if kind == "dead-channels":
        x[:, ::4] = 0
    if kind == "silent":
        x = x * 0
    if kind == "collinear":
        x[:, 1::2] = x[:, 0:-1:2] * 3
    if kind == "outliers":
        x[::50] *= 1e4
    if kind == "outlier-channel":
        x[:, 10] *= 1e4
    if kind == "tiny":
        x = x * 1e-12
    return x


KINDS = ["correlated", "dead-channels", "silent", "collinear", "few-tokens", "outliers", "outlier-channel", "tiny"]


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def positive(size: int, seed: int = 9) -> Tensor:
    root = normal(size, size + 3, seed=seed)
    return root @ root.T / size


def some_channels(count: int, seed: int = 4) -> Tensor:
    return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("ridge", [1e-6, 0.03, 1.0])
@pytest.mark.parametrize("count", [1, 20, 62, 63])
def test_equals_an_independent_least_squares(count: int, ridge: float) -> None:
    # min ||X_S V^T - X W^T||^2 / T + r ||V - W_S||^2, as one stacked system.
    x, down, kept = activations(), normal(HIDDEN, WIDTH), some_channels(count)
    pull = (ridge * moment(x).diagonal().mean() * len(x)).sqrt()
    rows = torch.cat((x[:, kept], pull * torch.eye(count, dtype=torch.float64)))
    wanted = torch.cat((x @ down.T, pull * down[:, kept].T))
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    torch.testing.assert_close(repair_down(down, moment(x), kept, ridge=ridge), expected, rtol=1e-6, atol=1e-6)


def test_no_ridge_is_the_plain_least_squares() -> None:
    x, down, kept = activations(), normal(HIDDEN, WIDTH), some_channels(20)
    expected = torch.linalg.lstsq(x[:, kept], x @ down.T, driver="gelsd").solution.T
    torch.testing.assert_close(repair_down(down, moment(x), kept, ridge=0.0), expected, rtol=1e-4, atol=1e-4)
    # A real repair: what is left of the error is far below that of dropping the channels.
    lost = removed_share(down, moment(x), kept, down[:, kept])
    assert removed_share(down, moment(x), kept, expected) < 0.6 * lost


@pytest.mark.parametrize("ridge", [0.0, 0.3, 10.0])
def test_uncorrelated_channels_keep_their_weights(ridge: float) -> None:
    down, kept = normal(HIDDEN, WIDTH), some_channels(20)
    c = torch.diag(torch.linspace(0.1, 5, WIDTH, dtype=torch.float64))
    torch.testing.assert_close(repair_down(down, c, kept, ridge=ridge), down[:, kept], rtol=1e-9, atol=1e-9)


def test_a_large_ridge_keeps_the_weights() -> None:
    down, kept = normal(HIDDEN, WIDTH), some_channels(20)
    repaired = repair_down(down, moment(activations()), kept, ridge=1e9)
    torch.testing.assert_close(repaired, down[:, kept], rtol=1e-6, atol=1e-6)


def test_a_copy_takes_over_in_full() -> None:
    x = normal(200, 3)
    x = torch.stack((x[:, 0], 2 * x[:, 0], x[:, 1]), dim=1)
    down = torch.tensor([[1.0, 10.0, 5.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    repaired = repair_down(down, moment(x), torch.tensor([0, 2]), ridge=0.0)
    torch.testing.assert_close(
        repaired, torch.tensor([[21.0, 5.0], [2.0, -1.0]], dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 31, 62])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_and_no_worse_than_pruning(kind: str, count: int, ridge: float, dtype: torch.dtype) -> None:
    down, kept, c = normal(HIDDEN, WIDTH).to(dtype), some_channels(count), moment(activations(kind))
    repaired = repair_down(down, c, kept, ridge=ridge)
    assert repaired.dtype == torch.float64
    assert repaired.shape == (HIDDEN, count)
    assert torch.isfinite(repaired).all()
    plain = removed_share(down, c, kept, down[:, kept])
    assert removed_share(down, c, kept, repaired) <= plain * (1 + 1e-9) + 1e-7
    if kind == "silent":
        assert torch.equal(repaired, down[:, kept].double())


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 12),
    share=st.floats(0, 1),
    tokens=st.integers(1, 15),
    ridge=st.sampled_from([0.0, 1e-3, 0.3, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_repair_never_hurts_on_its_own_statistics(
    width: int, share: float, tokens: int, ridge: float, seed: int
) -> None:
    down, x = normal(5, width, seed=seed), normal(tokens, width, seed=seed + 1)
    kept, c = torch.arange(1 + int(share * (width - 1))), moment(x)
    plain = removed_share(down, c, kept, down[:, kept])
    assert removed_share(down, c, kept, repair_down(down, c, kept, ridge=ridge)) <= plain + 1e-6


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "output-metric"])
@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("kind", ["correlated", "dead-channels", "few-tokens", "outlier-channel"])
def test_tail_is_the_residual_of_the_repair_at_every_width(kind: str, ridge: float, weighed: bool) -> None:
    down, c = normal(HIDDEN, WIDTH), moment(activations(kind))
    metric = positive(HIDDEN) if weighed else None
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))
    tail = repaired_tail(down, c, order, ridge=ridge, output_metric=metric)
    assert tail.shape == (WIDTH + 1,)
    assert tail[-1] == 0
    assert (tail[:-1] >= tail[1:]).all()
    a = torch.eye(HIDDEN, dtype=torch.float64) if metric is None else metric
    # The ridge is part of what the error is measured with: noise of that size on every channel.
    noisy = c + max(ridge, SMALLEST_RIDGE) * c.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    for width in range(WIDTH + 1):
        change, kept = down.clone(), order[:width]
        if width:
            change[:, kept] -= repair_down(down, c, kept, ridge=ridge)
        direct = (a @ change @ noisy * change).sum()
        torch.testing.assert_close(tail[width], direct, rtol=1e-6, atol=1e-7 * float(tail[0]))


def test_tail_of_silence_is_zero() -> None:
    tail = repaired_tail(normal(3, 7), torch.zeros(7, 7), torch.arange(7), ridge=0.1)
    assert torch.equal(tail, torch.zeros(8, dtype=torch.float64))


def test_removed_share_is_the_relative_change_of_the_output() -> None:
    x, down, kept = activations(), normal(HIDDEN, WIDTH), some_channels(20)
    weight = normal(HIDDEN, 20, seed=8)
    expected = float((x @ down.T - x[:, kept] @ weight.T).norm() / (x @ down.T).norm())
    assert removed_share(down, moment(x), kept, weight) == pytest.approx(expected, rel=1e-9)
    assert removed_share(down, moment(x), torch.arange(WIDTH), down) == 0.0
    assert removed_share(down, moment(x) * 0, kept, weight) == 0.0


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "output-metric"])
def test_output_scores_are_what_each_channel_adds(weighed: bool) -> None:
    x, down = activations(), normal(HIDDEN, WIDTH)
    metric = positive(HIDDEN) if weighed else torch.eye(HIDDEN, dtype=torch.float64)
    root = torch.linalg.cholesky(metric)
    expected = torch.stack([(torch.outer(x[:, c], down[:, c]) @ root).norm() for c in range(WIDTH)])
    found = output_scores(down, x.square().sum(0), metric if weighed else None)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_fluctuation_scores_by_hand() -> None:
    # FLAP: the variance of the channel times the squared norm of its column of weights.
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0]])
    down = torch.tensor([[1.0, 100.0, 1.0], [2.0, 100.0, 0.0]])
    scores = fluctuation_scores(down, x.var(0, correction=0))
    assert scores.tolist() == [1.0 * 5.0, 0.0, 4.0 * 1.0]


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 400),
    sparsity=st.floats(0, 0.99),
    least=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    seed=st.integers(0, 1000),
)
def test_keep_best_keeps_the_papers_positions(width: int, sparsity: float, least: float, seed: int) -> None:
    scores = normal(width, seed=seed).round(decimals=1)  # with ties
    start, stop = pruned_positions(width, sparsity, least)
    order = scores.argsort(stable=True)
    expected = torch.cat((order[:start], order[stop:])).sort().values
    kept = keep_best(scores, width - (stop - start), least_important_kept=least)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("width", [0, 1, 5, 7])
def test_keep_best_without_a_lowest_share(width: int) -> None:
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 7.0, 0.0, 2.0])
    best = [1, 4, 3, 0, 6, 2, 5][:width]  # of two equal ones the later stays
    assert keep_best(scores, width).tolist() == sorted(best)


@pytest.mark.parametrize("weighed", [False, True])
def test_scores_do_not_depend_on_how_many_channels_are_looked_at(
    weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    down, sq_norm = normal(HIDDEN, WIDTH), normal(WIDTH, seed=5).square()
    metric = positive(HIDDEN) if weighed else None
    seen = down if metric is None else metric @ down
    expected = ((down * seen).sum(0) * sq_norm).sqrt()
    monkeypatch.setattr(refit, "CHANNELS", 10)
    torch.testing.assert_close(output_scores(down, sq_norm, metric), expected, rtol=1e-12, atol=0)
