"""What a compression run did, as data and as a table for people."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorap.architectures import PROJECTIONS
from lorap.config import CompressionConfig
from lorap.jsonio import Count, Size, read_as
from lorap.reports.records import (
    SUMS,
    Evaluation,
    ExpertReport,
    Tuning,
    check_projections,
    check_sums,
    read_calibration,
    read_evaluations,
)
from lorap.reports.spectra import Spectrum
from lorap.requirements import FEW_TOKENS, compressed_roles

# The report for people, beside the weights (lorap/reports/html/page.py).
PAGE = "report.html"
REPORT, RECOVERY_REPORT = "lorap_report.json", "lorap_recovery.json"
KIND_HEADER = ("", "parameters before", "after", "kept", "rank", "width", "error min / median / max")
# Parameters that a rounded width removes on top are reported from this share on.
TOLD_ROUNDING = 5e-4
# Layers with experts that few tokens reached that are named.
TOLD_LAYERS = 8
# What rounding the factors adds is reported from here on; in float32 it stays below.
TOLD_STORAGE_ERROR = 1e-6


@dataclass(frozen=True)
class ProjectionReport:
    """One linear layer before and after.

    Args:
        layer: index of the decoder layer.
        role: such as ``q_proj``.
        shape_before: (out_features, in_features) of the dense weight.
        shape_after: the same once channels are pruned; a low-rank layer keeps its outer shape.
        rank: of the factor pair; None where the layer is dense.
        params_before: weights and bias.
        params_after: weights, factors and bias, as saved.
        error: activation-weighted relative error, ||(W - W') C^(1/2)|| / ||W C^(1/2)||; 0 where nothing changed.
        storage_error: what rounding the factors to the checkpoint's dtype adds, relative in the same norm.
        solver: what found the factors, such as ``eigh``, with what it had to take over from; None without factors.
        excess: at most this share of ``error`` lies above the least possible one at this rank and for this metric, by proof.
        spectrum: singular values of the weighted matrix; None without factors.
        largest_input: largest magnitude of what it read during calibration; 0 where that was not observed.
        experts: where the projection is one of each expert of a mixture, what became of each: shapes are those of one, parameters
            those of all, and the error is the root mean square over their tokens. Empty elsewhere, and where experts stay whole.
    """

    layer: Count
    role: str
    shape_before: tuple[Size, Size]
    shape_after: tuple[Size, Size]
    rank: Size | None
    params_before: Size
    params_after: Count
    error: float
    storage_error: float = 0.0
    solver: str | None = None
    excess: float = 0.0
    spectrum: Spectrum | None = None
    largest_input: float = 0.0
    experts: tuple[ExpertReport, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; experts only where there are any."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value or name != "experts"}


@dataclass(frozen=True)
class CorrectionReport:
    """The correction steps, and what windows that neither they nor the statistics saw said of them.

    Args:
        asked: steps that were wanted.
        tried: steps that the windows were enough for; none without others to judge by.
        taken: all that were tried, or none.
        windows: of calibration.
        enough: windows that would have been enough for all steps; 0 without others to judge by.
        unseen_tokens: that judged.
        before: divergence of the predictions from the dense model's on these, nats per token, for each fold; empty without steps.
        after: the same behind the steps; empty where it is not finite.
        fraction: of the way that the steps went, where the weights are now; 0 where they were undone.
    """

    asked: Count
    tried: Count
    taken: Count = 0
    windows: Count = 0
    enough: Count = 0
    unseen_tokens: Count = 0
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    fraction: float = 1.0


@dataclass
class CompressionReport:
    """Everything worth knowing about a run; ``lorap_report.json`` holds the same.

    Args:
        model: what was compressed.
        config: how.
        calibration: name, windows, seq_len, tokens and sha256 of the calibration windows; ``sources`` with name, weight and
            windows of each source.
        projections: one entry per linear layer.
        params_total_before: parameters of the whole dense model, embeddings included; tied weights count once.
        params_saved: parameters of the whole compressed model, counted on the tensors that are saved.
        evaluations: perplexity before and after, by text.
        seconds: time spent, by stage.
        peak_memory_bytes: high-water mark of the process; device memory where a GPU was used is ``peak_device_memory_bytes``.
        environment: versions, device, dtype and thread count.
        command: that was run, as it would be typed into a shell; empty where there was none.
        tunings: what was trained afterwards (:func:`lorap.recover`); all else is as it was before.
        correction: what became of the correction steps; None where none were asked for, or in older reports.
        rescaling: the same of the steps that moved scales.
        decisions: sentences on what a budget of bytes decided that was not asked for (lorap/compression/budget_remarks.py).
    """

    model: str
    config: CompressionConfig
    calibration: dict[str, Any]
    projections: list[ProjectionReport] = field(default_factory=list)
    params_total_before: Count = 0
    params_saved: Count = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: Count = 0
    peak_device_memory_bytes: Count = 0
    environment: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    tunings: list[Tuning] = field(default_factory=list)
    correction: CorrectionReport | None = None
    rescaling: CorrectionReport | None = None
    decisions: list[str] = field(default_factory=list)

    @property
    def params_before(self) -> int:
        """Parameters of the compressed sub-layers in the dense model."""
        return sum(projection.params_before for projection in self._compressed)

    @property
    def params_after(self) -> int:
        """Parameters of the compressed sub-layers now."""
        return sum(projection.params_after for projection in self._compressed)

    @property
    def param_ratio(self) -> float:
        """Kept share of the compressed sub-layers: params_after / params_before."""
        return self.params_after / self.params_before

    @property
    def _compressed(self) -> list[ProjectionReport]:
        roles = compressed_roles(self.config)
        return [projection for projection in self.projections if projection.role in roles]

    def by_role(self, role: str) -> list[ProjectionReport]:
        """All layers' projections of one kind."""
        return [projection for projection in self.projections if projection.role == role]

    def add_evaluation(self, before: Evaluation | None, after: Evaluation) -> None:
        """Record the perplexity on one text, with the dense model's beside it where it was measured."""
        entry: dict[str, Any] = {"after": asdict(after), "before": asdict(before) if before else None}
        entry["increase_nats"] = after.nats - before.nats if before else None
        self.evaluations.append({"text": after.text, **entry})

    def evaluations_now(self) -> list[Evaluation]:
        """Of the model as it is: after the last training, where there was one that was measured."""
        if self.tunings:
            return [entry.after for entry in self.tunings[-1].evaluations]
        return [Evaluation(**entry["after"]) for entry in self.evaluations]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {
            "model": self.model,
            "config": self.config.to_dict(),
            "calibration": self.calibration,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "param_ratio": self.param_ratio,
            "params_total_before": self.params_total_before,
            "params_saved": self.params_saved,
            "evaluations": self.evaluations,
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_device_memory_bytes": self.peak_device_memory_bytes,
            "environment": self.environment,
            "command": self.command,
            "correction": asdict(self.correction) if self.correction else None,
            "projections": [projection.to_dict() for projection in self.projections],
        }
        sometimes: dict[str, Any] = {
            "tunings": [asdict(tuning) for tuning in self.tunings],
            "decisions": self.decisions,
            "rescaling": asdict(self.rescaling) if self.rescaling else None,
        }
        return values | {name: value for name, value in sometimes.items() if value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionReport:
        """What :meth:`to_dict` wrote, read back.

        Raises:
            CheckpointError: something is missing, unknown, of the wrong kind, or contradicts itself; the message names it.
        """
        told = {name: value for name, value in values.items() if name not in (*SUMS, "evaluations")}
        report: CompressionReport = read_as(cls, told, "report")
        report.calibration |= read_calibration(report.calibration)
        for before, after in read_evaluations(values.get("evaluations", [])):
            report.add_evaluation(before, after)
        check_projections(report.projections, compressed_roles(report.config))
        check_sums(values, {name: getattr(report, name) for name in SUMS})
        return report

    def kind_rows(self) -> list[list[str]]:
        """What :data:`KIND_HEADER` says of each kind of projection, of all that were to be compressed, and of the whole model."""
        kept = "unchanged" if self.config.bits is None else "rounded"
        rows = [_role_row(role, found, kept) for role in PROJECTIONS if (found := self.by_role(role))]
        total = self.params_saved / self.params_total_before if self.params_total_before else math.nan
        sums = [
            ("compressed", self.params_before, self.params_after, self.param_ratio),
            ("whole model", self.params_total_before, self.params_saved, total),
        ]
        return rows + [
            [name, f"{before:,}", f"{after:,}", f"{kept:.4f}", "", "", ""] for name, before, after, kept in sums
        ]

    def table(self) -> str:
        """The run on one screen: parameters, ranks, widths and errors by kind, time by stage, memory, perplexity."""
        lines = [format_table(KIND_HEADER, self.kind_rows()), ""]
        lines.append("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items()))
        lines.append(f"peak memory: {self.peak_memory_bytes / 1e9:.2f} GB")
        if self.peak_device_memory_bytes:
            lines.append(f"peak device memory: {self.peak_device_memory_bytes / 1e9:.2f} GB")
        lines += (
            self.decisions
            + rounding_lines(self)
            + expert_lines(self)
            + solver_lines(self)
            + storage_lines(self)
            + correction_lines(self.correction)
            + correction_lines(self.rescaling, "scale")
        )
        lines += evaluation_lines(self.evaluations)
        return "\n".join(lines)


def _role_row(role: str, found: Sequence[ProjectionReport], kept: str) -> list[str]:
    """A row of :data:`KIND_HEADER`; ``kept`` says what became of matrices that lost nothing before they were rounded."""
    before = sum(projection.params_before for projection in found)
    after = sum(projection.params_after for projection in found)
    errors = [projection.error for projection in found]
    ranks = [projection.rank for projection in found if projection.rank is not None]
    channel_axis = 1 if role == "down_proj" else 0
    width = _span([projection.shape_after[channel_axis] for projection in found]) if role in PROJECTIONS[4:] else ""
    spread = f"{min(errors):.4f} / {statistics.median(errors):.4f} / {max(errors):.4f}" if max(errors) else kept
    return [
        role,
        f"{before:,}",
        f"{after:,}",
        f"{after / before:.4f}",
        _span(ranks) if ranks else "dense",
        width,
        spread,
    ]


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def rounding_lines(report: CompressionReport) -> list[str]:
    """What whole blocks of a stock width removed beyond what was asked for."""
    asked, removed = report.config.sparsity, 1 - report.param_ratio
    if report.config.target != "stock" or report.config.has_byte_budget or not asked or removed - asked < TOLD_ROUNDING:
        return []
    width = report.by_role("down_proj")[0].shape_after[1]
    return [
        f"sparsity {asked:g} was asked for and {removed:.4f} removed: the FFN width {width:,} is made of whole blocks, which "
        "quantized formats need (--width-multiple 1 for every channel)"
    ]


def expert_lines(report: CompressionReport) -> list[str]:
    """What is to be known of experts: whether steps left them alone, widths are rounded, and how many saw too few tokens."""
    pruned = [projection for projection in report.by_role("down_proj") if projection.experts]
    few = {one.layer: sum(expert.by_all_tokens for expert in one.experts) for one in pruned}
    corrected = pruned and report.correction is not None and report.correction.taken
    lines = ["experts: correction steps moved attention alone"] if corrected else []
    asked, removed = report.config.sparsity, 1 - report.param_ratio
    if pruned and removed - asked >= TOLD_ROUNDING:
        lines.append(
            f"experts: sparsity {asked:g} was asked for and {removed:.4f} removed, since their widths are whole blocks, which "
            "grouped matmuls need"
        )
    if not any(few.values()):
        return lines
    total = sum(len(projection.experts) for projection in pruned)
    told = [
        f"layer {layer}: {count} of {len(one.experts)}"
        for one, (layer, count) in zip(pruned, few.items(), strict=True)
        if count
    ]
    more = f", and {len(told) - TOLD_LAYERS} layers more" if len(told) > TOLD_LAYERS else ""
    return [
        *lines,
        f"experts: {sum(few.values()):,} of {total:,} saw fewer than {FEW_TOKENS} tokens of a part of the calibration text "
        f"({'; '.join(told[:TOLD_LAYERS])}{more}), so they were judged on all tokens of their layers; more text reaches more of "
        "them",
    ]


def solver_lines(report: CompressionReport) -> list[str]:
    """Which methods found the factors, instead of which, and how far from the least error they can be."""
    solved = [projection for projection in report.projections if projection.solver]
    if not solved:
        return []
    counts = Counter(str(projection.solver) for projection in solved).most_common()
    methods = ", ".join(f"{count} by {solver}" for solver, count in counts)
    worst = max(projection.excess for projection in solved)
    return [f"factors: {methods}; errors proved to be within {worst:.1g} of the least possible"]


def storage_lines(report: CompressionReport) -> list[str]:
    """One sentence on what rounding the factors added, naming the worst projection; none where it is next to nothing."""

    def badness(projection: ProjectionReport) -> float:
        # Factors that overflow their dtype can give NaN, which compares as neither more nor less than anything.
        return math.inf if math.isnan(projection.storage_error) else projection.storage_error

    worst = max(report.projections, key=badness, default=None)
    if worst is None or badness(worst) <= TOLD_STORAGE_ERROR:
        return []
    dtype = report.environment.get("dtype", "the model's dtype")
    return [
        f"storing the factors in {dtype} adds at most {worst.storage_error:.2g} relative error "
        f"(layer {worst.layer}, {worst.role})"
    ]


def correction_lines(found: CorrectionReport | None, kind: str = "correction") -> list[str]:
    """How many correction steps were taken of how many, why, and how many windows would do where they were few."""
    if found is None:
        return []
    named = "correction" if kind == "correction" else f"{kind}s"
    told = f"{named}: {found.taken} of {found.asked} steps taken"
    if 0 < found.fraction < 1:
        told += f", {found.fraction:.0%} of their way"
    if found.before:
        now = " and ".join(f"{each:.4f}" for each in found.after) or "what is not finite"
        then = " and ".join(f"{each:.4f}" for each in found.before)
        folds = ", in each fold" if len(found.before) > 1 else ""
        told += (
            f"; on {found.unseen_tokens:,} tokens that were not calibrated on, the divergence from the dense model went from "
            f"{then} to {now} nats per token{folds}" + ("" if found.taken else ", so they were undone")
        )
    elif not found.enough:
        told += "; all windows were calibrated on, and none is left to judge steps by: give a longer text"
    few = shortage(found.windows, found.tried, found.asked, found.enough, kind) if found.enough else []
    return [told, *few]


def evaluation_lines(evaluations: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence per text."""
    lines = []
    for entry in evaluations:
        before, after = entry["before"], entry["after"]
        change = f"{before['perplexity']:.2f} -> " if before else ""
        rise = f" ({entry['increase_nats']:+.3f} nats per token)" if before else ""
        lines.append(
            f"perplexity on {entry['text']}: {change}{after['perplexity']:.2f}{rise}, "
            f"{after['tokens']:,} tokens, windows of {after['seq_len']}"
        )
    return lines


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns, the first to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, padded: bool = False) -> str:
    """The same in Markdown; ``padded`` to read well as it is."""
    widths = [max(len(row[column]) for row in [header, *rows]) if padded else 3 for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (max(width, 4) - 1) + ":" for width in widths[1:])]
    lines = []
    for row in [header, rule, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] if padded else row[1:]
        lines.append(f"| {' | '.join([row[0].ljust(widths[0] if padded else 0), *cells])} |")
    return "\n".join(lines)


def shortage(windows: int, tried: int, asked: int, enough: int, kind: str = "correction") -> list[str]:
    """One sentence where the windows are not enough for all steps, with the number that would be.

    Args:
        windows: of calibration.
        tried: steps that they were enough for.
        asked: steps that were wanted.
        enough: windows that would be enough for all steps.
        kind: of the steps.
    """
    if tried == asked:
        return []
    does = "1 calibration window suffices" if windows == 1 else f"{windows} calibration windows suffice"
    return [f"few windows: {does} for {tried} of {asked} {kind} steps; {enough} would for all"]
