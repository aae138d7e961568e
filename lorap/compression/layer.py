"""One decoder layer: observe, factorize attention, prune the FFN, and send the calibration windows through what came out.

With ``sequential="layer"`` all statistics are taken before anything changes; with ``"sublayer"`` each part of the layer is
observed behind the already compressed parts before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorap.algorithms.anchoring import carried_over
from lorap.algorithms.factorization import Factorization, factorize_batch
from lorap.algorithms.pivoting import pivot, storage_error
from lorap.architectures import MLP, PROJECTIONS, SHARED_INPUTS
from lorap.architectures.experts import Experts
from lorap.calibration.anchor import cross_sums
from lorap.calibration.context import DecoderContext
from lorap.calibration.routing import RoutedTokens
from lorap.calibration.statistics import Folds, check_activations, merged
from lorap.calibration.stream import CalibrationStream, Probe
from lorap.compression.allocation import LayerPlan
from lorap.compression.experts import prune_experts, unchanged
from lorap.compression.ffn import FFN
from lorap.compression.shrinkage import shrinkage_of, shrunk
from lorap.config import CompressionConfig
from lorap.distributed import Processes
from lorap.nn.linear import LowRankLinear, count_parameters, keep_outputs, new_linear
from lorap.reports.run import ProjectionReport
from lorap.reports.spectra import Spectrum, sampled_spectrum
from lorap.requirements import sums_of
from lorap.system import Stopwatch, release_freed_memory


@dataclass
class LayerCompressor:
    """Everything that the compression of all layers has in common.

    Args:
        context: the model.
        config: what to do.
        stream: the calibration windows.
        watch: takes the time by stage.
    """

    context: DecoderContext
    config: CompressionConfig
    stream: CalibrationStream
    watch: Stopwatch = field(default_factory=Stopwatch)

    def compress(
        self,
        index: int,
        layer: nn.Module,
        plan: LayerPlan,
        output_metrics: Mapping[str, Tensor],
        *,
        anchor: CalibrationStream | None = None,
    ) -> list[ProjectionReport]:
        """Replace the projections of one layer; the stream stays before it.

        Args:
            index: of the layer.
            layer: changed in place.
            plan: its ranks and width.
            output_metrics: by role, (out_features, out_features) second moment of the gradients; without one all outputs
                count alike.
            anchor: the same windows before this layer of the dense model, which factor pairs are then fitted to.

        Returns:
            One for each projection that the layer has, in the order of ``PROJECTIONS``.

        Raises:
            CalibrationError: an activation is NaN or infinite.
            FactorizationError: a weight is.
        """
        architecture = self.context.architecture
        dense, shapes = architecture.linears(layer), architecture.shapes(layer)
        work = _Layer(
            self.config, index, plan, dense, architecture.experts(layer), output_metrics, self.stream.processes
        )
        with self.context.on_device(index):
            for inputs in self._steps(plan, pruned=plan.intermediate_size < shapes["gate_proj"][0]):
                self._compress_part(index, layer, work, inputs, anchor)
            return [work.report(role) for role in PROJECTIONS if role in shapes]

    def _compress_part(
        self, index: int, layer: nn.Module, work: _Layer, inputs: tuple[str, ...], anchor: CalibrationStream | None
    ) -> None:
        """Replace the projections that read ``inputs``, judged on what these are now."""
        plan, dense = work.plan, work.dense
        experts = work.experts if "mlp_inner" in inputs else None
        observed = [name for name in inputs if SHARED_INPUTS[name][0] in dense]
        with self.watch("calibrate"):
            folds = self._observe(index, layer, dense, observed)
            for name in observed:
                largest = max(float(stats.largest) for stats in folds[name])
                work.largest_inputs |= dict.fromkeys(SHARED_INPUTS[name], largest)
            routed = self._routed(index, layer, experts) if experts else None
            cross = {} if anchor is None else self._cross_sums(index, layer, work, observed, anchor)
            release_freed_memory(max((linear.weight.numel() for linear in dense.values()), default=0))
        # The FFN first: its sums are the largest of all, and go when it is done.
        with self.watch("prune"):
            if routed is not None:
                work.prune_experts(routed)
            elif "mlp_inner" in inputs and plan.intermediate_size < dense["gate_proj"].out_features:
                work.prune(folds["mlp_input"], folds.pop("mlp_inner"))
                layer.get_submodule(self.context.architecture.mlp).intermediate_size = plan.intermediate_size  # type: ignore[assignment]
                release_freed_memory(dense["down_proj"].weight.numel())
        with self.watch("factorize"):
            for name in observed:
                roles = [role for role in SHARED_INPUTS[name] if role in plan.ranks]
                if roles:
                    names = {role: self.context.architecture.module_name(index, role) for role in roles}
                    work.factorize(names, folds.pop(name), cross.pop(name, None))
        for role, module in work.replaced.items():
            layer.set_submodule(self.context.architecture.projections[role], module)

    def _steps(self, plan: LayerPlan, *, pruned: bool) -> list[tuple[str, ...]]:
        """Which inputs are observed together, in order; those that nothing depends on are left out."""
        needed = [
            name
            for name, readers in SHARED_INPUTS.items()
            if set(readers) & set(plan.ranks) or (pruned and name.startswith("mlp"))
        ]
        if not needed or self.config.sequential == "layer":
            return [tuple(needed)] if needed else []
        steps: list[tuple[str, ...]] = [(name,) for name in needed if not (pruned and name.startswith("mlp"))]
        return [*steps, ("mlp_input", "mlp_inner")] if pruned else steps

    def _observe(
        self, index: int, layer: nn.Module, dense: Mapping[str, nn.Linear], inputs: Sequence[str]
    ) -> dict[str, Folds]:
        """Statistics by the name of the input."""
        if not inputs:
            return {}
        probes = {name: self._probe(name, dense[SHARED_INPUTS[name][0]]) for name in inputs}
        found = self.stream.observe(index, layer, probes)
        check_activations(found, index)
        return found

    def _cross_sums(
        self, index: int, layer: nn.Module, work: _Layer, inputs: Sequence[str], anchor: CalibrationStream
    ) -> dict[str, Tensor]:
        """What inputs of factor pairs are in the dense model, times what they are now."""
        streams: dict[str, Any] = {"compressed": self.stream, "dense": anchor}
        as_dense = partial(self._dense_again, layer, work)
        return {
            name: cross_sums(index, layer, work.dense[SHARED_INPUTS[name][0]], **streams, as_dense=as_dense)
            for name in inputs
            if set(SHARED_INPUTS[name]) & set(work.plan.ranks)
        }

    @contextmanager
    def _dense_again(self, layer: nn.Module, work: _Layer) -> Iterator[None]:
        """``layer`` has the projections that it came with."""
        paths = self.context.architecture.projections
        for role in work.replaced:
            layer.set_submodule(paths[role], work.dense[role])
        try:
            yield
        finally:
            for role, module in work.replaced.items():
                layer.set_submodule(paths[role], module)

    def _probe(self, name: str, linear: nn.Linear) -> Probe:
        mean, moments = sums_of(self.config, name)
        weighted = self._weighs_tokens and name in ("attention_output", "mlp_inner")
        return Probe(linear, mean=mean, moments=moments, weighted=weighted)

    def _routed(self, index: int, layer: nn.Module, experts: Experts) -> RoutedTokens:
        """What the experts read."""
        return RoutedTokens.record(self.stream, index, layer, experts, weighted=self._weighs_tokens)

    @property
    def _weighs_tokens(self) -> bool:
        return self.config.token_weighting == "residual"


class _Layer:
    """The projections of one layer on their way from dense to compressed."""

    def __init__(
        self,
        config: CompressionConfig,
        index: int,
        plan: LayerPlan,
        dense: Mapping[str, nn.Linear],
        experts: Experts | None,
        output_metrics: Mapping[str, Tensor],
        processes: Processes,
    ) -> None:
        self.config, self.index, self.plan, self.dense, self.experts = config, index, plan, dense, experts
        self.of_experts: dict[str, ProjectionReport] = {}
        self.output_metrics = output_metrics
        self.processes = processes
        self.replaced: dict[str, nn.Module] = {}
        self.errors: dict[str, float] = {}
        self.factorizations: dict[str, tuple[str, float]] = {}  # by role: what solved it, its excess
        self.storage_errors: dict[str, float] = {}
        self.spectra: dict[str, Spectrum] = {}
        self.largest_inputs: dict[str, float] = {}

    def factorize(self, names: Mapping[str, str], folds: Folds, cross: Tensor | None = None) -> None:
        """Low-rank stand-ins for projections that read one input; processes share them.

        Args:
            names: full ones, by role.
            folds: of the input.
            cross: (K, K), sum over the tokens of all folds of x x'^T, with x the input in the dense model; the factors are then
                fitted to W x, and their error is relative to the part of it that x' can tell.
        """
        if not names:
            return
        mine = self.processes.shard(list(names))
        metric = self._metric(folds) if mine else None
        carried = self._carried_over(cross, folds) if mine and cross is not None else None
        # A GPU solves matrices of one size faster together; a CPU does not, and one at a time takes a third of the memory.
        together = [mine] if self.dense[next(iter(names))].weight.is_cuda else [[role] for role in mine]
        for roles in filter(None, together):
            weights = [self.dense[role].weight.data.double() for role in roles]  # rounded once, at the end
            weights = weights if carried is None else [weight @ carried for weight in weights]
            found = factorize_batch(
                weights,
                [self.plan.ranks[role] for role in roles],
                [metric] * len(roles),
                output_metrics=[self._output_metric(role, weight) for role, weight in zip(roles, weights, strict=True)],
                names=[names[role] for role in roles],
            )
            for role, factors in zip(roles, found, strict=True):
                self._store(role, factors, metric, names[role])
            del weights, found, factors
            release_freed_memory(max(self.dense[role].weight.numel() for role in roles))
        if self.processes.count == 1:
            return
        for sent in self.processes.all_gather({role: self._pack(role) for role in mine}):
            for role, packed in sent.items():
                self._unpack(role, packed)

    def _pack(self, role: str) -> tuple[Any, ...]:
        """What became of a projection, for other processes."""
        return (*(found.get(role) for found in self._findings), self.replaced[role].to("cpu"))

    def _unpack(self, role: str, packed: tuple[Any, ...]) -> None:
        *told, module = packed
        for found, value in zip(self._findings, told, strict=True):
            if value is not None:
                found[role] = value
        self.replaced[role] = module.to(self.dense[role].weight.device)

    @property
    def _findings(self) -> tuple[dict[str, Any], ...]:
        return self.errors, self.factorizations, self.storage_errors, self.spectra

    def _store(self, role: str, factors: Factorization, metric: Tensor | None, name: str) -> None:
        linear = self.dense[role]
        left, right, rows = factors.left, factors.right, None
        if self.config.storage == "pivoted":
            stored = pivot(left, right, name=name)
            left, right, rows = stored.left, stored.right, stored.pivot_rows
        dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.data
        module = LowRankLinear.from_factors(left.to(dtype), right.to(dtype), bias, rows).train(linear.training)
        self.replaced[role] = module
        self.errors[role] = factors.error
        self.spectra[role] = sampled_spectrum(factors.singular_values)
        self.factorizations[role] = factors.solver, factors.excess
        exact = factors.left @ factors.right
        self.storage_errors[role] = storage_error(exact, module.reconstruct(dtype=torch.float64), metric)

    def prune(self, input_folds: Folds, inner_folds: Folds) -> None:
        """Narrower gate, up and down, by the first process for all."""
        if self.processes.is_main_process:
            self._prune(input_folds, inner_folds)
        if self.processes.count == 1:
            return
        packed = self.processes.broadcast({role: self._pack(role) for role in MLP if role in self.replaced})
        for role, one in packed.items():
            self._unpack(role, one)

    def _prune(self, input_folds: Folds, inner_folds: Folds) -> None:
        gate, up, down = (self.dense[role] for role in MLP)
        mean = merged(inner_folds, moments=False).mean if self.config.bias_compensation else None
        metric = self._output_metric("down_proj", down.weight)
        ffn = FFN(gate.weight.data, up.weight.data, down.weight.data, input_folds, inner_folds, metric)
        found = ffn.prune(self.plan.intermediate_size, self.config)
        self.errors |= found.errors
        narrow = new_linear(found.down, None if down.bias is None else down.bias.data)
        if mean is not None:
            narrow = _with_mean_output(down, narrow, found.kept, mean)
        self.replaced |= {
            "gate_proj": keep_outputs(gate, found.kept),
            "up_proj": keep_outputs(up, found.kept),
            "down_proj": narrow,
        }

    def prune_experts(self, routed: RoutedTokens) -> None:
        """Narrower experts."""
        metric = self._output_metric("down_proj", routed.experts.module.down_proj)
        found = prune_experts(routed, self.index, self.plan.intermediate_size, self.config, metric=metric)
        self.of_experts = {report.role: report for report in found}

    def _metric(self, folds: Folds) -> Tensor | None:
        """What a factorization is judged on: nothing, the channel norms, the second moment, or the spread of the outputs."""
        method = self.config.attention_method
        if method == "svd":
            return None
        stats = merged(folds)
        if method == "awsvd":
            return stats.channel_sq_norm
        if method == "afm":
            return stats.covariance
        return shrunk(stats.second_moment, shrinkage_of(folds, self.config.metric_shrinkage))

    @staticmethod
    def _carried_over(cross: Tensor, folds: Folds) -> Tensor:
        stats = merged(folds)
        return carried_over(cross / stats.weight, stats.second_moment)

    def _output_metric(self, role: str, weight: Tensor) -> Tensor | None:
        metric = self.output_metrics.get(role)
        return None if metric is None else metric.to(weight.device)

    def report(self, role: str) -> ProjectionReport:
        """What became of one projection."""
        if role not in self.dense:
            assert self.experts is not None
            return self.of_experts.get(role) or unchanged(self.experts, self.index, role)
        before, after = self.dense[role], self.replaced.get(role, self.dense[role])
        solver, excess = self.factorizations.get(role, (None, 0.0))
        return ProjectionReport(
            layer=self.index,
            role=role,
            shape_before=(before.out_features, before.in_features),
            shape_after=(int(after.out_features), int(after.in_features)),  # type: ignore[arg-type]
            rank=after.rank if isinstance(after, LowRankLinear) else None,
            params_before=count_parameters(before),
            params_after=count_parameters(after),
            error=self.errors.get(role, 0.0),
            storage_error=self.storage_errors.get(role, 0.0),
            solver=solver,
            excess=excess,
            spectrum=self.spectra.get(role),
            largest_input=self.largest_inputs.get(role, 0.0),
        )


def _with_mean_output(down: nn.Linear, narrow: nn.Linear, kept: Tensor, mean: Tensor) -> nn.Linear:
    """``narrow`` with a bias that makes up for the mean of what it no longer outputs (FLAP, arXiv 2312.11983, section 4.3)."""
    lost = down.weight.data.double() @ mean - narrow.weight.data.double() @ mean[kept]
    bias = lost if down.bias is None else down.bias.data.double() + lost
    return new_linear(narrow.weight.data, bias.to(down.weight.dtype))
