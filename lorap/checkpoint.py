"""Writing and inspecting Hugging Face folders.

A folder appears complete or not at all: everything is written into a hidden folder beside it, which is renamed at the end.
Nothing here unpickles: weights are safetensors or they are refused.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorap.card import model_card
from lorap.errors import CheckpointError
from lorap.report import CompressionReport

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT = "lorap_report.json"
# safetensors itself refuses larger headers.
MAX_HEADER_BYTES = 100_000_000
# Room for config, tokenizer, card and report beside the weights.
SPARE_BYTES = 32 * 2**20


# ----------------------------------------------------------------------------------------------------------------------
# Writing


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
        (stage / REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
        (stage / "README.md").write_text(model_card(report), "utf-8")
    return out


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
        _share(stage)
        _replace(stage, out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write {out}: {_reason(error, out)}; nothing was left there") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _share(folder: Path) -> None:
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


def _reason(error: Exception, out: Path) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in str(error) or "File too large" in str(error):
        free = shutil.disk_usage(_existing_parent(out)).free
        return f"the disk is full or a quota is reached ({free / 1e6:,.0f} MB free)"
    return str(error)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


# ----------------------------------------------------------------------------------------------------------------------
# Inspecting


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its header alone.

    Args:
        dtype: as safetensors spells it.
        shape: of the tensor.
        nbytes: on disk.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_guard(self) -> bool:
        """The one-element tensor that keeps hosts without lorap from loading a low-rank layer (lorap/modules.py)."""
        return self.shape == (1,)

    @property
    def is_index(self) -> bool:
        """Row numbers such as ``pivot_rows``: bytes on disk, but nothing that was trained."""
        return self.dtype == "I64"

    @property
    def is_parameter(self) -> bool:
        """True for what counts as a parameter wherever lorap reports one: neither guard nor index."""
        return not self.is_guard and not self.is_index


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each checked to be there.

    Raises:
        CheckpointError: the folder holds no safetensors weights, or the index names files that are missing.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = sorted(set(index["weight_map"].values())) if isinstance(index.get("weight_map"), dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{folder / INDEX} has no usable weight_map")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} is incomplete: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}"
            )
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which lorap never opens; convert them to safetensors"
        )
    raise CheckpointError(f"{folder} is incomplete: it has no {WEIGHTS} and no {INDEX}")


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder, from the headers alone.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        tensors |= read_header(path)
    return tensors


def stored_parameters(folder: Path) -> int:
    """Parameters of a model folder, counted on what is stored; errors as :func:`read_tensors`."""
    return sum(tensor.numel for tensor in read_tensors(folder).values() if tensor.is_parameter)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking that the file is as long as its header says.

    Raises:
        CheckpointError: the file is truncated or corrupt.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if end != size:
                raise ValueError(f"the header describes {end:,} bytes, the file has {size:,}")
            return {
                name: TensorInfo(
                    dtype=entry["dtype"],
                    shape=tuple(int(length) for length in entry["shape"]),
                    nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {error}; download or copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
