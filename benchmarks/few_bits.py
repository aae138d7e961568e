"""Prompts and steps of several sequences with weights in few bits, beside bfloat16, in transformers on a CPU.

    python benchmarks/few_bits.py                          SmolLM2-135M's shapes, dense, some minutes on two cores
    python benchmarks/few_bits.py --sparsity 0.5 --types int4 tcq4

Weights are random: speed does not depend on the values. All models are loaded at the same time, and every round asks each once;
ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from documents import markdown
from inference import decode_rate
from inference_step import SIZES, TYPES, stored

PLAIN = "bf16"


@torch.inference_mode()
def prompt_rate(model: Any, tokens: int) -> float:
    """Tokens per second of one prompt, without the head's outputs for all but the last token."""
    ids = torch.arange(tokens).unsqueeze(0)
    start = time.perf_counter()
    model(ids, logits_to_keep=1, use_cache=True)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="SmolLM2-135M")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["int8", "int4", "tcq4"], help="beside bf16")
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 128, 512], help="their tokens")
    parser.add_argument(
        "--sequences", nargs="+", type=int, default=[1, 4, 8, 16], help="at once, in steps of one token"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = [PLAIN, *options.types]
    models = {kind: stored(SIZES[options.model], options.sparsity, kind) for kind in kinds}
    asked = {f"prompt of {tokens}": (prompt_rate, (tokens,), {}) for tokens in options.prompts}
    asked |= {
        f"{count} sequences": (decode_rate, (6,), {"sequences": count, "prompt": 2}) for count in options.sequences
    }
    found: dict[tuple[str, str], list[float]] = {(what, kind): [] for what in asked for kind in kinds}
    for turn in range(options.rounds + 1):
        for (what, kind), rates in found.items():
            function, arguments, more = asked[what]
            rate = function(models[kind], *arguments, **more)
            if turn:
                rates.append(rate)
    rows = []
    for what in asked:
        base = found[what, PLAIN]
        ratios = [statistics.median(a / b for a, b in zip(found[what, kind], base, strict=True)) for kind in kinds[1:]]
        rows.append([what, f"{statistics.median(base):.1f}", *(f"{ratio:.2f} x" for ratio in ratios)])
    print(markdown([options.model, "bf16, tokens/s", *kinds[1:]], rows))


if __name__ == "__main__":
    main()
