"""How likely a model finds each choice of a question.

The score of a choice is the sum of the log-probabilities of its continuation's tokens, in nats, as in lm-evaluation-harness.
What the choices of a question share is read once (``trees.py``), questions of similar size are read together, and logits are
computed only where a continuation is predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lorap.architectures import ARCHITECTURES
from lorap.errors import TaskError
from lorap.evaluation.tasks.requests import Document
from lorap.evaluation.tasks.trees import Encoded, Tree, batches, build_prefix_tree, build_separate_sequences
from lorap.nn.linear import embedding_weight, is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of one forward pass. A CPU is no faster with more; a GPU is.
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits at a time, as many as stay in a CPU's cache: on two cores 0.23 s for 650 tokens of SmolLM2; 0.35 s with whole rows
# of the vocabulary, 6 million logits at a time.
LOGITS = {"cpu": 2**19, "cuda": 2**26}
# Attention that takes any mask.
MASKABLE = ("sdpa", "eager")


class Score(NamedTuple):
    """Of one choice: its log-probability in nats, and whether each of its tokens was the likeliest (None: not asked for)."""

    log_probability: float
    greedy: bool | None = None


def encode(document: Document, tokenizer: Any, *, max_length: int | None = None) -> Encoded:
    """Each choice is tokenized as one text; what the context alone gives is the context.

    Args:
        document: one question.
        tokenizer: of the model; an empty context becomes its first special token.
        max_length: most tokens that the model reads at once; of longer texts the beginning is left out.

    Raises:
        TaskError: a continuation has no token, or more than the model can read.
    """
    ids, starts = [], []
    for context, continuation in document.choices:
        before, whole = encode_pair(context, continuation, tokenizer)
        if len(before) >= len(whole):
            raise TaskError(f"document {document.doc_id}: the choice {continuation!r} adds no token to its context")
        ids.append(whole)
        starts.append(len(before))
    return fit(Encoded(tuple(ids), tuple(starts)), max_length, name=f"document {document.doc_id}")


def encode_pair(context: str, continuation: str, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of the context, and of both; spaces between them belong to the continuation.

    Args:
        context: the question.
        continuation: one choice.
        tokenizer: of the model.
    """
    stripped = context.rstrip()
    if not stripped:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        after = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        return (first,), (first, *after)
    return tuple(tokenizer(stripped)["input_ids"]), tuple(tokenizer(context + continuation)["input_ids"])


def fit(encoded: Encoded, max_length: int | None, *, name: str = "a question") -> Encoded:
    """Without the beginning of what is longer than ``max_length`` tokens and one more, which is predicted only.

    Args:
        encoded: a question with its choices.
        max_length: tokens that the model reads at once; None for any number.
        name: of the question, for messages.

    Raises:
        TaskError: no token of the context would be left.
    """
    excess = [max(0, len(ids) - max_length - 1) if max_length else 0 for ids in encoded.ids]
    if not any(excess):
        return encoded
    starts = tuple(start - cut for start, cut in zip(encoded.starts, excess, strict=True))
    if min(starts) < 1:
        raise TaskError(f"{name}: a choice has more tokens than the {max_length} that the model reads at once")
    ids = tuple(ids[cut:] for ids, cut in zip(encoded.ids, excess, strict=True))
    return Encoded(ids, starts, truncated=True)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    questions: Sequence[Encoded],
    *,
    share: bool = True,
    greedy: bool = False,
    batch_tokens: int | None = None,
    name: str = "Scoring",
    progress: bool = False,
) -> list[list[Score]]:
    """Score every choice of every question, in their order.

    Args:
        model: any causal language model of transformers.
        questions: from :func:`encode`.
        share: read what choices have in common once. False reads each choice as a text of its own, which is also done for
            models whose attention takes no mask of ours.
        greedy: find out which choices greedy decoding would write; costs a few percent.
        batch_tokens: most tokens of one forward pass; one question more is never split.
        name: of the progress bar.
        progress: show it.

    Raises:
        TaskError: a score is not finite.
    """
    share = share and takes_masks(model)
    groups = [[build_prefix_tree(question)] if share else build_separate_sequences(question) for question in questions]
    trees = list(itertools.chain.from_iterable(groups))
    device = embedding_weight(model).device
    found: list[list[Score]] = [[] for _ in trees]
    with tqdm(total=sum(len(tree.tokens) for tree in trees), desc=name, unit="token", disable=not progress) as bar:
        for batch in batches(trees, batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])):
            chosen = [trees[index] for index in batch]
            for index, scores in zip(batch, _score(chosen, model, device, share, greedy), strict=True):
                found[index] = scores
            bar.update(sum(len(tree.tokens) for tree in chosen))
    in_order = iter(found)
    return [list(itertools.chain.from_iterable(itertools.islice(in_order, len(group)))) for group in groups]


def takes_masks(model: PreTrainedModel) -> bool:
    """Whether the model can read a tree: it is of a family whose attention looks at nothing but our mask and positions."""
    config = model.config
    return config.model_type in ARCHITECTURES and getattr(config, "_attn_implementation", None) in MASKABLE


def _score(
    trees: Sequence[Tree], model: PreTrainedModel, device: torch.device, masked: bool, greedy: bool
) -> list[list[Score]]:
    width = max(len(tree.tokens) for tree in trees)
    ids, depths = np.zeros((2, len(trees), width), dtype=np.int64)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.tokens)] = tree.tokens
        depths[row, : len(tree.tokens)] = tree.depths
    # Padding lies behind everything that counts, where neither a tree's mask nor plain causal attention looks.
    given: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if masked:
        given["position_ids"] = torch.from_numpy(depths).to(device)
        given["attention_mask"] = _masks(trees, depths, model, device)
    places = [(row, node) for row, tree in enumerate(trees) for node, _ in tree.edges]
    targets = torch.tensor([token for tree in trees for _, token in tree.edges], device=device)
    losses, likeliest = _predictions(model, given, places, targets, greedy)
    scores, first = [], 0
    for tree in trees:
        # Sums in float64, in the order of the text.
        scores.append([_sum(losses, likeliest, [first + edge for edge in path]) for path in tree.paths])
        first += len(tree.edges)
    return scores


def _sum(losses: Sequence[float], likeliest: Sequence[bool], edges: Sequence[int]) -> Score:
    total = -sum(losses[edge] for edge in edges)
    if not np.isfinite(total):
        raise TaskError(f"the log-probability of a choice is {total}: the model's weights or its dtype overflow")
    return Score(total, all(likeliest[edge] for edge in edges) if likeliest else None)


def _masks(trees: Sequence[Tree], depths: np.ndarray, model: PreTrainedModel, device: torch.device) -> Any:
    """What each node sees, as attention adds it to its scores: (trees, 1, width, width); one for each kind of layer."""
    width = depths.shape[1]
    visible = np.broadcast_to(np.eye(width, dtype=bool), (len(trees), width, width)).copy()
    for row, tree in enumerate(trees):
        visible[row, : len(tree.tokens), : len(tree.tokens)] = tree.visible()
    full = torch.from_numpy(visible)[:, None]
    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or ())

    def added(mask: Tensor) -> Tensor:
        lowest = torch.finfo(model.dtype).min
        return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, lowest).to(device)

    if window is None or kinds == {"full_attention"}:
        return added(full)
    near = torch.from_numpy(depths[:, :, None] - depths[:, None, :] < window)[:, None]
    if not kinds:
        return added(full & near)
    return {"full_attention": added(full), "sliding_attention": added(full & near)}


def _predictions(
    model: PreTrainedModel, given: dict[str, Any], places: Sequence[tuple[int, int]], targets: Tensor, greedy: bool
) -> tuple[list[float], list[bool]]:
    """Negative log-probability of each target at its (row, node), in nats, and with ``greedy`` whether it was the likeliest."""
    row, node = torch.tensor(places, device=targets.device).T
    if model.config.model_type in ARCHITECTURES:
        features, head = model.base_model(**given).last_hidden_state[row, node], model.get_output_embeddings()
    else:  # whatever a model of another family does behind its last linear layer
        features, head = model(**given).logits[row, node], torch.nn.Identity()
    losses: list[float] = []
    likeliest: list[bool] = []
    most = LOGITS.get(targets.device.type, LOGITS["cpu"])
    size = len(features) if is_plain(head) else max(16, 12 * most // model.config.vocab_size)
    for rows, wanted in zip(features.split(size), targets.split(size), strict=True):
        loss, first = _cross_entropy(_logits(rows, head, most), wanted)
        losses += loss.double().tolist()
        if greedy:
            likeliest += (first == wanted).tolist()
    return losses, likeliest


def _logits(features: Tensor, head: Any, most: int) -> Iterator[tuple[int, Tensor]]:
    """Logits of a part of the vocabulary at a time, and its first token; at once, where the head is no plain linear layer."""
    if not is_plain(head):
        yield 0, head(features).float()
        return
    size = max(64, most // len(features))
    for first in range(0, head.out_features, size):
        bias = None if head.bias is None else head.bias[first : first + size]
        yield first, F.linear(features, head.weight[first : first + size], bias).float()


def _cross_entropy(parts: Iterable[tuple[int, Tensor]], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-probability of each target, (tokens,), in nats, and the first of the likeliest tokens."""
    found = torch.full(targets.shape, -torch.inf, device=targets.device)
    highest, likeliest = found.clone(), torch.zeros_like(targets)
    tops, sums = [], []
    for first, logits in parts:
        place = targets - first
        inside = (place >= 0) & (place < logits.shape[1])
        found = torch.where(inside, logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], found)
        top, index = logits.max(-1)
        likeliest = torch.where(top > highest, index + first, likeliest)
        highest = torch.maximum(highest, top)
        tops.append(top)
        sums.append((logits - top[:, None]).exp_().sum(-1))
    total = torch.stack([total * (top - highest).exp() for total, top in zip(sums, tops, strict=True)]).sum(0)
    # A difference of logits first: it is small, and so are its rounding errors.
    return (highest - found) + total.log(), likeliest
