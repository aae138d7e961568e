"""Zero-shot multiple choice: how likely a model finds each choice, and what that says about its accuracy.

A document is one question with its choices. All choices of a document begin with the same tokens, which the model reads once;
their key-value cache then serves every choice, and logits are computed only where a continuation is predicted.
"""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

# Requests from here on are prompts without a question, for another way of normalizing.
UNCONDITIONAL = 1_000_000
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Document:
    """One question: (context, continuation) of each choice, and the index of the right one."""

    doc_id: int
    choices: tuple[tuple[str, str], ...]
    label: int


@dataclass(frozen=True)
class Encoded:
    """All tokens of each choice, and where in them the continuation starts."""

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Tokens with which all choices begin; the one that predicts the first of a continuation is never counted."""
        columns = zip(*self.ids, strict=False)
        common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
        return max(0, min(common, min(self.starts) - 1))


def read_documents(path: Path, *, limit: int | None = None) -> list[Document]:
    """The documents of a file of requests in order of their number; ``limit`` of them, evenly spread over the file."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["doc_id"] < UNCONDITIONAL:
                found.setdefault(row["doc_id"], {})[row["idx"]] = row
    documents = [_document(number, found[number]) for number in sorted(found)]
    return spread(documents, limit)


def _document(number: int, rows: dict[int, dict[str, Any]]) -> Document:
    requests = [rows[index]["request"] for index in sorted(rows)]
    choices = tuple((request["context"], request["continuation"]) for request in requests)
    return Document(number, choices, int(rows[min(rows)]["label"]))


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """``limit`` items at equal distances, the first among them; all where there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


def encode(document: Document, tokenizer: Any) -> Encoded:
    """Each choice is tokenized as one text; what the context alone gives is the context."""
    ids, starts = [], []
    for context, continuation in document.choices:
        whole = tuple(tokenizer(context + continuation)["input_ids"])
        start = len(tokenizer(context)["input_ids"])
        if not 0 < start < len(whole):
            raise ValueError(f"document {document.doc_id}: a choice needs a context and a continuation of a token each")
        ids.append(whole)
        starts.append(start)
    return Encoded(tuple(ids), tuple(starts))


@torch.no_grad()
def log_probabilities(
    model: Any,
    documents: Sequence[Encoded],
    *,
    batch_tokens: int = BATCH_TOKENS,
    name: str = "",
    progress: bool = False,
) -> list[list[float]]:
    """Sum of log-probabilities, in nats, of each choice's continuation; in the order of the documents."""
    scores: list[list[float]] = [[] for _ in documents]
    with tqdm(total=len(documents), desc=name, unit="document", disable=not progress) as bar:
        for batch in batches(documents, batch_tokens):
            for index, found in zip(batch, _score([documents[index] for index in batch], model), strict=True):
                scores[index] = found
            bar.update(len(batch))
    return scores


def batches(documents: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of documents with equally many shared tokens and choices, of similar length: no mask is needed for them."""

    def alike(index: int) -> tuple[int, int]:
        return documents[index].shared, len(documents[index].ids)

    def longest(index: int) -> int:
        return max(map(len, documents[index].ids))

    order = sorted(range(len(documents)), key=lambda index: (alike(index), longest(index)), reverse=True)
    for (shared, choices), group in itertools.groupby(order, key=alike):
        indices = list(group)
        while indices:
            size = shared + choices * (longest(indices[0]) - shared)
            count = max(1, batch_tokens // size)
            yield indices[:count]
            indices = indices[count:]


def _score(batch: Sequence[Encoded], model: Any) -> list[list[float]]:
    """Documents with equally many shared tokens and choices."""
    shared, choices = batch[0].shared, len(batch[0].ids)
    device = model.get_input_embeddings().weight.device
    decoder = model.base_model
    held: dict[str, Any] = {"use_cache": False}
    if shared:
        cache = DynamicCache(config=model.config)
        # Newer versions of transformers call it by its shorter name.
        name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
        held = {name: cache, "use_cache": True}
        decoder(input_ids=torch.tensor([document.ids[0][:shared] for document in batch], device=device), **held)
        cache.batch_repeat_interleave(choices)
    rows = [ids[shared:] for document in batch for ids in document.ids]
    starts = [start - shared for document in batch for start in document.starts]
    width = max(map(len, rows))
    # What is padded lies behind everything that counts, where causal attention never looks.
    suffix = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
    hidden = decoder(input_ids=suffix, **held).last_hidden_state
    sums = _sums(model, hidden, rows, starts)
    return [sums[first : first + choices] for first in range(0, len(sums), choices)]


def _sums(model: Any, hidden: Tensor, rows: Sequence[Sequence[int]], starts: Sequence[int]) -> list[float]:
    """Log-probabilities summed over each row from its start; ``hidden`` is (rows, width, hidden)."""
    places = [(row, place) for row, ids in enumerate(rows) for place in range(starts[row], len(ids))]
    row, place = torch.tensor(places, device=hidden.device).T
    targets = torch.tensor([rows[r][p] for r, p in places], device=hidden.device)
    logits = model.get_output_embeddings()(hidden[row, place - 1]).float()
    found = -torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    return torch.zeros(len(rows), dtype=torch.float64, device=hidden.device).index_add(0, row, found).tolist()


def is_correct(document: Document, scores: Sequence[float], *, per_character: bool) -> bool:
    """The most likely choice is the right one; ``per_character`` divides by its length without the leading space."""
    lengths = [len(continuation.removeprefix(" ")) if per_character else 1 for _, continuation in document.choices]
    normalized = [score / length for score, length in zip(scores, lengths, strict=True)]
    return normalized.index(max(normalized)) == document.label


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, from the sample's own spread; the error of one value is unknown (NaN)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def average(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of independent (mean, error) pairs, each counting the same."""
    return statistics.fmean(value for value, _ in found), math.hypot(*(error for _, error in found)) / len(found)
