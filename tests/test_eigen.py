"""Every method reaches the optimum on flat, steep and deficient spectra and with outliers, and its certificate is true."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorap.algorithms.factorization import eigen
from lorap.algorithms.factorization.certificate import gain_left
from lorap.algorithms.factorization.dense import full_precision, orthonormal
from lorap.algorithms.symmetric import add_outer_products, lower_product

KINDS = ["gaussian", "outliers", "lognormal", "power", "slow-power", "deficient", "clusters"]
TOLERANCES = {"mixed": 1e-4, "subspace": 1e-4}


def weighted(kind: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix W C^(1/2) whose Gram matrix has a spectrum of that kind, its trace equal to the number of rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w = normal(rows, columns)
    if kind == "outliers":
        w[:, :: max(2, columns // 3)] *= 3000
    elif kind == "lognormal":
        w *= torch.exp(1.5 * normal(columns))
    elif kind == "deficient":
        w = normal(rows, max(1, rows // 8)) @ normal(max(1, rows // 8), columns)
    elif kind in ("power", "slow-power", "clusters"):
        q = torch.linalg.qr(normal(rows, rows)).Q
        index = torch.arange(1, rows + 1, dtype=torch.float64)
        values = index**-1.0 if kind == "power" else index**-0.5
        w = q * (torch.floor(8 * index / rows) + 1 if kind == "clusters" else values)
    return w * math.sqrt(rows) / w.norm()


def gram_of(w: Tensor) -> Tensor:
    return lower_product(w, w)


def solved(method: str, gram: Tensor, rank: int, tolerance: float) -> eigen.Eigen | None:
    if method == "mixed":
        return eigen.mixed(gram, rank, tolerance=tolerance)
    return eigen.subspace(gram[None], [rank], tolerance=tolerance)[0]


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6])
@pytest.mark.parametrize("method", ["mixed", "subspace"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "rank"), [(100, 1), (100, 10), (63, 40), (300, 75)])
def test_methods_reach_the_least_error(size: int, rank: int, kind: str, method: str, tolerance: float) -> None:
    w = weighted(kind, size, size + 37)
    gram = gram_of(w)
    singular = torch.linalg.svdvals(w)
    least, total = float(singular[rank:].square().sum()), float(singular.square().sum())
    found = solved(method, gram, rank, tolerance)
    assert found is not None
    vectors = found.vectors
    assert vectors.shape == (size, rank)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    lost = float((w - vectors @ (vectors.T @ w)).square().sum())
    assert lost == pytest.approx(found.lost, rel=1e-6, abs=1e-12 * total)
    # In units of the error, not of its square; what float64 cannot tell comes on top.
    assert math.sqrt(lost) <= math.sqrt(least) * (1 + tolerance) + 1e-6 * math.sqrt(total)
    assert lost - least <= found.gain_left + found.unknown
    values = found.values[:rank]
    torch.testing.assert_close(values, singular[:rank].square(), rtol=1e-3, atol=1e-3 * float(values[-1]) + 1e-9)
    assert bool((found.values[:-1] >= found.values[1:]).all())
    assert len(found.values) == size or method == "subspace"


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "power", "deficient"])
def test_eigh_is_the_svd(kind: str) -> None:
    w = weighted(kind, 63, 100)
    found = eigen.eigh(gram_of(w), 20)
    values = torch.linalg.svdvals(w).square()
    torch.testing.assert_close(found.values, values, rtol=1e-9, atol=1e-10)
    assert found.lost == pytest.approx(float(values[20:].sum()), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_by_one(kind: str) -> None:
    grams = torch.stack([gram_of(weighted(kind, 200, 230, seed)) for seed in range(3)])
    ranks = [10, 30, 50]
    together = eigen.subspace(grams, ranks, tolerance=1e-4)
    for gram, rank, found in zip(grams, ranks, together, strict=True):
        assert found is not None
        least = eigen.eigh(gram, rank).lost
        assert found.vectors.shape == (200, rank)
        assert found.lost - least <= 2e-4 * least + 1e-12
        assert found.lost - least <= found.gain_left + found.unknown


@settings(max_examples=120, deadline=None)
@example(size=3, fraction=0.5, kind="deficient", method="subspace", seed=1)  # one direction, and rounding errors
@given(
    size=st.integers(2, 60),
    fraction=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    method=st.sampled_from(["mixed", "subspace"]),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_proved(size: int, fraction: float, kind: str, method: str, seed: int) -> None:
    """Any small matrix has an answer that keeps its word."""
    rank = 1 + int(fraction * (size - 1))
    gram = gram_of(weighted(kind, size, size + seed % 3, seed))
    found = solved(method, gram, rank, 1e-4)
    assert found is not None
    least = eigen.eigh(gram, rank).lost
    lost = float(gram.trace() - (found.vectors * (gram @ found.vectors)).sum())
    assert lost - least <= found.gain_left + 2 * found.unknown
    assert 0 <= found.excess < 1
    assert lost <= least * (1 + 1e-4) ** 2 + 2 * found.unknown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_the_certificate_holds_for_any_basis(kind: str, noise: float) -> None:
    """Ritz vectors of a disturbed basis: what the best directions hold more is never above the bound."""
    size, rank, count = 120, 20, 40
    gram = gram_of(weighted(kind, size, 150))
    exact, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(3)
    disturbed = vectors + noise * torch.randn(size, count, generator=generator, dtype=torch.float64)
    values, v, images = eigen._ritz(gram[None], orthonormal(disturbed)[None])
    values, v, images = values[0], v[0], images[0]
    bound = gain_left(gram, v, values, images - v * values, rank)
    true = float(exact.flip(0)[:rank].sum() - values[:rank].sum())
    assert true <= bound + 1e-12
    if noise == 1e-5 and kind in ("gaussian", "lognormal", "slow-power"):
        assert bound < 1e-3  # it says something: the trace is 120, and first order would be a hundred times as much


def test_a_missing_direction_is_noticed() -> None:
    """The basis holds everything but the largest direction: no bound, rather than a wrong one."""
    gram = gram_of(weighted("power", 100, 120))
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, 1:41]
    values = (vectors * (gram @ vectors)).sum(0)
    assert gain_left(gram, vectors, values, gram @ vectors - vectors * values, 20) == math.inf


def test_what_cannot_be_reached_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any float64 step, float32 is not good enough for outliers, and both methods say so."""
    gram = gram_of(weighted("outliers", 300, 320))
    monkeypatch.setattr(eigen, "ROUNDS", 0)
    monkeypatch.setattr(eigen, "OUTLIER_RATIO", math.inf)
    assert solved("mixed", gram, 60, 1e-6) is None
    assert solved("mixed", gram, 60, 1e-4) is None


@pytest.fixture
def lowest_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("lowest_precision")
def test_float32_is_never_shortened() -> None:
    """With "medium" torch may multiply float32 in bfloat16 or TF32; results are the same bits as without, and it stays set."""
    gram = gram_of(weighted("gaussian", 300, 320))
    found = eigen.subspace(gram[None], [60], tolerance=1e-4)[0]
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    again = eigen.subspace(gram[None], [60], tolerance=1e-4)[0]
    assert found is not None
    assert again is not None
    assert torch.equal(found.vectors, again.vectors)


def test_full_precision_is_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(torch.linalg.LinAlgError), full_precision():
            torch.linalg.cholesky(-torch.eye(3))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("size", [1, 63, 128, 129, 1000])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_lower_product(size: int, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, size, 40, dtype=torch.float64)
    found = lower_product(x, x)
    torch.testing.assert_close(found, x @ x.mT, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("size", [1, 63, 128, 129, 1000])
def test_add_outer_products(size: int) -> None:
    x = torch.randn(40, size, dtype=torch.float64)
    sums = torch.ones(size, size, dtype=torch.float64)
    add_outer_products(sums, x)
    torch.testing.assert_close(sums, 1 + x.T @ x, rtol=1e-12, atol=1e-12)
    assert torch.equal(sums, sums.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9, math.inf])
def test_orthonormal(condition: float, dtype: torch.dtype) -> None:
    """Also where Cholesky QR fails: the columns are nearly or exactly dependent."""
    x = torch.randn(2, 100, 20, dtype=torch.float64)
    x[..., 1] = x[..., 0] + (0 if condition == math.inf else x[..., 1] / condition)
    x[1, :, 5] *= 1e-12
    basis = orthonormal(x.to(dtype))
    assert basis.dtype == dtype
    tight = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(basis.mT @ basis, torch.eye(20, dtype=dtype).expand(2, -1, -1), rtol=0, atol=tight)
    if condition <= 1e3:
        torch.testing.assert_close(basis @ (basis.mT @ x.to(dtype)), x.to(dtype), rtol=0, atol=100 * tight)
