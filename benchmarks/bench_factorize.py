"""The weighted factorization against the published program's way: an SVD of W D, with D^-1 folded back.

pytest benchmarks/bench_factorize.py --benchmark-only
"""

import pytest
import torch

import lorap

SHAPES = {  # (out_features, in_features, rank)
    "smollm2-q": (576, 576, 172),
    "smollm2-k": (192, 576, 86),
    "square-1024": (1024, 1024, 256),
}


def published(weight: torch.Tensor, rank: int, sq_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32, as published: diagonal matrices in full, and one of them inverted."""
    scale = torch.diag(sq_norm.sqrt())
    u, s, vh = torch.linalg.svd(weight @ scale, full_matrices=False)
    root = torch.diag(s.sqrt())
    return u @ root[:, :rank], root[:rank] @ vh @ torch.inverse(scale)


@pytest.mark.parametrize("kind", ["published", "lorap"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def bench_factorize(benchmark, shape, kind):
    out_features, in_features, rank = shape
    benchmark.group = f"{out_features}x{in_features} rank {rank}"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    sq_norm = torch.randn(in_features, generator=generator).mul(2).exp()  # log-normal channels, as activations are
    if kind == "published":
        left, right = benchmark(published, weight, rank, sq_norm)
    else:
        factors = benchmark(lorap.factorize, weight, rank, sq_norm)
        left, right = factors.left, factors.right
    exact = lorap.factorize(weight, rank, sq_norm).error
    lost = ((weight - left @ right) * sq_norm.sqrt()).norm() / (weight * sq_norm.sqrt()).norm()
    benchmark.extra_info["error_over_optimum"] = float(lost) / exact
    assert float(lost) < 1.01 * exact
