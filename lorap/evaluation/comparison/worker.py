"""What one process of a comparison measures: one model, one part, one JSON file.

    python -m lorap.evaluation.comparison.worker '{"part": "speed", "model": "./small", "options": {...}, "out": "cell.json"}'

lorap.evaluation.comparison.compare starts these one after the other, so that one model is in memory at a time, its peak memory
is its own, and its crash is nobody else's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from lorap.architectures import ARCHITECTURES, cache_argument
from lorap.calibration import places
from lorap.calibration.windows import consecutive_windows
from lorap.checkpoint.load import check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.errors import LoRAPError
from lorap.evaluation.perplexity import evaluate
from lorap.evaluation.tasks import open_source
from lorap.files import replacing
from lorap.jsonio import write_json
from lorap.nn.fused import optimize_for_inference
from lorap.nn.linear import embedding_weight
from lorap.system import describe_environment, peak_memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXTS, TASKS, SPEED = "texts", "tasks", "speed"


def measure(part: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Open a model and measure one part of it.

    Args:
        part: ``texts``, ``tasks`` or ``speed``.
        model: as on the command line.
        options: the fields of :class:`lorap.evaluation.comparison.compare.ComparisonOptions`.

    Raises:
        LoRAPError: the model cannot be opened, or a text or task cannot be read.
    """
    source = find_model(model)
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype=options["dtype"], device=resolve_device(options["device"]))
    check_tokenizer(tokenizer, len(embedding_weight(loaded)))
    found = {TEXTS: _texts, TASKS: _tasks, SPEED: _speed}[part](loaded, tokenizer, options)
    return found | {"environment": describe_environment(loaded.device, str(loaded.dtype).removeprefix("torch."))}


def _texts(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Losses as ``lorap eval`` finds them."""
    sizes = {"seq_len": options["seq_len"], "max_tokens": options["max_tokens"]}
    vocab_size = len(embedding_weight(model))
    windows = [consecutive_windows(text, tokenizer, vocab_size=vocab_size, **sizes) for text in options["texts"]]
    return {"texts": [vars(evaluate(model, one)) for one in windows]}


def _tasks(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Answers as ``lorap eval --tasks`` finds them."""
    source = open_source(options["tasks"], data=options["task_data"], limit=options["limit"])
    return {"tasks": {task: result.to_dict() for task, result in source.run(model, tokenizer).items()}}


def _speed(model: PreTrainedModel, _tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, made ready as ``lorap generate`` does, and the most memory that this process has held."""
    if options["optimize"] and getattr(model.config, "model_type", None) in ARCHITECTURES:
        optimize_for_inference(model)
    sizes = {"prompt_tokens": options["prompt_tokens"], "new_tokens": options["new_tokens"]}
    time_generation(model, **sizes)  # to warm up
    prefill, decode = time_generation(model, **sizes)
    return {
        "prefill_tokens_per_second": options["prompt_tokens"] / prefill,
        "decode_tokens_per_second": options["new_tokens"] / decode,
        "peak_bytes": peak_memory_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None,
    }


@torch.inference_mode()
def time_generation(model: PreTrainedModel, *, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Time the reading of a prompt, and greedy decoding after it, one sequence, with a cache.

    The loop is our own: ``generate`` obeys the settings that a checkpoint brings along, which differ between contenders.

    Args:
        model: a causal language model of transformers.
        prompt_tokens: read at once.
        new_tokens: decoded one by one.

    Returns:
        Seconds of both.
    """
    vocab_size = len(embedding_weight(model))
    ids = torch.randint(vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache, name, clock = None, cache_argument(model), [_now(model)]
    for step in range(1 + new_tokens):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        ids, cache = output.logits[:, -1:].argmax(-1), output[name]
        if step in (0, new_tokens):
            clock.append(_now(model))
    start, read, end = clock
    return read - start, end - read


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def main(argument: str) -> None:
    """Measure and write; what goes wrong is one line on stderr where lorap knows it, else a traceback."""
    request = json.loads(argument)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    places.use_copies(request.get("pipes", {}))
    try:
        found = measure(request["part"], request["model"], request["options"])
    except LoRAPError as error:
        raise SystemExit(str(error)) from None
    with replacing(Path(request["out"])) as draft:
        write_json(draft, found, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
