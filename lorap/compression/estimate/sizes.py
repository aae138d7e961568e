"""What is left of a model: ranks, widths, parameters and bytes, before anything is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from lorap.architectures import MLP
from lorap.compression.allocation import LayerPlan, plan_layer
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.planning import channels_to_drop, check_sizes, plan_by_shape
from lorap.config import CompressionConfig
from lorap.nn.low_rank_tensors import INDEX_ITEMSIZE, LEFT, RIGHT, LowRankTensors
from lorap.requirements import compressed_roles


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
    index_bytes = 0
    for role, (out_features, in_features) in shape.projections.items():
        extra = 0  # bytes that are no parameters
        if role in layer.ranks:
            stored = LowRankTensors(out_features, in_features, layer.ranks[role], pivoted=config.storage == "pivoted")
            count = stored.factor_params
            matrices = [stored.shapes()[name] for name in (RIGHT, LEFT)]
            extra = stored.index_bytes + len(stored.guards) * shape.itemsize
            index_bytes += shape.num_layers * stored.index_bytes
        else:
            count = layer.intermediate_size * shape.hidden_size if role in MLP else out_features * in_features
            outputs = layer.intermediate_size if role in MLP[:2] else out_features
            matrices = [(outputs, count // outputs)]
        params[role] = shape.num_layers * (count + _bias_after(shape, config, layer, role))
        nbytes[role] = params[role] * shape.itemsize + shape.num_layers * (
            extra - _saved_by_rounding(matrices, shape, config)
        )
    projected = shape.num_layers * sum(prod(shape.projections[role]) for role in compressed_roles(config))
    budget = int((1 - config.sparsity) * projected)
    return Sizes(layer, decided_by, budget, params, index_bytes, nbytes)


def _saved_by_rounding(matrices: Sequence[tuple[int, ...]], shape: ModelShape, config: CompressionConfig) -> int:
    """Bytes that matrices (rows, columns) take less in few bits, with scales, shape and guard (lorap/nn/quantized.py)."""
    if config.bits is None:
        return 0
    saved = 0
    for rows, columns in matrices:
        packed = rows * (4 * -(-columns * config.bits // 32) + shape.itemsize * -(-columns // config.group_size))
        saved += rows * columns * shape.itemsize - packed - 2 * INDEX_ITEMSIZE - shape.itemsize
    return saved


def _planned_layer(shape: ModelShape, config: CompressionConfig) -> tuple[LayerPlan, str]:
    layers = [shape.projections] * shape.num_layers
    if config.sparsity == 0:
        return LayerPlan(ranks={}, intermediate_size=shape.width), ""
    check_sizes(shape.config, layers, config)
    if config.allocation == "flap":
        width = shape.width - round(channels_to_drop(config, layers) / shape.num_layers)
        return LayerPlan(ranks={}, intermediate_size=width), "one threshold on the channel scores of all layers"
    by_shape = plan_by_shape(shape.config, layers, config)
    if by_shape is not None:
        return by_shape[0], ""
    return plan_layer(shape.projections, replace(config, allocation="even")), "the loss, by a backward pass"


def _bias_after(shape: ModelShape, config: CompressionConfig, layer: LayerPlan, role: str) -> int:
    pruned = layer.intermediate_size < shape.width
    out_features = shape.projections[role][0]
    if role == "down_proj" and config.bias_compensation and pruned:
        return out_features
    if role not in shape.biases:
        return 0
    return layer.intermediate_size if role in MLP[:2] else out_features
