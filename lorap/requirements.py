"""What a config asks for: which projections are compressed, and which statistics that takes."""

from __future__ import annotations

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.config import CompressionConfig

# An expert is pruned and refitted by what it read only if it read so many tokens of each fold of the calibration text. Two FFNs
# of SmolLM2-135M as if they were experts, 30 % of the channels removed: chosen by weights alone, outputs on another text are off
# by 0.50 and 0.56, by the activations of 2 tokens by 0.46 and 0.50, of 8 by 0.43 and 0.45, of 128 by 0.41 and 0.37; refitted they
# are never further off. Eight leave a margin, since tokens of one expert are more alike.
FEW_TOKENS = 8


def compressed_roles(config: CompressionConfig) -> tuple[str, ...]:
    """The projections of the sub-layers that a config compresses."""
    attention = ATTENTION if "self_attn" in config.sublayers else ()
    return attention + (MLP if "mlp" in config.sublayers else ())


def allocates_by_loss(config: CompressionConfig) -> bool:
    """Whether the loss decides on ranks and widths."""
    return config.sparsity > 0 and config.allocation == "loss" and config.target != "stock"


def mixes_by_loss(config: CompressionConfig) -> bool:
    """Whether the loss decides which matrices get 8 bits, and which 4."""
    return config.weights == "mixed" and config.allocation == "loss"


def priced_roles(config: CompressionConfig) -> tuple[str, ...]:
    """The projections that share a budget: those that are compressed, and where bits are mixed all."""
    return PROJECTIONS if config.weights == "mixed" else compressed_roles(config)


def roles_needing_gradients(config: CompressionConfig) -> tuple[str, ...]:
    """Projections whose outputs a backward pass is asked about: to price sizes, or to weigh errors."""
    if mixes_by_loss(config):
        return PROJECTIONS
    if allocates_by_loss(config):
        return tuple(role for role in (*ATTENTION, "down_proj") if role in compressed_roles(config))
    return roles_with_output_metric(config)


def roles_with_output_metric(config: CompressionConfig) -> tuple[str, ...]:
    """Projections that are compressed with a metric of their outputs: low-rank ones, and a down_proj that scores channels."""
    if config.sparsity == 0 or config.output_weighting == "none" or config.allocation == "flap":
        return ()
    roles = () if config.target == "stock" else ATTENTION
    if config.mlp_method == "factorize" or config.channel_score == "output":
        roles = (*roles, "down_proj")
    return tuple(role for role in roles if role in compressed_roles(config))


def has_anchor(config: CompressionConfig) -> bool:
    """Whether factor pairs are fitted to what the dense model has in their place, which takes a second stream."""
    has_pairs = config.target != "stock" and (config.allocation != "flap" or config.mlp_method == "factorize")
    return config.anchor == "dense" and config.sparsity > 0 and has_pairs


def needs_folds(config: CompressionConfig) -> bool:
    """Whether anything is to be judged on another half of the calibration text than it was fitted on."""
    fitted = config.attention_method == "second_moment" or (config.mlp_method == "prune" and config.repair)
    return fitted and "auto" in (config.metric_shrinkage, config.repair_ridge)


def sums_of(config: CompressionConfig, name: str) -> tuple[bool, bool]:
    """Whether x, and whether x x^T, of an input of :data:`SHARED_INPUTS` is summed up beside its channel norms."""
    if name.startswith("mlp") and config.mlp_method == "prune":
        inner = name == "mlp_inner"
        return inner and (config.bias_compensation or config.channel_score == "fluctuation"), inner and config.repair
    method = config.attention_method
    return method == "afm", method in ("afm", "second_moment")
