"""Token windows from text.

Each source is cut into windows that do not overlap, and the seed draws which of them are used. Windows know the group that they
belong to, a source or a stretch of one text, so that statistics of some groups can be judged on others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorap.calibration.mixtures import Sources, mixture_name, split_by_weight, weighted_sources
from lorap.calibration.sources import OWN_SAMPLES, Source, read_tokens, source_name
from lorap.errors import CalibrationError
from lorap.reports.records import Share

# A single text is cut into so many groups: enough to split in halves that do not just mean beginning and end.
STRETCHES = 4

_logger = logging.getLogger(__name__)

# (windows, seq_len, seed) to token ids of that shape, written by a model.
Sampler = Callable[[int, int, int], Tensor]


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of equal length.

    Args:
        input_ids: (windows, seq_len) int64.
        name: where they came from, for reports.
        sha256: of the ids, so that two runs can be told apart.
        attention_mask: (windows, seq_len), 0 on padding; None where every token is real.
        groups: (windows,) int64, indices into ``group_names``; windows of one group are neighbours: of one source where there
            are several, of one stretch of the text where there is one. None where nothing is known, as if all were one group.
        group_names: one per group; a group may have no window.
        shares: one per source.
    """

    input_ids: Tensor
    name: str
    sha256: str
    attention_mask: Tensor | None = None
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    shares: tuple[Share, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that count: all but padding."""
        return int(self.input_ids.numel() if self.attention_mask is None else self.attention_mask.sum())

    def rows(self, rows: Tensor) -> TokenWindows:
        """These windows alone; where each came from is forgotten."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return TokenWindows(self.input_ids[rows], self.name, self.sha256, mask)

    def describe(self) -> dict[str, Any]:
        """What a report says of them; ``sources`` is what each gave."""
        count, seq_len = self.input_ids.shape
        sizes = {"windows": count, "seq_len": seq_len, "tokens": self.tokens}
        sources = [asdict(share) for share in self.shares]
        return {"name": self.name, **sizes, "sha256": self.sha256, "sources": sources}


@dataclass(frozen=True)
class _Stream:
    """All windows of one source in order: ids (windows, seq_len), a mask of that shape or None, and the tokens before cutting.

    ``ready`` says that the source held windows, not a stream of tokens.
    """

    name: str
    ids: Tensor
    mask: Tensor | None
    tokens: int
    ready: bool


def draw_windows(
    sources: Sources,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    sampler: Sampler | None = None,
) -> TokenWindows:
    """:func:`draw_with_spare` without spare windows."""
    windows, _ = draw_with_spare(
        sources,
        tokenizer,
        num_samples=num_samples,
        num_spare=0,
        seq_len=seq_len,
        seed=seed,
        vocab_size=vocab_size,
        sampler=sampler,
    )
    return windows


def draw_with_spare(
    sources: Sources,
    tokenizer: Any,
    *,
    num_samples: int,
    num_spare: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    sampler: Sampler | None = None,
) -> tuple[TokenWindows, TokenWindows | None]:
    """Draw ``num_samples`` windows of ``seq_len`` tokens from one source, or from several by weight, and others beside them.

    Each of several sources gives its share of the windows (:func:`lorap.calibration.mixtures.split_by_weight`), and all of
    them in the order of the sources. A token matrix of shape (windows, seq_len), or a mapping with ``input_ids`` and
    ``attention_mask``, is used as it is where it is the only source; among others its share of windows is drawn. The share of
    ``self`` is written by ``sampler``; without one, ``default`` is its texts alone.

    Args:
        sources: one source, or several with weights, as for :func:`lorap.compress`.
        tokenizer: reads texts; None where all sources are tokens.
        num_samples: windows in all.
        num_spare: further windows, by weight from the texts and tokens alone, because what is written takes time.
        seq_len: tokens per window.
        seed: which windows are drawn.
        vocab_size: rows of the embedding.
        sampler: writes the windows of ``self``; None where nothing can.

    Returns:
        The windows, which do not depend on ``num_spare``; and the spare ones, fewer where the sources have no more, None where
        they have none.

    Raises:
        CalibrationError: a source cannot be read, is binary, empty or too short for its share, the tokens do not fit the model,
            a weight is not above 0, or the sources have windows of different lengths.
    """
    weighted = weighted_sources(sources, own_samples=sampler is not None)
    weights = [weight for _, weight in weighted]
    shares = split_by_weight(num_samples, weights)
    # What can fail is read first; the model's own samples take longest.
    read = {
        index: _cut(source, tokenizer, seq_len=seq_len, vocab_size=vocab_size)
        for index, (source, _) in enumerate(weighted)
        if sampler is None or not _is_own(source)
    }
    _tell_of_few([source_name(source) for source, _ in weighted], shares)
    streams = [
        read[index] if index in read else _written(sampler, share, seq_len, seed) for index, share in enumerate(shares)
    ]
    name = mixture_name(sources)
    if len(streams) == 1 and streams[0].ready:
        return _gather(name, streams, weights, [torch.arange(len(streams[0].ids))]), None
    _check_lengths(streams)
    _check_shares(streams, weights, shares)
    orders = [_order(len(stream.ids), seed) for stream in streams]
    drawn = [order[:share] for order, share in zip(orders, shares, strict=True)]
    by_source = dict(zip(read, split_by_weight(num_spare, [weights[index] for index in read]), strict=True))
    spare = [
        order[share:][: by_source.get(index, 0)]
        for index, (order, share) in enumerate(zip(orders, shares, strict=True))
    ]
    windows = _gather(name, streams, weights, drawn)
    return windows, _gather(name, streams, weights, spare) if any(map(len, spare)) else None


def set_aside(windows: TokenWindows, count: int) -> tuple[TokenWindows, TokenWindows]:
    """All but ``count`` windows, and these: some of each fold, and from the whole range."""
    order = torch.argsort(fold_of(windows).int(), stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[torch.arange(count) * len(order) // count]] = True
    return _select(windows, ~chosen), _select(windows, chosen)


def consecutive_windows(
    source: Source, tokenizer: Any, *, seq_len: int, max_tokens: int | None, vocab_size: int
) -> TokenWindows:
    """All windows of ``source`` in order, without overlap; the last tokens that do not fill a window are dropped.

    Args:
        source: a text or tokens.
        tokenizer: reads texts.
        seq_len: tokens per window.
        max_tokens: the first so many tokens only; None for all.
        vocab_size: rows of the embedding.

    Raises:
        CalibrationError: as :func:`draw_windows`.
    """
    stream = _cut(source, tokenizer, seq_len=seq_len, vocab_size=vocab_size, max_tokens=max_tokens)
    if not len(stream.ids):
        raise CalibrationError(
            f"{stream.name} has {stream.tokens:,} tokens, less than one window of {seq_len}; "
            "give a longer text or shorter windows"
        )
    return _gather(stream.name, [stream], [1.0], [torch.arange(len(stream.ids))])


def fold_of(windows: TokenWindows) -> Tensor:
    """(windows,) bool: which of two folds each window is in. Whole groups go into one fold, and the folds are nearly equal.

    Groups are assigned by size, the largest first, each to the fold that has fewer windows; ties go to the earlier group and
    to the first fold. So the folds differ by no more than the largest group. With one group all is in the first fold (False).
    """
    groups = windows.groups
    if groups is None:
        return torch.zeros(len(windows.input_ids), dtype=torch.bool)
    sizes = torch.bincount(groups).tolist()
    held, second = [0, 0], []
    for group in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        fold = int(held[1] < held[0])
        held[fold] += sizes[group]
        if fold:
            second.append(group)
    return torch.isin(groups, torch.tensor(second, dtype=torch.int64))


def _is_own(source: Source) -> bool:
    return isinstance(source, str) and source == OWN_SAMPLES


def _written(sampler: Sampler | None, count: int, seq_len: int, seed: int) -> _Stream:
    assert sampler is not None
    ids = sampler(count, seq_len, seed)
    return _Stream(OWN_SAMPLES, ids, None, ids.numel(), ready=False)


def _cut(source: Source, tokenizer: Any, *, seq_len: int, vocab_size: int, max_tokens: int | None = None) -> _Stream:
    name = source_name(source)
    ids, mask = read_tokens(source, tokenizer, vocab_size=vocab_size)
    if ids.ndim == 2:
        return _Stream(name, ids, mask, ids.numel(), ready=True)
    ids = ids[:max_tokens]
    count = len(ids) // seq_len
    return _Stream(name, ids[: count * seq_len].view(count, seq_len), None, len(ids), ready=False)


def _order(available: int, seed: int) -> Tensor:
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))


def _select(windows: TokenWindows, rows: Tensor) -> TokenWindows:
    """The windows that ``rows``, (windows,) bool, says; each knows where it came from."""
    part = windows.rows(rows)
    groups = None if windows.groups is None else windows.groups[rows]
    counts = [len(part.input_ids)]
    if len(windows.shares) > 1 and groups is not None:
        counts = torch.bincount(groups, minlength=len(windows.shares)).tolist()
    shares = tuple(replace(share, windows=count) for share, count in zip(windows.shares, counts, strict=False))
    return replace(part, sha256=hash_ids(part.input_ids), groups=groups, group_names=windows.group_names, shares=shares)


def _check_lengths(streams: Sequence[_Stream]) -> None:
    if len({stream.ids.shape[1] for stream in streams}) > 1:
        found = ", ".join(f"{stream.name} {stream.ids.shape[1]}" for stream in streams)
        raise CalibrationError(
            f"the calibration sources have windows of different lengths ({found} tokens), but those of one run must be "
            "equally long: cut the token matrices to one length, and set calibration_seq_len to it if there are texts too"
        )


def _check_shares(streams: Sequence[_Stream], weights: Sequence[float], shares: Sequence[int]) -> None:
    for stream, weight, share in zip(streams, weights, shares, strict=True):
        available, seq_len = stream.ids.shape
        if share <= available:
            continue
        has = f"{stream.name} has {stream.tokens:,} tokens, which is {available} windows of {seq_len}; "
        longer = "Give a longer text or shorter windows" if not available else "Give a longer text"
        if len(streams) == 1:
            raise CalibrationError(
                f"{has}{share} were asked for. {longer}" + (f" or ask for {available} samples" if available else "")
            )
        most = _most_samples([len(each.ids) for each in streams], weights, sum(shares))
        raise CalibrationError(
            f"{has}its share of {sum(shares)} is {share} (weight {weight:g} of {sum(weights):g}). {longer}, give it less weight"
            + (f", or ask for {most} samples" if most else ", or leave it out")
        )


def _tell_of_few(names: Sequence[str], shares: Sequence[int]) -> None:
    """Warn where some sources give no window, since there are more of them than windows."""
    if left_out := [name for name, share in zip(names, shares, strict=True) if not share]:
        count, total = len(names), sum(shares)
        _logger.warning(
            "%d calibration windows are too few for %d sources: none is from %s, and one from each other, whatever its weight; "
            "ask for %d windows or more",
            *(total, count, " and ".join(left_out), count),
        )


def _most_samples(available: Sequence[int], weights: Sequence[float], below: int) -> int | None:
    """The most samples below a number for which every source has windows enough; None where one has none at all."""
    for total in range(below - 1, len(available) - 1, -1):
        shares = split_by_weight(total, weights)
        if all(share <= count for share, count in zip(shares, available, strict=True)):
            return total
    return None


def _gather(
    name: str, streams: Sequence[_Stream], weights: Sequence[float], positions: Sequence[Tensor]
) -> TokenWindows:
    """The windows at the given positions of each stream, one stream after the other."""
    drawn = list(zip(streams, positions, strict=True))
    ids = torch.cat([stream.ids[order] for stream, order in drawn])
    mask = None
    if any(stream.mask is not None for stream in streams):
        mask = torch.cat([_mask(stream)[order] for stream, order in drawn])
    counts = [len(order) for order in positions]
    if len(streams) == 1:
        groups, names = _stretches(streams[0], positions[0])
    else:
        groups = torch.arange(len(streams)).repeat_interleave(torch.tensor(counts))
        names = tuple(stream.name for stream in streams)
    shares = tuple(
        Share(stream.name, weight, count) for stream, weight, count in zip(streams, weights, counts, strict=True)
    )
    return TokenWindows(ids, name, hash_ids(ids), mask, groups, names, shares)


def hash_ids(ids: Tensor) -> str:
    """sha256 of token ids, in hexadecimal; of their order too, not of their shape."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _stretches(stream: _Stream, positions: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Groups of windows of one source: the equal stretch of it that each lies in."""
    available = len(stream.ids)
    count = min(STRETCHES, available)
    if count == 1:
        return torch.zeros_like(positions), (stream.name,)
    return positions * count // available, tuple(f"{stream.name} [{index}/{count}]" for index in range(1, count + 1))


def _mask(stream: _Stream) -> Tensor:
    return torch.ones_like(stream.ids, dtype=torch.bool) if stream.mask is None else stream.mask
