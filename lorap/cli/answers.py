"""``lorap eval --answers``: how many words of the dense model's answers the compressed one would have said too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import typer

from lorap.checkpoint.load import ModelSource, find_model
from lorap.cli.models import open_model
from lorap.errors import ConfigError
from lorap.evaluation.answers import (
    Answer,
    AnswerAgreement,
    answer_agreement,
    answer_greedily,
    encode_instructions,
    read_instructions,
)


@dataclass(frozen=True)
class AnswerOptions:
    """What the command line says besides the models."""

    count: int
    device: str
    dtype: str
    progress: bool


def evaluate_answers(model: str, baseline: str, options: AnswerOptions) -> dict[str, Any]:
    """Let the baseline answer, let the model read that, print a line, and return everything for ``--json``."""
    instructions = read_instructions(options.count)
    source, other = find_model(model), find_model(baseline)
    answers = _answer(other, instructions, options)
    found = _read(source, instructions, answers, options)
    typer.echo(
        f"of the {found.tokens:,} tokens that {other.name} answers to {found.answers:,} instructions, {source.name} ranks "
        f"{found.share.percent()} % first; {found.whole:,} answers would have been the same"
    )
    return {"model": source.name, "baseline": other.name, "answers": found.to_dict()}


def _answer(source: ModelSource, instructions: list[str], options: AnswerOptions) -> list[Answer]:
    loaded, prompts = _open(source, instructions, options)
    return answer_greedily(loaded, prompts, progress=options.progress)


def _read(
    source: ModelSource, instructions: list[str], answers: list[Answer], options: AnswerOptions
) -> AnswerAgreement:
    loaded, prompts = _open(source, instructions, options)
    for instruction, prompt, answer in zip(instructions, prompts, answers, strict=True):
        if not torch.equal(prompt, answer.prompt):
            raise ConfigError(
                f'{source.name} reads "{instruction}" as other tokens than the model that answers; answers are compared '
                "between models with one tokenizer and one chat template"
            )
    return answer_agreement(loaded, answers, progress=options.progress)


def _open(source: ModelSource, instructions: list[str], options: AnswerOptions) -> tuple[Any, list[torch.Tensor]]:
    """The model, and the instructions as it reads them; one model at a time is in memory."""
    loaded, tokenizer, _ = open_model(source, options.device, options.dtype)
    if tokenizer is None:
        raise ConfigError(f"{source.name} has no tokenizer, so it cannot read instructions")
    return loaded, encode_instructions(loaded, tokenizer, instructions, name=source.name)
