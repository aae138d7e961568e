"""What is left of a model: ranks, widths, parameters and bytes, before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from lorap.compression.allocation import LayerPlan, plan_layer
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.planning import channels_to_drop, check_sizes, plan_by_shape
from lorap.compression.stored_bytes import Storage, gains_bias, role_bytes, shape_after
from lorap.config import CompressionConfig
from lorap.nn.low_rank_tensors import LowRankTensors
from lorap.requirements import compressed_roles, mixes_by_loss


@dataclass(frozen=True)
class Sizes:
    """The compressed model.

    Args:
        layer: what becomes of each decoder layer.
        decided_by: empty where ranks and width follow from shapes and are exact; else what will decide on them, while ``layer``
            is an even split.
        budget: parameters of the compressed sub-layers' matrices that stay at most.
        params: by kind, of the whole model.
        index_bytes: of row numbers, which are no parameters.
        nbytes: by kind, as saved, index and guards included.
    """

    layer: LayerPlan
    decided_by: str
    budget: int
    params: Mapping[str, int]
    index_bytes: int
    nbytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.params.values())


def planned_sizes(shape: ModelShape, config: CompressionConfig) -> Sizes:
    """What ``lorap compress`` will leave of a model.

    Raises:
        ConfigError: the sparsity leaves too little.
    """
    layer, decided_by = _planned_layer(shape, config)
    params = dict(shape.params)
    nbytes = {kind: count * shape.itemsize for kind, count in params.items()}
    index_bytes, storage = 0, Storage.of(config, shape.itemsize)
    for role in shape.projections:
        out_features, in_features = shape_after(role, shape.projections, layer)
        matrices = shape.num_layers * shape.per_layer(role)
        count = out_features * in_features
        if role in layer.ranks:
            stored = LowRankTensors(out_features, in_features, layer.ranks[role], pivoted=config.storage == "pivoted")
            count = stored.factor_params
            index_bytes += shape.num_layers * stored.index_bytes
        has_bias = role in shape.biases or gains_bias(role, shape.projections, layer, config)
        params[role] = matrices * (count + has_bias * out_features)
        nbytes[role] = matrices * role_bytes(role, shape.projections, layer, shape.biases, storage, config)
    if config.weights == "mixed" and config.sparsity == 0:
        nbytes |= _filled(shape, config, {role: nbytes[role] for role in shape.projections})
    projected = shape.num_layers * sum(
        shape.per_layer(role) * prod(shape.projections[role]) for role in compressed_roles(config)
    )
    budget = int((1 - config.sparsity) * projected)
    return Sizes(layer, decided_by, budget, params, index_bytes, nbytes)


def _filled(shape: ModelShape, config: CompressionConfig, few: Mapping[str, int]) -> dict[str, int]:
    """Bytes by role once what 4 bits leave of the budget is spent evenly.

    Args:
        shape: of the dense model.
        config: with mixed bits and without sparsity.
        few: bytes by role with 4 bits.
    """
    whole = replace(config, weights="int8")
    room = shape.dense.projection_budget(config) - sum(few.values())
    share = min(1.0, room / (shape.dense.planned(shape.dense.unchanged(), whole) - sum(few.values())))
    storage = Storage.of(whole, shape.itemsize)
    layer = LayerPlan(ranks={}, intermediate_size=shape.width)
    more = {
        role: shape.num_layers * role_bytes(role, shape.projections, layer, shape.biases, storage, whole)
        for role in few
    }
    return {role: count + int(share * (more[role] - count)) for role, count in few.items()}


def _planned_layer(shape: ModelShape, config: CompressionConfig) -> tuple[LayerPlan, str]:
    check_sizes(shape.dense, config)
    if config.sparsity == 0:
        mixed = (
            "the loss, by a backward pass"
            if mixes_by_loss(config)
            else "how large rounding errors are beside the weights"
        )
        return LayerPlan(ranks={}, intermediate_size=shape.width), mixed if config.weights == "mixed" else ""
    if config.allocation == "flap":
        width = shape.width - round(channels_to_drop(config, shape.dense.shapes) / shape.num_layers)
        return LayerPlan(ranks={}, intermediate_size=width), "one threshold on the channel scores of all layers"
    by_shape = plan_by_shape(shape.dense, config)
    if by_shape is not None:
        return by_shape[0], ""
    even = plan_layer(shape.projections, replace(config, allocation="even"), packed=shape.dense.packed)
    return even, "the loss, by a backward pass"
