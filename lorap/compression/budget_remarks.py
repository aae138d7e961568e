"""What a budget of bytes decided and nobody asked for, in sentences: that something is removed, or that there are no codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorap.compression.byte_budget import STEPS, resolve_budget
from lorap.compression.planning import broken_groups, plan_by_shape
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.requirements import compressed_roles
from lorap.weights import MIXES

# What an option is to be in place of auto's choice, for nothing to be removed, and what comes with it.
INSTEAD: dict[str, tuple[dict[str, Any], str]] = {
    "--group-size 32": ({"group_size": 32}, "with more scales and {weights} weights"),
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
    unpruned = replace(found, sparsity=0.0)
    whole = 8 * dense.planned(dense.unchanged(), unpruned) / dense.weights
    left = 8 * dense.projection_budget(found) / dense.weights
    fewest = ", the fewest bits that auto has here," if asked.weights == "auto" else ""
    told = f"{_share(dense, found):.2%} of the compressed sub-layers is removed: "
    broken = broken_groups(dense, unpruned)
    if broken and found.sparsity <= 1 / STEPS:
        told += f"the {broken[1]:,} inputs of {broken[0]} are no whole groups of {found.group} {kind} weights, as hosts want them"
    else:
        told += (
            f"unpruned, {kind} weights{fewest} take {whole:.4g} bits for each weight of the dense decoder layers, and the budget "
            f"has {left:.4g}"
        )
    for option, (changes, how) in INSTEAD.items():
        other = _resolved(dense, asked, changes) if asked.weights == "auto" else None
        if other is not None and other.sparsity == asked.sparsity:
            return f"{told}; {option} removes nothing, {how.format(weights=other.weights)}."
    return f"{told}."


def _share(dense: DenseModel, found: CompressionConfig) -> float:
    """What is removed. Stock hosts get one FFN width, rounded down, so that it may be more than what is asked for."""
    plans = plan_by_shape(dense, found) if found.target == "stock" else None
    if plans is None:
        return found.sparsity
    floats = replace(found, weights="float")
    removed = dense.planned(dense.unchanged(), floats) - dense.planned(plans, floats)
    return removed / dense.compressible(floats, compressed_roles(found))


def _resolved(dense: DenseModel, asked: CompressionConfig, changes: dict[str, Any]) -> CompressionConfig | None:
    """What ``asked`` comes to with ``changes``; None where that cannot be."""
    try:
        return resolve_budget(dense, replace(asked, **changes))
    except ConfigError:
        return None
