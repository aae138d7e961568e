"""What a config asks for: which projections are compressed, and which statistics that takes."""

from __future__ import annotations

from lorap.architectures import ATTENTION, MLP, PROJECTIONS
from lorap.config import CompressionConfig

# An expert is judged by what it read only if it read so many tokens of each fold of the calibration text, and else by all tokens
# of its layer. A mixture of 8 experts of 192 channels, trained for a minute on bytes, 30 % of the channels removed: on tokens of
# an expert from other texts its outputs are then off by 0.053 with recipe `lorap`, by weights alone 0.064, 8 tokens
# of its own 0.049; with the refit of `best` by 0.006, weights alone 0.063, 8 tokens 0.025, 32 tokens 0.011, 128 tokens 0.007.
FEW_TOKENS = 8


def compressed_roles(config: CompressionConfig) -> tuple[str, ...]:
    """The projections of the sub-layers that a config compresses."""
    attention = ATTENTION if "self_attn" in config.sublayers else ()
    return attention + (MLP if "mlp" in config.sublayers else ())


def allocates_by_loss(config: CompressionConfig) -> bool:
    """Whether the loss decides on ranks and widths."""
    return config.sparsity > 0 and config.allocation == "loss" and config.target != "stock"


def mixes_by_loss(config: CompressionConfig) -> bool:
    """Whether the loss decides which matrices get more bits, and which fewer."""
    return config.is_mixed and config.allocation == "loss"


def priced_roles(config: CompressionConfig) -> tuple[str, ...]:
    """The projections that share a budget: those that are compressed, and where bits are mixed all."""
    return PROJECTIONS if config.is_mixed else compressed_roles(config)


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
