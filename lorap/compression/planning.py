"""Ranks and widths of all layers before the first one is touched.

``paper`` and ``even`` follow from shapes alone. ``loss`` prices every size of every matrix by the increase of the loss to expect
(:mod:`lorap.calibration.sensitivity`) and lets all of them share one budget (:mod:`lorap.compression.budget`). ``flap`` cuts
the channels of all FFNs at one score. For target ``stock`` there is nothing to choose: attention stays dense, and one width
does it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorap.algorithms.refit import fluctuation_scores
from lorap.architectures import ARCHITECTURES, MLP, PROJECTIONS, text_config
from lorap.calibration.context import DecoderContext
from lorap.calibration.sensitivity import DIAGONAL, Sensitivity, layer_sensitivities
from lorap.calibration.stream import CalibrationStream, Probe
from lorap.calibration.windows import TokenWindows
from lorap.compression.allocation import LayerPlan, Shape, plan_layer, stock_width
from lorap.compression.budget import stock_multiple
from lorap.compression.prices import Prices
from lorap.compression.shrinkage import output_metric
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.errors import CalibrationError, ConfigError
from lorap.requirements import (
    compressed_roles,
    mixes_by_loss,
    roles_needing_gradients,
    roles_with_output_metric,
)
from lorap.system import release_freed_memory

Key = tuple[int, str]  # (layer index, role); the FFN of a layer goes by the name of its down projection

# An eighth of the default calibration text is enough to price errors: 4,096 tokens gave the same result within 1.5 % at
# sparsity 0.5 (docs/recipes.md), and the backward pass costs three forward passes.
SENSITIVITY_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer, and how errors are to be weighed.

    Args:
        layers: one per decoder layer.
        output_metrics: by layer and role, (out_features, out_features) float32; empty where outputs are not weighed.
    """

    layers: Sequence[LayerPlan]
    output_metrics: MutableMapping[Key, Tensor] = field(default_factory=dict)

    def metrics_of(self, index: int) -> Mapping[str, Tensor]:
        """The metrics of one layer, by role; each is fetched when it is asked for."""
        return _OneLayer(self.output_metrics, index)


class _OneLayer(Mapping[str, Tensor]):
    def __init__(self, metrics: Mapping[Key, Tensor], index: int) -> None:
        self.metrics, self.index = metrics, index

    def __getitem__(self, role: str) -> Tensor:
        return self.metrics[self.index, role]

    def __iter__(self) -> Iterator[str]:
        return (role for index, role in self.metrics if index == self.index)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def make_plan(
    context: DecoderContext,
    windows: TokenWindows,
    config: CompressionConfig,
    *,
    output_metrics: MutableMapping[Key, Tensor] | None = None,
) -> Plan:
    """Ranks and widths for ``config``; reads the model and changes nothing.

    Args:
        context: the dense model; its processes share the windows, and the prices of a layer's matrices.
        windows: to calibrate on.
        config: what to do.
        output_metrics: takes the metrics of the outputs; a dictionary by default.

    Raises:
        ConfigError: the sparsity leaves too little.
        CalibrationError: the gradients or activations are not finite.
    """
    model, layers, architecture, processes = context.model, context.layers, context.architecture, context.processes
    dense = DenseModel.of(model, architecture)
    if config.allocation == "flap" and config.sparsity > 0:
        return Plan(_flap_widths(context, windows, config, dense.shapes))
    by_shape, roles = plan_by_shape(dense, config), roles_needing_gradients(config)
    weighed = roles_with_output_metric(config)
    prices = Prices(config, dense)
    if config.is_mixed and not mixes_by_loss(config):
        return Plan(_mixed_unseen(context, prices))
    if not roles:
        return Plan(by_shape or dense.unchanged())
    metrics: MutableMapping[Key, Tensor] = {} if output_metrics is None else output_metrics
    sampled = spread_sample(windows, SENSITIVITY_TOKENS)

    def projections(layer: nn.Module) -> dict[str, nn.Linear]:
        experts = architecture.experts(layer)
        found = architecture.linears(layer) | ({"down_proj": experts.module} if experts else {})
        return {role: linear for role, linear in found.items() if role in roles}

    walk = layer_sensitivities(context, sampled, projections, diagonal=DIAGONAL)
    with closing(walk):
        for index, found in walk:
            linears, mine = architecture.linears(layers[index]), processes.shard(list(found))
            release_freed_memory(max((linear.weight.numel() for linear in linears.values()), default=0))
            for role, sensitivity in found.items():
                _check_gradients(sensitivity, architecture.module_name(index, role), model.dtype)
            for role in sorted(found, key=PROJECTIONS.index):  # the largest last, when the others are gone
                sensitivity = found.pop(role)
                metric = sensitivity.output if role in DIAGONAL else output_metric(sensitivity.output)
                if by_shape is None and sensitivity.routed is not None:
                    prices.add_experts(index, sensitivity, metric)
                elif by_shape is None and ("down_proj" if role in DIAGONAL else role) in mine:
                    prices.add(index, role, linears[role].weight.data, sensitivity, metric)
                if role in weighed:
                    metrics[index, role] = metric
                del sensitivity, metric
                release_freed_memory(math.prod(dense.shapes[index][role]))
    return Plan(by_shape or prices.allocate(processes), metrics)


def _mixed_unseen(context: DecoderContext, prices: Prices) -> list[LayerPlan]:
    """Bits by the weights alone."""
    for index in context.processes.shard(range(len(context.layers))):
        with context.on_device(index):
            linears = context.architecture.linears(context.layers[index])
            prices.add_unseen(index, {role: linear.weight.data for role, linear in linears.items()})
    return prices.allocate(context.processes)


def check_sizes(dense: DenseModel, config: CompressionConfig) -> None:
    """Refuse, before a weight or a text is read, a sparsity that no choice of ranks and widths can reach.

    Args:
        dense: the model.
        config: what is asked for.

    Raises:
        ConfigError: the sparsity leaves too little; or rows are no whole groups, where a host without lorap wants them.
    """
    check_experts(dense, config)
    _check_groups(dense, config)
    if config.sparsity == 0 or plan_by_shape(dense, config) is not None:
        return
    if config.allocation == "flap":
        _check_drop(channels_to_drop(config, dense.shapes), [shape["gate_proj"][0] for shape in dense.shapes])
    else:
        Prices(config, dense).check_budget()


def check_experts(dense: DenseModel, config: CompressionConfig) -> None:
    """Refuse what cannot be done to mixtures of experts.

    Raises:
        ConfigError: naming the option and what to choose.
    """
    if not dense.packed:
        return
    wrong = {
        "size": (config.size is not None, "a sparsity"),
        "bits_per_weight": (config.bits_per_weight is not None, "a sparsity"),
        f"weights {config.weights}": (config.weights != "float", "weights float"),
        "target stock": (config.target == "stock", "target lorap"),
        f"mlp_method {config.mlp_method}": (config.mlp_method != "prune", "mlp_method prune"),
        "bias_compensation": (config.bias_compensation, "no bias_compensation"),
        f"allocation {config.allocation}": (
            config.allocation == "flap",
            "allocation loss, even or paper",
        ),
    }
    for what, (asked, instead) in wrong.items():
        if asked:
            raise ConfigError(
                f"{what} cannot be had for the experts of a {dense.config.model_type} model; choose {instead}"
            )


def _check_gradients(sensitivity: Sensitivity, name: str, dtype: torch.dtype) -> None:
    if not torch.isfinite(sensitivity.output).all():
        raise CalibrationError(
            f"the gradients at {name} are not finite in {dtype}: try --dtype float32 or bfloat16, or do without them: "
            "--allocation even --output-weighting none"
        )


def broken_groups(dense: DenseModel, config: CompressionConfig) -> tuple[str, int] | None:
    """A projection whose inputs are no whole groups although its host takes no others, with their number; None where all fit.

    compressed-tensors works out the size of groups from their number, so that a last one with fewer weights changes all.
    """
    if config.target != "stock" or config.bits is None:
        return None
    return next(((role, count) for role, count in _inputs(dense, config) if count % config.group), None)


def _inputs(dense: DenseModel, config: CompressionConfig) -> list[tuple[str, int]]:
    """Projections with the number of their inputs, where no width is chosen for it."""
    roles = [role for role in PROJECTIONS if role != "down_proj" or config.sparsity == 0]
    return [(role, shapes[role][1]) for shapes in dense.shapes for role in roles if role in shapes]


def _check_groups(dense: DenseModel, config: CompressionConfig) -> None:
    if (broken := broken_groups(dense, config)) is None:
        return
    fitting = [size for size in range(32, 257, 32) if not any(count % size for _, count in _inputs(dense, config))]
    way_out = f"choose group_size {fitting[-1]}" if fitting else "use weights float"
    raise ConfigError(
        f"target stock stores {config.weights} weights in rows of whole groups, as compressed-tensors wants them, and the "
        f"{broken[1]:,} inputs of {broken[0]} are no multiple of group_size {config.group}; {way_out}, or target lorap"
    )


def plan_by_shape(dense: DenseModel, config: CompressionConfig) -> list[LayerPlan] | None:
    """The plan of each layer where it follows from shapes alone.

    Args:
        dense: the model.
        config: what is asked for.

    Returns:
        None where activations or the loss decide.

    Raises:
        ConfigError: the sparsity leaves too little, or a stock model of this family has no place for a bias.
    """
    shapes, model_config = dense.shapes, dense.config
    architecture = ARCHITECTURES.get(model_config.model_type)
    if config.target == "stock" and architecture is not None and architecture.fused:
        raise ConfigError(
            f"a {model_config.model_type} model of target stock would be written as lorap has split it, which no other host "
            "opens: compress with --sublayers mlp --shapes uniform, and then `lorap export --format stock` joins it again"
        )
    if config.sparsity > 0 and config.target == "stock":
        if config.bias_compensation and not getattr(text_config(model_config), "mlp_bias", False):
            raise ConfigError(
                f"bias_compensation gives down_proj a bias, and a stock {model_config.model_type} has biases in all three FFN "
                "projections or in none; leave it out for target stock"
            )
        roles = compressed_roles(config)
        odd = next((i for i, shape in enumerate(shapes) if "q_proj" in {*roles} - {*shape}), None)
        if odd is not None:
            raise ConfigError(
                f"target stock gives all FFNs one width, and layer {odd} of this {model_config.model_type} model has no "
                "attention that could be compressed, so that layers would lose different shares: compress the FFNs alone "
                "(sublayers mlp)"
            )
        odd = next(
            (i for i, shape in enumerate(shapes) if any(shape.get(r) != shapes[0].get(r) for r in (*roles, *MLP))), None
        )
        if odd is not None:
            raise ConfigError(
                f"target stock gives all FFNs one width, and the projections of layer {odd} of this {model_config.model_type} "
                "model have other shapes than those of layer 0; choose target lorap"
            )
        total = sum(_size(shapes[0][role]) for role in roles)
        hidden, dense_width = shapes[0]["down_proj"]
        asked = config.width_multiple
        multiple = stock_multiple(dense_width, 3 * hidden, total) if asked == "auto" else int(asked)
        if config.bits is not None:
            multiple = math.lcm(multiple, config.group)
        width = stock_width(shapes[0], config, multiple=multiple)
        return [LayerPlan(ranks={}, intermediate_size=width) for _ in shapes]
    if config.allocation in ("paper", "even"):
        return [plan_layer(shape, config, packed=packed) for shape, packed in zip(shapes, dense.mixtures, strict=True)]
    return None


def _flap_widths(
    context: DecoderContext, windows: TokenWindows, config: CompressionConfig, shapes: Sequence[Mapping[str, Shape]]
) -> list[LayerPlan]:
    """One threshold on the scores of all FFN channels, standardised within each layer (FLAP, section 4.2)."""
    stream = CalibrationStream.from_windows(context, windows)
    standardised = []
    for index, layer in enumerate(context.layers):
        down = context.architecture.linears(layer)["down_proj"]
        with context.on_device(index):
            (stats,) = stream.observe(index, layer, {"mlp_inner": Probe(down, mean=True)})["mlp_inner"]
            scores = fluctuation_scores(down.weight.data, stats.variance)
            stream.advance(index, layer)
        standardised.append(((scores - scores.mean()) / scores.std().clamp(min=torch.finfo(torch.float64).tiny)).cpu())
    kept = threshold_widths(standardised, channels_to_drop(config, shapes))
    return [LayerPlan(ranks={}, intermediate_size=width) for width in kept]


def channels_to_drop(config: CompressionConfig, shapes: Sequence[Mapping[str, Shape]]) -> int:
    """Attention stays dense, so the FFNs give up what all compressed sub-layers are to lose."""
    total = sum(_size(shape[role]) for shape in shapes for role in compressed_roles(config) if role in shape)
    return int(config.sparsity * total / sum(_size(shapes[0][role]) / shapes[0]["gate_proj"][0] for role in MLP))


def threshold_widths(scores: Sequence[Tensor], drop: int) -> list[int]:
    """Channels that stay in each layer when the ``drop`` lowest of all scores go; every layer keeps at least one.

    Raises:
        ConfigError: fewer channels than layers would stay.
    """
    protected = [layer.argmax() for layer in scores]
    _check_drop(drop, [len(layer) for layer in scores])
    flat = torch.cat(
        [layer.clone().index_fill(0, best, torch.inf) for layer, best in zip(scores, protected, strict=True)]
    )
    gone = torch.zeros_like(flat, dtype=torch.bool)
    gone[flat.argsort(stable=True)[:drop]] = True
    return [int((~part).sum()) for part in gone.split([len(layer) for layer in scores])]


def _check_drop(drop: int, widths: Sequence[int]) -> None:
    """Every layer keeps at least one channel."""
    if drop > sum(widths) - len(widths):
        raise ConfigError(
            f"{drop:,} of {sum(widths):,} FFN channels would have to go; lower the sparsity, or compress attention as well "
            "(another allocation)"
        )


def spread_sample(windows: TokenWindows, tokens: int) -> TokenWindows:
    """About ``tokens`` tokens of the windows, evenly spread over them, so that every source has its part."""
    count, seq_len = windows.input_ids.shape
    wanted = min(count, max(1, tokens // seq_len))
    return windows.rows(torch.linspace(0, count - 1, wanted).round().long())


def _size(shape: Shape) -> int:
    return shape[0] * shape[1]
