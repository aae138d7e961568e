"""What :meth:`lorap.reports.run.CompressionReport.from_dict` asks of a ``lorap_report.json`` beyond the types of the entries.

The file comes from wherever the checkpoint came from. What is computed from it later, tables and charts, relies on these checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lorap.errors import CheckpointError
from lorap.jsonio import Count, read_as

TUNED_HEADER = ("nats per token on", "dense", "compressed", "tuned", "recovered")
# Entries that follow from the projections.
SUMS = ("params_before", "params_after", "param_ratio")


@dataclass(frozen=True)
class Evaluation:
    """Loss of one model on one text.

    Args:
        text: name of the text.
        nats: mean negative log-likelihood of a token, in nats.
        perplexity: exp(nats).
        tokens: tokens read, padding not counted.
        seq_len: tokens per window.
        seconds: wall time.
    """

    text: str
    nats: float
    perplexity: float
    tokens: Count
    seq_len: Count
    seconds: float


@dataclass(frozen=True)
class Share:
    """What one source of a mixture gave.

    Args:
        name: of the source, for reports.
        weight: as it was asked for; only ratios count.
        windows: drawn from this source.
    """

    name: str
    weight: float
    windows: Count


@dataclass(frozen=True)
class ExpertReport:
    """One projection of one expert.

    Args:
        tokens: of calibration that reached the expert.
        error: as that of a projection, on the tokens that it was judged on.
        by_all_tokens: too few reached it, so it was judged on all tokens of its layer, as if they had.
    """

    tokens: Count
    error: float
    by_all_tokens: bool


@dataclass(frozen=True)
class _Calibration:
    name: str
    windows: Count
    seq_len: Count
    tokens: Count
    sha256: str
    sources: list[Share] = field(default_factory=list)


@dataclass(frozen=True)
class _Evaluated:
    """The text and the increase follow from the rest."""

    after: Evaluation
    before: Evaluation | None = None
    text: str = ""
    increase_nats: float | None = None


@dataclass(frozen=True)
class TunedEvaluation:
    """Loss on one text before and after a training; of the dense model, and the share of the increase that is gone, if known."""

    text: str
    before: Evaluation
    after: Evaluation
    dense: Evaluation | None = None
    recovered: float | None = None

    def row(self) -> list[str]:
        """What :data:`TUNED_HEADER` says."""
        return [
            f"{self.text} ({self.after.tokens:,} tokens)",
            f"{self.dense.nats:.4f}" if self.dense else "",
            f"{self.before.nats:.4f}",
            f"{self.after.nats:.4f}",
            "" if self.recovered is None else f"{self.recovered:.1%}",
        ]


@dataclass(frozen=True)
class Tuning:
    """A training after the compression.

    Args:
        model: the folder that was tuned.
        summary: one sentence on what, how long and how.
        evaluations: one entry for each text.
    """

    model: str
    summary: str
    evaluations: list[TunedEvaluation] = field(default_factory=list)


def read_calibration(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``calibration`` that a page needs; others may stand beside them."""
    known = {entry.name: values[entry.name] for entry in fields(_Calibration) if entry.name in values}
    return asdict(read_as(_Calibration, known, "report.calibration"))


def read_evaluations(values: Any) -> Iterator[tuple[Evaluation | None, Evaluation]]:
    """Before and after, for each text."""
    for entry in read_as(list[_Evaluated], values, "report.evaluations"):
        yield entry.before, entry.after


def check_projections(projections: Sequence[Any], compressed: Sequence[str]) -> None:
    """Some are of the kinds that were ``compressed``, and none lies in a layer that there cannot be."""
    if not {projection.role for projection in projections} & set(compressed):
        raise CheckpointError(
            f"report.projections has none of {', '.join(compressed)}, which the config says were compressed"
        )
    last = max(projection.layer for projection in projections)
    if last >= len(projections):
        raise CheckpointError(f"report.projections has a layer {last}, but {len(projections)} entries")


def check_sums(told: Mapping[str, Any], found: Mapping[str, float]) -> None:
    """What the file says of all projections together is what they add up to."""
    for name, value in found.items():
        if told.get(name, value) != value:
            raise CheckpointError(
                f"report.{name} is {told[name]!r}, but the projections make it {value}; copy the file again"
            )
