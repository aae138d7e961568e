"""``compress()``: the only place where the order of the steps lives.

text -> windows -> plan of all layers -> for each decoder layer: [observe -> factorize attention -> prune FFN -> advance] -> model
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorap.algorithms.step_schedule import Schedule, schedule
from lorap.architectures import PROJECTIONS, Architecture, find_architecture
from lorap.calibration.backward import BATCH_TOKENS as BACKWARD_BATCH
from lorap.calibration.mixtures import Sources, check_sources
from lorap.calibration.offload import IN_MEMORY, Shelf
from lorap.calibration.self_text import sample_windows
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.calibration.stream import CalibrationStream, on_device
from lorap.calibration.windows import Sampler, TokenWindows, consecutive_windows, draw_windows, fold_of
from lorap.checkpoint.finite import check_finite
from lorap.checkpoint.format import LoRAPConfig
from lorap.checkpoint.hf_quantizer import attach_quantization_config
from lorap.checkpoint.load import check_tokenizer, find_model, load_model, load_tokenizer, model_name, resolve_device
from lorap.checkpoint.paging import in_memory_throughout, is_in_memory, pages_of
from lorap.checkpoint.validate import believe_own_head
from lorap.compression.allocation import LayerPlan
from lorap.compression.distillation import agree, correct, divergences, held_out_windows, step_windows
from lorap.compression.layer import LayerCompressor
from lorap.compression.planning import Key, Plan, check_sizes, make_plan, shapes_of
from lorap.compression.runs.journal import NO_JOURNAL, Journal
from lorap.compression.runs.steps import (
    KeptMetrics,
    adopt,
    keep_layer,
    keep_plan,
    keep_windows,
    kept_plan,
    kept_reports,
    kept_windows,
    load_kept,
)
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.evaluation.perplexity import Evaluation, evaluate_stream
from lorap.jsonio import read_as
from lorap.nn.linear import count_parameters
from lorap.reports.run import CompressionReport, CorrectionReport, ProjectionReport
from lorap.requirements import compressed_roles, needs_folds
from lorap.system import Stopwatch, describe_environment, peak_memory_bytes
from lorap.version import __version__

T = TypeVar("T")

# Tokens of each evaluation text when compress() measures before and after; `lorap eval` has no such limit.
EVALUATION_TOKENS = 4096


def compress(
    model_or_path: Any,
    *,
    calibration: Sources = DEFAULT_CALIBRATION,
    config: CompressionConfig | None = None,
    tokenizer: Any = None,
    evaluation: Sequence[Source] = (),
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
) -> tuple[Any, CompressionReport]:
    """Compress a language model with LoRAP (arXiv 2404.09695): low-rank attention, pruned FFN, no retraining.

    The whole model is in memory; :func:`lorap.compress_to_folder` needs one decoder layer at a time, and can be interrupted.

    Args:
        model_or_path: a transformers model (compressed in place), a local folder, a hub name, or a GGUF file.
        calibration: a file of texts, records or chats (docs/calibration.md), a ``datasets`` name, tokens of shape (tokens,) or
            (windows, seq_len), a mapping with ``input_ids`` and ``attention_mask``, the name of a text that ships with lorap,
            such as ``default/novel``, or ``self``, what the model itself writes. Or a list of these and of pairs
            (source, weight): the samples are split by weight. ``default`` is such a mixture: half the texts that ship with
            lorap, half ``self``.
        config: what to do; ``CompressionConfig()`` by default.
        tokenizer: for text; taken from the model's folder where a path is given.
        evaluation: texts on which to measure the perplexity before and after.
        device: ``auto``, ``cpu``, ``cuda``, ... A model in memory stays where it is; its layers are worked on there one by one.
        dtype: of the model when it is loaded here: ``auto`` for the checkpoint's own.
        progress: show progress bars on stderr.

    Returns:
        The compressed model, ready for ``generate`` and ``save_pretrained``, and a report. :func:`lorap.save` writes both.

    Raises:
        LoRAPError: with a sentence that says what is wrong and what to do. Files of the source model are only ever read.
    """
    watch = Stopwatch()
    check_sources(calibration, *evaluation)
    with watch("load"):
        model, tokenizer, name = _open(model_or_path, tokenizer, device, dtype)
        find_architecture(model)
        where = _home(model) if device == "auto" else resolve_device(device)
    run = Run(model, name, tokenizer, config or CompressionConfig(), where, watch, progress=progress)
    return model, run.compress(calibration, evaluation)


@dataclass
class Run:
    """One compression: the model, what is done to it, and where the steps that are done are kept.

    Args:
        model: in memory, or paged (:mod:`lorap.checkpoint.paging`).
        name: of the model, for the report.
        tokenizer: for text.
        config: what to do.
        device: where layers are worked on.
        watch: takes the time by stage.
        progress: show progress bars.
        journal: takes what is done; by default nothing is kept.
        shelf: takes hidden states.
    """

    model: Any
    name: str
    tokenizer: Any
    config: CompressionConfig
    device: torch.device
    watch: Stopwatch
    progress: bool = True
    journal: Journal = NO_JOURNAL
    shelf: Shelf = IN_MEMORY

    def compress(self, calibration: Sources, evaluation: Sequence[Source]) -> CompressionReport:
        """All steps in order; those that the journal has are not done again."""
        self.model.tie_weights()
        self.architecture = find_architecture(self.model)
        self.layers = list(self.architecture.decoder_layers(self.model))
        check_sizes(self.model, shapes_of(self.layers, self.architecture), self.config)
        report = CompressionReport(model=self.name, config=self.config, calibration={})
        report.params_total_before = count_parameters(self.model)
        windows, *texts = self._windows(calibration, evaluation)
        report.calibration = {**windows.describe(), "sources": [asdict(share) for share in windows.shares]}
        before = self._losses_before(texts)
        plan = self._plan(windows)
        with self.watch("calibrate"):
            halves = fold_of(windows) if needs_folds(self.config) else None
            stream = self._stream(windows, fold_of=halves)
        with self.watch("evaluate"):
            judged = [self._stream(text, batch_tokens=EVALUATION_BATCH) for text in texts]
        if self.config.corrects:
            done = self.journal.has("corrected")
            targets = [] if done else list(self._dealt(windows))
            judges = [] if done else [*self._unseen(windows), *self._unseen(windows)]
            self._compress_layers(plan, stream, {"correct": judges[1:]}, [*targets, *judges[:1]], report)
            del stream  # what was calibrated on is used up
            report.correction = self._correct(windows, targets, judges)
            self._advance(judged)
        else:
            self._compress_layers(plan, stream, {"evaluate": judged}, [], report)
        with self.watch("evaluate"):
            for text, dense, behind in zip(texts, before, judged, strict=True):
                report.add_evaluation(dense, evaluate_stream(self.model, self.layers, behind, text))
        self.model.tie_weights()
        _mark(self.model, plan.layers, self.architecture, report)
        report.seconds = self.watch.seconds
        report.environment = describe_environment(self.device, str(self.model.dtype).removeprefix("torch."))
        report.peak_memory_bytes = peak_memory_bytes()
        on_gpu = self.device.type == "cuda"
        report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
        return report

    def _stream(self, windows: TokenWindows, **options: Any) -> CalibrationStream:
        return CalibrationStream.from_model(
            self.model,
            self.layers,
            windows,
            device=self.device,
            shelf=self.shelf,
            processes=self.journal.processes,
            **options,
        )

    def _schedule(self, windows: TokenWindows) -> Schedule:
        count, seq_len = windows.input_ids.shape
        return schedule(count, seq_len, self.config.correction_steps)

    def _dealt(self, windows: TokenWindows) -> Iterator[CalibrationStream]:
        """The calibration windows again, for each correction step its own."""
        for part, halves in step_windows(windows, fold_of(windows), self._schedule(windows)):
            yield self._stream(part, fold_of=halves, batch_tokens=BACKWARD_BATCH)

    def _unseen(self, windows: TokenWindows) -> Iterator[CalibrationStream]:
        """Those that no step has, to judge by; none where there is no step."""
        if (plan := self._schedule(windows)).steps:
            part, halves = held_out_windows(windows, fold_of(windows), plan)
            yield self._stream(part, fold_of=halves, batch_tokens=EVALUATION_BATCH)

    def _bar(self, items: Iterable[T], *, desc: str) -> Iterable[T]:
        hidden = not self.progress or not self.journal.processes.is_first
        bar: Iterable[T] = tqdm(items, desc=desc, unit="layer", total=len(self.layers), disable=hidden)
        return bar

    def _windows(self, calibration: Sources, evaluation: Sequence[Source]) -> list[TokenWindows]:
        """Windows to calibrate on, and those of each text to judge by."""
        if self.journal.has("windows"):
            self.watch.add(self.journal.read("windows")["seconds"])
            return kept_windows(self.journal, "windows")
        start = dict(self.watch.seconds)
        processes = self.journal.processes

        def sampler(count: int, seq_len: int, seed: int) -> Tensor:
            with self.watch("sample"), in_memory_throughout(self.model, self.layers):
                return sample_windows(
                    self.model, self.tokenizer, count, seq_len, seed=seed, progress=self.progress and processes.is_first
                )

        with self.watch("tokenize"):
            drawn, texts = _read_texts(self.model, self.tokenizer, calibration, evaluation, self.config, sampler)
        found = processes.from_first([drawn, *texts])
        keep_windows(self.journal, "windows", found, seconds=self.watch.since(start))
        return found

    def _losses_before(self, texts: Sequence[TokenWindows]) -> list[Evaluation]:
        if not texts:
            return []
        if self.journal.has("before"):
            kept = self.journal.read("before")
            self.watch.add(kept["seconds"])
            found: list[Evaluation] = read_as(list[Evaluation], kept["losses"], "before")
            return found
        start = dict(self.watch.seconds)
        with self.watch("evaluate"):
            streams = [self._stream(text, batch_tokens=EVALUATION_BATCH) for text in texts]
            self._advance(streams)
            losses = [
                evaluate_stream(self.model, self.layers, stream, text)
                for stream, text in zip(streams, texts, strict=True)
            ]
        told = {"losses": [asdict(loss) for loss in losses], "seconds": self.watch.since(start)}
        self.journal.keep("before", told)
        return losses

    def _plan(self, windows: TokenWindows) -> Plan:
        metrics: MutableMapping[Key, Tensor] = {}
        if self.journal.folder is not None:
            metrics = kept = KeptMetrics(self.journal)
            if self.journal.has("plan"):
                self.watch.add(self.journal.read("plan")["seconds"])
                return Plan(kept_plan(self.journal, "plan", kept), metrics)
        start = dict(self.watch.seconds)
        with self.watch("plan"):
            plan = make_plan(
                self.model,
                self.layers,
                windows,
                self.config,
                self.architecture,
                device=self.device,
                progress=partial(self._bar, desc="Planning"),
                output_metrics=metrics,
                shelf=self.shelf,
                processes=self.journal.processes,
            )
        keep_plan(self.journal, "plan", plan.layers, metrics, seconds=self.watch.since(start))
        return plan

    def _compress_layers(
        self,
        plan: Plan,
        stream: CalibrationStream,
        behind: Mapping[str, Sequence[CalibrationStream]],
        targets: Sequence[CalibrationStream],
        report: CompressionReport,
    ) -> None:
        """Every layer in order, behind the compressed ones before it, through which go the streams ``behind``, by the stage that
        they are of; ``targets`` go through the dense ones."""
        compressor = LayerCompressor(self.config, self.architecture, stream, self.device, self.watch)
        for index, layer in enumerate(self._bar(self.layers, desc="Compressing")):
            if index + 1 < len(self.layers) and (following := pages_of(self.layers[index + 1])) is not None:
                following.prefetch()
            self._advance_all(targets, index, "correct")
            step = _layer(index)
            if self.journal.has(step):
                report.projections += self._restored(step, layer)
            else:
                start = dict(self.watch.seconds)
                with on_device(layer, self.device):
                    found = compressor.compress(index, layer, plan.layers[index], plan.metrics_of(index))
                    with self.watch("save"):
                        keep_layer(self.journal, step, layer, found, seconds=self.watch.since(start))
                    self._repaged(step, layer)
                report.projections += found
            for role in PROJECTIONS:
                if (index, role) in plan.output_metrics:
                    del plan.output_metrics[index, role]
            with on_device(layer, self.device):
                self._advance_all([stream], index, "calibrate")
                for stage, streams in behind.items():
                    self._advance_all(streams, index, stage)

    def _correct(
        self,
        windows: TokenWindows,
        targets: Sequence[CalibrationStream],
        judges: Sequence[CalibrationStream],
    ) -> CorrectionReport:
        """Small steps of all weights together, which stay if windows that no step has seen agree.

        An interrupted pass begins again, with the layers as they were before it.

        Args:
            windows: all that were calibrated on.
            targets: those of each step, behind the last dense layer.
            judges: those to judge by, behind the last dense layer and behind the last compressed one.
        """
        if self.journal.has("corrected"):
            kept = self.journal.read("corrected")
            self.watch.add(kept["seconds"])
            found: CorrectionReport = read_as(CorrectionReport, kept.get("correction"), "corrected")
            for index, layer in enumerate(self.layers if found.taken else ()):
                self._reloaded(_corrected(index), layer)
            return found
        start, plan = dict(self.watch.seconds), self._schedule(windows)
        found = CorrectionReport(plan.asked, plan.steps, windows=len(windows.input_ids), enough=plan.enough)
        with self.watch("correct"):
            if plan.steps:
                found = self._take_steps(found, windows, plan, targets, judges)
        self.journal.keep("corrected", {"correction": asdict(found), "seconds": self.watch.since(start)})
        if not found.taken:
            for index in range(len(self.layers)):
                self.journal.forget_tensors(_corrected(index))
        return found

    def _take_steps(
        self,
        found: CorrectionReport,
        windows: TokenWindows,
        plan: Schedule,
        targets: Sequence[CalibrationStream],
        judges: Sequence[CalibrationStream],
    ) -> CorrectionReport:
        """The steps, the judgement, and back to where they began if it is against them."""
        dense, compressed = judges
        before = divergences(self.model, self.layers, compressed, dense)
        originals = self._originals()

        def keep(step: int, index: int, layer: nn.Module) -> None:
            if self.journal.folder is not None and (pages_of(layer) is not None or step == plan.steps - 1):
                self.journal.keep_tensors(_corrected(index), layer.state_dict())
                self.journal.processes.wait()
                self._repaged(_corrected(index), layer)

        correct(
            self.model,
            self.layers,
            self._dealt(windows),
            targets,
            plan.rates,
            self.architecture,
            compressed_roles(self.config),
            device=self.device,
            keep=keep,
            progress=lambda step: partial(self._bar, desc=f"Correcting, step {step + 1} of {plan.steps}"),
            shelf=self.shelf,
        )
        (corrected,) = self._unseen(windows)
        for index in self._bar(range(len(self.layers)), desc="Judging the correction"):
            with on_device(self.layers[index], self.device):
                corrected.advance(index, self.layers[index])
        after = divergences(self.model, self.layers, corrected, dense)
        taken = plan.steps if agree(before, after) else 0
        if not taken:
            self._put_back(originals)
        finite = after if all(map(math.isfinite, after)) else ()
        tokens = int(held_out_windows(windows, fold_of(windows), plan)[0].tokens)
        return replace(found, taken=taken, unseen_tokens=tokens, before=before, after=finite)

    def _originals(self) -> list[dict[str, Tensor]]:
        """All layers as they are, for :meth:`_put_back`: nothing where the journal has them."""
        if self.journal.folder is not None:
            return []
        return [
            {name: tensor.to("cpu", copy=True) for name, tensor in layer.state_dict().items()} for layer in self.layers
        ]

    def _put_back(self, originals: Sequence[Mapping[str, Tensor]]) -> None:
        """The layers are to the bit what they were before the correction."""
        for index, layer in enumerate(self.layers):
            if originals:
                layer.load_state_dict(originals[index])
            else:
                self._reloaded(_layer(index), layer)

    def _advance(self, judged: Sequence[CalibrationStream]) -> None:
        """Send the texts to judge by through all layers."""
        for index in self._bar(range(len(self.layers)), desc="Evaluating") if judged else ():
            self._advance_all(judged, index, "evaluate")

    def _advance_all(self, streams: Sequence[CalibrationStream], index: int, stage: str) -> None:
        """Send the streams through one layer, in the time of a stage."""
        if not streams:
            return
        with self.watch(stage), on_device(self.layers[index], self.device):
            for stream in streams:
                stream.advance(index, self.layers[index])

    def _restored(self, step: str, layer: nn.Module) -> list[ProjectionReport]:
        """Bring a finished layer back into the model; of a paged one only where it is."""
        home = next(layer.parameters()).device
        adopt(layer, self.journal.tensors(step), self.architecture)
        self._reloaded(step, layer, home)
        kept = self.journal.read(step)
        self.watch.add(kept["seconds"])
        return kept_reports(kept, step)

    def _reloaded(self, step: str, layer: nn.Module, home: torch.device | None = None) -> None:
        """The weights that were kept, where the layer is in memory; a paged one finds them when it is used, unless it stays."""
        self._repaged(step, layer)
        if (pages := pages_of(layer)) is None:
            load_kept(layer, self.journal.tensors(step), home or next(layer.parameters()).device)
        elif is_in_memory(layer):
            pages.load(layer, next(layer.parameters()).device)

    def _repaged(self, step: str, layer: nn.Module) -> None:
        """From now on a paged layer comes from what was kept of it."""
        if (pages := pages_of(layer)) is not None:
            layer.pages = replace(pages, tensors=self.journal.tensors(step), dtype=None)  # type: ignore[assignment]


def _layer(index: int) -> str:
    return f"layer-{index:05}"


def _corrected(index: int) -> str:
    return f"corrected-{index:05}"


def _open(model_or_path: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and name."""
    if isinstance(model_or_path, (str, Path)):
        source = find_model(model_or_path)
        tokenizer = tokenizer or load_tokenizer(source)
        model, name = load_model(source, dtype=dtype, device=resolve_device(device)), source.name
    else:
        model = model_or_path.eval()
        believe_own_head(model)
        check_finite(model.named_parameters())
        name = (
            model_name(Path(model.config._name_or_path or "")) if model.config._name_or_path else type(model).__name__
        )
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ConfigError(
                "the model is spread over several devices; load it without device_map and pass device instead"
            )
    check_tokenizer(tokenizer, _vocab_size(model))
    return model, tokenizer, name


def _read_texts(
    model: Any,
    tokenizer: Any,
    calibration: Sources,
    evaluation: Sequence[Source],
    config: CompressionConfig,
    sampler: Sampler,
) -> tuple[TokenWindows, list[TokenWindows]]:
    """Windows to calibrate on, and windows of each text to judge by."""
    vocab_size, seq_len = _vocab_size(model), config.calibration_seq_len
    windows = draw_windows(
        calibration,
        tokenizer,
        num_samples=config.num_calibration_samples,
        seq_len=seq_len,
        seed=config.seed,
        vocab_size=vocab_size,
        sampler=sampler,
    )
    texts = [
        consecutive_windows(text, tokenizer, seq_len=seq_len, max_tokens=EVALUATION_TOKENS, vocab_size=vocab_size)
        for text in evaluation
    ]
    return windows, texts


def _mark(model: Any, plans: Sequence[LayerPlan], architecture: Architecture, report: CompressionReport) -> None:
    """Write the new shapes into the model's config, so that it saves as a lorap checkpoint, or as a stock one; count what will
    be saved."""
    ranks = {
        architecture.module_name(index, role): rank
        for index, plan in enumerate(plans)
        for role, rank in plan.ranks.items()
    }
    widths = [plan.intermediate_size for plan in plans]
    dense_width = model.config.intermediate_size
    biases = _new_biases(model, plans, architecture, report.config)
    # A host without lorap would leave the added biases out and only warn; at widths unlike the config's it refuses.
    uniform = len(set(widths)) == 1 and not biases
    if uniform:
        model.config.intermediate_size = widths[0]
    sizes = {f"{architecture.layers}.{index}.{architecture.mlp}": width for index, width in enumerate(widths)}
    if report.config.target != "stock" and (ranks or widths != [dense_width] * len(widths)):
        shapes = LoRAPConfig(
            ranks=ranks,
            intermediate_sizes={} if uniform else sizes,
            dense_intermediate_size=dense_width,
            storage=report.config.storage if ranks else "factors",
            biases=biases,
            sparsity=report.config.sparsity,
            recipe=report.config.recipe,
            lorap_version=__version__,
        )
        attach_quantization_config(model, shapes)
    report.params_saved = count_parameters(model)


def _new_biases(
    model: Any, plans: Sequence[LayerPlan], architecture: Architecture, config: CompressionConfig
) -> list[str]:
    """Down projections that gained a bias which the model's own config does not know."""
    if not config.bias_compensation or getattr(model.config, "mlp_bias", False):
        return []
    names = [architecture.module_name(index, "down_proj") for index in range(len(plans))]
    return [name for name in names if model.get_submodule(name).bias is not None]


def _vocab_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _home(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
