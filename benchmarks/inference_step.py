"""Decoding of a small model in 8 bits, lorap in transformers beside llama.cpp, in one run.

    python benchmarks/inference_step.py --threads 2       SmolLM2-135M's shapes, a minute on two cores
    python benchmarks/inference_step.py --quick           a tiny model, seconds: to see that it works
    python benchmarks/inference_step.py --out FOLDER      where the table and the JSON go

Contenders: the dense model in llama.cpp, Q8_0; at sparsity 0.5 in int8, after ``optimize_for_inference``, with a step of a
decoder layer in one call, and with the layers' own forward in its place; the dense model in int8. Batch 1, greedy, 16 tokens of
prompt, bfloat16 between the layers. Weights are random: speed does not depend on the values. All are loaded at the same time,
and every round asks each once, so that a machine that slows down slows all of them; ratios are medians over rounds of the
ratio within a round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from documents import markdown
from inference import decode_rate
from inference_llamacpp import RESULTS, Host, byte_tokenizer
from inference_models import MODELS, QUICK, Size
from random_models import decoder_layers, random_model

import lorap
from lorap.jsonio import write_json
from lorap.nn import native
from lorap.nn.quantized import QuantizedLinear, packed_linears

BITS, GROUP = 8, 64
PEER, PROMPT = "llama.cpp, dense, Q8_0", 16
LORAP = {
    "lorap, sparsity 0.5, int8": (0.5, True),
    "the same, op by op": (0.5, False),
    "lorap, dense, int8": (0.0, True),
}


def rounded(size: Size, sparsity: float, in_one_call: bool) -> Any:
    """A model with random numbers of 8 bits in its decoder layers."""
    options = {"layers": size.layers, "vocab_size": size.vocab_size, "tie": size.tie}
    model = random_model(size.shapes, sparsity, torch.bfloat16, **options)
    random_model.cache_clear()
    for name, linear in list(packed_linears(model)):
        rows, columns = linear.weight.shape
        numbers = torch.randint(-127, 128, (rows, columns), dtype=torch.int32)
        scales = torch.full((rows, -(-columns // GROUP)), columns**-0.5 / 100, dtype=torch.bfloat16)
        model.set_submodule(name, QuantizedLinear.from_numbers(numbers, scales, bits=BITS, group_size=GROUP))
    lorap.optimize_for_inference(model)
    for layer in decoder_layers(model):
        if not in_one_call:
            layer.__class__ = type(layer).layer_class
    return model.eval()


def bytes_of(model: Any) -> int:
    """Of all weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def measure(size: Size, rounds: int, new_tokens: int, threads: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per contender, after one round to warm up."""
    dense = random_model(size.shapes, 0.0, torch.float16, layers=size.layers, vocab_size=size.vocab_size, tie=size.tie)
    random_model.cache_clear()
    dense.config.max_position_embeddings = 2048
    file = next(lorap.export_gguf(dense, scratch, tokenizer=byte_tokenizer(), quantize="Q8_0").glob("*.gguf"))
    host = Host(file, threads=threads)
    models = {name: rounded(size, *how) for name, how in LORAP.items()}
    sizes = {PEER: file.stat().st_size} | {name: bytes_of(model) for name, model in models.items()}

    def ours(model: Any) -> Callable[[], float]:
        return lambda: decode_rate(model, new_tokens)

    ask: dict[str, Callable[[], float]] = {PEER: lambda: host.speed(PROMPT, new_tokens)["predicted_per_second"]}
    ask |= {name: ours(model) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in ask}
    for turn in range(rounds + 1):
        for name, rate in ask.items():
            found = rate()
            if turn:
                rates[name].append(found)
    return [
        {
            "contender": name,
            "weight_bytes": sizes[name],
            "tokens_per_second": statistics.median(own),
            "against_llama_cpp": statistics.median(a / b for a, b in zip(own, rates[PEER], strict=True)),
            "rounds": own,
        }
        for name, own in rates.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["contender", "weights", "tokens/s", "x llama.cpp"]
    lines = [
        [
            row["contender"],
            f"{row['weight_bytes'] / 1e6:,.0f} MB",
            f"{row['tokens_per_second']:.1f}",
            f"{row['against_llama_cpp']:.2f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate in each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of both")
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-step.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    label, size = next(iter((QUICK if options.quick else MODELS).items()))
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(size, options.rounds, options.new_tokens, options.threads, Path(scratch))
    environment = {name: version(name) for name in ("xllamacpp", "transformers", "torch", "lorap")}
    environment |= {"python": platform.python_version(), "kernels": native.quantized_cpu_isa(), "model": label}
    how = {"threads": options.threads, "rounds": options.rounds, "new_tokens": options.new_tokens}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "inference-step.json", {"environment": environment | how, "rows": rows})
    (options.out / "inference-step.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
