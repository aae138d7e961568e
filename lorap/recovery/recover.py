"""``recover()``: a short training after compression, which changes numbers and nothing else.

source folder -> windows of text -> adapters on the compressed layers -> training -> merged into a copy of the weight files

Adapters (LoRA, by PEFT) sit on both factors of low-rank projections, on the pruned FFN, and on projections that stayed dense.
Merged, each is an addition to a matrix that is there already, so ranks, widths, parameters and the format of the checkpoint stay.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorap.architectures import ATTENTION, MLP, PROJECTIONS, known_architecture
from lorap.calibration.mixtures import Sources, check_sources
from lorap.calibration.self_text import sample_windows
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.calibration.windows import TokenWindows, consecutive_windows
from lorap.checkpoint.folders import read_json, read_tensors, stored_parameters
from lorap.checkpoint.load import (
    ModelSource,
    check_tokenizer,
    dtype_name,
    find_model,
    load_model,
    load_tokenizer,
    resolve_device,
)
from lorap.checkpoint.save import SPARE_BYTES
from lorap.checkpoint.validate import CONFIG, lorap_config
from lorap.errors import CheckpointError, ConfigError
from lorap.evaluation.perplexity import evaluate
from lorap.files import hash_files
from lorap.nn.linear import LowRankLinear, embedding_weight
from lorap.nn.low_rank_tensors import FACTORS
from lorap.outputs import WorkFolder, check_output, work_folder
from lorap.recovery.files import STATE, merge_into_copy, state_folder
from lorap.recovery.report import RecoveryReport, dense_evaluation, tuned_card
from lorap.recovery.text import training_windows
from lorap.recovery.training import (
    SAVE_SECONDS,
    TuningConfig,
    add_adapters,
    autocast_dtype,
    hold_weights,
    require_peft,
    train,
)
from lorap.reports.html.page import write_page
from lorap.reports.run import PAGE, RECOVERY_REPORT, REPORT, CompressionReport
from lorap.system import Stopwatch, describe_environment, peak_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of each evaluation text, as when a model is compressed.
EVALUATION_TOKENS = 4096
EVALUATION_SEQ_LEN = 128
MODULES = {"all": PROJECTIONS, "attention": ATTENTION, "ffn": MLP}


@dataclass(frozen=True)
class Recovery:
    """What to tune, and on what; how is in ``tuning``.

    Args:
        text: what to train on, as the calibration of :func:`lorap.compress`; shorter texts are read several times.
        teacher: a folder or name of the dense model; its predictions are then learned instead of the text itself.
        modules: ``all`` projections, those of the ``attention``, or those of the ``ffn``.
        dtype: of the frozen weights while training; adapters are float32. What is stored keeps the checkpoint's dtype.
        tuning: steps, learning rate and the like.

    Raises:
        ConfigError: ``modules`` is unknown.
    """

    text: Sources = DEFAULT_CALIBRATION
    teacher: str | Path | None = None
    modules: str = "all"
    dtype: str = "float32"
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        if self.modules not in MODULES:
            raise ConfigError(f"modules is {self.modules!r}; choose from {', '.join(MODULES)}")


def recover(
    folder: str | Path,
    out: str | Path,
    recovery: Recovery | None = None,
    *,
    evaluation: Sequence[Source] = (),
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    save_seconds: float = SAVE_SECONDS,
    progress: bool = True,
) -> RecoveryReport:
    """Tune the compressed model in ``folder`` and write the result to ``out``; the source folder is only read.

    While it runs, its state is in the hidden work folder of ``out`` (:mod:`lorap.outputs`). After an interruption or a kill the
    same call goes on from there, and ends with the same weights as if it had not been stopped, unless ``minutes`` limits it.

    Args:
        folder: what :func:`lorap.save` wrote.
        out: a new or empty folder; with ``overwrite`` an existing one is replaced, at the end and in one step.
        recovery: what to tune, on what, and how.
        evaluation: texts to measure the loss on before and after.
        device: where to train.
        overwrite: replace an existing folder.
        restart: forget the state of an earlier run.
        save_seconds: between two writings of the state.
        progress: show bars on stderr.

    Raises:
        ConfigError: peft is missing, a setting is out of range, or other settings than those of the run to be resumed.
        CheckpointError: a folder cannot be read or written.
        CalibrationError: a text cannot be used.
        ArchitectureError: the model is of an unknown family.
        JournalError: another process is writing ``out``.
    """
    require_peft()
    watch, where = Stopwatch(), resolve_device(device)
    recovery = _settled(recovery or Recovery(), where)
    check_sources(recovery.text, *evaluation)
    source, origin = _local(folder)
    teacher = None if recovery.teacher is None else find_model(recovery.teacher)
    needed_bytes = sum(tensor.nbytes for tensor in read_tensors(origin).values()) + SPARE_BYTES
    check_output(out, source=origin, overwrite=overwrite, needed_bytes=needed_bytes)
    with work_folder(out) as work:
        with watch("load"):
            run = _gather(source, origin, teacher, recovery, evaluation, where, progress)
        settings = _settings(recovery, teacher)
        report = RecoveryReport(source.name, settings, _describe(run.windows), stored_parameters(origin))
        report.environment = describe_environment(where, recovery.dtype)
        made_from = _made_from(source, teacher, run.windows)
        with state_folder(work, settings | made_from, restart=restart) as state:
            _tune_and_write(run, recovery, work, state / STATE, report, watch, save_seconds, progress)
            shutil.rmtree(state, ignore_errors=True)
    return report


def target_names(model: PreTrainedModel, modules: str = "all") -> list[str]:
    """Full names of the linear layers to tune: both factors of a low-rank projection, a dense one itself.

    Raises:
        ArchitectureError: the family is unknown.
    """
    architecture, names = known_architecture(model, to="tune"), []
    for index in range(len(architecture.decoder_layers(model))):
        for role in MODULES[modules]:
            name = architecture.module_name(index, role)
            factors = isinstance(model.get_submodule(name), LowRankLinear)
            names += [f"{name}.{factor}" for factor in FACTORS] if factors else [name]
    return names


def _settled(recovery: Recovery, device: torch.device) -> Recovery:
    """With the precision that this machine gives ``auto`` and one name for the dtype, so that a run is resumed as it began."""
    dtype = autocast_dtype(recovery.tuning.precision, device)
    tuning = replace(recovery.tuning, precision="float32" if dtype is None else "bfloat16")
    return replace(recovery, tuning=tuning, dtype=dtype_name(recovery.dtype))


def _local(folder: str | Path) -> tuple[ModelSource, Path]:
    source = find_model(folder)
    if source.folder is None or source.gguf_file:
        raise CheckpointError(
            f"{folder} is no folder of safetensors files; `recover` tunes what `lorap compress` wrote"
        )
    settings = lorap_config(read_json(source.folder / CONFIG))
    if settings is not None and settings.weights == "int8":
        raise CheckpointError(
            f"the weights of {source.name} are int8, and adapters cannot be merged into them; tune the folder it was made from, "
            "then quantize that (lorap.quantize_int8)"
        )
    # With --target stock the config says nothing, but there is a report.
    if settings is None and not (source.folder / REPORT).is_file():
        raise CheckpointError(
            f"{source.name} is not compressed by lorap, and `recover` gets back some of what `lorap compress` cost a model: "
            f"compress it first (lorap compress {folder} OUT), then tune OUT"
        )
    return source, source.folder


@dataclass(frozen=True)
class _Run:
    """What a run works with; ``origin`` is the model's folder, ``names`` are the layers to tune, ``texts`` those to judge by."""

    origin: Path
    model: PreTrainedModel
    teacher: Any
    names: list[str]
    windows: TokenWindows
    texts: list[TokenWindows]


def _gather(
    source: ModelSource,
    origin: Path,
    teacher_source: ModelSource | None,
    recovery: Recovery,
    evaluation: Sequence[Source],
    device: torch.device,
    progress: bool,
) -> _Run:
    model, tokenizer = load_model(source, dtype=recovery.dtype, device=device), load_tokenizer(source)
    check_tokenizer(tokenizer, _vocab_size(model))
    names = target_names(model, recovery.modules)
    teacher = _open_teacher(teacher_source, recovery, model, device)
    windows = _training_windows(recovery, tokenizer, model, teacher, progress)
    texts = [_evaluation_windows(text, tokenizer, model) for text in evaluation]
    return _Run(origin, model, teacher, names, windows, texts)


def _tune_and_write(
    run: _Run,
    recovery: Recovery,
    work: WorkFolder,
    state: Path,
    report: RecoveryReport,
    watch: Stopwatch,
    save_seconds: float,
    progress: bool,
) -> None:
    """The tuned model in its place."""
    with watch("evaluate"):
        dense = [None if run.teacher is None else evaluate(run.teacher, text, progress=progress) for text in run.texts]
        before = [evaluate(run.model, text, progress=progress) for text in run.texts]
    with watch("tune"):
        tuned = _tune(run, recovery, state, save_seconds, report, progress)
    with work.staged() as stage:
        with watch("merge"):
            model = merge_into_copy(tuned, run.names, run.origin, stage)
        with watch("evaluate"):
            for text, reference, old in zip(run.texts, dense, before, strict=True):
                reference = reference or dense_evaluation(_compression(run.origin), old)
                report.add_evaluation(reference, old, evaluate(model, text, progress=progress))
        report.seconds, report.peak_memory_bytes = watch.seconds, peak_memory_bytes()
        _write_report(stage, report)


def _tune(
    run: _Run, recovery: Recovery, state: Path, save_seconds: float, report: RecoveryReport, progress: bool
) -> Any:
    """The model with trained adapters; the report learns how it went."""
    tuning = recovery.tuning
    tuned = add_adapters(run.model, run.names, rank=tuning.rank, seed=tuning.seed)
    if tuning.precision == "bfloat16":
        hold_weights(tuned.get_base_model(), run.names, torch.bfloat16)
        if run.teacher is not None:
            hold_weights(run.teacher, target_names(run.teacher), torch.bfloat16)
    done = train(
        tuned, run.windows, tuning, teacher=run.teacher, state=state, save_seconds=save_seconds, progress=progress
    )
    report.add_training(done.losses, done.seconds, tokens_per_step=tuning.tokens_per_step)
    return tuned


def _open_teacher(source: ModelSource | None, recovery: Recovery, model: PreTrainedModel, device: torch.device) -> Any:
    if source is None:
        return None
    teacher = load_model(source, dtype=recovery.dtype, device=device).requires_grad_(False)
    if _vocab_size(teacher) != _vocab_size(model):
        raise ConfigError(
            f"the teacher {recovery.teacher} has {_vocab_size(teacher):,} tokens and the model {_vocab_size(model):,}; "
            "give the dense model that was compressed"
        )
    return teacher


def _training_windows(
    recovery: Recovery, tokenizer: Any, model: PreTrainedModel, teacher: Any, progress: bool
) -> TokenWindows:
    tuning = recovery.tuning

    def write(count: int, seq_len: int, seed: int) -> torch.Tensor:
        return sample_windows(teacher, tokenizer, count, seq_len, seed=seed, progress=progress)

    return training_windows(
        recovery.text,
        tokenizer,
        count=tuning.steps * tuning.batch_size,
        seq_len=tuning.seq_len,
        seed=tuning.seed,
        vocab_size=_vocab_size(model),
        sampler=None if teacher is None else write,
    )


def _evaluation_windows(text: Source, tokenizer: Any, model: PreTrainedModel) -> TokenWindows:
    size, most = EVALUATION_SEQ_LEN, EVALUATION_TOKENS
    return consecutive_windows(text, tokenizer, seq_len=size, max_tokens=most, vocab_size=_vocab_size(model))


def _settings(recovery: Recovery, teacher: ModelSource | None) -> dict[str, Any]:
    """What decides the result, as plain values; the text is known by its tokens."""
    return {
        "teacher": teacher.name if teacher else None,
        "modules": recovery.modules,
        "dtype": recovery.dtype,
        **asdict(recovery.tuning),
    }


def _made_from(source: ModelSource, teacher: ModelSource | None, windows: TokenWindows) -> dict[str, str | None]:
    """Hashes of the weights and tokens that go into a run."""
    return {
        "model_weights": hash_files(*source.weight_files),
        "teacher_weights": hash_files(*teacher.weight_files) if teacher else None,
        "tokens": windows.sha256,
    }


def _describe(windows: TokenWindows) -> dict[str, Any]:
    count, seq_len = windows.input_ids.shape
    sizes = {"windows": count, "seq_len": seq_len, "tokens": windows.tokens, "sha256": windows.sha256}
    return {"name": windows.name, **sizes, "sources": [asdict(share) for share in windows.shares]}


def _compression(origin: Path) -> dict[str, Any]:
    return read_json(origin / REPORT) if (origin / REPORT).exists() else {}


def _write_report(stage: Path, report: RecoveryReport) -> None:
    """All reports of the folder say that it was tuned; one that cannot be read goes, so that it does not say otherwise."""
    if (stage / REPORT).exists():
        try:
            compression = CompressionReport.from_dict(read_json(stage / REPORT))
        except CheckpointError:
            (stage / REPORT).unlink()
            (stage / PAGE).unlink(missing_ok=True)
        else:
            compression.tunings.append(report.record())
            (stage / REPORT).write_text(json.dumps(compression.to_dict(), indent=2) + "\n", "utf-8")
            write_page(compression, stage)
    (stage / RECOVERY_REPORT).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
    card = stage / "README.md"
    card.write_text(tuned_card(card.read_text("utf-8") if card.exists() else "", report), "utf-8")


def _vocab_size(model: PreTrainedModel) -> int:
    return len(embedding_weight(model))
