"""Writing Hugging Face folders.

A folder appears complete or not at all: everything is written into a hidden folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorap.card import model_card
from lorap.errors import CheckpointError
from lorap.folders import stored_parameters
from lorap.page import write_page
from lorap.report import CompressionReport

REPORT = "lorap_report.json"
# Room for config, tokenizer, card and report beside the weights.
SPARE_BYTES = 32 * 2**20


def save(
    model: Any,
    out: str | Path,
    *,
    report: CompressionReport,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a compressed model as a Hugging Face folder: config, safetensors, tokenizer, model card and report.

    Args:
        model: what :func:`lorap.compress` returned.
        out: a new or empty folder; with ``overwrite`` an existing one is replaced.
        report: what :func:`lorap.compress` returned; written to ``lorap_report.json`` and told in the model card.
        tokenizer: saved beside the model where given.
        overwrite: replace an existing folder, at the end and in one step.
        max_shard_size: largest safetensors file.

    Raises:
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
    """
    out = Path(out)
    start = time.perf_counter()
    needed_bytes = model.get_memory_footprint() + SPARE_BYTES
    with staged_folder(out, overwrite=overwrite, needed_bytes=needed_bytes) as stage:
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        saved = stored_parameters(stage)
        if saved != report.params_saved:
            raise CheckpointError(f"{saved:,} parameters reached the disk, but the model has {report.params_saved:,}")
        report.seconds["save"] = time.perf_counter() - start
        write_reports(report, stage)
    return out


def write_reports(report: CompressionReport, folder: Path) -> None:
    """What the run did, for programs and for people."""
    (folder / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(model_card(report), "utf-8")
    write_page(report, folder)


def check_output(
    out: str | Path, *, source: Path | None = None, overwrite: bool = False, needed_bytes: int = 0
) -> None:
    """Refuse an output folder before hours of work go into it.

    Raises:
        CheckpointError: it is not empty, would touch the source model, cannot be written, or the disk is too full.
    """
    out = Path(out)
    if source is not None:
        inside, origin = out.resolve(), source.resolve()
        if inside == origin or origin in inside.parents or inside in origin.parents:
            raise CheckpointError(f"output {out} overlaps the source model {source}; choose a folder outside it")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"output {out} is a file; choose a new folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"output {out} is not empty; choose a new folder or pass --overwrite")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"no permission to write into {parent}; choose another output folder")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"the disk of {out} has {free / 1e6:,.0f} MB free and the compressed model needs about {needed_bytes / 1e6:,.0f} MB"
        )


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` if the block succeeds and vanishes if it does not."""
    check_output(out, overwrite=overwrite, needed_bytes=needed_bytes)
    stage = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".incomplete", dir=out.parent))
        yield stage
        share(stage)
        _replace(stage, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {out}: {reason(error, out)}; nothing was left there") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def share(folder: Path) -> None:
    """Give everything the permissions of ordinary new files; temporary folders and safetensors are private at first."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def _replace(stage: Path, out: Path) -> None:
    if not out.exists():
        stage.rename(out)
        return
    retired = stage.with_suffix(".replaced")
    out.rename(retired)
    try:
        stage.rename(out)
    except OSError:
        retired.rename(out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def reason(error: Exception, out: Path) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(_existing_parent(out)).free
        return f"the disk is full or a quota is reached ({free / 1e6:,.0f} MB free)"
    return str(error)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
