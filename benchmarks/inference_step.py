"""Decoding in 16 to 3 bits, lorap in transformers beside llama.cpp, in one run.

    python benchmarks/inference_step.py                   both models, some minutes on a core
    python benchmarks/inference_step.py --models LLaMA-7B --types int4 tcq3 --sequences 8
    python benchmarks/inference_step.py --quick           a tiny model, seconds: to see that it works
    python benchmarks/inference_step.py --out FOLDER      where the table and the JSON go

Contenders, for each storage of weights: the dense model in llama.cpp; at sparsity 0.5 after ``optimize_for_inference``, where a
step of a decoder layer is one call; the dense model likewise; with --op-by-op both by the layers' own forward as well. One
sequence and eight at once, greedy, bfloat16 between the layers. Weights are random: speed does not depend on the values. All of
one model are loaded at the same time, and every round asks each once, for a moment, so that a machine that slows down slows all
of them; ratios are medians over rounds of the ratio within a round. llama.cpp has no codes on a trellis: these stand beside its
Q4_0. With one thread, seconds are those that the process computes, so that other programs count as little as they can; with
more, those on the wall. What --out holds of other models and storages stays.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from documents import markdown
from inference import decode_rate
from inference_llamacpp import RESULTS, Host, byte_tokenizer
from inference_models import MODELS, QUICK, Size
from random_models import bytes_of, decoder_layers, pack_randomly, random_model

import lorap
from lorap.jsonio import read_json, write_json
from lorap.nn import native
from lorap.weights import KINDS

PROMPT, CONTEXT = 2, 256
# With few words: the head has 16 bits in lorap and fewer in llama.cpp, and four layers have as large a one as all 32.
SIZES = {"SmolLM2-135M": MODELS["SmolLM2-135M"], "LLaMA-7B": Size("llama-7b", 4, 1024, False)}
# Storages of weights in lorap, and what llama.cpp calls those beside which they are measured.
TYPES = {"bf16": None, "int8": "Q8_0", "int4": "Q4_0", "tcq4": "Q4_0", "tcq3": "Q4_0"}
PEER = "llama.cpp, dense"
# Sparsity, and whether a step is one call.
LORAP = {"lorap, sparsity 0.5": (0.5, True), "lorap, dense": (0.0, True)}
OP_BY_OP = {f"{name}, op by op": (sparsity, False) for name, (sparsity, _) in LORAP.items()}


def stored(size: Size, sparsity: float, kind: str) -> Any:
    """A model with random numbers or codes in its decoder layers."""
    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    model = random_model(size.shapes, sparsity, torch.bfloat16, **options)
    random_model.cache_clear()
    if kind in KINDS:
        pack_randomly(model, kind)
    return lorap.optimize_for_inference(model).eval()


@contextlib.contextmanager
def op_by_op(model: Any) -> Iterator[None]:
    """The decoder layers' own forward."""
    layers = decoder_layers(model)
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = kind.layer_class
    yield
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = kind


def gguf(size: Size, quantize: str | None, folder: Path) -> Path:
    """The dense model as a file for llama.cpp."""
    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    dense = random_model(size.shapes, 0.0, torch.float16, **options)
    random_model.cache_clear()
    dense.config.max_position_embeddings = 2048
    return next(lorap.export_gguf(dense, folder, tokenizer=byte_tokenizer(), quantize=quantize).glob("*.gguf"))


def measure(
    label: str, size: Size, kinds: list[str], options: argparse.Namespace, scratch: Path
) -> list[dict[str, Any]]:
    """One row per storage, contender and number of sequences, after one round to warm up."""
    distinct = dict.fromkeys(TYPES[kind] for kind in kinds)
    peers = {name: gguf(size, name, scratch / f"{name}") for name in distinct}
    sequences = max(options.sequences)
    hosts = {
        name: Host(file, threads=options.threads, context=CONTEXT, sequences=sequences) for name, file in peers.items()
    }
    contenders = LORAP | (OP_BY_OP if options.op_by_op else {})
    models = {(kind, sparsity): stored(size, sparsity, kind) for kind in kinds for sparsity, _ in LORAP.values()}
    now = time.process_time if options.threads == 1 else time.perf_counter

    def seconds(host: Host, number: int, sequences: int) -> float:
        start = now()
        host.generate(PROMPT, number, sequences=sequences)
        return now() - start

    def theirs(host: Host) -> Callable[[int], float]:
        steps = options.new_tokens - 1
        return lambda count: count * steps / (seconds(host, options.new_tokens, count) - seconds(host, 1, count))

    def ours(model: Any, in_one_call: bool) -> Callable[[int], float]:
        def rate(sequences: int) -> float:
            with contextlib.nullcontext() if in_one_call else op_by_op(model):
                return decode_rate(model, options.new_tokens, sequences=sequences, prompt=PROMPT, now=now)

        return rate

    # By storage in llama.cpp, or storage and contender.
    ask: dict[Any, Callable[[int], float]] = {name: theirs(host) for name, host in hosts.items()}
    for kind in kinds:
        ask |= {(kind, name): ours(models[kind, how[0]], how[1]) for name, how in contenders.items()}
    rates: dict[Any, list[float]] = {(count, who): [] for count in options.sequences for who in ask}
    for turn in range(options.rounds + 1):
        print(f"{label}: round {turn} of {options.rounds}", file=sys.stderr, flush=True)
        for (count, who), found in rates.items():
            rate = ask[who](count)
            if turn:
                found.append(rate)
    rows = []
    for kind, count in itertools.product(kinds, options.sequences):
        peer = rates[count, TYPES[kind]]
        for name in (PEER, *contenders):
            own = peer if name == PEER else rates[count, (kind, name)]
            stored_in = (
                peers[TYPES[kind]].stat().st_size if name == PEER else bytes_of(models[kind, contenders[name][0]])
            )
            rows.append(
                {
                    "model": label,
                    "type": kind,
                    "sequences": count,
                    "contender": name,
                    "weight_bytes": stored_in,
                    "tokens_per_second": statistics.median(own),
                    "against_llama_cpp": statistics.median(a / b for a, b in zip(own, peer, strict=True)),
                    "rounds": own,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; in brackets the quartiles of the ratios."""
    head = ["model", "sequences", "weights", "contender", "MB", "tokens/s", "x llama.cpp"]
    peers = {key(row): row["rounds"] for row in rows if row["contender"] == PEER}
    lines = []
    for row in rows:
        ratios = [a / b for a, b in zip(row["rounds"], peers[key(row)], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        spread = "" if row["contender"] == PEER else f" ({low:.2f} to {high:.2f})"
        kind = TYPES[row["type"]] or "F16"
        what = [
            kind if row["contender"] == PEER else row["type"],
            row["contender"],
            f"{row['weight_bytes'] / 1e6:,.0f}",
        ]
        speed = [f"{row['tokens_per_second']:.1f}", f"{row['against_llama_cpp']:.2f}{spread}"]
        lines.append([row["model"], str(row["sequences"]), *what, *speed])
    return markdown(head, lines)


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    """What is compared in one table of ratios."""
    return row["model"], row["type"], row["sequences"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="storages of weights")
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 8], help="at once")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one to warm up")
    parser.add_argument(
        "--new-tokens", type=int, default=5, help="tokens to generate in each, the first of them untimed"
    )
    parser.add_argument("--op-by-op", action="store_true", help="also the decoder layers' own forward")
    parser.add_argument("--threads", type=int, default=1, help="of both")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-step.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    environment = {name: version(name) for name in ("xllamacpp", "transformers", "torch", "lorap")}
    environment |= {"python": platform.python_version(), "kernels": native.quantized_cpu_isa()}
    how = {"threads": options.threads, "rounds": options.rounds, "new_tokens": options.new_tokens}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "inference-step.json"
    rows = read_json(path)["rows"] if path.exists() else []
    for label, size in (QUICK if options.quick else {name: SIZES[name] for name in options.models}).items():
        with tempfile.TemporaryDirectory() as scratch:
            made = measure(label, size, options.types, options, Path(scratch))
        rows = [row for row in rows if key(row) not in set(map(key, made))] + made
        order = [*QUICK, *SIZES], list(TYPES)
        rows.sort(key=lambda row: (order[0].index(row["model"]), order[1].index(row["type"]), row["sequences"]))
        write_json(path, {"environment": environment | how, "rows": rows})
        (options.out / "inference-step.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
