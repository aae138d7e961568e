"""The weighted factorization against the published program's way: an SVD of W D, with D^-1 folded back.

pytest benchmarks/bench_factorize.py --benchmark-only

Sizes of a LLaMA take seconds each and are in factorization_targets.py.
"""

import pytest
import torch

import lorap

SHAPES = {  # (out_features, in_features, rank)
    "smollm2-q": (576, 576, 172),
    "smollm2-k": (192, 576, 86),
    "square-1024": (1024, 1024, 256),
}
METHODS = ["auto", "eigh", "mixed", "subspace"]


def square_sums(features: int) -> torch.Tensor:
    """Log-normal channels with one outlier in 500, as activations have."""
    generator = torch.Generator().manual_seed(1)
    sq_norm = torch.randn(features, generator=generator).mul(2).exp()
    sq_norm[:: min(500, features)] *= 1e4
    return sq_norm


def published(weight: torch.Tensor, rank: int, sq_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32, as published: diagonal matrices in full, and one of them inverted."""
    scale = torch.diag(sq_norm.sqrt())
    u, s, vh = torch.linalg.svd(weight @ scale, full_matrices=False)
    root = torch.diag(s.sqrt())
    return u @ root[:, :rank], root[:rank] @ vh @ torch.inverse(scale)


@pytest.mark.parametrize("kind", ["published", *METHODS])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def bench_factorize(benchmark, shape, kind):
    out_features, in_features, rank = shape
    benchmark.group = f"{out_features}x{in_features} rank {rank}"
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    sq_norm = square_sums(in_features)
    if kind == "published":
        left, right = benchmark(published, weight, rank, sq_norm)
    else:
        factors = benchmark(lorap.factorize, weight, rank, sq_norm, method=kind)
        left, right = factors.left, factors.right
    exact = lorap.factorize(weight, rank, sq_norm, method="eigh").error
    lost = ((weight - left @ right) * sq_norm.sqrt()).norm() / (weight * sq_norm.sqrt()).norm()
    benchmark.extra_info["error_over_optimum"] = float(lost) / exact
    assert float(lost) < 1.01 * exact


@pytest.mark.parametrize("kind", ["one by one", "together"])
def bench_factorize_batch(benchmark, kind):
    """Eight matrices of 256: on a CPU there is little to win, on a GPU the block iteration runs them at once."""
    benchmark.group = "8 x 256x256 rank 64"
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(256, 256, generator=generator) for _ in range(8)]
    budget = 10**10 if kind == "together" else 0
    found = benchmark(lorap.factorize_batch, weights, [64] * 8, method="subspace", memory_budget=budget)
    assert max(one.excess for one in found) < 1e-4
