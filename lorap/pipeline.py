"""``compress()``: the only place where the order of the steps lives.

text -> windows -> plan of all layers -> for each decoder layer: [observe -> factorize attention -> prune FFN -> advance] -> model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorap.allocation import LayerPlan
from lorap.architectures import PROJECTIONS, Architecture, find_architecture
from lorap.calibration.data import Sampler, TokenWindows, consecutive_windows, draw_windows, fold_of
from lorap.calibration.mixtures import Sources
from lorap.calibration.samples import sample_windows
from lorap.calibration.sources import DEFAULT_CALIBRATION, Source
from lorap.calibration.stream import CalibrationStream
from lorap.config import CompressionConfig
from lorap.errors import ConfigError, FactorizationError
from lorap.evaluation import evaluate
from lorap.integrations.transformers import LoRAPConfig, mark_compressed
from lorap.layers import LayerCompressor, needs_folds
from lorap.loading import check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.modules import count_parameters
from lorap.planning import make_plan
from lorap.report import CompressionReport
from lorap.resources import Stopwatch, describe_environment, peak_memory_bytes
from lorap.version import __version__

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
    """Compress a language model with LoRAP (arXiv 2404.09695): low-rank attention, pruned FFN, nothing trained.

    Args:
        model_or_path: a transformers model (compressed in place), a local folder, a hub name, or a GGUF file.
        calibration: a text or JSONL file, a ``datasets`` name, tokens of shape (tokens,) or (windows, seq_len), a mapping with
            ``input_ids`` and ``attention_mask``, the name of a text that ships with lorap, such as ``default/novel``, or
            ``self``, what the model itself writes. Or a list of these and of pairs (source, weight): the samples are split
            by weight. ``default`` is such a mixture: half the texts that ship with lorap, half ``self``.
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
    config = config or CompressionConfig()
    watch = Stopwatch()
    with watch("load"):
        model, tokenizer, name = _open(model_or_path, tokenizer, device, dtype)
        architecture = find_architecture(model)
        layers = architecture.decoder_layers(model)
        check_finite(model)
        where = _home(model) if device == "auto" else resolve_device(device)
    with watch("tokenize"):

        def sampler(count: int, seq_len: int, seed: int) -> Tensor:
            with watch("sample"):
                return sample_windows(model, tokenizer, count, seq_len, seed=seed, progress=progress)

        windows, texts = _read_texts(model, tokenizer, calibration, evaluation, config, sampler)
    report = CompressionReport(model=name, config=config, calibration=_describe(windows))
    report.params_total_before = count_parameters(model)
    with watch("evaluate"):
        before = [evaluate(model, text, progress=progress) for text in texts]
    with watch("plan"):
        bar = partial(tqdm, desc="Planning", unit="layer", total=len(layers), disable=not progress)
        plan = make_plan(model, list(layers), windows, config, architecture, device=where, progress=bar)
    with watch("calibrate"):
        halves = fold_of(windows) if needs_folds(config) else None
        stream = CalibrationStream.from_model(model, layers, windows, device=where, fold_of=halves)
    compressor = LayerCompressor(config, architecture, stream, where, watch)
    for index, layer in enumerate(tqdm(layers, desc="Compressing", unit="layer", disable=not progress)):
        metrics = {
            role: plan.output_metrics.pop((index, role)) for role in PROJECTIONS if (index, role) in plan.output_metrics
        }
        report.projections += compressor.compress(index, layer, plan.layers[index], metrics)
    _mark(model, plan.layers, architecture, report)
    with watch("evaluate"):
        for text, dense in zip(texts, before, strict=True):
            report.add_evaluation(dense, evaluate(model, text, progress=progress))
    report.seconds = watch.seconds
    report.environment = describe_environment(where, str(model.dtype).removeprefix("torch."))
    report.peak_memory_bytes = peak_memory_bytes()
    report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    return model, report


def _open(model_or_path: Any, tokenizer: Any, device: str, dtype: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and name."""
    if isinstance(model_or_path, (str, Path)):
        source = find_model(model_or_path)
        tokenizer = tokenizer or load_tokenizer(source)
        model, name = load_model(source, dtype=dtype, device=resolve_device(device)), source.name
    else:
        model = model_or_path.eval()
        name = Path(model.config._name_or_path or "").name or type(model).__name__
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
        mark_compressed(model, shapes)
    report.params_saved = count_parameters(model)


def _new_biases(
    model: Any, plans: Sequence[LayerPlan], architecture: Architecture, config: CompressionConfig
) -> list[str]:
    """Down projections that gained a bias which the model's own config does not know."""
    if not config.bias_compensation or getattr(model.config, "mlp_bias", False):
        return []
    names = [architecture.module_name(index, "down_proj") for index in range(len(plans))]
    return [name for name in names if model.get_submodule(name).bias is not None]


def check_finite(model: nn.Module) -> None:
    """Refuse weights with NaN or infinity before any work is done, by name.

    Raises:
        FactorizationError: naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        bad = parameter.numel() - int(torch.isfinite(parameter).sum())
        if bad:
            raise FactorizationError(
                f"{name} contains {bad:,} values that are NaN or infinite; the checkpoint is damaged"
            )


def _describe(windows: TokenWindows) -> dict[str, Any]:
    count, seq_len = windows.input_ids.shape
    return {
        "name": windows.name,
        "windows": count,
        "seq_len": seq_len,
        "tokens": windows.tokens,
        "sha256": windows.sha256,
        "sources": [asdict(share) for share in windows.shares],
    }


def _vocab_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _home(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
