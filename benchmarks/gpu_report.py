"""What gpu_check.sh found: one table for people, one JSON file, and a plain list of everything that did not run.

    python benchmarks/gpu_report.py DIR [--out FILE]

DIR holds STEP.jsonl, the rows of each step, and steps.tsv: name, exit code, seconds and limit of each step.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from table import slug

RESULTS = Path(__file__).resolve().parent / "results"
CUT_OFF = (124, 137)  # exit codes of timeout
ALL_STEPS = (
    "build",
    "environment",
    "self-check",
    "self-check-cuda",
    "values",
    "values-cuda",
    "graphs",
    "graphs-cuda",
    "timings",
    "timings-cuda",
    "merged",
    "launches",
    "squares",
    "out-dtype",
    "factorization",
    "sanitizer",
    "compiled",
)
LAYER_STEPS = ("timings", "timings-cuda", "compiled")


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


def report(steps: dict[str, dict[str, Any]], *, dry_run: bool) -> str:
    """Everything, as text."""
    lines = ["DRY RUN on a CPU with tiny sizes: no number below means anything."] if dry_run else []
    for name, step in steps.items():
        lines.append(f"\n== {name}: {step['state']}" + (f", {step['seconds']} s" if "seconds" in step else ""))
        if name not in LAYER_STEPS:
            lines += (
                _checks(step["rows"]) if name.startswith(("self-check", "values", "graphs")) else _rows(step["rows"])
            )
    lines += ["\n== one layer, us, with the prediction in brackets", *_layers(steps)]
    return "\n".join([*lines, "", *summary(steps)])


def _layers(steps: dict[str, dict[str, Any]]) -> list[str]:
    """A line per shape and number of tokens, a column per way; below it why columns have gaps."""
    rows = [row for name in LAYER_STEPS for row in steps[name]["rows"]]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("shape", "K", "R", "N", "tokens"))
        time = f"{row['us']:.1f} ({row['predicted_us']:.1f})" if "us" in row else "-"
        found.setdefault(key, {})[row["kind"]] = time
    lines = [
        dict(zip(("shape", "K", "R", "N", "tokens"), key, strict=True)) | {kind: times.get(kind, "") for kind in kinds}
        for key, times in found.items()
    ]
    reasons = Counter((row["kind"], row["not_run"]) for row in rows if "not_run" in row)
    return _rows(lines) + [f"{kind}: {count} not run: {reason}" for (kind, reason), count in reasons.items()]


def _checks(rows: list[dict[str, Any]]) -> list[str]:
    """Per op, backend and dtype how many passed, and each failure in full."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["backend"], row.get("dtype", "")), []).append(row)
    lines = []
    for key, found in groups.items():
        ran = [row for row in found if "ok" in row]
        errors = [row["error"] for row in ran if "error" in row]
        worst = f", largest relative error {max(errors):.2g}" if errors else ""
        reasons = Counter(row["not_run"] for row in found if "not_run" in row)
        absent = "".join(f"; {count} not run: {reason}" for reason, count in reasons.items())
        lines.append(f"{' '.join(key).strip():<58} {sum(row['ok'] for row in ran)} of {len(ran)} right{worst}{absent}")
        lines += [f"    WRONG: {json.dumps(row)}" for row in ran if not row["ok"]]
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
    unfinished = [f"{name} ({step['state']})" for name, step in steps.items() if step["state"] != "finished"]
    lines = [f"{right} checks right, {wrong} WRONG, {absent} rows not run"]
    return lines + ([f"steps that did not finish: {'; '.join(unfinished)}"] if unfinished else [])


def main() -> int:
    """1 where a value was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file  [default: benchmarks/results/<gpu>-check.json]")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    steps = read(arguments.work)
    print(report(steps, dry_run=arguments.dry_run))
    wrong = any(row.get("ok") is False for step in steps.values() for row in step["rows"])
    gpu = next((row["found"] for row in steps["environment"]["rows"] if row["what"] == "GPU" and "found" in row), None)
    if arguments.out is None and gpu is None:
        print("not saved: no GPU was seen, and no --out given")
        return int(wrong)
    out = arguments.out or RESULTS / f"{slug(gpu)}-check.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(step)}" for name, step in steps.items()]
    out.write_text(
        f'{{"gpu": {json.dumps(gpu)}, "dry_run": {json.dumps(arguments.dry_run)}, "steps": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )
    print(f"written to {out}")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
