"""Measurements of a comparison as files: one process, one cell, one JSON file, and none that is there is made again."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorap.calibration import places
from lorap.checkpoint.load import ModelSource
from lorap.evaluation.comparison.worker import SPEED, TASKS, TEXTS
from lorap.version import __version__

# What a part depends on besides the model.
DEPENDS_ON = {
    TEXTS: ("texts", "seq_len", "max_tokens", "device", "dtype"),
    TASKS: ("tasks", "task_data", "limit", "device", "dtype"),
    SPEED: ("prompt_tokens", "new_tokens", "optimize", "device", "dtype"),
}


@dataclass(frozen=True)
class Cells:
    """The cells of one comparison.

    Args:
        work: their folder.
        options: the fields of :class:`lorap.evaluation.comparison.compare.ComparisonOptions`.
        text_hashes: of the windows of each text.
    """

    work: Path
    options: dict[str, Any]
    text_hashes: Sequence[str]

    def path(self, source: ModelSource, part: str, number: int = 0) -> Path:
        """Named by what it depends on, so that a cell of other options or files is never taken for this one.

        Args:
            source: the model.
            part: ``texts``, ``tasks`` or ``speed``.
            number: of the round, for speed.
        """
        key: list[Any] = [_stamp(source), __version__, {name: self.options[name] for name in DEPENDS_ON[part]}]
        if part == TEXTS:
            key.append(self.text_hashes)
        if part == SPEED:
            key.append(torch.get_num_threads())
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        name = "".join(character if character.isalnum() or character in "-._" else "_" for character in source.name)
        return self.work / f"{name}-{part}{number or ''}-{digest}.json"

    def make(self, model: str, source: ModelSource, part: str, number: int = 0) -> str | None:
        """Measure where there is no cell yet.

        Args:
            model: as on the command line.
            source: where it is.
            part: ``texts``, ``tasks`` or ``speed``.
            number: of the round, for speed.

        Returns:
            Why there is none, in a sentence, or None.
        """
        path = self.path(source, part, number)
        if path.exists():
            return None
        return run_worker({"part": part, "model": model, "options": self.options, "out": str(path)})

    def read(self, source: ModelSource, part: str, number: int = 0) -> dict[str, Any]:
        """What a cell holds.

        Args:
            source: the model.
            part: ``texts``, ``tasks`` or ``speed``.
            number: of the round, for speed.
        """
        found: dict[str, Any] = json.loads(self.path(source, part, number).read_text("utf-8"))
        return found


def run_worker(request: dict[str, Any]) -> str | None:
    """One process to its end; None where it wrote its cell, else what it said last."""
    command = [
        sys.executable,
        "-m",
        "lorap.evaluation.comparison.worker",
        json.dumps(request | {"pipes": places.copies()}),
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        hint = ", as happens when memory runs out" if done.returncode == -signal.SIGKILL else ""
        return f"its process was ended by signal {-done.returncode}{hint}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"its process ended with exit code {done.returncode}"


def _stamp(source: ModelSource) -> list[Any]:
    """What tells a model's files from others under the same name, without reading weights."""
    assert source.folder is not None
    files = [source.folder / source.gguf_file] if source.gguf_file else sorted(source.folder.iterdir())
    kept = [path.stat() for path in files if path.suffix in (".gguf", ".safetensors", ".json")]
    return [str(source.folder.resolve()), *([stat.st_size, stat.st_mtime_ns] for stat in kept)]
