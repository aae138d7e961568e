"""Writing a compressed model as a Hugging Face folder: config, weights, tokenizer, report and card."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.checkpoint import host_keys
from lorap.checkpoint.folders import CONFIG, read_tensors, stored_parameters
from lorap.checkpoint.write import write_model, write_settings
from lorap.errors import CheckpointError
from lorap.files import reason
from lorap.jsonio import read_json, write_json
from lorap.outputs import staged_folder
from lorap.reports.html.page import write_page
from lorap.reports.model_card import CARD, model_card, opened_as
from lorap.reports.run import REPORT, CompressionReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Room for config, tokenizer, card and report beside the weights.
SPARE_BYTES = 32 * 2**20


def save(
    model: PreTrainedModel,
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
        report: what :func:`lorap.compress` returned; written to ``lorap_report.json`` and described in the model card.
        tokenizer: saved beside the model where given.
        overwrite: replace an existing folder, at the end and in one step.
        max_shard_size: largest safetensors file, such as ``5GB``, ``500MiB`` or a number of bytes.

    Raises:
        CheckpointError: the folder is taken, or cannot be written; then nothing is left behind.
    """
    out = Path(out)
    start = time.perf_counter()
    needed_bytes = model.get_memory_footprint() + SPARE_BYTES
    with staged_folder(out, overwrite=overwrite, needed_bytes=needed_bytes) as stage:
        write_model(model, stage, max_shard_size=max_shard_size)
        host_keys.complete(stage, tokenizer)
        check_saved(stage, report)
        report.seconds["save"] = time.perf_counter() - start
        write_reports(report, stage)
    return out


def check_saved(folder: Path, report: CompressionReport) -> None:
    """Refuse a folder that holds other parameters than the report tells of, or more bytes than were asked for.

    Raises:
        CheckpointError: with both numbers.
    """
    saved = stored_parameters(folder)
    if saved != report.params_saved:
        raise CheckpointError(f"{saved:,} parameters reached the disk, but the model has {report.params_saved:,}")
    size = report.config.size
    if size is not None and (stored := sum(tensor.nbytes for tensor in read_tensors(folder).values())) > size:
        raise CheckpointError(f"the weights take {stored:,} bytes, more than the {size:,} that were asked for")


def try_settings(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write what stands beside the weights into a new folder, for nothing, so that it does not fail after hours of work.

    Args:
        model: gives the configs.
        tokenizer: None where there is none.
        folder: new, or empty; the caller removes it.

    Raises:
        CheckpointError: config, generation config or tokenizer cannot be saved.
    """
    what = "configs"
    try:
        folder.mkdir(exist_ok=True)
        write_settings(model, folder)
        what = "tokenizer"
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder.parent}: {reason(error, folder)}; make room there, or choose another output"
        ) from error
    except Exception as error:  # a tokenizer runs code of its own, which may raise anything
        told = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"the {what} of this model cannot be saved: {type(error).__name__}: {told}; mend that in the model's folder first"
        ) from error


def write_reports(report: CompressionReport, folder: Path) -> None:
    """What the run did, for programs and for people."""
    write_json(folder / REPORT, report.to_dict())
    (kind,) = read_json(folder / CONFIG)["architectures"]
    (folder / CARD).write_text(opened_as(model_card(report), kind), "utf-8")
    write_page(report, folder)
