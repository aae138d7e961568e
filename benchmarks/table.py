"""Read what pytest-benchmark measured: one table per group, and a small file of medians and ratios for this machine.

    pytest benchmarks --benchmark-only --benchmark-json=run.json && python benchmarks/table.py run.json

``ratio`` is a row's median time over that of ``lorap`` in the same group: above 1 lorap is that many times as fast. GB/s are the
bytes a call must move over its time; ``of memory`` is their share of this machine's bandwidth, measured in the same run by a
copy and a sum. More than 100 % means that a part came from a cache. ``allocates`` is the most a call holds at once in new
tensors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorap.reports.run import format_table

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "lorap"


def read(run: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """group -> kind -> seconds of one call, ratio to ours, and what follows from bytes and FLOPs where they are known."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for benchmark in run["benchmarks"]:
        extra = benchmark["extra_info"]
        seconds = benchmark["stats"]["median"] / extra.get("calls", 1)
        row = {"seconds": seconds, "rounds": benchmark["stats"]["rounds"]}
        if extra.get("bytes"):
            row["gb_per_s"] = extra["bytes"] / seconds / 1e9
            row["share_of_bandwidth"] = extra["bytes"] / seconds / extra["bandwidth"]
        if extra.get("flops"):
            row["gflop_per_s"] = extra["flops"] / seconds / 1e9
        if extra.get("tokens"):
            row["tokens_per_s"] = extra["tokens"] / seconds
        row |= {key: extra[key] for key in ("weight_bytes", "allocated_bytes") if key in extra}
        groups.setdefault(benchmark["group"] or benchmark["name"], {})[benchmark["params"]["kind"]] = row
    for rows in groups.values():
        for row in rows.values():
            if OURS in rows:
                row["ratio"] = row["seconds"] / rows[OURS]["seconds"]
    return groups


def table(groups: dict[str, dict[str, dict[str, float]]]) -> str:
    """Every group under its name, with the columns that it has."""
    parts = []
    for group, rows in groups.items():
        used = [name for name in COLUMNS if any(name in row for row in rows.values())]
        cells = [
            [kind, *(COLUMNS[name][1](row[name]) if name in row else "" for name in used)] for kind, row in rows.items()
        ]
        parts += [group, format_table(["", *(COLUMNS[name][0] for name in used)], cells), ""]
    return "\n".join(parts)


def duration(seconds: float) -> str:
    """Three significant digits, in us, ms or s."""
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * scale:.3g} {unit}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("median", duration),
    "ratio": ("ratio", "{:.2f}".format),
    "gb_per_s": ("GB/s", "{:.1f}".format),
    "share_of_bandwidth": ("of memory", "{:.0%}".format),
    "gflop_per_s": ("GFLOP/s", "{:.1f}".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "weight_bytes": ("weights", lambda size: f"{size / 1e6:.1f} MB"),
    "allocated_bytes": ("allocates", lambda size: f"{size / 1e6:.2f} MB"),
}


def machine(run: dict[str, Any]) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = run["machine_info"]["cpu"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "machine": gpu or cpu.get("brand_raw") or run["machine_info"]["machine"],
        "cores": cpu.get("count"),
        "threads": _first_extra(run, "threads"),
        "torch": torch.__version__,
        "triton": triton_version,
        "date": run["datetime"][:10],
        "bandwidth": _first_extra(run, "bandwidth"),
    }


def _first_extra(run: dict[str, Any], key: str) -> Any:
    return next((one["extra_info"][key] for one in run["benchmarks"] if key in one["extra_info"]), None)


def slug(name: str) -> str:
    """A file name: lower case, with single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def compact(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians, ratios and memory; four significant digits are more than a timing has."""
    keys = ("seconds", "ratio", "weight_bytes", "allocated_bytes")
    return {kind: {key: float(f"{row[key]:.4g}") for key in keys if key in row} for kind, row in rows.items()}


def write(
    folder: Path, found: dict[str, Any], groups: dict[str, dict[str, dict[str, float]]], *, force: bool = False
) -> Path:
    """One line per group, so that two runs compare well in a diff.

    A file that is there holds what documents say; unless forced, this run gets the first number that is free.
    """
    lines = [f"  {json.dumps(group)}: {json.dumps(compact(rows))}" for group, rows in groups.items()]
    name = slug(found["machine"])
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    path = next(path for path in (folder / f"{name}.json" for name in names) if force or not path.exists())
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"machine": {json.dumps(found)},\n"groups": {{\n' + ",\n".join(lines) + "\n}}\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="file written by --benchmark-json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the small file")
    parser.add_argument("--force", action="store_true", help="write over the file of an earlier run on such a machine")
    arguments = parser.parse_args()
    run = json.loads(arguments.run.read_text())
    groups, found = read(run), machine(run)
    print(table(groups))
    bandwidth = f", {found['bandwidth'] / 1e9:.1f} GB/s of memory" if found["bandwidth"] else ""
    print(f"{found['machine']}, {found['threads']} threads, torch {found['torch']}{bandwidth}")
    print(f"written to {write(arguments.out, found, groups, force=arguments.force)}")


if __name__ == "__main__":
    main()
