"""Is it low rank? The spectrum of every projection, plain and as its inputs weigh it, attention beside FFN.

LoRAP (arXiv 2404.09695) rests on an observation: attention weights are nearly low rank, the more so when their input channels are
weighted by the norms of the activations, and FFN weights are not. This file measures that on any model that lorap can compress,
one decoder layer in memory at a time. Inputs come from the dense model.

Every matrix is compared with a Gaussian random one of its shape: a square one needs a smaller share of its rank than a wide one
even where there is nothing to find, and in attention matrices are squarer than in the FFN.

Where an FFN is several experts, their matrices of one role share a line: the mean of their squared singular values, each weighted
by the inputs of its own tokens; and the channels of all of them are ranked together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorap.algorithms.factorization import spectrum
from lorap.algorithms.pruning import channel_importance
from lorap.architectures import MLP, SHARED_INPUTS, Architecture
from lorap.architectures.experts import DOWN, GATE_UP, Experts
from lorap.calibration.context import DecoderContext
from lorap.calibration.mixtures import Sources
from lorap.calibration.routing import RoutedTokens
from lorap.calibration.sources import DEFAULT_CALIBRATION
from lorap.calibration.statistics import TINY, check_activations
from lorap.calibration.stream import CalibrationStream, Probe
from lorap.calibration.windows import draw_windows
from lorap.checkpoint.finite import check_finite
from lorap.checkpoint.load import resolve_device
from lorap.errors import ArchitectureError, ConfigError
from lorap.evaluation.inspection.report import Inspection, ProjectionSpectra
from lorap.evaluation.inspection.values import Importance, SingularValues
from lorap.nn.linear import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What to do about activations that are not finite.
PLAIN = "--calibration none for plain spectra"


@dataclass(frozen=True)
class _Matrix:
    """One weight, and (in_features,) float64 mean square of each channel that it reads; None without calibration."""

    weight: Tensor
    norms: Tensor | None = None


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    *,
    calibration: Sources | None = DEFAULT_CALIBRATION,
    tokenizer: Any = None,
    layers: Sequence[int] | None = None,
    num_calibration_samples: int = 32,
    calibration_seq_len: int = 128,
    seed: int = 0,
    device: str = "auto",
    name: str | None = None,
    progress: bool = True,
) -> Inspection:
    """Spectra and channel importances of a dense model, one decoder layer in memory at a time.

    Args:
        model: a transformers model, which is not changed.
        calibration: text or tokens, as for :func:`lorap.compress`, without ``self``; None gives plain spectra, and the model
            does not run.
        tokenizer: for text.
        layers: which decoder layers; all by default. The model runs no further than the last of them.
        num_calibration_samples: token windows.
        calibration_seq_len: tokens in each.
        seed: which windows are drawn.
        device: where layers are worked on; ``auto`` where the model is.
        name: of the model, for the report.
        progress: show a progress bar on stderr.

    Raises:
        ArchitectureError: the model's family is unknown, or it was compressed already.
        CalibrationError: a text cannot be used, or activations are not finite.
        ConfigError: there is no such layer.
        CheckpointError: a weight is NaN or infinite.
    """
    context = DecoderContext.of(model, device=_home(model) if device == "auto" else resolve_device(device))
    architecture, every = context.architecture, context.layers
    chosen = _chosen(layers, len(every))
    if odd := [index for index in chosen if "q_proj" not in architecture.roles(every[index])]:
        some = any("q_proj" in architecture.roles(layer) for layer in every)
        way_out = "name others with --layers" if some else "no layer of this model has"
        raise ArchitectureError(
            f"layer {odd[0]} has no attention of q, k, v and o, which would be compared across layers; {way_out}"
        )
    windows = stream = None
    if calibration is not None:
        windows = draw_windows(
            calibration,
            tokenizer,
            num_samples=num_calibration_samples,
            seq_len=calibration_seq_len,
            seed=seed,
            vocab_size=len(embedding_weight(model)),
        )
        stream = CalibrationStream.from_windows(context, windows)
    projections: list[ProjectionSpectra] = []
    channels: dict[int, dict[str, Importance]] = {}
    passed = range(chosen[-1] + 1) if stream else chosen
    for index in tqdm(passed, desc="Inspecting", unit="layer", disable=not progress):
        with context.on_device(index):
            if index in chosen:
                matrices = _matrices(stream, index, every[index], architecture)
                projections += [_spectra(index, role, found) for role, found in matrices.items()]
                channels[index] = _importances(matrices)
            if stream and index < chosen[-1]:
                stream.advance(index, every[index])
    told = None if windows is None else windows.describe()
    name = name or Path(model.config._name_or_path or "").name or type(model).__name__
    return Inspection(name, told, chosen, len(every), tuple(projections), channels)


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(count))
    absent = [layer for layer in layers if not 0 <= layer < count]
    if absent or not layers:
        wrong = f"there is no layer {absent[0]}" if absent else "no layer was asked for"
        raise ConfigError(f"{wrong}; this model has layers 0 to {count - 1}")
    return tuple(sorted(set(layers)))


def _home(model: nn.Module) -> torch.device:
    """Where the model is; where it would be loaded to, if its weights are still in their files."""
    home = next(model.parameters()).device
    return resolve_device("auto") if home.type == "meta" else home


def _matrices(
    stream: CalibrationStream | None, index: int, layer: nn.Module, architecture: Architecture
) -> dict[str, list[_Matrix]]:
    """By role, those of the layer: one, or one of each expert."""
    linears = architecture.linears(layer)
    check_finite(
        (f"{architecture.module_name(index, role)}.weight", each.weight.data) for role, each in linears.items()
    )
    norms = _sq_norms(stream, index, layer, linears) if stream else {}
    found = {role: [_Matrix(linear.weight.data, norms.get(role))] for role, linear in linears.items()}
    if (experts := architecture.experts(layer)) is None:
        return found
    name = architecture.ffn_name(index, layer)
    check_finite((f"{name}.{leaf}", getattr(experts.module, leaf).data) for leaf in (GATE_UP, DOWN))
    routed = RoutedTokens.record(stream, index, layer, experts) if stream else None
    each_expert = [_of_expert(routed, index, experts, expert) for expert in range(experts.count)]
    return found | {role: [matrices[role] for matrices in each_expert] for role in MLP}


def _of_expert(routed: RoutedTokens | None, index: int, experts: Experts, expert: int) -> dict[str, _Matrix]:
    """By role; inputs are those of the tokens that the router sends to it, weighted as it weights them."""
    weights = dict(zip(MLP, experts.weights(expert), strict=True))
    if routed is None:
        return {role: _Matrix(weight) for role, weight in weights.items()}
    (inputs,), (inner,) = routed.statistics(expert)
    check_activations({"mlp_input": (inputs,), "mlp_inner": (inner,)}, index, way_out=PLAIN)
    read, gated = (stats.channel_sq_norm / max(stats.weight, TINY) for stats in (inputs, inner))
    return {role: _Matrix(weight, gated if role == "down_proj" else read) for role, weight in weights.items()}


def _sq_norms(
    stream: CalibrationStream, index: int, layer: nn.Module, linears: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """(in_features,) float64 by role: mean square of each input channel over the tokens."""
    probes = {name: Probe(linears[readers[0]]) for name, readers in SHARED_INPUTS.items() if readers[0] in linears}
    norms: dict[str, Tensor] = {}
    found = stream.observe(index, layer, probes)
    check_activations(found, index, way_out=PLAIN)
    for name, (stats,) in found.items():
        norms |= {role: stats.channel_sq_norm / max(stats.tokens, 1) for role in SHARED_INPUTS[name]}
    return norms


def _spectra(index: int, role: str, matrices: Sequence[_Matrix]) -> ProjectionSpectra:
    """Of several experts the mean of their squared singular values."""
    shape = (matrices[0].weight.shape[0], matrices[0].weight.shape[1])

    def mean(metrics: Sequence[Tensor | None]) -> SingularValues:
        pairs = zip(matrices, metrics, strict=True)
        squares = torch.stack([spectrum(one.weight, metric) for one, metric in pairs]).mean(0)
        return SingularValues.of(squares, shape)

    kinds = {"plain": mean([None] * len(matrices))}
    if matrices[0].norms is not None:
        kinds["weighted"] = mean([one.norms for one in matrices])
    return ProjectionSpectra(index, role, kinds)


def _importances(matrices: Mapping[str, Sequence[_Matrix]]) -> dict[str, Importance]:
    """Of the channels of all experts together."""
    plain, weighted = [], []
    for gate, up, down in zip(*(matrices[role] for role in MLP), strict=True):
        weights = gate.weight, up.weight, down.weight
        flat = (torch.ones(one.shape[1], dtype=torch.float64, device=one.device) for one in (weights[0], weights[2]))
        plain.append(channel_importance(*weights, *flat))
        if gate.norms is not None and down.norms is not None:
            weighted.append(channel_importance(*weights, gate.norms, down.norms))
    kinds = {"plain": plain} | ({"weighted": weighted} if weighted else {})
    return {kind: Importance.of(torch.cat(found)) for kind, found in kinds.items()}
