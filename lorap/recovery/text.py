"""The windows that a model is tuned on, in the order of training.

Sources and mixtures are those of the calibration. What differs is the amount: training takes as many windows as it has steps for,
so a short text is read several times, each time in another order, and a long one in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorap.calibration.mixtures import Sources, mixture_name, split_by_weight, weighted_sources
from lorap.calibration.sources import OWN_SAMPLES, Source
from lorap.calibration.windows import Sampler, TokenWindows, consecutive_windows, hash_ids
from lorap.errors import CalibrationError
from lorap.reports.records import Share


def training_windows(
    text: Sources,
    tokenizer: Any,
    *,
    count: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    sampler: Sampler | None = None,
) -> TokenWindows:
    """Windows of each source by its weight, shuffled.

    Windows of one source do not overlap, and none comes again before all have come. ``default`` is its texts alone, because
    writing is much slower than training.

    Args:
        text: one source, or several with weights.
        tokenizer: reads texts.
        count: windows in all.
        seq_len: tokens per window.
        seed: of their order.
        vocab_size: rows of the embedding.
        sampler: writes the windows of ``self``; None where nothing can.

    Raises:
        CalibrationError: a source cannot be read, is shorter than a window, or holds windows of another length.
    """
    sources = weighted_sources(text)
    shares = split_by_weight(count, [weight for _, weight in sources])
    generator = torch.Generator().manual_seed(seed)
    ids, masks, given = [], [], []
    for (source, weight), share in zip(sources, shares, strict=True):
        part = _windows(source, share, tokenizer, seq_len=seq_len, seed=seed, vocab_size=vocab_size, sampler=sampler)
        rows = _rounds(len(part.input_ids), share, generator)
        mask = part.attention_mask
        ids.append(part.input_ids[rows])
        masks.append(torch.ones_like(ids[-1], dtype=torch.bool) if mask is None else mask[rows].bool())
        given.append(Share(part.name, weight, share))
    return _shuffled(mixture_name(text), ids, masks, given, generator)


def _windows(
    source: Source, share: int, tokenizer: Any, *, seq_len: int, seed: int, vocab_size: int, sampler: Sampler | None
) -> TokenWindows:
    if isinstance(source, str) and source == OWN_SAMPLES and sampler is not None:
        return TokenWindows(sampler(max(share, 1), seq_len, seed), OWN_SAMPLES, "")
    found = consecutive_windows(source, tokenizer, seq_len=seq_len, max_tokens=None, vocab_size=vocab_size)
    length = found.input_ids.shape[1]
    if length != seq_len:
        raise CalibrationError(f"{found.name} holds windows of {length} tokens; set the window length to {length}")
    return found


def _rounds(available: int, share: int, generator: torch.Generator) -> Tensor:
    """(share,) rows below ``available``: all of them in a random order, then all again in another, and so on."""
    rounds = [torch.randperm(available, generator=generator) for _ in range(-(-share // available))]
    return torch.cat([*rounds, torch.empty(0, dtype=torch.int64)])[:share]


def _shuffled(
    name: str, ids: Sequence[Tensor], masks: Sequence[Tensor], given: Sequence[Share], generator: torch.Generator
) -> TokenWindows:
    joined, mask = torch.cat(list(ids)), torch.cat(list(masks))
    order = torch.randperm(len(joined), generator=generator)
    ordered, mask = joined[order], mask[order]
    return TokenWindows(ordered, name, hash_ids(ordered), None if bool(mask.all()) else mask, shares=tuple(given))
