"""A budget of bytes, before any weight is read: how many bits the weights get, and how much sparsity that leaves to find.

Bits go first. On SmolLM2-135M 4 bits add 0.10 nats to the dense model, and a sparsity of 0.2 adds 0.32 in 16 bits, which is three
times the size (docs/results.md). So weights have the most bits with which the model fits whole; where not even the fewest do,
sparsity gives the rest. Between 4 and 8 bits whole both are mixed: what 4 bits leave over goes to those matrices where 8 help
most for their bytes (:mod:`lorap.compression.prices`). Below 4 bits whole all have 4; the
loss decides on bits with ranks and widths only where ``mixed`` is asked for (3.5 bits: 0.476 nats, with 4 for all 0.401).
Nothing lies between 8 bits and floating point. The result is never larger than asked for, and without sparsity it is
quantization and nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lorap.architectures import MLP
from lorap.checkpoint.quantization_fields import PACKED_BITS
from lorap.compression.planning import broken_groups, check_experts, plan_by_shape
from lorap.compression.prices import Prices
from lorap.compression.stored_bytes import DenseModel, Storage
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.requirements import allocates_by_loss, compressed_roles, priced_roles

# Sparsity is searched for in steps of one in so many.
STEPS = 2**20


def resolve_budget(dense: DenseModel, config: CompressionConfig) -> CompressionConfig:
    """``config`` with the weights and the sparsity that follow from its budget of bytes; as it is, where it has none.

    Args:
        dense: the model.
        config: what is asked for; its sparsity is the least to remove.

    Raises:
        ConfigError: no choice is so small; the message says what is.
    """
    if not config.has_byte_budget:
        return config
    check_experts(dense, config)
    budget = dense.projection_budget(config)
    choices = weights_to_try(config)
    for chosen in choices:
        left = budget - _bytes_at(dense, chosen, chosen.sparsity)
        if left >= 0 and (len(choices) == 1 or broken_groups(dense, chosen) is None):
            useful = _by_loss(config) if chosen.sparsity else left >= _smallest_step(dense, chosen)
            return replace(chosen, weights="mixed") if useful and _mixes(config, chosen) else chosen
    pruned = [chosen for chosen in choices if broken_groups(dense, replace(chosen, sparsity=0.5)) is None]
    chosen = (pruned or choices)[-1]
    if config.weights == "mixed" and _by_loss(config):
        chosen = replace(chosen, weights="mixed")
    return _with_sparsity(dense, chosen, budget)


def weights_to_try(config: CompressionConfig) -> list[CompressionConfig]:
    """``config`` with each kind of weights that it may get, the most bits first."""
    if config.weights == "mixed":
        return [replace(config, weights="int4")]
    if config.weights != "auto":
        return [config]
    kinds: tuple[Literal["float", "int8", "int4"], ...] = ("float", "int8", "int4")
    if config.storage == "pivoted":  # 4 bits are too few for its coefficients
        kinds = kinds[:2]
    return [replace(config, weights=kind) for kind in kinds]


def _mixes(config: CompressionConfig, chosen: CompressionConfig) -> bool:
    """Whether some of what would be 4 bits whole may be 8: where asked for, or no sparsity is, and lorap opens the folder."""
    if chosen.weights != "int4" or config.target == "stock" or config.storage != "factors":
        return False
    return config.weights == "mixed" or (config.weights == "auto" and config.sparsity == 0)


def _smallest_step(dense: DenseModel, config: CompressionConfig) -> int:
    """Bytes that 8 bits take more than 4 in the matrix, or gate and up together, where these are fewest."""
    few, more = (Storage(dense.itemsize, bits, config.group_size, False, True) for bits in PACKED_BITS.values())
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
