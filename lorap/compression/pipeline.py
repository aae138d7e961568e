"""The method on one page: ``compress()`` and the order of its stages.

text -> windows -> plan -> for each decoder layer: [observe -> factorize attention -> prune FFN -> advance] -> correct -> round
-> rescale

Where finished steps are kept is a matter of the store (:mod:`lorap.compression.store`), what is done within a layer of
:mod:`lorap.compression.layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lorap.architectures import PROJECTIONS
from lorap.calibration.context import DecoderContext
from lorap.calibration.contract import verify_contract
from lorap.calibration.mixtures import Sources, check_sources
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.calibration.stream import CalibrationStream
from lorap.calibration.windows import TokenWindows, fold_of
from lorap.checkpoint.find import model_name
from lorap.checkpoint.finite import check_finite
from lorap.checkpoint.hf_quantizer import forget_gguf
from lorap.checkpoint.load import check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.checkpoint.paging import offloaded_tensors
from lorap.checkpoint.validate import untie_own_head
from lorap.compression.budget_remarks import budget_remarks
from lorap.compression.byte_budget import resolve_budget
from lorap.compression.correction import Correction, Rescaling
from lorap.compression.layer import LayerCompressor
from lorap.compression.planning import Plan, check_sizes, make_plan
from lorap.compression.quantization import round_layer
from lorap.compression.result import describe_in_config
from lorap.compression.store import Finished, RunStore
from lorap.compression.stored_bytes import DenseModel
from lorap.compression.windows import RunWindows, read_windows
from lorap.config import CompressionConfig
from lorap.errors import ConfigError
from lorap.evaluation.perplexity import BATCH_TOKENS as EVALUATION_BATCH
from lorap.evaluation.perplexity import evaluate_stream
from lorap.nn.linear import count_parameters, embedding_weight
from lorap.reports.records import Evaluation
from lorap.reports.run import CompressionReport, CorrectionReport
from lorap.requirements import has_anchor, needs_folds
from lorap.system import Stopwatch, describe_environment, peak_memory_bytes
from lorap.weights import coding_of

T = TypeVar("T")


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
        where = _home(model) if device == "auto" else resolve_device(device)
        context = DecoderContext.of(model, device=where, progress=progress)
    asked, dense = config or CompressionConfig(), DenseModel.of(model, context.architecture)
    config = resolve_budget(dense, asked)
    decisions = budget_remarks(dense, asked, config)
    run = Run(context, name, tokenizer, config, watch)
    report = run.compress(calibration, evaluation)
    report.decisions = decisions
    return model, report


@dataclass
class Run:
    """One compression: the model, what is done to it, and where the steps that are done are kept.

    Args:
        context: the model, in memory or offloaded (:mod:`lorap.checkpoint.paging`).
        name: of the model, for the report.
        tokenizer: for text.
        config: what to do, with weights and a sparsity even where bytes are asked for.
        watch: takes the time by stage.
        store: takes what is done; by default nothing is kept.
    """

    context: DecoderContext
    name: str
    tokenizer: Any
    config: CompressionConfig
    watch: Stopwatch
    store: RunStore = field(default_factory=RunStore)

    @torch.inference_mode(False)  # type: ignore[untyped-decorator]  # a caller's own would leave the gradients out
    def compress(self, calibration: Sources, evaluation: Sequence[Source]) -> CompressionReport:
        """All stages in order; steps that the store has are not done again.

        Args:
            calibration: texts or tokens to calibrate on.
            evaluation: texts to judge by, before and after.

        Returns:
            What was done; the model of the context is compressed, and says so in its config.
        """
        context, config = self.context, self.config
        model = context.model
        model.tie_weights()
        check_sizes(DenseModel.of(model, context.architecture), config)
        report = CompressionReport(model=self.name, config=config, calibration={})
        report.params_total_before = count_parameters(model)  # before a tied embedding comes into memory by itself
        with self.watch("verify"):
            verify_contract(context)
        drawn = self._windows(calibration, evaluation)
        windows, texts = drawn.calibration, drawn.texts
        report.calibration = windows.describe()
        before = self._dense_losses(texts)
        plan = self._plan(windows)
        with self.watch("calibrate"):
            halves = fold_of(windows) if needs_folds(config) else None
            stream = CalibrationStream.from_windows(context, windows, fold_of=halves)
        with self.watch("evaluate"):
            judged = self._text_streams(texts)
        correction = Correction(context, config, windows, drawn.judges) if config.corrects else None
        rescaling = Rescaling(context, config, windows, drawn.judges) if config.rescales else None
        ahead = [each for each in (correction, rescaling) if each is not None and not self.store.is_over(each.stage)]
        targets = [dense for each in ahead for dense in (*each.targets, *each.judges[:1])]
        behind = {"correct": correction.judges[1:]} if correction in ahead else {}  # type: ignore[union-attr]
        if correction is None and config.bits is None:
            behind = {"evaluate": judged}
        self._compress_layers(plan, stream, behind, targets, report)
        if correction is not None:
            report.correction = self._correct(correction)
        del stream  # what was calibrated on is used up
        if config.bits:
            rounded = rescaling.judges[1:] if rescaling in ahead else []  # type: ignore[union-attr]
            self._round_layers(plan, windows, {"rescale": rounded} if rescaling else {"evaluate": judged})
        if rescaling is not None:
            report.rescaling = self._correct(rescaling)
        if rescaling is not None or (correction is not None and not config.bits):
            self._advance(judged)
        with self.watch("evaluate"):
            for text, dense_loss, last in zip(texts, before, judged, strict=True):
                report.add_evaluation(dense_loss, evaluate_stream(context, last, text))
        model.tie_weights()
        dense_widths = [one.shape_before[1] for one in report.by_role("down_proj")]
        describe_in_config(context, plan.layers, config, dense_widths=dense_widths)
        self._measure(report)
        return report

    def _windows(self, calibration: Sources, evaluation: Sequence[Source]) -> RunWindows:
        """Windows to calibrate on, and those to judge by."""
        return self._once(
            self.store.load_windows,
            lambda: read_windows(self.context, self.tokenizer, self.config, calibration, evaluation, self.watch),
            self.store.save_windows,
        )

    def _dense_losses(self, texts: Sequence[TokenWindows]) -> list[Evaluation]:
        """Of the model as it came, on each text."""

        def measure() -> list[Evaluation]:
            with self.watch("evaluate"):
                streams = self._text_streams(texts)
                self._advance(streams)
                return [
                    evaluate_stream(self.context, stream, text) for stream, text in zip(streams, texts, strict=True)
                ]

        return self._once(self.store.load_losses, measure, self.store.save_losses) if texts else []

    def _plan(self, windows: TokenWindows) -> Plan:
        """Ranks and widths of all layers."""
        metrics = self.store.output_metrics()

        def make() -> Plan:
            with self.watch("plan"):
                return make_plan(self.context, windows, self.config, output_metrics=metrics)

        return self._once(lambda: self.store.load_plan(metrics), make, self.store.save_plan)

    def _compress_layers(
        self,
        plan: Plan,
        stream: CalibrationStream,
        behind: Mapping[str, Sequence[CalibrationStream]],
        targets: Sequence[CalibrationStream],
        report: CompressionReport,
    ) -> None:
        """Every layer in order, behind the compressed ones before it.

        Args:
            plan: of all layers; a layer's metrics are dropped when it is done.
            stream: the calibration windows.
            behind: what else goes through the compressed layers, by the stage that it is of.
            targets: what goes through the dense ones.
            report: gets the projections.
        """
        context, watch = self.context, self.watch
        anchor = stream.copy() if has_anchor(self.config) else None
        compressor = LayerCompressor(context, self.config, stream, watch)
        for index, layer in enumerate(context.bar(context.layers, desc="Compressing")):
            if (
                index + 1 < len(context.layers)
                and (following := offloaded_tensors(context.layers[index + 1])) is not None
            ):
                following.prefetch()
            self._advance_all(targets, index, "correct")
            before = None if anchor is None else anchor.copy()
            self._advance_all([] if anchor is None else [anchor], index, "calibrate")
            if (finished := self.store.load_layer(index, layer)) is not None:
                projections, seconds = finished
                watch.add(seconds)
            else:
                start = dict(watch.seconds)
                with context.on_device(index):
                    projections = compressor.compress(
                        index, layer, plan.layers[index], plan.metrics_of(index), anchor=before
                    )
                    with watch("save"):
                        self.store.save_layer(index, layer, projections, watch.since(start))
            report.projections += projections
            for role in PROJECTIONS:
                if (index, role) in plan.output_metrics:
                    del plan.output_metrics[index, role]
            del before
            with context.on_device(index):
                self._advance_all([stream], index, "calibrate")
                for stage, streams in behind.items():
                    self._advance_all(streams, index, stage)

    def _round_layers(
        self, plan: Plan, windows: TokenWindows, behind: Mapping[str, Sequence[CalibrationStream]]
    ) -> None:
        """Every layer in few bits, in order, behind the rounded ones before it.

        Args:
            plan: says which projections get other bits than the others.
            windows: that were calibrated on; they begin once more.
            behind: what else goes through the rounded layers, by the stage that it is of.
        """
        context, config, watch = self.context, self.config, self.watch
        coding = coding_of(config.weights)
        assert coding is not None
        assert config.bits is not None
        with watch("round"):
            stream = CalibrationStream.from_windows(context, windows)
        for index, layer in enumerate(context.bar(context.layers, desc="Rounding")):
            bits = {role: plan.layers[index].bits.get(role, config.bits) for role in context.architecture.roles(layer)}
            options: dict[str, Any] = {"bits": bits, "coding": coding, "group_size": config.group}
            with context.on_device(index):
                if (seconds := self.store.load_rounded(index, layer, **options)) is not None:
                    watch.add(seconds)
                else:
                    start = dict(watch.seconds)
                    with watch("round"):
                        round_layer(context, index, stream, **options)
                    with watch("save"):
                        self.store.save_rounded(index, layer, watch.since(start))
                self._advance_all([stream], index, "round")
                for stage, streams in behind.items():
                    self._advance_all(streams, index, stage)

    def _correct(self, correction: Correction) -> CorrectionReport:
        """Steps of all weights, or of their scales, towards the dense model's predictions."""
        store, stage = self.store, correction.stage

        def take() -> CorrectionReport:
            with self.watch(correction.timed_as):
                return correction.run(store)

        return self._once(
            lambda: store.load_correction(self.context.layers, stage),
            take,
            lambda report, seconds: store.save_correction(report, seconds, stage),
        )

    def _once(
        self,
        load: Callable[[], Finished[T] | None],
        make: Callable[[], T],
        save: Callable[[T, Mapping[str, float]], None],
    ) -> T:
        """A step that the store has is not done again, but its seconds count."""
        if (finished := load()) is not None:
            value, seconds = finished
            self.watch.add(seconds)
            return value
        start = dict(self.watch.seconds)
        value = make()
        save(value, self.watch.since(start))
        return value

    def _text_streams(self, texts: Sequence[TokenWindows]) -> list[CalibrationStream]:
        return [CalibrationStream.from_windows(self.context, text, batch_tokens=EVALUATION_BATCH) for text in texts]

    def _advance(self, streams: Sequence[CalibrationStream]) -> None:
        """Send the texts to judge by through all layers."""
        for index in self.context.bar(range(len(self.context.layers)), desc="Evaluating") if streams else ():
            self._advance_all(streams, index, "evaluate")

    def _advance_all(self, streams: Sequence[CalibrationStream], index: int, stage: str) -> None:
        """Send the streams through one layer, in the time of a stage."""
        if not streams:
            return
        with self.watch(stage), self.context.on_device(index):
            for stream in streams:
                stream.advance(index, self.context.layers[index])

    def _measure(self, report: CompressionReport) -> None:
        """What the run took, and what will be saved."""
        model, device = self.context.model, self.context.device
        report.params_saved = count_parameters(model)
        report.seconds = self.watch.seconds
        report.environment = describe_environment(device, str(model.dtype).removeprefix("torch."))
        report.peak_memory_bytes = peak_memory_bytes()
        on_gpu = device.type == "cuda"
        report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else 0


def _open(model_or_path: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and name."""
    if isinstance(model_or_path, (str, Path)):
        source = find_model(model_or_path)
        tokenizer = tokenizer or load_tokenizer(source)
        model, name = load_model(source, dtype=dtype, device=resolve_device(device)), source.name
    else:
        model = model_or_path.eval()
        forget_gguf(model)
        untie_own_head(model)
        check_finite(model.named_parameters())
        name = (
            model_name(Path(model.config._name_or_path or "")) if model.config._name_or_path else type(model).__name__
        )
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ConfigError(
                "the model is spread over several devices; load it without device_map and pass device instead"
            )
    check_tokenizer(tokenizer, len(embedding_weight(model)))
    return model, tokenizer, name


def _home(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
