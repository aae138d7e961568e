"""``compress_to_folder()``: from a model's files to a folder, one decoder layer in memory at a time, resumed after interruptions.

What a run depends on is its *identity*: options, model files, texts, versions. It is written down first, and a later command goes
on only where it has the same. The number of processes and the memory are not part of it: they change nothing in the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from lorap.architectures import find_architecture
from lorap.calibration.context import DecoderContext
from lorap.calibration.mixtures import Sources, check_sources
from lorap.calibration.offload import HiddenStateStore
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.checkpoint import host_keys
from lorap.checkpoint.load import ModelSource, check_tokenizer, find_model, load_model, load_tokenizer, own_device
from lorap.checkpoint.save import check_saved, try_settings, write_reports
from lorap.checkpoint.write import write_model
from lorap.compression.budget_remarks import budget_remarks
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.pipeline import Run
from lorap.compression.planning import check_sizes
from lorap.compression.runs.fingerprints import check_weights, identity_of
from lorap.compression.runs.journal import COMPLETE, STAGE, Journal, check_identity, finish, is_complete, open_journal
from lorap.compression.runs.steps import JournalStore
from lorap.compression.stored_bytes import DenseModel
from lorap.config import CompressionConfig
from lorap.distributed import is_main_process, joined
from lorap.errors import CheckpointError
from lorap.files import reason, sync_tree
from lorap.nn.linear import count_parameters, embedding_weight
from lorap.outputs import check_output, check_room
from lorap.reports.run import CompressionReport
from lorap.system import Stopwatch, parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGING = "packaging"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run to a folder besides the config.

    Args:
        calibration: as for :func:`lorap.compress`.
        evaluation: texts to judge by, before and after.
        device: where layers are worked on.
        dtype: of the model; ``auto`` for the checkpoint's own.
        max_shard_size: largest safetensors file.
        max_memory_bytes: hidden states of the windows beyond this size go to disk. None: they stay in memory.
        overwrite: replace an output folder, at the end and in one step.
        restart: throw away what an unfinished run has done.
        command: for the report.
        progress: show progress bars on stderr.
    """

    calibration: Sources = DEFAULT_CALIBRATION
    evaluation: Sequence[Source] = ()
    device: str = "auto"
    dtype: str = "auto"
    max_shard_size: str | int = "5GB"
    max_memory_bytes: int | None = None
    overwrite: bool = False
    restart: bool = False
    command: str = ""
    progress: bool = True


def compress_to_folder(
    model: str | Path, out: str | Path, config: CompressionConfig | None = None, options: RunOptions | None = None
) -> CompressionReport:
    """Compress a model into a Hugging Face folder.

    A folder of safetensors is never loaded as a whole: the peak memory is that of one decoder layer, its statistics and a
    batch of windows. Every finished layer is kept beside ``out``; after an interruption of any kind the same call goes on
    behind the last one, with as many torch threads to the same bytes. Under ``torchrun`` the processes share windows and
    factorizations.

    Args:
        model: a folder, a name on the hub, or a GGUF file.
        out: the folder to write; it appears complete or not at all.
        config: what to do; None for the recipe ``best``.
        options: everything else; None for the defaults.

    Raises:
        JournalError: an unfinished run to ``out`` is another one, or still at work.
        LoRAPError: as :func:`lorap.compress` and :func:`lorap.save`; what was finished is kept.
    """
    config, options, out = config or CompressionConfig(), options or RunOptions(), Path(out)
    check_sources(options.calibration, *options.evaluation)
    parse_bytes(options.max_shard_size)
    source = find_model(model)
    if is_main_process() and (options.restart or not is_complete(out)):
        check_output(out, source=source.folder, overwrite=options.overwrite)
    with joined() as processes, open_journal(out, restart=options.restart, processes=processes) as journal:
        return FolderRun(source, out, config, options, journal).run()


@dataclass
class FolderRun:
    """A run to a folder, within its journal.

    Args:
        source: the model.
        out: the folder to write.
        config: what to do.
        options: everything else.
        journal: of this run, open.
        watch: takes the time by stage.
    """

    source: ModelSource
    out: Path
    config: CompressionConfig
    options: RunOptions
    journal: Journal
    watch: Stopwatch = field(default_factory=Stopwatch)

    def run(self) -> CompressionReport:
        """All of it; errors as :func:`compress_to_folder`."""
        watch, processes = self.watch, self.journal.processes
        with watch("load"):
            device = own_device(self.options.device)
            tokenizer = load_tokenizer(self.source)
            model = load_model(self.source, dtype=self.options.dtype, device=device, paged=True)
            check_tokenizer(tokenizer, len(embedding_weight(model)))
        with watch("check"):
            dense = DenseModel.of(model, find_architecture(model))
            asked, self.config = self.config, resolve_budget(dense, self.config)
            decisions = budget_remarks(dense, asked, self.config)
            check_sizes(dense, self.config)
            self._check(model, tokenizer, device)
        report = self._finished()
        if report is None:
            context = DecoderContext.of(
                model,
                device=device,
                store=self._hidden_states(),
                processes=processes,
                progress=self.options.progress,
            )
            context = self.prepared(context, tokenizer)
            store = JournalStore(self.journal, context.architecture)
            run = Run(context, self.source.name, tokenizer, self.config, watch, store)
            report = run.compress(self.options.calibration, self.options.evaluation)
            report.command = self.options.command
            report.decisions = decisions
            if processes.is_main_process:
                self._write(model, tokenizer, report, watch)
        if processes.is_main_process:
            finish(self.journal)
        processes.barrier()
        return report

    def prepared(self, context: DecoderContext, _tokenizer: Any) -> DecoderContext:
        """Called before the first step; a run on trial takes the time of each layer from here on."""
        return context

    def _finished(self) -> CompressionReport | None:
        """What an earlier process has completed, if it is packed as this command wants it."""
        journal = self.journal
        kept = journal.processes.broadcast(journal.read(COMPLETE) if journal.has_alone(COMPLETE) else None)
        staged = journal.processes.broadcast((journal.folder / STAGE).is_dir())
        if kept is not None and staged and kept[PACKAGING] != self._packaging():
            journal.forget(COMPLETE)
            return None
        return None if kept is None else CompressionReport.from_dict(kept["report"])

    def _packaging(self) -> dict[str, int]:
        """What changes nothing but how the result is stored, and so is no part of the identity."""
        return {"shard_bytes": parse_bytes(self.options.max_shard_size)}

    def _check(self, model: PreTrainedModel, tokenizer: Any, device: torch.device) -> None:
        """The run is the one that was begun, its end can be written, and every weight is looked at once, before any work."""
        options = self.options
        if self.journal.processes.is_main_process:
            self._try_writing(model, tokenizer)
            identity = identity_of(
                self.source,
                self.config.to_dict(),
                options.calibration,
                options.evaluation,
                device=device.type,
                dtype=str(model.dtype),
            )
            check_identity(self.journal, identity, threads=torch.get_num_threads())
        self.journal.processes.barrier()
        check_weights(
            self.journal, self.source, model, progress=options.progress and self.journal.processes.is_main_process
        )

    def _try_writing(self, model: PreTrainedModel, tokenizer: Any) -> None:
        trial = self.journal.folder / "trial"
        try:
            try_settings(model, tokenizer, trial)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        if not self.journal.has_alone(COMPLETE):
            nbytes = (1 - self.config.sparsity) * count_parameters(model) * model.dtype.itemsize
            check_room(self.journal.folder, int(nbytes), shown=self.out)

    def _hidden_states(self) -> HiddenStateStore:
        folder = self.journal.folder / "hidden" / str(self.journal.processes.rank)
        return HiddenStateStore(budget_bytes=self.options.max_memory_bytes, folder=folder)

    def _write(self, model: PreTrainedModel, tokenizer: Any, report: CompressionReport, watch: Stopwatch) -> None:
        """The output, complete, in the journal's folder."""
        stage = self.journal.folder / STAGE
        try:
            with watch("save"):
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
                write_model(model, stage, max_shard_size=self.options.max_shard_size)
                host_keys.complete(stage, tokenizer)
                check_saved(stage, report)
            report.seconds = watch.seconds
            write_reports(report, stage)
            sync_tree(stage)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not write {self.out}: {reason(error, self.out)}; all layers are kept: mend that and run the same "
                "command again"
            ) from error
        self.journal.keep_alone(COMPLETE, {"report": report.to_dict(), PACKAGING: self._packaging()})
