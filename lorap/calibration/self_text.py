"""The model's own samples as calibration text.

A model that writes freely, at temperature 1 and from the start of a document, visits its training distribution in its own
proportions: prose, code, dialogue, lists, other languages. No text has to be found, and none is over-represented. Alone it lacks
what the model knows but seldom writes; mixed with real texts it was the best calibration measured (docs/results.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lorap.architectures import text_config
from lorap.errors import CalibrationError
from lorap.nn.linear import embedding_weight

# Windows that are written at once: each step reads every weight, so many together cost little more than one.
BATCH_WINDOWS = 64
# What separates documents in the training text of models that have it; others start a document with bos.
DOCUMENT_START = "<|endoftext|>"


def sample_windows(
    model: Any, tokenizer: Any, count: int, seq_len: int, *, seed: int = 0, progress: bool = False
) -> Tensor:
    """``count`` documents begun by ``model`` itself, each cut after ``seq_len`` tokens; the start token is not among them.

    Args:
        model: a dense causal language model.
        tokenizer: tells how documents start; may be None, then the model's config does.
        count: windows.
        seq_len: tokens in each.
        seed: of the sampling; the global random state is left as it was.
        progress: show a bar on stderr.

    Returns:
        (count, seq_len) int64 on the CPU.

    Raises:
        CalibrationError: the model's predictions are not finite.
    """
    device = embedding_weight(model).device
    start = start_token(model, tokenizer)
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=seq_len,
        min_new_tokens=seq_len,  # the end of a document is never drawn, so that every window is full
        pad_token_id=start,
    )
    written = []
    # generate() takes what is not said from the model's own settings, and those of a chat model narrow the choice of words.
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(eos_token_id=getattr(text_config(model.config), "eos_token_id", None)),
    )
    devices = range(torch.cuda.device_count())  # manual_seed seeds all of them
    try:
        with (
            torch.random.fork_rng(devices=devices),
            tqdm(
                desc="Sampling", unit="token", total=-(-count // BATCH_WINDOWS) * seq_len, disable=not progress
            ) as bar,
        ):
            torch.manual_seed(seed)
            for first in range(0, count, BATCH_WINDOWS):
                prompt = torch.full((min(BATCH_WINDOWS, count - first), 1), start, device=device)
                output = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=sampling,
                    logits_processor=LogitsProcessorList([_Tick(bar)]),
                )
                written.append(output[:, 1 : 1 + seq_len].cpu())
    finally:
        model.generation_config = own
    return torch.cat(written) if written else torch.empty(0, seq_len, dtype=torch.int64)


def start_token(model: Any, tokenizer: Any) -> int:
    """The token that a new document begins with."""
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        for token in (DOCUMENT_START, tokenizer.bos_token, tokenizer.eos_token):
            if token is not None and token in vocabulary:
                return int(vocabulary[token])
    for name in ("bos_token_id", "eos_token_id"):
        token_id = getattr(text_config(model.config), name, None)
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token_id, int):
            return token_id
    return 0


class _Tick(LogitsProcessor):
    """Moves the bar by one at every step, and stops where there is nothing to draw from; changes nothing."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not bool(torch.isfinite(scores).any(-1).all()) or bool(torch.isnan(scores).any()):
            raise CalibrationError(
                "the model's predictions are not finite, so it cannot write its own calibration text: its weights or its dtype "
                "overflow; try --dtype float32, or calibrate on texts: --calibration FILE"
            )
        self.bar.update()
        return scores
