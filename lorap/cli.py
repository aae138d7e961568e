"""The ``lorap`` command: compress, eval, generate, info, profile, env.

Tables go to stdout, progress to stderr; with ``--json`` the last line of stdout is one JSON object. A mistake of the user ends
with one sentence and exit code 2; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import torch
import typer
from transformers.utils import logging as transformers_logging

import lorap
from lorap.architectures import ARCHITECTURES
from lorap.calibration.data import DEFAULT_CALIBRATION, DEFAULT_EVALUATION, consecutive_windows
from lorap.checkpoint import check_output, save
from lorap.config import ATTENTION_METHODS, MLP_METHODS, RECIPES, CompressionConfig
from lorap.environment import describe_environment, format_environment
from lorap.errors import ConfigError, LoRAPError
from lorap.evaluation import evaluate
from lorap.info import describe_model, format_info
from lorap.loading import ModelSource, check_tokenizer, find_model, load_model, load_tokenizer, resolve_device
from lorap.pipeline import compress as compress_model
from lorap.profiling import deeper, profile_model, run_ranges

app = typer.Typer(
    help="Compress LLaMA-family language models with LoRAP (arXiv 2404.09695), and judge and run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Model = Annotated[
    str, typer.Argument(help="A model folder, a .gguf file or the folder it is in, or a name on the hub.")
]
Device = Annotated[str, typer.Option(help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own; float32 for GGUF), float32, bfloat16, float16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"lorap {lorap.__version__}")
        raise typer.Exit
    signal.signal(signal.SIGTERM, _interrupt)  # a killed run cleans up like an interrupted one
    transformers_logging.set_verbosity_error()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to write: new or empty. It appears complete or not at all.")],
    sparsity: Annotated[
        float,
        typer.Option(
            "--sparsity",
            "--sparsity-ratio",
            help="Fraction of the compressed sub-layers' parameters to remove, in [0, 1).",
        ),
    ] = 0.2,
    recipe: Annotated[
        str, typer.Option(help=f"Set of defaults for the options below: {', '.join(RECIPES)}.")
    ] = "lorap",
    calibration: Annotated[
        str,
        typer.Option(
            help="Text, JSONL (field `text`), .npy or .safetensors tokens, a `datasets` name, or default (ships with lorap)."
        ),
    ] = DEFAULT_CALIBRATION,
    num_calibration_samples: Annotated[int, typer.Option(help="Token windows to calibrate on.")] = 128,
    calibration_seq_len: Annotated[int, typer.Option(help="Tokens in each window.")] = 128,
    eval_text: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Text to measure perplexity on before and after; may be repeated; none skips it.  [default: heldout]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vo_to_qk_ratio: Annotated[
        Optional[float], typer.Option(help="Parameters for {v, o} per one for {q, k}; the paper: 3.")
    ] = None,
    least_important_kept: Annotated[
        Optional[float], typer.Option(help="Fraction of least important FFN channels that stay; the paper: 0.01.")
    ] = None,
    sublayers: Annotated[Optional[str], typer.Option(help="self_attn, mlp or self_attn,mlp.")] = None,
    attention_method: Annotated[Optional[str], typer.Option(help=f"{', '.join(ATTENTION_METHODS)}.")] = None,
    mlp_method: Annotated[Optional[str], typer.Option(help=f"{', '.join(MLP_METHODS)}.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress MODEL into the Hugging Face folder OUT.

    \b
    Example:
      lorap compress HuggingFaceTB/SmolLM2-135M ./small --sparsity 0.2
      lorap compress ./llama ./small --sparsity 0.5 --calibration my.jsonl --eval-text wiki.txt
    """
    with _user_errors(debug):
        _be_quiet(quiet)
        config = CompressionConfig.from_recipe(
            recipe,
            sparsity=sparsity,
            num_calibration_samples=num_calibration_samples,
            calibration_seq_len=calibration_seq_len,
            seed=seed,
            vo_to_qk_ratio=vo_to_qk_ratio,
            least_important_kept=least_important_kept,
            sublayers=None if sublayers is None else tuple(name.strip() for name in sublayers.split(",")),
            attention_method=attention_method,
            mlp_method=mlp_method,
        )
        source = find_model(model)
        check_output(out, source=source.folder, overwrite=overwrite)
        tokenizer = load_tokenizer(source)
        texts = [text for text in eval_text or [DEFAULT_EVALUATION] if text != "none"]
        small, report = compress_model(
            model,
            calibration=calibration,
            config=config,
            tokenizer=tokenizer,
            evaluation=texts,
            device=device,
            dtype=dtype,
            progress=not quiet,
        )
        save(
            small,
            out,
            report=report,
            tokenizer=tokenizer,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        )
        typer.echo(report.table())
        typer.echo(f"saved to {out}")
        _print_json(as_json, {"out": str(out), **report.to_dict()})


@app.command("eval")
def evaluate_model(
    model: Model,
    text: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Text, JSONL, token file or `datasets` name; may be repeated.  [default: heldout, ships with lorap]"
        ),
    ] = None,
    seq_len: Annotated[
        int, typer.Option(help="Tokens per window; loss is taken over seq_len - 1 positions.", min=2)
    ] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="Use the first N tokens of each text only.", min=2)] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Perplexity of MODEL, dense or compressed, over windows that do not overlap (the paper's protocol).

    \b
    Example:
      lorap eval ./small --text wiki.txt --seq-len 128 --max-tokens 20000
    """
    with _user_errors(debug):
        _be_quiet(quiet)
        loaded, tokenizer, source = _load(model, device, dtype)
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
        _print_json(as_json, {"model": source.name, "results": results})


@app.command()
def generate(
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
    with _user_errors(debug):
        if not prompt:
            raise ConfigError("nothing to continue; give --prompt")
        loaded, tokenizer, source = _load(model, device, dtype)
        if tokenizer is None:
            raise ConfigError(f"{source.name} has no tokenizer, so it cannot read a prompt")
        if chat and not tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {source.name} has no chat template; leave out --chat")
        if optimize and getattr(loaded.config, "model_type", None) in ARCHITECTURES:
            lorap.optimize_for_decoding(loaded)
        results = []
        for text in prompt:
            result = _continue(loaded, tokenizer, text, max_new_tokens, temperature, chat, seed)
            results.append(result)
            typer.echo(
                f"{text}{result['continuation']}\n[{result['new_tokens']} tokens, {result['tokens_per_second']:.1f} per second]\n"
            )
        _print_json(as_json, {"model": source.name, "results": results})


@app.command()
def info(model: Model, as_json: AsJson = False, debug: Debug = False) -> None:
    """Parameters by kind, kept share, ranks, widths and bytes of MODEL, read from config and headers alone.

    \b
    Example:
      lorap info ./small
    """
    with _user_errors(debug):
        described = describe_model(find_model(model))
        typer.echo(format_info(described))
        _print_json(as_json, described)


@app.command()
def env(as_json: AsJson = False, debug: Debug = False) -> None:
    """Versions, devices, and which kernels run what on this machine; paste it into a bug report.

    \b
    Example:
      lorap env
    """
    with _user_errors(debug):
        found = describe_environment()
        typer.echo(format_environment(found))
        _print_json(as_json, found)


@app.command("profile")
def profile_command(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt that is read at once.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded one by one after it.", min=1)] = 16,
    optimize: Annotated[
        bool,
        typer.Option("--optimize", help="Merge q/k/v and gate/up first, and use lorap's kernels for dense layers."),
    ] = False,
    trace: Annotated[
        Optional[Path], typer.Option(help="Write a trace for https://ui.perfetto.dev or chrome://tracing.")
    ] = None,
    top: Annotated[int, typer.Option(help="Kernels to show.", min=1)] = 15,
    ranges_only: Annotated[
        bool, typer.Option("--ranges-only", help="Time the stages only, for running under nsys or ncu.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Where the time of MODEL goes, reading a prompt (prefill) and decoding: by stage, then by kernel.

    \b
    Reading the first table: decoding reads every weight once per token, so a stage takes as long as its weights are large,
    and fewer weights help. Prefill computes with each weight many times; fewer multiplications help.
    Reading the second: "self" is time in the kernel itself, not in what it called. Many calls of a few microseconds mean
    that Python and launches take the time: try --optimize.

    \b
    Example:
      lorap profile ./small --tokens 512 --trace trace.json
      lorap profile ./small --optimize --dtype bfloat16
    """
    with _user_errors(debug):
        if trace is not None and not trace.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {trace}: there is no folder {trace.parent}")
        loaded, _, source = _load(model, device, dtype)
        if optimize:
            lorap.optimize_for_decoding(loaded)
        if ranges_only:
            run_ranges(loaded, tokens=tokens, new_tokens=new_tokens)
            return
        found = profile_model(loaded, tokens=tokens, new_tokens=new_tokens, trace=trace)
        typer.echo(f"{source.name}, {loaded.dtype}, on {loaded.device}\n\n{found.table(top=top)}\n")
        if trace is not None:
            typer.echo(f"trace written to {trace}\n")
        options = ["--tokens", str(tokens), "--new-tokens", str(new_tokens), "--dtype", dtype, "--device", "cuda"]
        typer.echo(deeper(["lorap", "profile", model, *options, *(["--optimize"] if optimize else [])]))
        _print_json(as_json, {"model": source.name, "optimized": optimize, **found.to_dict()})


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any, ModelSource]:
    source = find_model(model)
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, dtype=dtype, device=resolve_device(device))
    check_tokenizer(tokenizer, loaded.get_input_embeddings().weight.shape[0])
    return loaded, tokenizer, source


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


def _be_quiet(quiet: bool) -> None:
    if quiet:
        transformers_logging.disable_progress_bar()


def _print_json(wanted: bool, value: dict[str, Any]) -> None:
    if wanted:
        typer.echo(json.dumps(value))


@contextmanager
def _user_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except LoRAPError as error:
        if debug:
            raise
        typer.echo(f"lorap: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        typer.echo("lorap: interrupted; nothing was written", err=True)
        raise typer.Exit(130) from None


def _interrupt(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``lorap`` command and of ``python -m lorap``."""
    app()


if __name__ == "__main__":
    main()
