"""Cells as files: reading and writing them, and the dense model's loss beside each compressed one's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lorap

DENSE = "dense"


def add_dense(folder: Path) -> None:
    """Write the dense model's loss beside each compressed one's, where the same text was measured; not while cells are made."""
    for record in read_cells(folder):
        before = json.dumps(record)
        with_dense(record, folder)
        if json.dumps(record) != before:
            write_json(folder / f"{record['name']}.json", record)


def with_dense(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``record`` with what is known of the dense model now."""
    dense = {_id(entry): entry["nats"] for entry in (read_json(folder / f"{DENSE}.json") or {"texts": []})["texts"]}
    if record["name"] != DENSE:
        for entry in record["texts"]:
            entry["dense_nats"] = dense.get(_id(entry))
    return record


def _id(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["text"], entry["tokens_asked"], entry["seq_len"], entry["sha256"]


def code_sha256() -> str:
    """Of the library's Python files, so that cells of different code can be told apart."""
    root = Path(lorap.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))).hexdigest()


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All cells of a folder."""
    return [record for path in sorted(folder.glob("*.json")) if (record := read_json(path))]


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    partial.replace(path)
