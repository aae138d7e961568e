"""``lorap generate``: what a model says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorap.architectures import ARCHITECTURES
from lorap.cli.common import AsJson, Debug, Device, Dtype, Model, Quiet, be_quiet, loading, user_errors
from lorap.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorap.evaluation.generation import Continuation

STDIN = "-"


def generate_command(
    model: Model,
    prompt: Annotated[
        Optional[list[str]],
        typer.Option(help="Text to continue, or - for what is piped in; may be repeated. Empty: from BOS alone."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0)] = 0.0,
    chat: Annotated[
        Optional[bool],
        typer.Option(
            "--chat/--raw",
            help="Put the prompt into the model's chat template, or continue it as it is.  [default: --chat where there is one]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0, max=2**63 - 1)] = 0,
    optimize: Annotated[
        bool, typer.Option(help="Merge q/k/v and gate/up, and use lorap's kernels for dense layers too.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with MODEL, dense or compressed; a model with a chat template answers it.

    \b
    Of the model's generation_config.json those fields are obeyed that say which tokens are wanted: stop strings, penalties,
    beams, watermarks, and with --temperature top_k, top_p and the like. One sequence is returned.

    \b
    Example:
      lorap generate ./small --prompt "The capital of France is" --max-new-tokens 20
      lorap generate ./small-chat --prompt "What is the capital of France?"
      lorap generate ./small-chat --raw --prompt "The capital of France is"
      echo "The capital of France is" | lorap generate ./small
    """
    with user_errors(debug, as_json) as answer:
        be_quiet(quiet)
        prompts = read_prompts(prompt)
        with loading():
            from lorap.cli.models import open_model
            from lorap.evaluation.generation import continue_prompt, use_settings
            from lorap.nn.fused import optimize_for_inference
        loaded, tokenizer, source = open_model(model, device, dtype)
        if tokenizer is None:
            raise ConfigError(f"{source.name} has no tokenizer, so it cannot read a prompt")
        left_out = use_settings(loaded, name=source.name, max_new_tokens=max_new_tokens, temperature=temperature)
        if left_out:
            typer.echo(f"lorap: left out of generation_config.json: {', '.join(left_out)}", err=True)
        if optimize and getattr(loaded.config, "model_type", None) in ARCHITECTURES:
            optimize_for_inference(loaded)
        results = []
        for text in prompts:
            result = continue_prompt(loaded, tokenizer, text, name=source.name, chat=chat, seed=seed)
            results.append(result)
            typer.echo(render(result))
            warn_of_length(result, loaded)
        answer({"model": source.name, "results": [asdict(result) for result in results]})


def read_prompts(prompts: Sequence[str] | None) -> list[str]:
    """The prompts, with what is piped in for ``-``, or where there is no other.

    Raises:
        ConfigError: there is none, or what is piped in is no UTF-8.
    """
    if prompts and STDIN not in prompts:
        return list(prompts)
    stdin: Any = sys.stdin
    if not prompts and (stdin is None or stdin.isatty()):
        raise ConfigError('nothing to continue; give --prompt "TEXT", or pipe a text in')
    try:
        piped = stdin.buffer.read().decode("utf-8") if stdin is not None else ""
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is {error.object[error.start]:#04x}"
        raise ConfigError(f"what is piped in is no UTF-8 text: {byte}") from None
    # The newline that echo adds is not meant.
    piped = piped.removesuffix("\n").removesuffix("\r")
    if not prompts and not piped:
        raise ConfigError('nothing to continue; give --prompt "TEXT", or pipe a text in')
    return [piped if prompt == STDIN else prompt for prompt in prompts or [STDIN]]


def render(result: Continuation) -> str:
    """Prompt and answer, told apart."""
    heads = ("prompt, in the chat template (--raw: without)", "answer") if result.chat else ("prompt", "continuation")
    cut = "" if result.finished else ", cut by --max-new-tokens"
    rate = f"[{result.new_tokens} tokens{cut}; {result.tokens_per_second:.1f} per second]"
    return f"{heads[0]}:\n{result.prompt}\n\n{heads[1]}:\n{result.continuation}\n\n{rate}\n"


def warn_of_length(result: Continuation, model: PreTrainedModel) -> None:
    """One sentence where prompt and answer are longer than what the model was made for."""
    longest = getattr(model.config, "max_position_embeddings", None)
    read = result.prompt_tokens + result.new_tokens
    if isinstance(longest, int) and read > longest:
        typer.echo(
            f"lorap: {read:,} tokens, but the model is made for {longest:,}: do not trust what comes after", err=True
        )
