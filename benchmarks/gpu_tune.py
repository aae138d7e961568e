"""The sweep of gpu_check.sh: launch settings of the shrink/expand pair around the modelled ones, each pair timed in a CUDA graph.

The fastest settings of a shape are written to kernels/triton/configs/<GPU>.json as soon as they are known, with the error beside
them; a copy goes to the folder of results. Never run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import gpu_timings
import torch
from gpu_timings import Item, Row
from torch import Tensor

CONFIGS = Path(__file__).resolve().parent.parent / "kernels/triton/configs"
TOKENS = (1, 4, 8, 16)
SHAPES = {  # (K, ranks, rows of the left factors)
    "7B r1024": (4096, (1024,), (4096,)),
    "7B q, k, v": (4096, (512, 512, 1536), (4096, 4096, 4096)),
    "7B q, k, v pivoted": (4096, (800, 800, 1632), (3296, 3296, 2464)),
    "8B q, k, v": (4096, (1024, 512, 768), (4096, 1024, 1024)),
}
LIMIT = 1e-2  # relative error that settings may have


def candidates(m: int, k: int, ranks: tuple[int, ...], rows: tuple[int, ...], *, pdl: bool) -> list[tuple[Row, Row]]:
    """Settings of shrink and of expand: the modelled ones first, then one of the two changed in one or two ways."""
    from lorap.kernels.low_rank_settings import expand_config, shrink_config

    shrink, expand = shrink_config(m, k, ranks, rows), expand_config(m, k, ranks, rows, pdl=pdl)
    splits = {max(1, shrink["SPLIT_K"] // 2), shrink["SPLIT_K"], 2 * shrink["SPLIT_K"]}
    if m == 1:
        tiles = ((4, 2048, 8), (8, 1024, 4), (2, 2048, 8), (4, 1024, 4))
        shrinks = [{"BLOCK_N": n, "BLOCK_K": c, "num_warps": w, "num_stages": 1} for n, c, w in tiles]
        wide = expand["BLOCK_K"]
        expands = [
            {**expand, "BLOCK_N": n, "num_warps": w}
            for n, w in ((4, 4), (8, 4), (8, 8), (16, 8), (16, 16))
            if n * wide <= 32768
        ]
    else:
        shrinks = [
            {"BLOCK_N": n, "BLOCK_K": c, "num_warps": 4, "num_stages": s}
            for n, c, s in ((64, 128, 4), (64, 128, 3), (64, 64, 5))
        ]
        expands = [
            {"BLOCK_N": n, "BLOCK_K": 64, "num_warps": 4, "num_stages": s} for n, s in ((64, 3), (64, 4), (128, 3))
        ]
    changed = [(first | {"SPLIT_K": split}, expand) for first, split in product(shrinks, sorted(splits))]
    return [(shrink, expand), *changed, *((shrink, second) for second in expands)]


def sweep_rows(
    device: torch.device, _scale: int, *, compile_only: bool = False, work: Path | None = None
) -> Iterator[Item]:
    """A row for each candidate; after the last of a shape its best ones are written."""
    from lorap.kernels import low_rank_linear

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    dependent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    found: dict[str, list[Row]] = {"shrink": [], "expand": []}
    for m, (shape, (k, ranks, rows)) in product(TOKENS, SHAPES.items()):
        x, weights = gpu_timings.random(m, k, device=device), _weights(device, k, ranks, rows)
        best: list[tuple[float, Row, Row]] = []
        for number, (shrink, expand) in enumerate(candidates(m, k, ranks, rows, pdl=dependent)):

            def measure(shrink=shrink, expand=expand, x=x, weights=weights, best=best) -> Row:
                call = with_settings(low_rank_linear, shrink, expand, len(weights[0]) // 2)
                if compile_only:
                    return {"kernels": call(x, *weights[0]) is not None}
                exact = _exact(x, weights[0])
                error = float((call(x, *weights[0]).double() - exact).norm() / exact.norm())
                us = 1e6 * gpu_timings.seconds_of(lambda *one: call(x, *one), weights)
                if error <= LIMIT:
                    best.append((us, shrink, expand))
                return {"us": us, "error": error}

            settings = {"shrink": json.dumps(shrink), "expand": json.dumps(expand)}
            yield {"shape": shape, "tokens": m, "kernel": number, **settings}, measure
        if best and not compile_only:
            us, shrink, expand = min(best, key=lambda one: one[0])
            sizes = {"dtype": "bfloat16", "max_m": m, "k": k, "rank": sum(ranks), "n": sum(rows)}
            found["shrink"].append(sizes | {"config": shrink, "us_of_both": round(us, 2)})
            found["expand"].append(sizes | {"config": expand})
            write(name, found, *([] if work is None else [work]))


def write(name: str, found: dict[str, list[Row]], *folders: Path) -> None:
    """The settings so far, as :mod:`lorap.kernels.configs` reads them."""
    import triton

    kernels = {
        kernel: [{k: v for k, v in one.items() if k != "us_of_both"} for one in entries]
        for kernel, entries in found.items()
    }
    source = f"measured by benchmarks/gpu_check.sh tune with torch {torch.__version__}, triton {triton.__version__}"
    text = json.dumps({"device": name, "source": source, "kernels": kernels}, indent=1) + "\n"
    for folder in (CONFIGS, *folders):
        folder.mkdir(exist_ok=True)
        (folder / f"{name.replace(' ', '_').replace('/', '_')}.json").write_text(text)


def _weights(device: torch.device, k: int, ranks: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    shapes = [(rank, k) for rank in ranks] + [(n, rank) for n, rank in zip(rows, ranks, strict=True)]
    return gpu_timings.rotating(lambda: tuple(gpu_timings.random(*shape, device=device) for shape in shapes))


def with_settings(module: Any, shrink: Row, expand: Row, layers: int) -> Any:
    """The pair with these settings in place of the modelled ones."""

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        lookup, module.configs.lookup = (
            module.configs.lookup,
            lambda kernel, *_, **__: dict(shrink if kernel == "shrink" else expand),
        )
        module._settings.cache_clear()
        try:
            return module.low_rank_linear_group(x, list(weights[:layers]), list(weights[layers:]), pdl=x.is_cuda)
        finally:
            module.configs.lookup = lookup

    return call


def _exact(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    layers = len(weights) // 2
    pairs = zip(weights[:layers], weights[layers:], strict=True)
    return torch.cat([x.double() @ right.double().T @ left.double().T for right, left in pairs], dim=-1)
