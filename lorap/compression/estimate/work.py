"""What one decoder layer takes: to factorize its projections, to price its sizes, to prune and refit its FFN.

Operations are counted from the code of :mod:`lorap.algorithms.factorization`, :mod:`lorap.algorithms.pivoting`,
:mod:`lorap.algorithms.refit` and :mod:`lorap.compression.planning`; a product of (m, k) and (k, n) takes 2 m k n.
"""

from __future__ import annotations

from lorap.algorithms.factorization.eigen import OUTLIER_STEPS, OUTLIERS, basis_size
from lorap.algorithms.symmetric import LOWER
from lorap.calibration.sensitivity import WIDE as PRICES_WIDE
from lorap.calibration.statistics import WIDE
from lorap.compression.allocation import LayerPlan
from lorap.compression.estimate.cost_terms import CostTerms
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.shrinkage import JUDGED_OUTPUTS, RIDGES
from lorap.config import CompressionConfig
from lorap.requirements import roles_with_output_metric

# Polynomial degrees of the block iteration that a typical spectrum takes, Rayleigh-Ritz steps included.
SUBSPACE_PRODUCTS = 18
# Float64 passes over the FFN's weights for the paper's importance, its share of what goes, and the narrower copies.
SCORE_PASSES = 15
FOLDS = 2


def sums_dtype(features: int, *, prices: bool = False) -> str:
    """Of the sums of outer products of an input, or of those that sizes are priced by."""
    return "float32" if features > (PRICES_WIDE if prices else WIDE) else "float64"


def metric_axes(config: CompressionConfig) -> int:
    """Of what a factorization is judged on: 0 for nothing, 1 for channel norms, 2 for a second moment."""
    return {"svd": 0, "awsvd": 1}.get(config.attention_method, 2)


def factorize(terms: CostTerms, shape: ModelShape, config: CompressionConfig, layer: LayerPlan, role: str) -> None:
    """From one weight to what is stored.

    Args:
        terms: take the work.
        shape: of the dense model.
        config: what is asked for.
        layer: what becomes of a decoder layer.
        role: of the projection.
    """
    out, inner = shape.projections[role]
    rank = layer.ranks[role]
    weighed = role in roles_with_output_metric(config)
    _reduce(terms, (out, inner), metric_axes(config), weighed=weighed)
    _solve(terms, min(out, inner), rank)
    n, tall = min(out, inner), out > inner
    finish = 2 * n * rank * inner + (2 * out * inner * rank + 4 * out * rank**2 if tall else 0)
    finish += 2 * out**3 + 2 * out**2 * rank if weighed else 0
    terms.products("factors", finish, "float64", f"{role}: from {rank:,} vectors to both factors")
    if config.storage == "pivoted":
        rows = max(0, out - rank)
        pivot = 4 * out * rank**2 + out * rank**2 + rows * rank**2 + rank**3 + 2 * rows * rank**2 + 2 * rank**2 * inner
        terms.products("pivot rows", pivot, "float64", f"{role}: QR, LU and two solves at {out:,} x {rank:,}")
    judged = (4 * out * inner**2 if metric_axes(config) == 2 else 0) + 4 * out * rank * inner
    terms.products("storage error", judged, "float64", f"{role}: 4 x {out:,} x {inner:,} x (K + {rank:,})")


def price(terms: CostTerms, shape: ModelShape, role: str) -> None:
    """The costs of all sizes of one projection, or of the FFN.

    Args:
        terms: take the work.
        shape: of the dense model.
        role: of the projection; ``down_proj`` for the FFN.
    """
    out, inner = shape.projections[role]
    if role != "down_proj":
        _reduce(terms, (out, inner), 2, weighed=True)
        terms.eigen("spectra", min(out, inner), "values")
        return
    terms.products("channel scores", 2 * out**2 * inner, "float64", f"2 x {out:,}^2 x {inner:,}")
    terms.cholesky("prices of widths", inner, "float32")
    flop = 2 * out * inner**2 + 2 * out**2 * inner
    terms.products("prices of widths", flop, "float32", f"2 x {out:,} x {inner:,} x ({inner:,} + {out:,})")


def prune(terms: CostTerms, shape: ModelShape, config: CompressionConfig, layer: LayerPlan) -> None:
    """Scores of all channels, and the refit of down_proj.

    Args:
        terms: take the work.
        shape: of the dense model.
        config: what is asked for.
        layer: what becomes of a decoder layer.
    """
    hidden, width = shape.projections["down_proj"]
    kept = layer.intermediate_size
    dtype = sums_dtype(width)
    size = 8 if dtype == "float64" else 4
    if "down_proj" in roles_with_output_metric(config):
        terms.products("channel scores", 2 * hidden**2 * width, "float64", f"2 x {hidden:,}^2 x {width:,}")
    if config.channel_score == "lorap":
        nbytes = SCORE_PASSES * 3 * hidden * width * 8
        terms.moved("channel scores", nbytes, f"{SCORE_PASSES} passes over 3 x {hidden:,} x {width:,} x 8 B")
    if not config.repair:
        return
    if "auto" in (config.metric_shrinkage, config.repair_ridge):
        passes = 8 * FOLDS * width**2 * 8
        terms.moved("shrinkage", passes, f"8 passes over {FOLDS} x {width:,}^2 x 8 B")
    if config.repair_ridge == "auto":
        tried, outputs = len(RIDGES) * FOLDS, min(hidden, JUDGED_OUTPUTS)
        terms.cholesky("ridge", kept, dtype, count=tried)
        each = 2 * outputs * (3 * width**2 + 2 * kept**2)
        formula = f"{tried} refits of {outputs} outputs: 2 x {outputs} x (3 x {width:,}^2 + 2 x {kept:,}^2) each"
        terms.products("ridge", tried * each, dtype, formula)
        terms.moved("ridge", tried * 4 * kept**2 * size, f"{tried} x 4 passes over {kept:,}^2 x {size} B")
    terms.cholesky("refit", kept, dtype)
    flop = 2 * hidden * (3 * width**2 + 2 * kept**2)
    terms.products("refit", flop, dtype, f"2 x {hidden:,} x (3 x {width:,}^2 + 2 x {kept:,}^2)")


def _reduce(terms: CostTerms, sizes: tuple[int, int], axes: int, *, weighed: bool) -> None:
    """A weight between its metrics becomes the Gram matrix of its smaller side."""
    out, inner = sizes
    n, other = min(sizes), max(sizes)
    if weighed:
        terms.cholesky("Gram matrix", out, "float64")
    if axes == 2 and out > inner:
        terms.cholesky("Gram matrix", inner, "float64")
    flop = 2 * LOWER * n * n * other
    flop += 2 * out**2 * inner if weighed else 0
    flop += 2 * out * inner**2 if axes == 2 else 0
    told = f"{out:,} x {inner:,}: {2 * LOWER:.3g} x {n:,}^2 x {other:,}"
    told += f" + 2 x {out:,}^2 x {inner:,}" if weighed else ""
    told += f" + 2 x {out:,} x {inner:,}^2" if axes == 2 else ""
    terms.products("Gram matrix", flop, "float64", told)


def _solve(terms: CostTerms, n: int, rank: int) -> None:
    method = terms.machine.rule.choose(n, rank, spectrum=False)
    k = basis_size(n, rank)
    if method == "eigh":
        terms.eigen("eigenproblems", n, "float64")
        return
    outliers = (2 * OUTLIER_STEPS + 2) * n * n * min(OUTLIERS, n)
    polish = 2 * n * n * k + (4 + 6 * LOWER) * n * k * k
    proof = 2 * LOWER * n * n * k
    if method == "mixed":
        terms.eigen("eigenproblems", n, "float32")
    else:
        flop = SUBSPACE_PRODUCTS * 2 * n * n * k + 8 * n * k * k
        terms.products(
            "block iteration", flop, "float32", f"{SUBSPACE_PRODUCTS} x 2 x {n:,}^2 x {k:,} + 8 x {n:,} x {k:,}^2"
        )
        terms.eigen("eigenproblems", k, "float32")
        terms.eigen("eigenproblems", k, "float32")
    told = f"{n:,}^2 x {k:,} and {n:,} x {k:,}^2: outliers, Rayleigh-Ritz, certificate"
    terms.products("float64 steps", outliers + polish + proof, "float64", told)
    terms.eigen("eigenproblems", k, "float64")
    terms.cholesky("float64 steps", n, "float64")
