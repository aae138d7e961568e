"""What tuning after compression did: its own report, and what the model card says about it.

A tuned model must not pass for an untuned one. The report of the compression keeps its numbers from before, and says what was
trained afterwards, as the page and the model card do; all of it is in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorap.jsonio import read_as
from lorap.reports.model_card import said_as_tuned
from lorap.reports.records import TUNED_HEADER, Evaluation, TunedEvaluation, Tuning
from lorap.reports.run import CompressionReport, format_table

# Steps that the first and the last loss of a training are means of.
LOSS_STEPS = 10
# Two measurements of one model on one text differ by less, also where one computed in 16 bits.
SAME_NATS = 0.02


@dataclass
class RecoveryReport:
    """One training; ``lorap_recovery.json`` holds the same.

    Args:
        model: the compressed model that was tuned.
        settings: all that was asked for.
        text: name, windows, seq_len, tokens and sha256 of what it was to be trained on; ``sources`` with name, weight and
            windows.
        params: parameters of the model, the same before and after.
        steps: of the optimizer.
        tokens: seen in training, padding included.
        training_seconds: spent on these steps, in all runs together.
        losses: mean training loss of the first and of the last steps, in nats per token.
        evaluations: by text, the loss ``before`` and ``after``, that of the ``dense`` model where it is known, and then
            ``recovered``, the share of the increase that is gone.
        seconds: of the last run, by stage.
        peak_memory_bytes: high-water mark of the process.
        environment: versions, device, dtype and thread count.
    """

    model: str
    settings: dict[str, Any]
    text: dict[str, Any]
    params: int
    steps: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    losses: tuple[float, float] = (0.0, 0.0)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    environment: dict[str, Any] = field(default_factory=dict)

    def add_training(self, losses: Sequence[float], seconds: float, *, tokens_per_step: int) -> None:
        """Record what the training did, step by step."""
        first, last = losses[:LOSS_STEPS], losses[-LOSS_STEPS:]
        self.steps, self.tokens, self.training_seconds = len(losses), len(losses) * tokens_per_step, seconds
        self.losses = (sum(first) / len(first), sum(last) / len(last))

    def add_evaluation(self, dense: Evaluation | None, before: Evaluation, after: Evaluation) -> None:
        """Record the loss on one text."""
        recovered = None
        if dense is not None and before.nats > dense.nats:
            recovered = (before.nats - after.nats) / (before.nats - dense.nats)
        entry = {"text": after.text, "before": asdict(before), "after": asdict(after)}
        self.evaluations.append({**entry, "dense": asdict(dense) if dense else None, "recovered": recovered})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["seconds"] = {stage: round(seconds, 3) for stage, seconds in self.seconds.items()}
        return values

    def summary(self) -> str:
        """One sentence: on what it was tuned, how long, and how."""
        asked = self.settings
        learned = f", from the predictions of {asked['teacher']}" if asked["teacher"] else ""
        return (
            f"Tuned after compression on {self.text['name']}{learned}: {self.steps:,} steps and {self.tokens:,} tokens in "
            f"{self.training_seconds / 60:.1f} minutes, with adapters of rank {asked['rank']} on {asked['modules']} projections, "
            f"merged; learning rate {asked['learning_rate']:g}, {asked['batch_size']} windows of {asked['seq_len']} tokens a "
            f"step, seed {asked['seed']}, {asked['precision']}."
        )

    def table(self) -> str:
        """The training on one screen."""
        lines = [self.summary(), f"training loss: {self.losses[0]:.3f} -> {self.losses[1]:.3f}"]
        lines.append(f"parameters: {self.params:,} before and after")
        lines.append("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items()))
        lines.append(f"peak memory: {self.peak_memory_bytes / 1e9:.2f} GB")
        if self.evaluations:
            lines += ["", self.evaluation_table()]
        return "\n".join(lines)

    def evaluation_table(self) -> str:
        """Nats per token by text."""
        return format_table(TUNED_HEADER, [entry.row() for entry in self.record().evaluations])

    def record(self) -> Tuning:
        """What the report of the compression says of it from now on."""
        return Tuning(self.model, self.summary(), read_as(list[TunedEvaluation], self.evaluations, "evaluations"))


def dense_evaluation(compression: CompressionReport | None, compressed: Evaluation) -> Evaluation | None:
    """What the report of the compression says of the dense model on a text; None where it was not measured on that text.

    Args:
        compression: what ``lorap_report.json`` says; None where it cannot be read.
        compressed: the compressed model on the text. Names of texts say little, so its loss must be the one in the report.
    """
    if compression is None:
        return None
    found = [
        (entry["before"] and Evaluation(**entry["before"]), Evaluation(**entry["after"]))
        for entry in compression.evaluations
    ]
    found += [(entry.dense, entry.after) for tuning in compression.tunings for entry in tuning.evaluations]
    for dense, after in found:
        same = (after.text, after.tokens, after.seq_len) == (compressed.text, compressed.tokens, compressed.seq_len)
        if dense and same and abs(after.nats - compressed.nats) < SAME_NATS:
            return dense
    return None


def tuned_card(card: str, report: RecoveryReport) -> str:
    """The model card of a tuned model, from the card of the compressed one; a short one where ``card`` is empty."""
    measured = f"\n```\n{report.evaluation_table()}\n```\n" if report.evaluations else ""
    about = f"## Tuned after compression\n\n{report.summary()}\n{measured}\n"
    if not card.strip():
        return f"---\nlibrary_name: transformers\ntags:\n- lorap\n---\n\n# {report.model}, tuned\n\n{about}"
    card = said_as_tuned(card)
    card = card.replace("## Quality\n", f"{about}## Quality before tuning\n", 1)
    return card if about in card else f"{card.rstrip()}\n\n{about}"
