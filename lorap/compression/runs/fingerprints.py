"""What a run depends on, in hashes: options, texts, model files. And one look at every weight before any work is done."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorap.calibration.mixtures import Sources, weighted_sources
from lorap.calibration.places import located
from lorap.calibration.sources import Source, is_packaged, source_name
from lorap.calibration.windows import hash_ids
from lorap.checkpoint.finite import count_not_finite, refuse_not_finite
from lorap.checkpoint.load import ModelSource
from lorap.checkpoint.paging import offloaded_tensors
from lorap.checkpoint.stored_tensors import Stamp, StoredTensor, stored_tensors
from lorap.compression.runs.journal import Journal
from lorap.errors import JournalError
from lorap.files import hash_files
from lorap.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_STEP = "weights"
# Files of a model folder, besides weights, that decide on what comes out.
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja")


def identity_of(
    source: ModelSource, config: Mapping[str, Any], calibration: Sources, evaluation: Iterable[Source], **more: Any
) -> dict[str, Any]:
    """Everything but the weights that a run depends on, for :func:`lorap.compression.runs.journal.check_identity`.

    Args:
        source: the model.
        config: the fields of the config.
        calibration: sources, with weights where they have any.
        evaluation: texts to judge by.
        more: what else the bytes depend on, such as device and dtype.

    Returns:
        Names and hashes, as JSON holds them.
    """
    weighted = weighted_sources(calibration, own_samples=True)
    return {
        "lorap": __version__,
        "torch": torch.__version__,
        "option": dict(config),
        "calibration": _by_name((f"{source_name(text)} x {weight:g}", digest(text)) for text, weight in weighted),
        "evaluation": _by_name((source_name(text), digest(text)) for text in evaluation),
        "model": {"name": source.name, **_small_files(source)},
        **more,
    }


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Hashes by name; texts of one name, such as two pipes, are told apart by their order."""
    found: dict[str, str] = {}
    for name, value in pairs:
        found[name] = f"{found[name]} {value}" if name in found else value
    return found


def digest(source: Source) -> str:
    """A hash of a text's file or of tokens; of a name where there is no file. What was read from a pipe counts, not its name."""
    if isinstance(source, Tensor):
        return hash_ids(source)
    if isinstance(source, Mapping):
        return " ".join(digest(source[name]) for name in sorted(source))
    if not is_packaged(str(source)) and (place := located(source)) is not None:
        if not place.path.is_dir():
            return f"{hash_files(place.path)} {place.field}".strip()
        inside = {path.relative_to(place.path): path for path in sorted(place.path.rglob("*")) if path.is_file()}
        parts = [f"{name}: {hash_files(path)}" for name, path in inside.items()]
        return " ".join([*parts, place.config, place.split, place.field]).strip()
    return hashlib.sha256(str(source).encode()).hexdigest()


def check_weights(journal: Journal, source: ModelSource, model: PreTrainedModel, *, progress: bool) -> None:
    """Read every weight once: refuse NaN and infinity, and files other than those that the run began with.

    Files of the size and time that they had then are not read again.

    Args:
        journal: of the run.
        source: where the files are.
        model: from :func:`lorap.checkpoint.load.load_model`, which has looked for NaN where it is not paged.
        progress: show a progress bar on stderr.

    Raises:
        JournalError: a weight file is another one than when the run began.
        CheckpointError: a file cannot be read, or a tensor in it has NaN or infinity, in the dtype that it is read in.
    """
    tensors, paged = (source.checked.tensors if source.checked else {}), _paged_dtypes(model)
    # Files may have other names for them than the model.
    dtypes = {stored.name: paged[name] for name, stored in tensors.items() if name in paged}
    files = source.weight_files
    stamps = {path.name: [Stamp.of(path).size, Stamp.of(path).mtime_ns] for path in files}
    before = journal.read(WEIGHTS_STEP) if journal.has(WEIGHTS_STEP) else None
    if before is not None and before["stamps"] == stamps:
        return
    hashes = {}
    with tqdm(
        desc="Checking", unit="B", unit_scale=True, total=sum(size for size, _ in stamps.values()), disable=not progress
    ) as bar:
        for path in files:
            hashes[path.name] = _look_through(path, dtypes, bar)
    for name, stored in tensors.items():
        if name in paged and stored.parts != (stored,):  # of several tensors: each may be finite, and the weight not
            refuse_not_finite(name, count_not_finite(stored.read().to(paged[name])), paged[name])
    if before is not None and before["hashes"] != hashes and not journal.processes.broadcast(journal.has_layers()):
        journal.begin_anew()
    elif before is not None and before["hashes"] != hashes:
        other = sorted({*hashes.items()} ^ {*before["hashes"].items()})[0][0]
        raise JournalError(
            f"{other} is not the file that this run began with; bring that back, or pass --restart to throw away what was done"
        )
    journal.keep(WEIGHTS_STEP, {"stamps": stamps, "hashes": hashes})


def _paged_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """By name, the dtype in which each weight comes from the files when it is used; nothing for a model that is in memory."""
    if offloaded_tensors(model.get_input_embeddings()) is None:
        return {}
    return {name: weight.dtype for name, weight in model.named_parameters(remove_duplicate=False)}


def _look_through(path: Path, dtypes: Mapping[str, torch.dtype], bar: Any) -> str:
    """sha256 of a file; its weights are checked on the way where it is one of safetensors, and after it in a pickle."""
    if path.suffix != ".safetensors":
        bar.update(path.stat().st_size)
        for stored in stored_tensors(path).values() if path.suffix == ".bin" else ():
            if stored.name in dtypes:
                bad = sum(_not_finite(piece, stored, dtypes) for _, piece in stored.pieces())
                refuse_not_finite(stored.name, bad, dtypes[stored.name])
        return hash_files(path)
    tensors = sorted(stored_tensors(path).values(), key=lambda stored: stored.info.offset)
    first = min((stored.info.offset for stored in tensors), default=path.stat().st_size)
    with path.open("rb") as file:
        sha = hashlib.sha256(file.read(first))
    for stored in tensors:
        bad = 0
        for _, piece in stored.pieces():
            sha.update(piece.numpy().data)
            bad += _not_finite(piece, stored, dtypes)
            bar.update(len(piece))
        if bad:
            refuse_not_finite(stored.name, bad, dtypes[stored.name])
    return sha.hexdigest()


def _not_finite(piece: Tensor, stored: StoredTensor, dtypes: Mapping[str, torch.dtype]) -> int:
    """In a piece of what the model uses, as it uses it: a number that fits the file may not fit its dtype."""
    if stored.name not in dtypes or not stored.dtype.is_floating_point:
        return 0
    return count_not_finite(piece.view(stored.dtype).to(dtypes[stored.name]))


def _small_files(source: ModelSource) -> dict[str, str]:
    if source.folder is None or source.gguf_file:
        return {}
    found = {path for pattern in SMALL_FILES for path in source.folder.glob(pattern) if path.is_file()}
    return {path.name: hash_files(path) for path in sorted(found)}
