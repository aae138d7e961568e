"""The experts of one layer with fewer channels: as many for each, since they are packed together, and each its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorap.architectures import MLP
from lorap.architectures.experts import Experts
from lorap.calibration.routing import RoutedTokens
from lorap.calibration.statistics import Folds, check_activations
from lorap.compression.ffn import FFN
from lorap.config import CompressionConfig
from lorap.reports.records import ExpertReport
from lorap.reports.run import ProjectionReport
from lorap.requirements import FEW_TOKENS, sums_of
from lorap.system import release_freed_memory


@dataclass(frozen=True)
class _Pruned:
    """One expert: (2 * width, hidden_size), (hidden_size, width), and what became of each projection, by role."""

    gate_up: Tensor
    down: Tensor
    reports: dict[str, ExpertReport]
    largest_inputs: tuple[float, float]

    def to(self, device: torch.device | str) -> _Pruned:
        return replace(self, gate_up=self.gate_up.to(device), down=self.down.to(device))


def prune_experts(
    routed: RoutedTokens, index: int, width: int, config: CompressionConfig, *, metric: Tensor | None = None
) -> list[ProjectionReport]:
    """Leave ``width`` channels of every expert, chosen and refitted with that expert's own tokens; processes share the experts.

    An expert that few tokens reached is judged on all tokens of the layer instead.

    Args:
        routed: what the experts of the layer read; the experts are changed.
        index: of the layer.
        width: channels that stay.
        config: what to do.
        metric: (hidden_size, hidden_size) second moment of the gradients of the outputs; None where all count alike.

    Returns:
        One for each of gate, up and down.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    experts, processes = routed.experts, routed.processes
    mean, moments = sums_of(config, "mlp_inner")
    before, device = experts.shapes, experts.module.down_proj.device
    mine, found = processes.shard(range(experts.count)), dict[int, _Pruned]()
    for expert in range(experts.count):
        inputs, inner = routed.statistics(expert, mean=mean, moments=moments)
        tokens = [stats.tokens for stats in inner]
        few = min(tokens) < FEW_TOKENS
        if few:
            inputs, inner = routed.statistics(expert, mean=mean, moments=moments, all_tokens=True)
        check_activations({"mlp_input": inputs, "mlp_inner": inner}, index)
        if expert in mine:
            ffn = FFN(*experts.weights(expert), inputs, inner, metric)
            found[expert] = _pruned(ffn, width, config, tokens=sum(tokens), few=few)
            del ffn
        del inputs, inner
        release_freed_memory(experts.width**2)
    if processes.count > 1:
        sent = processes.all_gather({expert: one.to("cpu") for expert, one in found.items()})
        found = {expert: one.to(device) for part in sent for expert, one in part.items()}
    pruned = [found[expert] for expert in range(experts.count)]
    experts.replace(torch.stack([one.gate_up for one in pruned]), torch.stack([one.down for one in pruned]))
    after = experts.shapes
    return [_report(index, role, before[role], after[role], pruned) for role in MLP]


def unchanged(experts: Experts, index: int, role: str) -> ProjectionReport:
    """The report of experts that stay as they are."""
    shape = experts.shapes[role]
    params = experts.count * math.prod(shape)
    return ProjectionReport(index, role, shape, shape, None, params, params, 0.0)


def _pruned(ffn: FFN, width: int, config: CompressionConfig, *, tokens: int, few: bool) -> _Pruned:
    found = ffn.prune(width, config)
    return _Pruned(
        torch.cat((ffn.gate[found.kept], ffn.up[found.kept])),
        found.down,
        {role: ExpertReport(tokens, error, few) for role, error in found.errors.items()},
        (_largest(ffn.inputs), _largest(ffn.inner)),
    )


def _largest(folds: Folds) -> float:
    return max(float(stats.largest) for stats in folds)


def _report(
    index: int, role: str, before: tuple[int, int], after: tuple[int, int], pruned: list[_Pruned]
) -> ProjectionReport:
    each = tuple(one.reports[role] for one in pruned)
    tokens = sum(one.tokens for one in each)
    return ProjectionReport(
        layer=index,
        role=role,
        shape_before=before,
        shape_after=after,
        rank=None,
        params_before=len(each) * math.prod(before),
        params_after=len(each) * math.prod(after),
        error=math.sqrt(sum(one.tokens * one.error**2 for one in each) / max(tokens, 1)),
        largest_input=max(one.largest_inputs[role == "down_proj"] for one in pruned),
        experts=each,
    )
