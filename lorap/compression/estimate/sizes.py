"""What is left of a model: ranks, widths, parameters and bytes, before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from lorap.architectures import PROJECTIONS
from lorap.compression.allocation import LayerPlan, plan_layer
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.planning import channels_to_drop, check_sizes, plan_by_shape
from lorap.compression.stored_bytes import Storage, gains_bias, role_bytes, shape_after
from lorap.config import CompressionConfig
from lorap.nn.low_rank_tensors import LowRankTensors
from lorap.requirements import compressed_roles, mixes_by_loss
from lorap.weights import MIXES


@dataclass(frozen=True)
class Sizes:
    """The compressed model.

    Args:
        layers: what becomes of each decoder layer, for each kind of layers.
        decided_by: empty where ranks and width follow from shapes and are exact; else what will decide on them, while ``layers``
            are an even split.
        budget: parameters of the compressed sub-layers' matrices that stay at most.
        params: by kind, of the whole model.
        index_bytes: of row numbers, which are no parameters.
        nbytes: by kind, as saved, index and guards included.
    """

    layers: tuple[LayerPlan, ...]
    decided_by: str
    budget: int
    params: Mapping[str, int]
    index_bytes: int
    nbytes: Mapping[str, int]

    @property
    def layer(self) -> LayerPlan:
        """What becomes of the first layer, and of all that are like it."""
        return self.layers[0]

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.params.values())


def planned_sizes(shape: ModelShape, config: CompressionConfig) -> Sizes:
    """What ``lorap compress`` will leave of a model.

    Raises:
        ConfigError: the sparsity leaves too little.
    """
    check_sizes(shape.dense, config)
    planned = [_planned_layer(kind, config) for kind in shape.of_each_kind]
    layers, decided_by = tuple(layer for layer, _ in planned), planned[0][1]
    params = dict(shape.params)
    nbytes = {kind: count * shape.itemsize for kind, count in params.items()}
    # Single numbers are stored and count as no parameters; some are kept in float32.
    nbytes["other"] = shape.dense.other_bytes - sum(
        nbytes[kind] for kind in nbytes if kind not in (*PROJECTIONS, "other")
    )
    params |= dict.fromkeys(PROJECTIONS & params.keys(), 0)
    nbytes |= dict.fromkeys(PROJECTIONS & params.keys(), 0)
    index_bytes = budget = 0
    for kind, layer in zip(shape.of_each_kind, layers, strict=True):
        for role in kind.projections:
            one = _matrix(kind, role, layer, config)
            params[role] += kind.num_layers * kind.per_layer(role) * one.params
            nbytes[role] += kind.num_layers * kind.per_layer(role) * one.nbytes
            index_bytes += kind.num_layers * one.index_bytes
            if role in compressed_roles(config):
                budget += kind.num_layers * kind.per_layer(role) * prod(kind.projections[role])
    if config.is_mixed and config.sparsity == 0:
        nbytes |= _filled(shape, config, {role: nbytes[role] for role in PROJECTIONS if role in nbytes})
    return Sizes(layers, decided_by, int((1 - config.sparsity) * budget), params, index_bytes, nbytes)


@dataclass(frozen=True)
class _Matrix:
    """What is left of one matrix."""

    params: int
    nbytes: int
    index_bytes: int = 0


def _matrix(kind: ModelShape, role: str, layer: LayerPlan, config: CompressionConfig) -> _Matrix:
    out_features, in_features = shape_after(role, kind.projections, layer)
    count, index_bytes = out_features * in_features, 0
    if role in layer.ranks:
        stored = LowRankTensors(out_features, in_features, layer.ranks[role], pivoted=config.storage == "pivoted")
        count, index_bytes = stored.factor_params, stored.index_bytes
    has_bias = role in kind.biases or gains_bias(role, kind.projections, layer, config)
    storage = Storage.of(config, kind.itemsize)
    nbytes = role_bytes(role, kind.projections, layer, kind.biases, storage, config)
    return _Matrix(count + has_bias * out_features, nbytes, index_bytes)


def _filled(shape: ModelShape, config: CompressionConfig, few: Mapping[str, int]) -> dict[str, int]:
    """Bytes by role once what the fewest bits leave of the budget is spent evenly.

    Args:
        shape: of the dense model.
        config: with mixed bits and without sparsity.
        few: bytes by role with the fewest bits.
    """
    coding = MIXES[config.weights]
    most: Any = coding.kind(max(coding.bits))
    whole = replace(config, weights=most)
    room = shape.dense.projection_budget(config) - sum(few.values())
    share = min(1.0, room / (shape.dense.planned(shape.dense.unchanged(), whole) - sum(few.values())))
    more = {
        role: sum(
            kind.num_layers * _matrix(kind, role, LayerPlan(ranks={}, intermediate_size=kind.width), whole).nbytes
            for kind in shape.of_each_kind
            if role in kind.projections
        )
        for role in few
    }
    return {role: count + int(share * (more[role] - count)) for role, count in few.items()}


def _planned_layer(shape: ModelShape, config: CompressionConfig) -> tuple[LayerPlan, str]:
    if config.sparsity == 0:
        mixed = (
            "the loss, by a backward pass"
            if mixes_by_loss(config)
            else "how large rounding errors are beside the weights"
        )
        return LayerPlan(ranks={}, intermediate_size=shape.width), mixed if config.is_mixed else ""
    if config.allocation == "flap":
        width = shape.width - round(channels_to_drop(config, shape.dense.shapes) / len(shape.dense.shapes))
        return LayerPlan(ranks={}, intermediate_size=width), "one threshold on the channel scores of all layers"
    by_shape = plan_by_shape(shape.dense, config)
    if by_shape is not None:
        return by_shape[shape.first], ""
    even = plan_layer(shape.projections, replace(config, allocation="even"), packed=shape.mixture)
    return even, "the loss, by a backward pass"
