"""Second moments that are shrunk and cut on the fly agree with the matrices they stand for; Cholesky factors in place, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorap import FactorizationError
from lorap.algorithms.moments import Moment, cholesky_in_place, ridged_cholesky
from lorap.algorithms.refit import removed_share, repair_down, repaired_tail
from lorap.calibration import statistics
from lorap.calibration.statistics import ActivationStats
from lorap.compression.shrinkage import choose_ridge, choose_shrinkage, shrunk


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations with a few strong directions and channels of very different size, as in language models."""
    return (
        normal(tokens, 7, seed=seed) @ normal(7, features, seed=9) + 0.3 * normal(tokens, features, seed=seed + 1)
    ) * (torch.logspace(-1, 1, features, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 63, 100])
@pytest.mark.parametrize("shrinkage", [0.0, 0.25, 1.0])
def test_agrees_with_the_shrunk_matrix(size: int, shrinkage: float) -> None:
    x = correlated(40, size)
    moment = Moment(x.T @ x, 40.0, shrinkage)
    expected = shrunk(x.T @ x / 40, shrinkage)
    before = moment.sums.clone()
    w = normal(5, size, seed=3)
    torch.testing.assert_close(moment.after(w), w @ expected)
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(1))[: max(1, size // 2)]
    torch.testing.assert_close(moment.block(rows), expected[rows][:, rows])
    torch.testing.assert_close(moment.diagonal, expected.diagonal())
    assert moment.energy(w) == pytest.approx(float((w @ expected * w).sum()), rel=1e-12)
    moment.block(rows).zero_()
    assert torch.equal(moment.sums, before)


@pytest.mark.parametrize("size", [1, 16, 63, 100])
def test_cholesky_in_place(size: int) -> None:
    x = normal(2 * size, size)
    matrix = x.T @ x + torch.eye(size, dtype=torch.float64)
    lower = matrix.tril() + normal(size, size).triu(1)  # what is above the diagonal is never read
    root = cholesky_in_place(lower, block=16)
    torch.testing.assert_close(root, torch.linalg.cholesky(matrix))
    assert root.data_ptr() == lower.data_ptr()
    matrix[size // 2, size // 2] = -1.0
    assert cholesky_in_place(matrix, block=16) is None


def test_a_larger_pull_is_taken_where_the_matrix_is_indefinite() -> None:
    def make() -> Tensor:
        return torch.diag(torch.tensor([4.0, 1.0, -0.5], dtype=torch.float64))

    root, pull = ridged_cholesky(make, 0.01)
    assert pull == pytest.approx(1.0)
    torch.testing.assert_close(root @ root.T, make() + torch.eye(3, dtype=torch.float64))
    with pytest.raises(FactorizationError, match="NaN or infinity"):
        ridged_cholesky(lambda: torch.full((3, 3), torch.nan), 1.0)


def test_wide_sums_in_float32_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above ``WIDE`` channels sums are float32; the refit loses nothing that can be seen next to its ridge."""
    features, down = 100, normal(20, 100, seed=5).float()
    texts = [correlated(300, features, seed=seed).float() for seed in (0, 10)]
    held_out = correlated(500, features, seed=20)
    found = {}
    for wide in (features - 1, features):
        monkeypatch.setattr(statistics, "WIDE", wide)
        folds = []
        for text in texts:
            stats = ActivationStats(features, moments=True)
            for batch in text.split(77):
                stats.update(batch)
            folds.append(stats)
        assert folds[0].outer is not None
        precision = torch.float32 if wide < features else torch.float64
        assert folds[0].outer.dtype == precision
        shrinkage = choose_shrinkage(folds)
        kept = torch.arange(0, features, 2)
        ridge = choose_ridge(down, folds, kept, shrinkage=shrinkage)
        weight = repair_down(down, folds[0].moment.shrunk(shrinkage), kept, ridge=ridge)
        assert weight.dtype == precision
        lost = removed_share(down, held_out.T @ held_out / 500, kept, weight)
        tail = repaired_tail(down, folds[0].moment, torch.randperm(features), ridge=0.01)
        found[precision] = shrinkage, ridge, lost, float(tail[0])
    narrow, wide_sums = found[torch.float64], found[torch.float32]
    assert wide_sums[0] == pytest.approx(narrow[0], rel=1e-5)
    assert wide_sums[1] == narrow[1]
    assert wide_sums[2] == pytest.approx(narrow[2], rel=1e-5)
    assert wide_sums[3] == pytest.approx(narrow[3], rel=1e-4)
