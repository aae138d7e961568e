"""``factorize`` is the optimum: it equals the truncated SVD of the weighted matrix, without dividing by the weights.

The reference is the paper's way, computed here in float64: SVD of W D, D = diag(sqrt(s)) with zeros replaced by 1e-4,
and D^-1 folded back into the right factor.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorap import Factorization, FactorizationError, factorize
from lorap.algorithms.factorization import root_of, spectrum

SHAPES = [(40, 63), (63, 40), (50, 50), (100, 7), (1, 63), (63, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncated_svd(weighted: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weighted, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def paper(w: Tensor, rank: int, sq_norm: Tensor) -> Tensor:
    d = sq_norm.double().sqrt()
    d = torch.where(d == 0, 1e-4, d)
    return truncated_svd(w.double() * d, rank) / d


def product(factors: Factorization) -> Tensor:
    return factors.left.double() @ factors.right.double()


def root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def relative_error(w: Tensor, approximation: Tensor, sq_norm: Tensor) -> float:
    d = sq_norm.double().sqrt()
    return float(((w - approximation) * d).norm() / (w * d).norm())


def sq_norms(kind: str, features: int) -> Tensor:
    s = normal(features, seed=1).square() * 1000 + 1
    if kind == "zero-channels":
        s[::3] = 0
    if kind == "outlier-channels":
        s[features // 2 :: 10] *= 1e8  # activations 1e4 times the rest
    return s


def middle_rank(shape: tuple[int, int]) -> int:
    return max(1, min(shape) // 3)


@pytest.mark.parametrize("kind", ["gaussian", "zero-channels", "outlier-channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vector_metric_equals_the_papers_svd(shape: tuple[int, int], kind: str) -> None:
    w, s, rank = normal(*shape), sq_norms(kind, shape[1]), middle_rank(shape)
    factors = factorize(w, rank, s)
    expected = paper(w, rank, s)
    assert factors.left.shape == (shape[0], rank)
    assert factors.right.shape == (rank, shape[1])
    d = s.sqrt()
    if (s == 0).all() or rank == min(shape):
        assert factors.error == pytest.approx(0, abs=1e-7)
    if s.any():
        difference = ((product(factors) - expected) * d).norm() / (w * d).norm()
        assert difference < 1e-6
        assert relative_error(w, product(factors), s) <= relative_error(w, expected, s) * (1 + 1e-9) + 1e-12
    if kind == "gaussian":
        torch.testing.assert_close(product(factors), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "zero-channels", "outlier-channels"])
@pytest.mark.parametrize("shape", [(40, 63), (63, 40), (50, 50)], ids=str)
@pytest.mark.parametrize("rank", [1, 10, 12, 20])
def test_rank_deficient_weight(shape: tuple[int, int], kind: str, rank: int) -> None:
    w = normal(shape[0], 12) @ normal(12, shape[1], seed=2)
    s = sq_norms(kind, shape[1])
    factors = factorize(w, rank, s)
    expected, d = paper(w, rank, s), s.sqrt()
    assert torch.isfinite(product(factors)).all()
    assert ((product(factors) - expected) * d).norm() / (w * d).norm() < 1e-6
    assert factors.error == pytest.approx(relative_error(w, expected, s), rel=1e-6, abs=1e-6)
    if rank >= 12:
        assert factors.error < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_metric_is_the_plain_svd(shape: tuple[int, int]) -> None:
    w, rank = normal(*shape), middle_rank(shape)
    factors = factorize(w, rank)
    torch.testing.assert_close(product(factors), truncated_svd(w, rank), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(factors.singular_values, torch.linalg.svdvals(w), rtol=1e-9, atol=1e-9)
    ones = factorize(w, rank, torch.ones(shape[1]))
    torch.testing.assert_close(product(ones), product(factors), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_metric_is_optimal(shape: tuple[int, int]) -> None:
    w, rank, features = normal(*shape), middle_rank(shape), shape[1]
    x = normal(3 * features + 5, features, seed=3) * torch.logspace(-1, 1, features, dtype=torch.float64)
    c = x.T @ x + 0.1 * torch.eye(features, dtype=torch.float64)
    half = root(c)
    factors = factorize(w, rank, c)
    best = truncated_svd(w @ half, rank)
    torch.testing.assert_close(product(factors), best @ torch.linalg.inv(half), rtol=1e-6, atol=1e-6)
    expected = float((w @ half - best).norm() / (w @ half).norm())
    assert factors.error == pytest.approx(expected, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(factors.singular_values, torch.linalg.svdvals(w @ half), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 63), (63, 40)], ids=["out<in", "in<out"])
def test_diagonal_matrix_equals_vector(shape: tuple[int, int]) -> None:
    w, s = normal(*shape), sq_norms("gaussian", shape[1])
    vector, matrix = factorize(w, 9, s), factorize(w, 9, torch.diag(s))
    torch.testing.assert_close(product(matrix), product(vector), rtol=1e-8, atol=1e-8)
    assert matrix.error == pytest.approx(vector.error, rel=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "zero-channels", "outlier-channels"])
@pytest.mark.parametrize("shape", [(40, 63), (63, 40), (50, 50)], ids=str)
def test_error_is_the_weighted_relative_error(shape: tuple[int, int], kind: str) -> None:
    w, s = normal(*shape), sq_norms(kind, shape[1])
    for rank in (1, 13, 25):
        factors = factorize(w, rank, s)
        direct = relative_error(w, product(factors), s)
        assert direct > 0 or kind == "zero-channels"
        assert factors.error == pytest.approx(direct, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("metric", ["none", "vector", "zeros", "matrix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_reconstructs(shape: tuple[int, int], metric: str) -> None:
    w = normal(*shape).float()
    s = sq_norms("zero-channels", shape[1])
    choices = {"none": None, "vector": s, "zeros": torch.zeros(shape[1]), "matrix": torch.outer(s, s)}
    factors = factorize(w, min(shape), choices[metric])
    assert (factors.left @ factors.right - w).abs().max() <= 1e-5 * w.abs().max()
    assert factors.error < 1e-6


@pytest.mark.parametrize("kind", ["gaussian", "outlier-channels"])
@pytest.mark.parametrize("shape", [(40, 63), (63, 40)], ids=["out<in", "in<out"])
def test_factors_are_balanced(shape: tuple[int, int], kind: str) -> None:
    factors = factorize(normal(*shape), 13, sq_norms(kind, shape[1]))
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_dtype_is_preserved_and_rounded_once(dtype: torch.dtype, scale: float) -> None:
    w, s = (normal(40, 63) * scale).to(dtype), sq_norms("outlier-channels", 63)
    factors, exact = factorize(w, 13, s), factorize(w.double(), 13, s)
    assert factors.left.dtype == factors.right.dtype == dtype
    assert factors.singular_values.dtype == torch.float64
    assert torch.equal(factors.left, exact.left.to(dtype))
    assert torch.equal(factors.right, exact.right.to(dtype))
    assert factors.error == exact.error


def test_zero_weight() -> None:
    factors = factorize(torch.zeros(7, 5), 2, torch.ones(5))
    assert torch.equal(factors.left @ factors.right, torch.zeros(7, 5))
    assert factors.error == 0.0


def test_inputs_are_left_alone() -> None:
    w, s = torch.nn.Parameter(normal(7, 5)), torch.ones(5)
    before = w.detach().clone()
    factors = factorize(w, 2, s)
    assert torch.equal(w.detach(), before)
    assert torch.equal(s, torch.ones(5))
    assert not factors.left.requires_grad


@settings(max_examples=150, deadline=None)
@given(
    out_features=st.integers(1, 17),
    in_features=st.integers(1, 17),
    fraction=st.floats(0, 1),
    zeros=st.integers(0, 5),
    spread=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_the_svd(
    out_features: int, in_features: int, fraction: float, zeros: int, spread: int, seed: int
) -> None:
    rank = 1 + int(fraction * (min(out_features, in_features) - 1))
    w = normal(out_features, in_features, seed=seed)
    s = 10 ** (normal(in_features, seed=seed + 1).clamp(-2, 2) * spread / 2)
    s[:zeros] = 0
    factors = factorize(w, rank, s)
    values = factors.singular_values
    assert values.shape == (min(out_features, in_features),)
    assert bool((values[:-1] >= values[1:]).all())
    assert bool((values >= 0).all())
    if s.any():
        # The absolute part is the float64 resolution of an error that is zero.
        limit = relative_error(w, paper(w, rank, s), s) * (1 + 1e-9) + 1e-10
        assert relative_error(w, product(factors), s) <= limit


# ----------------------------------------------------------------------------------------------------------------------
# A metric of the outputs as well


def positive(size: int, seed: int = 7, spread: float = 1.0) -> Tensor:
    x = normal(3 * size + 5, size, seed=seed) * torch.logspace(-spread, spread, size, dtype=torch.float64)
    return x.T @ x / len(x)


def input_metric(kind: str, features: int) -> Tensor | None:
    return {"none": None, "vector": sq_norms("gaussian", features), "matrix": positive(features, seed=3)}[kind]


def right_root(c: Tensor | None, features: int) -> Tensor:
    if c is None:
        return torch.eye(features, dtype=torch.float64)
    return torch.diag(c.sqrt()) if c.ndim == 1 else root(c)


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_sided_is_the_svd_between_the_roots(shape: tuple[int, int], kind: str) -> None:
    w, rank, c, a = normal(*shape), middle_rank(shape), input_metric(kind, shape[1]), positive(shape[0])
    lower, right = torch.linalg.cholesky(a), right_root(c, shape[1])
    seen = lower.T @ w @ right
    best = truncated_svd(seen, rank)
    factors = factorize(w, rank, c, output_metric=a)
    assert (factors.left.shape, factors.right.shape) == ((shape[0], rank), (rank, shape[1]))
    difference = (lower.T @ product(factors) @ right - best).norm() / seen.norm()
    assert difference < 1e-7
    torch.testing.assert_close(
        product(factors), torch.linalg.inv(lower.T) @ best @ torch.linalg.inv(right), rtol=1e-5, atol=1e-5
    )
    assert factors.error == pytest.approx(float((seen - best).norm() / seen.norm()), rel=1e-6, abs=1e-7)
    values = torch.linalg.svdvals(seen)
    torch.testing.assert_close(factors.singular_values, values, rtol=1e-6, atol=1e-6 * float(values[0]))
    torch.testing.assert_close(spectrum(w, c, a), values.square(), rtol=1e-6, atol=1e-9 * float(values[0]) ** 2)


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectrum_is_that_of_the_factorization(shape: tuple[int, int], kind: str) -> None:
    w, c = normal(*shape).float(), input_metric(kind, shape[1])
    found, values = spectrum(w, c), factorize(w.double(), 1, c).singular_values.square()
    assert found.shape == (min(shape),)
    assert (found[:-1] >= found[1:]).all()
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-9 * float(values[0]))


def test_the_weighed_output_is_approximated_better() -> None:
    w, c = normal(40, 63), positive(63, seed=3)
    weights = torch.ones(40, dtype=torch.float64)
    weights[:5] = 1e4
    plain, weighed = factorize(w, 10, c), factorize(w, 10, c, output_metric=torch.diag(weights))

    def error(factors: Factorization, rows: slice) -> float:
        return float(((w - product(factors))[rows] @ root(c)).norm())

    assert error(weighed, slice(5)) < 0.1 * error(plain, slice(5))
    assert error(weighed, slice(5, 40)) > error(plain, slice(5, 40))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_identity_as_output_metric_changes_nothing(scale: float) -> None:
    w, c = normal(40, 63), positive(63, seed=3)
    plain, weighed = factorize(w, 9, c), factorize(w, 9, c, output_metric=scale * torch.eye(40))
    torch.testing.assert_close(product(weighed), product(plain), rtol=1e-7, atol=1e-7)
    assert weighed.error == pytest.approx(plain.error, rel=1e-9)
    torch.testing.assert_close(weighed.left.norm(dim=0), weighed.right.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(40, 63), (63, 40)], ids=["out<in", "in<out"])
def test_factors_stay_balanced_under_an_output_metric(shape: tuple[int, int]) -> None:
    factors = factorize(normal(*shape), 13, positive(shape[1], seed=3), output_metric=positive(shape[0], spread=2.0))
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_reconstructs_under_an_output_metric(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    factors = factorize(w, min(shape), sq_norms("zero-channels", shape[1]), output_metric=positive(shape[0]))
    torch.testing.assert_close(product(factors), w, rtol=1e-7, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    out_features=st.integers(1, 15),
    in_features=st.integers(1, 15),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_nothing_of_that_rank_is_better_in_the_two_sided_norm(
    out_features: int, in_features: int, fraction: float, seed: int
) -> None:
    rank = 1 + int(fraction * (min(out_features, in_features) - 1))
    w = normal(out_features, in_features, seed=seed)
    a, c = positive(out_features, seed), positive(in_features, seed + 1)
    lower, right = torch.linalg.cholesky(a), root(c)

    def distance(approximation: Tensor) -> float:
        return float((lower.T @ (w - approximation) @ right).norm() / (lower.T @ w @ right).norm())

    factors = factorize(w, rank, c, output_metric=a)
    assert factors.error == pytest.approx(distance(product(factors)), rel=1e-5, abs=1e-6)
    rivals = [factorize(w, rank), factorize(w, rank, c), factorize(w, rank, output_metric=a)]
    assert all(distance(product(factors)) <= distance(product(rival)) + 1e-7 for rival in rivals)


@pytest.mark.parametrize("rank_of_metric", [0, 1, 4, 7])
def test_root_of_also_singular_metrics(rank_of_metric: int) -> None:
    x = normal(7, rank_of_metric)
    found = root_of(x @ x.T)
    torch.testing.assert_close(found @ found.T, x @ x.T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["none", "vector", "matrix"])
@pytest.mark.parametrize("seen", [0, 1, 9, 20, 39])
@pytest.mark.parametrize("shape", [(40, 63), (63, 40)], ids=["out<in", "in<out"])
def test_singular_output_metric(shape: tuple[int, int], seen: int, kind: str) -> None:
    """Directions that the metric does not see are lost; the others are approximated as well as can be, and nothing explodes."""
    w, c, rank = normal(*shape), input_metric(kind, shape[1]), 12
    x = normal(shape[0], seen, seed=5)
    right = right_root(c, shape[1])
    weighted = root(x @ x.T).T @ w @ right
    factors = factorize(w, rank, c, output_metric=x @ x.T)
    assert torch.isfinite(factors.left).all()
    assert torch.isfinite(factors.right).all()
    assert float(product(factors).norm()) < 10 * float(w.norm())
    size = float(weighted.norm())
    error = float((root(x @ x.T).T @ (w - product(factors)) @ right).norm())
    best = float((weighted - truncated_svd(weighted, rank)).norm())
    assert error <= best + 1e-6 * size
    values = torch.linalg.svdvals(weighted).square()
    found = spectrum(w, c, x @ x.T)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-9 * max(float(values[0]), 1e-300))
    if seen:
        assert factors.error == pytest.approx(best / size, rel=1e-5, abs=1e-6)
    else:
        assert factors.error == 0.0


NAN, INF = torch.ones(7, 5), torch.ones(7, 5)
NAN[3, 2], INF[0, 0] = float("nan"), float("-inf")


@pytest.mark.parametrize(
    ("weight", "rank", "metric", "words"),
    [
        (NAN, 2, None, ["NaN or infinity"]),
        (INF, 2, None, ["NaN or infinity"]),
        (torch.ones(7, 5), 2, torch.tensor([1.0, 1, float("inf"), 1, 1]), ["metric of", "NaN or infinity"]),
        (torch.ones(7, 5), 2, torch.full((5, 5), float("nan")), ["metric of", "NaN or infinity"]),
        (torch.ones(7, 5), 2, torch.tensor([1.0, 1, -0.5, 1, 1]), ["metric of", "negative", "-0.5"]),
        (torch.ones(7, 5), 0, None, ["rank 0", "(7, 5)", "[1, 5]"]),
        (torch.ones(7, 5), -1, None, ["rank -1", "[1, 5]"]),
        (torch.ones(7, 5), 6, None, ["rank 6", "(7, 5)", "[1, 5]"]),
        (torch.ones(7, 5), 2, torch.ones(7), ["metric of", "(7,)", "(5,)"]),
        (torch.ones(7, 5), 2, torch.ones(7, 7), ["metric of", "(7, 7)", "(5, 5)"]),
        (torch.ones(7, 5, dtype=torch.int8), 2, None, ["torch.int8", "(7, 5)"]),
        (torch.ones(7), 1, None, ["torch.float32", "(7,)"]),
    ],
    ids=[
        "nan-weight",
        "inf-weight",
        "inf-metric",
        "nan-matrix",
        "negative-metric",
        "rank-0",
        "rank-negative",
        "rank-too-high",
        "metric-of-outputs",
        "matrix-of-outputs",
        "integer-weight",
        "vector-weight",
    ],
)
def test_refuses(weight: Tensor, rank: int, metric: Tensor | None, words: list[str]) -> None:
    with pytest.raises(FactorizationError) as error:
        factorize(weight, rank, metric, name="layers.3.q_proj")
    for word in ["layers.3.q_proj", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (torch.eye(5), ["output metric", "(5, 5)", "(7, 7)"]),
        (torch.ones(7), ["output metric", "(7,)", "(7, 7)"]),
        (torch.full((7, 7), float("nan")), ["output metric", "NaN or infinity"]),
    ],
    ids=["of-inputs", "vector", "nan"],
)
def test_refuses_output_metrics(metric: Tensor, words: list[str]) -> None:
    with pytest.raises(FactorizationError) as error:
        factorize(torch.ones(7, 5), 2, output_metric=metric, name="layers.3.q_proj")
    for word in ["layers.3.q_proj", *words]:
        assert word in str(error.value)
