"""The speed of every family after ``lorap.optimize_for_inference``, beside its own class: benchmarks/results/family_speed.md.

    python benchmarks/family_speed.py [MODEL_TYPE ...] [--tokens N]

Each is a dense random model of 2 layers and a hidden size of 1024 that reads one token behind a cache of 16, or ``N``, which is
printed and not written. Both models are timed in turns, in processor time of one thread, and each turn gives a ratio, so that
what else the machine does counts as little as it can; above 1 lorap is faster.
Rows of families that did not run stay as they were.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from families import EYES, OPTIONS, tiny_config

import lorap
from lorap.architectures import ARCHITECTURES, cache_argument
from lorap.checkpoint.validate import model_class

PAGE = Path(__file__).resolve().parent / "results" / "family_speed.md"
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# Rotary sections of the tiny models fit heads of 16.
SECTIONS = {"num_attention_heads": 64, "num_key_value_heads": 16, "head_dim": 16}
EXPERT_WIDTHS = {"moe_intermediate_size": 704, "shared_expert_intermediate_size": 704}
TURNS, UNTIMED, PAST = 31, 2, 16
HEAD = """# Families

Milliseconds of processor time of one token in a model of 2 layers and hidden size 1024, one thread, behind a cache of 16 tokens:
medians of {turns} turns, in each of which both ran one after the other. The ratio is the median of those of the turns, with its
standard error; above 1 `lorap.optimize_for_inference` is faster than the model's own class. Written by
`python benchmarks/family_speed.py` with torch {torch}{busy}.

| `model_type` | float32: eager | optimized | ratio | bfloat16: eager | optimized | ratio |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Timing:
    """Medians over turns: milliseconds of both models, and eager / optimized with its standard error."""

    eager: float
    optimized: float
    ratio: float
    error: float

    def cells(self) -> str:
        """Three of the table."""
        return f"{self.eager:.2f} | {self.optimized:.2f} | {self.ratio:.3f} ± {self.error:.3f}"


def timing(eager: list[float], optimized: list[float]) -> Timing:
    """From seconds of each turn; the error of a median, from the quartiles as those of a normal distribution."""
    ratios = [first / second for first, second in zip(eager, optimized, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    error = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5
    medians = (1e3 * statistics.median(seconds) for seconds in (eager, optimized))
    return Timing(*medians, statistics.median(ratios), error)


def own_sizes(model_type: str) -> dict[str, Any]:
    """What the tiny model of a family has in other sizes here."""
    widths = {name: width for name, width in EXPERT_WIDTHS.items() if name in OPTIONS.get(model_type, {})}
    return SIZES | widths | (SECTIONS if model_type.startswith("qwen") and model_type in EYES else {})


@torch.inference_mode()
def measure(model_type: str, dtype: torch.dtype, *, tokens: int) -> Timing:
    """Of a pass of so many tokens: of the model's own class, and optimized."""
    config = tiny_config(model_type, **own_sizes(model_type))
    torch.manual_seed(0)
    eager = model_class(config).from_config(config, dtype=dtype).eval()
    # The same memory: where weights lie makes up to 5 % of a pass.
    shared = {id(parameter): parameter for parameter in eager.parameters()}
    optimized = lorap.optimize_for_inference(copy.deepcopy(eager, shared))
    ids = torch.arange(2, PAST + tokens + 2)[None]
    name, models = cache_argument(eager), (eager, optimized)
    caches = [getattr(model(ids[:, :PAST], use_cache=True), name) for model in models]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + UNTIMED):
        for which in (0, 1) if turn % 2 else (1, 0):
            cache = copy.deepcopy(caches[which])
            start = time.process_time()
            models[which](ids[:, PAST:], use_cache=True, **{name: cache})
            if turn >= UNTIMED:
                seconds[which].append(time.process_time() - start)
    return timing(*seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="MODEL_TYPE", help="all, if none is given")
    parser.add_argument("--tokens", type=int, default=1, help="in each pass; the page has those of one (default: 1)")
    arguments = parser.parse_args()
    chosen = arguments.families or list(ARCHITECTURES)
    if unknown := set(chosen) - set(ARCHITECTURES):
        parser.error(f"lorap has no row for {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    before = PAGE.read_text("utf-8").splitlines() if PAGE.exists() else []
    rows = {
        line.split("|")[1].strip(" `"): line for line in before if line.startswith("| `") and "`model_type`" not in line
    }
    busy = os.getloadavg()[0] > os.cpu_count() if os.cpu_count() else False
    for model_type in chosen:
        dtypes = (torch.float32, torch.bfloat16)
        cells = [measure(model_type, dtype, tokens=arguments.tokens).cells() for dtype in dtypes]
        rows[model_type] = f"| `{model_type}` | {' | '.join(cells)} |"
        print(rows[model_type], flush=True)
        if arguments.tokens != 1:
            continue
        told = HEAD.format(
            turns=TURNS, torch=torch.__version__.partition("+")[0], busy=", on a busy machine" if busy else ""
        )
        PAGE.write_text(told + "\n".join(rows[name] for name in ARCHITECTURES if name in rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
