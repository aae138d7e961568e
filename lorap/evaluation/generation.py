"""Continuing a prompt: in which form the model reads it, and which fields of its generation_config.json are obeyed.

A published generation_config.json is written for a host that returns several sequences, fetches code or runs an assistant model.
What says which tokens are wanted is obeyed; what says how a host runs is left out.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from lorap.errors import ConfigError, LoRAPError
from lorap.nn.linear import embedding_weight

DEFAULT_TEMPLATE = "default"
# Which tokens are wanted, by sampling or without.
OBEYED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "min_length",
    "min_new_tokens",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "watermarking_config",
)
# The same, with sampling only; beside a temperature of 0 transformers warns about them.
OBEYED_IN_SAMPLING = (
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
)
# These would give other answers. For most of them transformers fetches code from its hub and runs it.
TOLD_IF_LEFT_OUT = (
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "num_beam_groups",
    "diversity_penalty",
    "token_healing",
    "max_time",
)
# Values that ask for nothing, where transformers has None for that.
NEUTRAL = {"penalty_alpha": 0.0, "num_beam_groups": 1, "diversity_penalty": 0.0, "token_healing": False}


@dataclass(frozen=True)
class Continuation:
    """What a model made of one prompt.

    Args:
        prompt: as it was given.
        chat: it was put into the chat template.
        model_input: the text that the model read.
        prompt_tokens: how many tokens that is, BOS included.
        continuation: what it added, without special tokens.
        new_tokens: how many tokens that are.
        finished: it ended by itself; False where ``max_new_tokens`` cut it.
        tokens_per_second: new tokens, reading the prompt included.
    """

    prompt: str
    chat: bool
    model_input: str
    prompt_tokens: int
    continuation: str
    new_tokens: int
    finished: bool
    tokens_per_second: float


def use_settings(model: Any, *, name: str, max_new_tokens: int, temperature: float) -> list[str]:
    """Give ``model`` what is obeyed of its own generation config; returns the fields that were left out and matter.

    Args:
        model: loaded; its ``generation_config`` is replaced.
        name: what to call it in messages.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the likeliest token.

    Raises:
        ConfigError: transformers refuses the settings.
    """
    published = model.generation_config.to_dict() if model.generation_config is not None else {}
    fields = OBEYED + (OBEYED_IN_SAMPLING if temperature else ())
    settings = {field: published[field] for field in fields if published.get(field) is not None}
    settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    try:
        model.generation_config = GenerationConfig(**settings, max_new_tokens=max_new_tokens)
    except Exception as error:  # every version refuses in its own way
        raise ConfigError(f"transformers refuses the generation_config.json of {name}: {_line(error)}") from error
    neutral = GenerationConfig().to_dict()
    return [
        field
        for field in TOLD_IF_LEFT_OUT
        if published.get(field) not in (None, neutral.get(field), NEUTRAL.get(field))
    ]


def wants_chat(tokenizer: Any, prompt: str, *, name: str, chat: bool | None) -> bool:
    """Whether to put ``prompt`` into the chat template; by default where there is one, and something to put in.

    Args:
        tokenizer: whose template it is; a set of templates has one called ``default``.
        prompt: as it was given.
        name: of the model, in messages.
        chat: what the user asked for; None for the default.

    Raises:
        ConfigError: it was asked for and there is none, or none called ``default``.
    """
    template = tokenizer.chat_template
    if chat is False or (chat is None and not (template and prompt)):
        return False
    if not template:
        raise ConfigError(f"the tokenizer of {name} has no chat template; leave out --chat")
    if isinstance(template, dict) and DEFAULT_TEMPLATE not in template:
        raise ConfigError(
            f"the tokenizer of {name} has the chat templates {', '.join(sorted(template))} and none called "
            f"{DEFAULT_TEMPLATE}; --raw continues the prompt without one"
        )
    return True


def continue_prompt(
    model: Any, tokenizer: Any, prompt: str, *, name: str, chat: bool | None = None, seed: int = 0
) -> Continuation:
    """One prompt, continued under the model's generation config (:func:`use_settings`).

    Args:
        model: loaded.
        tokenizer: its own.
        prompt: empty to begin from BOS alone.
        name: of the model, in messages.
        chat: as for :func:`wants_chat`.
        seed: of the sampling.

    Raises:
        ConfigError: there is nothing to begin from, the chat template cannot be used, or transformers refuses the settings.
    """
    in_template = wants_chat(tokenizer, prompt, name=name, chat=chat)
    text = prompt
    if in_template:
        text = fill_template(tokenizer, prompt, name, way_out="--raw continues the prompt without it")
    ids = torch.tensor([encode_prompt(model, tokenizer, text, name=name, special=not in_template)], device=model.device)
    start = time.perf_counter()
    try:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about lengths that contradict each other; max_new_tokens goes before
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer)
    except LoRAPError:
        raise
    except Exception as error:  # a published generation config can make transformers stumble anywhere
        raise ConfigError(
            f"{name} cannot continue this prompt, perhaps for its generation_config.json: {_line(error)}; --debug shows where"
        ) from error
    seconds = time.perf_counter() - start
    new = output[0, ids.shape[1] :]
    config = model.generation_config
    ends = _as_list(config.eos_token_id)
    return Continuation(
        prompt=prompt,
        chat=in_template,
        model_input=text,
        prompt_tokens=ids.shape[1],
        continuation=tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        finished=len(new) < config.max_new_tokens or int(new[-1]) in ends,
        tokens_per_second=len(new) / seconds,
    )


def fill_template(tokenizer: Any, prompt: str, name: str, *, way_out: str) -> str:
    """One user's turn in the chat template, up to where the answer begins.

    Args:
        tokenizer: with the template.
        prompt: the turn.
        name: of the model, in messages.
        way_out: what to do where the template fails.

    Raises:
        ConfigError: the template fails.
    """
    message = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and fails as programs do
        raise ConfigError(f"the chat template of {name} fails: {_line(error)}; {way_out}") from error


def encode_prompt(model: Any, tokenizer: Any, text: str, *, name: str, special: bool) -> Sequence[int]:
    """Token ids of a prompt: BOS at most once, and no EOS behind it, after which nothing is to be said."""
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(text)["input_ids"]) if special else bare
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids[-1:] == [eos] and ids[-len(bare) :] != bare:
        ids = ids[:-1]
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids or [_first_token(model, tokenizer, name)]


def _first_token(model: Any, tokenizer: Any, name: str) -> int:
    """BOS, as the tokenizer has it, or the configs."""
    known = (tokenizer.bos_token_id, model.generation_config.bos_token_id, getattr(model.config, "bos_token_id", None))
    vocabulary = len(embedding_weight(model))
    for token in known:
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    raise ConfigError(
        f"the prompt is empty, and {name} has no BOS token to begin from; give a prompt of one word or more"
    )


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
