"""What a budget of bytes decided and nobody asked for, in sentences: that something is removed, or that there are no codes."""

from __future__ import annotations

from dataclasses import replace

from lorap.compression.byte_budget import resolve_budget
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.weights import MIXES

# What an option is to be in place of auto's choice, for nothing to be removed, and what comes with it.
INSTEAD = {
    "--weights tcq": (
        {"weights": "tcq"},
        "with fewer bits in some matrices, which was worse where it was measured (docs/results.md)",
    ),
    "--target lorap": ({"target": "lorap"}, "with codes (tcq), which only lorap opens"),
    "--storage factors": ({"storage": "factors"}, "with weights below 8 bits"),
}


def budget_remarks(dense: DenseModel, asked: CompressionConfig, found: CompressionConfig) -> list[str]:
    """Sentences on ``found``, which :func:`resolve_budget` made of ``asked``; none where all is as it was asked for.

    Args:
        dense: the model.
        asked: with a budget of bytes, or without one.
        found: the same with weights and a sparsity.
    """
    if found.sparsity > asked.sparsity:
        return [_removed(dense, asked, found)]
    if asked.weights == "auto" and asked.target == "stock" and found.weights == "int4":
        return [
            "For target stock weights have 8 or 4 bits: codes (tcq), which --target lorap would choose from, open in lorap alone."
        ]
    return []


def _removed(dense: DenseModel, asked: CompressionConfig, found: CompressionConfig) -> str:
    kind = MIXES[found.weights].kind(min(MIXES[found.weights].bits)) if found.is_mixed else found.weights
    whole = 8 * dense.planned(dense.unchanged(), replace(found, sparsity=0.0)) / dense.weights
    left = 8 * dense.projection_budget(found) / dense.weights
    fewest = ", the fewest bits that auto has here," if asked.weights == "auto" else ""
    told = (
        f"{found.sparsity:.2%} of the compressed sub-layers is removed: unpruned, {kind} weights{fewest} take {whole:.4g} bits "
        f"for each weight of the dense decoder layers, and the budget has {left:.4g}"
    )
    for option, (changes, how) in INSTEAD.items():
        if asked.weights == "auto" and _keeps_all(dense, asked, changes):
            return f"{told}; {option} removes nothing, {how}."
    return f"{told}."


def _keeps_all(dense: DenseModel, asked: CompressionConfig, changes: dict[str, str]) -> bool:
    try:
        other = replace(asked, **changes)  # type: ignore[arg-type]
        return resolve_budget(dense, other).sparsity == asked.sparsity
    except ConfigError:
        return False
