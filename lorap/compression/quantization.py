"""The weights of decoder layers in few bits, rounded in the metric of what reaches them: the stage after all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lorap.algorithms import trellis
from lorap.algorithms.rounding import Rounded, round_factors, round_weight
from lorap.algorithms.trellis import Codes, Trellis
from lorap.architectures import SHARED_INPUTS, known_architecture
from lorap.calibration.context import DecoderContext
from lorap.calibration.mixtures import Sources
from lorap.calibration.statistics import check_activations, merged
from lorap.calibration.stream import CalibrationStream, Probe
from lorap.checkpoint.build import bare_prefix, check_other_bits
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config, get_quantization_config, weights_of
from lorap.compression.windows import read_windows
from lorap.config import CompressionConfig
from lorap.errors import ArchitectureError, ConfigError, FactorizationError
from lorap.kernels import reference
from lorap.kernels.trellis import numbers
from lorap.nn import ops
from lorap.nn.linear import LowRankLinear, new_linear
from lorap.nn.low_rank_tensors import NAMED_GUARD
from lorap.nn.quantized import QuantizedLinear
from lorap.nn.trellis import layer_of
from lorap.system import Stopwatch, release_freed_memory
from lorap.weights import KINDS, TRELLIS, Coding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def round_layer(
    context: DecoderContext,
    index: int,
    stream: CalibrationStream | None,
    *,
    bits: Mapping[str, int],
    coding: Coding,
    group_size: int,
) -> None:
    """Every projection of one layer, in memory, in few bits; the stream stays before it.

    Args:
        context: the model, dense or compressed.
        index: of the layer.
        stream: the calibration windows behind the rounded layers before it; None rounds each number to the nearest.
        bits: of a number, by role.
        coding: what the numbers stand for.
        group_size: numbers of a row that share a scale.

    Raises:
        CalibrationError: an activation is NaN or infinite.
        FactorizationError: a weight is.
    """
    layer, architecture, processes = context.layers[index], context.architecture, context.processes
    moments = {} if stream is None else input_moments(context, index, stream)
    rounded = {}
    for role in processes.shard(architecture.roles(layer)):
        linear: Any = layer.get_submodule(architecture.projections[role])
        name = architecture.module_name(index, role)
        how = Rounding(coding, bits[role], group_size)
        rounded[role] = round_linear(linear, moments.get(role), how, name=name)
        release_freed_memory(rounded[role].in_features ** 2)  # type: ignore[operator]
    for sent in processes.all_gather({role: module.to("cpu") for role, module in rounded.items()}):
        for role, module in sent.items():
            layer.set_submodule(architecture.projections[role], module.to(context.device))


def input_moments(context: DecoderContext, index: int, stream: CalibrationStream) -> Mapping[str, Tensor]:
    """By role, (K, K) second moment of its inputs."""
    layer, projections = context.layers[index], context.architecture.projections
    probes = {
        name: Probe(layer.get_submodule(projections[readers[0]]), moments=True)
        for name, readers in SHARED_INPUTS.items()
        if readers[0] in context.architecture.roles(layer)
    }
    found = stream.observe(index, layer, probes)
    check_activations(found, index)
    moments = {name: merged(folds).second_moment for name, folds in found.items()}
    return {role: moment for name, moment in moments.items() for role in SHARED_INPUTS[name]}


@dataclass(frozen=True)
class Rounding:
    """How a weight is rounded.

    Args:
        coding: what its numbers stand for.
        bits: of a number.
        group_size: numbers of a row that share a scale.
    """

    coding: Coding
    bits: int
    group_size: int

    def weight(self, weight: Tensor, moment: Tensor | None, dtype: torch.dtype) -> Rounded | Codes:
        """A weight (N, K) for inputs of a second moment (K, K), or None; its scales in ``dtype``."""
        group = min(self.group_size, weight.shape[1])  # room is made for whole groups
        options: dict[str, Any] = {"bits": self.bits, "group": group, "scale_dtype": dtype}
        if self.coding is TRELLIS:
            codes = Trellis(ops.trellis_search, numbers(weight.device))
            return trellis.round_weight(weight, moment, trellis=codes, **options)
        return round_weight(weight, moment, **options)

    def packed(self, found: Rounded | Codes, bias: nn.Parameter | None) -> QuantizedLinear:
        """The layer of a rounded weight."""
        stored = found.windows if isinstance(found, Codes) else found.numbers
        kind = layer_of(self.coding)
        return kind.from_numbers(stored, found.scales, bits=self.bits, group_size=self.group_size, bias=bias)


@torch.no_grad()
def round_linear(
    linear: LowRankLinear | nn.Linear, moment: Tensor | None, rounding: Rounding, *, name: str
) -> LowRankLinear | QuantizedLinear:
    """A linear layer, dense or low-rank, in few bits.

    A pivoted pair stays one in 8 bits. In fewer its coefficients are too coarse (in 4 the loss of SmolLM2-135M rose by 1.69
    nats, that of the same pairs as plain factors by 0.10), so it becomes plain factors, or dense where these would be larger.

    Args:
        linear: an ``nn.Linear`` or a :class:`LowRankLinear`.
        moment: (in_features, in_features) second moment of its inputs, or None.
        rounding: how.
        name: of the layer, for messages.
    """
    weights = [linear.right.weight, linear.left.weight] if isinstance(linear, LowRankLinear) else [linear.weight]
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise FactorizationError(f"a weight of {name} is NaN or infinite; check the model")
    if not isinstance(linear, LowRankLinear):
        found = rounding.weight(linear.weight.float(), moment, linear.weight.dtype)
        return rounding.packed(found, linear.bias).train(linear.training)
    if linear.pivot_rows is not None and rounding.bits < 8:
        return round_linear(as_factors(linear), moment, rounding, name=name)
    dtype = linear.right.weight.dtype
    left, right = linear.left.weight.float(), linear.right.weight.float()
    if linear.pivot_rows is None:
        rounded_left, rounded_right = round_factors(
            left, right, moment, lambda weight, metric: rounding.weight(weight, metric, dtype)
        )
    else:
        rounded_right = rounding.weight(right, moment, dtype)
        stored = rounded_right.weight(torch.float64)
        inner = None if moment is None else stored @ moment.double() @ stored.T
        rounded_left = rounding.weight(left, inner, dtype)
    linear.left = rounding.packed(rounded_left, linear.left.bias)  # type: ignore[assignment, arg-type]
    linear.right = rounding.packed(rounded_right, None)  # type: ignore[assignment]
    return linear


def as_factors(pair: LowRankLinear) -> LowRankLinear | nn.Linear:
    """A pivoted pair as plain factors, or the dense matrix where these would be larger."""
    assert pair.pivot_rows is not None
    right, left = pair.right.weight.data, pair.left.weight.data
    bias = None if pair.bias is None else pair.bias.data
    if pair.rank * (pair.in_features + pair.out_features) >= pair.in_features * pair.out_features:
        return new_linear(pair.reconstruct(dtype=torch.float32).to(right.dtype), bias).train(pair.training)
    rows = torch.cat((torch.eye(pair.rank, dtype=left.dtype, device=left.device), left))
    left = rows[reference.output_order(pair.pivot_rows, pair.out_features)]
    plain = LowRankLinear.from_factors(left, right, bias).train(pair.training)
    plain.put_named_guard(getattr(pair, NAMED_GUARD) is not None)
    return plain


def _unpivot(layer: nn.Module) -> None:
    pairs = {name: part for name, part in layer.named_modules() if isinstance(part, LowRankLinear)}
    for name, pair in pairs.items():
        if pair.pivot_rows is not None:
            layer.set_submodule(name, as_factors(pair))


def quantize(
    model: Model,
    weights: Literal["int8", "int4", "tcq6", "tcq5", "tcq4", "tcq3", "tcq2"],
    *,
    group_size: int | None = None,
    other_bits: Mapping[str, int] | None = None,
    calibration: Sources | None = None,
    tokenizer: Any = None,
) -> Model:
    """Weights of 8 or fewer bits for every linear layer of the decoder: factors, dense projections and FFNs.

    Weight-only, one scale for ``group_size`` weights of a row. Embeddings and the output head stay as they are.
    ``save_pretrained`` writes a checkpoint that ``from_pretrained`` opens again after ``import lorap``, with identical weights.
    Where any weights get fewer than 8 bits, all pivoted pairs become plain factors, or dense where these would be larger.

    Args:
        model: of transformers, dense or compressed, in memory; changed and returned.
        weights: ``int8`` or ``int4``, whole numbers; ``tcq6``, ``tcq5``, ``tcq4``, ``tcq3`` or ``tcq2``, codes on a trellis.
        group_size: a multiple of 32; None for 64, on the trellis 256.
        other_bits: 4 or 8, on the trellis 2 to 6, for each projection that gets other bits than ``weights`` says, by its name
            in the checkpoint, such as ``model.layers.0.mlp.down_proj``.
        calibration: as for :func:`lorap.compress`: weights are rounded such that the outputs change least on 128 windows of it
            (GPTQ, arXiv 2210.17323). None rounds to what is nearest, of factor pairs to their product, which takes no text.
        tokenizer: for calibration texts.

    Raises:
        ConfigError: another kind of weights, or a group size that is no multiple of 32.
        ArchitectureError: the family is unknown, or the weights are quantized already.
        CheckpointError: ``other_bits`` name no projection, or other bits than there are.
        CalibrationError: a source cannot be used.
    """
    config = CompressionConfig.from_recipe("lorap", weights=weights, group_size=group_size)
    if config.weights not in KINDS:
        raise ConfigError(f"weights float is what the model has; choose one of {', '.join(KINDS)}")
    coding, bits_of_most = KINDS[config.weights]
    architecture = known_architecture(model, to="quantize")
    compression = get_quantization_config(model) or LoRAPConfig()
    if (stored := weights_of(model)) != "float":
        raise ArchitectureError(f"the weights of this model are {stored} already")
    fields = LoRAPConfig(weights=config.weights, group_size=config.group, other_bits=dict(other_bits or {}))
    check_other_bits(model, fields)
    layers = tuple(architecture.decoder_layers(model))
    context = DecoderContext(model.eval(), architecture, layers, next(model.parameters()).device)
    stream = None
    if calibration is not None:
        windows = read_windows(context, tokenizer, config, calibration, (), Stopwatch()).calibration
        stream = CalibrationStream.from_windows(context, windows)
    for index, layer in enumerate(layers):
        names = {role: bare_prefix(model) + architecture.module_name(index, role) for role in architecture.roles(layer)}
        bits = {role: fields.bits_of(name) or bits_of_most for role, name in names.items()}
        if fields.other_bits:  # one kind of storage for all pairs
            _unpivot(layer)
        round_layer(context, index, stream, bits=bits, coding=coding, group_size=config.group)
        if stream is not None:
            stream.advance(index, layer)
    _attach(model, compression, fields)
    return model


def quantize_int8(model: Model) -> Model:
    """The older name of ``quantize(model, "int8")``."""
    return quantize(model, "int8")


def _attach(model: PreTrainedModel, compression: LoRAPConfig, fields: LoRAPConfig) -> None:
    """Say in the config of ``model`` how its weights are stored, and which pairs there still are."""
    pairs = {name: part for name, part in model.named_modules() if isinstance(part, LowRankLinear)}
    prefix = bare_prefix(model)
    stored = {
        "ranks": {prefix + name: pair.rank for name, pair in pairs.items()},
        "storage": "pivoted" if any(pair.pivot_rows is not None for pair in pairs.values()) else "factors",
        "weights": fields.weights,
        "group_size": fields.group_size,
        "other_bits": fields.other_bits,
        "format_version": None,
    }
    attach_quantization_config(model, LoRAPConfig(**(compression.to_dict() | stored)))
