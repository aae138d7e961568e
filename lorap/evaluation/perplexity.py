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
from lorap.checkpoint.paging import in_memory
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
    ids, mask = windows.input_ids, windows.attention_mask
    if ids.shape[1] < 2:
        raise CalibrationError(f"windows of {ids.shape[1]} token predict nothing; use at least 2")
    size = max(1, batch_tokens // ids.shape[1])
    device = embedding_weight(model).device
    losses, predicted = [], []
    for first in tqdm(range(0, len(ids), size), desc=f"Evaluating {windows.name}", unit="batch", disable=not progress):
        batch = ids[first : first + size].to(device)
        batch_mask = None if mask is None else mask[first : first + size].to(device)
        logits = model(input_ids=batch, attention_mask=batch_mask, use_cache=False).logits
        targets = next_tokens(batch, batch_mask)
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
    ids, mask = windows.input_ids, windows.attention_mask
    if ids.shape[1] < 2:
        raise CalibrationError(f"windows of {ids.shape[1]} token predict nothing; use at least 2")
    size = max(1, batch_tokens // ids.shape[1])
    divergence, same, predicted = 0.0, 0, 0
    for first in range(0, len(ids), size):
        batch, batch_mask = ids[first : first + size], None if mask is None else mask[first : first + size]
        counted = next_tokens(batch, batch_mask) != IGNORED
        ours, theirs = (_log_probabilities(one, batch, batch_mask)[counted.to(one.device)] for one in (model, dense))
        theirs = theirs.to(ours.device)
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        predicted += len(ours)
    if not predicted:
        raise CalibrationError(f"{windows.name} leaves nothing to predict: its windows hold fewer than two real tokens")
    if not math.isfinite(divergence):
        raise CalibrationError(f"the predictions on {windows.name} are not finite; use float32 or check the weights")
    return Fidelity(divergence / predicted, same / predicted, predicted)


def _log_probabilities(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, seq_len - 1, vocabulary) float32: of the next token, for all but the last."""
    device = embedding_weight(model).device
    logits = model(
        input_ids=ids.to(device), attention_mask=None if mask is None else mask.to(device), use_cache=False
    ).logits
    return logits[:, :-1].log_softmax(-1, dtype=torch.float32)


def paired_difference(ours: WindowLosses, theirs: WindowLosses) -> LossDifference:
    """Mean loss of a token under one model minus that under another, window by window.

    Both models find the same windows easy and hard, so that this is known far better than either loss. Windows may predict
    different numbers of tokens; the error is that of a ratio of sums (Cochran, Sampling Techniques, 1977, section 6.4).

    Raises:
        ConfigError: the two did not read the same tokens.
    """
    if ours.sha256 != theirs.sha256 or not torch.equal(ours.predicted, theirs.predicted):
        raise ConfigError(
            f"the two models did not read the same tokens ({len(ours.losses):,} and {len(theirs.losses):,} windows), so their "
            "losses per token cannot be compared; compare models with the same tokenizer"
        )
    differences, predicted = ours.losses - theirs.losses, ours.predicted.double()
    count = len(differences)
    nats = float(differences.sum() / predicted.sum())
    spread = float((differences - nats * predicted).square().sum())
    error = math.sqrt(spread * count / (count - 1)) / float(predicted.sum()) if count > 1 else math.nan
    return LossDifference(nats, error, count)


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
    with in_memory(model.get_output_embeddings()):
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
