"""``recover()``: a short training after compression, which changes numbers and nothing else.

source folder -> windows of text -> adapters on the compressed layers -> training -> merged into a copy of the weight files

Adapters (LoRA, by PEFT) sit on both factors of low-rank projections, on the pruned FFN, and on projections that stayed dense.
Merged, each is an addition to a matrix that is there already, so ranks, widths, parameters and the format of the checkpoint stay.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorap.architectures import known_architecture
from lorap.calibration.mixtures import Sources, check_sources
from lorap.calibration.self_text import sample_windows
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.calibration.windows import TokenWindows, consecutive_windows
from lorap.checkpoint.folders import read_tensors, stored_parameters
from lorap.checkpoint.load import (
    ModelSource,
    check_tokenizer,
    dtype_name,
    find_model,
    load_model,
    load_tokenizer,
    own_device,
)
from lorap.checkpoint.save import SPARE_BYTES
from lorap.checkpoint.validate import CONFIG, lorap_config
from lorap.distributed import Processes, is_main_process, joined, local_rank
from lorap.errors import CheckpointError, ConfigError
from lorap.evaluation.info import report_beside
from lorap.evaluation.perplexity import evaluate
from lorap.files import hash_files
from lorap.jsonio import read_json, write_json
from lorap.nn.linear import LowRankLinear, embedding_weight
from lorap.nn.low_rank_tensors import FACTORS
from lorap.outputs import WorkFolder, check_output, work_folder, work_path
from lorap.recovery.config import MODULES, RECOVERY, SAVE_SECONDS, TuningConfig
from lorap.recovery.files import STATE, merge_into_copy, state_folder
from lorap.recovery.report import RecoveryReport, dense_evaluation, tuned_card
from lorap.recovery.state import Progress
from lorap.recovery.text import training_windows
from lorap.recovery.training import add_adapters, autocast_dtype, hold_weights, require_libraries
from lorap.reports.html.page import write_page
from lorap.reports.model_card import CARD, read_card
from lorap.reports.run import PAGE, RECOVERY_REPORT, REPORT, CompressionReport
from lorap.system import Stopwatch, describe_environment, peak_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of each evaluation text, as when a model is compressed.
EVALUATION_TOKENS = 4096
EVALUATION_SEQ_LEN = 128


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
    Under ``torchrun`` the processes share the windows of each step.

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
        ConfigError: peft or accelerate is missing, a setting is out of range, or other settings than those of the run to be
            resumed.
        CheckpointError: a folder cannot be read or written.
        CalibrationError: a text cannot be used.
        ArchitectureError: the model is of an unknown family.
        JournalError: another process is writing ``out``.
    """
    require_libraries()
    watch, where = Stopwatch(), own_device(device)
    _check_launch(where)
    recovery = _settled(recovery or Recovery(), where)
    check_sources(recovery.text, *evaluation)
    source, origin = _local(folder)
    teacher = None if recovery.teacher is None else find_model(recovery.teacher)
    if is_main_process():
        needed_bytes = sum(tensor.nbytes for tensor in read_tensors(origin).values()) + SPARE_BYTES
        check_output(out, source=origin, overwrite=overwrite, needed_bytes=needed_bytes)
    with joined() as processes:
        progress = progress and processes.is_main_process
        run = _Run(source, origin, teacher, recovery, evaluation, where, processes, watch, save_seconds, progress)
        if not processes.is_main_process:
            return run.help(work_path(out) / RECOVERY / STATE)
        with work_folder(out) as work:
            return run.lead(work, restart=restart)


def target_names(model: PreTrainedModel, modules: str = "all") -> list[str]:
    """Full names of the linear layers to tune: both factors of a low-rank projection, a dense one itself.

    Raises:
        ArchitectureError: the family is unknown.
    """
    architecture, names = known_architecture(model, to="tune"), []
    for index, layer in enumerate(architecture.decoder_layers(model)):
        for role in (role for role in MODULES[modules] if role in architecture.roles(layer)):
            name = architecture.module_name(index, role)
            factors = isinstance(model.get_submodule(name), LowRankLinear)
            names += [f"{name}.{factor}" for factor in FACTORS] if factors else [name]
    return names


def _check_launch(device: torch.device) -> None:
    """What the Trainer would silently do otherwise."""
    if device.type == "cuda" and device.index not in (None, local_rank() or 0):
        raise ConfigError(
            f"device is {device}, and tuning runs on the first GPU that it sees; give CUDA_VISIBLE_DEVICES={device.index} "
            "and device cuda"
        )
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise ConfigError(
                f"ACCELERATE_USE_{name} asks for a model in parts, and each process of `recover` holds all of it; start with "
                "torchrun instead, which shares the windows of each step"
            )


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
    if settings is not None and settings.weights != "float":
        raise CheckpointError(
            f"the weights of {source.name} are {settings.weights_text}, and adapters cannot be merged into them; tune a folder "
            "with floating-point weights, then quantize that (lorap.quantize)"
        )
    # With --target stock the config says nothing, but there is a report.
    if settings is None and not (source.folder / REPORT).is_file():
        raise CheckpointError(
            f"{source.name} is not compressed by lorap, and `recover` gets back some of what `lorap compress` cost a model: "
            f"compress it first (lorap compress {folder} OUT), then tune OUT"
        )
    return source, source.folder


@dataclass
class _Run:
    """A run in one of its processes. ``origin`` is the model's folder."""

    source: ModelSource
    origin: Path
    teacher_source: ModelSource | None
    recovery: Recovery
    evaluation: Sequence[Source]
    device: torch.device
    processes: Processes
    watch: Stopwatch
    save_seconds: float
    progress: bool
    model: Any = None
    teacher: Any = None

    def lead(self, work: WorkFolder, *, restart: bool) -> RecoveryReport:
        """In the process that reads the texts and writes."""
        with self.watch("load"):
            tokenizer = load_tokenizer(self.source)
            self._load()
            check_tokenizer(tokenizer, _vocab_size(self.model))
            windows = self._training_windows(tokenizer)
            texts = [_evaluation_windows(text, tokenizer, self.model) for text in self.evaluation]
        settings = _settings(self.recovery, self.teacher_source)
        report = RecoveryReport(self.source.name, settings, windows.describe(), stored_parameters(self.origin))
        report.environment = describe_environment(self.device, self.recovery.dtype)
        made_from = _made_from(self.source, self.teacher_source, windows)
        with state_folder(work, settings | made_from, restart=restart) as folder:
            with self.watch("evaluate"):
                dense, before = (self._evaluate(model, texts) for model in (self.teacher, self.model))
            names = target_names(self.model, self.recovery.modules)
            with self.watch("tune"):
                done, trained = self._tune(self.processes.broadcast(windows), folder / STATE)
            tuning = self.recovery.tuning
            report.add_training(done.losses, done.seconds, tokens_per_step=tuning.tokens_per_step)
            with work.staged() as stage:
                with self.watch("merge"):
                    merge_into_copy(trained, names, self.origin, stage)
                with self.watch("evaluate"):
                    # What is stored, read again.
                    dtype, device = self.recovery.dtype, self.device
                    model = load_model(find_model(stage), dtype=dtype, device=device) if texts else None
                    for reference, old, new in zip(dense, before, self._evaluate(model, texts), strict=True):
                        reference = reference or dense_evaluation(report_beside(self.source), old)
                        report.add_evaluation(reference, old, new)
                report.seconds, report.peak_memory_bytes = self.watch.seconds, peak_memory_bytes()
                _write_report(stage, report)
            shutil.rmtree(folder, ignore_errors=True)
        return self.processes.broadcast(report)

    def help(self, state: Path) -> RecoveryReport:
        """In another process: a share of every step."""
        from_the_first: Any = None
        self._load()
        self._tune(self.processes.broadcast(from_the_first), state)
        return self.processes.broadcast(from_the_first)

    def _load(self) -> None:
        dtype, device = self.recovery.dtype, self.device
        self.model = load_model(self.source, dtype=dtype, device=device)
        if self.teacher_source is not None:
            self.teacher = load_model(self.teacher_source, dtype=dtype, device=device).requires_grad_(False)
            if _vocab_size(self.teacher) != _vocab_size(self.model):
                raise ConfigError(
                    f"the teacher {self.recovery.teacher} has {_vocab_size(self.teacher):,} tokens and the model "
                    f"{_vocab_size(self.model):,}; give the dense model that was compressed"
                )

    def _training_windows(self, tokenizer: Any) -> TokenWindows:
        tuning, teacher = self.recovery.tuning, self.teacher

        def write(count: int, seq_len: int, seed: int) -> torch.Tensor:
            return sample_windows(teacher, tokenizer, count, seq_len, seed=seed, progress=self.progress)

        return training_windows(
            self.recovery.text,
            tokenizer,
            count=tuning.steps * tuning.batch_size,
            seq_len=tuning.seq_len,
            seed=tuning.seed,
            vocab_size=_vocab_size(self.model),
            sampler=None if teacher is None else write,
        )

    def _evaluate(self, model: PreTrainedModel | None, texts: Sequence[TokenWindows]) -> list[Any]:
        """By text; None without a model."""
        return [None if model is None else evaluate(model, text, progress=self.progress) for text in texts]

    def _tune(self, windows: TokenWindows, state: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Train, and let go of the models; how it went, and the adapters."""
        tuning, names = self.recovery.tuning, target_names(self.model, self.recovery.modules)
        tuned = add_adapters(self.model, names, rank=tuning.rank, seed=tuning.seed)
        if tuning.precision == "bfloat16":
            hold_weights(self.model, names, torch.bfloat16)
            if self.teacher is not None:
                hold_weights(self.teacher, target_names(self.teacher), torch.bfloat16)
        from lorap.recovery.trainer import train  # transformers' Trainer, which only tuning needs

        done = train(
            tuned,
            windows,
            tuning,
            state=state,
            teacher=self.teacher,
            save_seconds=self.save_seconds,
            progress=self.progress,
            processes=self.processes,
        )
        trained = {name: p.detach().cpu() for name, p in tuned.named_parameters() if p.requires_grad}
        self.model = self.teacher = tuned = None
        gc.collect()  # the Trainer holds it in a circle
        self.processes.barrier()
        return done, trained


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
            write_json(stage / REPORT, compression.to_dict())
            write_page(compression, stage)
    write_json(stage / RECOVERY_REPORT, report.to_dict())
    (stage / CARD).write_text(tuned_card(read_card(stage), report), "utf-8")


def _vocab_size(model: PreTrainedModel) -> int:
    return len(embedding_weight(model))
