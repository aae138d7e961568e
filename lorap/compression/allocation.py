"""Parameter budget to ranks and widths (paper, section 3.3: "parameter allocation").

Attention keeps ``kept = 1 - sparsity`` of its parameters, and {v, o} receive ``vo_to_qk_ratio`` parameters for each one that
{q, k} receive, because q and k are closer to low-rank. A group whose share reaches its dense size stays dense and leaves the
rest to the other. A factor pair of rank r costs ``r * (out + in)``, so the budget holds for every matrix by itself, also with
grouped-query attention, where k and v are narrower than q and o.

Other recipes use the same arithmetic with one share for every matrix (``even``), with pivoted storage, which affords a higher
rank for the same parameters, and with ranks and widths cut to multiples. Budgets over all layers are in
:mod:`lorap.compression.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorap.algorithms.pivoting import pivoted_rank
from lorap.architectures import ATTENTION, MLP
from lorap.architectures.experts import row_multiple
from lorap.config import CompressionConfig
from lorap.errors import ConfigError

Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one decoder layer.

    Args:
        ranks: rank of each projection that becomes a factor pair; a projection that is not named stays as it is.
        intermediate_size: FFN channels that stay.
        bits: 4 or 8 for each projection whose weights get other bits than the rest.
    """

    ranks: Mapping[str, int]
    intermediate_size: int
    bits: Mapping[str, int] = field(default_factory=dict)


def break_even_rank(shape: Shape) -> float:
    """The rank at which a factor pair is exactly as large as the dense matrix."""
    out_features, in_features = shape
    return out_features * in_features / (out_features + in_features)


def plan_layer(shapes: Mapping[str, Shape], config: CompressionConfig, *, packed: bool = False) -> LayerPlan:
    """Ranks and width of one decoder layer with the given shapes.

    Args:
        shapes: (out_features, in_features) by role.
        config: what is asked for.
        packed: the FFN is one of several experts, whose widths are multiples of :func:`row_multiple`.

    Raises:
        ConfigError: the sparsity is so high that a rank or the FFN width would be 0.
    """
    kept = 1 - config.sparsity
    ranks: dict[str, int] = {}
    width = shapes["gate_proj"][0]
    if config.sparsity == 0:
        # A break-even rank is rarely whole, and rounded down it would cost accuracy although nothing is to be removed.
        return LayerPlan(ranks={}, intermediate_size=width)
    if "self_attn" in config.sublayers and "q_proj" in shapes:
        attention = {role: shapes[role] for role in ATTENTION if role in shapes}
        if config.allocation == "even":
            ranks |= {role: int(kept * break_even_rank(shape)) for role, shape in attention.items()}
        else:
            ranks |= attention_ranks(attention, kept, config.vo_to_qk_ratio)
    if "mlp" in config.sublayers and config.mlp_method == "factorize":
        ranks |= {role: int(kept * break_even_rank(shapes[role])) for role in MLP}
    elif "mlp" in config.sublayers:
        start, stop = pruned_positions(width, config.sparsity, config.least_important_kept)
        multiple = config.width_multiple
        if packed:
            multiple = math.lcm(row_multiple(width), 1 if multiple == "auto" else int(multiple))
        width = _cut(width - (stop - start), multiple)
    # A pair that would not be smaller than the dense matrix is not worth its second matmul.
    ranks = {role: rank for role, rank in ranks.items() if rank < break_even_rank(shapes[role])}
    if config.storage == "pivoted":
        ranks = {role: pivoted_rank(shapes[role], rank / break_even_rank(shapes[role])) for role, rank in ranks.items()}
    ranks = {role: _cut(rank, config.rank_multiple) for role, rank in ranks.items()}
    for role, rank in ranks.items():
        if rank < 1:
            raise ConfigError(
                f"sparsity {config.sparsity} leaves rank {rank} for {role} of shape {shapes[role]}; lower the sparsity"
                + _or_multiple("rank_multiple", config.rank_multiple)
            )
    if width < 1:
        raise ConfigError(
            f"sparsity {config.sparsity} leaves {width} of {shapes['gate_proj'][0]} FFN channels; lower the sparsity"
            + _or_multiple("width_multiple", config.width_multiple)
        )
    return LayerPlan(ranks=ranks, intermediate_size=width)


def stock_width(shapes: Mapping[str, Shape], config: CompressionConfig, *, multiple: int) -> int:
    """The FFN width at which a layer has lost its whole sparsity while attention is dense.

    Args:
        shapes: (out_features, in_features) of the projections of a layer, by role; all layers have these.
        config: gives sparsity and sub-layers.
        multiple: that the width is rounded down to.

    Raises:
        ConfigError: the FFN does not hold so many parameters, with the highest sparsity that it can give.
    """
    roles = (*(ATTENTION if "self_attn" in config.sublayers else ()), *MLP)
    total = sum(math.prod(shapes[role]) for role in roles)
    dense_width = shapes["gate_proj"][0]
    channel = sum(math.prod(shapes[role]) for role in MLP) // dense_width
    dropped = math.ceil(config.sparsity * total / channel - 1e-9)  # 0.3 of ten is three, whatever floats make of it
    width = _cut(dense_width - dropped, multiple)
    if width < 1:
        highest = math.floor((dense_width - multiple) * channel / total * 1000) / 1000
        share = dense_width * channel / total
        raise ConfigError(
            f"sparsity {config.sparsity} cannot come from the FFNs alone, which hold {share:.1%} of the parameters of "
            f"{' and '.join(config.sublayers)}: target stock reaches {max(0.0, highest)} at most; lower the sparsity"
            + _or_multiple("width_multiple", multiple)
            + ", or compress attention as well (target lorap)"
        )
    return width


def _cut(size: int, multiple: int | str) -> int:
    """Down to a multiple; ``auto`` is for budgets that can spend elsewhere what is cut here."""
    return size if multiple == "auto" else size // int(multiple) * int(multiple)


def _or_multiple(name: str, multiple: int | str) -> str:
    return "" if multiple in (1, "auto") else f" or {name} ({multiple})"


def attention_ranks(shapes: Mapping[str, Shape], kept: float, vo_to_qk_ratio: float) -> dict[str, int]:
    """Ranks of the projections of attention.

    For the square matrices of multi-head attention this is the published integer arithmetic, rounding included.

    Args:
        shapes: (out_features, in_features) of q, k, v and o, by role; k and v may be missing.
        kept: share of their parameters that stays.
        vo_to_qk_ratio: parameters for {v, o} per one for {q, k}.

    Returns:
        By role; a projection that is not named stays dense.
    """
    of_qk, of_vo = ([role for role in group if role in shapes] for group in (ATTENTION[:2], ATTENTION[2:]))
    qk, vo = (sum(math.prod(shapes[role]) for role in group) for group in (of_qk, of_vo))
    budget = kept * (qk + vo)
    # Each share relative to an even split; 2a / (1 + a) and 2 / (1 + a) in the published program, where qk = vo.
    vo_share = (qk + vo) / vo * vo_to_qk_ratio / (1 + vo_to_qk_ratio)
    qk_share = (qk + vo) / qk / (1 + vo_to_qk_ratio)

    def shared(role: str, share: float) -> int:
        return int(int(kept * break_even_rank(shapes[role])) * share)

    def remaining(role: str, group: int, other_group: int) -> int:
        return int((budget - other_group) / group * break_even_rank(shapes[role]))

    if shared("o_proj", vo_share) >= break_even_rank(shapes["o_proj"]):
        return {role: remaining(role, qk, vo) for role in of_qk}
    if shared("q_proj", qk_share) >= break_even_rank(shapes["q_proj"]):
        return {role: remaining(role, vo, qk) for role in of_vo}
    return {role: shared(role, qk_share) for role in of_qk} | {role: shared(role, vo_share) for role in of_vo}


def pruned_positions(width: int, sparsity: float, least_important_kept: float) -> tuple[int, int]:
    """First and one-past-last position, in ascending order of importance, of the FFN channels to drop (paper, section 3.4).

    Args:
        width: channels of the dense FFN.
        sparsity: share of them to drop.
        least_important_kept: share of them, of least importance, that stays.
    """
    start = int(least_important_kept * width)
    stop = int((sparsity + least_important_kept) * width)
    return start, min(stop, width)
