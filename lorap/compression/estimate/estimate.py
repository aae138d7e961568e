"""Sizes and stages of one run, as data and for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorap.algorithms.step_schedule import schedule
from lorap.architectures import PROJECTIONS
from lorap.calibration.mixtures import Sources
from lorap.calibration.sources import DEFAULT_CALIBRATION
from lorap.compression.estimate.cost import Stage, corrected_bytes, metric_bytes, stages
from lorap.compression.estimate.cost_terms import duration, quantity
from lorap.compression.estimate.memory import Memory
from lorap.compression.estimate.passes import Passes
from lorap.compression.estimate.rates import Machine
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.sizes import Sizes, planned_sizes
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.work import FOLDS
from lorap.config import CompressionConfig
from lorap.evaluation.info import KINDS
from lorap.reports.run import format_table, shortage
from lorap.requirements import needs_folds

# Parts of a stage that are listed: from this share of its seconds on.
LISTED_SHARE = 0.03


@dataclass(frozen=True)
class Estimate:
    """What a run would leave and take.

    Args:
        shape: the dense model.
        config: what is asked for.
        sizes: what will be left.
        machine: where.
        processes: how many share the work.
        stages: in order.
        disk_bytes: written besides the model that is read: finished layers, the folder, and hidden states beyond the budget.
    """

    shape: ModelShape
    config: CompressionConfig
    sizes: Sizes
    machine: Machine
    processes: int
    stages: Sequence[Stage]
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """The fullest moment of all stages, per process."""
        return max(stage.memory_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shape, sizes = self.shape, self.sizes
        return {
            "model": shape.name,
            "config": self.config.to_dict(),
            "exact": not sizes.decided_by,
            "decided_by": sizes.decided_by or None,
            "budget": sizes.budget,
            "ranks": dict(sizes.layer.ranks),
            "intermediate_size": sizes.layer.intermediate_size,
            "params_before": sum(shape.params.values()),
            "params": sizes.total,
            "kinds": {
                kind: {
                    "params_before": count,
                    "params": sizes.params[kind],
                    "bytes_before": shape.stored_bytes.get(kind, 0),
                    "bytes": sizes.nbytes[kind],
                }
                for kind, count in shape.params.items()
            },
            "bytes_before": sum(shape.stored_bytes.values()),
            "bytes": sum(sizes.nbytes.values()),
            "index_bytes": sizes.index_bytes,
            "machine": self.machine.to_dict(),
            "processes": self.processes,
            "stages": [
                {
                    "name": stage.name,
                    "seconds": stage.seconds,
                    "memory_bytes": stage.memory_bytes,
                    "parts": [asdict(part) for part in stage.parts],
                }
                for stage in self.stages
            ],
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def table(self) -> str:
        """Sizes, then stages, then the formula of each part."""
        return "\n\n".join([size_table(self.shape, self.config, self.sizes), self._stage_table(), self._formulas()])

    def _stage_table(self) -> str:
        rows = [[stage.name, duration(stage.seconds), quantity(stage.memory_bytes, "B")] for stage in self.stages]
        rows.append(["together", duration(self.seconds), quantity(self.memory_bytes, "B")])
        where = f"{self.machine.name}, {self.machine.kind} rates"
        if self.processes > 1:
            where += f", {self.processes} processes; memory is that of each"
        lines = [f"on {where}, in {self.shape.dtype}:", format_table(["", "seconds", "peak memory"], rows), ""]
        lines.append(f"disk: {quantity(self.disk_bytes, 'B')} beside the model that is read")
        lines += [f"assumed, not measured: {sentence}" for sentence in self.machine.assumptions]
        if self.memory_bytes > self.machine.memory_bytes > 0:
            have = quantity(self.machine.memory_bytes, "B")
            lines.append(f"This does not fit: the memory is {have}.")
        return "\n".join(lines)

    def _formulas(self) -> str:
        lines = ["where the seconds come from (all of it with --json):"]
        for stage in self.stages:
            lines.append(f"  {stage.name}, {duration(stage.seconds)}")
            told = [part for part in stage.parts if part.seconds >= LISTED_SHARE * stage.seconds]
            for part in told:
                amount = "" if part.unit == "s" else f" = {quantity(part.amount, part.unit)}"
                lines.append(f"    {duration(part.seconds):>7}  {part.what}: {part.formula}{amount} at {part.rate}")
            rest = stage.seconds - sum(part.seconds for part in told)
            if len(told) < len(stage.parts):
                lines.append(f"    {duration(rest):>7}  {len(stage.parts) - len(told)} smaller parts")
        return "\n".join(lines)


def estimate(
    shape: ModelShape,
    config: CompressionConfig,
    machine: Machine,
    *,
    calibration: Sources = DEFAULT_CALIBRATION,
    evaluation_texts: int = 1,
    processes: int = 1,
    max_memory: int | None = None,
) -> Estimate:
    """What ``lorap compress`` with these choices would leave, and take on ``machine``.

    Args:
        shape: of the dense model.
        config: as for :func:`lorap.compress`.
        machine: rates of one process.
        calibration: as for :func:`lorap.compress`; no text is read.
        evaluation_texts: on how many the perplexity is measured.
        processes: how many share windows and factorizations.
        max_memory: bytes of hidden states that stay in memory.

    Raises:
        ConfigError: the sparsity leaves too little.
        CalibrationError: the sources or their weights are no mixture.
    """
    sizes = planned_sizes(shape, config)
    texts = Texts.of(config, calibration, evaluation_texts=evaluation_texts)
    share = -(-texts.windows // processes)
    steps, step_tokens = texts.step_tokens(config.correction_steps)
    memory = Memory(
        shape=shape,
        config=config,
        layer=sizes.layer,
        machine=machine,
        tokens=share * texts.seq_len,
        evaluation_tokens=-(-texts.evaluation_tokens // processes),
        planning_tokens=min(texts.planning_tokens, share * texts.seq_len),
        steps=steps,
        step_tokens=-(-step_tokens // processes),
        folds=FOLDS if needs_folds(config) else 1,
        budget=max_memory,
        resident=not shape.paged,
    )
    run = Passes(shape, config, sizes, texts, machine, memory, processes=processes)
    spilled = processes * (memory.hidden_bytes - memory.in_memory(memory.hidden_bytes))
    # A finished layer lies there twice while the folder is being written.
    disk = 2 * sum(sizes.nbytes.values()) + max(spilled, metric_bytes(run)) + corrected_bytes(run)
    return Estimate(shape, config, sizes, machine, processes, list(stages(run)), disk)


def size_table(shape: ModelShape, config: CompressionConfig, sizes: Sizes) -> str:
    """Parameters, bytes, ranks and width by kind.

    Args:
        shape: of the dense model.
        config: what is asked for.
        sizes: what will be left.
    """
    rows = []
    for kind in (kind for kind in KINDS if shape.params.get(kind)):
        before, after = shape.params[kind], sizes.params[kind]
        rank = str(sizes.layer.ranks.get(kind, "dense" if kind in PROJECTIONS else ""))
        width = str(sizes.layer.intermediate_size) if kind in PROJECTIONS[4:] else ""
        stored = shape.stored_bytes.get(kind, 0)
        rows.append([kind, f"{before:,}", f"{after:,}", f"{after / before:.4f}", rank, width])
        rows[-1] += [quantity(stored, "B"), quantity(sizes.nbytes[kind], "B")]
    before, after = sum(shape.params.values()), sizes.total
    stored, saved = sum(shape.stored_bytes.values()), sum(sizes.nbytes.values())
    whole = ["whole model", f"{before:,}", f"{after:,}", f"{after / before:.4f}", "", ""]
    rows.append([*whole, quantity(stored, "B"), quantity(saved, "B")])
    header = ["", "parameters before", "after", "kept", "rank", "width", "stored", "saved"]
    lines = [
        f"{shape.name}: {shape.model_type}, {shape.num_layers} layers, recipe {config.recipe}, sparsity {config.sparsity}",
        "",
        format_table(header, rows),
    ]
    if sizes.index_bytes:
        lines.append(f"of the saved bytes {quantity(sizes.index_bytes, 'B')} are row numbers of pivoted storage")
    if sizes.decided_by:
        lines += [
            f"Ranks and widths will be decided by {sizes.decided_by}; those above are an even split of the budget, "
            f"{sizes.budget:,} parameters for the compressed sub-layers' matrices, which will be spent in any case.",
        ]
    if config.corrects:
        windows, asked = config.num_calibration_samples, config.correction_steps
        plan = schedule(windows, config.calibration_seq_len, asked)
        lines += shortage(windows, plan.steps, asked, plan.enough)
    return "\n".join(lines)
