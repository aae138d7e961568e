"""A few decoder layers compressed for real, on this machine, now: what they take, and from that what all of them will.

Some layers of the model, evenly spread, become a model folder of their own with its embedding and head. The very run of ``lorap
compress`` compresses it, with a few of the windows. Whatever it does while a layer is in memory (``DecoderContext.on_device``)
is timed apart from the rest and counts for all layers; what goes with windows or bytes counts for all of those. So nothing here
knows what the stages do.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lorap.algorithms.step_schedule import schedule
from lorap.architectures import ARCHITECTURES
from lorap.calibration.context import DecoderContext
from lorap.calibration.self_text import BATCH_WINDOWS
from lorap.calibration.sources import OWN_SAMPLES
from lorap.calibration.windows import TokenWindows
from lorap.checkpoint.folders import CONFIG
from lorap.checkpoint.load import ModelSource, find_model, load_model, load_tokenizer
from lorap.checkpoint.write import Writable, write_tensors
from lorap.compression.estimate.shapes import ModelShape
from lorap.compression.estimate.sizes import Sizes
from lorap.compression.estimate.texts import Texts
from lorap.compression.estimate.watch import IN_LAYER, LayerWatch, TimedContext
from lorap.compression.runs.journal import open_journal
from lorap.compression.runs.run import FolderRun, RunOptions
from lorap.compression.runs.steps import JournalStore
from lorap.compression.stored_bytes import without_budget
from lorap.compression.windows import RunWindows, read_windows
from lorap.config import CompressionConfig
from lorap.errors import CheckpointError
from lorap.files import reason
from lorap.outputs import check_room
from lorap.system import Stopwatch

# Layers are tried until they hold so many parameters, one at least: of a small model several, because they differ.
TRIED_PARAMS = 30 * 10**6
# Tokens that are tried at most, in four windows at least: three parts of what correction steps take. A GPU has done with them
# before it has read a layer, so that it gets more.
TRIED_TOKENS, TRIED_TOKENS_GPU, TRIED_WINDOWS = 4608, 16384, 4
EVALUATED_TOKENS = 2048
SAMPLED_TOKENS = 16
# What is done first takes longer. A trial of less than so many seconds is run twice, and the second time counts.
QUICK_SECONDS = 20.0
# Fields of config.json with one entry for each layer.
LAYER_FIELDS = ("layer_types", "no_rope_layers")


@dataclass(frozen=True)
class Trial:
    """What was tried, and what follows.

    Args:
        layers, windows: that were compressed, and calibrated on.
        tried: seconds by stage of the trial; what was done in a layer apart.
        stages: seconds by stage of the whole run.
        environment: where.
        judged: whether the texts leave windows to judge correction steps by; without any there are none.
    """

    layers: int
    windows: int
    tried: Mapping[str, float]
    stages: Mapping[str, float]
    environment: Mapping[str, Any]
    judged: bool = True


def try_layers(
    source: ModelSource,
    shape: ModelShape,
    config: CompressionConfig,
    options: RunOptions,
    sizes: Sizes,
    texts: Texts,
    *,
    folder: Path,
) -> Trial:
    """Compress some layers, and multiply.

    Args:
        source: a local model, which is read only.
        shape: of it.
        config, options: as for :func:`lorap.compress_to_folder`; weights and sparsity follow from no budget any more.
        sizes: what will be left.
        texts: how much will be read.
        folder: on the disk that the output will be on; what is written there goes again.

    Raises:
        CheckpointError: the folder cannot be written.
        LoRAPError: whatever would stop the run.
    """
    count = max(1, min(TRIED_PARAMS // shape.layer_params, shape.num_layers))
    layers = [(2 * place + 1) * shape.num_layers // (2 * count) for place in range(count)]
    desc = f"Trying {count} of {shape.num_layers} layers"
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".lorap-plan-", dir=folder) as name,
            tqdm(desc=desc, unit="step", disable=not options.progress) as bar,
        ):
            place, opening = Path(name) / "dense", LayerWatch(bar)
            needed = 3 * shape.itemsize * (count * shape.layer_params + 2 * shape.head_params)
            check_room(Path(name), needed, shown=folder)
            _write_layers(source, shape, layers, place, dtype=options.dtype, watch=opening)
            for turn in range(2):
                out = Path(name) / f"small-{turn}"
                with open_journal(out) as journal:
                    quiet = replace(options, progress=False)
                    chosen = without_budget(config, shape.dense)
                    run = _TrialRun(find_model(place), out, chosen, quiet, journal, LayerWatch(bar), texts=texts)
                    report = run.run()
                if sum(report.seconds.values()) > QUICK_SECONDS:
                    break
            tried = {**report.seconds, **opening.seconds}
            times = run.times | {
                "check": sum(shape.stored_bytes.values()) / _nbytes(place),
                "save": sum(sizes.nbytes.values()) / _nbytes(out),
            }
            return Trial(
                layers=len(layers),
                windows=run.windows,
                tried=tried,
                stages=_multiplied(tried, times, shape.num_layers / len(layers)),
                environment=report.environment,
                judged=all(each.enough > 0 for each in (report.correction, report.rescaling) if each is not None),
            )
    except OSError as error:
        raise CheckpointError(
            f"cannot try a layer in {folder}: {reason(error, folder)}; choose another --out, or --no-time for sizes alone"
        ) from error


def _write_layers(
    source: ModelSource, shape: ModelShape, layers: Sequence[int], folder: Path, *, dtype: str, watch: Stopwatch
) -> None:
    """A model of these layers alone. A GGUF file is opened as a whole, as a run would, and that is timed."""
    folder.mkdir()
    tensors: Mapping[str, Writable]
    if source.checked:
        settings, tensors = dict(source.checked.settings), source.checked.tensors
        tokenizer = load_tokenizer(source)
    else:
        with watch("load"):
            tokenizer, model = load_tokenizer(source), load_model(source, dtype=dtype)
        settings, tensors = model.config.to_dict(), model.state_dict()
        settings["architectures"] = [type(model).__name__]
    settings["tie_word_embeddings"] = shape.tied
    settings.pop("quantization_config", None)  # what is written is floating point
    text = settings
    if "text_config" in settings:
        text = settings["text_config"] = dict(settings["text_config"])
    text["num_hidden_layers"] = len(layers)
    for name in LAYER_FIELDS:
        if isinstance(text.get(name), list):
            text[name] = [text[name][layer] for layer in layers]
    prefix = f"{ARCHITECTURES[shape.config.model_type].layers}."
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    if shape.tied:
        found.pop("lm_head.weight", None)
    for place, layer in enumerate(layers):
        before = f"{prefix}{layer}."
        found |= {f"{prefix}{place}.{n.removeprefix(before)}": t for n, t in tensors.items() if n.startswith(before)}
    write_tensors(folder / "model.safetensors", found)
    (folder / CONFIG).write_text(json.dumps(settings), "utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@dataclass
class _TrialRun(FolderRun):
    """The run of ``lorap compress``, with few windows.

    Args:
        texts: how much the whole run reads.
        times: how much more of each stage there is in the whole run, but for its layers.
    """

    texts: Texts = field(kw_only=True)
    times: dict[str, float] = field(default_factory=dict, kw_only=True)

    def prepared(self, context: DecoderContext, tokenizer: Any) -> DecoderContext:
        """With a watch on each layer. The model writes a little; then the texts are read, and most of their windows left out."""
        assert isinstance(self.watch, LayerWatch)
        context = TimedContext(**vars(context), watch=self.watch)
        self._sample(context, tokenizer)

        def any_tokens(count: int, seq_len: int, seed: int) -> Tensor:
            return torch.randint(context.vocab_size, (count, seq_len), generator=torch.Generator().manual_seed(seed))

        options, config = self.options, self.config
        found = read_windows(
            context, tokenizer, config, options.calibration, options.evaluation, self.watch, sampler=any_tokens
        )
        drawn, texts = found.calibration, found.texts
        tokens = TRIED_TOKENS_GPU if context.device.type == "cuda" else TRIED_TOKENS
        few = _some(drawn, max(TRIED_WINDOWS, tokens // drawn.input_ids.shape[1]))
        less = [_some(text, max(1, EVALUATED_TOKENS // text.input_ids.shape[1])) for text in texts[:1]]
        corrected = _corrected(drawn, config.correction_steps) / _corrected(few, config.correction_steps)
        followed = (
            corrected
            if config.corrects
            else _corrected(drawn, config.scale_steps) / _corrected(few, config.scale_steps)
        )
        judges = found.judges and _some(found.judges, max(2, round(len(found.judges.input_ids) / followed)))
        JournalStore(self.journal, context.architecture).save_windows(RunWindows(few, judges, less), {})
        self.windows = len(few.input_ids)
        calibrated = drawn.tokens / few.tokens
        self.times |= {
            "evaluate": sum(text.tokens for text in texts) / less[0].tokens if less else 1.0,
            "plan": calibrated if config.allocation == "flap" else 1.0,
            "calibrate": calibrated,
            "correct": corrected,
            "rescale": _corrected(drawn, config.scale_steps) / _corrected(few, config.scale_steps),
        }
        return context

    def _sample(self, context: TimedContext, tokenizer: Any) -> None:
        """Some tokens of as many windows as are written at once."""
        texts = self.texts
        if not texts.own_windows:
            return
        length = min(SAMPLED_TOKENS, texts.seq_len)
        count = min(texts.own_windows, BATCH_WINDOWS)
        few = replace(self.config, num_calibration_samples=count, calibration_seq_len=length)
        with context.watched_calls():
            read_windows(context, tokenizer, few, OWN_SAMPLES, (), context.watch)
        self.times["sample"] = -(-texts.own_windows // BATCH_WINDOWS) * texts.seq_len / length


def _some(windows: TokenWindows, count: int) -> TokenWindows:
    """So many of the windows, evenly spread, each of the group that it was of."""
    every = len(windows.input_ids)
    rows = torch.linspace(0, every - 1, min(count, every)).round().long()
    return replace(windows.rows(rows), groups=None if windows.groups is None else windows.groups[rows])


def _corrected(windows: TokenWindows, steps: int) -> float:
    """Windows that so many correction steps take; 1 where there are none."""
    count, seq_len = windows.input_ids.shape
    plan = schedule(count, seq_len, steps)
    return plan.steps * count / plan.parts or 1.0


def _nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _multiplied(tried: Mapping[str, float], times: Mapping[str, float], layers: float) -> dict[str, float]:
    """Seconds by stage of the whole run.

    Args:
        tried: as :class:`LayerWatch` has them.
        times: how much more of each stage there is, layers aside; layers are written once, whatever the folder's size.
        layers: how many times as many layers there are.
    """
    found: dict[str, float] = {}
    for name, seconds in tried.items():
        stage = name.removesuffix(IN_LAYER)
        more = times.get(stage, 1.0) if stage == name else layers * (1.0 if stage == "save" else times.get(stage, 1.0))
        found[stage] = found.get(stage, 0.0) + seconds * more
    return found
