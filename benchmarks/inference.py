"""Decode speed and memory in transformers, dense and compressed, all in one run.

    python benchmarks/inference.py                 both models, a few minutes on two cores
    python benchmarks/inference.py --quick         tiny models, seconds: to see that it works
    python benchmarks/inference.py --out FOLDER    where the table and the JSON go

``model.generate`` as people call it, batch 1, greedy, bfloat16. Every round runs each contender once, one after the other, so
that a machine that slows down slows all of them; ratios are medians over rounds of the ratio within a round. Weights are
random, of the sizes that the paper's recipe gives: speed does not depend on the values. Peak memory is that of a process of
its own per contender, which builds the model in place and generates.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from documents import markdown
from inference_models import MODELS, QUICK, Size
from random_models import optimized, random_model
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

import lorap
from lorap.jsonio import write_json
from lorap.nn import native
from lorap.system import peak_memory_bytes

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_TOKENS = 16
PLAIN, OURS = "dense, torch", "dense, lorap's kernels"
# name -> (sparsity, optimized)
CONTENDERS = {
    PLAIN: (0.0, False),
    OURS: (0.0, True),
    "sparsity 0.2, as loaded": (0.2, False),
    "sparsity 0.2, optimized": (0.2, True),
    "sparsity 0.5, as loaded": (0.5, False),
    "sparsity 0.5, optimized": (0.5, True),
}


class Clock(StoppingCriteria):
    """Never stops; takes the time after each token, by ``now`` or a clock on the wall."""

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        self.times: list[float] = []
        self.now = now or time.perf_counter

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_options: Any) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def build(size: Size, contender: str) -> Any:
    """The model of one contender; those of one sparsity share their weights."""
    sparsity, ours = CONTENDERS[contender]
    plain = random_model(
        size.shapes, sparsity, torch.bfloat16, layers=size.layers, vocab_size=size.vocab_size, tie=size.tie
    )
    return optimized(plain) if ours else plain


@torch.inference_mode()
def decode_rate(
    model: Any,
    new_tokens: int,
    *,
    sequences: int = 1,
    prompt: int = PROMPT_TOKENS,
    now: Callable[[], float] | None = None,
) -> float:
    """Tokens per second of all sequences together, from the first generated token to the last."""
    clock = Clock(now)
    ids = torch.arange(prompt, device=model.device).expand(sequences, prompt)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]), **options)
    return sequences * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def measure(size: Size, *, rounds: int, new_tokens: int, label: str) -> list[dict[str, Any]]:
    """One row per contender, after one round to warm up."""
    # Before the models are built: a process starts with the peak of the one that started it.
    peaks = {name: peak_memory(size, name, new_tokens) for name in tqdm(CONTENDERS, desc=f"{label}: memory")}
    models = {name: build(size, name) for name in CONTENDERS}
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in tqdm(range(rounds + 1), desc=f"{label}: speed"):
        for name, model in models.items():
            rate = decode_rate(model, new_tokens)
            if turn:
                rates[name].append(rate)
    rows = []
    for name, model in models.items():
        against = {
            other: statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))
            for other in (PLAIN, OURS)
        }
        rows.append(
            {
                "model": label,
                "contender": name,
                "params": sum(parameter.numel() for parameter in model.parameters()),
                "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
                "tokens_per_second": statistics.median(rates[name]),
                "against_torch": against[PLAIN],
                "against_dense_lorap": against[OURS],
                "peak_bytes": peaks[name],
                "rounds": rates[name],
            }
        )
    random_model.cache_clear()
    return rows


def peak_memory(size: Size, contender: str, new_tokens: int) -> int:
    """Highest resident memory of a fresh process that builds the model and generates."""
    known = MODELS | QUICK
    label = next(name for name, one in known.items() if one == size)
    command = [sys.executable, __file__, "--memory-of", label, contender, "--new-tokens", str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["model", "", "parameters", "weights", "tokens/s", "x dense torch", "x dense lorap", "peak memory"]
    lines = []
    for row in rows:
        speed = [f"{row['tokens_per_second']:.1f}", f"{row['against_torch']:.2f}", f"{row['against_dense_lorap']:.2f}"]
        size = [f"{row['params'] / 1e6:,.0f} M", f"{row['weight_bytes'] / 1e6:,.0f} MB"]
        lines.append([row["model"], row["contender"], *size, *speed, f"{row['peak_bytes'] / 1e6:,.0f} MB"])
    return markdown(head, lines)


def environment(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "host": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "lorap": lorap.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "bfloat16_kernels": native.cpu_isa(torch.bfloat16) if native.HAS_CPU else "not built",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "dtype": "bfloat16",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens to generate in each")
    parser.add_argument("--quick", action="store_true", help="tiny models only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for inference-transformers.md and .json")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.memory_of:
        label, contender = options.memory_of
        decode_rate(build((MODELS | QUICK)[label], contender), options.new_tokens)
        print(peak_memory_bytes())
        return
    if not options.quick:
        print(f"measuring {common.measured()}", file=sys.stderr)
    rows = []
    for label, size in (QUICK if options.quick else MODELS).items():
        rows += measure(size, rounds=options.rounds, new_tokens=options.new_tokens, label=label)
    found = {"environment": environment(options), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "inference-transformers.json", found)
    (options.out / "inference-transformers.md").write_text(table(rows) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
