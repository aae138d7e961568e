"""Perplexity as the paper measures it: windows that do not overlap, loss over seq_len - 1 positions of each."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from lorap.calibration.data import TokenWindows
from lorap.errors import CalibrationError

# Tokens per forward pass. The logits of 512 tokens and 150,000 words take 300 MB in float32; more does not run faster on a CPU.
BATCH_TOKENS = 512
# exp() of more overflows float64.
MAX_EXPONENT = 709


@dataclass(frozen=True)
class Evaluation:
    """Loss of one model on one text.

    Args:
        text: name of the text.
        nats: mean negative log-likelihood of a token, in nats.
        perplexity: exp(nats).
        tokens: tokens read, padding not counted.
        seq_len: tokens per window.
        seconds: wall time.
    """

    text: str
    nats: float
    perplexity: float
    tokens: int
    seq_len: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: Any, windows: TokenWindows, *, progress: bool = False, batch_tokens: int = BATCH_TOKENS
) -> Evaluation:
    """Mean loss of ``model`` over token windows; the first token of each is context only.

    Raises:
        CalibrationError: windows of one token, or a loss that is not finite.
    """
    start = time.perf_counter()
    ids, mask = windows.input_ids, windows.attention_mask
    if ids.shape[1] < 2:
        raise CalibrationError(f"windows of {ids.shape[1]} token predict nothing; use at least 2")
    size = max(1, batch_tokens // ids.shape[1])
    device = model.get_input_embeddings().weight.device
    loss, predicted = 0.0, 0
    for first in tqdm(range(0, len(ids), size), desc=f"Evaluating {windows.name}", unit="batch", disable=not progress):
        batch = ids[first : first + size].to(device)
        batch_mask = None if mask is None else mask[first : first + size].to(device)
        logits = model(input_ids=batch, attention_mask=batch_mask, use_cache=False).logits[:, :-1]
        targets = batch[:, 1:]
        if batch_mask is not None:
            # Padding is neither predicted nor predicted from.
            targets = targets.masked_fill((batch_mask[:, 1:] & batch_mask[:, :-1]) == 0, -100)
        loss += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").double())
        predicted += int((targets != -100).sum())
    if not predicted:
        raise CalibrationError(f"{windows.name} leaves nothing to predict: its windows hold fewer than two real tokens")
    nats = loss / predicted
    if not math.isfinite(nats):
        raise CalibrationError(
            f"the loss on {windows.name} is {nats}: the model's weights or its dtype {model.dtype} overflow"
        )
    return Evaluation(
        text=windows.name,
        nats=nats,
        perplexity=math.exp(nats) if nats < MAX_EXPONENT else math.inf,
        tokens=windows.tokens,
        seq_len=ids.shape[1],
        seconds=time.perf_counter() - start,
    )
