"""What a compressed model says of itself in its config, so that it saves as a checkpoint that opens again."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lorap.architectures import text_config
from lorap.calibration.context import DecoderContext
from lorap.checkpoint.compressed_tensors import attach_compressed_tensors
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config
from lorap.compression.allocation import LayerPlan
from lorap.config import CompressionConfig
from lorap.version import __version__
from lorap.weights import coding_of

_logger = logging.getLogger(__name__)


def describe_in_config(
    context: DecoderContext, plans: Sequence[LayerPlan], config: CompressionConfig, *, dense_widths: Sequence[int]
) -> None:
    """Write the new shapes into the model's config: of a lorap checkpoint, or of a stock one.

    Args:
        context: the compressed model.
        plans: one per decoder layer.
        config: what was done.
        dense_widths: of each layer's FFN, before.
    """
    model, architecture = context.model, context.architecture
    ranks = {
        architecture.module_name(index, role): rank
        for index, plan in enumerate(plans)
        for role, rank in plan.ranks.items()
    }
    widths = [plan.intermediate_size for plan in plans]
    text = text_config(model.config)
    biases = _new_biases(context, config)
    # A host without lorap would leave the added biases out and only warn; at widths unlike the config's it refuses.
    uniform = len(set(widths)) == 1 and not biases and _has_one_width(context, dense_widths)
    if uniform:
        setattr(text, architecture.width_field, widths[0])
    sizes = {architecture.ffn_name(i, context.layers[i]): width for i, width in enumerate(widths)}
    # What a family stores as one matrix is stored in parts now, which no host but lorap looks for.
    split = bool(architecture.fused)
    changed = split or ranks or widths != [*dense_widths] or config.bits is not None
    if split:
        matrices = " and ".join(f"{whole} as {', '.join(parts)}" for whole, parts in architecture.fused.values())
        _logger.info(
            "%s: so they are stored, for lorap to open; `lorap export --format stock` joins them again", matrices
        )
    if config.target == "stock" and config.bits is not None:
        attach_compressed_tensors(model, bits=config.bits, group_size=config.group)
    elif config.target != "stock" and changed:
        weights, other_bits = _bits(context, plans, config)
        shapes = LoRAPConfig(
            ranks=ranks,
            intermediate_sizes={} if uniform and not split else sizes,
            dense_intermediate_size=dense_widths[0] if len(set(dense_widths)) == 1 else None,
            storage=config.storage if ranks else "factors",
            biases=biases,
            weights=weights,
            other_bits=other_bits,
            group_size=None if config.bits is None else config.group,
            sparsity=config.sparsity,
            recipe=config.recipe,
            lorap_version=__version__,
        )
        attach_quantization_config(model, shapes)


def _has_one_width(context: DecoderContext, dense_widths: Sequence[int]) -> bool:
    """Whether the field of the config with the width of FFNs, or experts, is that of all layers and of nothing else."""
    architecture = context.architecture
    if architecture.packed and (architecture.packed.shares_width or not all(map(architecture.experts, context.layers))):
        return False
    return len(set(dense_widths)) == 1


def _bits(context: DecoderContext, plans: Sequence[LayerPlan], config: CompressionConfig) -> tuple[str, dict[str, int]]:
    """How weights are stored, and the bits of each projection that is stored otherwise."""
    coding = coding_of(config.weights)
    if not config.is_mixed or coding is None:
        return config.weights, {}
    assert config.bits is not None
    architecture = context.architecture
    bits = {
        architecture.module_name(index, role): plan.bits.get(role, config.bits)
        for index, (layer, plan) in enumerate(zip(context.layers, plans, strict=True))
        for role in architecture.roles(layer)
    }
    fewest = min(bits.values())
    return coding.kind(fewest), {name: each for name, each in bits.items() if each != fewest}


def _new_biases(context: DecoderContext, config: CompressionConfig) -> list[str]:
    """Down projections that gained a bias which the model's own config does not know."""
    model = context.model
    if not config.bias_compensation or getattr(text_config(model.config), "mlp_bias", False):
        return []
    names = [context.architecture.module_name(index, "down_proj") for index in range(len(context.layers))]
    return [name for name in names if model.get_submodule(name).bias is not None]
