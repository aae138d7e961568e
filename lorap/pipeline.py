"""``compress()``: the only place where the order of the steps lives.

text -> windows -> for each decoder layer: [observe -> factorize attention -> prune FFN -> advance] -> compressed model
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorap.allocation import LayerPlan, plan_layer
from lorap.architectures import MLP, PROJECTIONS, SHARED_INPUTS, Architecture, find_architecture
from lorap.calibration.data import DEFAULT_CALIBRATION, Source, TokenWindows, consecutive_windows, draw_windows
from lorap.calibration.statistics import ActivationStats
from lorap.calibration.stream import CalibrationStream
from lorap.config import CompressionConfig
from lorap.errors import CalibrationError, ConfigError, FactorizationError
from lorap.evaluation import evaluate
from lorap.factorization import factorize
from lorap.integrations.transformers import LoRAPConfig, mark_compressed
from lorap.loading import check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.modules import LowRankLinear
from lorap.pruning import keep_inputs, keep_outputs, select_channels
from lorap.report import CompressionReport, ProjectionReport, compressed_roles
from lorap.resources import Stopwatch, describe_environment, peak_memory_bytes
from lorap.version import __version__

# Tokens of each evaluation text when compress() measures before and after; `lorap eval` has no such limit.
EVALUATION_TOKENS = 4096


def compress(
    model_or_path: Any,
    *,
    calibration: Source = DEFAULT_CALIBRATION,
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
            ``input_ids`` and ``attention_mask``, or the name of a text that ships with lorap.
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
        plans = [plan_layer(_shapes(architecture.linears(layer)), config) for layer in layers]
        check_finite(model)
        where = _home(model) if device == "auto" else resolve_device(device)
    with watch("tokenize"):
        windows, texts = _read_texts(model, tokenizer, calibration, evaluation, config)
    report = CompressionReport(model=name, config=config, calibration=_describe(windows))
    report.params_total_before = count_parameters(model)
    with watch("evaluate"):
        before = [evaluate(model, text, progress=progress) for text in texts]
    with watch("calibrate"):
        stream = CalibrationStream.from_model(model, layers, windows, device=where)
    for index, layer in enumerate(tqdm(layers, desc="Compressing", unit="layer", disable=not progress)):
        report.projections += compress_layer(index, layer, plans[index], stream, config, architecture, watch, where)
    _mark(model, layers, plans, architecture, report)
    with watch("evaluate"):
        for text, dense in zip(texts, before, strict=True):
            report.add_evaluation(dense, evaluate(model, text, progress=progress))
    report.seconds = watch.seconds
    report.environment = describe_environment(where, str(model.dtype).removeprefix("torch."))
    report.peak_memory_bytes = peak_memory_bytes()
    report.peak_device_memory_bytes = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    return model, report


def compress_layer(
    index: int,
    layer: nn.Module,
    plan: LayerPlan,
    stream: CalibrationStream,
    config: CompressionConfig,
    architecture: Architecture,
    watch: Stopwatch,
    device: torch.device,
) -> list[ProjectionReport]:
    """Observe one decoder layer, replace its projections, and send the calibration windows through what came out.

    Raises:
        CalibrationError: an activation is NaN or infinite.
        FactorizationError: a weight is.
    """
    home = next(layer.parameters()).device
    layer.to(device)
    dense = architecture.linears(layer)
    with watch("calibrate"):
        stats = _observe(index, layer, dense, stream, config)
    with watch("factorize"):
        factored, errors = _factorize(index, dense, stats, plan, config, architecture)
    with watch("prune"):
        pruned, pruning_errors = _prune(dense, stats, config)
    replaced = factored | pruned
    for role, module in replaced.items():
        layer.set_submodule(architecture.projections[role], module)
    if pruned:
        layer.get_submodule(architecture.mlp).intermediate_size = plan.intermediate_size  # type: ignore[assignment]
    with watch("calibrate"):
        stream.advance(index, layer)
    layer.to(home)
    errors |= pruning_errors
    return [_compare(index, role, dense[role], replaced.get(role), errors.get(role, 0.0)) for role in PROJECTIONS]


def _observe(
    index: int, layer: nn.Module, dense: dict[str, nn.Linear], stream: CalibrationStream, config: CompressionConfig
) -> dict[str, ActivationStats]:
    """Statistics by projection; projections that read the same input share one object."""
    roles = compressed_roles(config)
    shared = {name: readers for name, readers in SHARED_INPUTS.items() if set(readers) & set(roles)}
    afm = config.attention_method == "afm"
    moments = {
        name: afm and ("self_attn" if name.startswith("attention") else "mlp") in _factored(config) for name in shared
    }
    stats = stream.observe(index, layer, {name: dense[readers[0]] for name, readers in shared.items()}, moments=moments)
    for name, found in stats.items():
        if not found.is_finite:
            raise CalibrationError(
                f"the activations in layer {index} are not finite (input of {', '.join(shared[name])}): the calibration text or "
                "the weights overflow this dtype; try --dtype float32, or check the model"
            )
    return {role: stats[name] for name, readers in shared.items() for role in readers}


def _factored(config: CompressionConfig) -> set[str]:
    """The sub-layers whose matrices become factor pairs."""
    return {name for name in config.sublayers if name == "self_attn" or config.mlp_method == "factorize"}


def _metric(method: str, stats: ActivationStats) -> Tensor | None:
    """What a factorization is judged on: nothing (svd), the channel norms (awsvd) or the spread of the outputs (afm)."""
    if method == "svd":
        return None
    return stats.channel_sq_norm if method == "awsvd" else stats.covariance


def _factorize(
    index: int,
    dense: dict[str, nn.Linear],
    stats: dict[str, ActivationStats],
    plan: LayerPlan,
    config: CompressionConfig,
    architecture: Architecture,
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Low-rank stand-ins for the projections that the plan names, and their weighted errors."""
    modules: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for role, rank in plan.ranks.items():
        linear = dense[role]
        metric = _metric(config.attention_method, stats[role])
        factors = factorize(linear.weight.data, rank, metric, name=architecture.module_name(index, role))
        bias = None if linear.bias is None else linear.bias.data
        modules[role] = LowRankLinear.from_factors(factors.left, factors.right, bias).train(linear.training)
        errors[role] = factors.error
    return modules, errors


def _prune(
    dense: dict[str, nn.Linear], stats: dict[str, ActivationStats], config: CompressionConfig
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Narrower stand-ins for gate, up and down, and their weighted errors."""
    if "mlp" not in config.sublayers or config.mlp_method != "prune":
        return {}, {}
    gate, up, down = (dense[role] for role in MLP)
    channels = select_channels(
        gate.weight.data,
        up.weight.data,
        down.weight.data,
        stats["gate_proj"].channel_sq_norm,
        stats["down_proj"].channel_sq_norm,
        sparsity=config.sparsity,
        least_important_kept=config.least_important_kept,
    )
    kept = channels.kept_channels
    if len(kept) == gate.out_features:
        return {}, {}
    return {
        "gate_proj": keep_outputs(gate, kept),
        "up_proj": keep_outputs(up, kept),
        "down_proj": keep_inputs(down, kept),
    }, channels.errors


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
    model: Any, tokenizer: Any, calibration: Source, evaluation: Sequence[Source], config: CompressionConfig
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
    )
    texts = [
        consecutive_windows(text, tokenizer, seq_len=seq_len, max_tokens=EVALUATION_TOKENS, vocab_size=vocab_size)
        for text in evaluation
    ]
    return windows, texts


def _mark(
    model: Any, layers: nn.ModuleList, plans: Sequence[LayerPlan], architecture: Architecture, report: CompressionReport
) -> None:
    """Write the new shapes into the model's config, so that it saves as a lorap checkpoint; count what will be saved."""
    ranks = {
        architecture.module_name(index, role): rank
        for index, plan in enumerate(plans)
        for role, rank in plan.ranks.items()
    }
    widths = [plan.intermediate_size for plan in plans]
    dense_width = model.config.intermediate_size
    uniform = len(set(widths)) == 1
    if uniform:
        model.config.intermediate_size = widths[0]
    sizes = {f"{architecture.layers}.{index}.{architecture.mlp}": width for index, width in enumerate(widths)}
    if ranks or widths != [dense_width] * len(widths):
        shapes = LoRAPConfig(
            ranks=ranks,
            intermediate_sizes={} if uniform else sizes,
            dense_intermediate_size=dense_width,
            sparsity=report.config.sparsity,
            recipe=report.config.recipe,
            lorap_version=__version__,
        )
        mark_compressed(model, shapes)
    report.params_saved = count_parameters(model)


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


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; tied ones count once, as they are saved once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _compare(index: int, role: str, before: nn.Linear, after: nn.Module | None, error: float) -> ProjectionReport:
    shape = (before.out_features, before.in_features)
    now = before if after is None else after
    return ProjectionReport(
        layer=index,
        role=role,
        shape_before=shape,
        shape_after=(int(now.out_features), int(now.in_features)),  # type: ignore[arg-type]
        rank=now.rank if isinstance(now, LowRankLinear) else None,
        params_before=count_parameters(before),
        params_after=count_parameters(now),
        error=error,
    )


def _shapes(linears: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {role: (linear.out_features, linear.in_features) for role, linear in linears.items()}


def _describe(windows: TokenWindows) -> dict[str, Any]:
    count, seq_len = windows.input_ids.shape
    return {
        "name": windows.name,
        "windows": count,
        "seq_len": seq_len,
        "tokens": windows.tokens,
        "sha256": windows.sha256,
    }


def _vocab_size(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _home(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
