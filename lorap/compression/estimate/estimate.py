"""Sizes, memory and, where it was tried, time of one run, as data and for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorap.algorithms.step_schedule import schedule
from lorap.architectures import PROJECTIONS
from lorap.compression.budget_remarks import budget_remarks
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.estimate.memory import Memory, resident_bytes
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.sizes import Sizes, planned_sizes
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.trial import Trial
from lorap.config import CompressionConfig
from lorap.evaluation.info import KINDS
from lorap.reports.run import CorrectionReport, correction_lines, format_table, shortage
from lorap.weights import MIXES


@dataclass(frozen=True)
class Estimate:
    """What a run would leave and take.

    Args:
        shape: the dense model.
        config: what is asked for.
        texts: how much is read.
        sizes: what will be left.
        memory: bytes at the fullest moment of each stage.
        room: bytes that the process can have in all; 0 where nobody knows.
        disk_bytes: written besides the model that is read: finished layers, the folder, and hidden states beyond the budget.
        decisions: sentences on what a budget of bytes decided.
        trial: some layers that were compressed; None where none was.
    """

    shape: ModelShape
    config: CompressionConfig
    texts: Texts
    sizes: Sizes
    memory: Mapping[str, int]
    room: int
    disk_bytes: int
    decisions: tuple[str, ...] = ()
    trial: Trial | None = None

    @property
    def seconds(self) -> float | None:
        """Of all stages; None where nothing was tried."""
        return sum(self.trial.stages.values()) if self.trial else None

    @property
    def memory_bytes(self) -> int:
        """The fullest moment of all stages."""
        return max(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether there is memory enough, as far as anybody knows."""
        return not 0 < self.room < self.memory_bytes

    @property
    def remarks(self) -> list[str]:
        """Sentences on what no number tells."""
        told = [*self.decisions]
        if not self.fits:
            return [*told, f"This does not fit: {quantity(self.room, 'B')} of memory can be had."]
        if self.shape.kinds:
            told.append(
                f"The layers are of {len(self.shape.kinds)} kinds, so no time is told: none of them stands for all."
            )
        writes = self.shape.paged and self.texts.own_windows
        if writes and 0 < self.room // 2 < self.shape.computed_bytes:
            takes, have = quantity(self.shape.computed_bytes, "B"), quantity(self.room, "B")
            told.append(
                f"The model takes {takes}, more than half of the {have} that can be had, so each token that it writes for `self` "
                "reads all weights from the disk, and `sample` takes far longer than planned; texts of your own do without: "
                "--calibration FILE"
            )
        return told

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shape, sizes, stages = self.shape, self.sizes, self.trial.stages if self.trial else {}
        return {
            "model": shape.name,
            "config": self.config.to_dict(),
            "exact": not sizes.decided_by,
            "decided_by": sizes.decided_by or None,
            "budget": sizes.budget,
            "ranks": {} if shape.kinds else dict(sizes.layer.ranks),
            "intermediate_size": None if shape.kinds else sizes.layer.intermediate_size,
            "layers": [
                {"layers": kind.num_layers, "first": kind.first, **asdict(layer)}
                for kind, layer in zip(shape.of_each_kind, sizes.layers, strict=True)
            ],
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
            "stages": [
                {"name": name, "seconds": stages.get(name), "memory_bytes": self.memory.get(name)}
                for name in dict.fromkeys((*stages, *self.memory))
            ],
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "remarks": self.remarks,
            "trial": asdict(self.trial) if self.trial else None,
        }

    def table(self) -> str:
        """Sizes, then time and memory."""
        lines = [size_table(self.shape, self.config, self.sizes), *self._few_windows(), ""]
        if self.trial:
            lines += [self._stage_table(self.trial), ""]
        lines.append(f"peak memory: {quantity(self.memory_bytes, 'B')}")
        lines.append(f"disk: {quantity(self.disk_bytes, 'B')} beside the model that is read")
        return "\n".join([*lines, *self.remarks])

    def _few_windows(self) -> list[str]:
        """Where the windows are not enough for all correction steps: how many there will be at most."""
        windows, lines = self.config.num_calibration_samples, list[str]()
        for kind, is_on, asked in (
            ("correction", self.config.corrects, self.config.correction_steps),
            ("scale", self.config.rescales, self.config.scale_steps),
        ):
            if is_on and self.trial and not self.trial.judged:
                lines += correction_lines(CorrectionReport(asked, 0, windows=windows), kind)
            elif is_on:
                plan = schedule(windows, self.config.calibration_seq_len, asked)
                lines += shortage(windows, plan.steps, asked, plan.enough, kind)
        return lines

    def _stage_table(self, trial: Trial) -> str:
        where, threads = trial.environment["device"], trial.environment["threads"]
        machine = where if where != "cpu" else "1 thread" if threads == 1 else f"{threads} threads"
        kept = {name: seconds for name, seconds in trial.stages.items() if seconds > 0}
        rows = [[name, duration(seconds)] for name, seconds in kept.items()]
        rows.append(["together", duration(sum(kept.values()))])
        took = duration(sum(trial.tried.values()))
        tried = f"{trial.layers} of {self.shape.num_layers} layers, {trial.windows} of {self.texts.windows} windows"
        told = f"Measured on this machine ({machine}), now: {tried}, in {took}. That makes for the whole run:"
        return f"{told}\n{format_table(['', 'time'], rows)}"


def estimate(
    shape: ModelShape, config: CompressionConfig, texts: Texts, *, room: int = 0, max_memory: int | None = None
) -> Estimate:
    """What ``lorap compress`` with these choices would leave, and the memory that it would take; no weight is read.

    Args:
        shape: of the dense model.
        config: as for :func:`lorap.compress`.
        texts: how much is read.
        room: bytes that are free for it; 0 where nobody knows.
        max_memory: bytes of hidden states that stay in memory.

    Raises:
        ConfigError: the sparsity leaves too little.
    """
    asked, config = config, resolve_budget(shape.dense, config)
    decisions = budget_remarks(shape.dense, asked, config)
    sizes = planned_sizes(shape, config)
    base = resident_bytes()
    room = room and room + base
    rest: dict[str, Any] = {"base": base, "room": room, "budget": max_memory}
    stages = [_by_stage(kind, shape.num_layers, config, texts, rest) for kind in shape.of_each_kind]
    names = dict.fromkeys(name for found in stages for name in found)
    memory = {name: max(found.get(name, 0) for found in stages) for name in names}
    disk_bytes = Memory(shape, config, sizes, texts, **rest).disk_bytes()
    return Estimate(shape, config, texts, sizes, memory, room, disk_bytes, tuple(decisions))


def _by_stage(
    kind: ModelShape, num_layers: int, config: CompressionConfig, texts: Texts, rest: Mapping[str, Any]
) -> Mapping[str, int]:
    """What the run would hold if all layers were of one kind."""
    alone = replace(kind, num_layers=num_layers, kinds=())
    return Memory(alone, config, planned_sizes(alone, config), texts, **rest).by_stage()


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
        mine = [layer for each, layer in zip(shape.of_each_kind, sizes.layers, strict=True) if kind in each.projections]
        rank = _distinct(layer.ranks.get(kind, "dense") for layer in mine)
        width = _distinct(layer.intermediate_size for layer in mine) if kind in PROJECTIONS[4:] else ""
        stored = shape.stored_bytes.get(kind, 0)
        rows.append([kind, f"{before:,}", f"{after:,}", f"{after / before:.4f}", rank, width])
        rows[-1] += [quantity(stored, "B"), quantity(sizes.nbytes[kind], "B")]
    before, after = sum(shape.params.values()), sizes.total
    stored, written = sum(shape.stored_bytes.values()), sum(sizes.nbytes.values())
    whole = ["whole model", f"{before:,}", f"{after:,}", f"{after / before:.4f}", "", ""]
    rows.append([*whole, quantity(stored, "B"), quantity(written, "B")])
    header = ["", "parameters before", "after", "kept", "rank", "width", "on disk before", "after"]
    lines = [
        f"{shape.name}: {shape.config.model_type}, {shape.num_layers} layers, recipe {config.recipe}, "
        f"sparsity {config.sparsity:.6g}",
        "",
        format_table(header, rows),
    ]
    if sizes.index_bytes:
        lines.append(f"of these bytes {quantity(sizes.index_bytes, 'B')} are row numbers of pivoted storage")
    if config.has_byte_budget:
        lines.append(
            f"Weights are {_kinds(config)} and the sparsity {config.sparsity:.4f}, as {config.budget_text} wants it."
        )
    if sizes.decided_by:
        spent = (
            "" if config.has_byte_budget else f", {sizes.budget:,} parameters for the compressed sub-layers' matrices"
        )
        what = "Ranks and widths" if config.sparsity else ""
        what += (" and bits" if what else "Bits") if config.is_mixed else ""
        lines.append(
            f"{what} will be decided by {sizes.decided_by}; those above are an even split of the budget{spent}, which "
            "will be spent in any case."
        )
    return "\n".join(lines)


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _kinds(config: CompressionConfig) -> str:
    return f"{MIXES[config.weights].kinds}, matrix by matrix," if config.is_mixed else config.weights


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix: 1.23 TFLOP."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{_three(value)} {unit}"


def duration(seconds: float) -> str:
    """With a unit that suits it; two digits are more than an estimate has."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{_two(seconds / size)} {unit}"
    return f"{_two(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{_two(seconds * 1e6)} us"


def _two(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
