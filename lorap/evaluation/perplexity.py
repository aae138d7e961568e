"""Perplexity as the paper measures it: windows that do not overlap, loss over seq_len - 1 positions of each."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from lorap.calibration.context import DecoderContext
from lorap.calibration.losses import IGNORED, next_token_loss, next_tokens
from lorap.calibration.stream import CalibrationStream, summed_loss
from lorap.calibration.windows import TokenWindows
from lorap.errors import CalibrationError, ConfigError
from lorap.nn.linear import embedding_weight
from lorap.reports.records import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens per forward pass. The logits of 512 tokens and 150,000 words take 300 MB in float32; more does not run faster on a CPU.
BATCH_TOKENS = 512
# exp() of more overflows float64.
MAX_EXPONENT = 709


@dataclass(frozen=True)
class WindowLosses:
    """Loss of one model on each window of a text.

    Args:
        losses: (windows,) float64, summed over the predicted tokens of a window, in nats.
        predicted: (windows,) int64, how many those are.
        sha256: of the token ids, so that nothing but the same windows is compared.
    """

    losses: Tensor
    predicted: Tensor
    sha256: str


@dataclass(frozen=True)
class Fidelity:
    """How a model's predictions compare with another's.

    Args:
        divergence: of the other's from the model's, sum p ln(p / q), in nats per token.
        same_token: share of the predictions whose likeliest token is the same.
        predicted: how many were compared.
    """

    divergence: float
    same_token: float
    predicted: int


@dataclass(frozen=True)
class LossDifference:
    """One model's loss minus another's on the same windows.

    Args:
        nats: difference of the mean losses of a token.
        error: its standard error, from the spread of the differences between windows; NaN where there is but one.
        windows: how many.
    """

    nats: float
    error: float
    windows: int


def evaluate(
    model: PreTrainedModel, windows: TokenWindows, *, progress: bool = False, batch_tokens: int = BATCH_TOKENS
) -> Evaluation:
    """Mean loss of ``model`` over token windows; the first token of each is context only.

    Args:
        model: a causal language model of transformers.
        windows: to read.
        progress: show a progress bar on stderr.
        batch_tokens: tokens at once.

    Raises:
        CalibrationError: windows of one token, or a loss that is not finite.
    """
    return evaluate_windows(model, windows, progress=progress, batch_tokens=batch_tokens)[0]


@torch.no_grad()
def evaluate_windows(
    model: PreTrainedModel, windows: TokenWindows, *, progress: bool = False, batch_tokens: int = BATCH_TOKENS
) -> tuple[Evaluation, WindowLosses]:
    """As :func:`evaluate`, with the loss of each window beside it.

    Args:
        model: a causal language model of transformers.
        windows: to read.
        progress: show a progress bar on stderr.
        batch_tokens: tokens at once.

    Returns:
        The mean loss, and the sum of losses and the number of predicted tokens of each window.
    """
    start = time.perf_counter()
    batches = _batches(windows, batch_tokens)
    losses, predicted = [], []
    for ids, mask in tqdm(batches, desc=f"Evaluating {windows.name}", unit="batch", disable=not progress):
        logits = _logits(model, ids, mask)
        targets = next_tokens(ids, mask).to(logits.device)
        losses.append(next_token_loss(logits, targets, reduction="none").double().sum(1).cpu())
        predicted.append((targets != IGNORED).sum(1).cpu())
    by_window = WindowLosses(torch.cat(losses), torch.cat(predicted), windows.sha256)
    total, count = float(by_window.losses.sum()), int(by_window.predicted.sum())
    return _evaluation(windows, total, count, time.perf_counter() - start, model.dtype), by_window


@torch.no_grad()
def compare_predictions(
    model: PreTrainedModel, dense: PreTrainedModel, windows: TokenWindows, *, batch_tokens: int = BATCH_TOKENS
) -> Fidelity:
    """How close the predictions of a model are to those of the dense one, whatever the text says next.

    Args:
        model: a causal language model of transformers.
        dense: another one of the same vocabulary.
        windows: to read; the last token of each predicts nothing that is judged elsewhere, and is left out here too.
        batch_tokens: tokens at once.

    Raises:
        CalibrationError: windows of one token, or predictions that are not finite.
    """
    divergence, same, predicted = 0.0, 0, 0
    for ids, mask in _batches(windows, batch_tokens):
        counted = next_tokens(ids, mask) != IGNORED
        logits = (_logits(one, ids, mask)[:, :-1] for one in (model, dense))
        ours, theirs = (one.log_softmax(-1, dtype=torch.float32)[counted.to(one.device)] for one in logits)
        theirs = theirs.to(ours.device)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        predicted += len(ours)
    if not predicted:
        raise CalibrationError(f"{windows.name} leaves nothing to predict: its windows hold fewer than two real tokens")
    if not math.isfinite(divergence):
        raise CalibrationError(f"the predictions on {windows.name} are not finite; use float32 or check the weights")
    return Fidelity(divergence / predicted, same / predicted, predicted)


def _batches(windows: TokenWindows, batch_tokens: int) -> list[tuple[Tensor, Tensor | None]]:
    """Token ids and mask of some windows at a time, (windows, seq_len) each.

    Raises:
        CalibrationError: windows of one token.
    """
    ids, mask = windows.input_ids, windows.attention_mask
    if ids.shape[1] < 2:
        raise CalibrationError(f"windows of {ids.shape[1]} token predict nothing; use at least 2")
    parts = ids.split(max(1, batch_tokens // ids.shape[1]))
    masks = [None] * len(parts) if mask is None else mask.split(len(parts[0]))
    return list(zip(parts, masks, strict=True))


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, seq_len, vocabulary)."""
    device = embedding_weight(model).device
    mask = None if mask is None else mask.to(device)
    logits: Tensor = model(input_ids=ids.to(device), attention_mask=mask, use_cache=False).logits
    return logits


def paired_difference(ours: WindowLosses, theirs: WindowLosses) -> LossDifference:
    """Mean loss of a token under one model minus that under another, window by window.

    Both models find the same windows easy and hard, so that this is known far better than either loss. Windows may predict
    different numbers of tokens.

    Raises:
        ConfigError: the two did not read the same tokens.
    """
    if ours.sha256 != theirs.sha256 or not torch.equal(ours.predicted, theirs.predicted):
        raise ConfigError(
            f"the two models did not read the same tokens ({len(ours.losses):,} and {len(theirs.losses):,} windows), so their "
            "losses per token cannot be compared; compare models with the same tokenizer"
        )
    nats, error = ratio_of_sums(ours.losses - theirs.losses, ours.predicted.double())
    return LossDifference(nats, error, len(ours.losses))


def ratio_of_sums(values: Tensor, sizes: Tensor) -> tuple[float, float]:
    """The sum of ``values`` over that of ``sizes``, and its standard error (Cochran, Sampling Techniques, 1977, section 6.4).

    Args:
        values: (n,) float64, of windows or answers.
        sizes: (n,) float64, how much each of them counts.

    Returns:
        The error is NaN where n is 1.
    """
    count = len(values)
    ratio = float(values.sum() / sizes.sum())
    spread = float((values - ratio * sizes).square().sum())
    error = math.sqrt(spread * count / (count - 1)) / float(sizes.sum()) if count > 1 else math.nan
    return ratio, error


@torch.no_grad()
def evaluate_stream(context: DecoderContext, stream: CalibrationStream, windows: TokenWindows) -> Evaluation:
    """The same for windows that went through the decoder layers already, such as those of a model larger than memory.

    Args:
        context: the model, whose last norm and head are still to come.
        stream: all windows behind the last layer.
        windows: the same windows, as tokens.

    Raises:
        CalibrationError: as :func:`evaluate`.
    """
    start, model = time.perf_counter(), context.model
    loss, predicted = 0.0, 0
    with context.head_in_memory():
        home = model.get_output_embeddings().weight.device
        for batch in stream.batches:
            found, count = summed_loss(context, batch, batch.hidden.to(home))
            loss += float(found.double())
            predicted += count
    loss = stream.processes.sum_number(loss, home)
    predicted = round(stream.processes.sum_number(predicted, home))
    return _evaluation(windows, loss, predicted, time.perf_counter() - start, model.dtype)


def _evaluation(windows: TokenWindows, loss: float, predicted: int, seconds: float, dtype: torch.dtype) -> Evaluation:
    if not predicted:
        raise CalibrationError(f"{windows.name} leaves nothing to predict: its windows hold fewer than two real tokens")
    nats = loss / predicted
    if not math.isfinite(nats):
        raise CalibrationError(
            f"the loss on {windows.name} is {nats}: the model's weights or its dtype {dtype} overflow"
        )
    return Evaluation(
        text=windows.name,
        nats=nats,
        perplexity=math.exp(nats) if nats < MAX_EXPONENT else math.inf,
        tokens=windows.tokens,
        seq_len=windows.input_ids.shape[1],
        seconds=seconds,
    )
