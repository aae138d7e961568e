"""The weighted factorization beside torch's SVD and the published program's way: one run, contenders in turn, medians.

    python benchmarks/factorization_targets.py [--repeats 3] [--shapes square wide tall grouped] [--no-model] [--ways auto ...]

``svd`` is torch.linalg.svd in float32 of the weighted matrix, made beforehand; ``published`` is that with the diagonal matrix
products and the inverse around it; all others are ``lorap.factorize`` from the weight to both factors. Weights are Gaussian: a
flat spectrum is the hardest for the block iteration. Channels are log-normal with some outliers. The last line is all attention
matrices of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import assets
import torch
from bench_factorize import METHODS, published, square_sums

import lorap
from lorap.checkpoint.load import find_model, load_model
from lorap.reports.run import format_table

SHAPES = {  # out_features, in_features, rank; wanted ratios to svd and to published
    "square": ((4096, 4096, 1024), (1.8, 3.0)),
    "wide": ((4096, 11008, 1492), (3.0, 6.0)),
    "tall": ((11008, 4096, 1492), (3.0, 6.0)),
    "grouped": ((1024, 4096, 409), (3.0, 6.0)),
}
WAYS = ["svd", "published", *METHODS]


def contenders(shape: tuple[int, int, int], ways: Sequence[str]) -> dict[str, Callable[[], object]]:
    out_features, in_features, rank = shape
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    sq_norm = square_sums(in_features)
    weighted = weight * sq_norm.sqrt()
    calls: dict[str, Callable[[], object]] = {
        "svd": lambda: torch.linalg.svd(weighted, full_matrices=False),
        "published": lambda: published(weight, rank, sq_norm),
    }
    for method in [*METHODS, "svd"]:
        name = "float64 svd" if method == "svd" else method
        calls[name] = lambda method=method: lorap.factorize(weight, rank, sq_norm, method=method)
    return {name: call for name, call in calls.items() if name in ways}


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, float], dict[str, object]]:
    """Median seconds of each, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, object] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            results[name] = call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}, results


def rows_of(name: str, repeats: int, ways: Sequence[str]) -> list[dict[str, object]]:
    shape, (over_svd, over_published) = SHAPES[name]
    seconds, results = measure(contenders(shape, ways), repeats)
    rows = []
    for kind, taken in seconds.items():
        row: dict[str, object] = {"shape": "{}x{} rank {}".format(*shape), "way": kind, "seconds": round(taken, 2)}
        for other in ("svd", "published"):
            if other in seconds:
                row[f"{other} takes"] = round(seconds[other] / taken, 2)
        found = results[kind]
        if isinstance(found, lorap.Factorization):
            row |= {"solved by": found.solver, "error": found.error, "excess": found.excess}
        if kind == "auto":
            row["wanted"] = f"{over_svd} and {over_published}"
        rows.append(row)
        print(row, flush=True)
    return rows


def attention_of(model: Path) -> tuple[list[torch.Tensor], list[str]]:
    """All q, k, v and o projections of a checkpoint, float32."""
    loaded = load_model(find_model(model), dtype="float32")
    found = {name: weight for name, weight in loaded.named_parameters() if ".self_attn." in name and weight.ndim == 2}
    return [weight.data for weight in found.values()], list(found)


def model_row(model: Path) -> dict[str, object]:
    weights, names = attention_of(model)
    # At sparsity 0.5 with equal shares: half of the parameters, whatever the shape.
    ranks = [max(1, weight.numel() // 2 // sum(weight.shape)) for weight in weights]
    metrics = [square_sums(weight.shape[1]) for weight in weights]
    start = time.perf_counter()
    found = lorap.factorize_batch(weights, ranks, metrics, names=names)
    taken = time.perf_counter() - start
    row = {
        "shape": f"{len(weights)} attention matrices of SmolLM2-135M",
        "way": "auto",
        "seconds": round(taken, 2),
        "wanted": "under 20 s",
    }
    return row | {
        "excess": max(one.excess for one in found),
        "solved by": ", ".join(sorted({one.solver for one in found})),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--model", type=Path, default=assets.MODEL, help="by default SmolLM2-135M, as assets.py fetches it"
    )
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument(
        "--ways", nargs="*", choices=[*WAYS, "float64 svd"], default=WAYS, help="float64 svd: to compare errors with"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for name in options.shapes for row in rows_of(name, options.repeats, options.ways)]
    if not options.no_model:
        assets.fetch()
        rows.append(model_row(options.model))
    header = ["shape", "way", "seconds", "svd takes", "published takes", "wanted", "solved by", "error", "excess"]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.repeats}")
    print(format_table(header, [[_text(row.get(column, "")) for column in header] for row in rows]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _text(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-2 else str(value)


if __name__ == "__main__":
    main()
