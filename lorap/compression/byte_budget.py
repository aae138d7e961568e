"""A budget of bytes, before any weight is read: how many bits the weights get, and how much sparsity that leaves to find.

Bits go first. On SmolLM2-135M 4 bits add 0.10 nats to the dense model, and a sparsity of 0.2 adds 0.32 in 16 bits, which is three
times the size (docs/results.md). So weights have the most bits with which the model fits whole; where not even the fewest do,
sparsity gives the rest. Below int8 weights are codes on a trellis where lorap opens the folder, of several bits: what fewer leave
over goes to those matrices where more help most for their bytes (:mod:`lorap.compression.prices`). Just below int8 they are int4
and int8, mixed alike; for other hosts all are int4. Sparsity comes below the fewest bits, which all weights have then: the loss
decides on bits with ranks and widths only where a mix is asked for (``mixed`` at 3.5 bits: 0.476 nats, with 4 for all 0.401).
Nothing lies between 8 bits and floating point. The result is never larger than asked for, and without sparsity it is quantization
and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lorap.architectures import MLP
from lorap.compression.planning import broken_groups, check_experts, plan_by_shape
from lorap.compression.prices import Prices
from lorap.compression.stored_bytes import DenseModel, Storage
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.requirements import allocates_by_loss, compressed_roles, priced_roles
from lorap.weights import MIXES, coding_of

# Sparsity is searched for in steps of one in so many.
STEPS = 2**20
# What weights may come to below int8 whole, before sparsity.
ON_TRELLIS = ("tcq6", "tcq5", "tcq4", "tcq3")
# Bits of a budget for each weight from which on int4 and int8 mixed lose less than codes of 6 bits: at 6 bits the ones lose 0.035
# nats and the others 0.006, at 8 bits the ones 0.001 (docs/results.md).
MIXED_FROM = 8.0


def resolve_budget(dense: DenseModel, config: CompressionConfig) -> CompressionConfig:
    """``config`` with the weights and the sparsity that follow from its budget of bytes; as it is, where it has none.

    A model none of whose layers has attention of q, k, v and o has its FFNs compressed alone.

    Args:
        dense: the model.
        config: what is asked for; its sparsity is the least to remove.

    Raises:
        ConfigError: no choice is so small; the message says what is. Or there is nothing of what is to be compressed.
    """
    if not any("q_proj" in shapes for shapes in dense.shapes):
        config = _of_ffns_alone(dense, config)
    if not config.has_byte_budget:
        return config
    check_experts(dense, config)
    budget = dense.projection_budget(config)
    choices = weights_to_try(config, 8 * budget / dense.weights)
    for chosen in choices:
        left = budget - _bytes_at(dense, chosen, chosen.sparsity)
        if left >= 0 and (len(choices) == 1 or broken_groups(dense, chosen) is None):
            useful = _by_loss(config) if chosen.sparsity else left >= _smallest_step(dense, chosen)
            mix = _mix(config, chosen) if useful else None
            return replace(chosen, weights=mix) if mix else chosen
    pruned = [chosen for chosen in choices if broken_groups(dense, replace(chosen, sparsity=0.5)) is None]
    for chosen in pruned:
        # What fits whole, but for rows that are no whole groups: as much goes as makes them that.
        cut = replace(chosen, sparsity=max(chosen.sparsity, 1 / STEPS))
        if broken_groups(dense, chosen) is not None and _bytes_at(dense, cut, cut.sparsity) <= budget:
            return cut
    fewest_first = sorted(pruned or choices, key=lambda each: each.bits or 16)
    # Tiles of rows are too large for some small models, where whole numbers still fit.
    chosen = next((each for each in fewest_first if _smallest_bytes(dense, each) <= budget), fewest_first[0])
    if config.is_mixed and _by_loss(config):
        chosen = replace(chosen, weights=config.weights)
    return _with_sparsity(dense, chosen, budget)


def _of_ffns_alone(dense: DenseModel, config: CompressionConfig) -> CompressionConfig:
    """What ``config`` comes to where no layer has attention that could be compressed."""
    if "mlp" not in config.sublayers:
        raise ConfigError(
            f"{dense.config.model_type} models have no attention of q, k, v and o, and sublayers names nothing else to compress; "
            "choose sublayers mlp"
        )
    return replace(config, sublayers=("mlp",))


def weights_to_try(config: CompressionConfig, bits: float) -> list[CompressionConfig]:
    """``config`` with each kind of weights that it may get, the best first, for a budget of ``bits`` for each weight."""
    kinds: Any = [config.weights]
    if config.is_mixed:
        coding = MIXES[config.weights]
        kinds = [coding.kind(min(coding.bits))]
    elif config.weights == "auto":
        kinds = ["float", "int8"]
        if config.storage == "factors":  # fewer bits are too few for the coefficients of pivoted storage
            codes = ON_TRELLIS if config.target == "lorap" else ()
            kinds += ["int4", *codes] if bits >= MIXED_FROM else [*codes, "int4"]
    return [replace(config, weights=kind) for kind in kinds]


def _mix(config: CompressionConfig, chosen: CompressionConfig) -> Any:
    """The kind of weights that has some matrices in more bits than ``chosen``, which fits whole; None where there is none.

    Bits are mixed where that is asked for, or no sparsity is, and lorap opens the folder.
    """
    coding = coding_of(chosen.weights)
    if coding is None or chosen.bits == max(coding.bits) or config.target == "stock" or config.storage != "factors":
        return None
    return coding.mix if config.weights == coding.mix or (config.weights == "auto" and config.sparsity == 0) else None


def _smallest_step(dense: DenseModel, config: CompressionConfig) -> float:
    """Bytes that the next more bits take in the matrix, or gate and up together, where these are fewest."""
    few = Storage.of(config, dense.itemsize)
    if few.coding is None or few.bits is None or few.bits == max(few.coding.bits):
        return math.inf
    more = replace(few, bits=min(bits for bits in few.coding.bits if bits > few.bits))
    return min(
        (1 + (role in MLP[:2])) * (more.matrix(shape) - few.matrix(shape))
        for shapes in dense.shapes
        for role, shape in shapes.items()
    )


def _with_sparsity(dense: DenseModel, config: CompressionConfig, budget: int) -> CompressionConfig:
    """The least sparsity that leaves no more bytes of projections than ``budget``."""
    _bytes_at(dense, config, max(config.sparsity, 1 / STEPS))  # what else there is to refuse
    smallest = _smallest_bytes(dense, config)
    if smallest > budget:
        raise ConfigError(_impossible(dense, config, smallest))
    if _by_loss(config):
        whole = _bytes_at(dense, config, 0.0)
        return replace(config, sparsity=(whole - budget) / dense.compressible(config, compressed_roles(config)))
    low, high = int(config.sparsity * STEPS), _highest(dense, config)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _bytes_at(dense, config, middle / STEPS) <= budget else (middle, high)
    return replace(config, sparsity=high / STEPS)


def _bytes_at(dense: DenseModel, config: CompressionConfig, sparsity: float) -> int:
    """Bytes of all projections; where the loss is to decide, what it may spend."""
    config = replace(config, sparsity=sparsity)
    plans = plan_by_shape(dense, config) if sparsity > 0 else None
    if plans is not None or sparsity == 0:
        return dense.planned(plans or dense.unchanged(), config)
    compressible = dense.compressible(config, compressed_roles(config))
    return dense.planned(dense.unchanged(), config) - compressible + int((1 - sparsity) * compressible)


def _smallest_bytes(dense: DenseModel, config: CompressionConfig) -> int:
    """Bytes of all projections at the highest sparsity that there is."""
    if not _by_loss(config):
        return _bytes_at(dense, config, _highest(dense, config) / STEPS)
    taken = Prices(replace(config, sparsity=0.5), dense).smallest()
    whole = dense.planned(dense.unchanged(), config)
    priced = dense.compressible(config, priced_roles(config))
    return whole - priced + sum(candidate.params for candidate in taken.values())


def _by_loss(config: CompressionConfig) -> bool:
    return allocates_by_loss(replace(config, sparsity=0.5))


def _highest(dense: DenseModel, config: CompressionConfig) -> int:
    """Steps of sparsity up to the highest that leaves every rank and width at least 1."""
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _has_plan(dense, config, middle / STEPS) else (low, middle)
    return low


def _has_plan(dense: DenseModel, config: CompressionConfig, sparsity: float) -> bool:
    try:
        return plan_by_shape(dense, replace(config, sparsity=sparsity)) is not None
    except ConfigError:
        return False


def _impossible(dense: DenseModel, config: CompressionConfig, smallest: int) -> str:
    most = replace(config, weights="float", sparsity=0.0)
    ends = (smallest, _bytes_at(dense, most, 0.0))
    if config.size is not None:
        asked = f"size {config.size:,}"
        low, high = (f"{found + dense.other_bytes:,}" for found in ends)
        unit = f"bytes, {dense.other_bytes:,} of them of embeddings and other tensors that stay as they are"
    else:
        asked = f"bits_per_weight {config.bits_per_weight:g}"
        low, high = (f"{8 * found / dense.weights:.4g}" for found in ends)
        unit = "bits for each weight of the dense decoder layers"
    return (
        f"{asked} cannot be reached: with {config.weights} weights and the smallest ranks and widths this model takes {low}, and "
        f"{high} as it is ({unit}); ask for more"
    )
