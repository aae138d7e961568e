"""Tables, verdicts and a picture of paper.py, from its cells. A cell that was not made is shown as "-"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from cells import SEQ_LEN, Cell
from documents import markdown
from matplotlib.figure import Figure
from records import DENSE
from table import Cells, mean, number
from tasks import answers, difference, percent

from lorap.evaluation.tasks.results import average, estimate
from lorap.reports.plots import INK, SERIES, STYLE, save

# Nats per token. What 4,096 tokens a text do not tell apart; the losses of larger texts are surer than that.
TIE = 0.01
Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One choice of the paper's recipe, and what else could be chosen.

    Args:
        title: as a heading.
        variants: by label, options that differ from the paper's recipe; ``sparsity`` and ``calibration`` count as options.
        chosen: the label that the paper uses because it found it best; empty where it makes no claim.
        lengths: tokens per window, of those that variants are judged at.
    """

    title: str
    variants: Mapping[str, Mapping[str, Any]]
    chosen: str = ""
    lengths: tuple[int, ...] = (SEQ_LEN,)

    def cells(self, usual: Mapping[str, Any], *, windows: int) -> dict[str, Cell]:
        """The cell of each variant; ``usual`` are sparsity and calibration where the variant does not say."""
        found = {}
        for label, variant in self.variants.items():
            options = {**usual, **variant}
            named = {name: options.pop(name) for name in usual}
            found[label] = Cell(recipe="lorap", windows=windows, overrides=options, **named)
        return found


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Args:
        records: cells by name.
        tasks: records of tasks.py by name; empty where none were asked.
        texts: in the order of the columns.
        tokens: asked for of each text.
        published: perplexities of the paper on this model by sparsity label, ``dense`` first, and text; empty where unknown.
    """

    records: Mapping[str, Record]
    tasks: Mapping[str, Record]
    texts: Sequence[str]
    tokens: int
    published: Mapping[str, Mapping[str, float]]

    @cached_property
    def _cells(self) -> Cells:
        return Cells(self.records.values())

    def losses(self, cell: Cell, length: int) -> pd.Series:
        """Nats per token over the dense model, by text; NaN where it was not measured."""
        found = self._cells.increase(cell.recipe_name, cell.sparsity, cell.calibration, (self.tokens, length))
        return found.reindex(self.texts)

    def perplexity(self, name: str, text: str, length: int) -> float:
        for entry in self.records.get(name, {"texts": []})["texts"]:
            if (entry["text"], entry["tokens_asked"], entry["seq_len"]) == (text, self.tokens, length):
                return math.exp(entry["nats"])
        return math.nan


def study_table(study: Study, cells: Mapping[str, Cell], results: Results) -> str:
    """Perplexity and increase in nats by text and window length, their mean, what was kept, and tasks where asked."""
    # One model alone is compared with nothing.
    with_tasks = len({cell.name for cell in cells.values()} & set(results.tasks)) > 1
    columns = [(length, text) for length in study.lengths for text in results.texts]
    header = ["", *(text if len(study.lengths) == 1 else f"{text}, windows of {length}" for length, text in columns)]
    header += [f"mean{'' if len(study.lengths) == 1 else f', {length}'}" for length in study.lengths]
    header += ["kept", *(["tasks", "over dense"] if with_tasks else [])]
    rows = [_dense_row(study, columns, results, with_tasks)]
    for label, cell in cells.items():
        losses = {length: results.losses(cell, length) for length in study.lengths}
        row = [f"**{label}**" if label == study.chosen else label]
        for length, text in columns:
            loss = losses[length][text]
            row.append(f"{number(results.perplexity(cell.name, text, length), '.2f')} ({number(loss)})")
        row += [number(mean(losses[length])) for length in study.lengths]
        record = results.records.get(cell.name)
        row.append("-" if record is None else f"{record['param_ratio']:.4f}")
        rows.append([*row, *(_task_columns(cell.name, results) if with_tasks else [])])
        rows += _published_rows(label, columns, len(header), results)
    return markdown(header, rows)


def _dense_row(study: Study, columns: Sequence[tuple[int, str]], results: Results, tasks: bool) -> list[str]:
    shown = [number(results.perplexity(DENSE, text, length), ".2f") for length, text in columns]
    return [DENSE, *shown, *[""] * len(study.lengths), "1", *([_task_columns(DENSE, results)[0], ""] if tasks else [])]


def _published_rows(label: str, columns: Sequence[tuple[int, str]], width: int, results: Results) -> list[list[str]]:
    """The paper's own row of this label, where it is known; its increases are over its own dense model."""
    found, dense = results.published.get(label), results.published.get(DENSE)
    if found is None or dense is None:
        return []
    row = [f"{label}, published"]
    for length, text in columns:
        known = length == SEQ_LEN and text in found
        row.append(f"{found[text]:.2f} ({number(math.log(found[text] / dense[text]))})" if known else "-")
    return [[*row, *[""] * (width - len(row))]]


def _task_columns(name: str, results: Results) -> list[str]:
    """Mean accuracy in percent, and the paired difference from the dense model."""
    record, dense = results.tasks.get(name), results.tasks.get(DENSE)
    if record is None:
        return ["-", "-"]
    accuracies = [estimate(right) for task in record["tasks"] if (right := answers(record, task))]
    found = [difference(record, dense, task) for task in record["tasks"]] if dense else [None]
    return [percent(average(accuracies)), percent(None if None in found else average(found), "+.1f")]


def verdict(study: Study, cells: Mapping[str, Cell], results: Results) -> str:
    """Whether the paper's choice loses least here too, in a sentence; empty where the paper makes no claim."""
    losses = {label: mean(results.losses(cell, SEQ_LEN)) for label, cell in cells.items()}
    if not study.chosen:
        return ""
    if any(map(math.isnan, losses.values())):
        return "Not all variants were measured, so nothing is said about the paper's choice."
    ours = losses.pop(study.chosen)
    best = min(losses, key=losses.__getitem__)
    ahead = losses[best] - ours
    told = f"{study.chosen} loses {number(ours)} nats per token, the best of the others, {best}, {number(losses[best])}"
    if not ahead:
        return f"**Makes no difference here**: {study.chosen} and {best} give the same losses. {_worst(losses)}"
    if abs(ahead) < TIE:
        return f"**Not told apart here**: {told}, and less than {TIE} is not told apart on so little text."
    return f"**The paper's choice {'holds' if ahead > 0 else 'does not hold'} here**: {told}."


def _worst(losses: Mapping[str, float]) -> str:
    worst = max(losses, key=losses.__getitem__)
    return f"The worst is {worst}, {number(losses[worst])}."


def render(studies: Mapping[str, Study], cells: Mapping[str, Mapping[str, Cell]], results: Results) -> str:
    """All studies, one after the other."""
    parts = []
    for name, study in studies.items():
        found = [f"### {study.title}", study_table(study, cells[name], results), verdict(study, cells[name], results)]
        parts += [part for part in found if part]
    return "\n\n".join(parts)


def draw(
    studies: Mapping[str, Study], cells: Mapping[str, Mapping[str, Cell]], results: Results, picture: Path
) -> None:
    """Mean increase of each variant, one panel per study; the paper's choice in its own colour."""
    columns = min(4, len(studies))
    lines = math.ceil(len(studies) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.5 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, (name, study) in zip(axes, studies.items(), strict=False):
            losses = [mean(results.losses(cell, SEQ_LEN)) for cell in cells[name].values()]
            colours = [SERIES[0] if label == study.chosen else INK for label in cells[name]]
            bars = axis.bar(list(cells[name]), losses, color=colours)
            axis.bar_label(bars, [number(one, ".2f") for one in losses], fontsize=7)
            axis.set_title(study.title)
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0, labelrotation=25 if len(cells[name]) > 3 else 0)
            axis.margins(y=0.15)
        for axis in axes[len(studies) :]:
            axis.set_visible(False)
        figure.supylabel("nats per token over dense", fontsize=9)
        save(figure, picture)
