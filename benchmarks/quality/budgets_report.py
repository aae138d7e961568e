"""What budgets.py found: a table, a table of what was wanted, and a picture of loss over bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bits
import matplotlib as mpl
import numpy as np
from documents import insert, markdown
from matplotlib.figure import Figure
from records import DENSE, read_cells
from texts import assets

from lorap.compression.budget import Candidate, lower_hull
from lorap.reports.plots import INK, MARKERS, SERIES, STYLE, save

Record = Mapping[str, Any]
LABELS = {"wiki": "encyclopedia", "web": "web pages", "news": "newswire", "wells": "a novel", "python": "reference"}
TITLES = {
    "gptq": "GPTQ, {} bits, groups of 64",
    "ggml": "llama.cpp {}",
    "shuffled": "llama.cpp {}, channels shuffled",
    "across": "llama.cpp {}, channels shuffled, blocks across rows",
    "lorap": "**lorap, budget of {} bits**",
    "codes": "lorap, budget of {} bits, codes alone",
    "mixed": "lorap, budget of {} bits, int4 and int8",
    "int4": "lorap, budget of {} bits, int4 alone",
    "sparsity": "lorap, sparsity {}, all int4",
}
# Who is who in the picture.
SERIES_NAMES = {
    "lorap": "lorap, under a budget",
    "codes": "lorap, codes on a trellis",
    "mixed": "lorap, int4 and int8",
    "int4": "lorap, int4 and sparsity",
    "sparsity": "lorap, at a sparsity, int4",
    "ggml": "llama.cpp",
    "shuffled": "llama.cpp, channels shuffled",
    "across": "the same, if blocks went across rows",
    "gptq": "GPTQ, groups of 64",
}
# Types with a scale and a least value for each 32 numbers: what the model was stored in before, Q4_1, is nearly or wholly among
# what they can say. Not counted as contenders unless channels are shuffled first.
FLATTERED = {"Q4_1", "Q4_K", "Q5_1", "Q5_K"}
OPENED = ("ggml", "shuffled", "gptq")
# Wanted at these budgets and above: an increase of at most so much more than the best dense model's of the same size, ...
FROM, MORE = 4.5, 0.02
# ... at this one, and so below, at most so large a share of it, ...
AT, SHARE = 3.5, 0.5
# ... and of 8 bits at most so much in any model.
INT8 = 0.01
PICTURE = "budgets.svg"


def increases(record: Record, dense: Record) -> dict[str, float]:
    """In nats per token, by text."""
    return {text: nats - dense["losses"][text] for text, nats in record["losses"].items()}


def mean_increase(record: Record, dense: Record) -> float:
    """Over the texts."""
    return float(np.mean(list(increases(record, dense).values())))


def standard_error(record: Record, dense: Record) -> float | None:
    """Of the mean increase, from the differences of single windows: both models find the same ones hard."""
    if "by_window" not in record:
        return None
    variances = []
    for text, ours in record["by_window"].items():
        differences = np.subtract(ours, dense["by_window"][text])
        variances.append(differences.var(ddof=1) / len(differences))
    return float(np.sqrt(np.sum(variances)) / len(variances))


def points(cells: Mapping[str, Record], *kinds: str) -> list[tuple[float, float, str]]:
    """Bits, mean increase and name of the cells of these kinds, by bits."""
    found = [name for name in cells if name.partition("-")[0] in kinds]
    return sorted((cells[name]["bits"], mean_increase(cells[name], cells[DENSE]), name) for name in found)


def best_at(contenders: list[tuple[float, float, str]], size: float) -> float | None:
    """What the contenders reach with ``size`` bits: on their lower hull, between two as if some matrices were of either.

    Args:
        contenders: bits, increase and name.
        size: bits; where there are none as small, the answer is None.
    """
    hull = lower_hull([Candidate(size=0, params=bits, cost=loss) for bits, loss, _ in contenders])  # type: ignore[arg-type]
    if not hull or size < hull[0].params:
        return None
    return float(np.interp(size, [each.params for each in hull], [each.cost for each in hull]))


def table(cells: Mapping[str, Record]) -> str:
    """Everything, by size."""
    dense, rows = cells[DENSE], []
    for size, mean, name in points(cells, *TITLES):
        kind, _, which = name.partition("-")
        each = [f"{found:+.3f}" for found in increases(cells[name], dense).values()]
        size_mb = f"{cells[name]['decoder_bytes'] / 1e6:.1f}"
        error = standard_error(cells[name], dense)
        told = f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        rows.append([TITLES[kind].format(which), made(cells[name]), f"{size:.2f}", size_mb, *each, told])
    return markdown(
        ["", "what it is", "bits", "MB", *(LABELS.get(text, text) for text in dense["losses"]), "mean"], rows
    )


def made(record: Record) -> str:
    """What llama.cpp or lorap chose."""
    if kinds := record.get("types"):
        return ", ".join(f"{share:.0%} {kind}" for kind, share in sorted(kinds.items(), key=lambda one: -one[1]))
    if "weights" not in record:
        return ""
    kinds = {"mixed": "int4 and int8", "tcq": "codes of several bits"}
    bits = kinds.get(record["weights"], record["weights"])
    return (
        f"{record['sparsity']:.0%} of the bytes removed, {bits}" if record["sparsity"] else f"nothing removed, {bits}"
    )


def targets(cells: Mapping[str, Record], rounded: Mapping[str, Record]) -> str:
    """What was wanted, and what is.

    Args:
        cells: of this benchmark.
        rounded: of bits.py, with models before and after they were rounded to 8 bits.
    """
    fair = {
        name: cell for name, cell in cells.items() if not name.startswith("ggml") or not (FLATTERED & {*cell["types"]})
    }
    opened, all_of_them = points(fair, *OPENED), points(fair, *OPENED, "across")
    rows = []
    for size, mean, name in points(cells, "lorap", "mixed", "codes", "sparsity"):
        kind, _, which = name.partition("-")
        rivals = [best_at(opened, size), best_at(all_of_them, size)]
        shown = ["none so small" if rival is None else f"{rival:+.3f}" for rival in rivals]
        title = f"{size:.1f} bits by sparsity {which}"
        if kind != "sparsity":
            title = f"{float(which):g} bits" + {"codes": ", codes alone", "mixed": ", int4 and int8"}.get(kind, "")
        rows.append([title, f"{mean:+.3f}", *shown, *verdict(size, mean, rivals)])
    changes = [
        found["nats"] - before["nats"]
        for name, record in rounded.items()
        if (f"{name}-int8") in rounded
        for found, before in zip(rounded[f"{name}-int8"]["losses"], record["losses"], strict=True)
    ]
    if changes:
        met = "yes" if max(changes) <= INT8 else "no"
        rows.append(["int8 in place of bfloat16", f"{max(changes):+.3f} at most", "", "", f"at most {INT8} more", met])
    header = ["lorap", "increase", "best dense one of the size", "with blocks across rows too", "wanted", "met"]
    return markdown(header, rows)


def verdict(size: float, mean: float, rivals: list[float | None]) -> tuple[str, str]:
    """What is wanted of a size in bits, and whether it is so beside the dense models that hosts open, and beside all."""
    if round(size, 1) >= FROM:
        wanted = f"at most {MORE} more"
        met = [None if rival is None else mean - rival <= MORE for rival in rivals]
    elif round(size, 1) <= AT:
        wanted = f"at most {SHARE} times as much"
        met = [None if rival is None else mean <= SHARE * rival for rival in rivals]
    else:
        return "", ""
    words = {True: "yes", False: "no", None: "-"}
    told = list(dict.fromkeys(words[each] for each in met))
    return wanted, " / ".join(told)


def draw(cells: Mapping[str, Record], picture: Path) -> None:
    """Mean increase over bits."""
    with mpl.rc_context(STYLE | {"lines.markersize": 5}):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axis = figure.subplots()
        found = {kind: of_kind for kind in SERIES_NAMES if (of_kind := points(cells, kind))}
        assert len(found) <= len(SERIES), f"{len(SERIES)} colours for {len(found)} series"
        for (kind, of_kind), colour, marker in zip(found.items(), SERIES, MARKERS, strict=False):
            sizes, losses, names = zip(*of_kind, strict=True)
            line = {"linewidth": 2.2} if kind == "lorap" else {"linestyle": "none"}
            face = "none" if kind == "across" else colour
            axis.plot(
                sizes, losses, marker=marker, color=colour, markerfacecolor=face, label=SERIES_NAMES[kind], **line
            )
            for size, loss, name in zip(sizes, losses, names, strict=True):
                offset, side = ((-4, -10), "right") if kind == "lorap" else ((5, 3), "left")
                text = name.partition("-")[2]
                axis.annotate(
                    text, (size, loss), xytext=offset, textcoords="offset points", fontsize=6.5, color=colour, ha=side
                )
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.01, linscale=0.4)
        ticks = [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axis.set_yticks([], minor=True)
        axis.set_ylim(bottom=-0.004)
        axis.set_xlabel("bits on disk for each weight of the dense decoder layers")
        axis.set_ylabel("loss over the dense model, nats per token")
        texts = ", ".join(LABELS.get(text, text) for text in cells[DENSE]["losses"])
        axis.set_title(f"SmolLM2-135M-Instruct, mean of {texts}:\nlower and further left is better")
        axis.legend()
        save(figure, picture)


def write(cells: Mapping[str, Record], folder: Path, document: Path | None = None) -> None:
    """Tables into docs/results.md, and the picture into the folder; nothing where the dense model is not measured."""
    if DENSE not in cells:
        return
    # Cells from other texts or windows than the dense model's are left from another time.
    given = cells[DENSE].get("sources")
    cells = {name: record for name, record in cells.items() if record.get("sources") == given}
    document = document or assets.CACHE.parent / "docs" / "results.md"
    insert(document, "budgets", table(cells))
    insert(document, "budget targets", targets(cells, {each["cell"]: each for each in read_cells(bits.OUT)}))
    draw(cells, folder.parent / PICTURE)
