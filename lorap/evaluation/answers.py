"""How much of what a chat model answers is still its answer: whether the compressed model ranks the same tokens first.

The dense model answers short instructions greedily. The compressed one then reads instruction and answer, and at each token of
the answer it either ranks that one first or would have gone another way. Unlike perplexity this looks where the model is used,
at its own words behind its own chat template; unlike a comparison of two free answers, one early departure does not decide all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from lorap.architectures import text_config
from lorap.errors import CalibrationError, ConfigError
from lorap.evaluation.generation import DEFAULT_TEMPLATE, encode_prompt, fill_template
from lorap.evaluation.perplexity import ratio_of_sums
from lorap.evaluation.tasks import Estimate
from lorap.nn.linear import embedding_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTRUCTIONS = Path(__file__).with_name("instructions.txt")
# A longer answer of a small model repeats itself, and then every model agrees with it.
MAX_NEW_TOKENS = 48
# Answered, or read, at once.
BATCH = 16
# What a model without a chat template is good for.
WAY_OUT = "--text and --tasks measure it"


@dataclass(frozen=True)
class Answer:
    """One instruction as the model reads it, and what it answered.

    Args:
        prompt: (p,) int64, token ids.
        answer: (n,) int64, n >= 1, the token that ends it included where it ended.
    """

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class AnswerAgreement:
    """How far one model goes along with another's answers.

    Args:
        share: of the answers' tokens, those that are ranked first, and the standard error over answers.
        whole: answers of which every token is ranked first.
        answers: how many were read.
        tokens: in all answers.
    """

    share: Estimate
    whole: int
    answers: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, high = self.share.interval
        share = {"share": self.share.mean, "error": self.share.error, "low": low, "high": high}
        return share | {"whole": self.whole, "answers": self.answers, "tokens": self.tokens}


def read_instructions(count: int) -> list[str]:
    """The first ``count`` of the instructions that ship with lorap.

    Raises:
        ConfigError: there are not so many.
    """
    lines = INSTRUCTIONS.read_text("utf-8").splitlines()
    if count > len(lines):
        raise ConfigError(f"there are {len(lines)} instructions; {count} cannot be answered")
    return lines[:count]


def encode_instructions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, instructions: Sequence[str], *, name: str
) -> list[Tensor]:
    """Token ids of each instruction in the model's chat template, (p,) int64.

    Args:
        model: whose BOS token counts where the tokenizer names none.
        tokenizer: its own.
        instructions: one user's turn each.
        name: of the model, in messages.

    Raises:
        ConfigError: there is no chat template, or it fails.
    """
    template = tokenizer.chat_template
    if not template or (isinstance(template, dict) and DEFAULT_TEMPLATE not in template):
        raise ConfigError(
            f"the tokenizer of {name} has no {'default ' if template else ''}chat template, so it answers no instructions; "
            f"{WAY_OUT}"
        )
    found = []
    for instruction in instructions:
        text = fill_template(tokenizer, instruction, name, way_out=WAY_OUT)
        found.append(torch.tensor(encode_prompt(model, tokenizer, text, name=name, special=False)))
    return found


@torch.no_grad()
def answer_greedily(
    model: PreTrainedModel, prompts: Sequence[Tensor], *, max_new_tokens: int = MAX_NEW_TOKENS, progress: bool = False
) -> list[Answer]:
    """What ``model`` answers when it always takes the likeliest token; its own generation settings only say where it ends.

    Args:
        model: a causal language model of transformers.
        prompts: (p,) int64 each, at least one token.
        max_new_tokens: most tokens of an answer.
        progress: show a bar on stderr.

    Raises:
        ConfigError: what ends an answer is no token id.
    """
    own, ends = model.generation_config, _ends(model)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    device, found = embedding_weight(model).device, []
    try:
        model.generation_config = greedy  # what is not said is taken from here
        for batch in tqdm(_batches(prompts), desc="Answering", unit="batch", disable=not progress):
            length = max(len(prompt) for prompt in batch)
            ids, mask = _padded(batch, left=True)
            output: Tensor = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device), attention_mask=mask.to(device)
            ).cpu()
            found += [Answer(prompt, _cut(new, ends)) for prompt, new in zip(batch, output[:, length:], strict=True)]
    finally:
        model.generation_config = own
    return found


@torch.no_grad()
def answer_agreement(model: PreTrainedModel, answers: Sequence[Answer], *, progress: bool = False) -> AnswerAgreement:
    """Share of the answers' tokens that ``model`` ranks first, given the instruction and the answer up to there.

    Args:
        model: a causal language model with the vocabulary that the answers are in.
        answers: of another model, or of itself.
        progress: show a bar on stderr.

    Raises:
        ConfigError: an answer holds a token that the model does not have.
        CalibrationError: the predictions are not finite.
    """
    last, vocabulary = max(int(one.answer.max()) for one in answers), len(embedding_weight(model))
    if last >= vocabulary:
        raise ConfigError(
            f"the answers hold token {last}, but the model that reads them has {vocabulary:,} tokens; answers are compared "
            "between models of one vocabulary"
        )
    device, same = embedding_weight(model).device, []
    for batch in tqdm(_batches(answers), desc="Reading answers", unit="batch", disable=not progress):
        ids, mask = _padded([torch.cat([one.prompt, one.answer]) for one in batch])
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for row, one in zip(logits, batch, strict=True):
            start = len(one.prompt) - 1
            ahead = row[start : start + len(one.answer)]
            if not bool(torch.isfinite(ahead).all()):
                raise CalibrationError("the model's predictions are not finite; try --dtype float32")
            same.append(ahead.argmax(-1).cpu() == one.answer)
    return _agreement(same)


def _agreement(same: Sequence[Tensor]) -> AnswerAgreement:
    """From (n,) bool for each answer."""
    hits = torch.tensor([int(one.sum()) for one in same], dtype=torch.float64)
    tokens = torch.tensor([len(one) for one in same], dtype=torch.float64)
    share = Estimate(*ratio_of_sums(hits, tokens))
    return AnswerAgreement(share, int((hits == tokens).sum()), len(same), int(tokens.sum()))


def _ends(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer, by the generation config or else by the config."""
    for config in (model.generation_config, text_config(model.config)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            ends = ends if isinstance(ends, (list, tuple)) else [ends]
            if not all(isinstance(token, int) for token in ends):
                raise ConfigError(
                    f"the model's eos_token_id is {ends}, and token ids are whole numbers; correct its config"
                )
            return list(ends)
    return []


def _cut(new: Tensor, ends: Sequence[int]) -> Tensor:
    """``new`` up to the first token that ends it, which still belongs to it; what follows is padding."""
    at = torch.isin(new, torch.tensor(list(ends), dtype=new.dtype)).nonzero()
    return new[: int(at[0]) + 1] if len(at) else new


def _batches(every: Sequence[Any]) -> list[Sequence[Any]]:
    return [every[first : first + BATCH] for first in range(0, len(every), BATCH)]


def _padded(rows: Sequence[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, longest) int64 each, padded with token 0 on one side."""
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids, mask
