"""What gpu_check.sh found: one page for people, one JSON file, and a plain list of everything that did not run.

    python benchmarks/gpu_report.py DIR

DIR holds STEP.jsonl, the rows of each step, and steps.tsv: name, exit code, seconds and limit of each step. Everything goes to
DIR/report.txt and DIR/report.json; what is printed is at most LINES lines of it, the most important first.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

LINES = 100
CUT_OFF = (124, 137, -9)  # exit codes of a step that ran out of time
CHECKS = ("self-check", "values", "graphs", "program", "sanitizer")
LAYER_STEPS = ("timings", "timings-cuda")
ALL_STEPS = (
    *(
        "environment",
        "build",
        "program",
        "sanitizer",
        "compile",
        "self-check",
        "self-check-cuda",
        "values",
        "values-cuda",
    ),
    *(
        "graphs",
        "graphs-cuda",
        *LAYER_STEPS,
        "merged",
        "merged-cuda",
        "quantized",
        "quantized-cuda",
        "trellis",
        "launches",
        "squares",
        "out-dtype",
        "factorization",
    ),
    *("sweep-compile", "sweep", "models", "layer"),
)
SILENT = ("compile", "sweep-compile")  # whose rows say only that something ran


def read(work: Path) -> dict[str, dict[str, Any]]:
    """step -> how it ended, and its rows."""
    ended = {}
    if (work / "steps.tsv").is_file():
        for line in (work / "steps.tsv").read_text().splitlines():
            name, code, seconds, limit = line.split("\t")
            ended[name] = {"exit_code": int(code), "seconds": int(seconds), "limit": int(limit)}
    steps = {}
    for name in ALL_STEPS:
        rows = work / f"{name}.jsonl"
        if name not in ended and not rows.is_file():
            continue
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
        steps[name] = {"state": _state(ended.get(name)), **ended.get(name, {}), "rows": found}
    return steps


def _state(ended: dict[str, int] | None) -> str:
    if ended is None:
        return "never started"
    if ended["exit_code"] in CUT_OFF:
        return "cut off at its limit"
    if ended["exit_code"] < 0:
        return "not started: no time was left" if ended["exit_code"] == -1 else "not part of a dry run"
    return "finished" if ended["exit_code"] == 0 else f"failed with exit code {ended['exit_code']}"


def page(steps: dict[str, dict[str, Any]], *, dry_run: bool) -> list[str]:
    """Everything, a line each: what was wrong first."""
    lines = ["DRY RUN on a CPU with tiny sizes: no number below means anything."] if dry_run else []
    lines += summary(steps)
    for name, step in steps.items():
        rows = step["rows"]
        if name in LAYER_STEPS:
            continue
        lines.append(f"== {name}: {step['state']}" + (f", {step['seconds']} s" if "seconds" in step else ""))
        if name in SILENT:
            lines += _rows([row for row in rows if "not_run" in row and row["not_run"] != "no GPU"])
        elif name == "sweep":
            lines += _rows(_fastest(rows))
        else:
            lines += _checks(rows) if name.startswith(CHECKS) else _rows(rows)
    timed = [f"{name}: {steps[name]['state']}" for name in LAYER_STEPS if name in steps]
    return [*lines, *([f"== one layer, us (predicted), {'; '.join(timed)}", *_layers(steps)] if timed else [])]


def _fastest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each shape the modelled settings, which come first, and the fastest."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["tokens"]), []).append(row)
    found = []
    for (shape, tokens), some in groups.items():
        timed = [row for row in some if "us" in row]
        if timed:
            best = min(timed, key=lambda row: row["us"])
            found.append(
                {"shape": shape, "tokens": tokens, "modelled": some[0].get("us"), "best": best["us"]}
                | {name: best[name] for name in ("error", "shrink", "expand")}
            )
    return found


def _layers(steps: dict[str, dict[str, Any]]) -> list[str]:
    """A line per shape and number of tokens, a column per way; below it why columns have gaps."""
    rows = [row for name in LAYER_STEPS if name in steps for row in steps[name]["rows"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        time = f"{row['us']:.1f} ({row['predicted_us']:.1f})" if "us" in row else "-"
        line = found.setdefault((row["shape"], row["tokens"]), {})
        line[row["kind"]] = time
        if "error" in row:
            line["worst error"] = f"{max(row['error'], float(line.get('worst error', 0))):.1e}"
    lines = [
        {"shape": shape, "M": tokens} | {kind: times.get(kind, "") for kind in (*kinds, "worst error")}
        for (shape, tokens), times in found.items()
    ]
    reasons = Counter((row["kind"], row["not_run"]) for row in rows if "not_run" in row)
    return _rows(lines) + [f"{kind}: {count} not run: {reason}" for (kind, reason), count in reasons.items()]


def _checks(rows: list[dict[str, Any]]) -> list[str]:
    """Per op, backend and dtype how many passed, and each failure in full."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in ("op", "backend", "dtype")), []).append(row)
    lines = []
    for key, found in groups.items():
        ran = [row for row in found if "ok" in row]
        errors = [row["error"] for row in ran if "error" in row]
        worst = f", largest relative error {max(errors):.2g}" if errors else ""
        reasons = Counter(row["not_run"] for row in found if "not_run" in row)
        absent = "".join(f"; {count} not run: {reason}" for reason, count in reasons.items())
        lines.append(f"{' '.join(key).strip():<58} {sum(row['ok'] for row in ran)} of {len(ran)} right{worst}{absent}")
    return lines


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    """A line per row, numbers to the right; a row that did not run says why."""
    names = list(dict.fromkeys(key for row in rows for key in row if key != "not_run"))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max([len(name), *(len(line[i]) for line in cells)]) for i, name in enumerate(names)]
    lines = ["  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True))] if rows else []
    for row, line in zip(rows, cells, strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        lines.append(text + (f"  NOT RUN: {row['not_run']}" if "not_run" in row else ""))
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(steps: dict[str, dict[str, Any]]) -> list[str]:
    """What was wrong, and what is not known."""
    rows = [row for step in steps.values() for row in step["rows"]]
    wrong = sum(row.get("ok") is False for row in rows)
    right = sum(row.get("ok") is True for row in rows)
    absent = sum("not_run" in row for row in rows)
    lines = [f"{right} checks right, {wrong} WRONG, {absent} rows not run"]
    lines += [f"    WRONG: {json.dumps(row)}" for row in rows if row.get("ok") is False][:20]
    unfinished: dict[str, list[str]] = {}
    for name, step in steps.items():
        if step["state"] != "finished":
            unfinished.setdefault(step["state"], []).append(name)
    return lines + [f"steps that are {state}: {', '.join(names)}" for state, names in unfinished.items()]


def finish(work: Path, *, dry_run: bool) -> bool:
    """Write and print what is in ``work``; whether a value was wrong."""
    steps = read(work)
    gpu = next(
        (row.get("found") for row in steps.get("environment", {"rows": []})["rows"] if row["what"] == "GPU"), None
    )
    lines = [f"  {json.dumps(name)}: {json.dumps(step)}" for name, step in steps.items()]
    head = f'{{"gpu": {json.dumps(gpu)}, "dry_run": {json.dumps(dry_run)}, "steps": {{\n'
    (work / "report.json").write_text(head + ",\n".join(lines) + "\n}}\n")
    everything = page(steps, dry_run=dry_run)
    (work / "report.txt").write_text("\n".join(everything) + "\n")
    shown = everything if len(everything) < LINES else everything[: LINES - 2]
    left = [f"... {len(everything) - len(shown)} lines more in the report"] if len(shown) < len(everything) else []
    print("\n".join([*(line[:240] for line in shown), *left, f"written to {work}"]), flush=True)
    return any(row.get("ok") is False for step in steps.values() for row in step["rows"])


def main() -> int:
    """1 where a value was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    return int(finish(arguments.work, dry_run=arguments.dry_run))


if __name__ == "__main__":
    raise SystemExit(main())
