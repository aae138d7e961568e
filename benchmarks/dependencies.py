"""Fill docs/dependencies.md in: of each dependency the installed version, its licence, its megabytes, and how long it imports.

    python benchmarks/dependencies.py            all rows
    python benchmarks/dependencies.py NAME ...   these, beside torch, which the times are compared with

The words are the document's own. A dependency of pyproject.toml without a row there, or the other way round, is an error.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "dependencies.md"
ROW = re.compile(r"^\| `([\w-]+)` \| (.*) \|$", re.MULTILINE)


def floors() -> dict[str, str]:
    """The lowest version of each dependency in pyproject.toml, by name."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    return {name.replace("_", "-"): least for name, least in re.findall(r'"([\w-]+)(?:\[\w+\])?[>=]=([\d.]+)"', text)}


def licence(dist: Distribution) -> str:
    """As an SPDX expression where the package gives one."""
    named = dist.metadata.get("License-Expression") or dist.metadata.get("License") or ""
    classes = [one.split(" :: ")[-1] for one in dist.metadata.get_all("Classifier") or () if one.startswith("License")]
    return named if 0 < len(named) < 40 else (classes or ["see the package"])[0]


def megabytes(dist: Distribution) -> float:
    """What its files take, those of its own dependencies not counted."""
    paths = (Path(str(dist.locate_file(file))) for file in dist.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def import_seconds(name: str) -> float | None:
    """Processor time of a fresh interpreter that imports it; None for what is no module."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = f"import {name.replace('-', '_')}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return None if done.returncode else after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    least, text, empty = floors(), DOCUMENT.read_text("utf-8"), import_seconds("sys") or 0.0
    torch_seconds = (import_seconds("torch") or 1.0) - empty
    if odd := sorted({name for name, _ in ROW.findall(text)} ^ least.keys()):
        raise SystemExit(f"{', '.join(odd)}: either in pyproject.toml or in {DOCUMENT.name}, and not in both")

    def filled(row: re.Match[str]) -> str:
        name, words = row[1], row[2].split(" | ")[:2]
        if sys.argv[1:] and name not in sys.argv[1:]:
            return row[0]
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            print(f"{name} is not installed; its row stays", file=sys.stderr)
            return row[0]
        seconds = import_seconds(name)
        share = "" if seconds is None else f"{max(0.0, seconds - empty) / torch_seconds:.2f}"
        cells = [*words, least[name], dist.version, licence(dist), f"{megabytes(dist):,.1f}", share]
        return f"| `{name}` | {' | '.join(cells)} |"

    DOCUMENT.write_text(ROW.sub(filled, text), "utf-8")


if __name__ == "__main__":
    main()
