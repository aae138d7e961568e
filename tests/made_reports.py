"""Reports of runs that never were, in shapes that are awkward for a page. Numbers follow from layer and role alone."""

from __future__ import annotations

from typing import Any

from lorap.architectures import PROJECTIONS
from lorap.config import CompressionConfig
from lorap.reports.records import Evaluation, Share
from lorap.reports.run import CompressionReport, ProjectionReport
from lorap.reports.spectra import Spectrum, spectrum_indices

HOSTILE = '<b>Evil & "Co"</b>/model\'s <img src="http://x.example/y.png">'
HIDDEN, INNER, KEY = 576, 1536, 192


def shape_of(role: str, hidden: int = HIDDEN, inner: int = INNER, key: int = KEY) -> tuple[int, int]:
    shapes = {
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
    }
    return shapes.get(role, (hidden, inner) if role == "down_proj" else (hidden, hidden))


def made_projection(layer: int, role: str, config: CompressionConfig, shape: tuple[int, int]) -> ProjectionReport:
    """Every third attention projection of layer 1, 5, 9, ... stays dense; FFN widths go up and down."""
    number = PROJECTIONS.index(role)
    low_rank = number < 4 or config.mlp_method == "factorize"
    dense = config.allocation == "flap" if number < 4 else False
    dense = dense or (low_rank and layer % 4 == 1 and number % 3 == 2)
    after, rank = list(shape), None
    if low_rank and not dense:
        rank = min(shape) // (3 + (layer + number) % 5)
    elif not low_rank and role in PROJECTIONS[4:]:
        after[1 if role == "down_proj" else 0] = INNER // 2 - 8 * ((layer * 7) % 11)
    count = min(shape)
    values = tuple(float(f"{index**-0.8:.4g}") for index in spectrum_indices(count))
    params = rank * sum(shape) if rank else after[0] * after[1]
    unchanged = rank is None and tuple(after) == shape
    return ProjectionReport(
        layer=layer,
        role=role,
        shape_before=shape,
        shape_after=(after[0], after[1]),
        rank=rank,
        params_before=shape[0] * shape[1],
        params_after=params,
        error=0.0 if unchanged else 0.05 + 0.01 * ((layer * 5 + number * 3) % 17),
        storage_error=0.0 if rank is None else 1e-3 * (1 + (layer + number) % 4),
        solver=None if rank is None else "eigh after subspace",
        excess=0.0 if rank is None else 3e-7,
        spectrum=None if rank is None else Spectrum(count, values),
    )


def made_report(
    layers: int = 30, *, texts: tuple[str, ...] = ("heldout", "wiki.txt"), **options: Any
) -> CompressionReport:
    """A run with ``layers`` layers, and ``options`` for fields of the report or of the config."""
    about = {name: options.pop(name) for name in ("model", "command", "environment", "seconds") if name in options}
    hidden = options.pop("hidden", HIDDEN)
    config = CompressionConfig(**options)
    projections = [
        made_projection(layer, role, config, shape_of(role, hidden, hidden * 8 // 3, hidden // 3))
        for layer in range(layers)
        for role in PROJECTIONS
    ]
    rest = 28_346_688
    report = CompressionReport(
        model=about.pop("model", "SmolLM2-135M"),
        config=config,
        calibration={
            "name": "default, chats & more.jsonl",
            "windows": 128,
            "seq_len": 128,
            "tokens": 16_384,
            "sha256": "903846f939448ebe" * 4,
            "sources": [vars(Share("default/novel", 1 / 18, 100)), vars(Share("chats & more.jsonl", 0.5, 28))],
        },
        projections=projections,
        params_total_before=sum(one.params_before for one in projections) + rest,
        params_saved=sum(one.params_after for one in projections) + rest,
        seconds=about.pop("seconds", {"load": 1.25, "calibrate": 152.4, "factorize": 10.06, "prune": 0.0}),
        peak_memory_bytes=2_040_000_000,
        environment=about.pop("environment", {"lorap": "0.1.0", "torch": "2.13.0", "dtype": "float32", "threads": 2}),
        command=about.pop("command", "lorap compress SmolLM2-135M ./small --sparsity 0.2"),
    )
    for index, text in enumerate(texts):
        before = Evaluation(text, 3.4 + index, 29.9641 + 50.5 * index, 4096, 128, 1.5)
        report.add_evaluation(before, Evaluation(text, 4.37375 + index, 79.3151 + 99 * index, 4096, 128, 1.25))
    return report
